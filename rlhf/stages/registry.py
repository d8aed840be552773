"""The one list of stages, and of all kinds of config files. CLI, pipeline, check, show and plan derive from it."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from rlhf.config import load, recognition, rubric
from rlhf.config.sections import Section
from rlhf.config.stages import PipelineConfig, StageConfig
from rlhf.errors import Problem, RlhfError
from rlhf.findings import Findings
from rlhf.preflight.neighbours import Nearby, Neighbour
from rlhf.stages.collect import spec as collect_spec
from rlhf.stages.contract import Stage
from rlhf.stages.eval_rm import spec as eval_rm_spec
from rlhf.stages.ppo import spec as ppo_spec
from rlhf.stages.sft import spec as sft_spec
from rlhf.stages.train_rm import spec as train_rm_spec

log = logging.getLogger("rlhf")


def neighbours(paths: Iterable[Path]) -> list[Neighbour]:
    """What the configs among some files make; a file that is none of ours, or not sound, makes nothing."""
    found = []
    for path in dict.fromkeys(paths):
        named = [stage for stage in STAGES.values() if path.stem == stage.id]
        for stage in [*named, *(one for one in STAGES.values() if one not in named)]:
            try:
                config = load.load(stage.config_class, path)
            except (RlhfError, OSError):
                continue
            found.append(Neighbour(stage.id, stage.makes, str(path), config.run_dir))
            break
    return found


def around(path: Path, others: Iterable[Path] = ()) -> Nearby:
    """The same for ``others`` and the config files next to ``path``, once somebody asks."""
    return cache(lambda: neighbours([*others, *sorted(path.parent.glob("*.yaml"))]))


STAGES: dict[str, Stage] = {
    stage.id: stage
    for stage in (sft_spec.STAGE, collect_spec.STAGE, train_rm_spec.STAGE, ppo_spec.STAGE, eval_rm_spec.STAGE)
}

KINDS: dict[str, type[Section]] = {
    **{name: stage.config_class for name, stage in STAGES.items()},
    "pipeline": PipelineConfig,
    "rubric": rubric.RubricConfig,
}
"""Every kind of config file."""

_BY_CLASS = {stage.config_class: stage for stage in STAGES.values()}


def stage_of(config: StageConfig) -> Stage:
    """The stage that a config is of."""
    return next(_BY_CLASS[kind] for kind in type(config).__mro__ if kind in _BY_CLASS)


DID_YOU_MEAN = "did you mean rlhf {kind} -c {path}?"


def open_config(kind: str, path: Path, overrides: Sequence[str] = (), fix: str = DID_YOU_MEAN) -> Any:
    """The config of a stage, or another kind, from its file. Raises as ``recognition.load_as``."""
    return recognition.load_as(kind, path, overrides, KINDS, fix)


def kinds_of(files: Sequence[Path], stage: str | None, findings: Findings) -> list[tuple[Path, str]]:
    """Each file with the kind of config that it is; without files, all of configs/.

    Args:
        stage: whose configs they are; None: what their names or else their keys say.
        findings: get what is wrong with a file's kind.

    Raises:
        RlhfError: CFG001 where no file is named and configs/ has none.
    """
    paths = list(files) or sorted(Path("configs").glob("*.yaml"))
    if not paths:
        raise RlhfError(Problem("CFG001", "configs/", "no config here.", "name a file"))
    found: list[tuple[Path, str]] = []
    for path in paths:
        try:
            if stage is not None:
                refuse_unknown(stage, str(path), "--stage with one of")
            found.append((path, stage or recognition.kind_of(path, KINDS, "--stage")))
        except RlhfError as error:
            if files:
                findings.extend(error.problems)
            else:
                log.warning("Left out: %s: %s", path, error.problems[0].what)
    if not found and not findings.problems:
        raise RlhfError(Problem("CFG001", "configs/", "no config here that is known.", "name a file"))
    return found


def refuse_unknown(stage_id: str, where: str, fix: str) -> None:
    """Raise CFG008 for a kind of config that there is not; ``fix`` is followed by the known ones."""
    if stage_id not in KINDS:
        raise RlhfError(Problem("CFG008", where, f"no stage is called '{stage_id}'.", f"{fix} {', '.join(KINDS)}"))
