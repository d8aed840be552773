"""YAML as people mean it: 1e-5 is a number, a key counts once, and every value knows its line."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from rlhf.errors import Problem, RlhfError
from rlhf.findings import Findings

MAX_BYTES, MAX_DEPTH, MAX_ALIASES, MAX_DIGITS, MAX_SHOWN = 1 << 20, 32, 100, 100, 80
MAX_EVENTS = 10_000
Place = tuple[int, int]
Places = dict[tuple[str | int, ...], Place]

UNWRITABLE = re.compile("[\0\ud800-\udfff]")
_INT = re.compile(r"[-+]?(0|[1-9][0-9]*)$")
_FLOAT = re.compile(r"[-+]?(\d+\.\d*|\.\d+|\d+(?=[eE]))([eE][-+]?\d+)?$")
_SPECIAL = {
    "": None,
    "~": None,
    "null": None,
    "true": True,
    "false": False,
    ".inf": float("inf"),
    "-.inf": float("-inf"),
    ".nan": float("nan"),
}
_PLAIN_TAGS = ("tag:yaml.org,2002:", "!")


def read_file(path: Path) -> tuple[Any, Places]:
    """The value in a YAML file, and the line and column (from 1) of every key and item by its path.

    Raises:
        RlhfError: CFG for what cannot be read or parsed, SEC for tags, too many aliases, too deep or too large.
    """
    try:
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except FileNotFoundError:
        raise RlhfError(Problem("CFG001", str(path), "no such file.", "name a config file with -c")) from None
    except IsADirectoryError:
        what, fix = "is a directory, need a YAML file.", "name a file in it"
        raise RlhfError(Problem("CFG001", str(path), what, fix)) from None
    except OSError as error:
        raise RlhfError(Problem("CFG001", str(path), f"cannot be opened: {error.strerror}.")) from None
    if len(data) > MAX_BYTES:
        raise RlhfError(Problem("SEC001", str(path), "larger than the limit of 1 MiB.", "a config has a few lines"))
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        before = data[: error.start].split(b"\n")
        what = f"byte 0x{data[error.start]:02x} is not UTF-8."
        raise RlhfError(
            Problem("CFG001", f"{path}:{len(before)}:{len(before[-1]) + 1}", what, "save the file as UTF-8")
        ) from None
    value, places = read_text(text, str(path))
    if value is None:
        raise RlhfError(Problem("CFG001", str(path), "empty.", "write key: value"))
    return value, places


def read_text(text: str, name: str) -> tuple[Any, Places]:
    """As ``read_file``, for text; ``name`` stands in the messages."""
    try:
        _check_limits(text, name)
        node = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"{name}:{mark.line + 1}:{mark.column + 1}" if mark else name
        what, fix = shown((error.problem or str(error)).replace("'\\t'", "a tab")), ""
        if "\\t" in repr(error.problem):
            fix = "indent with spaces"
        raise RlhfError(Problem("CFG002", where, f"not valid YAML: {what}.", fix)) from None
    except yaml.YAMLError as error:
        raise RlhfError(Problem("CFG002", name, f"not valid YAML: {shown(' '.join(str(error).split()))}.")) from None
    places: Places = {}
    findings = Findings()
    value = _value(node, (), name, places, findings) if node is not None else None
    findings.refuse()
    return value, places


def _check_limits(text: str, name: str) -> None:
    depth = aliases = 0
    for number, event in enumerate(yaml.parse(text, Loader=yaml.SafeLoader)):
        if number > MAX_EVENTS:
            raise RlhfError(Problem("SEC003", name, f"more than {MAX_EVENTS:,} values.", "a config has a few lines"))
        where = f"{name}:{event.start_mark.line + 1 if event.start_mark else 1}"
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1
        elif isinstance(event, yaml.AliasEvent):
            aliases += 1
        tag = getattr(event, "tag", None)
        if tag not in (None, "!"):
            raise RlhfError(Problem("SEC002", where, f"tag {shown(tag)} refused.", "write plain values"))
        if depth > MAX_DEPTH:
            raise RlhfError(Problem("SEC003", where, f"nested deeper than {MAX_DEPTH} levels."))
        if aliases > MAX_ALIASES:
            raise RlhfError(Problem("SEC003", where, f"more than {MAX_ALIASES} aliases."))


def _value(node: yaml.Node, path: tuple[str | int, ...], name: str, places: Places, findings: Findings) -> Any:
    places.setdefault(path, _place(node))
    if len(path) > MAX_DEPTH:
        raise RlhfError(Problem("SEC003", name, f"nested deeper than {MAX_DEPTH} levels."))
    if len(places) > 10_000:
        raise RlhfError(Problem("SEC003", name, "aliases expand to more than 10,000 values."))
    if isinstance(node, yaml.ScalarNode):
        _refuse_unwritable(node, name, findings)
        return scalar(node.value) if node.style is None else node.value
    if isinstance(node, yaml.SequenceNode):
        return [_value(item, (*path, index), name, places, findings) for index, item in enumerate(node.value)]
    assert isinstance(node, yaml.MappingNode)
    return dict(_pairs(node, path, name, places, findings))


def _pairs(
    node: yaml.MappingNode, path: tuple[str | int, ...], name: str, places: Places, findings: Findings
) -> Iterator[tuple[str, Any]]:
    first_line: dict[str, int] = {}
    for key_node, value_node in node.value:
        line, column = _place(key_node)
        if not isinstance(key_node, yaml.ScalarNode):
            findings.add(Problem("CFG002", f"{name}:{line}:{column}", "a key must be a word."))
            continue
        key = str(key_node.value)
        if _refuse_unwritable(key_node, name, findings):
            continue
        if key in first_line:
            what = f"already set at line {first_line[key]}."
            findings.add(Problem("CFG004", f"{name}:{line}:{column} {shown(key)}", what, "keep one"))
            continue
        first_line[key] = line
        places[(*path, key)] = (line, column)
        yield key, _value(value_node, (*path, key), name, places, findings)


def _refuse_unwritable(node: yaml.ScalarNode, name: str, findings: Findings) -> bool:
    """An escape can write what no path and no file can hold."""
    if not (found := UNWRITABLE.search(node.value)):
        return False
    line, column = _place(node)
    what = f"contains the character {found[0]!a}, which no text can hold."
    findings.add(Problem("CFG002", f"{name}:{line}:{column}", what, "remove it"))
    return True


def scalar(text: str) -> Any:
    """A plain scalar: null, true, false, an integer, a number, else the text as it stands (also yes, no and 010)."""
    if (word := text.lower()) in _SPECIAL:
        return _SPECIAL[word]
    if _INT.match(text) and len(text) <= MAX_DIGITS:
        return int(text)
    if _FLOAT.match(text):
        return float(text)
    return text


def shown(text: str) -> str:
    """Text of a config for a message: cut where long, escaped where a terminal could not show it."""
    text = text if text.isprintable() else ascii(text)[1:-1]
    return text if len(text) <= MAX_SHOWN else f"{text[: MAX_SHOWN - 3]}..."


def _place(node: yaml.Node) -> Place:
    return node.start_mark.line + 1, node.start_mark.column + 1
