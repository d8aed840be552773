"""Which command makes a run: the configs around the one that is read."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

STAGE_OF = {"policy": "sft", "reward": "train-rm", "preferences": "collect", "examination": "eval-rm"}


@dataclass(frozen=True)
class Neighbour:
    """A config file that makes a run of kind ``makes`` in ``run_dir``."""

    stage: str
    makes: str
    path: str
    run_dir: str

    @property
    def command(self) -> str:
        return f"rlhf {self.stage} -c {self.path}"


Nearby = Callable[[], Sequence[Neighbour]]
"""Reads the configs around one, which takes a moment: called only for what a message says of them."""


def command(run_dir: str, kinds: Sequence[str], nearby: Sequence[Neighbour]) -> str:
    """The command that makes a missing run, with its config where one nearby makes it."""
    made = [one.command for one in nearby if one.run_dir == run_dir and one.makes in kinds]
    return made[0] if made else f"rlhf {STAGE_OF[kinds[0]]} with run_dir={run_dir}"
