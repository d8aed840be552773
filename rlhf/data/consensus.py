"""Rows of several annotators on the same responses as one comparison each."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from rlhf.data import agreement
from rlhf.errors import Problem, RlhfError
from rlhf.records import Comparison, Judgement, prompt_key

Pair = tuple[int, int, int, str | None]  # number of the merged comparison, two of its responses, attribute


@dataclass(frozen=True)
class Annotated:
    """What annotators said, put together.

    Args:
        records: what is trained on: without the annotators held out, and one comparison for all rows on the same
            responses where a consensus is asked for.
        everyone: one comparison for all rows on the same responses, with every annotator's judgements.
        report: figures as JSON values; ``held_out`` names the annotators kept out.
    """

    records: tuple[Comparison, ...]
    everyone: tuple[Comparison, ...]
    report: dict[str, Any]

    def notes(self) -> list[str]:
        """Sentences for a person, before anything is trained."""
        found, names = self.report, self.report["annotators"]
        how = "undefined, no pair has two votes" if found["alpha"] is None else f"{found['alpha']:.2f}"
        said = [
            f"{len(names)} annotators voted {found['votes']} times on {found['pairs']} pairs of responses "
            f"(Krippendorff's alpha {how})"
        ]
        if found["consensus"]:
            said.append(f"consensus {found['consensus']}: {found['rows']} rows became {len(self.records)}")
        if held := [name for name, row in names.items() if row["held_out"]]:
            said.append(f"held out, and not trained on: annotators {', '.join(held)}")
        return said


@dataclass
class _Ballot:
    """Votes on pairs of responses: a pair has a number, its first response is that whose text sorts first."""

    pairs: dict[Pair, int] = field(default_factory=dict)
    votes: dict[tuple[int, str], float] = field(default_factory=dict)
    margins: dict[int, list[float]] = field(default_factory=lambda: defaultdict(list))
    num_repeated: int = 0


def put_together(
    records: Sequence[Comparison], consensus: str | None, held_out: Sequence[str], source: str
) -> Annotated:
    """What is trained on, and what annotators' agreement is.

    Rows are on the same responses where prompt and responses are equal texts, in whatever order. A row's share of votes
    counts as the side that it prefers; an annotator who judged a pair more than once counts once, with the side that he
    took more often. Rows that name no annotator stay as they are.

    Args:
        consensus: "majority", "dawid_skene", or None to leave the rows as they are.
        held_out: annotators who are kept out.

    Raises:
        RlhfError: DAT059 where no row names an annotator, DAT062 for one to hold out who is not there, or where nobody
            is left.
    """
    names = sorted({name for record in records if (name := _annotator(record)) is not None})
    _refuse(names, consensus, held_out, source)
    everyone = _merged(records)
    ballot = _ballot(everyone)
    kept = {key: value for key, value in ballot.votes.items() if key[1] not in held_out}
    chances, reliable = _chances(kept, consensus)
    trained: list[Comparison] = [record for record in records if _annotator(record) not in held_out]
    if consensus:
        agreed = {
            _key(record): new
            for number, record in enumerate(everyone)
            if (new := _agreed(number, record, ballot, chances)).judgements
        }
        trained = list(_in_order(trained, agreed))
    sides = {item: agreement.side(chance) for item, chance in chances.items()}
    with_all, with_others = agreement.agreement(ballot.votes, sides), agreement.agreement_with_others(ballot.votes)
    counts = Counter(annotator for _, annotator in ballot.votes)
    voters = Counter(item for item, _ in ballot.votes)
    report = {
        "consensus": consensus,
        "rows": len(records),
        "rows_without_annotator": sum(map(_is_unnamed, records)),
        "pairs": len(ballot.pairs),
        "pairs_with_several_votes": sum(count > 1 for count in voters.values()),
        "votes": len(ballot.votes),
        "ties": sum(value == 0.5 for value in ballot.votes.values()),
        "repeated": ballot.num_repeated,
        "consensus_ties": sum(value == 0.5 for value in sides.values()),
        "pairs_of_held_out_alone": len(ballot.pairs) - len(chances),
        "alpha": agreement.alpha(ballot.votes),
        "annotators": {
            name: {
                "votes": counts[name],
                "held_out": name in held_out,
                "agreement": with_all.get(name),
                "agreement_with_others": with_others.get(name),
                "reliability": asdict(reliable[name]) if name in reliable else None,
            }
            for name in names
        },
    }
    return Annotated(tuple(trained), tuple(everyone), report)


def votes_of(records: Sequence[Comparison]) -> dict[tuple[int, str], float]:
    """(pair, annotator) -> 1, 1/2 or 0, of all rows that name an annotator."""
    return _ballot(_merged(records)).votes


def _refuse(names: Sequence[str], consensus: str | None, held_out: Sequence[str], source: str) -> None:
    key = f"consensus: {consensus}" if consensus else "hold_out_annotators"
    if not names:
        fix = "rows with the field annotator, one row an annotator"
        raise RlhfError(Problem("DAT059", source, f"no row names an annotator, which {key} asks for.", fix))
    known = f"one of {', '.join(names)}"
    if unknown := [name for name in held_out if name not in names]:
        raise RlhfError(*(Problem("DAT062", "hold_out_annotators", f"no annotator {name}.", known) for name in unknown))
    if set(names) <= set(held_out):
        raise RlhfError(Problem("DAT062", "hold_out_annotators", "nobody is left to train on.", "hold out fewer"))


def _chances(
    votes: dict[tuple[int, str], float], consensus: str | None
) -> tuple[dict[int, float], dict[str, agreement.Reliability]]:
    """The majority is also what agreement is with where rows stay as they are."""
    return agreement.dawid_skene(votes) if consensus == "dawid_skene" else (agreement.majority(votes), {})


def _annotator(record: Comparison) -> str | None:
    return record.judgements[0].annotator if record.judgements else None


def _is_unnamed(record: Comparison) -> bool:
    return _annotator(record) is None


def _key(record: Comparison) -> tuple[str, tuple[str, ...]]:
    return prompt_key(record.prompt), tuple(sorted(record.responses))


def _merged(records: Sequence[Comparison]) -> list[Comparison]:
    """One comparison, in the words and the order of its first row, for all rows on the same responses."""
    firsts: dict[tuple[str, tuple[str, ...]], Comparison] = {}
    judged: dict[tuple[str, tuple[str, ...]], list[Judgement]] = defaultdict(list)
    counts: Counter[tuple[str, tuple[str, ...]]] = Counter()
    for record in records:
        if _is_unnamed(record):
            continue
        counts[_key(record)] += record.num_rows
        first = firsts.setdefault(_key(record), record)
        places = dict(zip(_sorted(record), _sorted(first), strict=True))
        judged[_key(record)] += [
            replace(one, first=places[one.first], second=places[one.second]) for one in record.judgements
        ]
    return [replace(record, judgements=tuple(judged[key]), num_rows=counts[key]) for key, record in firsts.items()]


def _sorted(record: Comparison) -> list[int]:
    """The responses' places in the order of their texts."""
    return sorted(range(len(record.responses)), key=record.responses.__getitem__)


