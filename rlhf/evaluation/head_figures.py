"""What each of several heads says of the labels of its attribute, and what the other heads say of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy

from rlhf.data.tokenised import Group
from rlhf.evaluation import reward as examine
from rlhf.evaluation.figures import FigureSettings, interval
from rlhf.metrics import pairs as measure
from rlhf.scoring.scorer import Scores


def report(groups: Sequence[Group], scores: Scores, settings: FigureSettings) -> dict[str, Any]:
    """For each head whose attribute is labelled, as JSON values: accuracy on its comparisons, that of every head on
    the same ones, and the correlation with its ratings; null where there are no such labels."""
    found = {}
    for name in scores.heads:
        judged = {other: examine.pairs_of(groups, Scores(values), name) for other, values in scores.heads.items()}
        own, ratings = judged[name], ratings_of(groups, name)
        rated = ~numpy.isnan(ratings)
        if not len(own.differences) and not rated.any():
            continue
        values = scores.heads[name].double().cpu().numpy()
        has = len(own.differences) > 0
        found[name] = {
            "comparisons": len(own.differences),
            "accuracy": interval(examine.accuracy(own, settings.seed, settings.num_resamples)) if has else None,
            "accuracy_of": {other: measure.pair_accuracy(pairs.differences) for other, pairs in judged.items()}
            if has
            else None,
            "ratings": int(rated.sum()),
            "rating_correlation": _correlation(values[rated], ratings[rated]),
        }
    return found


def ratings_of(groups: Sequence[Group], name: str) -> numpy.ndarray:
    """[R] ratings of all responses in one attribute, nan where there is none."""
    return numpy.array(
        [
            numpy.nan if rating is None else rating
            for group in groups
            for rating in group.record.attributes.get(name, (None,) * len(group.responses))
        ]
    )


def without_a_head(groups: Sequence[Group], scores: Scores) -> dict[str, int]:
    """Attribute -> rows that have labels of it, of those that no head is of."""
    return dict(sorted(Counter(name for group in groups for name in group.record.names - scores.heads.keys()).items()))


def _correlation(values: numpy.ndarray, ratings: numpy.ndarray) -> float | None:
    """Pearson's; None where either does not differ."""
    if len(values) < 2 or not values.std() or not ratings.std():
        return None
    return float(numpy.corrcoef(values, ratings)[0, 1])
