"""What memory and time depend on: what a stage starts from, and the parts that several stages count alike."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rlhf.config.sections import LoraSection, ModelSection, RoleLoraSection, RuntimeSection, SamplingSection
from rlhf.config.stages import HeldOutSection
from rlhf.errors import Problem, RlhfError
from rlhf.planning import shape as shapes
from rlhf.planning.memory import Numbers
from rlhf.planning.phases import Spec
from rlhf.runs import artifacts, policy_sampling
from rlhf.runs.artifacts import Manifest

WIDTH = {"float32": 4, "bfloat16": 2}
ADAPTER_CONFIG = f"{artifacts.ADAPTER}/adapter_config.json"


@dataclass(frozen=True)
class Origin:
    """The base and the adapter that a stage starts from, how that policy is sampled, and who says so.

    Args:
        model: the section of a config that names the base; None: a run does.
    """

    source: str
    dtype: str
    quantize: str | None
    rank: int
    targets: str | tuple[str, ...]
    num_tokens: int
    said_by: str
    sampling: SamplingSection = field(default_factory=SamplingSection)
    model: ModelSection | None = None


@dataclass(frozen=True)
class Ground:
    """What a stage's memory is predicted from, besides its config.

    Args:
        data: key -> rows, as far as they are known: the number of steps and the size of rankings follow from them.
        where: what messages call the base.
    """

    origin: Origin
    data: Mapping[str, Sequence[Any]]
    device: str
    where: str

    def spec(self, stage: str, runtime: RuntimeSection) -> Spec:
        """What holds for any stage.

        Raises:
            RlhfError: as ``planning.shape.read``.
        """
        origin = self.origin
        shape = shapes.read(origin.source, self.where)
        held = Numbers(WIDTH[origin.dtype], origin.quantize, self.device == "cuda")
        return Spec(
            stage,
            shape,
            held,
            origin.rank,
            origin.targets,
            origin.num_tokens,
            device=self.device,
            checkpointing=runtime.gradient_checkpointing,
        )


@dataclass(frozen=True)
class Length:
    """How long a stage trains: optimizer steps, or passes over its rows in batches, once for each member."""

    steps: int | None
    epochs: float | None
    batch_size: int
    members: int = 1

    def num_steps(self, rows: Sequence[Any] | None) -> int | None:
        """Those of all members; None where it follows from rows that are not known."""
        if self.steps is not None or rows is None:
            return self.steps and self.members * self.steps
        return self.members * max(1, math.ceil(len(rows) * (self.epochs or 0) / self.batch_size))


def of_model(model: ModelSection, lora: LoraSection | None, sampling: SamplingSection, said_by: str) -> Origin:
    """What a stage makes of a model that its config names."""
    lora = lora or LoraSection()
    targets = "all-linear" if lora.target_modules == "all-linear" else tuple(lora.target_modules)
    num_tokens = len(lora.train_tokens)
    return Origin(model.path, model.dtype, model.quantize, lora.r, targets, num_tokens, said_by, sampling, model)


def of_run(run_dir: str, manifest: Manifest) -> Origin:
    """What a finished run was made on, and the adapter that it holds.

    Raises:
        RlhfError: CKP010 where its adapter is missing or not readable.
    """
    assert manifest.base is not None, "policies and rewards have a base"
    base = manifest.base
    sampling = policy_sampling.own(manifest).section
    if artifacts.adapter_of(run_dir) is None:  # a model of its own: roles that start from it get a fresh adapter
        return Origin(base.source, base.dtype, base.quantize, LoraSection().r, "all-linear", 0, run_dir, sampling)
    path = artifacts.members_of(run_dir)[0] / ADAPTER_CONFIG
    try:
        adapter = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError):
        raise RlhfError(Problem("CKP010", str(path), "missing or not readable.", "make the run again")) from None
    tokens = adapter.get("trainable_token_indices") or []
    rows = next(iter(tokens.values()), []) if isinstance(tokens, dict) else tokens
    targets = tuple(adapter["target_modules"])
    return Origin(base.source, base.dtype, base.quantize, adapter["r"], targets, len(rows), run_dir, sampling)


def require_adapter(lora: LoraSection | RoleLoraSection | None) -> None:
    """Raise MOD051 where every weight is trained, which is not predicted."""
    if lora is None:
        what = "null trains every weight, whose memory is not predicted."
        fix = "count 16 bytes a weight for each trained model, 4 for each frozen one, and activations"
        raise RlhfError(Problem("MOD051", "lora", what, fix))


def rows_a_pass(most: int, tokens: int | None, longest: int) -> int:
    """Rows of ``longest`` tokens in a micro-batch."""
    return most if tokens is None else max(1, min(most, tokens // longest))


def measurements(
    length: Length, evaluation: HeldOutSection, holdout_fraction: float, rows: Sequence[Any] | None, group: int
) -> dict[str, int]:
    """Held-out sequences, ``group`` of them a row, and how often they are measured during training."""
    steps, every = length.num_steps(rows), evaluation.every
    if not every or not steps or rows is None:
        return {}
    times = length.members * (1 + math.ceil(steps / length.members / every))
    return {"measured": group * max(1, round(holdout_fraction * len(rows))), "measurements": times}


def num_roles(runs: Sequence[str]) -> int:
    """Roles that reward runs need: one a member of each, of one that does not stand yet one."""
    return sum(len(artifacts.members_of(run)) for run in runs)


def unmade(runs: Sequence[str]) -> list[str]:
    """What is assumed of reward runs that do not stand yet, as a sentence."""
    missing = [run for run in runs if not artifacts.is_finished(Path(run))]
    are = "is" if len(missing) == 1 else "are"
    return [f"one member in {', '.join(missing)}, which {are} not there yet"] if missing else []


def rank_of(run_dir: str | None) -> int | None:
    if run_dir is None or not artifacts.is_finished(Path(run_dir)) or artifacts.adapter_of(run_dir) is None:
        return None
    return int(json.loads((artifacts.members_of(run_dir)[0] / ADAPTER_CONFIG).read_text("utf-8"))["r"])
