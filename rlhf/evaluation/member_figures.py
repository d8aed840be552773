"""What an ensemble's members say of the same comparisons: each alone, together, and what they err on in common."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy

from rlhf.data.tokenised import Group
from rlhf.evaluation import reward as examine
from rlhf.evaluation.reward import Pairs
from rlhf.metrics import member_errors as shared
from rlhf.metrics import pairs
from rlhf.scoring.scorer import Sample, Scorer, Scores


class RecordingScorer:
    """Keeps what ``inner`` gave, so that every response is scored once."""

    def __init__(self, inner: Scorer) -> None:
        self.inner = inner
        self.found: Scores | None = None

    def score(self, samples: Sequence[Sample]) -> Scores:
        self.found = self.inner.score(samples)
        return self.found


class FixedScorer:
    """Gives scores that are known already."""

    def __init__(self, scores: Scores) -> None:
        self.scores = scores

    def score(self, samples: Sequence[Sample]) -> Scores:
        return self.scores


def compare(scorer: Scorer, groups: Sequence[Group]) -> tuple[Pairs, list[Pairs]]:
    """The comparisons as the scorer sees them, and as each of its members does; none where it has no members."""
    recorded = scorer if isinstance(scorer, RecordingScorer) else RecordingScorer(scorer)
    whole = examine.compare(recorded, groups)
    assert recorded.found is not None
    columns = () if recorded.found.members is None else recorded.found.members.unbind(1)
    return whole, [examine.compare(FixedScorer(Scores(column)), groups) for column in columns]


def report(whole: Pairs, members: Sequence[Pairs]) -> dict[str, Any]:
    """Figures of the members, as JSON values.

    Disagreement is of a comparison's difference, in log-odds where scores are raw. ``disagreement_finds_errors`` is the
    chance that of a comparison that the ensemble orders wrongly and one that it orders rightly the first has the larger
    disagreement; None where all are right, or all wrong.
    """
    differences = numpy.stack([member.differences for member in members])
    apart = shared.disagreement(differences)
    wrong = whole.differences <= 0
    return {
        "members": len(members),
        "accuracy": [pairs.pair_accuracy(member.differences) for member in members],
        "ece": [examine.calibration_error(member) for member in members],
        "error_correlation": shared.mean_error_correlation(differences),
        "error_correlations": shared.error_correlations(differences),
        "disagreement_where_right": float(apart[~wrong].mean()) if (~wrong).any() else None,
        "disagreement_where_wrong": float(apart[wrong].mean()) if wrong.any() else None,
        "disagreement_finds_errors": shared.chance_above(apart[wrong], apart[~wrong]),
    }
