"""Rows in TRL's forms: demonstrations, prompts and pairs, with what a pair may say of its preference."""

from __future__ import annotations

import reprlib
import sys
from typing import Any

from rlhf.data.rows import EMPTY_ANSWER, NO_SHARED_PROMPT, EqualResponses, Row, RowError, need, text_of
from rlhf.data.turns import ASSISTANT, HUMAN, Answered, answered, in_turn, messages, prompt_of, transcript
from rlhf.records import Comparison, Demonstration, Judgement, Message, Messages, Prompt

NO_HEAD = f"'prompt': missing, and 'chosen' and 'rejected' share no head from {HUMAN!r} to {ASSISTANT!r}."


def from_messages(row: Row, where: str) -> Demonstration:
    """From ``messages``."""
    return demonstration(messages(need(row, "messages"), "messages"), "messages", where)


def from_completion(row: Row, where: str, key: str = "completion") -> Demonstration:
    """From ``prompt`` and ``completion``, each text or messages."""
    whole = (*prompt_of(need(row, "prompt")), *_answer(need(row, key), key))
    return demonstration(whole, "prompt", where, key)


def demonstration(found: Messages, field: str, where: str, end_field: str = "") -> Demonstration:
    turns = in_turn(found, field, "assistant", end_field)
    return Demonstration(turns, where, joined=len(turns) < len(found))


def from_prompt(row: Row, where: str) -> Prompt:
    """From ``prompt``."""
    return prompt(prompt_of(need(row, "prompt")), where)


def prompt(found: Messages, where: str) -> Prompt:
    turns = in_turn(found, "prompt", "user")
    return Prompt(turns, where, joined=len(turns) < len(found))


def pair(row: Row, where: str) -> Comparison:
    """From ``chosen`` and ``rejected``, with ``prompt`` or a shared head."""
    return preferred(row, parts_of_pair(row), where)


def parts_of_pair(row: Row) -> Answered:
    """The prompt of a pair, the chosen response and the rejected one."""
    chosen, rejected = need(row, "chosen"), need(row, "rejected")
    if isinstance(chosen, list) != isinstance(rejected, list):
        raise RowError("'rejected': must be of the same form as 'chosen'.")
    head = prompt_of(row["prompt"]) if "prompt" in row else None
    wholes = {"chosen": _whole(chosen, "chosen", head), "rejected": _whole(rejected, "rejected", head)}
    return answered(wholes, head)


def preferred(row: Row, found: Answered, where: str) -> Comparison:
    """One pair as a comparison, with the row's ``margin`` and ``probability`` or ``votes`` if it has them."""
    if found.answers[0] == found.answers[1]:
        raise EqualResponses("'chosen' equals 'rejected'.")
    margin = row.get("margin")
    if margin is not None and (
        isinstance(margin, bool) or not isinstance(margin, int | float) or not abs(margin) <= sys.float_info.max
    ):
        raise RowError(f"'margin': need a finite number, got {reprlib.repr(margin)}.")
    shift = None if margin is None else float(margin)
    judgement = Judgement(0, 1, probability_of(row), shift, annotator_of(row), attribute_of(row))
    return Comparison(found.prompt, found.answers, (judgement,), where, joined=found.joined)


def probability_of(row: Row) -> float:
    """How probable it is that 'chosen' is preferred: ``probability``, or its share of ``votes`` [chosen, rejected]; 1
    where the row has neither."""
    share, votes = row.get("probability"), row.get("votes")
    if share is None and votes is None:
        return 1.0
    if share is not None and votes is not None:
        raise RowError("'votes': the row has a probability too; leave one of them out.")
    if share is not None:
        if isinstance(share, bool) or not isinstance(share, int | float) or not 0.5 <= share <= 1:
            raise RowError(f"'probability': need a number from 0.5 to 1, got {reprlib.repr(share)}.")
        return float(share)
    if not isinstance(votes, list) or len(votes) != 2 or not all(type(v) is int and v >= 0 for v in votes):
        raise RowError("'votes': need two whole numbers, for 'chosen' and for 'rejected'.")
    if votes[0] < votes[1] or not sum(votes):
        raise RowError(f"'votes': {votes[0]} for 'chosen' and {votes[1]} for 'rejected': the chosen one needs half.")
    return float(votes[0] / sum(votes))


def annotator_of(row: Row) -> str | None:
    """Who judged: a name or a number, as text; None where the row does not say."""
    found = row.get("annotator")
    if found is not None and (isinstance(found, bool) or not isinstance(found, str | int)):
        raise RowError(f"'annotator': need a name or a number, got {reprlib.repr(found)}.")
    return None if found is None else str(found)


def attribute_of(row: Row) -> str | None:
    """In what was judged: the name of an attribute; None for an overall judgement."""
    found = row.get("attribute")
    return None if found is None else text_of(found, "attribute")


def _answer(value: Any, field: str) -> Messages:
    if isinstance(value, list):
        return messages(value, field)
    return (Message("assistant", text_of(value, field, EMPTY_ANSWER)),)


def _whole(value: Any, field: str, head: Messages | None) -> Messages:
    """The conversation that ends with this response; a message list may repeat the prompt in front of it."""
    if head is None and not isinstance(value, list):
        text = text_of(value, field)
        if not text.startswith(HUMAN) or ASSISTANT not in text:
            raise RowError(NO_HEAD, NO_SHARED_PROMPT)
        return transcript(text, field, NO_HEAD)
    found = _answer(value, field)
    return found if head is None or found[: len(head)] == head else (*head, *found)
