"""Stages one after the other, each in its own process, so that nothing of one leaks into the next."""

from __future__ import annotations

import logging
import subprocess
import sys
from pathlib import Path

from rlhf import preflight, runs
from rlhf.config import load
from rlhf.config.stages import PipelineConfig, PipelineStep
from rlhf.errors import Problem, RlhfError
from rlhf.stages.registry import STAGES

log = logging.getLogger("rlhf")


def run(path: Path) -> list[dict[str, str]]:
    """Bring every stage of a pipeline config up to date; returns what was done with each.

    A changed run is moved aside and made anew, and the changed inputs are named first.

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
    command = [sys.executable, "-m", "rlhf", step.stage, "-c", step.config, "--overwrite"]
    code = subprocess.run(command, check=False).returncode
    if code:
        raise SystemExit(code if code > 0 else 128 - code)
    return {"stage": step.stage, "run_dir": config.run_dir, "outcome": "run"}
