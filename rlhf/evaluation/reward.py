"""Examining a reward model on comparisons: accuracy, margins, calibration, length."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy

from rlhf.data.records import prompt_key
from rlhf.data.tokenised import Group
from rlhf.metrics import calibration, intervals, pairs
from rlhf.metrics.intervals import Interval
from rlhf.scoring.scorer import Sample, Scorer


@dataclass(frozen=True)
class Pairs:
    """N decided comparisons (ties of the judge are left out and counted).

    Args:
        differences: [N] raw score of the preferred response minus that of the other.
        length_gaps: [N] tokens of the preferred response minus those of the other.
        groups: [N] the prompt each comparison belongs to.
        num_ties: judgements without a preference.
    """

    differences: numpy.ndarray
    length_gaps: numpy.ndarray
    groups: list[str]
    num_ties: int


def compare(scorer: Scorer, groups: Sequence[Group]) -> Pairs:
    """Score every response once and take the differences along the judgements.

    Args:
        scorer: gives scores whose differences are log-odds (those of a reward run before standardising).
    """
    samples = [
        Sample(group.record.prompt, text, group.prompt_ids, ids, True, ids)
        for group in groups
        for text, ids in zip(group.record.responses, group.responses, strict=True)
    ]
    scores = scorer.score(samples).mean.double()
    differences, gaps, keys, num_ties, start = [], [], [], 0, 0
    for group in groups:
        values = scores[start : start + len(group.responses)]
        start += len(group.responses)
        for judgement in group.judgements:
            if judgement.probability == 0.5:
                num_ties += 1
                continue
            ahead = judgement.probability > 0.5
            better, worse = (judgement.first, judgement.second) if ahead else (judgement.second, judgement.first)
            differences.append(float(values[better] - values[worse]))
            gaps.append(len(group.responses[better]) - len(group.responses[worse]))
            keys.append(prompt_key(group.record.prompt))
    return Pairs(numpy.array(differences), numpy.array(gaps), keys, num_ties)


def accuracy(found: Pairs, seed: int, num_resamples: int = 2000) -> Interval:
    """Share of comparisons ordered as judged, equal scores counting 1/2; the interval resamples prompts."""
    correct = 0.5 + 0.5 * numpy.sign(found.differences)
    return intervals.grouped_bootstrap(correct, found.groups, num_resamples=num_resamples, seed=seed)


def calibration_error(found: Pairs, num_bins: int = 10) -> float:
    """Expected calibration error of sigmoid(difference), folded to the predicted winner."""
    probabilities, outcomes = _folded(found)
    return float(calibration.expected_calibration_error(probabilities, outcomes, num_bins))


def report(found: Pairs, seed: int, num_bins: int, num_resamples: int) -> dict[str, Any]:
    """Every figure of the examination, as JSON values."""
    probabilities, outcomes = _folded(found)
    overall = accuracy(found, seed, num_resamples)
    quantiles = (0.05, 0.25, 0.5, 0.75, 0.95)
    bins = calibration.reliability_bins(probabilities, outcomes, num_bins)
    by_gap = pairs.accuracy_by_bins(found.differences, found.length_gaps, 5)
    null = calibration.null_calibration_error(probabilities, num_bins, numpy.random.default_rng(seed))
    return {
        "comparisons": len(found.differences),
        "prompts": len(set(found.groups)),
        "ties_left_out": found.num_ties,
        "accuracy": {"estimate": overall.estimate, "ci95": [overall.low, overall.high]},
        "accuracy_of_longer_wins": float(pairs.length_baseline_accuracy(found.length_gaps)),
        "margin_quantiles": dict(
            zip(map(str, quantiles), map(float, numpy.quantile(found.differences, quantiles)), strict=False)
        ),
        "ece": calibration_error(found, num_bins),
        "ece_of_a_calibrated_model": float(null),
        "brier": float(calibration.brier_score(probabilities, outcomes)),
        "negative_log_likelihood": float(calibration.negative_log_likelihood(probabilities, outcomes)),
        "reliability": [vars(entry) for entry in bins],
        "accuracy_by_length_gap": [vars(entry) for entry in by_gap],
    }


def _folded(found: Pairs) -> tuple[numpy.ndarray, numpy.ndarray]:
    """Probability that the model gives to its own winner, and 1 where the judge agrees (1/2 where it has none)."""
    probabilities = 1 / (1 + numpy.exp(-numpy.abs(found.differences)))
    return probabilities, 0.5 + 0.5 * numpy.sign(found.differences)
