"""Whether the labels of attributes and the heads of a reward model belong together, before anything is loaded."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from rlhf.errors import Problem
from rlhf.records import Comparison

MAX_NAMED = 5


def notes(records: Sequence[Comparison]) -> list[str]:
    """How many labels each attribute has, where there are any."""
    judged, rated = counts(records)
    names = sorted({*judged, *rated} - {None}, key=str)
    if not names:
        return []
    said = [f"{name} {judged[name]} comparisons and {rated[name]} ratings" for name in names]
    return [f"labels: {', '.join(said)}; overall {judged[None]} comparisons"]


def counts(records: Sequence[Comparison]) -> tuple[Counter[str | None], Counter[str | None]]:
    """Judgements and ratings by attribute; overall ones under None."""
    judged = Counter(judgement.attribute for record in records for judgement in record.judgements)
    rated: Counter[str | None] = Counter()
    for record in records:
        for name, ratings in record.attributes.items():
            rated[name] += sum(rating is not None for rating in ratings)
    return judged, rated


def problems(heads: Mapping[str, float], combine: str, records: Sequence[Comparison], source: str) -> list[Problem]:
    """Attributes without a head, heads without labels, ratings that are all equal, and no overall comparison where the
    combination is fitted to them."""
    found = strangers(heads, records, source)
    if not heads or found:
        return found
    judged, rated = counts(records)
    for name in heads:
        alone = len(heads) == 1 and combine == "weights" and judged[None]
        values = {rating for record in records for rating in record.attributes.get(name, ()) if rating is not None}
        if not (judged[name] or rated[name] or alone):
            what = f"no row has a label of {name!r}, which is a head."
            found.append(Problem("DAT057", source, what, "label it, or leave the head out"))
        elif len(values) == 1:
            what = f"all {rated[name]} ratings of {name!r} are {values.pop():g}, which says nothing."
            found.append(Problem("DAT057", source, what, "ratings that differ, or none"))
    if combine != "weights" and not judged[None]:
        what = f"no row has an overall comparison, which combine: {combine} is fitted to."
        found.append(Problem("DAT058", source, what, "pairs or rankings without an attribute, or combine: weights"))
    return found


def strangers(heads: Mapping[str, float], records: Sequence[Comparison], source: str) -> list[Problem]:
    """DAT061 for each attribute that no head has."""
    where: dict[str, list[str]] = {}
    for record in records:
        for name in sorted(record.names - heads.keys()):
            where.setdefault(name, []).append(record.where)
    fix = f"heads that have it (now: {', '.join(heads)})" if heads else f"heads: [{', '.join(sorted(where))}]"
    said = "{} rows, the first {}, have labels of {!r}, and there is no such head."
    return [
        Problem("DAT061", source, said.format(len(rows), ", ".join(rows[:MAX_NAMED]), name), fix)
        for name, rows in sorted(where.items())
    ]
