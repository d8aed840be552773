"""Accuracy of comparisons, from [N] differences: the preferred response's score minus the other's."""

from __future__ import annotations

from dataclasses import dataclass

import numpy
from numpy.typing import NDArray

Array = NDArray[numpy.float64]


@dataclass(frozen=True)
class CovariateBin:
    """Accuracy of the comparisons whose covariate lies between ``low`` and ``high``, both inside."""

    low: float
    high: float
    accuracy: float
    count: int


def pair_accuracy(differences: Array) -> float:
    """Share of positive differences, zeros counting 1/2.

    Raises:
        ValueError: for no comparisons.
    """
    if len(differences) == 0:
        raise ValueError("no comparisons")
    return float(numpy.mean(0.5 + 0.5 * numpy.sign(differences)))


def accuracy_by_bins(differences: Array, covariate: Array, num_bins: int) -> list[CovariateBin]:
    """Accuracy in bins of about equal mass of ``covariate`` [N]; equal covariates stay in one bin."""
    edges = numpy.unique(numpy.quantile(covariate, numpy.linspace(0, 1, num_bins + 1)))
    inner = edges[1:-1] if len(edges) > 1 else edges[:0]
    places = numpy.digitize(covariate, inner)
    found = []
    for place in numpy.unique(places):
        chosen = places == place
        values = covariate[chosen]
        accuracy = pair_accuracy(differences[chosen])
        found.append(CovariateBin(float(values.min()), float(values.max()), accuracy, int(chosen.sum())))
    return found


def length_baseline_accuracy(length_gaps: Array) -> float:
    """Accuracy of "the longer response wins"; ``length_gaps`` [N] tokens of the preferred minus the other, ties 1/2."""
    return pair_accuracy(length_gaps)
