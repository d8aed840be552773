"""The objective of reward training, on groups of responses and their scores."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from rlhf.config.train_rm import Combination, Objective
from rlhf.data import labels
from rlhf.data.tokenised import Group
from rlhf.losses import attribute_heads as several
from rlhf.losses import preference as loss
from rlhf.losses.attribute_heads import Heads, scales
from rlhf.losses.preference import Judged, Preference, bradley_terry, distilled, outcome, plackett_luce
from rlhf.records import Comparison
from rlhf.reward.teacher import Teacher

log = logging.getLogger("rlhf")


def heads_of(weights: Mapping[str, float], how: Combination, records: Sequence[Comparison]) -> Heads | None:
    """Heads by their weights, with the scales of their ratings in the training data; None: one score."""
    if not weights:
        return None
    names, summed = tuple(weights), how.combine == "weights"
    return Heads(names, tuple(weights.values()), scales(names, records), summed, how.rating_coef)


def trained(heads: Heads | None, records: Sequence[Comparison]) -> list[Comparison]:
    """The records with a label that trains a head; the others are counted."""
    if heads is None:
        return list(records)
    kept = [record for record in records if heads.trains(record)]
    if len(kept) < len(records):
        log.info("%d rows train no head: their labels are overall, and fit the combination.", len(records) - len(kept))
    return kept


def num_judged(heads: Heads | None, groups: Sequence[Group]) -> int:
    """Groups that have an accuracy."""
    if heads is None:
        return len(groups)
    return sum(any(heads.summed or one.attribute for one in group.judgements) for group in groups)


def score(heads: Heads | None, scores: Sequence[Tensor]) -> list[Tensor]:
    """One [K] tensor a group, the score itself or the sum of the heads."""
    return heads.total(scores) if heads else list(scores)


def centering(heads: Heads | None, scores: Sequence[Tensor]) -> Tensor:
    """[G] mean squared score of each group."""
    return several.centering(heads, scores) if heads else loss.centering(scores)


def preference(
    objective: Objective,
    groups: Sequence[Group],
    scores: Sequence[Tensor],
    teacher: Teacher | None = None,
    heads: Heads | None = None,
) -> Preference:
    """Loss and accuracy of each group [G] under the objective.

    Args:
        scores: one [K] tensor a group, with ``heads`` [K, k].
    """
    single = score(heads, scores)
    if heads:
        records, compare = [group.record for group in groups], partial(_bradley_terry, objective)
        found = several.objective(heads, records, scores, compare)
    else:
        found = _labels(objective, groups, single)
    if teacher is None:
        return found
    pairs = zip(single, teacher.of(groups), strict=True)
    fitted = torch.stack([distilled(values, target) for values, target in pairs])
    return Preference((1 - objective.teacher_weight) * found.loss + objective.teacher_weight * fitted, found.accuracy)


def _labels(objective: Objective, groups: Sequence[Group], scores: Sequence[Tensor]) -> Preference:
    if objective.loss == "plackett_luce":
        ranked = [labels.levels(group.judgements, len(group.responses)) for group in groups]
        known = [level for level in ranked if level is not None]
        assert len(known) == len(groups), "checked before anything is loaded"
        return plackett_luce(groups, scores, known)
    if objective.loss == "outcome":
        each = [_outcome(objective, group, values) for group, values in zip(groups, scores, strict=True)]
        return Preference(torch.stack([loss for loss, _ in each]), torch.stack([right for _, right in each]))
    return _bradley_terry(objective, groups, scores)


def _outcome(objective: Objective, group: Group, values: Tensor) -> tuple[Tensor, Tensor]:
    """Of a group's own labels; of its comparisons, where it has none."""
    if group.record.ratings is not None:
        return outcome(group.record.ratings, values)
    found = _bradley_terry(objective, [group], [values])
    return found.loss[0], found.accuracy[0]


def _bradley_terry(objective: Objective, groups: Sequence[Judged], scores: Sequence[Tensor]) -> Preference:
    margin_coef = objective.margin_coef if objective.use_margins else 0.0
    return bradley_terry(groups, scores, margin_coef, objective.label_smoothing, float(objective.weight_by_margin))
