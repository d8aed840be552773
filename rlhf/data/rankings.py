"""Rows of several responses to one prompt: ranked, or rated in attributes, or both."""

from __future__ import annotations

import reprlib
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from rlhf.data import trl
from rlhf.data.rows import EMPTY_ANSWER, NO_PREFERENCE, EqualResponses, Row, RowError, need, text_of
from rlhf.data.turns import Answered, answered, prompt_of, transcript
from rlhf.records import Comparison, Judgement, Message, Messages

OF_A_PAIR = ("chosen", "rejected", "margin", "probability", "votes")
NOT_A_TRANSCRIPT = "'{}': need a conversation that begins with '\\n\\nHuman:'."


def ranking(row: Row, where: str) -> Comparison:
    """From ``prompt``, ``responses`` and ``ranks`` (overall, or in the row's ``attribute``), ``ratings`` or both.

    ``ratings`` are an object, attribute -> a number or null for each response. A list of numbers is overall: it ranks
    the responses, the highest as the best.
    """
    head = prompt_of(need(row, "prompt"))
    texts, ratings = need(row, "responses"), row.get("ratings")
    for name in OF_A_PAIR:
        if name in row:
            raise RowError(f"'{name}': belongs to a pair, this row is a ranking ('responses' and 'ranks').")
    if not isinstance(texts, list) or len(texts) < 2:
        raise RowError("'responses': need a list of at least two texts.")
    found = answered_by({f"responses[{index}]": text for index, text in enumerate(texts)}, head)
    responses = found.answers
    if ratings is not None and not isinstance(ratings, list | Mapping):
        raise RowError(f"'ratings': need an object of attributes, or a list of numbers, got {reprlib.repr(ratings)}.")
    named = _named(ratings, len(texts)) if isinstance(ratings, Mapping) else {}
    judgements: tuple[Judgement, ...] = ()
    if isinstance(ratings, list) and "ranks" not in row:
        judgements = _judgements(row, responses, _ranks_of(ratings, len(texts)), "ratings")
    elif "ranks" in row or not named:
        ranks = need(row, "ranks")
        if not isinstance(ranks, list) or len(ranks) != len(texts) or not all(type(rank) is int for rank in ranks):
            raise RowError(f"'ranks': need {len(texts)} whole numbers, one a response, 1 for the best.")
        judgements = _judgements(row, responses, ranks, "ranks")
        by_rank = [1 + sum(other < own for other in ranks) for own in ranks]
        if isinstance(ratings, list) and _ranks_of(ratings, len(texts)) != by_rank:
            raise RowError("'ratings': order the responses otherwise than 'ranks' do; leave one of them out.")
    elif trl.attribute_of(row) is not None:
        raise RowError("'attribute': says in what 'ranks' are, and the row has none; ratings name their own.")
    return Comparison(found.prompt, responses, judgements, where, attributes=named, joined=found.joined)


def rated(row: Row, where: str) -> Comparison:
    """From ``prompt``, ``response`` and ``attributes``, an object of attribute -> number or null."""
    head = prompt_of(need(row, "prompt"))
    given = need(row, "attributes")
    if not isinstance(given, Mapping):
        raise RowError(f"'attributes': need an object of attribute and number, got {reprlib.repr(given)}.")
    named = _named({name: [value] for name, value in given.items()}, 1, "attributes")
    found = answered_by({"response": need(row, "response")}, head)
    return Comparison(found.prompt, found.answers, (), where, attributes=named, joined=found.joined)


def transcripts(row: Row, where: str) -> Comparison:
    """From ``text``, a list of whole transcripts that differ in their last answer, and ``score``, a number for each;
    equal scores are ties."""
    texts, scores = need(row, "text"), need(row, "score")
    if not isinstance(scores, list) or not isinstance(texts, list) or len(scores) != len(texts):
        raise RowError("'score': need a list of numbers, one for each transcript in 'text'.")
    found = answered_transcripts(texts)
    judgements = _judgements(row, found.answers, _ranks_of(scores, len(texts), "score"), "score")
    return Comparison(found.prompt, found.answers, judgements, where, joined=found.joined)


def answered_transcripts(texts: Any) -> Answered:
    """The prompt and the answers of a list of transcripts."""
    if not isinstance(texts, list) or len(texts) < 2:
        raise RowError("'text': need a list of at least two transcripts.")
    places = [f"text[{index}]" for index in range(len(texts))]
    return answered(
        {
            place: transcript(text_of(text, place), place, NOT_A_TRANSCRIPT.format(place))
            for place, text in zip(places, texts, strict=True)
        }
    )


def answered_by(texts: Mapping[str, Any], head: Messages) -> Answered:
    """The prompt and the answers, each a text; ``texts`` by field."""
    return answered(
        {field: (*head, Message("assistant", text_of(text, field, EMPTY_ANSWER))) for field, text in texts.items()},
        head,
    )


def _judgements(row: Row, responses: Sequence[str], ranks: Sequence[int], field: str) -> tuple[Judgement, ...]:
    """Every pair of the ranking; equal ranks are ties."""
    if len(set(ranks)) == 1:
        raise RowError(f"'{field}': all equal, so the row holds no preference.", NO_PREFERENCE)
    judgements = []
    for first in range(len(ranks)):
        for second in range(first + 1, len(ranks)):
            better, worse = (first, second) if ranks[first] <= ranks[second] else (second, first)
            tie = ranks[first] == ranks[second]
            if not tie and responses[first] == responses[second]:
                raise EqualResponses(f"'responses': {first} and {second} are equal but ranked differently.")
            probability, annotator = 0.5 if tie else 1.0, trl.annotator_of(row)
            judgements.append(
                Judgement(better, worse, probability, annotator=annotator, attribute=trl.attribute_of(row))
            )
    return tuple(judgements)


def _ranks_of(ratings: Sequence[Any], count: int, field: str = "ratings") -> list[int]:
    if len(ratings) != count or not all(map(_is_number, ratings)):
        more = ", or an object of attributes" if field == "ratings" else ""
        raise RowError(f"'{field}': need {count} finite numbers, one a response{more}.")
    return [1 + sum(other > own for other in ratings) for own in ratings]


def _named(ratings: Mapping[str, Any], count: int, field: str = "ratings") -> dict[str, tuple[float | None, ...]]:
    found: dict[str, tuple[float | None, ...]] = {}
    for name, values in ratings.items():
        if values is None:  # tables fill what a row has not
            continue
        place = f"{field}.{text_of(name, field)}"
        if not isinstance(values, list) or len(values) != count:
            raise RowError(f"'{place}': need {count} numbers or nulls, one a response, got {reprlib.repr(values)}.")
        for value in values:
            if value is not None and not _is_number(value):
                raise RowError(f"'{place}': need finite numbers or null, got {reprlib.repr(value)}.")
        if any(value is not None for value in values):
            found[name] = tuple(None if value is None else float(value) for value in values)
    if not found:
        raise RowError(f"'{field}': no response has a rating.")
    return found


def _is_number(value: Any) -> bool:
    return not isinstance(value, bool) and isinstance(value, int | float) and abs(value) <= sys.float_info.max
