"""What a run that may not stand yet goes back to: by manifests, else by the configs that will make it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from rlhf.config import recognition
from rlhf.errors import Problem, RlhfError
from rlhf.planning import specs
from rlhf.planning.specs import Origin
from rlhf.runs import artifacts
from rlhf.stages.registry import STAGES, stage_of

MAKERS = {stage.id: stage.config_class for stage in STAGES.values() if stage.makes in ("policy", "reward")}


def find(run_dir: str, folder: Path) -> Origin:
    """What the run ``run_dir`` is or will be made on: from its manifest, else from its config in ``folder``.

    Raises:
        RlhfError: CKP001 where neither is there.
    """
    root = root_of(run_dir, folder)
    origin = specs.of_run(root, artifacts.read(root)) if isinstance(root, str) else root
    made_by = None if root == run_dir else recognition.maker_of(run_dir, folder, MAKERS)
    return replace(origin, sampling=made_by[1].sampling) if made_by else origin


def root_of(run_dir: str, folder: Path) -> str | Origin:
    """What ``run_dir`` goes back to: the nearest finished run, or what a config in ``folder`` with a model of its own
    will make.

    Raises:
        RlhfError: CKP001 where a run on the way is not there, and no config in ``folder`` makes it.
    """
    seen: list[str] = []
    here: str | None = run_dir
    while here is not None and here not in seen:
        if artifacts.is_finished(Path(here)):
            return here
        seen.append(here)
        if (made_by := recognition.maker_of(here, folder, MAKERS)) is None:
            break
        path, config = made_by
        stage = stage_of(config)
        if origin := stage.origin(config):
            return replace(origin, said_by=str(path))
        here = stage.parent(config)
    what = f"no such run, and no config in {folder} makes it."
    raise RlhfError(Problem("CKP001", seen[-1], what, "run its stage first, or put its config next to this one"))
