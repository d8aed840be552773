"""Whether disk and memory suffice for a stage: what ``resources`` and the planner say, as problems and figures."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from rlhf.data.sources import Loaded
from rlhf.demo import catalogue as demo
from rlhf.errors import RlhfError
from rlhf.findings import Findings
from rlhf.hub import model_files, names
from rlhf.planning import phases
from rlhf.planning.phases import Spec
from rlhf.planning.specs import Ground
from rlhf.preflight import resources
from rlhf.preflight.needs import Needs
from rlhf.runs.artifacts import Manifest


@dataclass(frozen=True)
class NamedBase:
    """The base of a stage: its source, what messages call it, and whether the name has been looked at already."""

    source: str
    where: str
    is_checked: bool


def check(
    needs: Needs,
    base: NamedBase,
    run_dir: str | None,
    data: Mapping[str, Loaded],
    parents: Mapping[str, Manifest],
    findings: Findings,
) -> Spec | None:
    """What memory and time are predicted from, where the base is here to be counted; the figures of disk and memory are
    among the findings.

    Args:
        run_dir: None: it cannot be written to.
    """
    source, where = base.source, base.where
    directory = demo.resolve_model(source) if demo.is_demo(source) else Path(source)
    if not demo.is_demo(source) and (refused := names.refused(source, where, "MOD001")):
        findings.add(None if base.is_checked else refused)
        return None
    if not names.exists(str(directory)):
        findings.not_checked(f"disk and memory: the layers of {source} are not here to be counted")
        return None
    try:
        tensors = model_files.read(directory, f"{where}: {source}")
    except RlhfError as error:
        findings.extend(error.problems)
        return None
    num_rows = max((len(loaded.records) for loaded in data.values()), default=0)
    written = needs.disk(tensors, parents, num_rows)
    if run_dir is None:
        return _memory(needs, source, data, parents, findings)
    free = resources.free_disk(run_dir)
    findings.figures.append(resources.disk_figure(written, free))
    spec = _memory(needs, source, data, parents, findings)
    findings.add(resources.disk_problem(run_dir, written, free))
    return spec


def _memory(
    needs: Needs, source: str, data: Mapping[str, Loaded], parents: Mapping[str, Manifest], findings: Findings
) -> Spec | None:
    """The planner's figures. Too little for what no row needs is a problem; too little for the longest rows is said."""
    if needs.memory is None:
        return None
    rows = {key: loaded.records for key, loaded in data.items()}
    try:
        spec = needs.memory(Ground(needs.started_from(parents), rows, "cpu", "base"))
    except RlhfError as error:
        findings.not_checked(f"memory: {error.problems[0].where}: {error.problems[0].what.rstrip('.')}")
        return None
    least, peak, available = phases.least(spec), phases.peak(spec).total, resources.available_memory()
    if available is None:
        findings.not_checked("memory: this system does not say how much is available")
    else:
        findings.add(resources.memory_problem(source, least, available))
    findings.figures.append(resources.memory_figure(least, peak, available))
    return spec
