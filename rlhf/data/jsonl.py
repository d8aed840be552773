"""JSON lines, read strictly: every refusal names its file and line."""

from __future__ import annotations

import gzip
import io
import json
import reprlib
import zlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rlhf.errors import Problem, RlhfError

MAX_LINE = 16 << 20
SIGNATURES = {b"\x1f\x8b": "gzip", b"PAR1": "parquet", b"PK\x03\x04": "zip"}


class _Refused(ValueError):
    pass


def read(path: Path, problems: list[Problem], notes: list[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line number, object) of each line; what is wrong with a line goes to ``problems`` and the next one is read.

    A byte order mark is accepted, blank lines are skipped; ``notes`` says how many there were. Reading ends at a line
    that is too long to be one.

    Raises:
        RlhfError: DAT010 if the file cannot be opened, or is another format under a JSONL name.
    """
    try:
        if not path.exists():
            raise RlhfError(Problem("DAT010", str(path), "no such file.", "check the path"))
        if path.is_dir():
            raise RlhfError(Problem("DAT010", str(path), "is a directory, need a JSONL file."))
        raw = path.open("rb")
    except OSError as error:
        raise RlhfError(Problem("DAT010", str(path), f"cannot be opened: {error.strerror}.")) from None
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
            yield from _lines(io.BufferedReader(stream), path, problems, notes)
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise RlhfError(Problem("DAT010", str(path), f"not a whole gzip file: {error}.")) from None


def _lines(
    stream: io.BufferedReader, path: Path, problems: list[Problem], notes: list[str]
) -> Iterator[tuple[int, dict[str, Any]]]:
    number = num_blank = 0
    while line := stream.readline(MAX_LINE + 1):
        number += 1
        if len(line) > MAX_LINE:
            problems.append(
                Problem("DAT011", f"{path}:{number}", "line longer than 16 MiB; nothing after it was read.")
            )
            return
        if number == 1:
            line = line.removeprefix(b"\xef\xbb\xbf")
        if not line.strip():
            num_blank += 1
            continue
        try:
            yield number, parse(line)
        except _Refused as error:
            problems.append(Problem("DAT011", f"{path}:{number}", str(error)))
    if num_blank:
        notes.append(f"blank lines skipped: {num_blank}")


def parse(line: bytes) -> dict[str, Any]:
    """One object; a subclass of ValueError says what is wrong with the line."""
    try:
        text = line.decode("utf-8").rstrip("\r\n")
    except UnicodeDecodeError as error:
        raise _Refused(f"byte 0x{line[error.start]:02x} at byte {error.start + 1} is not UTF-8.") from None
    try:
        value = json.loads(text, object_pairs_hook=_no_twice, parse_constant=_no_constant)
    except json.JSONDecodeError as error:
        raise _Refused(f"invalid JSON at column {error.colno}: {error.msg}. It begins: {text[:40]!r}") from None
    except RecursionError:
        raise _Refused("nested too deeply.") from None
    except _Refused:
        raise
    except ValueError:  # the interpreter's own limit on the digits of a whole number
        raise _Refused("a whole number has too many digits.") from None
    if not isinstance(value, dict):
        raise _Refused(f"need an object, got {type(value).__name__}.")
    return value


def _no_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        (twice, _), *_ = Counter(key for key, _ in pairs).most_common(1)
        raise _Refused(f"key {reprlib.repr(twice)} stands twice.")
    return found


def _no_constant(name: str) -> None:
    raise _Refused(f"{name} is not JSON.")
