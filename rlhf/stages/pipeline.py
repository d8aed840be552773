"""Stages one after the other, each in its own process, so that nothing of one leaks into the next."""

from __future__ import annotations

import logging
import subprocess
import sys
from pathlib import Path

from rlhf import interrupts, preflight, runs
from rlhf.config import load
from rlhf.config.stages import PipelineConfig, PipelineStep
from rlhf.errors import Problem, RlhfError
from rlhf.stages.registry import STAGES

log = logging.getLogger("rlhf")


def run(path: Path) -> list[dict[str, str]]:
    """Bring every stage of a pipeline config up to date; returns what was done with each.

    An unfinished run goes on; a changed one is moved aside and made anew, and the changed inputs are named first.

    Raises:
        RlhfError: for problems in any config, before the first stage starts; or the failed stage's exit code.
    """
    steps = load.load(PipelineConfig, path).stages
    problems = [problem for step in steps for problem in _problems(step, path)]
    if problems:
        raise RlhfError(*problems)
    return [_bring_up_to_date(step) for step in steps]


def _problems(step: PipelineStep, path: Path) -> tuple[Problem, ...]:
    if step.stage not in STAGES:
        return (Problem("CFG008", str(path), f"no stage is called '{step.stage}'.", f"one of {', '.join(STAGES)}"),)
    try:
        load.load(STAGES[step.stage].config_class, Path(step.config))
    except RlhfError as error:
        return error.problems
    return ()


def _bring_up_to_date(step: PipelineStep) -> dict[str, str]:
    stage = STAGES[step.stage]
    config = load.load(stage.config_class, Path(step.config))
    plan = preflight.prepare(config, stage.needs(config))
    reasons = runs.status(Path(config.run_dir), plan.identity)
    if reasons is None:
        log.info("%s: %s is up to date, skipped.", step.stage, config.run_dir)
        return {"stage": step.stage, "run_dir": config.run_dir, "outcome": "up to date"}
    log.info("%s: running, because %s.", step.stage, "; ".join(reasons))
    code = _in_its_own_process([sys.executable, "-m", "rlhf", step.stage, "-c", step.config, "--resume", "--overwrite"])
    if code:
        raise SystemExit(code if code > 0 else 128 - code)
    return {"stage": step.stage, "run_dir": config.run_dir, "outcome": "run"}


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
