"""JSON lines, read strictly: every refusal names its file and line."""

from __future__ import annotations

import gzip
import io
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rlhf.errors import Problem, RlhfError

MAX_LINE = 16 << 20
SIGNATURES = {b"\x1f\x8b": "gzip", b"PAR1": "parquet", b"PK\x03\x04": "zip"}


class _Refused(ValueError):
    pass


def read(path: Path, problems: list[Problem]) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line number, object) of each line; what is wrong with a line goes to ``problems`` and the next one is read.

    A byte order mark is accepted, blank lines are skipped.

    Raises:
        RlhfError: DAT010 if the file cannot be opened, or is another format under a JSONL name.
    """
    if not path.exists():
        raise RlhfError(Problem("DAT010", str(path), "no such file."))
    if path.is_dir():
        raise RlhfError(Problem("DAT010", str(path), "is a directory, need a JSONL file."))
    raw = path.open("rb")
    with raw:
        head = raw.read(4)
        raw.seek(0)
        kind = next((name for mark, name in SIGNATURES.items() if head.startswith(mark)), None)
        if path.suffix == ".gz":
            stream: Any = gzip.GzipFile(fileobj=raw)
        elif kind:
            raise RlhfError(Problem("DAT010", str(path), f"looks like {kind}, not JSONL.", "give it its own suffix"))
        else:
            stream = raw
        try:
            yield from _lines(io.BufferedReader(stream), path, problems)
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise RlhfError(Problem("DAT010", str(path), f"not a whole gzip file: {error}.")) from None


def _lines(stream: io.BufferedReader, path: Path, problems: list[Problem]) -> Iterator[tuple[int, dict[str, Any]]]:
    number = 0
    while line := stream.readline(MAX_LINE + 1):
        number += 1
        if len(line) > MAX_LINE:
            raise RlhfError(Problem("DAT011", f"{path}:{number}", "line longer than 16 MiB."))
        if number == 1:
            line = line.removeprefix(b"\xef\xbb\xbf")
        if not line.strip():
            continue
        try:
            yield number, parse(line)
        except _Refused as error:
            problems.append(Problem("DAT011", f"{path}:{number}", str(error)))


def parse(line: bytes) -> dict[str, Any]:
    """One object; a subclass of ValueError says what is wrong with the line."""
    try:
        text = line.decode("utf-8").rstrip("\r\n")
    except UnicodeDecodeError as error:
        raise _Refused(f"byte 0x{line[error.start]:02x} at byte {error.start + 1} is not UTF-8.") from None
    try:
        value = json.loads(text, object_pairs_hook=_no_twice, parse_constant=_no_constant)
    except json.JSONDecodeError as error:
        raise _Refused(f"invalid JSON at column {error.colno}: {error.msg}. It begins: {text[:40]}") from None
    except RecursionError:
        raise _Refused("nested too deeply.") from None
    if not isinstance(value, dict):
        raise _Refused(f"need an object, got {type(value).__name__}.")
    return value


def _no_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    keys = [key for key, _ in pairs]
    if twice := next((key for key in keys if keys.count(key) > 1), None):
        raise _Refused(f"key '{twice}' stands twice.")
    return dict(pairs)


def _no_constant(name: str) -> None:
    raise _Refused(f"{name} is not JSON.")
