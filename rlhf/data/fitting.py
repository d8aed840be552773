"""Which rows fit the model: without its special tokens, not too long, and still different as tokens."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from rlhf.data.chat_format import ChatFormat
from rlhf.data.dropped import DroppedRows
from rlhf.data.rows import EQUAL, SPECIAL_TOKEN, TOO_LONG
from rlhf.data.sources import Loaded
from rlhf.errors import Problem, RlhfError
from rlhf.records import Record, texts_of

Found = TypeVar("Found")
Judged = tuple[int, str | None]


@dataclass(frozen=True)
class Limit:
    """The longest row that is kept.

    Args:
        tokens: a longer row is dropped, or its end is cut.
        key: the setting that says so; "": none does.
        truncates: whether the end is cut; None: there is no such setting.
    """

    tokens: int
    key: str = "max_length"
    truncates: bool | None = None

    def keeping(self, context_length: int | None) -> str:
        """What would keep longer rows."""
        found = []
        if self.key and not (context_length and self.tokens >= context_length):
            most = f", the base has room for {context_length}" if context_length else ""
            found.append(f"a larger {self.key} (now {self.tokens}{most})")
        if self.truncates is False:
            found.append("too_long: truncate")
        return ", ".join(found) or "shorter rows"


def usable(loaded: Loaded, chat: Any) -> Loaded:
    """The data set without the rows that ``without_special`` drops."""
    records = without_special(loaded.records, chat, loaded.dropped)
    left_out = without_special(loaded.left_out, chat, loaded.dropped)
    return replace(loaded, records=tuple(records), left_out=tuple(left_out))


def without_special(records: Sequence[Record], chat: Any, dropped: DroppedRows) -> list[Record]:
    """The records whose texts hold no token that only a chat template may write. The others are dropped where bad rows
    are, and else refused when they are tokenised.

    Raises:
        RlhfError: DAT060 where no record is left.
    """
    if not dropped.drops_bad_rows or not isinstance(chat, ChatFormat):
        return list(records)
    kept = []
    for record in records:
        if any(chat.special_in(text) for text in texts_of(record)):
            dropped.add(SPECIAL_TOKEN, record.where, record.num_rows)
        else:
            kept.append(record)
    if records and not kept:
        what = f"all {len(records)} rows contain a special token of the tokenizer."
        raise RlhfError(Problem("DAT060", dropped.where, what, "remove these tokens from the texts"))
    return kept


@dataclass(frozen=True)
class Fitting:
    """How long rows may be, for which tokens, and where dropped ones are counted."""

    limit: Limit
    chat: Any
    dropped: DroppedRows

    def not_seen(self, others: Sequence[Record], records: Sequence[Record]) -> list[Record]:
        """``others`` that are not among ``records``, and that no call has counted before."""
        seen = self.dropped.tokenised | {record.where for record in records}
        return [record for record in others if record.where not in seen]

    def kept(
        self, records: Sequence[Record], rows: Sequence[Found], judge: Callable[[Record, Found], Judged], num_used: int
    ) -> list[tuple[Record, Found]]:
        """The first ``num_used`` records with their tokens, without those that are dropped. All dropped ones count.

        Args:
            judge: a row's length, and why it is dropped, or None.

        Raises:
            RlhfError: DAT050 for equal responses where bad rows are refused, DAT051 where no row is left.
        """
        found: list[tuple[Record, Found]] = []
        lengths: list[int] = []
        problems: list[Problem] = []
        for record, row in zip(records, rows, strict=True):
            length, reason = judge(record, row)
            lengths.append(length)
            if reason == EQUAL and not self.dropped.drops_bad_rows:
                what = "two differently ranked responses are the same tokens."
                problems.append(Problem("DAT050", record.where, what, "remove the row; on_bad_row: drop leaves it out"))
            elif reason:
                self.dropped.add(reason, record.where, record.num_rows, self._keeping() if reason == TOO_LONG else "")
            elif len(lengths) <= num_used:
                found.append((record, row))
        self.dropped.tokenised.update(record.where for record in records)
        if problems:
            raise RlhfError(*problems)
        if not found:
            raise RlhfError(self._none_left(lengths[:num_used]))
        return found

    def _keeping(self) -> str:
        return self.limit.keeping(self.chat.context_length)

    def _none_left(self, lengths: Sequence[int]) -> Problem:
        median = f" (median {statistics.median_low(lengths)})" if lengths else ""
        what = f"all {len(lengths)} rows are longer than {self.limit.tokens} tokens{median}."
        if any(length <= self.limit.tokens for length in lengths):
            what = f"no row is left of {len(lengths)}: {self.dropped.sentence()}."
        return Problem("DAT051", self.dropped.where, what, self._keeping())
