"""How the share of agreement rises with the difference of two scores: temperature, and the noise of the labels.

    P(judged as scored | d) = noise + (1 - 2 noise) sigmoid(d / temperature)

d is the score of the preferred response minus that of the other. Temperature 1 and noise 0 is the Bradley-Terry model
that a reward model is trained as; noise is what no difference of scores, however large, explains. Both are fitted by
maximum likelihood on a grid, so that an interval that resamples prompts costs one product of matrices.

Reference: Wichmann and Hill 2001, The psychometric function I, eq. 1 (guess and lapse rate set equal).
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy
from numpy.typing import NDArray

from rlhf.metrics import intervals
from rlhf.metrics.intervals import Interval

Array = NDArray[numpy.float64]
NO_NOISE = numpy.zeros(1)
NOISES = numpy.linspace(0, 0.5, 51)
SPAN, PARTS = 2.0, 500


@dataclass(frozen=True)
class Curve:
    """Both figures with the bounds of their intervals."""

    temperature: Interval
    noise: Interval


def fit(
    differences: Array,
    groups: Sequence[Hashable],
    noises: Array = NOISES,
    num_temperatures: int = 61,
    num_resamples: int = 2000,
    seed: int = 0,
) -> Curve:
    """The likeliest curve through ``differences`` [N], with intervals over ``groups`` [N].

    Temperatures are tried from 1/100 to 100 times the median difference (a factor of 100 ** (2 / (n - 1)) apart).

    Raises:
        ValueError: without differences, or where no two scores differ.
    """
    size = float(numpy.median(numpy.abs(differences[differences != 0]))) if numpy.any(differences) else 0.0
    if not size > 0:
        raise ValueError("no two scores differ: no temperature fits")
    temperatures = size * 10 ** numpy.linspace(-SPAN, SPAN, num_temperatures)
    index, num_groups = intervals.numbered(groups)
    likelihood = numpy.empty((num_groups, num_temperatures * len(noises)))
    for place, temperature in enumerate(temperatures):
        sure = 1 / (1 + numpy.exp(-numpy.clip(differences / temperature, -700, 700)))[:, None]
        values = numpy.log(numpy.maximum(noises + (1 - 2 * noises) * sure, 1e-300))
        columns = slice(place * len(noises), (place + 1) * len(noises))
        likelihood[:, columns] = numpy.stack([numpy.bincount(index, row, num_groups) for row in values.T], 1)
    best = [int(likelihood.sum(0).argmax())]
    counts = intervals.draw_counts(num_groups, num_resamples, seed)
    for start in range(0, num_resamples, PARTS):
        best += (counts[start : start + PARTS] @ likelihood).argmax(1).tolist()
    found = numpy.array(best)
    return Curve(_interval(temperatures[found // len(noises)]), _interval(noises[found % len(noises)]))


def _interval(values: Array) -> Interval:
    """The first value is the estimate, the others are of the resamples."""
    low, high = numpy.quantile(values[1:], (0.025, 0.975))
    return Interval(float(values[0]), float(low), float(high))
