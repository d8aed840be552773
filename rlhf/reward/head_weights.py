"""What makes several heads one score: weights and a gate, fitted to overall comparisons in float64.

Letters: N comparisons, k heads, d hidden size. Nothing here is random: the same numbers give the same fit.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import softplus

Array = NDArray[numpy.float64]
PENALTY, TOLERANCE, MAX_STEPS = 1.0, 1e-10, 200


@dataclass(frozen=True)
class Gate:
    """score = scale * sum_h softmax(weight x + bias)_h s_h, x [d] the hidden state at the end of the prompt."""

    weight: Tensor
    bias: Tensor
    scale: float

    def shares(self, features: Tensor) -> Tensor:
        """[..., k] from features [..., d]; they add up to 1."""
        shares: Tensor = (features @ self.weight.T + self.bias).softmax(-1)
        return shares


def fit_weights(differences: Array, probabilities: Array, shares: Array) -> Array:
    """[k] weights of the least penalised negative log-likelihood of comparisons, by Newton's method.

        sum_n a_n (softplus(z_n) - p_n z_n) + 1/2 |w|^2,   z_n = sum_h w_h d_nh

    A weight may be negative: an attribute may count against a response. The penalty keeps weights finite where they
    tell all comparisons apart, and the likelihood being concave makes them unique.

    Args:
        differences: [N, k] raw scores of the first response minus those of the second.
        probabilities: [N] that the first is preferred; shares: [N] weight of each comparison.
    """
    weights = numpy.zeros(differences.shape[1])
    for _ in range(MAX_STEPS):
        logits = differences @ weights
        chance = 0.5 * (1 + numpy.tanh(logits / 2))
        gradient = differences.T @ (shares * (chance - probabilities)) + PENALTY * weights
        if numpy.abs(gradient).max() < TOLERANCE:
            break
        curvature = (differences * (shares * chance * (1 - chance))[:, None]).T @ differences
        step = numpy.linalg.solve(curvature + PENALTY * numpy.eye(len(weights)), gradient)
        before, size = _loss(logits, probabilities, shares, weights), 1.0
        while size > TOLERANCE:
            tried, less = weights - size * step, 1e-4 * size * float(gradient @ step)
            if _loss(differences @ tried, probabilities, shares, tried) <= before - less:
                break
            size /= 2
        if size <= TOLERANCE:
            break
        weights = tried
    return weights


def _loss(logits: Array, probabilities: Array, shares: Array, weights: Array) -> float:
    each = numpy.logaddexp(0.0, logits) - probabilities * logits
    return float(shares @ each + 0.5 * PENALTY * weights @ weights)


def fit_gate(differences: Array, features: Array, probabilities: Array, shares: Array, penalty: float) -> Gate:
    """The gate of the least penalised negative log-likelihood, found by L-BFGS from an even one.

        sum_n a_n (softplus(z_n) - p_n z_n) + penalty/2 (|A|^2 + |b|^2 + c^2)
        z_n = e^c sum_h softmax(A u_n + b)_h d_nh

    u are the features, standardised and divided by sqrt(d), so that the penalty means the same for every base. The
    standardisation is folded into the gate that comes back.

    Args:
        features: [N, d] hidden state at the end of each comparison's prompt.

    Reference: Wang et al. 2024, https://arxiv.org/abs/2406.12845 (a gate on the prompt with the rest frozen); here a
    linear one.
    """
    d, p, a = (torch.from_numpy(values) for values in (differences, probabilities, shares))
    raw = torch.from_numpy(features)
    mean, deviation = raw.mean(0), raw.std(0, correction=0)
    spread = deviation.masked_fill(deviation == 0, 1.0) * raw.shape[1] ** 0.5
    u = (raw - mean) / spread
    A = torch.zeros(d.shape[1], u.shape[1], dtype=torch.float64, requires_grad=True)
    b = torch.zeros(d.shape[1], dtype=torch.float64, requires_grad=True)
    c = torch.zeros((), dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [A, b, c], max_iter=MAX_STEPS, tolerance_grad=1e-8, tolerance_change=1e-12, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        logits = c.exp() * ((u @ A.T + b).softmax(-1) * d).sum(1)
        size = A.square().sum() + b.square().sum() + c.square()
        loss: Tensor = (a * (softplus(logits) - p * logits)).sum() + penalty / 2 * size
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    optimizer.step(closure)  # type: ignore[no-untyped-call]
    weight = A.detach() / spread
    return Gate(weight, b.detach() - weight @ mean, float(c.detach().exp()))
