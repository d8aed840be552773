"""The objective of several heads on one trunk, as a pure function of their scores and of whatever labels there are."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rlhf.losses.preference import Judged, Preference
from rlhf.records import Comparison, Judgement

Compare = Callable[[Sequence[Judged], Sequence[Tensor]], Preference]


@dataclass(frozen=True)
class Heads:
    """k heads.

    Args:
        weights: [k] of the raw scores in their sum.
        scales: name -> mean and standard deviation of its ratings in the training data, for heads that have some.
        summed: whether overall judgements train the heads, through that sum.
        rating_coef: weight of the squared error of ratings beside comparisons.
    """

    names: tuple[str, ...]
    weights: tuple[float, ...]
    scales: Mapping[str, tuple[float, float]]
    summed: bool = True
    rating_coef: float = 1.0

    def total(self, scores: Sequence[Tensor]) -> list[Tensor]:
        """One [K] tensor a group, the weighted sum of its [K, k] raw scores."""
        return [(values * values.new_tensor(self.weights)).sum(1) for values in scores]

    def trains(self, record: Comparison) -> bool:
        """Whether a record holds any label that trains a head."""
        return bool(record.names) or (self.summed and bool(record.of(None)))


@dataclass(frozen=True)
class Labelled:
    """The judgements of a group in one attribute."""

    judgements: tuple[Judgement, ...]


def scales(names: Sequence[str], records: Sequence[Comparison]) -> dict[str, tuple[float, float]]:
    """Mean and (population) standard deviation of the ratings of each name that has some; 1 for a single value."""
    found = {}
    for name in names:
        own = [rating for record in records for rating in record.attributes.get(name, ()) if rating is not None]
        if own:
            mean = math.fsum(own) / len(own)
            deviation = math.sqrt(math.fsum((rating - mean) ** 2 for rating in own) / len(own))
            found[name] = (mean, deviation or 1.0)
    return found


def objective(heads: Heads, records: Sequence[Comparison], scores: Sequence[Tensor], compare: Compare) -> Preference:
    """Loss and accuracy [G] of all labels that each group has.

        loss = sum_h (comparisons_h + c * mean_i (s_ih - (r_ih - mean_h) / std_h)^2) + comparisons of sum_h w_h s_h

    over the heads whose attribute is judged or rated in the group, and its overall judgements; what has no label has
    no term. A group without any has loss 0, one without comparisons accuracy 0.

    Args:
        scores: one [K, k] tensor a group, raw.
        compare: the objective of comparisons on [K] scores.

    Reference: Wang et al. 2024, https://arxiv.org/abs/2406.12845 (heads on one trunk, missing ratings masked), with
    comparisons beside ratings.
    """
    losses: list[list[Tensor]] = [[] for _ in records]
    accuracies: list[list[Tensor]] = [[] for _ in records]
    columns: list[tuple[str | None, list[Tensor]]] = [(None, heads.total(scores))] if heads.summed else []
    columns += [(name, [values[:, column] for values in scores]) for column, name in enumerate(heads.names)]
    for name, own in columns:
        judged = [index for index, record in enumerate(records) if record.of(name)]
        if judged:
            found = compare([Labelled(records[index].of(name)) for index in judged], [own[index] for index in judged])
            for place, index in enumerate(judged):
                losses[index].append(found.loss[place])
                accuracies[index].append(found.accuracy[place])
        for index, record in enumerate(records):
            if name in record.attributes:
                error = rating_error(record.attributes[name], own[index], heads.scales[name])
                losses[index].append(heads.rating_coef * error)
    nothing = [values.sum() * 0.0 for values in scores]
    loss = [torch.stack(own or [none]).sum() for own, none in zip(losses, nothing, strict=True)]
    accuracy = [torch.stack(own or [none]).mean() for own, none in zip(accuracies, nothing, strict=True)]
    return Preference(torch.stack(loss), torch.stack(accuracy).detach())


def rating_error(ratings: Sequence[float | None], values: Tensor, scale: tuple[float, float]) -> Tensor:
    """Mean squared difference between the scores [K] of rated responses and their standardised ratings."""
    has = [index for index, rating in enumerate(ratings) if rating is not None]
    wanted = values.new_tensor([(rating - scale[0]) / scale[1] for rating in ratings if rating is not None])
    return (values[has] - wanted).square().mean()


def centering(heads: Heads, scores: Sequence[Tensor]) -> Tensor:
    """[G] mean squared score of each group over the heads without ratings, whose level comparisons leave free."""
    free = [column for column, name in enumerate(heads.names) if name not in heads.scales]
    if not free:
        return torch.stack([values.sum() * 0.0 for values in scores])
    each = [[values[:, column].square().mean() for column in free] for values in scores]
    return torch.stack([torch.stack(own).mean() for own in each])
