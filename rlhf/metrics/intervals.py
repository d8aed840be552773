"""Bootstrap intervals that resample prompts: rows of one prompt are no independent evidence."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy
from numpy.typing import ArrayLike


@dataclass(frozen=True)
class Interval:
    """An estimate with the bounds of its percentile interval."""

    estimate: float
    low: float
    high: float


def grouped_bootstrap(
    values: ArrayLike, groups: Sequence[Hashable], num_resamples: int = 2000, level: float = 0.95, seed: int = 0
) -> Interval:
    """Mean of ``values`` [N] with an interval from resampling whole groups ([N] labels) with replacement.

    Raises:
        ValueError: without values, or where the lengths differ.

    Reference: Davison and Hinkley 1997, section 3.8 (resampling the clusters).
    """
    array = numpy.asarray(values, dtype=float)
    if array.size == 0 or len(array) != len(groups):
        raise ValueError(f"need values with groups, got {array.size} and {len(groups)}")
    numbers: dict[Hashable, int] = {}
    index = numpy.array([numbers.setdefault(group, len(numbers)) for group in groups])
    sums = numpy.bincount(index, weights=array, minlength=len(numbers))
    counts = numpy.bincount(index, minlength=len(numbers)).astype(float)
    generator = numpy.random.default_rng(seed)
    means = numpy.empty(num_resamples)
    for resample in range(num_resamples):
        chosen = generator.integers(0, len(numbers), len(numbers))
        means[resample] = sums[chosen].sum() / counts[chosen].sum()
    low, high = numpy.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(array.mean()), float(low), float(high))


def paired_bootstrap(
    first: ArrayLike, second: ArrayLike, groups: Sequence[Hashable], num_resamples: int = 2000, seed: int = 0
) -> Interval:
    """Mean of ``first - second`` [N], measured on the same rows, with a 95 % interval over groups."""
    pair = numpy.asarray(first, dtype=float), numpy.asarray(second, dtype=float)
    if pair[0].shape != pair[1].shape:
        raise ValueError(f"need two measurements of the same rows, got {pair[0].shape} and {pair[1].shape}")
    difference = pair[0] - pair[1]
    return grouped_bootstrap(difference, groups, num_resamples=num_resamples, seed=seed)
