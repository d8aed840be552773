"""The three things that training data say: a demonstration, a comparison, a prompt."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TypeVar

from rlhf.errors import Problem, RlhfError

ROLES = ("system", "user", "assistant")


@dataclass(frozen=True)
class Message:
    role: str
    content: str


Messages = tuple[Message, ...]


@dataclass(frozen=True)
class Demonstration:
    """A conversation that ends with an assistant turn.

    Args:
        where: its file and line, as of every record.
        joined: turns of one speaker in a row were joined; as of every record.
        num_rows: how many rows it was made of; as of every record.
    """

    messages: Messages
    where: str
    joined: bool = field(default=False, compare=False)
    num_rows: int = field(default=1, compare=False)

    @property
    def prompt(self) -> Messages:
        return self.messages[:-1]


@dataclass(frozen=True)
class Judgement:
    """Response ``first`` is preferred to ``second`` with ``probability``; 1/2 is a tie. ``attribute`` says in what,
    None that it is overall."""

    first: int
    second: int
    probability: float = 1.0
    margin: float | None = None
    annotator: str | None = None
    attribute: str | None = None


@dataclass(frozen=True)
class Comparison:
    """A prompt, K responses, and the judgements between them; a pair is K = 2.

    Args:
        ratings: [K] probability that a response is good, where each has a label of its own.
        attributes: name -> [K] ratings in that attribute; None for a response that has none.
    """

    prompt: Messages
    responses: tuple[str, ...]
    judgements: tuple[Judgement, ...]
    where: str
    ratings: tuple[float, ...] | None = None
    attributes: dict[str, tuple[float | None, ...]] = field(default_factory=dict)
    joined: bool = field(default=False, compare=False)
    num_rows: int = field(default=1, compare=False)

    @property
    def names(self) -> set[str]:
        """The attributes that it has judgements or ratings in."""
        return {*self.attributes, *(one.attribute for one in self.judgements if one.attribute is not None)}

    def only(self, attribute: str) -> Comparison:
        """What it says of one attribute, as if that were all."""
        own = tuple(replace(judgement, attribute=None) for judgement in self.of(attribute))
        return replace(self, judgements=own, attributes={})

    def of(self, attribute: str | None) -> tuple[Judgement, ...]:
        """The judgements in one attribute, or overall."""
        return tuple(judgement for judgement in self.judgements if judgement.attribute == attribute)


@dataclass(frozen=True)
class Prompt:
    """A conversation that waits for an answer."""

    messages: Messages
    where: str
    joined: bool = field(default=False, compare=False)
    num_rows: int = field(default=1, compare=False)

    @property
    def prompt(self) -> Messages:
        return self.messages


Record = TypeVar("Record", Demonstration, Comparison, Prompt)


def texts_of(record: Demonstration | Comparison | Prompt) -> list[str]:
    """Every text of a record, responses last."""
    if isinstance(record, Comparison):
        return [*(message.content for message in record.prompt), *record.responses]
    return [message.content for message in record.messages]


def plain_text(messages: Messages) -> str:
    """What a function or a model without a chat template gets: the user's words, or a conversation with its roles."""
    if len(messages) == 1:
        return messages[0].content
    return "\n".join(f"{message.role}: {message.content}" for message in messages)


def prompt_key(messages: Messages) -> str:
    """One text a prompt, for grouping by prompt."""
    return json.dumps([[message.role, message.content] for message in messages], ensure_ascii=False)


def split_by_prompt(records: Sequence[Record], fraction: float, seed: int) -> tuple[list[Record], list[Record]]:
    """(rest, held out), disjoint in prompts: ``fraction`` of the distinct prompts, at least one, are held out.

    Which ones depends on the seed and each prompt's text, not on the order of the rows.

    Raises:
        RlhfError: DAT030 with fewer than two distinct prompts.
    """
    keys = {prompt_key(record.prompt) for record in records}
    if len(keys) < 2:
        what = f"{len(keys)} distinct prompt: nothing to hold out."
        raise RlhfError(Problem("DAT030", records[0].where if records else "data", what, "more prompts"))
    order = sorted(keys, key=lambda key: hashlib.sha256(f"{seed}/{key}".encode()).digest())
    held_out = set(order[: min(len(order) - 1, max(1, round(fraction * len(order))))])
    rest = [record for record in records if prompt_key(record.prompt) not in held_out]
    return rest, [record for record in records if prompt_key(record.prompt) in held_out]


def first_share(records: Sequence[Record], fraction: float | None, seed: int) -> list[Record]:
    """The rows of that share of the distinct prompts, at least one; None: all. A larger share holds every smaller one.

    Which ones depends on the seed and each prompt's text, and is no choice of ``split_by_prompt``.
    """
    if fraction is None:
        return list(records)
    keys = {prompt_key(record.prompt) for record in records}
    order = sorted(keys, key=lambda key: hashlib.sha256(f"{seed}/share/{key}".encode()).digest())
    kept = set(order[: max(1, round(fraction * len(order)))])
    return [record for record in records if prompt_key(record.prompt) in kept]


def count_shared_prompts(records: Sequence[Record], others: Sequence[Record]) -> int:
    """How many of the distinct prompts of ``others`` are prompts of ``records`` as well."""
    known = {prompt_key(record.prompt) for record in records}
    return len(known & {prompt_key(record.prompt) for record in others})
