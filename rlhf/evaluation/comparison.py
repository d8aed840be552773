"""Two policies on the same prompts: win rates, slices, and where the candidate lost most."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy
from numpy.typing import NDArray

from rlhf.evaluation import contradictions
from rlhf.metrics import intervals, winrate
from rlhf.metrics.intervals import Interval
from rlhf.records import Messages, plain_text, prompt_key
from rlhf.scoring.scorer import Sample

Array = NDArray[numpy.float64]
FEW = 10


@dataclass(frozen=True)
class Side:
    """N responses of one policy and their scores [N]; row i of both sides answers the same prompt.

    Args:
        sampling: how they were sampled, by setting.
    """

    name: str
    samples: Sequence[Sample]
    scores: Array
    sampling: Mapping[str, Any] = field(default_factory=dict)


def wins(baseline: Side, candidate: Side) -> Array:
    """[N] 1, 1/2 or 0. A response that was cut off loses to one that ended: a reward model knows nothing there."""
    both = [numpy.array([sample.finished for sample in side.samples], dtype=float) for side in (candidate, baseline)]
    by_end, by_score = winrate.outcomes_of(*both), winrate.outcomes_of(candidate.scores, baseline.scores)
    found: Array = numpy.where(by_end == 0.5, by_score, by_end)
    return found


def length_gaps(baseline: Side, candidate: Side) -> Array:
    """[N] characters of the candidate's response minus those of the baseline's."""
    pairs = zip(candidate.samples, baseline.samples, strict=True)
    return numpy.array([float(len(ours.response) - len(theirs.response)) for ours, theirs in pairs])


def report(
    baseline: Side, candidate: Side, labels: Mapping[str, Sequence[str]], seed: int, num_resamples: int, num_worst: int
) -> dict[str, Any]:
    """Every figure of a comparison, as JSON values; intervals resample prompts.

    ``win_rate`` counts a response that was cut off as lost to one that ended; ``both_ended`` leaves comparisons with a
    response that was cut off out.

    Args:
        labels: slicing -> [N] the slice of each row.
    """
    rows = _Rows.of(baseline, candidate)
    at_equal_length = winrate.length_controlled(rows.won, rows.length_gaps, rows.keys, num_resamples, seed)
    model, num_prompts = winrate.length_model(rows.won, rows.length_gaps), len(set(rows.keys))
    found = {
        "baseline": _side(baseline),
        "candidate": _side(candidate),
        "prompts": num_prompts,
        "few": num_prompts < FEW,
        "comparisons": len(rows.keys),
        "ties": int((rows.won == 0.5).sum()),
        "score_difference": _interval(rows.score_difference(seed, num_resamples)),
        "win_rate": _interval(rows.win_rate(seed, num_resamples)),
        "both_ended": _both_ended(rows, seed, num_resamples),
        "length_controlled_win_rate": _interval(at_equal_length) if at_equal_length else None,
        "length_effect": model.length_effect if model else None,
        "slices": {name: _slices(rows, of_rows, seed, num_resamples) for name, of_rows in labels.items()},
        "worst": worst(baseline, candidate, num_worst),
    }
    return {**found, "contradiction": contradictions.sentence(found)}


@dataclass(frozen=True)
class _Rows:
    """N comparisons.

    Args:
        won: [N] 1, 1/2 or 0; ``score_gaps`` [N] candidate's score minus baseline's, ``length_gaps`` [N] in characters.
        ended: [N, 2] whether the baseline's and the candidate's response ended.
        keys: [N] the prompt of each.
    """

    won: Array
    score_gaps: Array
    length_gaps: Array
    ended: NDArray[numpy.bool_]
    keys: list[str]

    @classmethod
    def of(cls, baseline: Side, candidate: Side) -> _Rows:
        pairs = zip(baseline.samples, candidate.samples, strict=True)
        ended = numpy.array([(theirs.finished, ours.finished) for theirs, ours in pairs])
        keys = [prompt_key(sample.prompt) for sample in candidate.samples]
        gaps = candidate.scores - baseline.scores
        return cls(wins(baseline, candidate), gaps, length_gaps(baseline, candidate), ended, keys)

    def only(self, chosen: Sequence[int]) -> _Rows:
        """The comparisons with these numbers."""
        rows = list(chosen)
        keys = [self.keys[row] for row in rows]
        return _Rows(self.won[rows], self.score_gaps[rows], self.length_gaps[rows], self.ended[rows], keys)

    def win_rate(self, seed: int, num_resamples: int) -> Interval:
        return intervals.grouped_bootstrap(self.won, self.keys, num_resamples, seed=seed)

    def score_difference(self, seed: int, num_resamples: int) -> Interval:
        return intervals.grouped_bootstrap(self.score_gaps, self.keys, num_resamples, seed=seed)


def worst(baseline: Side, candidate: Side, count: int) -> list[dict[str, Any]]:
    """The rows that the candidate lost by the most, a cut-off response before all others, as text."""
    lost, gaps = wins(baseline, candidate), candidate.scores - baseline.scores
    cut = [
        theirs.finished and not ours.finished for ours, theirs in zip(candidate.samples, baseline.samples, strict=True)
    ]
    order = sorted((row for row in range(len(gaps)) if lost[row] == 0), key=lambda row: (not cut[row], gaps[row], row))
    return [
        {
            "prompt": plain_text(candidate.samples[row].prompt),
            "score_difference": float(gaps[row]),
            "baseline": _shown(baseline, row),
            "candidate": _shown(candidate, row),
        }
        for row in order[:count]
    ]


def is_worse(found: Mapping[str, Any]) -> list[str]:
    """The figures whose whole interval says that the candidate is worse, each with its value."""
    ended, equal = found["both_ended"], found["length_controlled_win_rate"]
    figures = [
        ("score difference", found["score_difference"], 0.0, "+.3f"),
        ("win rate", found["win_rate"], 0.5, ".3f"),
        ("win rate where both ended", None if ended["few"] else ended["win_rate"], 0.5, ".3f"),
        ("win rate at equal length", equal, 0.5, ".3f"),
    ]
    return [
        f"{name} {contradictions.shown(figure, form)}"
        for name, figure, neutral, form in figures
        if figure and figure["ci95"][1] < neutral
    ]


def thirds_by_length(prompts: Sequence[Messages]) -> list[str]:
    """[N] the third of the rows that each is in by its prompt's characters; equal lengths stay together."""
    lengths = numpy.array([len(plain_text(prompt)) for prompt in prompts])
    low, high = numpy.quantile(lengths, [1 / 3, 2 / 3])
    return [
        f"1st third, to {low:.0f}" if n <= low else f"2nd third, to {high:.0f}" if n <= high else "3rd third"
        for n in lengths
    ]


