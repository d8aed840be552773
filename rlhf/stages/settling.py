"""A finished run and the gates of a config: it is judged from its files, without a model, and keeps the outcome."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from rlhf.config import load
from rlhf.config.stages import StageConfig
from rlhf.data.dropped import excess
from rlhf.errors import Problem, RlhfError
from rlhf.preflight import examined
from rlhf.preflight.needs import Input, Needs
from rlhf.preflight.prepare import Plan
from rlhf.runs import artifacts, identity, run_directory
from rlhf.runs.artifacts import FAILED_GATES, Manifest
from rlhf.stages.registry import stage_of

TOO_MANY_DROPPED = "GRD021"


def judge(config: StageConfig, needs: Needs, manifest: Manifest) -> list[Problem]:
    """Every gate of ``config`` that the run in its run_dir does not pass: by the figures in its files."""
    return [*_dropped(needs.inputs, manifest), *stage_of(config).gates(config, manifest)]


def complete(config: StageConfig, needs: Needs, plan: Plan, manifest: Manifest) -> Manifest:
    """The manifest with what it has to say of gates: those that were not passed, and failed examinations that were
    accepted, here or for one of the runs that this one is made from."""
    failed = judge(config, needs, manifest)
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
        with run_directory.locked(run_dir):
            if has_other_gates:
                now = stage_of(config).judged_again(config, now)
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


def _dropped(inputs: Sequence[Input], manifest: Manifest) -> list[Problem]:
    """GRD021 for each data set of which more rows were dropped than is allowed."""
    sections = {item.key: item.section for item in inputs}
    counted = dict(manifest.details.get("dropped", {}))
    lengths = manifest.details.get("rows")
    if not counted and lengths and sections:  # of an older version, which kept only the rows that were too long
        counted = {next(iter(sections)): {"rows": lengths["num_rows"], "dropped": {"too long": lengths["num_dropped"]}}}
    found = [
        excess(entry, sections[key].max_dropped_fraction, key) for key, entry in counted.items() if key in sections
    ]
    return [replace(problem, code=TOO_MANY_DROPPED) for problem in found if problem]
