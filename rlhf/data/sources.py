"""Data sets by name: JSONL, whatever the datasets library loads, or the embedded world; every row a record."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from rlhf import storage
from rlhf.config.sections import DataSection
from rlhf.data import jsonl, rows
from rlhf.data.rows import EqualResponses, MissingField, RowError
from rlhf.data.settings import refuse_settings
from rlhf.demo import registry as demo
from rlhf.errors import Problem, RlhfError

KNOWN = {
    "demonstrations": ("prompt", "completion", "response", "messages"),
    "comparisons": ("prompt", "chosen", "rejected", "margin", "responses", "ranks", "scores", "provenance"),
    "prompts": ("prompt", "messages"),
}
EQUAL = "two differently ranked responses are equal"
COLLECTED = "preferences.jsonl"


@dataclass(frozen=True)
class Loaded:
    """A data set as records.

    Args:
        num_rows: rows read; ``num_dropped`` says how many of them are no record, by reason.
        digest: SHA-256 of the file, or of the records where there is no single file.
    """

    records: tuple[Any, ...]
    num_rows: int
    num_dropped: dict[str, int]
    digest: str
    source: str
    warnings: tuple[str, ...] = ()

    def notes(self) -> list[str]:
        """What a person should know of the rows that were read: the dropped ones by reason, and the warnings."""
        return [f"{count} rows dropped: {reason}" for reason, count in self.num_dropped.items()] + list(self.warnings)


def load_demonstrations(data: DataSection) -> Loaded:
    """Conversations that end with an assistant turn."""
    return _load(data, "demonstrations", rows.demonstration)


def load_comparisons(data: DataSection) -> Loaded:
    """Pairs and rankings. A collect run's directory stands for the preferences in it."""
    collected = Path(data.path) / COLLECTED
    if storage.is_file(collected):
        data = data.model_copy(update={"path": str(collected)})
    return _load(data, "comparisons", rows.comparison)


def load_prompts(data: DataSection) -> Loaded:
    """Conversations that wait for an answer."""
    return _load(data, "prompts", rows.prompt)


def raw_rows(data: DataSection) -> Iterator[tuple[str, dict[str, Any]]]:
    """(where, row) of each row as it stands in the data, for a look at its form before it is read as a record."""
    problems: list[Problem] = []
    yield from _rows(data, problems, [])
    if problems:
        raise RlhfError(*problems)


def check_dropped(num_rows: int, dropped: Mapping[str, int], max_dropped_fraction: float, where: str) -> None:
    """Raise DAT020 where more than the allowed share of the rows would be dropped; the message has the counts."""
    total = sum(dropped.values())
    if total > max_dropped_fraction * num_rows:
        counts = "; ".join(f"{count} {reason}" for reason, count in dropped.items() if count)
        what = f"{total} of {num_rows} rows ({total / num_rows:.1%}) would be dropped: {counts}."
        raise RlhfError(Problem("DAT020", where, what, "mend the rows, or raise max_dropped_fraction openly"))


def _load(data: DataSection, kind: str, record: Callable[[Mapping[str, Any], str], Any]) -> Loaded:
    _check_columns(data, kind)
    problems: list[Problem] = []
    missing: dict[str, list[Problem]] = {}
    records: list[Any] = []
    ignored: dict[str, int] = {}
    notes: list[str] = []
    present: set[str] = set()
    num_rows = num_equal = 0
    before = _stamp(data.path)
    for where, raw in islice(_rows(data, problems, notes), data.limit):
        num_rows += 1
        present |= raw.keys()
        row = _renamed(raw, data.columns)
        for name in row.keys() - set(KNOWN[kind]):
            ignored[name] = ignored.get(name, 0) + 1
        try:
            records.append(record(row, where))
        except EqualResponses as error:
            num_equal += 1
            if not data.drop_equal:
                problems.append(Problem("DAT012", where, str(error), "drop the row, or set drop_equal: true"))
        except MissingField as error:
            theirs = data.columns.get(error.field)
            fix = f"columns.{error.field} names '{theirs}'" if theirs else ""
            problems.append(Problem("DAT004", where, str(error), fix))
            missing.setdefault(error.field, []).append(problems[-1])
        except RowError as error:
            problems.append(Problem("DAT004", where, str(error)))
    _raise(data, problems, records, num_rows, present, missing, notes)
    dropped = {EQUAL: num_equal} if num_equal else {}
    check_dropped(num_rows, dropped, data.max_dropped_fraction, data.path)
    if not records:
        raise RlhfError(Problem("DAT013", data.path, f"no rows left: all {num_rows} were dropped."))
    if ignored:
        notes.append(f"ignored fields: {rows.names(sorted(ignored))}")
    digest = _digest(data, records)
    if _stamp(data.path) != before:
        raise RlhfError(Problem("DAT014", data.path, "changed while it was read.", "run again when it is written"))
    return Loaded(tuple(records), num_rows, dropped, digest, data.path, tuple(notes))


