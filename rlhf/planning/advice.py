"""Which settings would make a stage fit: each alone with its figure, and the cheapest ones together."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from rlhf.planning.phases import Spec, peak


@dataclass(frozen=True)
class Change:
    """A setting, as one writes it, and the stage with it."""

    text: str
    spec: Spec


def alternatives(spec: Spec) -> list[Change]:
    """Single changes that need less memory, from the one that costs least time to the one that costs most."""
    now = peak(spec).total
    return [change for change in _changes(spec) if peak(change.spec).total < now]


def together(spec: Spec, budget: int) -> list[Change] | None:
    """Changes one on top of the other, the cheapest first, until the stage fits; None where even all do not suffice."""
    applied: list[Change] = []
    while peak(spec).total > budget:
        better = alternatives(spec)
        if not better:
            return None
        applied = [*[old for old in applied if _key(old) != _key(better[0])], better[0]]
        spec = better[0].spec
    return applied


def _changes(spec: Spec) -> Iterator[Change]:
    if spec.concurrency > 1:
        smaller = min(spec.concurrency, max(spec.batch, 2)) // 2
        yield Change(f"sampling.concurrency={smaller}", spec.with_(concurrency=smaller))
    if not spec.checkpointing and spec.stage in ("sft", "train-rm", "ppo"):
        yield Change("runtime.gradient_checkpointing=true", spec.with_(checkpointing=True))
    if spec.micro > spec.group:
        smaller = max(1, spec.micro // spec.group // 2)
        key = "micro_batch_size" if spec.stage == "eval-rm" else "batch.micro_batch_size"
        yield Change(f"{key}={smaller}", spec.with_(micro=smaller * spec.group))
    if spec.held.e == 4:
        yield Change("model.dtype=bfloat16", spec.with_(held=replace(spec.held, e=2)))
    if spec.held.quantize is None:
        yield Change("model.quantize=nf4", spec.with_(held=replace(spec.held, quantize="nf4")))


def _key(change: Change) -> str:
    return change.text.partition("=")[0]
