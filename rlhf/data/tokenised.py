"""Records as token ids, with every row that is too long counted, dropped or cut as the config says."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

from rlhf.data.chat_format import ChatFormat
from rlhf.data.dropped import DroppedRows
from rlhf.data.fitting import Fitting, Judged, Limit
from rlhf.data.rows import EQUAL, TOO_LONG
from rlhf.errors import Problem, RlhfError
from rlhf.records import Comparison, Demonstration, Judgement, Messages, Prompt, Record
from rlhf.runs.progress import track

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
            f"{self.num_dropped} dropped, {self.num_truncated} truncated."
        )


def dialogues(
    records: Sequence[Demonstration],
    chat: ChatFormat,
    last_only: bool,
    limit: Limit,
    dropped: DroppedRows,
    others: Sequence[Demonstration] = (),
) -> tuple[list[Dialogue], LengthReport]:
    """Demonstrations as ids. Truncation cuts the end of the conversation, and with it the end token.

    Args:
        others: rows of the same data set that serve something else; those of them that are too long are counted, too.

    Raises:
        RlhfError: DAT051 where none is short enough, MOD022 where the limit is beyond the model's context; what the
            chat format refuses, by record.
    """
    _require_context(chat, limit.tokens)

    def tokenise(record: Demonstration) -> Dialogue:
        return Dialogue(*chat.demonstration(record.messages, last_only))

    def judge(_: Demonstration, row: Dialogue) -> Judged:
        can_be_cut = limit.truncates and any(row.trained[: limit.tokens])
        return len(row.ids), TOO_LONG if len(row.ids) > limit.tokens and not can_be_cut else None

    found = _kept(records, others, tokenise, judge, Fitting(limit, chat, dropped))
    rows = [Dialogue(row.ids[: limit.tokens], row.trained[: limit.tokens]) for _, row in found]
    lengths, num_cut = [len(row.ids) for row in rows], sum(len(row.ids) > limit.tokens for _, row in found)
    return rows, LengthReport(len(records), len(records) - len(rows), num_cut, max(lengths), sum(lengths))


def turns(records: Sequence[Demonstration], chat: ChatFormat, last_only: bool, max_length: int) -> list[Turn]:
    """Every assistant turn as a prompt and a response, for measuring; those beyond ``max_length`` are left out."""

    def of(record: Demonstration) -> list[Turn]:
        indices = [index for index, message in enumerate(record.messages) if message.role == "assistant"]
        return [
            _turn(chat, record.messages[:index], record.messages[index].content)
            for index in (indices[-1:] if last_only else indices)
        ]

    return [
        turn
        for found in each(records, of)
        for turn in found
        if len(turn.prompt_ids) + len(turn.response_ids) <= max_length
    ]


def groups(
    records: Sequence[Comparison],
    chat: ChatFormat,
    limit: Limit,
    dropped: DroppedRows,
    others: Sequence[Comparison] = (),
) -> tuple[list[Group], LengthReport]:
    """Comparisons as ids. A row with any response beyond the limit is dropped, or that response is cut. A row of which
    two differently ranked responses are the same tokens (after the cut, too) is a bad row.

    Args:
        others: as for ``dialogues``.

    Raises:
        RlhfError: DAT050 for such rows where bad rows are refused, DAT051 where none is short enough, MOD022 where the
            limit is beyond the model's context; what the chat format refuses, by record.
    """
    _require_context(chat, limit.tokens)

    def tokenise(record: Comparison) -> list[Turn]:
        return [_turn(chat, record.prompt, response) for response in record.responses]

    def cut(row: list[Turn]) -> list[list[int]]:
        room = limit.tokens - len(row[0].prompt_ids)
        return [turn.response_ids[:room] for turn in row] if room > 0 else []

    def judge(record: Comparison, row: list[Turn]) -> Judged:
        longest, responses = _longest(row), cut(row)
        if longest > limit.tokens and not (limit.truncates and responses):
            return longest, TOO_LONG
        return longest, EQUAL if _has_equals(record, responses) else None

    found = _kept(records, others, tokenise, judge, Fitting(limit, chat, dropped))
    kept = [Group(row[0].prompt_ids, cut(row), record.judgements, record) for record, row in found]
    num_cut = sum(_longest(row) > limit.tokens for _, row in found)
    longest = max(len(group.prompt_ids) + max(map(len, group.responses)) for group in kept)
    num_tokens = sum(len(group.prompt_ids) + len(response) for group in kept for response in group.responses)
    return kept, LengthReport(len(records), len(records) - len(kept), num_cut, longest, num_tokens)


def prompt_rows(
    records: Sequence[Prompt], chat: ChatFormat, limit: Limit, dropped: DroppedRows, others: Sequence[Prompt] = ()
) -> tuple[list[PromptRow], LengthReport]:
    """Prompts as ids; longer ones are dropped and counted. ``others``: as for ``dialogues``."""

    def tokenise(record: Prompt) -> PromptRow:
        return PromptRow(record.messages, chat.prompt_ids(record.messages))

    def judge(_: Prompt, row: PromptRow) -> Judged:
        return len(row.ids), TOO_LONG if len(row.ids) > limit.tokens else None

    kept = [row for _, row in _kept(records, others, tokenise, judge, Fitting(limit, chat, dropped))]
    lengths = [len(row.ids) for row in kept]
    return kept, LengthReport(len(records), len(records) - len(kept), 0, max(lengths), sum(lengths))


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


def _kept(
    records: Sequence[Record],
    others: Sequence[Record],
    tokenise: Callable[[Record], Found],
    judge: Callable[[Record, Found], Judged],
    fitting: Fitting,
) -> list[tuple[Record, Found]]:
    everything = list(records) + fitting.not_seen(others, records)
    return fitting.kept(everything, each(everything, tokenise), judge, len(records))


def _turn(chat: ChatFormat, prompt: Messages, response: str) -> Turn:
    return Turn(chat.prompt_ids(prompt), [*chat.response_ids(prompt, response), chat.end_id])


def _longest(row: Sequence[Turn]) -> int:
    return len(row[0].prompt_ids) + max(len(turn.response_ids) for turn in row)


def _has_equals(record: Comparison, responses: Sequence[Sequence[int]]) -> bool:
    return any(
        judgement.probability != 0.5 and responses[judgement.first] == responses[judgement.second]
        for judgement in record.judgements
    )