def _stamp(path: str) -> tuple[int, ...] | None:
    """Tells whether a file is the one that it was a moment ago; None where there is no file."""
    if not storage.is_file(Path(path)):
        return None
    found = Path(path).stat()
    return found.st_ino, found.st_size, found.st_mtime_ns


def _check_columns(data: DataSection, kind: str) -> None:
    known = KNOWN[kind]
    fix = f"one of {rows.names(known)}"
    wrong = [
        Problem("DAT003", data.path, f"columns.{ours}: {kind} have no such field.", fix)
        for ours in data.columns
        if ours not in known
    ]
    if wrong:
        raise RlhfError(*wrong)


def _raise(
    data: DataSection,
    problems: list[Problem],
    records: list[Any],
    num_rows: int,
    present: set[str],
    missing: Mapping[str, list[Problem]],
    notes: Sequence[str],
) -> None:
    for ours, theirs in data.columns.items():
        if num_rows and theirs not in present:
            what = f"no field '{theirs}' (columns.{ours}) in any row; found {rows.names(sorted(present))}."
            raise RlhfError(Problem("DAT003", data.path, what, "name a field that is there"))
    if problems and not records and len({problem.what for problem in problems}) == 1 and len(problems) == num_rows > 1:
        first = problems[0]
        fix = first.fix or "columns maps other names: {ours: theirs}"
        raise RlhfError(Problem(first.code, data.path, f"all {num_rows} rows: {first.what}", fix))
    for field, found in missing.items():
        if len(found) == num_rows > 1:
            what = f"all {num_rows} rows: no field '{field}'; found {rows.names(sorted(present))}."
            one = Problem("DAT003", data.path, what, "columns maps other names: {ours: theirs}")
            raise RlhfError(one, *(problem for problem in problems if problem.code != "DAT004"))
    if problems:
        raise RlhfError(*problems)
    if not num_rows:
        raise RlhfError(Problem("DAT013", data.path, "; ".join(("no rows", *notes)) + "."))


def _rows(data: DataSection, problems: list[Problem], notes: list[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    if demo.is_demo(data.path):
        refuse_settings(data, "the embedded world", "name", "split", "revision", fix=f"{data.path}?split=test")
        yield from ((f"{data.path}[{index}]", row) for index, row in enumerate(demo.rows(data.path)))
    elif data.path.endswith((".jsonl", ".jsonl.gz", ".json.gz", ".ndjson")):
        refuse_settings(data, "a JSONL file", "name", "split", "revision")
        yield from ((f"{data.path}:{number}", row) for number, row in jsonl.read(Path(data.path), problems, notes))
    else:
        # The one import inside a function below the command line: `datasets` takes seconds and pulls torch in, and
        # neither `rlhf --help` nor a check of JSONL files should pay for it.
        from rlhf.data import hub

        yield from hub.read(data)


def _renamed(row: dict[str, Any], columns: Mapping[str, str]) -> dict[str, Any]:
    if not columns:
        return row
    taken = set(columns.values())
    kept = {key: value for key, value in row.items() if key not in taken and key not in columns}
    return kept | {ours: row[theirs] for ours, theirs in columns.items() if theirs in row}


def _digest(data: DataSection, records: list[Any]) -> str:
    path = Path(data.path)
    if path.is_file():
        return storage.sha256(path)
    digest = hashlib.sha256()
    for record in records:
        held = vars(record) | {"where": None}  # the same rows under another path are the same
        digest.update(json.dumps(held, default=vars, sort_keys=True).encode())
    return digest.hexdigest()
