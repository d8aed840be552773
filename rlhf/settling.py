"""A finished run and the gates of a config: it is judged from its files, without a model, and keeps the outcome."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from rlhf import artifacts, examined, gates, identity, runs
from rlhf.artifacts import FAILED_GATES, Manifest
from rlhf.config import load
from rlhf.config.ppo import GuardSection, Limit
from rlhf.config.sections import DataSection, Section
from rlhf.config.stages import EvalRmConfig, PpoConfig, StageConfig
from rlhf.data.dropped import excess
from rlhf.errors import Problem, RlhfError
from rlhf.evaluation import examination, verdicts
from rlhf.guards import Guard
from rlhf.preflight import Needs, Plan
from rlhf.progress import show

log = logging.getLogger("rlhf")
TOO_MANY_DROPPED = "GRD021"


def judge(config: StageConfig, manifest: Manifest) -> list[Problem]:
    """Every gate of ``config`` that the run in its run_dir does not pass: by the figures in the manifest, and PPO's
    guards by metrics.jsonl, which has those of every step."""
    guarded = _guarded(config) if isinstance(config, PpoConfig) else []
    return [*_dropped(config, manifest), *gates.judge(config, manifest), *guarded]


def complete(config: StageConfig, needs: Needs, plan: Plan, manifest: Manifest) -> Manifest:
    """The manifest with what it has to say of gates: those that were not passed, and failed examinations that were
    accepted, here or for one of the runs that this one is made from."""
    failed = judge(config, manifest)
    if not any(problem.code == TOO_MANY_DROPPED for problem in failed):
        failed = [replace(problem, code=TOO_MANY_DROPPED) for problem in plan.beyond] + failed
    marks = examined.accepted(needs.rewards, plan.parents, config.run_dir)
    marks += examined.inherited([*plan.parents.values(), *_runs_that_are_data(needs)])
    found = {FAILED_GATES: [asdict(problem) for problem in failed], examined.ACCEPTED: marks}
    kept = {key: value for key, value in manifest.details.items() if key not in found}
    return replace(manifest, details={**kept, **{key: value for key, value in found.items() if value}})


def settle(config: StageConfig, needs: Needs, plan: Plan) -> None:
    """Judge the finished run in ``config.run_dir``, which has this config's identity, by this config's gates.

    The run keeps the outcome, and the config as its own: what is made from it later is refused where it did not pass.

    Raises:
        RlhfError: the gates that were not passed; the run stands as it is.
    """
    run_dir = Path(config.run_dir)
    manifest = artifacts.read(run_dir)
    has_other_gates = _recorded_gates(config) != identity.gates(config)
    now = complete(config, needs, plan, replace(manifest, parents=plan.parents_table(needs)))
    if now != manifest or has_other_gates:
        with runs.locked(run_dir):
            if has_other_gates and isinstance(config, EvalRmConfig):
                now = _examine_again(config, now)
            artifacts.rewrite(run_dir, now)
            artifacts.write_config(run_dir, load.dump(config))
    if failed := artifacts.failed_gates(now):
        raise RlhfError(*failed)


def _recorded_gates(config: StageConfig) -> dict[str, Any] | None:
    """Those that the run was judged by last; None where its config cannot be read."""
    try:
        return identity.gates(load.load(type(config), Path(config.run_dir) / artifacts.CONFIG))
    except (RlhfError, OSError):
        return None


def _runs_that_are_data(needs: Needs) -> list[Manifest]:
    """A collect run may be named as data."""
    paths = [source.path for item in needs.inputs for source in item.section.sources]
    return [artifacts.read(path) for path in paths if artifacts.is_finished(Path(path))]


def _dropped(config: StageConfig, manifest: Manifest) -> list[Problem]:
    """GRD021 for each data set of which more rows were dropped than is allowed."""
    sections = dict(_data_sections("", config))
    counted = dict(manifest.details.get("dropped", {}))
    lengths = manifest.details.get("rows")
    if not counted and lengths and sections:  # of an older version, which kept only the rows that were too long
        counted = {next(iter(sections)): {"rows": lengths["num_rows"], "dropped": {"too long": lengths["num_dropped"]}}}
    found = [
        excess(entry, sections[key].max_dropped_fraction, key) for key, entry in counted.items() if key in sections
    ]
    return [replace(problem, code=TOO_MANY_DROPPED) for problem in found if problem]


def _data_sections(prefix: str, section: Section) -> Iterator[tuple[str, DataSection]]:
    for name in type(section).model_fields:
        value = getattr(section, name)
        if isinstance(value, DataSection):
            yield prefix + name, value
        elif isinstance(value, Section):
            yield from _data_sections(f"{prefix}{name}.", value)


def _guarded(config: PpoConfig) -> list[Problem]:
    """GRD020 where a guard would have stopped the run, by the figures of its steps."""
    stops = _only_stops(config.guards)
    guard, rows = Guard(stops), runs.read_metrics(Path(config.run_dir))
    if not rows and stops != _only_stops(GuardSection()):
        log.warning("%s has no %s: its guards are not judged.", config.run_dir, artifacts.METRICS)
    try:
        for row in rows:
            guard.check(row["step"], {name: float(value) for name, value in row.items() if name != "step"})
    except RlhfError as error:
        fix = "a larger limit; or train again with a larger kl.coef or a lower learning rate"
        return [replace(problem, fix=fix) for problem in error.problems]
    return []


def _only_stops(section: GuardSection) -> GuardSection:
    """The same without warnings, which were given when the steps were made."""
    limits = {name: value for name in type(section).model_fields if isinstance(value := getattr(section, name), Limit)}
    return section.model_copy(update={name: Limit(stop=limit.stop) for name, limit in limits.items()})


def _examine_again(config: EvalRmConfig, manifest: Manifest) -> Manifest:
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
    show(examination.verdict_lines(judged["verdicts"]))
    now = artifacts.judged_again(run_dir, manifest, {**report, **judged})
    return replace(now, details={**now.details, "verdict": judged["verdict"], "failed": verdicts.failed(found)})
