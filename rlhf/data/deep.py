"""What is wrong with a data set although every row of it is sound: findings with the file and line of each."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

from rlhf.data import agreement, consensus
from rlhf.hub import installed
from rlhf.records import Comparison, Message, prompt_key

MUCH_BY_LENGTH = 0.6
FEWEST_LETTERS = 10
TURN = re.compile(r"^[ \t]*(?:###[ \t]*)?(human|user|assistant|system|instruction|response)[ \t]*:", re.I | re.M)
MARK = re.compile(r"<\|\w[\w ]*\|>|</?s>|\[/?INST\]|<</?SYS>>|<(?:start|end)_of_turn>|<(?:bos|eos|pad|unk)>")
Code = Literal["", "DAT020", "DAT060", "DAT070", "DAT071", "DAT072"]
FIXES = {
    "DAT020": "fix the rows, a larger limit, or a larger max_dropped_fraction",
    "DAT060": "remove the token from the text; on_bad_row: drop leaves the row out",
    "DAT070": "leave one of the two rows out, or name their annotators",
    "DAT071": "a larger max_length, or remove the row; on_bad_row: drop leaves it out",
    "DAT072": "other prompts to measure on",
}


@dataclass(frozen=True)
class Finding:
    """One thing found. With a ``code`` it is an error, without one a warning, or a mere ``note``."""

    kind: str
    where: str
    what: str
    code: Code = ""
    note: bool = False

    @property
    def level(self) -> str:
        return "error" if self.code else "note" if self.note else "warning"


def look(records: Sequence[Any], source: str) -> list[Finding]:
    """Everything that can be seen without a tokenizer, kind after kind."""
    comparisons = [record for record in records if isinstance(record, Comparison)]
    return [
        *duplicates(records),
        *contradictions(comparisons),
        *ties(comparisons),
        *annotators(comparisons, source),
        *length_wins(comparisons, source),
        *scripts(records),
        *turn_marks(records),
        *control_marks(records),
    ]


def texts_of(record: Any) -> list[Message]:
    """Every turn of a record, responses last."""
    if isinstance(record, Comparison):
        return [*record.prompt, *(Message("assistant", response) for response in record.responses)]
    return list(record.messages)


def duplicates(records: Sequence[Any]) -> Iterator[Finding]:
    """Rows that say the same as an earlier one, but for case and white space."""
    first: dict[Any, str] = {}
    for record in records:
        turns = tuple((message.role, _plain(message.content)) for message in texts_of(record))
        key = (turns, _order(record) if isinstance(record, Comparison) else ())
        if first.setdefault(key, record.where) != record.where:
            yield Finding("duplicate", record.where, f"the same as {first[key]}.")


def contradictions(records: Sequence[Comparison]) -> Iterator[Finding]:
    """Pairs of responses to one prompt that are ordered in one way here and in the other there, in the same
    attribute; a mere warning where different annotators do so."""
    ahead: dict[tuple[str, str, str, str | None], tuple[str, str | None]] = {}
    for record in records:
        prompt, annotator = prompt_key(record.prompt), _annotator(record)
        for better, worse, what_in in _decided(record):
            first, second = record.responses[better], record.responses[worse]
            if other := ahead.get((prompt, second, first, what_in)):
                what = f"prefers the response that {other[0]} rejects: {_shown(first)} over {_shown(second)}."
                if None not in (annotator, other[1]) and annotator != other[1]:
                    yield Finding("annotators disagree", record.where, what)
                else:
                    yield Finding("contradiction", record.where, what, "DAT070")
            ahead.setdefault((prompt, first, second, what_in), (record.where, annotator))


def annotators(records: Sequence[Comparison], source: str) -> Iterator[Finding]:
    """How far several annotators agree, where rows name them."""
    votes = consensus.votes_of(records)
    names = {annotator for _, annotator in votes}
    if len(names) < 2:
        return
    said = f"{len(names)} annotators, {len(votes)} votes on {len({item for item, _ in votes})} pairs"
    if installed.missing_for_annotators():
        yield Finding("annotators", source, f"{said}; pip install 'rlhf-pipeline[annotators]' for alpha.", note=True)
        return
    alpha = agreement.alpha(votes)
    how = "undefined, no pair has two votes" if alpha is None else f"{alpha:.2f}"
    yield Finding("annotators", source, f"{said}, Krippendorff's alpha {how}.", note=True)


def ties(records: Sequence[Comparison]) -> Iterator[Finding]:
    """Judgements without a preference, one finding a row."""
    for record in records:
        count = sum(judgement.probability == 0.5 for judgement in record.judgements)
        if count:
            yield Finding("tie", record.where, f"{count} of {len(record.judgements)} pairs are ties.", note=True)


def length_wins(records: Sequence[Comparison], source: str) -> Iterator[Finding]:
    """Share of the decided pairs in which the longer response is preferred, equal lengths (in characters) as halves."""
    wins = total = 0.0
    for record in records:
        for better, worse, _ in _decided(record):
            gap = len(record.responses[better]) - len(record.responses[worse])
            wins, total = wins + 0.5 + 0.5 * ((gap > 0) - (gap < 0)), total + 1
    if total:
        what = f"the longer response is preferred in {wins / total:.1%} of {total:.0f} pairs"
        if wins / total > MUCH_BY_LENGTH:
            yield Finding("length wins", source, f"{what}: length alone may win a reward model's score.")
        else:
            yield Finding("length wins", source, f"{what}.", note=True)


def scripts(records: Sequence[Any]) -> Iterator[Finding]:
    """Responses and prompts in another script than most of the data; the language itself is not told."""
    own = [[(message.role, script_of(message.content)) for message in texts_of(record)] for record in records]
    common = Counter(script for turns in own for _, script in turns if script).most_common(1)
    for record, turns in zip(records, own, strict=True):
        odd = {f"{script} ({role})": None for role, script in turns if script and script != common[0][0]}
        if odd:
            yield Finding("script", record.where, f"{', '.join(odd)}; most of the data is {common[0][0]}.")


def script_of(text: str) -> str | None:
    """The script of most letters (LATIN, CYRILLIC, CJK ...); None for a text of few letters."""
    counts = Counter(filter(None, map(_script, text)))
    return counts.most_common(1)[0][0] if counts.total() >= FEWEST_LETTERS else None


def turn_marks(records: Sequence[Any]) -> Iterator[Finding]:
    """Turns in which a line begins like a turn of its own: a conversation that was not taken apart."""
    for record in records:
        for message in texts_of(record):
            if found := TURN.search(message.content):
                what = f"a {message.role} turn has a line that begins with {found[0].strip()!r}."
                yield Finding("turn mark", record.where, what)
                break


def control_marks(records: Sequence[Any]) -> Iterator[Finding]:
    """Texts with what looks like a special token of some model."""
    for record in records:
        for message in texts_of(record):
            if found := MARK.search(message.content):
                yield Finding("special token", record.where, f"a {message.role} turn contains {found[0]!r}.")
                break


def leaks(
    trained: Mapping[str, Sequence[Any]], measured: Sequence[Any], what_for: str, code: Code
) -> Iterator[Finding]:
    """Rows that measure, on a prompt that is trained on.

    Args:
        trained: name of a data set -> its records.
    """
    known: dict[str, str] = {}
    for name, records in trained.items():
        for record in records:
            known.setdefault(_prompt(record), f"{record.where} ({name})")
    for record in measured:
        if seen := known.get(_prompt(record)):
            yield Finding("leakage", record.where, f"{what_for} on a prompt that is trained on: {seen}.", code)


def _prompt(record: Any) -> str:
    return _plain(prompt_key(record.prompt))


def _decided(record: Comparison) -> Iterator[tuple[int, int, str | None]]:
    """(better, worse, attribute) of each judgement with a preference."""
    for judgement in record.judgements:
        if judgement.probability != 0.5:
            first, second = judgement.first, judgement.second
            better, worse = (first, second) if judgement.probability > 0.5 else (second, first)
            yield better, worse, judgement.attribute


def _order(record: Comparison) -> tuple[Any, ...]:
    order = ((one.first, one.second, one.probability, one.annotator, one.attribute) for one in record.judgements)
    return (*order, *sorted(record.attributes.items()))


def _annotator(record: Comparison) -> str | None:
    return record.judgements[0].annotator if record.judgements else None


def _plain(text: str) -> str:
    return " ".join(text.casefold().split())


def _shown(text: str) -> str:
    return repr(text if len(text) <= 40 else f"{text[:37]}...")


@lru_cache(maxsize=65536)
def _script(letter: str) -> str | None:
    if not letter.isalpha():
        return None
    name = unicodedata.name(letter, "").split(" ")[0].split("-")[0]
    return {"HIRAGANA": "JAPANESE", "KATAKANA": "JAPANESE"}.get(name, name) or None
