"""From the scores of an ensemble's members to one score, and how far the members disagree.

Letters: B responses, m members. Bradley-Terry leaves each member a constant a prompt free, which is no opinion on the
response: what is compared between members are differences to a reference response of the same prompt.
"""

from __future__ import annotations

from torch import Tensor


def disagreement(members: Tensor, references: Tensor) -> Tensor:
    """[B] standard deviation over the members of their score differences to the reference.

    Args:
        members: [B, m] standardised scores.
        references: [B, m] what the same member gives the reference response of the same prompt.
    """
    return (members - references).std(1, correction=0)


def mean(members: Tensor, references: Tensor, coef: float) -> Tensor:
    """[B] mean over the members; neither references nor ``coef`` matter."""
    return members.mean(1)


def least(members: Tensor, references: Tensor, coef: float) -> Tensor:
    """[B] the lowest gain over the reference, on the mean level of the reference; ``coef`` does not matter.

    Reference: Coste et al. 2023, https://arxiv.org/abs/2310.02743 (worst-case optimisation), of differences.
    """
    return references.mean(1) + (members - references).min(1).values


def mean_minus_std(members: Tensor, references: Tensor, coef: float) -> Tensor:
    """[B] mean less ``coef`` times the members' disagreement."""
    return members.mean(1) - coef * disagreement(members, references)


def mean_minus_variance(members: Tensor, references: Tensor, coef: float) -> Tensor:
    """[B] mean less ``coef`` times the square of the members' disagreement.

    Reference: Coste et al. 2023, https://arxiv.org/abs/2310.02743 (uncertainty-weighted), of differences.
    """
    return members.mean(1) - coef * disagreement(members, references).square()


AGGREGATES = {
    "mean": mean, "min": least, "mean_minus_std": mean_minus_std, "mean_minus_variance": mean_minus_variance,
}  # fmt: skip
