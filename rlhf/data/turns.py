"""Conversations out of rows: lists of messages and transcripts, whose turns of one speaker in a row are joined."""

from __future__ import annotations

import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rlhf.data.rows import (
    EMPTY_ANSWER,
    EMPTY_TEXT,
    NO_SHARED_PROMPT,
    ORDER,
    SPEAKER,
    TOOLS,
    UNUSABLE,
    RowError,
    text_of,
)
from rlhf.records import ROLES, Message, Messages

HUMAN, ASSISTANT = "\n\nHuman:", "\n\nAssistant:"
BETWEEN_JOINED = "\n\n"
CALLS = ("tool_calls", "function_call")


@dataclass(frozen=True)
class Answered:
    """A prompt and the answers to it; ``joined``: a conversation had several turns of one speaker in a row."""

    prompt: Messages
    answers: tuple[str, ...]
    joined: bool


def messages(value: Any, field: str) -> Messages:
    """From a list of objects with role and content."""
    if not isinstance(value, list) or not value:
        raise RowError(f"'{field}': need a list of messages.")
    found = []
    for index, item in enumerate(value):
        place = f"{field}[{index}]"
        if not isinstance(item, Mapping):
            raise RowError(f"'{place}': need an object with role and content.")
        role = item.get("role")
        if role not in ROLES:
            what = f"'{place}.role': need system, user or assistant, got {reprlib.repr(role)}."
            raise RowError(what, SPEAKER)
        if calls := next((name for name in CALLS if item.get(name)), None):
            what = f"'{place}.{calls}': calls of tools are not read, and the turn means nothing without them."
            raise RowError(what, TOOLS)
        is_answer = role == "assistant" and index == len(value) - 1
        text = text_of(item.get("content"), f"{place}.content", EMPTY_ANSWER if is_answer else EMPTY_TEXT)
        found.append(Message(role, text))
    return tuple(found)


def transcript(text: str, field: str, fault: str) -> Messages:
    """A conversation written as "\\n\\nHuman: ...\\n\\nAssistant: ..."; ``fault`` says what a text is that is not."""
    if not text.startswith(HUMAN):
        raise RowError(fault, UNUSABLE)
    found: list[Message] = []
    for part in text.split(HUMAN)[1:]:
        user, *answers = part.split(ASSISTANT)
        found.append(Message("user", user.strip()))
        found += [Message("assistant", answer.strip()) for answer in answers]
    for index, message in enumerate(found):
        is_answer = message.role == "assistant" and index == len(found) - 1
        text_of(message.content, f"{field}[{index}].content", EMPTY_ANSWER if is_answer else EMPTY_TEXT)
    return tuple(found)


def prompt_of(value: Any) -> Messages:
    """A text is one user message; a list is a conversation."""
    if isinstance(value, list):
        return messages(value, "prompt")
    return (Message("user", text_of(value, "prompt")),)


def joined(found: Sequence[Message]) -> Messages:
    """The turns, with those of one speaker in a row as one turn, a blank line between them."""
    turns: list[Message] = []
    for message in found:
        if turns and turns[-1].role == message.role:
            message = Message(message.role, turns.pop().content + BETWEEN_JOINED + message.content)
        turns.append(message)
    return tuple(turns)


def in_turn(found: Messages, field: str, ends_with: str, end_field: str = "") -> Messages:
    """The turns, joined and checked. ``end_field``: the field that holds the end, where it is another one."""
    turns = joined(found)
    if turns and turns[-1].role != ends_with:
        raise RowError(f"'{end_field or field}': must end with a turn of the {ends_with}.", ORDER)
    check_turns(turns, field, ends_with)
    return turns


def check_turns(found: Messages, field: str, ends_with: str) -> None:
    """System first if at all, then user and assistant in turn, ending with a turn of ``ends_with``."""
    turns = found[1:] if found and found[0].role == "system" else found
    for index, message in enumerate(turns):
        if message.role != ("user", "assistant")[index % 2]:
            place = index + len(found) - len(turns)
            what = f"'{field}[{place}].role': user and assistant must alternate, found '{message.role}'."
            raise RowError(what, ORDER)
    if not turns or turns[-1].role != ends_with:
        raise RowError(f"'{field}': must end with a turn of the {ends_with}.", ORDER)


def without_answer(found: Messages) -> Messages:
    """The turns, joined, without the assistant's last one: that is to be answered anew."""
    turns = joined(found)
    return turns[:-1] if turns and turns[-1].role == "assistant" else turns


def answered(conversations: Mapping[str, Messages], prompt: Messages | None = None) -> Answered:
    """The prompt that the conversations share, and the last answer of each.

    They must be the same up to their last message. Only then are turns joined, so that all of them change alike. A turn
    of the assistant that the prompt ends with is joined with the answer after it.

    Args:
        conversations: field -> the whole conversation, prompt included.
        prompt: what every one of them begins with, where the row says so on its own.
    """
    (first, own), *others = conversations.items()
    turns = {
        field: in_turn(found, "prompt" if prompt else field, "assistant", field)
        for field, found in conversations.items()
    }
    head = turns[first][:-1]
    for field in turns:
        if prompt is not None and turns[field][:-1] != without_answer(prompt):
            raise RowError(f"'{field}': need one assistant turn after the prompt.", ORDER)
    for field, found in others:
        if found[:-1] != own[:-1]:
            what = f"'{field}': must be one conversation with '{first}' up to the last assistant turn."
            raise RowError(what, NO_SHARED_PROMPT)
    return Answered(head, tuple(found[-1].content for found in turns.values()), len(turns[first]) < len(own))
