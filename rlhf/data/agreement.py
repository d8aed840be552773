"""What several annotators' votes add up to: agreement, majority, Dawid and Skene's posterior. Pure, on votes.

A vote is (item, annotator) -> 1 where the annotator prefers the item's first response, 0 for the second, 1/2 for a tie.
Which response stands first means nothing, so every item is counted in both orders with the votes turned round: no
figure depends on the order, the prior of either response is 1/2, and an annotator's error is the same for both.
"""

from __future__ import annotations

import importlib
from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

Votes = Mapping[tuple[int, str], float]
NAMES = {1.0: "first", 0.0: "second", 0.5: "tie"}
VALUES = (0.0, 0.5, 1.0)


@dataclass(frozen=True)
class Reliability:
    """How an annotator answers, as Dawid and Skene's model has it: shares of his votes.

    Args:
        right, tied, wrong: where one response is truly preferred; they add up to 1.
        tied_at_ties: where none is; None where no vote is a tie, so that the model has no such items.
    """

    right: float
    tied: float
    wrong: float
    tied_at_ties: float | None


def alpha(votes: Votes) -> float | None:
    """Krippendorff's alpha on the interval scale 0, 1/2, 1: a tie is half as far from a preference as the opposite one,
    so a quarter of its squared disagreement. Without ties it is the nominal alpha.

    None where no item has two votes, or all votes are ties: no disagreement could have been seen.

    Reference: Krippendorff 2011, Computing Krippendorff's alpha-reliability; computed by the package krippendorff.
    """
    counts: dict[int, Counter[float]] = defaultdict(Counter)
    for (item, _), value in votes.items():
        counts[item][value] += 1
    rows = [[own[value] for value in VALUES] for own in counts.values() if own.total() > 1]
    if not any(lost or won for lost, _, won in rows):
        return None
    both = [*rows, *(row[::-1] for row in rows)]
    library: Any = importlib.import_module("krippendorff")
    return float(library.alpha(value_counts=both, value_domain=VALUES, level_of_measurement="interval"))


def majority(votes: Votes) -> dict[int, float]:
    """1, 0, or 1/2 for each item: the side of most votes, a tie counting half for each; 1/2 where they are equal."""
    sums: dict[int, float] = defaultdict(float)
    for (item, _), value in votes.items():
        sums[item] += value - 0.5
    return {item: side(0.5 + total) for item, total in sums.items()}


def dawid_skene(votes: Votes) -> tuple[dict[int, float], dict[str, Reliability]]:
    """P(the first response is better), a true tie counting half, of each item; and every annotator's reliability.

    The classes are "first" and "second", and "tie" where there is such a vote; each annotator has a matrix of errors;
    both by expectation-maximisation from the majority. Items are taken to be independent, also those of one ranking.

    Reference: Dawid and Skene 1979, Maximum likelihood estimation of observer error-rates using the EM algorithm;
    computed by crowd-kit (Ustalov et al. 2024, https://arxiv.org/abs/2109.08584).
    """
    pandas, crowd = (importlib.import_module(name) for name in ("pandas", "crowdkit.aggregation"))
    rows = [
        (2 * item + turned, annotator, NAMES[1 - value if turned else value])
        for (item, annotator), value in votes.items()
        for turned in (0, 1)
    ]
    model = crowd.DawidSkene().fit(pandas.DataFrame(rows, columns=["task", "worker", "label"]))
    classes = list(model.probas_.columns)
    found = model.probas_["first"] + (0.5 * model.probas_["tie"] if "tie" in classes else 0.0)
    chances = {item: min(1.0, max(0.0, float(found[2 * item]))) for item in dict.fromkeys(item for item, _ in votes)}
    errors = model.errors_.to_dict("index")

    def share(annotator: str, said: str, true: str) -> float:
        return float(errors.get((annotator, said), {}).get(true, 0.0))

    return chances, {
        name: Reliability(
            share(name, "first", "first"),
            share(name, "tie", "first"),
            share(name, "second", "first"),
            share(name, "tie", "tie") if "tie" in classes else None,
        )
        for name in sorted({annotator for _, annotator in votes})
    }


def agreement(votes: Votes, labels: Mapping[int, float]) -> dict[str, float]:
    """Mean of 1 - |vote - label| of each annotator over the items that have a label, which is taken to its side (1, 1/2
    or 0): a tie and a preference agree by half."""
    found: dict[str, list[float]] = defaultdict(list)
    for (item, annotator), value in votes.items():
        if item in labels:
            found[annotator].append(1 - abs(value - side(labels[item])))
    return {name: sum(values) / len(values) for name, values in found.items()}


def agreement_with_others(votes: Votes) -> dict[str, float]:
    """As ``agreement``, with the majority of the others' votes on the same item; only of who shares an item."""
    sums: dict[int, float] = defaultdict(float)
    counts: Counter[int] = Counter()
    for (item, _), value in votes.items():
        sums[item] += value - 0.5
        counts[item] += 1
    found: dict[str, list[float]] = defaultdict(list)
    for (item, annotator), value in votes.items():
        if counts[item] > 1:
            others = side(0.5 + sums[item] - (value - 0.5))
            found[annotator].append(1 - abs(value - others))
    return {name: sum(values) / len(values) for name, values in found.items()}


def side(chance: float) -> float:
    """1, 1/2 or 0: which response a probability prefers."""
    return 0.5 if chance == 0.5 else float(chance > 0.5)