def _ballot(everyone: Sequence[Comparison]) -> _Ballot:
    """Pairs of equal texts are no question, and left out."""
    found, said = _Ballot(), defaultdict[tuple[int, str], list[float]](list)
    for number, record in enumerate(everyone):
        for one in record.judgements:
            first, second = one.first, one.second
            if record.responses[first] == record.responses[second]:
                continue
            turned = record.responses[first] > record.responses[second]
            pair = (number, second, first, one.attribute) if turned else (number, first, second, one.attribute)
            item = found.pairs.setdefault(pair, len(found.pairs))
            value = agreement.side(one.probability)
            assert one.annotator is not None
            said[item, one.annotator].append(1 - value if turned else value)
            if one.margin is not None:
                found.margins[item].append(-one.margin if turned else one.margin)
    found.votes = {key: agreement.side(sum(values) / len(values)) for key, values in said.items()}
    found.num_repeated = sum(len(values) - 1 for values in said.values())
    return found


def _agreed(number: int, record: Comparison, ballot: _Ballot, chances: dict[int, float]) -> Comparison:
    """A comparison with one judgement a pair, the preferred response first; margins are means of the annotators'."""
    found: dict[Pair, Judgement] = {}
    for one in record.judgements:
        if record.responses[one.first] == record.responses[one.second]:
            low, high = sorted((one.first, one.second))
            found[number, low, high, one.attribute] = Judgement(low, high, 0.5, attribute=one.attribute)
        for pair in ((number, one.first, one.second, one.attribute), (number, one.second, one.first, one.attribute)):
            item = ballot.pairs.get(pair)
            if item is None or item not in chances or pair in found:
                continue
            chance, margins = chances[item], ballot.margins.get(item)
            margin = sum(margins) / len(margins) if margins else None
            _, first, second, attribute = pair
            if chance < 0.5:
                first, second, chance, margin = second, first, 1 - chance, None if margin is None else -margin
            found[pair] = Judgement(first, second, chance, margin, attribute=attribute)
    return replace(record, judgements=tuple(found.values()))


def _in_order(
    records: Sequence[Comparison], agreed: dict[tuple[str, tuple[str, ...]], Comparison]
) -> Iterator[Comparison]:
    """Each agreed comparison where its first row stood; rows without annotator where they stand."""
    done: set[tuple[str, tuple[str, ...]]] = set()
    for record in records:
        if _is_unnamed(record):
            yield record
        elif (key := _key(record)) in agreed and key not in done:
            done.add(key)
            yield agreed[key]
