"""JSON lines on the standard streams, for commands that stand in a shell pipe."""

from __future__ import annotations

import json
import logging
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rlhf.config.sections import DataSection
from rlhf.data.reading import FIX, OR_DROP
from rlhf.data.rows import names
from rlhf.data.sources import Loaded, raw_rows
from rlhf.errors import Problem, RlhfError
from rlhf.runs import storage

log = logging.getLogger("rlhf")


def load(read: Callable[[DataSection], Loaded], source: str) -> tuple[Any, ...]:
    """The records of ``source``; ``-`` is JSONL on standard input, whose errors name lines. Warnings are logged."""
    return load_with(read, source, ())[0]


def load_with(
    read: Callable[[DataSection], Loaded], source: str, fields: Sequence[str], optional: Sequence[str] = ()
) -> tuple[tuple[Any, ...], dict[str, list[str]]]:
    """The same, and the texts (or JSON) of further fields, one a record; of ``optional`` ones null where there is none.

    Raises:
        RlhfError: DAT004 for a row without one of the fields.
    """
    with tempfile.TemporaryDirectory(prefix="rlhf-") as directory:
        path = source
        if source == "-":
            path = str(Path(directory) / "stdin.jsonl")
            Path(path).write_bytes(sys.stdin.buffer.read())
        data = DataSection(path=path, on_bad_row="error")
        loaded = _read(read, data)
        rows = dict(raw_rows(data)) if fields or optional else {}
    for note in loaded.notes():
        log.warning("%s: %s.", source, note)
    lacking = [
        Problem("DAT004", record.where, f"'{field}': missing (this row has: {names(rows[record.where])}).", FIX)
        for record in loaded.records
        for field in fields
        if field not in rows[record.where]
    ]
    if lacking:
        raise RlhfError(*lacking)
    wanted = (*fields, *optional)
    found = {field: [_text(rows[record.where].get(field)) for record in loaded.records] for field in wanted}
    return loaded.records, found


def _read(read: Callable[[DataSection], Loaded], data: DataSection) -> Loaded:
    """The data set. A bad row is refused: a row is written for each one that is read, and none may be missing."""
    try:
        return read(data)
    except RlhfError as error:
        raise RlhfError(*(replace(one, fix=one.fix.replace(OR_DROP, "")) for one in error.problems)) from None


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def write(out: str, rows: Iterable[Mapping[str, Any]]) -> None:
    """To the file ``out``, whole, or to standard output where it is ``-``."""
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    if out == "-":
        sys.stdout.write(text)
        sys.stdout.flush()
    else:
        storage.write_text(Path(out), text)
