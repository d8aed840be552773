"""The objective of a reward model: loss and accuracy of groups of responses, from their scores and all labels."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rlhf.data import labels
from rlhf.data.records import Comparison
from rlhf.data.tokenised import Group
from rlhf.reward import loss, several
from rlhf.reward.loss import Judged, Preference, bradley_terry, distilled, outcome, plackett_luce
from rlhf.reward.several import Heads, scales
from rlhf.reward.teacher import Teacher

log = logging.getLogger("rlhf")


def heads_of(
    weights: Mapping[str, float], summed: bool, rating_coef: float, records: Sequence[Comparison]
) -> Heads | None:
    """The heads of these names, with the scales of their ratings in the training data; None where there is no name."""
    names = tuple(weights)
    return Heads(names, tuple(weights.values()), scales(names, records), summed, rating_coef) if names else None


def trained(heads: Heads | None, records: Sequence[Comparison]) -> list[Comparison]:
    """The records with a label that trains a head; the others are counted."""
    if heads is None:
        return list(records)
    kept = [record for record in records if heads.trains(record)]
    if len(kept) < len(records):
        log.info("%d rows train no head: their labels are overall, and fit the combination.", len(records) - len(kept))
    return kept


@dataclass(frozen=True)
class Objective:
    """The loss of a run.

    Args:
        kind: of the labels: bradley_terry, plackett_luce or outcome.
        margin_coef: of the margins that are subtracted from score differences; 0: none are.
        weight_by_margin: whether a comparison's loss is multiplied by its margin.
        heads: None: one score.
        teacher: what teachers gave to the responses, with ``teacher_weight`` as its share; None: the labels alone.
    """

    kind: str = "bradley_terry"
    margin_coef: float = 0.0
    label_smoothing: float = 0.0
    weight_by_margin: bool = False
    centering_coef: float = 0.0
    heads: Heads | None = None
    teacher: Teacher | None = None
    teacher_weight: float = 1.0

    def num_judged(self, groups: Sequence[Group]) -> int:
        """Groups that have an accuracy."""
        if self.heads is None:
            return len(groups)
        return sum(any(self.heads.summed or one.attribute for one in group.judgements) for group in groups)

    def single(self, scores: Sequence[Tensor]) -> list[Tensor]:
        """One [K] tensor a group, the score itself or the sum of the heads."""
        return self.heads.total(scores) if self.heads else list(scores)

    def centering(self, scores: Sequence[Tensor]) -> Tensor:
        """[G] mean squared score of each group."""
        return several.centering(self.heads, scores) if self.heads else loss.centering(scores)

    def preference(self, groups: Sequence[Group], scores: Sequence[Tensor]) -> Preference:
        """Loss and accuracy of each group [G].

        Args:
            scores: one [K] tensor a group, with ``heads`` [K, k].
        """
        single = self.single(scores)
        if self.heads:
            records = [group.record for group in groups]
            found = several.objective(self.heads, records, scores, self._bradley_terry)
        else:
            found = self._labels(groups, single)
        if self.teacher is None:
            return found
        pairs = zip(single, self.teacher.of(groups), strict=True)
        fitted = torch.stack([distilled(values, target) for values, target in pairs])
        return Preference((1 - self.teacher_weight) * found.loss + self.teacher_weight * fitted, found.accuracy)

    def _labels(self, groups: Sequence[Group], scores: Sequence[Tensor]) -> Preference:
        if self.kind == "plackett_luce":
            ranked = [labels.levels(group.judgements, len(group.responses)) for group in groups]
            known = [level for level in ranked if level is not None]
            assert len(known) == len(groups), "checked before anything is loaded"
            return plackett_luce(groups, scores, known)
        if self.kind == "outcome":
            each = [self._outcome(group, values) for group, values in zip(groups, scores, strict=True)]
            return Preference(torch.stack([loss for loss, _ in each]), torch.stack([right for _, right in each]))
        return self._bradley_terry(groups, scores)

    def _outcome(self, group: Group, values: Tensor) -> tuple[Tensor, Tensor]:
        """Of a group's own labels; of its comparisons, where it has none."""
        if group.record.ratings is not None:
            return outcome(group.record.ratings, values)
        found = self._bradley_terry([group], [values])
        return found.loss[0], found.accuracy[0]

    def _bradley_terry(self, groups: Sequence[Judged], scores: Sequence[Tensor]) -> Preference:
        return bradley_terry(groups, scores, self.margin_coef, self.label_smoothing, float(self.weight_by_margin))
