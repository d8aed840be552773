"""A row before it has a form: its fields and texts, and what can be wrong with it, by reason."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

Row = Mapping[str, Any]
MAX_NAMES = 20

# Why a row cannot be used. Rows are counted by these, in notes and manifests, so they are few and stay as they are;
# each reads after "rows with".
BROKEN_LINE = "a broken line"
NOT_UTF8 = "bytes that are not UTF-8"
MISSING = "a missing field"
WRONG_VALUE = "a value that does not fit its field"
EMPTY_ANSWER = "an empty answer"
EMPTY_TEXT = "an empty turn"
BAD_CHARACTER = "a NUL or half a character"
SPEAKER = "an unknown speaker"
ORDER = "turns out of order"
TOOLS = "tool calls"
NO_SHARED_PROMPT = "no shared prompt"
NO_PREFERENCE = "no preference"
EQUAL = "equal responses"
TWO_FORMS = "two forms that disagree"
UNUSABLE = "a form that no stage trains on"
UNCOMPARED = "nothing to compare with"
CUT_OFF = "a cut-off answer"
SPECIAL_TOKEN = "a special token in the text"
TOO_LONG = "too many tokens"


class RowError(ValueError):
    """What is wrong with a row: the field and the cause. ``reason`` is what such rows are counted as."""

    code = "DAT004"

    def __init__(self, what: str, reason: str = WRONG_VALUE) -> None:
        self.reason = reason
        super().__init__(what)


class MissingField(RowError):
    """A row without a field that it needs."""

    def __init__(self, field: str, row: Row) -> None:
        self.field = field
        super().__init__(f"'{field}': missing (this row has: {names(row)}).", MISSING)


class EqualResponses(RowError):
    """Differently ranked responses that are the same text."""

    code = "DAT012"

    def __init__(self, what: str) -> None:
        super().__init__(what, EQUAL)


class CutOff(RowError):
    """A sample that ended at a limit: what reads the end of a response knows nothing of it."""

    def __init__(self, what: str) -> None:
        super().__init__(what, CUT_OFF)


class BadLine(RowError):
    """A line that does not hold a row."""

    code = "DAT011"

    def __init__(self, what: str, reason: str = BROKEN_LINE) -> None:
        super().__init__(what, reason)


class EndOfReading(BadLine):
    """A line after which nothing can be read, so that it is never dropped."""


def need(row: Row, field: str) -> Any:
    if field not in row:
        raise MissingField(field, row)
    return row[field]


def names(fields: Iterable[str]) -> str:
    """Field names for a message: the first twenty, cut where long, escaped where a terminal could not show them."""
    shown = [name[:40] if name.isprintable() else ascii(name[:40]) for name in fields]
    more = [f"and {len(shown) - MAX_NAMES} more"] if len(shown) > MAX_NAMES else []
    return ", ".join(shown[:MAX_NAMES] + more)


def text_of(value: Any, field: str, if_empty: str = EMPTY_TEXT) -> str:
    """The text as it is; ``if_empty`` is the reason that a row with an empty one is counted under."""
    if not isinstance(value, str):
        kind = "null" if value is None else type(value).__name__
        raise RowError(f"'{field}': need text, got {kind}.")
    if not value.strip():
        raise RowError(f"'{field}': empty.", if_empty)
    if "\0" in value:
        raise RowError(f"'{field}': contains a NUL character.", BAD_CHARACTER)
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise RowError(f"'{field}': contains half of a surrogate pair.", BAD_CHARACTER) from None
    return value
