"""Which objective a config asks for, on groups of responses and their scores."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rlhf.config.train_rm import RewardConfig
from rlhf.data import labels
from rlhf.data.tokenised import Group
from rlhf.reward.loss import Preference, bradley_terry, distilled, outcome, plackett_luce
from rlhf.reward.teacher import Teacher


def preference(
    config: RewardConfig, groups: Sequence[Group], scores: Sequence[Tensor], teacher: Teacher | None = None
) -> Preference:
    """Loss and accuracy of each group [G] under the config's objective."""
    found = _labels(config, groups, scores)
    if teacher is None:
        return found
    pairs = zip(scores, teacher.of(groups), strict=True)
    fitted = torch.stack([distilled(values, target) for values, target in pairs])
    return Preference((1 - config.teacher_weight) * found.loss + config.teacher_weight * fitted, found.accuracy)


def _labels(config: RewardConfig, groups: Sequence[Group], scores: Sequence[Tensor]) -> Preference:
    if config.loss == "plackett_luce":
        ranked = [labels.levels(group.judgements, len(group.responses)) for group in groups]
        known = [level for level in ranked if level is not None]
        assert len(known) == len(groups), "checked before anything is loaded"
        return plackett_luce(groups, scores, known)
    if config.loss == "outcome":
        each = [_outcome(config, group, values) for group, values in zip(groups, scores, strict=True)]
        return Preference(torch.stack([loss for loss, _ in each]), torch.stack([right for _, right in each]))
    return _bradley_terry(config, groups, scores)


def _outcome(config: RewardConfig, group: Group, values: Tensor) -> tuple[Tensor, Tensor]:
    """Of a group's own labels; of its comparisons, where it has none."""
    if group.record.ratings is not None:
        return outcome(group.record.ratings, values)
    found = _bradley_terry(config, [group], [values])
    return found.loss[0], found.accuracy[0]


def _bradley_terry(config: RewardConfig, groups: Sequence[Group], scores: Sequence[Tensor]) -> Preference:
    margin_coef = config.margin_coef if config.use_margins else 0.0
    return bradley_terry(groups, scores, margin_coef, config.label_smoothing, float(config.weight_by_margin))
