"""The rows of one source as they stand there, under our names where the config maps them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from rlhf.config.sections import SourceSection
from rlhf.data import jsonl, tables
from rlhf.data.rows import BadLine
from rlhf.data.settings import refuse_settings
from rlhf.data.tables import ATTRIBUTE
from rlhf.demo import catalogue as demo
from rlhf.findings import Findings
from rlhf.runs import storage

LINES, ARRAYS = (".jsonl", ".jsonl.gz", ".ndjson"), (".json", ".json.gz")
TABLES = (".csv", ".csv.gz", ".tsv", ".tsv.gz")


def stamp(path: str) -> tuple[int, ...] | None:
    """Tells whether a file is the one that it was a moment ago; None where there is no file."""
    if not storage.is_file(Path(path)):
        return None
    found = Path(path).stat()
    return found.st_ino, found.st_size, found.st_mtime_ns


def read(source: SourceSection, findings: Findings) -> Iterator[tuple[str, dict[str, Any] | BadLine]]:
    """(place, row or what is wrong with the line) of everything that stands in the source."""
    path = Path(source.path)
    if demo.is_demo(source.path):
        refuse_settings(source, "the embedded world", "name", "split", "revision", fix=f"{source.path}?split=test")
        yield from ((f"{source.path}[{index}]", row) for index, row in enumerate(demo.rows(source.path)))
    elif source.path.endswith(LINES):
        refuse_settings(source, "a JSONL file", "name", "split", "revision")
        yield from ((f"{source.path}:{number}", row) for number, row in jsonl.read(path, findings))
    elif source.path.endswith(ARRAYS):
        refuse_settings(source, "a JSON file", "name", "split", "revision")
        yield from jsonl.read_array(path, findings)
    elif source.path.endswith(TABLES):
        refuse_settings(source, "a table", "name", "split", "revision")
        yield from ((f"{source.path}:{number}", row) for number, row in tables.read(path, source.columns, findings))
    else:
        # The one import inside a function below the command line: `datasets` takes seconds and pulls torch in, and
        # neither `rlhf --help` nor a check of JSONL files should pay for it.
        from rlhf.data import hub

        yield from hub.read(source)


def renamed(row: dict[str, Any], columns: Mapping[str, str]) -> dict[str, Any]:
    """The row under our names; ``attributes.NAME`` puts a column into the object ``attributes``."""
    if not columns:
        return row
    taken = set(columns.values())
    kept = {key: value for key, value in row.items() if key not in taken and key not in columns}
    named = {ours: row[theirs] for ours, theirs in columns.items() if theirs in row}
    rated = {ours.removeprefix(ATTRIBUTE): named.pop(ours) for ours in [*named] if ours.startswith(ATTRIBUTE)}
    return kept | named | ({"attributes": rated} if rated else {})


def digest(source: SourceSection, records: list[Any]) -> str:
    path = Path(source.path)
    if path.is_file():
        return storage.sha256(path)
    digest = hashlib.sha256()
    for record in records:
        held = vars(record) | {"where": None}  # the same rows under another path are the same
        held = {name: value for name, value in held.items() if name not in ("joined", "num_rows")}
        held = {name: value for name, value in held.items() if name != "attributes" or value}
        digest.update(json.dumps(held, default=vars, sort_keys=True).encode())
    return digest.hexdigest()
