"""The contract of a stage: what the command line, the checks and the planner ask of it, without torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from rlhf.config.stages import StageConfig
from rlhf.errors import Problem
from rlhf.planning.phases import Spec
from rlhf.planning.specs import Origin
from rlhf.preflight.needs import Needs
from rlhf.runs.artifacts import Manifest


@dataclass(frozen=True)
class Stage:
    """The torch-free half of a stage. Every function takes the stage's config; nothing else tells one stage's config
    from another's. The other half is ``run.py`` in the stage's folder, imported when the stage starts, which has
    ``run(config, plan, run) -> Manifest`` and ``dry_run(config, plan) -> list[str]``.

    Args:
        id: its command, its config file's name and its default run directory's name.
        makes: the kind of its run.
        needs: what it needs from outside its config: runs, data and how rows are read, models, disk and memory.
        origin: what it makes of a model that its config names; None: a run gives the base.
        parent: the run that gives the base; None: the config names a model.
        assumed: what a prediction takes for granted, as sentences, by the config, the prediction and the keys of the
            data that was read.
        optimises: whether it optimises against its rewards, so that one that failed its examination stops it.
        gates: the gates of the config that a finished run does not pass.
        judged_again: the manifest of a finished run, in whose files other gates than before change what they say.
    """

    id: str
    config_class: type[StageConfig]
    makes: str
    needs: Callable[[Any], Needs]
    summary: str
    origin: Callable[[Any], Origin | None] = lambda _: None
    parent: Callable[[Any], str | None] = lambda _: None
    assumed: Callable[[Any, Spec, Sequence[str]], list[str]] = lambda *_: []
    optimises: bool = False
    gates: Callable[[Any, Manifest], list[Problem]] = lambda *_: []
    judged_again: Callable[[Any, Manifest], Manifest] = lambda _, manifest: manifest

    @property
    def module(self) -> str:
        return f"rlhf.stages.{self.id.replace('-', '_')}.run"

    @property
    def default_config(self) -> str:
        return f"configs/{self.id}.yaml"
