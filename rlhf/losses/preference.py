"""The Bradley-Terry objective on groups of responses, as pure functions of their scores."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from rlhf.records import Judgement


class Judged(Protocol):
    """Whatever carries judgements between its responses."""

    @property
    def judgements(self) -> tuple[Judgement, ...]: ...


@dataclass(frozen=True)
class Preference:
    """Per group [G]: the mean loss of its judgements, and the share that the scores order as judged (ties 1/2)."""

    loss: Tensor
    accuracy: Tensor


def bradley_terry(
    groups: Sequence[Judged],
    scores: Sequence[Tensor],
    margin_coef: float = 0.0,
    label_smoothing: float = 0.0,
    strength_power: float = 0.0,
) -> Preference:
    """Negative log-likelihood of the judgements, averaged within each group.

        loss(i, j) = |m_ij|^w * (-q * log sigmoid(d) - (1 - q) * log sigmoid(-d)),   d = s_i - s_j - c * m_ij
        q = p * (1 - e) + (1 - p) * e

    p is the probability that i is preferred (1, the share of votes, or 1/2 for a tie), m its margin (0 where it has
    none), c ``margin_coef``, e ``label_smoothing``, w ``strength_power`` (0: every judgement weighs the same).

    Args:
        groups: G groups with their judgements.
        scores: one [K] tensor a group; K may differ.

    Reference: Ouyang et al. 2022, https://arxiv.org/abs/2203.02155, eq. 1 (all pairs of a ranking in one group);
    margins subtracted as in Touvron et al. 2023, https://arxiv.org/abs/2307.09288, eq. 2, or as weights (w = 1) in
    Wang et al. 2024, https://arxiv.org/abs/2410.01257 (scaled Bradley-Terry); smoothing with the rate e at
    which labels are wrong as in Mitchell 2023, https://ericmitchell.ai/cdpo.pdf.
    """
    losses, accuracies = [], []
    for group, values in zip(groups, scores, strict=True):
        first = torch.tensor([judgement.first for judgement in group.judgements], device=values.device)
        second = torch.tensor([judgement.second for judgement in group.judgements], device=values.device)
        probability = values.new_tensor([judgement.probability for judgement in group.judgements])
        difference = values[first] - values[second]
        margin = values.new_tensor([judgement.margin or 0.0 for judgement in group.judgements])
        shifted = difference - margin_coef * margin if margin_coef else difference
        smoothed = probability * (1 - label_smoothing) + (1 - probability) * label_smoothing
        each = -(smoothed * logsigmoid(shifted) + (1 - smoothed) * logsigmoid(-shifted))
        losses.append((margin.abs() ** strength_power * each if strength_power else each).mean())
        accuracies.append(_agreement(difference, probability))
    return Preference(torch.stack(losses), torch.stack(accuracies))


def plackett_luce(groups: Sequence[Judged], scores: Sequence[Tensor], levels: Sequence[Sequence[int]]) -> Preference:
    """Negative log-likelihood of each ranking as a sequence of choices of the best of what is left, a choice.

        loss = -mean_i (s_i - log sum_{j: level_j >= level_i} exp s_j)

    over the responses that are not left alone. Of two responses it is Bradley-Terry. Equal levels are each chosen with
    all of their level left (Breslow 1974).

    Args:
        levels: for each group and response, how many are preferred to it.

    Reference: Plackett 1975, The analysis of permutations; Luce 1959; for reward models Zhu et al. 2023,
    https://arxiv.org/abs/2301.11270.
    """
    losses, accuracies = [], []
    for group, values, own in zip(groups, scores, levels, strict=True):
        level = torch.tensor(own, device=values.device)
        left = level[None, :] >= level[:, None]
        total = values[None].expand(len(values), -1).masked_fill(~left, -torch.inf).logsumexp(1)
        chosen = left.sum(1) > 1
        losses.append((total - values)[chosen].mean())
        first = torch.tensor([judgement.first for judgement in group.judgements], device=values.device)
        second = torch.tensor([judgement.second for judgement in group.judgements], device=values.device)
        probability = values.new_tensor([judgement.probability for judgement in group.judgements])
        accuracies.append(_agreement(values[first] - values[second], probability))
    return Preference(torch.stack(losses), torch.stack(accuracies))


def outcome(ratings: Sequence[float], values: Tensor) -> tuple[Tensor, Tensor]:
    """Mean cross-entropy of one group's labels, for which a score [K] is the log-odds of being good, and the share of
    responses on the right side of 0 (a score of 0 counts 1/2).

    Args:
        ratings: probability that each response is good, 1 or 0 for a label.

    Reference: Cobbe et al. 2021, https://arxiv.org/abs/2110.14168 (verifiers), read at the last token alone.
    """
    wanted = values.new_tensor(ratings)
    right = 0.5 + 0.5 * torch.sign(values.detach()) * torch.sign(wanted - 0.5)
    return -(wanted * logsigmoid(values) + (1 - wanted) * logsigmoid(-values)).mean(), right.mean()


def distilled(values: Tensor, target: Tensor) -> Tensor:
    """Mean over the pairs of a group of the squared difference between its score differences and the target's, which
    leaves the level free; 0 for a single response.

        loss = mean_{i<j} ((s_i - s_j) - (t_i - t_j))^2

    Args:
        values, target: [K] scores of the student and of the teacher.
    """
    error = values - target.to(values)
    return (error[:, None] - error[None]).square().sum() / max(1, len(error) * (len(error) - 1))


def _agreement(difference: Tensor, probability: Tensor) -> Tensor:
    """Share of judgements that the differences [N] order as the probabilities [N] say; a tie of either is 1/2."""
    return (0.5 + 0.5 * torch.sign(difference.detach()) * torch.sign(probability - 0.5)).mean()


def centering(scores: Sequence[Tensor]) -> Tensor:
    """[G] mean squared score of each group: Bradley-Terry leaves the level free, this keeps it near zero.

    Reference: Eisenstein et al. 2023, https://arxiv.org/abs/2312.09244, section 2.
    """
    return torch.stack([values.square().mean() for values in scores])
