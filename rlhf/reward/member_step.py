"""What training does with a reward model's groups: an optimizer step, and the same objective on held-out rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rlhf.config.train_rm import RewardConfig
from rlhf.data.batches import collate
from rlhf.data.tokenised import Group
from rlhf.errors import Problem, RlhfError
from rlhf.losses.attribute_heads import Heads
from rlhf.models import forward
from rlhf.models.base import Base
from rlhf.models.roles import Roles
from rlhf.reward import group_objective, member_turns
from rlhf.reward.member_turns import Member
from rlhf.reward.teacher import Teacher


@dataclass(frozen=True)
class Learner:
    """What every member of a run is trained with.

    Args:
        taught: what teachers gave to the responses; None: the labels alone.
        heads: None: one score.
    """

    config: RewardConfig
    base: Base
    roles: Roles
    taught: Teacher | None = None
    heads: Heads | None = None

    def step(self, member: Member, groups: Sequence[Group], step: int) -> dict[str, float]:
        """One optimizer step; every prompt weighs the same, however many responses it has."""
        totals = {"train/loss": 0.0, "train/accuracy": 0.0, "train/centering": 0.0}
        num_judged = group_objective.num_judged(self.heads, groups)
        for part in member_turns.parts(self.config, groups):
            with self.roles.acting_as(member.slot) as (model, head):
                scores = self._scores(model, head, part)
                preference = group_objective.preference(self.config.objective, part, scores, self.taught, self.heads)
                spread = group_objective.centering(self.heads, scores)
                longer = member.length.penalty(part, group_objective.score(self.heads, scores))
                loss = preference.loss.sum() + self.config.centering_coef * spread.sum() + longer.sum()
                loss = loss / len(groups)
                loss.backward()
            totals["train/loss"] += float(preference.loss.detach().sum()) / len(groups)
            totals["train/accuracy"] += float(preference.accuracy.sum()) / max(1, num_judged)
            totals["train/centering"] += float(spread.detach().sum()) / len(groups)
        if not num_judged:
            del totals["train/accuracy"]
        totals["train/learning_rate"] = member.optimizer.learning_rate
        rows = ", ".join(group.record.where for group in groups)
        totals["train/grad_norm"] = member.optimizer.step(f"train-rm step {step}, rows {rows}")
        return totals

    def measured(self, groups: Sequence[Group]) -> list[Group]:
        """The groups that ``loss`` is measured on: with heads, those with a label that trains one.

        Raises:
            RlhfError: DAT058 where there is none.
        """
        found = [group for group in groups if self.heads is None or self.heads.trains(group.record)]
        if not found:
            what = f"none of the {len(groups)} held-out prompts has a label that trains a head."
            raise RlhfError(Problem("DAT058", "evaluation.every", what, "a larger holdout_fraction, or every: null"))
        return found

    @torch.no_grad()
    def loss(self, slot: str, groups: Sequence[Group]) -> float:
        """Mean over the prompts of what training minimises: the objective of the config's loss, label smoothing,
        margins, ratings and teachers included, without centering_coef and length_coef, which are not about labels.
        """
        total = 0.0
        for part in member_turns.parts(self.config, groups):
            with self.roles.acting_as(slot) as (model, head):
                scores = self._scores(model, head, part)
            found = group_objective.preference(self.config.objective, part, scores, self.taught, self.heads)
            total += float(found.loss.double().sum())
        return total / len(groups)

    def _scores(self, model: Any, head: Any, groups: Sequence[Group]) -> list[Tensor]:
        """One [K] tensor of scores a group, with ``heads`` [K, k], from one forward pass over all their responses."""
        prompts = [group.prompt_ids for group in groups for _ in group.responses]
        responses = [response for group in groups for response in group.responses]
        sequences = collate(prompts, responses, self.base.chat.pad_id, self.base.device)
        scores = forward.end_scores(model, head, sequences)
        scores = scores if self.heads else scores[:, 0]
        return list(scores.split([len(group.responses) for group in groups]))
