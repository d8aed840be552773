"""The figures of an examination on judged comparisons, each with a 95 % interval that resamples prompts."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy

from rlhf.evaluation import reward
from rlhf.evaluation.reward import Array, Pairs, Responses
from rlhf.metrics import calibration, correlation, intervals, label_noise, pairs
from rlhf.metrics.intervals import Interval

NUM_PARTS = 5


@dataclass(frozen=True)
class FigureSettings:
    """How figures are computed: bins of the calibration, resamples, seed, share of the prompts to fit on."""

    num_bins: int
    num_resamples: int
    seed: int
    fit_fraction: float


def interval(found: Interval) -> dict[str, Any] | None:
    """As JSON; None for a figure that has no value here."""
    if math.isnan(found.estimate):
        return None
    return {"estimate": found.estimate, "ci95": [found.low, found.high]}


def report(found: Pairs, responses: Responses, settings: FigureSettings) -> dict[str, Any]:
    """Every figure on comparisons, as JSON values. What the data do not say is null."""
    probabilities, outcomes = reward.folded(found.differences)
    quantiles = (0.05, 0.25, 0.5, 0.75, 0.95)
    null = calibration.null_calibration_error(probabilities, settings.num_bins, numpy.random.default_rng(settings.seed))
    return {
        "comparisons": len(found.differences),
        "prompts": len(set(found.groups)),
        "ties_left_out": found.num_ties,
        "accuracy": interval(reward.accuracy(found, settings.seed, settings.num_resamples)),
        "accuracy_when_sure": _when_sure(found, settings),
        "accuracy_by_source": _against_others(found, found.sources, settings),
        "accuracy_by_annotator": _against_others(found, found.annotators, settings),
        "accuracy_by_margin": _by_bins(found, numpy.abs(found.differences), settings),
        "accuracy_by_judged_margin": _by_bins(found, found.margins, settings),
        "accuracy_by_length_gap": _by_bins(found, found.length_gaps, settings),
        **_length(found, responses, settings),
        "margin_quantiles": dict(
            zip(map(str, quantiles), map(float, numpy.quantile(found.differences, quantiles)), strict=False)
        ),
        **_calibration(found, settings),
        "ece_of_a_calibrated_model": float(null),
        "reliability": [
            vars(entry) for entry in calibration.reliability_bins(probabilities, outcomes, settings.num_bins)
        ],
        "temperature": _temperature(found, settings),
        "label_noise": _noise(found, settings),
        "disagreement": _disagreement(found, settings),
    }


def drift(
    first: Responses, second: Responses, pairs_of: tuple[Pairs, Pairs], unit: float, settings: FigureSettings
) -> dict[str, Any]:
    """What changes from one set to another: accuracy (null where nobody judged the second), mean score (in deviations),
    length in tokens, an ensemble's disagreement (in raw scores; null for a single model), and the share of the second
    set's responses whose scores are outside the first one's central 98 %.

    Disagreement on a response is the standard deviation of the members' scores, each less its mean on the first set. It
    holds what Bradley-Terry leaves free of each prompt, so that it compares sets, and no two responses.
    """
    before, after = pairs_of
    low, high = numpy.quantile(first.scores, (0.01, 0.99))
    outside = ((second.scores < low) | (second.scores > high)).astype(float)

    def fall(ones: Array, others: Array, keys: Sequence[str], other_keys: Sequence[str]) -> dict[str, Any] | None:
        both = numpy.concatenate([ones, others])
        is_first = numpy.arange(len(both)) < len(ones)
        return interval(
            intervals.difference_of_means(
                both, is_first, ~is_first, [*keys, *other_keys], settings.num_resamples, settings.seed
            )
        )

    def gain(of_first: Array, of_second: Array) -> dict[str, Any] | None:
        return fall(-of_first, -of_second, first.groups, second.groups)

    judged = len(before.differences) and len(after.differences)
    apart = None
    if first.members is not None and second.members is not None:
        apart = [(one.members - first.members.mean(0)).std(1) for one in (first, second)]
    return {
        "accuracy_lost": fall(reward.right(before), reward.right(after), before.groups, after.groups)
        if judged
        else None,
        "score_lost": fall(first.scores / unit, second.scores / unit, first.groups, second.groups),
        "length_gained": gain(first.lengths, second.lengths),
        "disagreement_gained": gain(*apart) if apart else None,
        "outside": _mean(outside, second.groups, settings),
        "score_quantiles": {
            name: dict(
                zip(
                    ("0.05", "0.5", "0.95"),
                    map(float, numpy.quantile(one.scores / unit, (0.05, 0.5, 0.95))),
                    strict=True,
                )
            )
            for name, one in (("data", first), ("drift", second))
        },
    }


def split(keys: Sequence[str], fraction: float, seed: int) -> numpy.ndarray:
    """[N] True for the rows of about ``fraction`` of the prompts, by their text alone."""
    share = [int.from_bytes(hashlib.sha256(f"{seed}/{key}".encode()).digest()[:4], "big") / 2**32 for key in keys]
    return numpy.array(share) < fraction


def chosen(found: Pairs, rows: numpy.ndarray) -> Pairs:
    """The comparisons where ``rows`` [N] is True."""

    def of(values: Sequence[Any]) -> list[Any]:
        return [value for value, kept in zip(values, rows, strict=True) if kept]

    return Pairs(
        found.differences[rows],
        found.length_gaps[rows],
        of(found.groups),
        found.num_ties,
        found.margins[rows],
        of(found.annotators),
        of(found.sources),
        None if found.spread is None else found.spread[rows],
    )


def _mean(values: Array, keys: Sequence[str], settings: FigureSettings) -> dict[str, Any] | None:
    return interval(intervals.grouped_bootstrap(values, keys, num_resamples=settings.num_resamples, seed=settings.seed))


def _weighted(
    statistic: Callable[[Array], float], keys: Sequence[str], settings: FigureSettings
) -> dict[str, Any] | None:
    return interval(intervals.weighted_bootstrap(statistic, keys, settings.num_resamples, settings.seed))


def _when_sure(found: Pairs, settings: FigureSettings) -> dict[str, Any] | None:
    """Accuracy on the fifth of the comparisons whose scores differ most: what is missing to 1 there is seldom doubt of
    the model's, and mostly labels that no score explains."""
    sizes = numpy.abs(found.differences)
    rows = sizes >= numpy.quantile(sizes, 1 - 1 / NUM_PARTS)
    keys = [key for key, kept in zip(found.groups, rows, strict=True) if kept]
    return _mean(reward.right(found)[rows], keys, settings)


