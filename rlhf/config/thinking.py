"""The thinking in front of an answer: how chat templates mark it, and how it is taken apart from the answer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Thinking = Literal["strip", "keep", "off"]
OPEN, CLOSE, SWITCH = "<think>", "</think>", "enable_thinking"


@dataclass(frozen=True)
class Marks:
    """What stands in front of thinking and in front of the answer behind it."""

    open: str
    close: str


TAGS = Marks(OPEN, CLOSE)
CHANNELS = Marks("<|channel|>analysis<|message|>", "<|channel|>final<|message|>")
END_OF_CHANNEL = "<|end|>"


def marks_of(template: str) -> Marks | None:
    """The marks that a template writes or reads; None where its model does not think in any that are known here."""
    return next((marks for marks in (TAGS, CHANNELS) if marks.close in template), None)


def split(text: str, marks: Marks = TAGS) -> tuple[str, str]:
    """Thinking and answer of a response. Thinking that was cut off has no answer; without marks there is no thinking.

    As templates do, what stands behind the last closing mark is the answer.
    """
    if marks.close in text:
        before, _, answer = text.rpartition(marks.close)
    elif marks.open in text:
        before, answer = text, ""
    else:
        return "", text
    thought = before.partition(marks.open)[2] if marks.open in before else before
    if marks is CHANNELS:
        thought = thought.partition(END_OF_CHANNEL)[0] if marks.open in before else ""
    return thought.strip("\n"), answer.lstrip("\n")


def join(thought: str, answer: str) -> str:
    """The one form in which a response with thinking is text, whatever its template marks it with."""
    return f"{OPEN}\n{thought}\n{CLOSE}\n\n{answer}" if thought else answer
