"""What a stage needs from outside its config: runs, data and models to read, and disk and memory to run in."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from rlhf.config.rewards import ClassifierSection, RewardSource
from rlhf.config.sections import DataSection, ModelSection, ReportTo
from rlhf.data.sources import Loaded
from rlhf.hub.model_files import StoredTensor
from rlhf.planning import specs
from rlhf.planning.phases import Spec
from rlhf.planning.specs import Ground, Origin
from rlhf.preflight.resources import Written
from rlhf.runs.artifacts import Manifest


@dataclass(frozen=True)
class Parent:
    """A run that a stage is made from."""

    key: str
    run_dir: str
    kinds: tuple[str, ...]


@dataclass(frozen=True)
class Rows:
    """How a stage reads the rows of a data set.

    Args:
        max_tokens: of a row; None: no limit.
        truncates: whether a longer row is cut to that, or dropped.
        last_turn_only: whether of a demonstration's turns only the last carries loss.
    """

    max_tokens: int | None = None
    truncates: bool = False
    last_turn_only: bool = False


@dataclass(frozen=True)
class Input:
    """A data set that a stage reads, the reader of its form, and how its rows are read.

    Args:
        is_trained_on: whether what measures should share no prompt with it.
        held_out_from: of data that measures, the stage and key of the data set that must share no prompt with it.
    """

    key: str
    section: DataSection
    read: Callable[[DataSection, int], Loaded]
    rows: Rows = Rows()
    is_trained_on: bool = False
    held_out_from: tuple[str, str] | None = None


@dataclass(frozen=True)
class Needs:
    """All that a stage needs from outside its config.

    Args:
        parents: of a stage without a model of its own, the first one gives its base.
        origin: what is made of ``model``; None: a parent gives the base.
        settled: from the parents to the config keys, with their values, that the config leaves to them.
        report_to: the trackers.
        disk: what the run writes, from the tensors of its base, its parents and the number of its rows.
        memory: what memory and time are predicted from; None: not predicted.
    """

    parents: tuple[Parent, ...] = ()
    inputs: tuple[Input, ...] = ()
    model: ModelSection | None = None
    origin: Origin | None = None
    scorers: tuple[tuple[str, ClassifierSection], ...] = ()
    directories: tuple[tuple[str, str], ...] = ()
    rewards: Mapping[str, RewardSource] = field(default_factory=dict)
    members: int = 1
    trains_whole: bool = False
    heads: tuple[str, ...] = ()
    settled: Callable[[Mapping[str, Manifest]], Mapping[str, Any]] = lambda _: {}
    report_to: ReportTo = "none"
    disk: Callable[[Mapping[str, StoredTensor], Mapping[str, Manifest], int], Written] = lambda *_: Written(0, 0)
    memory: Callable[[Ground], Spec] | None = None

    def started_from(self, parents: Mapping[str, Manifest]) -> Origin:
        """What the stage starts from, where every parent stands."""
        first = self.parents[0] if self.parents else None
        if self.origin or not first:
            assert self.origin, "a stage has a model of its own or a parent"
            return self.origin
        return specs.of_run(first.run_dir, parents[first.key])