def _against_others(found: Pairs, names: Sequence[str | None], settings: FigureSettings) -> dict[str, Any] | None:
    """Accuracy of each name's comparisons, and how far it is below that of all others; null where there is one name."""
    known = sorted({name for name in names if name is not None})
    if len(known) < 2:
        return None
    values, labels = reward.right(found), numpy.array([name or "" for name in names])
    rows = {}
    for name in known:
        own = labels == name
        others = ~own & (labels != "")
        below = intervals.difference_of_means(values, others, own, found.groups, settings.num_resamples, settings.seed)
        keys = [key for key, is_own in zip(found.groups, own, strict=True) if is_own]
        rows[name] = {
            "comparisons": int(own.sum()),
            "accuracy": _mean(values[own], keys, settings),
            "below_others": interval(below),
        }
    return rows


def _by_bins(found: Pairs, covariate: Array, settings: FigureSettings) -> list[dict[str, Any]] | None:
    """Accuracy in bins of equal mass of ``covariate`` [N], over the rows that have one; null where none has."""
    known = ~numpy.isnan(covariate)
    if not known.any():
        return None
    places, values = pairs.bins_of(covariate[known], NUM_PARTS), reward.right(found)[known]
    covariate, keys = covariate[known], numpy.array(found.groups, dtype=object)[known]
    return [
        {
            "low": float(covariate[own].min()),
            "high": float(covariate[own].max()),
            "count": int(own.sum()),
            "accuracy": float(values[own].mean()),
            "interval": _mean(values[own], list(keys[own]), settings),
        }
        for own in (places == place for place in numpy.unique(places))
    ]


def _length(found: Pairs, responses: Responses, settings: FigureSettings) -> dict[str, Any]:
    """Accuracy of length alone and what the model has over it; correlation of score and length at equal preference."""
    longer = 0.5 + 0.5 * numpy.sign(found.length_gaps)
    alone = longer if longer.mean() >= 0.5 else 1 - longer
    index, _ = intervals.numbered(responses.groups)
    scores, lengths, preferences = (
        correlation.centred(values, index) for values in (responses.scores, responses.lengths, responses.preferences)
    )
    return {
        "accuracy_of_longer_wins": float(longer.mean()),
        "accuracy_over_length": _mean(reward.right(found) - alone, found.groups, settings),
        "length_correlation": _weighted(
            lambda weights: correlation.partial_correlation(scores, lengths, preferences, weights),
            responses.groups,
            settings,
        ),
    }


def _calibration(found: Pairs, settings: FigureSettings, temperature: float = 1.0) -> dict[str, Any]:
    """ECE, Brier score and NLL of sigmoid(difference / temperature)."""
    probabilities, outcomes = reward.folded(found.differences, temperature)
    error = calibration.calibration_error_interval(
        probabilities, outcomes, found.groups, settings.num_bins, settings.num_resamples, settings.seed
    )
    losses = numpy.logaddexp(0, -found.differences / temperature)
    return {
        "ece": interval(error),
        "brier": _mean((probabilities - outcomes) ** 2, found.groups, settings),
        "negative_log_likelihood": _mean(losses, found.groups, settings),
    }


def _temperature(found: Pairs, settings: FigureSettings) -> dict[str, Any] | None:
    """The temperature that fits a share of the prompts, and what it does to the others; null where nothing differs."""
    fitted = split(found.groups, settings.fit_fraction, settings.seed)
    own, rest = chosen(found, fitted), chosen(found, ~fitted)
    if not numpy.any(own.differences) or not len(rest.differences):
        return None
    best = label_noise.fit(
        own.differences, own.groups, label_noise.NO_NOISE, 601, settings.num_resamples, settings.seed
    ).temperature
    return {
        **(interval(best) or {}),
        "fitted_on": len(set(own.groups)),
        "measured_on": len(set(rest.groups)),
        "before": _calibration(rest, settings),
        "after": _calibration(rest, settings, best.estimate),
    }


def _noise(found: Pairs, settings: FigureSettings) -> dict[str, Any] | None:
    if not numpy.any(found.differences):
        return None
    return interval(
        label_noise.fit(found.differences, found.groups, num_resamples=settings.num_resamples, seed=settings.seed).noise
    )


def _disagreement(found: Pairs, settings: FigureSettings) -> dict[str, Any] | None:
    """Of an ensemble: whether its members disagree more where it errs. Null for a single model.

    ``error_auroc``: chance that a wrong comparison has a larger spread than a right one; 1/2 is no use.
    """
    if found.spread is None:
        return None
    wrong, spread = 1 - reward.right(found), found.spread
    return {
        "spread": _mean(found.spread, found.groups, settings),
        "error_auroc": _weighted(lambda weights: pairs.weighted_auroc(spread, wrong, weights), found.groups, settings),
        "accuracy_by_spread": _by_bins(found, found.spread, settings),
    }
