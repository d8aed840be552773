"""The forms that a row may have, told apart by its fields: TRL's, ShareGPT's and Alpaca's, without renaming."""

from __future__ import annotations

import reprlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

from rlhf.data import benchmarks, conversations, rankings, trl, turns
from rlhf.data.labelled import Labelled
from rlhf.data.rows import (
    EMPTY_ANSWER,
    NO_PREFERENCE,
    SPEAKER,
    TWO_FORMS,
    UNUSABLE,
    CutOff,
    Row,
    RowError,
    need,
    text_of,
)
from rlhf.records import Comparison, Demonstration, Message, Messages, Prompt

UNTURNED = (
    "'text': one text without turns (language modelling): training is on responses, so a row needs prompt and "
    "completion, or messages."
)
UNJUDGED = "'response': a response that nobody has compared with another: rlhf collect ranks samples of a policy."
RANKED = "'responses': a ranking, which rlhf train-rm reads: a demonstration has one response."
STEPS = "'completions': steps with a label each (process rewards), which no stage trains on."


@dataclass(frozen=True)
class Form:
    """One form of a row.

    Args:
        needs: fields that a row of this form has; ``shown_by`` tells an incomplete one from rows of other forms.
        takes: fields that it may have beside them.
        alone: only where the row has no other form; ``told``: only where the config names it; ``sole``: whatever other
            form the row has, where it is shown.
    """

    name: str
    needs: tuple[str, ...]
    read: Callable[[Row, str], Any]
    takes: tuple[str, ...] = ()
    shown_by: tuple[str, ...] = ()
    alone: bool = False
    told: bool = False
    sole: bool = False

    @property
    def fields(self) -> tuple[str, ...]:
        return (*self.needs, *self.takes)


def read(row: Row, where: str, kind: str, told: str | None = None) -> tuple[Any, Form]:
    """The record of a row and the form that it was read as.

    A row that is complete in several forms is read as each of them; they must be the same record.

    Raises:
        RowError: what is wrong with the row, also where its forms disagree.
    """
    fit = _fitting(kind, frozenset(row)) if told is None else _told(kind, told)
    record = fit[0].read(row, where)
    for other in fit[1:]:
        if other.read(row, where) != record:
            what = f"has the fields of two forms, {fit[0].name} and {other.name}, which say different things"
            raise RowError(f"{what}: set form to one of them.", TWO_FORMS)
    return record, fit[0]


def _told(kind: str, name: str) -> tuple[Form, ...]:
    return tuple(form for form in FORMS[kind] if form.name == name)


@lru_cache(maxsize=256)
def _fitting(kind: str, fields: frozenset[str]) -> tuple[Form, ...]:
    """The forms that a row with these fields has; where it has none, the one that it is likely meant to have."""
    known = FORMS[kind]
    whole = [form for form in known if not form.told and fields.issuperset(form.needs)]
    shown = [form for form in known if fields.intersection(form.shown_by)]
    sole = [form for form in shown if form.sole]
    return tuple(sole or [form for form in whole if not form.alone] or whole or [*shown, known[0]][:1])


def _sharegpt_demonstration(row: Row, where: str) -> Demonstration:
    return trl.demonstration(conversations.sharegpt(row), "conversations", where)


def _alpaca_demonstration(row: Row, where: str) -> Demonstration:
    answer = Message("assistant", text_of(need(row, "output"), "output", EMPTY_ANSWER))
    return trl.demonstration((*conversations.alpaca(row), answer), "output", where)


def _text_demonstration(row: Row, where: str) -> Demonstration:
    return trl.demonstration(_transcript(row), "text", where)


def _chosen_demonstration(row: Row, where: str) -> Demonstration:
    found = trl.parts_of_pair(row)
    return Demonstration((*found.prompt, Message("assistant", found.answers[0])), where, joined=found.joined)


def _messages_prompt(row: Row, where: str) -> Prompt:
    return _unanswered(turns.messages(need(row, "messages"), "messages"), where)


def _sharegpt_prompt(row: Row, where: str) -> Prompt:
    return _unanswered(conversations.sharegpt(row), where)


def _alpaca_prompt(row: Row, where: str) -> Prompt:
    return trl.prompt(conversations.alpaca(row), where)


def _pair_prompt(row: Row, where: str) -> Prompt:
    found = trl.parts_of_pair(row)
    return Prompt(found.prompt, where, joined=found.joined)


def _text_prompt(row: Row, where: str) -> Prompt:
    return _unanswered(_transcript(row), where)


def _transcripts_prompt(row: Row, where: str) -> Prompt:
    found = rankings.answered_transcripts(need(row, "text"))
    return Prompt(found.prompt, where, joined=found.joined)


def _unanswered(found: Messages, where: str) -> Prompt:
    """The conversation without its final answer, which is to be given anew."""
    kept = turns.without_answer(found)
    return replace(trl.prompt(kept, where), joined=len(turns.joined(found)) < len(found))


def _transcript(row: Row) -> Messages:
    return turns.transcript(text_of(need(row, "text"), "text"), "text", UNTURNED)


def _sharegpt_pair(row: Row, where: str) -> Comparison:
    texts = {name: _answer(need(row, name), name) for name in ("chosen", "rejected")}
    return trl.preferred(row, rankings.answered_by(texts, conversations.sharegpt(row)), where)


def _answer(value: Any, field: str) -> str:
    """A text, or one turn of the assistant."""
    if not isinstance(value, Mapping):
        return text_of(value, field, EMPTY_ANSWER)
    is_sharegpt = "from" in value
    turn = conversations.turn_of(value, field, True) if is_sharegpt else turns.messages([value], field)[0]
    if turn.role != "assistant":
        raise RowError(f"'{field}': need a turn of the assistant, got one of the {turn.role}.", SPEAKER)
    return turn.content


