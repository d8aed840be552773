"""A reward model on RewardBench 1, RewardBench 2 or RM-Bench, by their rules."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy

from rlhf.data.benchmarks import STYLES, BenchmarkRow
from rlhf.errors import Problem, RlhfError
from rlhf.evaluation.figures import FigureSettings, interval
from rlhf.metrics import benchmark_rules, intervals
from rlhf.records import prompt_key

Scored = Sequence[tuple[BenchmarkRow, Sequence[float]]]


def report(name: str, scored: Scored, settings: FigureSettings) -> dict[str, Any]:
    """The benchmark's figures as JSON values; intervals resample prompts within what is here.

    Raises:
        RlhfError: DAT054 for rows of Ties that do not fit together.
    """
    made = {"rewardbench": _rewardbench, "rewardbench2": _rewardbench2, "rm-bench": _rm_bench}[name](scored, settings)
    return {"benchmark": name, "rows": len(scored), **made}


def _rewardbench(scored: Scored, settings: FigureSettings) -> dict[str, Any]:
    right = numpy.array([benchmark_rules.is_right(values) for _, values in scored])
    subsets, keys = _columns(scored)

    def parts(weights: numpy.ndarray) -> dict[str, float]:
        return benchmark_rules.sections(_means(subsets, right, weights))

    def whole(name: str) -> dict[str, Any] | None:
        def of(weights: numpy.ndarray) -> float:
            return parts(weights).get(name, float("nan"))

        return interval(intervals.weighted_bootstrap(of, keys, settings.num_resamples, settings.seed))

    known = {*benchmark_rules.PRIOR_SETS, *(subset for one in benchmark_rules.SECTIONS.values() for subset in one)}
    return {
        "subsets": _by_subset(subsets, keys, right, settings),
        "sections": {name: whole(name) for name in parts(numpy.ones(len(right)))},
        "of_no_section": sorted(set(subsets) - known),
    }


def _rewardbench2(scored: Scored, settings: FigureSettings) -> dict[str, Any]:
    """Ties are one score over all their rows, so that it has no interval, and the overall mean none either."""
    rest = [one for one in scored if one[0].subset.lower() != benchmark_rules.TIES.lower()]
    tied = [
        (row.id, values, row.num_correct)
        for row, values in scored
        if row.subset.lower() == benchmark_rules.TIES.lower()
    ]
    for row, values in rest:
        if len(values) != 4 or row.num_correct != 1:
            what = f"{row.num_correct} right of {len(values)} responses."
            raise RlhfError(Problem("DAT054", row.where, what, "one right response of four outside Ties"))
    subsets, keys = _columns(rest)
    right = numpy.array([benchmark_rules.best_of(values, row.num_correct) for row, values in rest])
    found = _by_subset(subsets, keys, right, settings)
    means = [one["estimate"] for one in found.values()]
    of_ties = None
    if tied:
        try:
            of_ties = benchmark_rules.ties(tied)
        except ValueError as error:
            raise RlhfError(Problem("DAT054", "data", f"Ties: {error}.", "the rows as they are published")) from None
        means.append(of_ties["score"])
    return {"subsets": found, "ties": of_ties, "overall": sum(means) / len(means)}


def _rm_bench(scored: Scored, settings: FigureSettings) -> dict[str, Any]:
    """Each domain's matrix (safety-refuse and safety-response are one domain), and the mean over domains."""
    domains = sorted({row.subset.split("-")[0] for row, _ in scored})
    found = {}
    for domain in domains:
        values = [values for row, values in scored if row.subset.split("-")[0] == domain]
        found[domain] = benchmark_rules.style_matrix([one[:STYLES] for one in values], [one[STYLES:] for one in values])
    means = {
        key: float(numpy.mean([one[key] for one in found.values()])) for key in ("hard", "normal", "easy", "overall")
    }
    return {"domains": found, **means}


def _columns(scored: Scored) -> tuple[list[str], list[str]]:
    return [row.subset for row, _ in scored], [prompt_key(row.prompt) for row, _ in scored]


def _means(subsets: Sequence[str], values: numpy.ndarray, weights: numpy.ndarray) -> dict[str, float]:
    names, index = numpy.unique(subsets, return_inverse=True)
    sums, sizes = numpy.bincount(index, weights * values), numpy.bincount(index, weights)
    return {str(name): float(s / size) for name, s, size in zip(names, sums, sizes, strict=True) if size}


def _by_subset(
    subsets: Sequence[str], keys: Sequence[str], values: numpy.ndarray, settings: FigureSettings
) -> dict[str, Any]:
    found = {}
    for name in dict.fromkeys(subsets):
        rows = [index for index, one in enumerate(subsets) if one == name]
        own = intervals.grouped_bootstrap(
            values[rows], [keys[row] for row in rows], num_resamples=settings.num_resamples, seed=settings.seed
        )
        found[name] = {"rows": len(rows), **(interval(own) or {})}
    return found
