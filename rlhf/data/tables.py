"""CSV and TSV: every cell is text, but where a field of ours is a number or true and false."""

from __future__ import annotations

import csv
import io
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from rlhf.data import open_file
from rlhf.data.rows import NOT_UTF8, BadLine, names
from rlhf.errors import Problem, RlhfError
from rlhf.findings import Findings

LONGEST_CELL = 16 << 20
ATTRIBUTE = "attributes."
NUMBERS = ("margin", "probability")
TRUTHS = {"label", "finished"}
SAID = {"true": True, "false": False}


def read(path: Path, columns: Mapping[str, str], findings: Findings) -> Iterator[tuple[int, dict[str, Any] | BadLine]]:
    """(line number, row by the names of the header, or what is wrong) of each row; an empty cell is no field.

    Args:
        columns: our field -> its name in the header.

    Raises:
        RlhfError: DAT010 if the file cannot be opened, DAT011 for a header with a name twice, and for quotes after
            which rows cannot be told apart.
    """
    csv.field_size_limit(LONGEST_CELL)
    ours = {theirs: name for name, theirs in columns.items()}
    separator = "\t" if ".tsv" in path.suffixes else ","
    with open_file.binary(path, "TSV" if separator == "\t" else "CSV") as stream:
        text = io.TextIOWrapper(stream, encoding="utf-8-sig", errors="surrogateescape", newline="")
        found = csv.reader(text, delimiter=separator, strict=True)
        header: list[str] = []
        num_blank = 0
        while True:
            start = found.line_num + 1
            try:
                cells = next(found, None)
            except csv.Error as error:
                what = f"broken quotes or cells: {error}. Rows after it cannot be told apart."
                fix = "put cells with quotes or line breaks into quotes, and double the quotes in them"
                raise RlhfError(Problem("DAT011", f"{path}:{start}", what, fix)) from None
            if cells is None:
                break
            if not cells:
                num_blank += 1
            elif not header:
                header = _header(cells, f"{path}:{start}")
            else:
                yield start, _row(header, cells, ours)
        if num_blank:
            findings.note(f"blank lines skipped: {num_blank}")


def _header(cells: list[str], where: str) -> list[str]:
    header = [name or f"Unnamed: {index}" for index, name in enumerate(cells)]
    twice = [name for name, count in Counter(header).items() if count > 1]
    if twice:
        what = f"the header has twice: {names(twice)}."
        raise RlhfError(Problem("DAT011", where, what, "give every column a name of its own"))
    return header


def _row(header: list[str], cells: list[str], ours: Mapping[str, str]) -> dict[str, Any] | BadLine:
    if len(cells) != len(header):
        return BadLine(f"{len(cells)} cells, and the header names {len(header)}.")
    try:
        "".join(cells).encode("utf-8")
    except UnicodeEncodeError as error:  # a byte that is no letter was read as half of one
        byte = ord(error.object[error.start]) & 0xFF
        return BadLine(f"byte 0x{byte:02x} is not UTF-8.", NOT_UTF8)
    return {name: _value(cell, ours.get(name, name)) for name, cell in zip(header, cells, strict=True) if cell.strip()}


def _value(cell: str, field: str) -> Any:
    """The text; as what the field is where it can be read so. What cannot is refused as that field's value."""
    if field in TRUTHS:
        return SAID.get(cell.strip().lower(), cell)
    if field in NUMBERS or field.startswith(ATTRIBUTE):
        try:
            return float(cell)
        except ValueError:
            return cell
    return cell
