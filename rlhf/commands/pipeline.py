"""Stages one after the other, each in its own process, so that nothing of one leaks into the next."""

from __future__ import annotations

import logging
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rlhf import secrets
from rlhf.config import yaml_reader
from rlhf.errors import Problem, RlhfError
from rlhf.findings import Findings
from rlhf.preflight import examined
from rlhf.preflight.needs import Needs
from rlhf.preflight.neighbours import Nearby, command
from rlhf.runs import artifacts, interrupts, progress
from rlhf.stages import starting
from rlhf.stages.contract import Stage
from rlhf.stages.registry import STAGES, around, open_config
from rlhf.stages.starting import Ready

log = logging.getLogger("rlhf")


@dataclass(frozen=True)
class Part:
    """What of a pipeline is run, and how it differs from its configs.

    Args:
        sets: overrides, each as STAGE.key.subkey=value.
        limit: rows of every data set.
        first, last: the stages to begin and to end with; None: all.
    """

    sets: tuple[str, ...] = ()
    limit: int | None = None
    first: str | None = None
    last: str | None = None


@dataclass(frozen=True)
class Step:
    """One stage of a pipeline, ``number`` of ``count``."""

    number: int
    count: int
    stage: Stage
    path: Path
    overrides: tuple[str, ...] = ()

    @property
    def title(self) -> str:
        return f"stage {self.number} of {self.count}: {self.stage.id}"


def run(path: Path, part: Part = Part()) -> list[dict[str, str]]:
    """Bring the stages of a pipeline config up to date; returns what was done with each.

    An unfinished run goes on; a changed one is moved aside and made anew, and the changed inputs are named first.

    Raises:
        RlhfError: for problems in any config, before the first stage starts; GRD030 before PPO where an examination in
            this pipeline failed; a gate that a finished run does not pass.
        SystemExit: with a stage's exit code, where it failed.
    """
    steps = _steps(path, part)
    paths = [step.path for step in steps]
    done: list[dict[str, str]] = []
    examinations: list[str] = []
    for step in steps:
        found = starting.ready(step.stage, step.path, step.overrides, others=paths)
        _refuse_failed(found, examinations)
        done.append(_bring_up_to_date(step, found, step.title.capitalize()))
        examinations += [found.config.run_dir] if step.stage.makes == "examination" else []
    return done


def plans(path: Path, part: Part = Part()) -> list[dict[str, Any]]:
    """What ``run`` would do with each stage, as lines; runs that are not made yet are noted."""
    steps = _steps(path, part)
    paths = [step.path for step in steps]
    found = []
    for step in steps:
        ready = starting.ready(step.stage, step.path, step.overrides, parents_may_be_missing=True, others=paths)
        found.append({"stage": step.stage.id, "title": step.title.capitalize(), "plan": ready.lines()})
    return found


def bring_up_to_date(stage_id: str, path: Path, overrides: Sequence[str] = ()) -> dict[str, str]:
    """Run one stage in its own process, unless its run is finished and unchanged; returns what was done.

    Raises:
        SystemExit: with the stage's exit code, where it failed.
    """
    step = Step(1, 1, STAGES[stage_id], path, tuple(overrides))
    return _bring_up_to_date(step, starting.ready(step.stage, path, overrides), f"{stage_id} in {path}")


def _bring_up_to_date(step: Step, found: Ready, title: str) -> dict[str, str]:
    outcome = {"stage": step.stage.id, "run_dir": found.config.run_dir}
    if found.reasons is None:
        found.settle()
        log.info("%s: %s is up to date, skipped.", title, found.run_dir)
        return {**outcome, "outcome": "up to date"}
    log.info("%s, because %s.", title, "; ".join(found.reasons))
    command = [sys.executable, "-m", "rlhf", step.stage.id, "-c", str(step.path), "--resume", "--overwrite"]
    code = _in_its_own_process([*command, *(f"--set={item}" for item in step.overrides)])
    if code:
        raise SystemExit(code if code > 0 else 128 - code)
    return {**outcome, "outcome": "run"}


def _refuse_failed(found: Ready, examinations: Sequence[str]) -> None:
    """Raise GRD030 where a reward failed an examination of this pipeline that the stage's config does not name."""
    problems = []
    for key, own in found.plan.unnamed.items() if found.stage.optimises else ():
        for run_dir, manifest in own.items():
            if run_dir in examinations and manifest.details["verdict"] == examined.FAIL:
                one = examined.failure(key, found.needs.rewards[key].name, run_dir, manifest)
                problems.append(replace(one, fix=f"{one.fix} and {key}.examination: {run_dir}"))
    if problems:
        raise RlhfError(*problems)


