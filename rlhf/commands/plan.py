"""``rlhf plan``: memory and time of a stage before anything is loaded, and what would make it fit."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rlhf.config.stages import StageConfig
from rlhf.errors import Problem, RlhfError
from rlhf.findings import Findings
from rlhf.planning import advice, clock, phases
from rlhf.planning.clock import Speed
from rlhf.planning.phases import PARTS, Spec
from rlhf.planning.specs import Ground
from rlhf.preflight import resources
from rlhf.preflight.resources import size
from rlhf.runs import progress
from rlhf.stages import ancestry
from rlhf.stages.registry import STAGES, kinds_of, open_config

log = logging.getLogger("rlhf")
UNITS = {"k": 1e3, "m": 1e6, "g": 1e9, "t": 1e12, "p": 1e15}
BINARY = {"k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40}
TOLERANCE = 0.1


@dataclass(frozen=True)
class Device:
    """What the command line says of it: memory to fit into, operations and bytes a second, whether to measure those."""

    gpu: str | None = None
    flops: str | None = None
    bandwidth: str | None = None
    measure: bool = False


def plans(files: Sequence[Path], stage: str | None, overrides: Sequence[str], device: Device) -> list[dict[str, Any]]:
    """A plan of each config of a stage; that of a pipeline stands for its stages. All problems are raised together.

    Raises:
        RlhfError: as ``kinds_of`` and ``plan``.
    """
    findings = Findings()
    found: dict[tuple[Path, str], dict[str, Any]] = {}
    for path, kind in _stages_of(kinds_of(files, stage, findings), findings):
        with findings.gathering():
            if (path, kind) not in found:
                found[path, kind] = plan(path, kind, overrides, device)
    if findings.problems:
        raise RlhfError(*dict.fromkeys(findings.problems))
    return list(found.values())


def _stages_of(kinds: Sequence[tuple[Path, str]], findings: Findings) -> Iterator[tuple[Path, str]]:
    """Each stage's config; that of a pipeline gives those of its steps, and a rubric none."""
    for path, kind in kinds:
        if kind in STAGES:
            yield path, kind
        elif kind == "pipeline":
            with findings.gathering():
                steps = open_config(kind, path).stages
                yield from ((Path(step.config), step.stage) for step in steps)
        else:
            log.warning("Left out: %s: a %s config has no memory to plan.", path, kind)


def plan(path: Path, stage_id: str, overrides: Sequence[str], device: Device) -> dict[str, Any]:
    """Every phase's bytes by part, the budget, what would fit, and the seconds of a step, as JSON values.

    Raises:
        RlhfError: for the config, a base that is not here or not known, CFG040 for a number that cannot be read.
    """
    if stage_id not in STAGES:
        what = f"no stage is called '{stage_id}'."
        raise RlhfError(Problem("CFG008", str(path), what, f"one of {', '.join(STAGES)}"))
    config = open_config(stage_id, path, overrides, "--stage {kind}")
    spec, said_by, assumed = _spec(config, stage_id, path, "cuda" if device.gpu else "cpu")
    budget = round(number(device.gpu, "--gpu", BINARY)) if device.gpu else resources.available_memory()
    found = phases.phases(spec)
    worst = phases.peak(spec)
    speed = _speed(spec, device)
    outcome: dict[str, Any] = {
        "config": str(path),
        "stage": stage_id,
        "base_said_by": said_by,
        "parameters": spec.shape.parameters,
        "assumed": assumed,
        "device": spec.device,
        "budget": budget,
        "peak": worst.total,
        "peak_phase": worst.name,
        "phases": [{"phase": phase.name, **phase.parts, "total": phase.total} for phase in found],
        "fits": None if budget is None else worst.total <= budget,
        "alternatives": [
            {"set": change.text, "peak": phases.peak(change.spec).total} for change in advice.alternatives(spec)
        ],
        "together": _together(spec, budget),
        "steps": spec.steps,
        "work": None,
        "measuring": None,
    }
    if speed:
        outcome |= {"flops": speed.flops, "bandwidth": speed.bandwidth}
        outcome["work"] = [vars(work) for work in clock.step(spec, speed)]
        if work := clock.measuring(spec, speed):
            outcome["measuring"] = {**vars(work), "times": spec.measurements}
    return outcome