def _both_ended(rows: _Rows, seed: int, num_resamples: int) -> dict[str, Any]:
    """The same two figures without the comparisons in which a response was cut off; null where none is left."""
    own = rows.only([row for row, both in enumerate(rows.ended.tolist()) if all(both)])
    num_prompts = len(set(own.keys))
    return {
        "comparisons": len(own.keys),
        "prompts": num_prompts,
        "few": num_prompts < FEW,
        "score_difference": _interval(own.score_difference(seed, num_resamples)) if num_prompts else None,
        "win_rate": _interval(own.win_rate(seed, num_resamples)) if num_prompts else None,
    }


def _slices(rows: _Rows, labels: Sequence[str], seed: int, num_resamples: int) -> list[dict[str, Any]]:
    found = []
    for label in sorted(set(labels)):
        own = rows.only([row for row, one in enumerate(labels) if one == label])
        cut_off = (~own.ended).sum(0).tolist()
        num_prompts = len(set(own.keys))
        found.append(
            {
                "slice": label,
                "prompts": num_prompts,
                "score_difference": float(own.score_gaps.mean()),
                "win_rate": _interval(own.win_rate(seed, num_resamples)),
                "few": num_prompts < FEW,
                "cut_off": {"baseline": cut_off[0], "candidate": cut_off[1]},
            }
        )
    return found


def _side(side: Side) -> dict[str, Any]:
    num_cut = sum(not sample.finished for sample in side.samples)
    return {
        "name": side.name,
        "sampling": dict(side.sampling),
        "score": float(side.scores.mean()),
        "characters": float(numpy.mean([len(sample.response) for sample in side.samples])),
        "cut_off": num_cut,
        "cut_off_share": num_cut / len(side.samples),
        "empty": sum(sample.is_empty for sample in side.samples),
    }


def _shown(side: Side, row: int) -> dict[str, Any]:
    sample = side.samples[row]
    return {"response": sample.response, "score": float(side.scores[row]), "finished": sample.finished}


def _interval(found: Interval) -> dict[str, Any]:
    return {"estimate": found.estimate, "ci95": [found.low, found.high]}
