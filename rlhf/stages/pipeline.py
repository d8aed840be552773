"""Stages one after the other, each in its own process, so that nothing of one leaks into the next."""

from __future__ import annotations

import logging
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from rlhf import interrupts, preflight, runs
from rlhf.config.stages import PipelineStep
from rlhf.errors import Problem, RlhfError
from rlhf.stages.registry import STAGES, open_config

log = logging.getLogger("rlhf")


def run(path: Path) -> list[dict[str, str]]:
    """Bring every stage of a pipeline config up to date; returns what was done with each.

    An unfinished run goes on; a changed one is moved aside and made anew, and the changed inputs are named first.

    Raises:
        RlhfError: for problems in any config, before the first stage starts; or the failed stage's exit code.
    """
    steps = open_config("pipeline", path).stages
    problems = [problem for step in steps for problem in _problems(step, path)]
    if problems:
        raise RlhfError(*problems)
    return [bring_up_to_date(step.stage, Path(step.config)) for step in steps]


def _problems(step: PipelineStep, path: Path) -> tuple[Problem, ...]:
    if step.stage not in STAGES:
        return (Problem("CFG008", str(path), f"no stage is called '{step.stage}'.", f"one of {', '.join(STAGES)}"),)
    try:
        open_config(step.stage, Path(step.config), fix=f"stage: {{kind}} in {path}")
    except RlhfError as error:
        return error.problems
    return ()


def bring_up_to_date(stage_id: str, path: Path, overrides: Sequence[str] = ()) -> dict[str, str]:
    """Run one stage in its own process, unless its run is finished and unchanged; returns what was done.

    Raises:
        SystemExit: with the stage's exit code, where it failed.
    """
    stage = STAGES[stage_id]
    config = open_config(stage_id, path, overrides)
    plan = preflight.prepare(config, stage.needs(config))
    reasons = runs.status(Path(config.run_dir), plan.identity)
    if reasons is None:
        log.info("%s: %s is up to date, skipped.", stage_id, config.run_dir)
        return {"stage": stage_id, "run_dir": config.run_dir, "outcome": "up to date"}
    log.info("%s: running, because %s.", stage_id, "; ".join(reasons))
    command = [sys.executable, "-m", "rlhf", stage_id, "-c", str(path), "--resume", "--overwrite"]
    code = _in_its_own_process([*command, *(f"--set={item}" for item in overrides)])
    if code:
        raise SystemExit(code if code > 0 else 128 - code)
    return {"stage": stage_id, "run_dir": config.run_dir, "outcome": "run"}


def _in_its_own_process(command: list[str]) -> int:
    """The exit code. A signal is passed on once, and waited for: the stage saves before it ends.

    The process group of its own keeps a terminal from sending the same Ctrl-C a second time, which would mean: at once.
    """
    process = subprocess.Popen(command, process_group=0)
    try:
        return process.wait()
    except interrupts.Interrupted as signal:
        process.send_signal(signal.signum)
        return process.wait()
