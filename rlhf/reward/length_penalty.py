"""Unlearning that longer is better: a penalty on what score differences and length differences have in common."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from typing import Any

import torch
from torch import Tensor

from rlhf.data.tokenised import Group

KEPT = 0.9


class LengthPenalty:
    """Gradient descent on coef * c^2, where c is the mean product of score and length differences. Stateful.

        penalty(group) = 2 * coef * c * mean_{i<j} (s_i - s_j) (l_i - l_j) / L

    L is the root mean square of length differences in the training data, in tokens, and c a moving average over the
    optimizer steps before this one, so that a gradient does not depend on the micro-batches. It takes away what is
    truly better about longer responses as well.
    """

    def __init__(self, coef: float, groups: Sequence[Group]) -> None:
        self.coef, self.mean, self.scale = coef, 0.0, _scale(groups) if coef else 1.0
        self._step: list[float] = []

    def penalty(self, groups: Sequence[Group], scores: Sequence[Tensor]) -> Tensor:
        """[G] the penalty of each group, from its [K] scores."""
        if not self.coef:
            return torch.zeros(len(groups), device=scores[0].device)
        products = torch.stack(
            [_product(_gaps(group), values) / self.scale for group, values in zip(groups, scores, strict=True)]
        )
        self._step += products.detach().tolist()
        return 2 * self.coef * self.mean * products

    def end_of_step(self) -> dict[str, float]:
        """Take the step's groups into the average; the figure, where there is a penalty."""
        if not self.coef:
            return {}
        self.mean = KEPT * self.mean + (1 - KEPT) * sum(self._step) / len(self._step)
        self._step = []
        return {"train/length_product": self.mean}

    def state_dict(self) -> dict[str, Any]:
        return {"mean": self.mean}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.mean = state["mean"]


def correlation(gaps: Sequence[float], differences: Sequence[float]) -> float | None:
    """sum d_i g_i / sqrt(sum d_i^2 sum g_i^2): like Pearson's, but about 0, which either order of a pair agrees with;
    None where all lengths or all scores are equal."""
    d, g = torch.tensor(differences, dtype=torch.float64), torch.tensor(gaps, dtype=torch.float64)
    size = float(d.norm() * g.norm())
    return float(d @ g) / size if size > 0 else None


def _gaps(group: Group) -> list[tuple[int, int, float]]:
    """(i, j, length of i minus length of j) of every pair of a group's responses, in tokens."""
    lengths = [len(response) for response in group.responses]
    return [(i, j, float(lengths[i] - lengths[j])) for i, j in combinations(range(len(lengths)), 2)]


def _product(gaps: Sequence[tuple[int, int, float]], values: Tensor) -> Tensor:
    """Mean over a group's pairs of score difference times length difference; 0 for a single response."""
    if not gaps:
        return values.sum() * 0.0
    return torch.stack([(values[i] - values[j]) * gap for i, j, gap in gaps]).mean()


def _scale(groups: Sequence[Group]) -> float:
    squares = [gap**2 for group in groups for _, _, gap in _gaps(group)]
    mean = sum(squares) / len(squares) if squares else 0.0
    return mean**0.5 or 1.0
