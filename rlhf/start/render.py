"""A config as YAML with its reasons: one key a line, the comment behind it or above it."""

from __future__ import annotations

import json
import re
import textwrap
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from rlhf.config import yaml_reader

WIDTH, COLUMN = 118, 40
PLAIN = re.compile(r"[A-Za-z_./][\w./-]*", re.ASCII)


@dataclass(frozen=True)
class Choice:
    """A value, and why it is this one."""

    value: Any
    why: str = ""


Tree = Mapping[str, Any]


def render(title: str, tree: Tree) -> str:
    """The whole file; a leaf is a ``Choice`` or a plain value, a mapping is a section."""
    return "\n".join([*_comment(title, ""), *_lines(tree, "")]) + "\n"


def values(tree: Tree) -> dict[str, Any]:
    """The same without comments."""
    return {
        key: values(entry) if isinstance(entry, Mapping) else entry.value if isinstance(entry, Choice) else entry
        for key, entry in tree.items()
    }


def scalar(value: Any) -> str:
    """A value as the project's reader takes it: 3e-05 is a number there, and text that could be another is quoted."""
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, str) and PLAIN.fullmatch(value) and yaml_reader.scalar(value) == value:
        return value
    if isinstance(value, str):
        escaped = value.replace("\\", "\\\\").replace('"', '\\"')
        return '"' + "".join(sign if sign.isprintable() else f"\\U{ord(sign):08x}" for sign in escaped) + '"'
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key}: {scalar(entry)}" for key, entry in value.items()) + "}"
    if isinstance(value, list):
        return f"[{', '.join(map(scalar, value))}]"
    return json.dumps(value)


def _lines(tree: Tree, indent: str) -> Iterator[str]:
    for key, entry in tree.items():
        if isinstance(entry, Mapping):
            yield f"{indent}{key}:"
            yield from _lines(entry, indent + "  ")
            continue
        if isinstance(entry, list) and any(isinstance(item, Mapping) for item in entry):
            yield f"{indent}{key}:"
            yield from (f"{indent}  - {scalar(item)}" for item in entry)
            continue
        choice = entry if isinstance(entry, Choice) else Choice(entry)
        line = f"{indent}{key}: {scalar(choice.value)}"
        beside = f"{line:<{COLUMN}}  # {choice.why}"
        if not choice.why:
            yield line
        elif len(beside) <= WIDTH:
            yield beside
        else:
            yield from _comment(choice.why, indent)
            yield line


def _comment(text: str, indent: str) -> list[str]:
    lines = textwrap.wrap(text, WIDTH - len(indent) - 2, break_long_words=False, break_on_hyphens=False)
    return [f"{indent}# {line}" for line in lines]
