"""How much of a score is length that preference does not ask for."""

from __future__ import annotations

import numpy
from numpy.typing import NDArray

Array = NDArray[numpy.float64]
PRECISION = 0.01
MAX_STEPS = 50


def excess(differences: Array, length_gaps: Array, weights: Array) -> float:
    """Score a token that is to be taken off, so that length says nothing more of the preference than the rest does.

        P(preferred) = sigmoid(a d + b g),   excess = -b / a

    d [N] is the score of the preferred response minus that of the other, g [N] their difference in length. The score
    minus excess times length is the one in which, at the same difference of scores, length no longer tells who is
    preferred: what people truly like about length stays, unlike where a score is made independent of length. a and b
    are the likeliest under a normal prior of deviation 10 on each, in units of the root mean square of d and g.

    nan where all d or all g are 0, or where a is not above 0: scores that say nothing at equal length cannot be mended.

    Reference: the idea is that of Huang et al. 2024, Post-hoc reward calibration, https://arxiv.org/abs/2409.17407,
    which takes off the mean score at a length; the regression is that of length-controlled AlpacaEval
    (https://arxiv.org/abs/2404.04475).
    """
    scales = numpy.array(
        [numpy.sqrt(float(weights @ column**2) / weights.sum()) for column in (differences, length_gaps)]
    )
    if not scales.all():
        return float("nan")
    rows = numpy.stack([differences, length_gaps], 1) / scales
    found = numpy.zeros(2)
    for _ in range(MAX_STEPS):
        wrong = numpy.exp(-numpy.logaddexp(0, rows @ found))
        slope = rows.T @ (weights * wrong) - PRECISION * found
        curvature = (rows * (weights * wrong * (1 - wrong))[:, None]).T @ rows + PRECISION * numpy.eye(2)
        step = numpy.linalg.solve(curvature, slope)
        step = step / max(1.0, float(numpy.abs(step).max()))
        found = found + step
        if numpy.abs(step).max() < 1e-9:
            break
    score, length = found / scales
    return float(-length / score) if score > 0 else float("nan")
