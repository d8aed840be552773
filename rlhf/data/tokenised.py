"""Records as token ids, with every row that is too long counted, dropped or cut as the config says."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

from rlhf.data.chat import ChatFormat
from rlhf.data.records import Comparison, Demonstration, Judgement, Messages, Prompt, Record
from rlhf.data.sources import check_dropped
from rlhf.errors import Problem, RlhfError
from rlhf.progress import track

Found = TypeVar("Found")


@dataclass(frozen=True)
class Dialogue:
    """A demonstration: ``ids`` of the whole conversation, ``trained`` True where a token carries loss."""

    ids: list[int]
    trained: list[bool]


@dataclass(frozen=True)
class Turn:
    """One prompt and one response that ends with the end token."""

    prompt_ids: list[int]
    response_ids: list[int]


@dataclass(frozen=True)
class Group:
    """A prompt with all its responses, each ending with the end token, and the judgements between them."""

    prompt_ids: list[int]
    responses: list[list[int]]
    judgements: tuple[Judgement, ...]
    record: Comparison


@dataclass(frozen=True)
class PromptRow:
    """A prompt ready to be answered."""

    messages: Messages
    ids: list[int]


@dataclass(frozen=True)
class LengthReport:
    """What tokenising did to the rows."""

    num_rows: int
    num_dropped: int
    num_truncated: int
    longest: int
    num_tokens: int

    def sentence(self, name: str) -> str:
        return (
            f"{name}: {self.num_rows} rows, {self.num_tokens} tokens, longest kept {self.longest}; "
            f"{self.num_dropped} dropped as too long, {self.num_truncated} truncated."
        )


def dialogues(
    records: Sequence[Demonstration], chat: ChatFormat, last_only: bool, max_length: int, too_long: str,
    max_dropped_fraction: float, where: str,
) -> tuple[list[Dialogue], LengthReport]:  # fmt: skip
    """Demonstrations as ids. Truncation cuts the end of the conversation, and with it the end token.

    Raises:
        RlhfError: MOD022 where ``max_length`` is beyond the model's context; what the chat format refuses, by record.
    """
    _require_context(chat, max_length)
    kept: list[Dialogue] = []
    dropped = truncated = 0
    whole = each(records, lambda record: chat.demonstration(record.messages, last_only))
    for ids, trained in whole:
        if len(ids) > max_length:
            if too_long == "drop" or not any(trained[:max_length]):
                dropped += 1
                continue
            truncated += 1
        kept.append(Dialogue(ids[:max_length], trained[:max_length]))
    _check([len(ids) for ids, _ in whole], len(kept), dropped, max_length, max_dropped_fraction, where)
    lengths = [len(dialogue.ids) for dialogue in kept]
    return kept, LengthReport(len(records), dropped, truncated, max(lengths), sum(lengths))


def turns(records: Sequence[Demonstration], chat: ChatFormat, last_only: bool, max_length: int) -> list[Turn]:
    """Every assistant turn as a prompt and a response, for measuring; those beyond ``max_length`` are left out."""

    def of(record: Demonstration) -> list[Turn]:
        indices = [index for index, message in enumerate(record.messages) if message.role == "assistant"]
        return [
            _turn(chat, record.messages[:index], record.messages[index].content)
            for index in (indices[-1:] if last_only else indices)
        ]

    return [
        turn for found in each(records, of) for turn in found
        if len(turn.prompt_ids) + len(turn.response_ids) <= max_length
    ]  # fmt: skip


def groups(
    records: Sequence[Comparison], chat: ChatFormat, max_length: int, too_long: str, max_dropped_fraction: float,
    where: str,
) -> tuple[list[Group], LengthReport]:  # fmt: skip
    """Comparisons as ids. A row with any response beyond ``max_length`` is dropped, or that response is cut.

    Raises:
        RlhfError: DAT050 where two responses with different ranks are the same tokens (after truncation, too), MOD022
            where ``max_length`` is beyond the model's context; what the chat format refuses, by record.
    """
    _require_context(chat, max_length)
    kept: list[Group] = []
    problems: list[Problem] = []
    dropped = truncated = tokens = longest = 0
    whole = each(records, lambda record: [_turn(chat, record.prompt, response) for response in record.responses])
    for record, pairs in zip(records, whole, strict=True):
        prompt, room = pairs[0].prompt_ids, max_length - len(pairs[0].prompt_ids)
        if any(len(pair.response_ids) > room for pair in pairs):
            if too_long == "drop" or room < 1:
                dropped += 1
                continue
            truncated += 1
        responses = [pair.response_ids[:room] for pair in pairs]
        problems += _equal_pairs(record, responses)
        kept.append(Group(prompt, responses, record.judgements, record))
        longest = max(longest, len(prompt) + max(map(len, responses)))
        tokens += sum(len(prompt) + len(response) for response in responses)
    if problems:
        raise RlhfError(*problems)
    lengths = [len(pairs[0].prompt_ids) + max(len(pair.response_ids) for pair in pairs) for pairs in whole]
    _check(lengths, len(kept), dropped, max_length, max_dropped_fraction, where)
    return kept, LengthReport(len(records), dropped, truncated, longest, tokens)


def prompt_rows(
    records: Sequence[Prompt], chat: ChatFormat, max_tokens: int, max_dropped_fraction: float, where: str
) -> tuple[list[PromptRow], LengthReport]:
    """Prompts as ids; longer ones are dropped and counted."""
    rows = each(records, lambda record: PromptRow(record.messages, chat.prompt_ids(record.messages)))
    kept = [row for row in rows if len(row.ids) <= max_tokens]
    dropped = len(rows) - len(kept)
    _check([len(row.ids) for row in rows], len(kept), dropped, max_tokens, max_dropped_fraction, where)
    lengths = [len(row.ids) for row in kept]
    return kept, LengthReport(len(rows), dropped, 0, max(lengths), sum(lengths))


def prompts_with_room(
    records: Sequence[Prompt], chat: ChatFormat, max_tokens: int, new_tokens: int, where: str
) -> list[PromptRow]:
    """The prompts behind which ``new_tokens`` fit into the model's context; the others are left out.

    Raises:
        RlhfError: MOD022 if there is none.
    """
    room = min(max_tokens, chat.context_length - new_tokens) if chat.context_length else max_tokens
    rows = each(records, lambda record: PromptRow(record.messages, chat.prompt_ids(record.messages)))
    kept = [row for row in rows if len(row.ids) <= room]
    if not kept:
        what = f"{new_tokens} tokens fit behind none of {len(rows)} prompts in the base's context."
        raise RlhfError(Problem("MOD022", where, what, "shorter prompts or responses"))
    return kept


def require_batch(num_rows: int, batch_size: int, where: str) -> None:
    """Raise DAT052 where there are fewer rows than a batch takes: it would be smaller than told, or hold one twice."""
    if num_rows < batch_size:
        what = f"{num_rows} rows, fewer than the {batch_size} that a batch takes."
        raise RlhfError(Problem("DAT052", where, what, "more rows, or a smaller batch.batch_size"))


def _require_context(chat: ChatFormat, max_length: int) -> None:
    if chat.context_length and max_length > chat.context_length:
        what = f"{max_length} tokens, more than the base's context of {chat.context_length}."
        raise RlhfError(Problem("MOD022", "max_length", what, f"{chat.context_length} or less"))


def each(records: Sequence[Record], tokenise: Callable[[Record], Found]) -> list[Found]:
    """What ``tokenise`` makes of each record; whatever it refuses is raised together, each under its record's place."""
    found: list[Found] = []
    problems: list[Problem] = []
    for record in track(records, "Tokenising", len(records)):
        try:
            found.append(tokenise(record))
        except RlhfError as error:
            problems += [
                replace(problem, where=record.where if problem.where == "data" else f"{record.where} ({problem.where})")
                for problem in error.problems
            ]
    if problems:
        raise RlhfError(*problems)
    return found


def _turn(chat: ChatFormat, prompt: Messages, response: str) -> Turn:
    return Turn(chat.prompt_ids(prompt), [*chat.response_ids(prompt, response), chat.end_id])


def _equal_pairs(record: Comparison, responses: list[list[int]]) -> list[Problem]:
    return [
        Problem("DAT050", record.where, "two differently ranked responses are the same tokens.", "drop the row")
        for judgement in record.judgements
        if judgement.probability != 0.5 and responses[judgement.first] == responses[judgement.second]
    ][:1]


def _check(
    lengths: Sequence[int], kept: int, dropped: int, limit: int, max_dropped_fraction: float, where: str
) -> None:
    if not kept:
        median = f" (median {statistics.median_low(lengths)})" if lengths else ""
        what = f"all {len(lengths)} rows are longer than {limit} tokens{median}."
        raise RlhfError(Problem("DAT051", where, what, "raise the limit, or shorten the rows"))
    check_dropped(len(lengths), {f"longer than {limit} tokens": dropped}, max_dropped_fraction, where)
