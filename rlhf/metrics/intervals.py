"""Bootstrap intervals that resample prompts: rows of one prompt are no independent evidence."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

import numpy
from numpy.typing import ArrayLike, NDArray

Array = NDArray[numpy.float64]


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


def weighted_bootstrap(
    statistic: Callable[[Array], float], groups: Sequence[Hashable], num_resamples: int = 2000, seed: int = 0
) -> Interval:
    """Any statistic with a 95 % interval from resampling whole groups ([N] labels).

    Args:
        statistic: from weights [N], how often each row is drawn (all 1 for the estimate). Where it is nan for a
            resample, that one says nothing; where it is for the estimate, or for one resample in ten, all are.
    """
    index, num_groups = numbered(groups)
    counts = draw_counts(num_groups, num_resamples, seed)
    values = numpy.array([statistic(row[index]) for row in counts])
    known = values[~numpy.isnan(values)]
    estimate = statistic(numpy.ones(len(groups)))
    if numpy.isnan(estimate) or len(known) < 0.9 * num_resamples:
        return Interval(float("nan"), float("nan"), float("nan"))
    low, high = numpy.quantile(known, (0.025, 0.975))
    return Interval(float(estimate), float(low), float(high))


def difference_of_means(
    values: ArrayLike,
    first: NDArray[numpy.bool_],
    second: NDArray[numpy.bool_],
    groups: Sequence[Hashable],
    num_resamples: int = 2000,
    seed: int = 0,
) -> Interval:
    """Mean of the rows of ``first`` [N] minus that of ``second`` [N], with a 95 % interval over groups ([N] labels).

    A resample that draws no row of one side says nothing.

    Raises:
        ValueError: where a side has no row.
    """
    if not first.any() or not second.any():
        raise ValueError("need rows on both sides")
    index, num_groups = numbered(groups)
    array = numpy.asarray(values, dtype=float)
    counts = numpy.vstack([numpy.ones(num_groups), draw_counts(num_groups, num_resamples, seed)])
    means = []
    for rows in (first, second):
        sums, sizes = (numpy.bincount(index, weights, num_groups) for weights in (array * rows, rows.astype(float)))
        drawn = counts @ sizes
        means.append(numpy.where(drawn > 0, counts @ sums / numpy.maximum(drawn, 1), numpy.nan))
    found = means[0] - means[1]
    low, high = numpy.nanquantile(found[1:], (0.025, 0.975))
    return Interval(float(found[0]), float(low), float(high))


def numbered(groups: Sequence[Hashable]) -> tuple[NDArray[numpy.int64], int]:
    """[N] the number of each row's group, in order of appearance, and how many groups there are."""
    numbers: dict[Hashable, int] = {}
    index = numpy.array([numbers.setdefault(group, len(numbers)) for group in groups], dtype=numpy.int64)
    return index, len(numbers)


def draw_counts(num_groups: int, num_resamples: int, seed: int) -> Array:
    """[num_resamples, num_groups] how often each group is drawn, with replacement."""
    share = numpy.full(num_groups, 1 / num_groups)
    return numpy.random.default_rng(seed).multinomial(num_groups, share, num_resamples).astype(float)
