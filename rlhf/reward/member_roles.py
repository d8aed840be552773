"""The reward roles of a run as everything after their making takes them: together, with their base."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rlhf.data.batches import PassSize
from rlhf.data.tokenised import Group
from rlhf.models.base import Base
from rlhf.models.roles import Roles
from rlhf.scoring.ensemble import EnsembleScorer
from rlhf.scoring.scorer import Sample, Scorer, Scores
from rlhf.scoring.shared import SharedScorer


@dataclass(frozen=True)
class MemberRoles:
    """One role a member: "reward" of a single one, else "reward/0", "reward/1" and so on.

    Args:
        size: of forward passes, counted in groups where groups are read and in responses where these are scored.
    """

    roles: Roles
    slots: Sequence[str]
    base: Base
    size: PassSize

    def scorer(self) -> Scorer:
        """Raw scores of the reward role, or the mean of several."""
        members = [SharedScorer(self.roles, slot, self.size, raw=True) for slot in self.slots]
        return members[0] if len(members) == 1 else EnsembleScorer(members)

    def scores(self, slot: str, samples: Sequence[Sample], raw: bool) -> Scores:
        """Of one member; what is not raw is shifted and scaled."""
        return SharedScorer(self.roles, slot, self.size, raw=raw).score(samples)

    def micro_batches(self, groups: Sequence[Group]) -> list[list[Group]]:
        """Groups sorted by their tokens, in forward passes; a group is never split."""
        tokens = [len(group.responses) * len(group.prompt_ids) + sum(map(len, group.responses)) for group in groups]
        return [[groups[index] for index in part] for part in self.size.split(tokens)]
