"""Whether disk and memory suffice for a stage: what ``resources`` and the planner say, as problems and figures."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from rlhf import model_files, names, resources
from rlhf.artifacts import Manifest
from rlhf.config.stages import StageConfig
from rlhf.data.sources import Loaded
from rlhf.demo import registry as demo
from rlhf.errors import Problem, RlhfError
from rlhf.planning import phases, specs
from rlhf.planning.phases import Spec

Found = tuple[list[str], Spec | None]


def check(
    config: StageConfig, source: str, where: str, named_by_run: bool, data: Mapping[str, Loaded],
    parents: Mapping[str, Manifest], writable: bool, problems: list[Problem], unchecked: list[str],
) -> Found:  # fmt: skip
    """Figures for the plan and what its memory and time are predicted from, where the base is here to be counted.

    Args:
        named_by_run: the base's name comes from a finished run, and has not been looked at yet.
    """
    directory = demo.resolve_model(source) if demo.is_demo(source) else Path(source)
    if not demo.is_demo(source) and (refused := names.refused(source, where, "MOD001")):
        problems += [refused] if named_by_run else []
        return [], None
    if not names.exists(str(directory)):
        unchecked.append(f"disk and memory: the layers of {source} are not here to be counted")
        return [], None
    try:
        tensors = model_files.read(directory, f"{where}: {source}")
    except RlhfError as error:
        problems += error.problems
        return [], None
    num_rows = max((len(loaded.records) for loaded in data.values()), default=0)
    written = resources.written(config, tensors, parents, num_rows)
    figures, spec = _memory(config, source, data, parents, problems, unchecked)
    if not writable:
        return [], spec
    free = resources.free_disk(config.run_dir)
    if full := resources.disk_problem(config.run_dir, written, free):
        problems.append(full)
    return [resources.disk_figure(written, free), *figures], spec


def _memory(
    config: StageConfig, source: str, data: Mapping[str, Loaded], parents: Mapping[str, Manifest],
    problems: list[Problem], unchecked: list[str],
) -> Found:  # fmt: skip
    """The planner's figures. Too little for what no row needs is a problem; too little for the longest rows is said."""
    rows = {key: loaded.records for key, loaded in data.items()}
    try:
        spec = specs.spec(config, specs.started_from(config, parents), rows, "cpu", "base")
    except RlhfError as error:
        unchecked.append(f"memory: {error.problems[0].where}: {error.problems[0].what.rstrip('.')}")
        return [], None
    least, peak, available = phases.least(spec), phases.peak(spec).total, resources.available_memory()
    if available is None:
        unchecked.append("memory: this system does not say how much is available")
    elif scarce := resources.memory_problem(source, least, available):
        problems.append(scarce)
    return [resources.memory_figure(least, peak, available)], spec