def lines(outcome: dict[str, Any]) -> list[str]:
    """The same for a person."""
    shown = [
        f"{outcome['config']}: {outcome['stage']} on a base of {outcome['parameters'] / 1e6:,.0f} M parameters "
        f"(named by {outcome['base_said_by']}), in rows as long as the config allows.",
        *(f"Assumed: {text}." for text in outcome["assumed"]),
        "",
        "  ".join([f"{'phase':14}", *(f"{part.replace('_', ' '):>11}" for part in PARTS), f"{'total':>11}"]),
    ]
    for row in outcome["phases"]:
        shown.append("  ".join([f"{row['phase']:14}", *(f"{_short(row.get(p, 0)):>11}" for p in (*PARTS, "total"))]))
    where = "the GPU" if outcome["device"] == "cuda" else "this machine"
    peak = f"Predicted peak {size(outcome['peak'])} ({outcome['peak_phase']}), within about {TOLERANCE:.0%} on a CPU"
    shown += ["", f"{peak}; a GPU's own context and fragmentation come on top and were not measured."]
    if outcome["budget"] is None:
        shown.append("How much memory is available is not known here: --gpu names it.")
    else:
        verdict = "It fits" if outcome["fits"] else "It does not fit"
        shown.append(f"{verdict} into the {size(outcome['budget'])} of {where}.")
    if outcome["alternatives"] and outcome["fits"] is not True:
        shown += ["", "Each alone would need:"]
        shown += [f"  {size(change['peak']):>10}  {change['set']}" for change in outcome["alternatives"]]
        together = outcome["together"]
        if together is None:
            shown.append("No combination of these fits: a smaller base, shorter rows, or more memory.")
        elif together:
            shown.append(f"Enough: {', '.join(together['set'])} ({size(together['peak'])}).")
        shown.append("model.* belongs to the SFT config; the stages behind it take it from there.")
    return [*shown, "", *_time_lines(outcome)]


def _time_lines(outcome: dict[str, Any]) -> list[str]:
    if outcome["work"] is None:
        return ["Time: --flops and --bandwidth name the device's speed as reached, --measure measures this machine's."]
    shown = [
        f"At {outcome['flops']:.3g} operations and {outcome['bandwidth']:.3g} bytes a second, in rows as long as the "
        "config allows, matrix products and reads alone:"
    ]
    for work in outcome["work"]:
        rate = work["tokens"] / work["seconds"]
        shown.append(f"  {work['name']:17} {clock.duration(work['seconds']):>9} a step  ({rate:,.0f} tokens/s)")
    step = sum(work["seconds"] for work in outcome["work"])
    if outcome["steps"]:
        total = clock.duration(outcome["steps"] * step)
        shown.append(f"{outcome['steps']} steps of {clock.duration(step)}: {total}. Shorter rows take less.")
    if held_out := outcome["measuring"]:
        times, each = held_out["times"], held_out["seconds"]
        shown.append(
            f"{times} measurements of the held-out loss, {clock.duration(each)} each, on top: "
            f"{clock.duration(times * each)}."
        )
    return shown


def number(text: str, where: str, units: dict[str, float] | dict[str, int]) -> float:
    """24GB, 900G, 1.5e12 -> a number; powers of 1024 for memory, of 1000 for speed.

    Raises:
        RlhfError: CFG040.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?(?:e\+?\d+)?)\s*([kmgtp]?)(?:i?b)?(?:/s)?", text.strip().lower())
    if not found or (found[2] and found[2] not in units) or not float(found[1]):
        raise RlhfError(
            Problem("CFG040", where, f"is no size: {text!r}.", "a number with a unit, such as 24GB or 150T")
        )
    return float(found[1]) * (units[found[2]] if found[2] else 1)


def _spec(config: StageConfig, stage_id: str, path: Path, device: str) -> tuple[Spec, str, list[str]]:
    stage = STAGES[stage_id]
    if own := stage.origin(config):
        origin, where = replace(own, said_by=str(path)), "model.path"
    elif parent := stage.parent(config):
        origin, where = ancestry.find(parent, path.parent), f"{parent}: base"
    else:
        what = "is a model from elsewhere, whose memory is not predicted."
        raise RlhfError(Problem("MOD051", "model", what, "count its weights and one micro-batch"))
    data: dict[str, Any] = {}
    assumed = []
    needs = stage.needs(config)
    for item in needs.inputs:
        try:
            data[item.key] = item.read(item.section, config.seed).records
        except RlhfError as error:
            assumed.append(f"{item.key} is not readable ({error.problems[0].code}): steps and rankings unknown")
    assert needs.memory, "every stage's memory is predicted"
    found = needs.memory(Ground(origin, data, device, where))
    return found, origin.said_by, [*assumed, *stage.assumed(config, found, list(data))]


def _together(spec: Spec, budget: int | None) -> dict[str, Any] | None:
    if budget is None:
        return None
    changes = advice.together(spec, budget)
    if changes is None:
        return None
    return {"set": [c.text for c in changes], "peak": phases.peak(changes[-1].spec).total} if changes else {}


def _speed(spec: Spec, device: Device) -> Speed | None:
    flops, bandwidth = device.flops, device.bandwidth
    if device.measure:
        shape, measured = spec.shape, progress.load("rlhf.models.speed").measured
        return measured(shape.d, shape.f, spec.held.e, clock.sums(spec))  # type: ignore[no-any-return]
    if (flops is None) != (bandwidth is None):
        missing = "--bandwidth" if bandwidth is None else "--flops"
        raise RlhfError(Problem("CFG040", missing, "is missing: time follows from both.", "give both, or --measure"))
    if flops is None or bandwidth is None:
        return None
    return Speed(number(flops, "--flops", UNITS), number(bandwidth, "--bandwidth", UNITS))


def _short(num_bytes: int) -> str:
    return size(num_bytes) if num_bytes else "-"
