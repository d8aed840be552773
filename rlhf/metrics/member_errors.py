"""What the members of an ensemble share, from [m, N] differences: preferred response's score minus the other's."""

from __future__ import annotations

import numpy
from numpy.typing import NDArray

Array = NDArray[numpy.float64]


def error_correlations(differences: Array) -> list[list[float | None]]:
    """[m, m] correlation (phi coefficient) of being wrong on the same comparisons; None where a member is always right
    or always wrong. 1 is an ensemble that adds nothing, 0 one whose members err independently."""
    wrong = (differences <= 0).astype(float)
    centred = wrong - wrong.mean(1, keepdims=True)
    spread = numpy.sqrt((centred**2).sum(1))
    return [
        [float(a @ b / (s * t)) if s > 0 and t > 0 else None for b, t in zip(centred, spread, strict=True)]
        for a, s in zip(centred, spread, strict=True)
    ]


def mean_error_correlation(differences: Array) -> float | None:
    """The mean over pairs of members; None where no pair has one."""
    table = error_correlations(differences)
    found = [value for i, row in enumerate(table) for value in row[:i] if value is not None]
    return float(numpy.mean(found)) if found else None


def disagreement(differences: Array) -> Array:
    """[N] standard deviation over the members of each comparison's difference, in which offsets cancel."""
    return differences.std(0)  # type: ignore[no-any-return]


def chance_above(first: Array, second: Array) -> float | None:
    """Chance that one of ``first`` is larger than one of ``second``, equal ones counting 1/2 (area under the curve);
    None where either is empty."""
    if not len(first) or not len(second):
        return None
    return float(numpy.mean(0.5 + 0.5 * numpy.sign(first[:, None] - second[None])))
