"""Examination without torch: what it needs, what it takes of memory, and how a finished one is judged again."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from rlhf.config import suite_file
from rlhf.config.stages import EvalRmConfig
from rlhf.data import labels, sources
from rlhf.errors import Problem, RlhfError
from rlhf.evaluation import exam_tables, verdicts
from rlhf.planning.phases import Spec
from rlhf.planning.specs import Ground
from rlhf.preflight.needs import Input, Needs, Parent, Rows
from rlhf.runs import artifacts
from rlhf.runs.artifacts import Manifest
from rlhf.runs.progress import show
from rlhf.stages.contract import Stage

log = logging.getLogger("rlhf")


def needs(config: EvalRmConfig) -> Needs:
    if config.suite:
        suite_file.read(config.suite)  # its mistakes are said before any model is opened
    read = sources.load_benchmark(config.benchmark) if config.benchmark else labels.noted(sources.load_comparisons)
    rows = Rows(config.max_length)
    inputs = [Input("data", config.data, read, rows, held_out_from=("train-rm", "data"))]
    if config.drift:
        inputs.append(Input("drift", config.drift, labels.noted(sources.load_responses), rows))
    several = [(f"runs.{index}", run) for index, run in enumerate(config.runs or ())]
    named = [("reward", config.reward)] if config.reward else several
    return Needs(
        parents=tuple(Parent(key, run, ("reward",)) for key, run in named),
        inputs=tuple(inputs),
        scorers=(("model", config.model),) if config.model else (),
        directories=(("suite", config.suite),) if config.suite else (),
        heads=(config.head,) if config.head else (),
        memory=partial(memory, config),
    )


def parent(config: EvalRmConfig) -> str | None:
    return config.reward or (config.runs[0] if config.runs else None)


def memory(config: EvalRmConfig, ground: Ground) -> Spec:
    if config.runs:
        what = "may be on several bases, whose memory together is not predicted."
        raise RlhfError(Problem("MOD051", "runs", what, "plan with reward: one of them, and add the weights"))
    members = len(artifacts.members_of(config.reward)) if config.reward else 1
    common = ground.spec(STAGE.id, config.runtime)
    return common.with_(micro=config.micro_batch_size, length=config.max_length, members=members)


def judged_again(config: EvalRmConfig, manifest: Manifest) -> Manifest:
    """Judge the figures of an examination by other thresholds; nothing is scored."""
    run_dir = Path(config.run_dir)
    artifacts.verify(run_dir, manifest)
    report: Mapping[str, Any] = json.loads((run_dir / artifacts.EXAMINATION).read_text("utf-8"))
    if "verdict" not in report:
        return manifest  # of a benchmark
    found = verdicts.judge(report, config.thresholds)
    judged = verdicts.table(found)
    if all(report[key] == judged[key] for key in artifacts.VERDICTS):
        return manifest
    log.info("%s: judged again by other thresholds: %s, before: %s.", run_dir, judged["verdict"], report["verdict"])
    show(exam_tables.verdict_lines(judged["verdicts"]))
    now = artifacts.judged_again(run_dir, manifest, {**report, **judged})
    return replace(now, details={**now.details, "verdict": judged["verdict"], "failed": verdicts.failed(found)})


STAGE = Stage(
    "eval-rm",
    EvalRmConfig,
    "examination",
    needs,
    "Examine a reward model.",
    parent=parent,
    judged_again=judged_again,
)
