"""JSON lines and JSON arrays, read strictly: every line or element is an object, or what is wrong with it."""

from __future__ import annotations

import io
import json
import re
import reprlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rlhf.data import open_file
from rlhf.data.rows import NOT_UTF8, BadLine, EndOfReading
from rlhf.errors import Problem, RlhfError
from rlhf.findings import Findings

MAX_LINE = 16 << 20
BOM = b"\xef\xbb\xbf"
Item = dict[str, Any] | BadLine


def read(path: Path, findings: Findings) -> Iterator[tuple[int, Item]]:
    """(line number, object, or what is wrong) of each line.

    A byte order mark is accepted, blank lines are skipped; a note says how many there were. Reading ends at a line
    that is too long to be one.

    Raises:
        RlhfError: DAT010 if the file cannot be opened, or is another format under a JSONL name.
    """
    with open_file.binary(path, "JSONL") as stream:
        yield from _lines(stream, findings)


def read_array(path: Path, findings: Findings) -> Iterator[tuple[str, Item]]:
    """(place, object, or what is wrong) of each element of a file that is one array, or of each line of one that is
    not.

    Raises:
        RlhfError: as ``read``; DAT011 for an array whose elements cannot be told apart.
    """
    with open_file.binary(path, "JSON") as stream:
        head = stream.peek(1).removeprefix(BOM).lstrip()
        if head[:1] != b"[":
            yield from ((f"{path}:{number}", item) for number, item in _lines(stream, findings))
            return
        text = stream.read().removeprefix(BOM).decode("utf-8", "surrogateescape")
    for index, item in enumerate(_elements(text, str(path))):
        yield f"{path}[{index}]", item


def parse(line: bytes) -> dict[str, Any]:
    """One object; BadLine says what is wrong with the line."""
    try:
        text = line.decode("utf-8").rstrip("\r\n")
    except UnicodeDecodeError as error:
        what = f"byte 0x{line[error.start]:02x} at byte {error.start + 1} is not UTF-8."
        raise BadLine(what, NOT_UTF8) from None
    try:
        value = json.loads(text, object_pairs_hook=_no_twice, parse_constant=_no_constant)
    except json.JSONDecodeError as error:
        raise BadLine(f"invalid JSON at column {error.colno}: {error.msg}. It begins: {text[:40]!r}") from None
    except RecursionError:
        raise BadLine("nested too deeply.") from None
    except BadLine:
        raise
    except ValueError:  # the interpreter's own limit on the digits of a whole number
        raise BadLine("a whole number has too many digits.") from None
    if not isinstance(value, dict):
        raise BadLine(f"need an object, got {type(value).__name__}.")
    return value


def _lines(stream: io.BufferedReader, findings: Findings) -> Iterator[tuple[int, Item]]:
    number = num_blank = 0
    while line := stream.readline(MAX_LINE + 1):
        number += 1
        if len(line) > MAX_LINE:
            yield number, EndOfReading("line longer than 16 MiB; nothing after it was read.")
            return
        if number == 1:
            line = line.removeprefix(BOM)
        if not line.strip():
            num_blank += 1
            continue
        yield number, _item(line)
    if num_blank:
        findings.note(f"blank lines skipped: {num_blank}")


def _item(text: bytes) -> Item:
    try:
        return parse(text)
    except BadLine as error:
        return error


def _elements(text: str, path: str) -> Iterator[Item]:
    """The elements of an array: each is found leniently and then parsed as strictly as a line."""
    lenient = json.JSONDecoder(parse_int=lambda _: 0)
    space, place = re.compile(r"\s*"), text.index("[") + 1

    def after_space(start: int) -> int:
        found = space.match(text, start)
        return found.end() if found else start

    place = after_space(place)
    is_first = True
    while text[place : place + 1] != "]":
        if not is_first:
            if text[place : place + 1] != ",":
                raise _no_array(path, text, place, "',' or ']' expected")
            place = after_space(place + 1)
        try:
            _, end = lenient.raw_decode(text, place)
        except json.JSONDecodeError as error:
            raise _no_array(path, text, error.pos, error.msg) from None
        except RecursionError:
            raise _no_array(path, text, place, "nested too deeply") from None
        yield _item(text[place:end].encode("utf-8", "surrogateescape"))
        place, is_first = after_space(end), False
    if text[place + 1 :].strip():
        raise _no_array(path, text, place + 1, "something follows the array")


def _no_array(path: str, text: str, place: int, what: str) -> RlhfError:
    line = text.count("\n", 0, place) + 1
    column = place - text.rfind("\n", 0, place)
    fix = "write it anew as one array of objects, or as one object a line (.jsonl)"
    return RlhfError(Problem("DAT011", f"{path}:{line}", f"invalid JSON at column {column}: {what}.", fix))


def _no_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        (twice, _), *_ = Counter(key for key, _ in pairs).most_common(1)
        raise BadLine(f"key {reprlib.repr(twice)} stands twice.")
    return found


def _no_constant(name: str) -> None:
    raise BadLine(f"{name} is not JSON.")
