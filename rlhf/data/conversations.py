"""ShareGPT's conversations and Alpaca's instructions as messages."""

from __future__ import annotations

import reprlib
from collections.abc import Mapping
from typing import Any

from rlhf.data import turns
from rlhf.data.rows import EMPTY_ANSWER, EMPTY_TEXT, SPEAKER, Row, RowError, need, text_of
from rlhf.records import Message, Messages

SPEAKERS = {
    "human": "user", "user": "user", "gpt": "assistant", "chatgpt": "assistant", "assistant": "assistant",
    "system": "system",
}  # fmt: skip


def sharegpt(row: Row) -> Messages:
    """ShareGPT's ``conversations``: turns with from and value (or role and content), and a system text beside them."""
    found = need(row, "conversations")
    if not isinstance(found, list) or not found:
        raise RowError("'conversations': need a list of turns.")
    if all(isinstance(turn, Mapping) and "from" not in turn and "role" in turn for turn in found):
        return _with_system(row, turns.messages(found, "conversations"))
    last = len(found) - 1
    return _with_system(
        row, tuple(turn_of(turn, f"conversations[{index}]", index == last) for index, turn in enumerate(found))
    )


def alpaca(row: Row) -> Messages:
    """Alpaca's ``instruction``, with ``input`` on the lines below it, after ``history`` and ``system`` if there are."""
    texts = [text_of(need(row, "instruction"), "instruction")]
    if not _blank(row.get("input")):
        texts.append(text_of(row["input"], "input"))
    past_turns: list[Message] = []
    history = row.get("history") or []
    if not isinstance(history, list):
        raise RowError("'history': need a list of [instruction, output].")
    for index, past in enumerate(history):
        if not isinstance(past, list) or len(past) != 2:
            raise RowError(f"'history[{index}]': need [instruction, output].")
        asked, answered = (text_of(text, f"history[{index}][{part}]") for part, text in enumerate(past))
        past_turns += [Message("user", asked), Message("assistant", answered)]
    return _with_system(row, (*past_turns, Message("user", "\n".join(texts))))


def turn_of(turn: Any, place: str, is_last: bool) -> Message:
    if not isinstance(turn, Mapping):
        raise RowError(f"'{place}': need an object with from and value.")
    speaker = turn.get("from")
    if not isinstance(speaker, str) or speaker not in SPEAKERS:
        raise RowError(f"'{place}.from': need system, human or gpt, got {reprlib.repr(speaker)}.", SPEAKER)
    role = SPEAKERS[speaker]
    if_empty = EMPTY_ANSWER if is_last and role == "assistant" else EMPTY_TEXT
    return Message(role, text_of(turn.get("value"), f"{place}.value", if_empty))


def _with_system(row: Row, found: Messages) -> Messages:
    if _blank(row.get("system")):
        return found
    if found[0].role == "system":
        raise RowError("'system': the conversation has a system turn of its own.")
    return (Message("system", text_of(row["system"], "system")), *found)


def _blank(value: Any) -> bool:
    return value is None or (isinstance(value, str) and not value.strip())