def _steps(path: Path, part: Part) -> list[Step]:
    """The stages to run with their overrides; every config is sound, and every run that one is made from is there or
    made by an earlier one."""
    named = open_config("pipeline", path).stages
    if unknown := [step.stage for step in named if step.stage not in STAGES]:
        known = f"one of {', '.join(STAGES)}"
        raise RlhfError(*(Problem("CFG008", str(path), f"no stage is called '{one}'.", known) for one in unknown))
    steps = [
        Step(number, len(named), STAGES[step.stage], Path(step.config)) for number, step in enumerate(named, start=1)
    ]
    first = _named(steps, part.first, "--from").number if part.first else 1
    last = _named(steps, part.last, "--to").number if part.last else len(steps)
    if first > last:
        what = f"stage {last}, {steps[last - 1].stage.id}, comes before stage {first}, {steps[first - 1].stage.id}."
        raise RlhfError(Problem("CFG005", "--to", what, "exchange --from and --to"))
    overrides: dict[int, list[str]] = {step.number: [] for step in steps}
    for item in part.sets:
        name, dot, rest = item.partition(".")
        if not dot or "=" not in rest or "=" in name:
            fix = "for instance --set ppo.kl.coef=0.1"
            raise RlhfError(Problem("CFG005", _place(item), "not of the form STAGE.key.subkey=value.", fix))
        overrides[_named(steps, name, _place(item)).number].append(rest)
    chosen = [replace(step, overrides=tuple(overrides[step.number])) for step in steps[first - 1 : last]]
    if left_out := [item for step in steps for item in overrides[step.number] if not first <= step.number <= last]:
        what = "is of a stage that --from and --to leave out."
        raise RlhfError(*(Problem("CFG005", _place(item), what, "leave it out too") for item in left_out))
    return _checked(path, chosen, part.limit)


def _place(item: str) -> str:
    """An override as a message names it: without its value, which may be a secret."""
    return f"--set {yaml_reader.shown(secrets.mask(item.partition('=')[0]))}"


def _named(steps: Sequence[Step], name: str, where: str) -> Step:
    """The step of a stage's name, or with a number."""
    found = [step for step in steps if name in (step.stage.id, str(step.number))]
    listed = ", ".join(f"{step.number} ({step.stage.id}, {step.path})" for step in found or steps)
    if not found:
        raise RlhfError(Problem("CFG005", where, f"the pipeline has no stage {name}.", f"one of {listed}"))
    if len(found) > 1:
        raise RlhfError(Problem("CFG005", where, f"the pipeline has {name} more than once.", f"its number: {listed}"))
    return found[0]


def _checked(path: Path, steps: Sequence[Step], limit: int | None) -> list[Step]:
    findings = Findings()
    found: list[Step] = []
    nearby = around(steps[0].path, [step.path for step in steps])
    made: set[str] = set()
    for step in steps:
        with findings.gathering():
            fix = f"stage: {{kind}} in {path}"
            open_config(step.stage.id, step.path, step.overrides, fix)
            limits = starting.limits(step.stage, step.path, step.overrides, limit) if limit else []
            step = replace(step, overrides=(*step.overrides, *limits))
            config = open_config(step.stage.id, step.path, step.overrides)
            findings.extend(_unmade(step, step.stage.needs(config), made, nearby))
            made.add(config.run_dir)
        found.append(step)
    findings.refuse()
    return found


def _unmade(step: Step, needs: Needs, made: set[str], nearby: Nearby) -> list[Problem]:
    """CKP001 for each run that the stage is made from which is not there, and which no earlier stage makes."""
    return [
        Problem(
            "CKP001",
            f"{step.path}: {parent.key}: {parent.run_dir}",
            "no finished run there, and no earlier stage of this pipeline makes it.",
            f"{command(parent.run_dir, parent.kinds, nearby())} before {step.title}",
        )
        for parent in needs.parents
        if parent.run_dir not in made and not artifacts.is_finished(Path(parent.run_dir))
    ]


def _in_its_own_process(command: list[str]) -> int:
    """The exit code. A signal is passed on once, and waited for: the stage saves before it ends.

    The process group of its own keeps a terminal from sending the same Ctrl-C a second time, which would mean: at once.
    """
    process = subprocess.Popen(command, process_group=0, env=progress.stage_environment())
    try:
        return process.wait()
    except interrupts.Interrupted as signal:
        process.send_signal(signal.signum)
        return process.wait()
