"""Accuracy over the amount of training data, and what more of it is predicted to add.

S amounts n_1 < ... < n_S (prompts), each measured on the same held-out prompts; accuracies [S] or, of R resamples,
[R, S].

    1 - accuracy(n) = floor + scale n^-exponent

A power law with a floor is what learning curves are most often found to follow (Hestness et al. 2017,
https://arxiv.org/abs/1712.00409, eq. 1; Viering and Loog 2021, The shape of learning curves,
https://arxiv.org/abs/2103.10948, section 4). Three numbers from a handful of amounts are ill determined one by one;
what is taken from them is the step to the next doubling, close to what was measured. ``scale`` may be negative, so that
where data add nothing the predicted gain scatters around 0 instead of above it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy
from numpy.typing import ArrayLike, NDArray

from rlhf.metrics.intervals import Interval

Array = NDArray[numpy.float64]
EXPONENTS = numpy.linspace(0.05, 1.0, 20)
FEWEST = 3


@dataclass(frozen=True)
class Law:
    """The curve; each [R] where it was fitted to [R, S]."""

    floor: Array
    scale: Array
    exponent: Array

    def accuracy(self, amount: float) -> Array:
        found: Array = 1 - self.floor - self.scale * amount**-self.exponent
        return found


@dataclass(frozen=True)
class Held:
    """What one seed's runs got right on its P held-out prompts.

    Args:
        right: [S, P] comparisons that each amount's model orders as judged; ``counts`` [P] how many there are.
    """

    right: Array
    counts: Array


def fit(amounts: Sequence[float], accuracies: ArrayLike) -> Law:
    """Least squares over floor (0 or more), scale and a grid of exponents from 0.05 to 1.

    Raises:
        ValueError: for fewer than three amounts, or amounts that do not grow.
    """
    if len(amounts) < FEWEST or any(a >= b for a, b in pairwise(amounts)):
        raise ValueError(f"need at least {FEWEST} growing amounts, got {list(amounts)}")
    errors = 1 - numpy.atleast_2d(numpy.asarray(accuracies, dtype=float))
    best = numpy.full(len(errors), numpy.inf)
    floor, scale, exponent = (numpy.zeros(len(errors)) for _ in range(3))
    for power in EXPONENTS:
        column = (numpy.array(amounts, dtype=float) / amounts[-1]) ** -power
        centred = column - column.mean()
        slope = errors @ centred / (centred @ centred)
        start = errors.mean(1) - slope * column.mean()
        slope = numpy.where(start < 0, errors @ column / (column @ column), slope)
        start = numpy.maximum(start, 0.0)
        loss = ((errors - start[:, None] - slope[:, None] * column) ** 2).sum(1)
        better = loss < best
        best = numpy.where(better, loss, best)
        floor, exponent = numpy.where(better, start, floor), numpy.where(better, power, exponent)
        scale = numpy.where(better, slope * amounts[-1] ** power, scale)
    return Law(floor, scale, exponent)


def accuracies(seeds: Sequence[Held]) -> Array:
    """[S] the mean over the seeds of the share that is right."""
    return numpy.mean([held.right.sum(1) / held.counts.sum() for held in seeds], 0)  # type: ignore[no-any-return]


def resampled(seeds: Sequence[Held], num_resamples: int, seed: int) -> Array:
    """[R, S] accuracies where held-out prompts, the same ones for every amount, and of several seeds the seeds
    themselves are drawn with replacement. One seed says nothing of how much training alone scatters."""
    generator = numpy.random.default_rng(seed)
    shares = [numpy.full(len(held.counts), 1 / len(held.counts)) for held in seeds]
    found = numpy.empty((num_resamples, len(seeds[0].right)))
    for row in range(num_resamples):
        drawn = []
        for index in generator.integers(0, len(seeds), len(seeds)):
            held, times = seeds[index], generator.multinomial(len(shares[index]), shares[index])
            drawn.append(held.right @ times / (held.counts @ times))
        found[row] = numpy.mean(drawn, 0)
    return found


def gain_of_doubling(law: Law, amount: float) -> Array:
    """[R] accuracy at twice the amount minus that at the amount, both on the curve."""
    return law.accuracy(2 * amount) - law.accuracy(amount)


def interval(estimate: float, draws: Array) -> Interval:
    """95 %, by percentiles."""
    low, high = numpy.quantile(draws, (0.025, 0.975))
    return Interval(float(estimate), float(low), float(high))
