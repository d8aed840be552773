"""A correction of the score by length, fitted on some prompts and shown on the others."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy

from rlhf.evaluation import figures, reward
from rlhf.evaluation.figures import FigureSettings
from rlhf.evaluation.reward import Pairs, Responses
from rlhf.metrics import correlation, intervals, length_effect


def report(found: Pairs, responses: Responses, unit: float, settings: FigureSettings) -> dict[str, Any] | None:
    """What is to be taken off a score for each token of the response, and what that does to other prompts.

    score' = score - coef * (tokens - mean_length). ``coef`` is fitted on ``fit_fraction`` of the prompts; its interval
    refits it on resamples of them. ``before`` and ``after`` are on the others, with intervals for that very coef.
    Tokens are those of the response as the reward model reads it, with its end token.

    None where nothing is to be fitted: equal lengths, equal scores, or scores that say nothing at equal length.

    Args:
        unit: of the differences and scores here, how many make one of the score that is to be corrected.
    """
    fitted, known = (
        figures.split(keys, settings.fit_fraction, settings.seed) for keys in (found.groups, responses.groups)
    )
    own, rest = figures.chosen(found, fitted), figures.chosen(found, ~fitted)
    if not len(own.differences) or not len(rest.differences):
        return None
    best = intervals.weighted_bootstrap(
        lambda weights: length_effect.excess(own.differences, own.length_gaps, weights),
        own.groups,
        settings.num_resamples,
        settings.seed,
    )
    if numpy.isnan(best.estimate):
        return None
    coef = best.estimate
    others = Responses(
        responses.scores[~known],
        responses.lengths[~known],
        responses.preferences[~known],
        [key for key, is_fitted in zip(responses.groups, known, strict=True) if not is_fitted],
    )
    after = replace(rest, differences=rest.differences - coef * rest.length_gaps)
    corrected = replace(others, scores=others.scores - coef * others.lengths)
    return {
        "coef": coef / unit,
        "ci95": [best.low / unit, best.high / unit],
        "mean_length": float(responses.lengths[known].mean()),
        "fitted_on": len(set(own.groups)),
        "measured_on": len(set(rest.groups)),
        "before": _figures(rest, others, settings),
        "after": _figures(after, corrected, settings),
        "accuracy_gained": _gained(reward.right(after), reward.right(rest), rest, settings),
        "negative_log_likelihood_gained": _gained(_losses(after), _losses(rest), rest, settings),
    }


def _figures(found: Pairs, responses: Responses, settings: FigureSettings) -> dict[str, Any]:
    index, _ = intervals.numbered(responses.groups)
    scores, lengths, preferences = (
        correlation.centred(values, index) for values in (responses.scores, responses.lengths, responses.preferences)
    )
    shared = intervals.weighted_bootstrap(
        lambda weights: correlation.partial_correlation(scores, lengths, preferences, weights),
        responses.groups,
        settings.num_resamples,
        settings.seed,
    )
    losses = intervals.grouped_bootstrap(
        _losses(found), found.groups, num_resamples=settings.num_resamples, seed=settings.seed
    )
    return {
        "accuracy": figures.interval(reward.accuracy(found, settings.seed, settings.num_resamples)),
        "length_correlation": figures.interval(shared),
        "negative_log_likelihood": figures.interval(losses),
    }


def _losses(found: Pairs) -> numpy.ndarray:
    return numpy.logaddexp(0, -found.differences)


def _gained(
    after: numpy.ndarray, before: numpy.ndarray, found: Pairs, settings: FigureSettings
) -> dict[str, Any] | None:
    return figures.interval(
        intervals.paired_bootstrap(
            after, before, found.groups, num_resamples=settings.num_resamples, seed=settings.seed
        )
    )