def _alpaca_pair(row: Row, where: str) -> Comparison:
    texts = {name: need(row, name) for name in ("chosen", "rejected")}
    return trl.preferred(row, rankings.answered_by(texts, conversations.alpaca(row)), where)


def _unpaired(row: Row, where: str) -> Labelled:
    label = need(row, "label")
    if not isinstance(label, bool):
        raise RowError(f"'label': need true or false, got {reprlib.repr(label)}.")
    found = trl.from_completion(row, where)
    if found.prompt != turns.without_answer(turns.prompt_of(row["prompt"])):
        raise RowError("'completion': need one turn of the assistant.")
    return Labelled(found.prompt, found.messages[-1].content, label, where, found.joined)


def _steps(row: Row, where: str) -> Any:
    raise RowError(STEPS, UNUSABLE)


def _ranked(row: Row, where: str) -> Any:
    raise RowError(RANKED)


def _unjudged(row: Row, where: str) -> Any:
    raise RowError(UNJUDGED, NO_PREFERENCE)


def _response_demonstration(row: Row, where: str) -> Demonstration:
    return trl.from_completion(row, where, "response")


def _ended_response(row: Row, where: str) -> Demonstration:
    """A response to learn from: one that was cut off would teach to end where it was cut."""
    _refuse_cut_off(row)
    return _response_demonstration(row, where)


def _sampled_response(row: Row, where: str) -> Demonstration:
    """A response to judge; a policy's sample, which says whether it ``finished``, may be blank or hold a NUL."""
    response = row.get("response")
    if "finished" not in row or not isinstance(response, str) or (response.strip() and "\0" not in response):
        return _response_demonstration(row, where)
    found = _response_demonstration({**row, "response": "-"}, where)
    return replace(found, messages=(*found.prompt, Message("assistant", response)))


def _sample(row: Row, where: str) -> Comparison:
    """A response that nobody has judged, as a record without judgements."""
    _refuse_cut_off(row)
    found = _response_demonstration(row, where)
    return Comparison(found.prompt, (found.messages[-1].content,), (), where, joined=found.joined)


def _refuse_cut_off(row: Row) -> None:
    if row.get("finished") is False:
        raise CutOff("'finished': false.")


_STEPS = Form("stepwise", ("completions", "labels"), _steps, alone=True)
_BESIDE = ("input", "history", "system")
_COLLECTED = ("scores", "provenance")
_LABELS = ("margin", "probability", "votes", "annotator", "attribute")
_OF_ROW = ("annotator", "attribute")
_RANKED = (*_COLLECTED, *_OF_ROW, "ratings")
FORMS: dict[str, tuple[Form, ...]] = {
    "demonstrations": (
        Form("prompt-completion", ("prompt", "completion"), trl.from_completion),
        Form("prompt-response", ("prompt", "response"), _ended_response, ("finished",), ("response",)),
        Form("messages", ("messages",), trl.from_messages),
        Form("sharegpt", ("conversations",), _sharegpt_demonstration, ("system",)),
        Form("alpaca", ("instruction", "output"), _alpaca_demonstration, _BESIDE, ("instruction",)),
        Form("text", ("text",), _text_demonstration, alone=True),
        Form("chosen", ("chosen", "rejected"), _chosen_demonstration, ("prompt",), told=True),
        Form("judged", ("prompt", "responses", "ranks"), _ranked, alone=True),
        _STEPS,
    ),
    "comparisons": (
        Form("pair", ("prompt", "chosen", "rejected"), trl.pair, _LABELS),
        Form("shared-head", ("chosen", "rejected"), trl.pair, _LABELS, ("chosen", "rejected"), alone=True),
        Form("sharegpt", ("conversations", "chosen", "rejected"), _sharegpt_pair, ("system", *_LABELS)),
        Form("alpaca", ("instruction", "chosen", "rejected"), _alpaca_pair, (*_BESIDE, *_LABELS)),
        Form("ranking", ("prompt", "responses", "ranks"), rankings.ranking, _RANKED, ("responses", "ranks"), sole=True),
        Form("rated", ("prompt", "response", "attributes"), rankings.rated, (), ("attributes",), alone=True),
        # What else has a response is refused as a sample: its other needs only keep it from being read next to a pair.
        Form("sample", ("prompt", "response", "chosen", "rejected"), _unjudged, (), ("response",), alone=True),
        Form("transcripts", ("text", "score"), rankings.transcripts, _OF_ROW, ("text", "score")),
        Form("unpaired", ("prompt", "completion", "label"), _unpaired, alone=True),
        _STEPS,
    ),
    "prompts": (
        Form("prompt", ("prompt",), trl.from_prompt),
        Form("messages", ("messages",), _messages_prompt),
        Form("sharegpt", ("conversations",), _sharegpt_prompt, ("system",)),
        Form("alpaca", ("instruction",), _alpaca_prompt, _BESIDE),
        Form("shared-head", ("chosen", "rejected"), _pair_prompt, alone=True),
        Form("text", ("text",), _text_prompt, alone=True),
        Form("transcripts", ("text", "score"), _transcripts_prompt),
    ),
}
FORMS["samples"] = tuple(
    replace(form, read=_sampled_response) if form.name == "prompt-response" else form
    for form in FORMS["demonstrations"]
)
FORMS["outcomes"] = FORMS["comparisons"]
FORMS["responses"] = (
    *FORMS["comparisons"],
    Form("sample", ("prompt", "response"), _sample, ("finished",), ("response",), alone=True),
)
for _name, (_needs, _reader) in benchmarks.READERS.items():
    FORMS[_name] = (Form(_name, _needs, _reader, ("id", "num_correct") if _name == "rewardbench2" else ("id",)),)
