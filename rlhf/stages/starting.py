"""A stage before it starts: its config checked, and what stands in its run directory."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from rlhf.config import load
from rlhf.config.stages import StageConfig
from rlhf.errors import Problem, RlhfError
from rlhf.preflight import prepare
from rlhf.preflight.needs import Needs
from rlhf.preflight.prepare import Plan
from rlhf.runs import artifacts, progress, run_directory
from rlhf.stages import settling
from rlhf.stages.contract import Stage
from rlhf.stages.registry import around, open_config

log = logging.getLogger("rlhf")


@dataclass(frozen=True)
class Start:
    """How a stage is started: over what stands there, or where it was cut off.

    Args:
        allowed: keys of the config that may differ from those of the run that goes on.
    """

    overwrite: bool = False
    resume: bool = False
    allowed: tuple[str, ...] = ()


@dataclass(frozen=True)
class Ready:
    """A stage that can start. ``reasons`` say why it has to; None: its run is finished and unchanged."""

    stage: Stage
    config: StageConfig
    needs: Needs
    plan: Plan
    reasons: list[str] | None

    @property
    def run_dir(self) -> Path:
        return Path(self.config.run_dir)

    def lines(self) -> list[str]:
        """What it would do: notes about the data, figures, token counts, and the state of its run directory."""
        if len(self.plan.parents) == len(self.needs.parents):
            # Before the notes are asked for, because it adds rows that are too long to their counts.
            counted = progress.load(self.stage.module).dry_run(self.config, self.plan)
        else:
            counted = [f"{note}." for note in self.plan.unchecked[:-1]]
            counted += ["tokens are counted with the tokenizer of these runs, once they are made."]
        found = [*(f"{note}." for note in (*self.plan.notes(), *self.plan.figures)), *counted]
        return [*found, f"run_dir {self.run_dir}: {'up to date' if self.reasons is None else '; '.join(self.reasons)}."]

    def settle(self) -> None:
        """Judge the finished run by the gates of its config, and mark it as newer than its inputs."""
        settling.settle(self.config, self.needs, self.plan)
        run_directory.mark_current(self.run_dir)

    def run(self, start: Start) -> None:
        """Train, measure or examine, unless the run is up to date; then judge by the gates of its config."""
        if self.reasons is None:
            self.settle()
            log.info("%s is up to date.", self.run_dir)
            return
        config = self._with_date(start)
        with run_directory.open_run(
            self.run_dir,
            self.stage.id,
            self.plan.inputs,
            load.dump(config),
            overwrite=start.overwrite,
            resume=start.resume,
            allowed=start.allowed,
        ) as run:
            run.complete = partial(settling.complete, config, self.needs, self.plan)
            for note in self.plan.notes():
                log.warning("%s.", note)
            progress.load(self.stage.module).run(config, self.plan, run)
        settling.settle(config, self.needs, self.plan)

    def _with_date(self, start: Start) -> StageConfig:
        """The config, in which a base that is opened for the first time has the date that its template prints: that of
        the run that goes on, or of the adapter that it starts from, else today's."""
        own = self.stage.origin(self.config)
        if own is None:
            return self.config
        kept = self._kept_date() if start.resume and self.reasons == ["unfinished run"] else None
        parent = self.plan.parents.get("adapter")
        kept = kept or (parent.base.template_date if parent and parent.base else None)
        model = progress.load("rlhf.models.open_base").with_date(own.model, kept)
        return self.config.model_copy(update={"model": model})

    def _kept_date(self) -> str | None:
        """The date in the config that an unfinished run has recorded; None where that cannot be read."""
        try:
            recorded = self.stage.origin(load.load(self.stage.config_class, self.run_dir / artifacts.CONFIG))
        except (RlhfError, OSError):
            return None
        return recorded.model.template_date if recorded and recorded.model else None


def ready(
    stage: Stage,
    path: Path,
    overrides: Sequence[str] = (),
    parents_may_be_missing: bool = False,
    others: Sequence[Path] = (),
) -> Ready:
    """Check everything that needs no weights.

    Args:
        others: configs besides those next to ``path`` that messages may name.
    """
    config: StageConfig = open_config(stage.id, path, overrides)
    needs = stage.needs(config)
    plan = prepare.prepare(config, needs, parents_may_be_missing, around(path, others))
    return Ready(stage, config, needs, plan, run_directory.status(Path(config.run_dir), plan.inputs))


def limits(stage: Stage, path: Path, overrides: Sequence[str], limit: int) -> list[str]:
    """``--limit N`` as overrides: the key of every data set that the stage reads."""
    inputs = stage.needs(open_config(stage.id, path, overrides)).inputs
    if not inputs:
        raise RlhfError(Problem("CFG005", "--limit", f"rlhf {stage.id} reads no data set.", "leave it out"))
    return [f"{item.key}.limit={limit}" for item in inputs]
