"""Scores of judged comparisons: what the figures of an examination are made of."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy
from numpy.typing import NDArray

from rlhf.data.tokenised import Group
from rlhf.metrics import calibration, intervals
from rlhf.metrics.intervals import Interval
from rlhf.records import prompt_key
from rlhf.scoring.scorer import Sample, Scorer, Scores

Array = NDArray[numpy.float64]
ROW = re.compile(r"(:\d+|\[\d+\])$")


@dataclass(frozen=True)
class Pairs:
    """N decided comparisons (ties of the judge are left out and counted).

    Args:
        differences: [N] raw score of the preferred response minus that of the other.
        length_gaps: [N] tokens of the preferred response minus those of the other.
        groups: [N] the prompt each comparison belongs to.
        num_ties: judgements without a preference.
        margins: [N] how much better the judge found the preferred response; nan where the row does not say.
        annotators: [N] who judged; None where the row does not say.
        sources: [N] file or data set that the row comes from.
        spread: [N] standard deviation over an ensemble's members of their differences; None for a single model.
    """

    differences: Array
    length_gaps: Array
    groups: list[str]
    num_ties: int
    margins: Array
    annotators: list[str | None]
    sources: list[str]
    spread: Array | None = None


@dataclass(frozen=True)
class Responses:
    """M scored responses.

    Args:
        scores: [M] raw scores; ``lengths`` [M] in tokens.
        preferences: [M] comparisons won minus lost, in shares of those that the response is in.
        groups: [M] their prompts.
        members: [M, m] raw scores of an ensemble's members; None for a single model.
    """

    scores: Array
    lengths: Array
    preferences: Array
    groups: list[str]
    members: Array | None = None


def score(scorer: Scorer, groups: Sequence[Group]) -> Scores:
    """Every response once, in the order of the groups.

    Args:
        scorer: gives scores whose differences are log-odds (those of a reward run before standardising).
    """
    return scorer.score(
        [
            Sample(group.record.prompt, text, group.prompt_ids, ids, True, ids)
            for group in groups
            for text, ids in zip(group.record.responses, group.responses, strict=True)
        ]
    )


def pairs_of(groups: Sequence[Group], scores: Scores, attribute: str | None = None) -> Pairs:
    """The differences of ``scores`` along the judgements in one attribute, or the overall ones."""
    rows: list[tuple[int, int]] = []
    gaps, keys, margins, annotators, sources, num_ties, start = [], [], [], [], [], 0, 0
    for group in groups:
        for judgement in group.judgements:
            if judgement.attribute != attribute:
                continue
            if judgement.probability == 0.5:
                num_ties += 1
                continue
            ahead = judgement.probability > 0.5
            better, worse = (judgement.first, judgement.second) if ahead else (judgement.second, judgement.first)
            rows.append((start + better, start + worse))
            gaps.append(len(group.responses[better]) - len(group.responses[worse]))
            keys.append(prompt_key(group.record.prompt))
            margins.append(float("nan") if judgement.margin is None else judgement.margin)
            annotators.append(judgement.annotator)
            sources.append(ROW.sub("", group.record.where))
        start += len(group.responses)
    values = scores.mean.double().cpu().numpy()
    first, second = numpy.array(rows, dtype=int).reshape(-1, 2).T
    spread = None
    if scores.members is not None and scores.members.shape[1] > 1:
        members = scores.members.double().cpu().numpy()
        spread = (members[first] - members[second]).std(1)
    return Pairs(
        values[first] - values[second],
        numpy.array(gaps, dtype=float),
        keys,
        num_ties,
        numpy.array(margins),
        annotators,
        sources,
        spread,
    )


def responses_of(groups: Sequence[Group], scores: Scores) -> Responses:
    """Every response with its score, its length and how it was judged overall."""
    values, lengths, preferences, keys = scores.mean.double().cpu().numpy(), [], [], []
    for group in groups:
        won, judged = numpy.zeros(len(group.responses)), numpy.zeros(len(group.responses))
        for judgement in group.judgements:
            if judgement.attribute is not None:
                continue
            for index, share in (
                (judgement.first, judgement.probability),
                (judgement.second, 1 - judgement.probability),
            ):
                won[index] += 2 * share - 1
                judged[index] += 1
        preferences += list(won / numpy.maximum(judged, 1))
        lengths += [len(response) for response in group.responses]
        keys += [prompt_key(group.record.prompt)] * len(group.responses)
    members = None if scores.members is None else scores.members.double().cpu().numpy()
    return Responses(values, numpy.array(lengths, dtype=float), numpy.array(preferences), keys, members)


def compare(scorer: Scorer, groups: Sequence[Group]) -> Pairs:
    """Score every response once and take the differences along the judgements."""
    return pairs_of(groups, score(scorer, groups))


def right(found: Pairs) -> Array:
    """[N] 1 where the scores order a comparison as judged, 1/2 where they are equal."""
    return 0.5 + 0.5 * numpy.sign(found.differences)  # type: ignore[no-any-return]


def accuracy(found: Pairs, seed: int, num_resamples: int = 2000) -> Interval:
    """Share of comparisons ordered as judged, equal scores counting 1/2; the interval resamples prompts."""
    return intervals.grouped_bootstrap(right(found), found.groups, num_resamples=num_resamples, seed=seed)


def calibration_error(found: Pairs, num_bins: int = 10) -> float:
    """Expected calibration error of sigmoid(difference), folded to the predicted winner."""
    return float(calibration.expected_calibration_error(*folded(found.differences), num_bins))


def folded(differences: Array, temperature: float = 1.0) -> tuple[Array, Array]:
    """Probability that the model gives to its own winner, and 1 where the judge agrees (1/2 where it has none)."""
    probabilities = 1 / (1 + numpy.exp(-numpy.abs(differences / temperature)))
    return probabilities, 0.5 + 0.5 * numpy.sign(differences)
