"""Every key of a config with type, bounds, default and meaning, from the fields themselves."""

from __future__ import annotations

import json
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from rlhf.config.load import sections_in
from rlhf.config.sections import Section

REQUIRED = "required"
SCHEMA = "https://json-schema.org/draft/2020-12/schema"
WORDS = {str: "text", int: "whole number", float: "number", bool: "true or false", type(None): "null"}
BOUNDS = {"gt": "> {}", "ge": ">= {}", "lt": "< {}", "le": "<= {}", "min_length": "at least {}"}
TITLE = """# Config reference

Every key of every config, written by `rlhf config > configs/REFERENCE.md` from the fields in `rlhf/config/`. `[]`
stands for the items of a list. `rlhf config STAGE` prints one of these tables, `rlhf config STAGE --schema` the JSON
schema."""


@dataclass(frozen=True)
class Entry:
    """One key: ``default`` is as YAML writes it, or REQUIRED; empty for a section, whose keys follow."""

    key: str
    kind: str
    default: str
    meaning: str


def entries(config_class: type[BaseModel], prefix: str = "", default: BaseModel | None = None) -> Iterator[Entry]:
    """The keys in the order of the class. ``default``: the section that stands where the config names none."""
    for name, field in config_class.model_fields.items():
        key, meaning, section = prefix + name, _meaning(config_class, name), field.annotation
        required = default is None and field.is_required()
        value = None if required else field.get_default(call_default_factory=True)
        value = getattr(default, name) if default else value
        if isinstance(section, type) and issubclass(section, BaseModel):
            yield Entry(key, "section", REQUIRED if required else "", meaning or _docstring(section))
            yield from entries(section, f"{key}.", value)
            continue
        kind = kind_of(section, field.metadata)
        yield Entry(key, kind, REQUIRED if required else _written(value), meaning)
        inside = value if isinstance(value, BaseModel) else None
        for inner in dict.fromkeys(sections_in(section)):
            yield from entries(inner, f"{key}[]." if "list of sections" in kind else f"{key}.", inside)


def kind_of(annotation: Any, metadata: Sequence[Any] = ()) -> str:
    """A type in words, with its bounds."""
    origin, inner = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        return kind_of(inner[0], [*inner[1:], *metadata])
    if origin in (typing.Union, types.UnionType):
        return ", or ".join(dict.fromkeys(kind_of(one, metadata) for one in inner))
    if origin is typing.Literal:
        return " or ".join(filter(None, [", ".join(map(str, inner[:-1])), str(inner[-1])]))
    if origin is list:
        return _bounded(f"list of {kind_of(inner[0])}".replace("section", "sections"), metadata)
    if origin is dict:
        return f"mapping of {kind_of(inner[0])} to {kind_of(inner[1])}"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return "section"
    return WORDS[annotation] if annotation in (str, bool, type(None)) else _bounded(WORDS[annotation], metadata)


def table(config_class: type[BaseModel]) -> str:
    """For a terminal: key, default, meaning and type in columns."""
    found = list(entries(config_class))
    widths = [max(len(entry.key) for entry in found), max(len(entry.default) for entry in found)]
    lines = [f"{entry.key:{widths[0]}}  {entry.default:{widths[1]}}  {entry.meaning} ({entry.kind})" for entry in found]
    return "\n".join([_docstring(config_class), "", *lines])


def document(classes: Mapping[str, type[BaseModel]]) -> str:
    """All configs as Markdown tables."""
    parts = [TITLE]
    for name, config_class in classes.items():
        parts += [f"## {name}", _docstring(config_class)]
        rows = ["| key | type | default | meaning |", "|---|---|---|---|"]
        for entry in entries(config_class):
            default = f"`{entry.default}`" if entry.default not in ("", REQUIRED) else entry.default
            rows.append(f"| `{entry.key}` | {entry.kind} | {default} | {entry.meaning} |".replace("  ", " "))
        parts.append("\n".join(rows))
    return "\n\n".join(parts) + "\n"


def schema(config_class: type[BaseModel]) -> dict[str, Any]:
    """JSON schema of a config, for editors."""
    return {"$schema": SCHEMA, **config_class.model_json_schema()}


def _bounded(words: str, metadata: Sequence[Any]) -> str:
    """Bounds stand in pydantic's metadata, which a Field inside Annotated wraps once more."""
    flat = [one for item in metadata for one in (item.metadata if isinstance(item, FieldInfo) else [item])]
    said = [
        text.format(value)
        for item in flat
        for name, text in BOUNDS.items()
        if (value := getattr(item, name, None)) is not None
    ]
    return " ".join([words, " and ".join(said)]).strip()


def _meaning(config_class: type[BaseModel], name: str) -> str:
    """The field's own description, or that of the field which it overrides."""
    owners = [owner for owner in config_class.__mro__ if issubclass(owner, Section) and name in owner.model_fields]
    return next((text for owner in owners if (text := owner.model_fields[name].description)), "")


def _docstring(config_class: type[BaseModel]) -> str:
    return (config_class.__doc__ or "").strip().split("\n")[0]


def _written(value: Any) -> str:
    if isinstance(value, str | BaseModel):
        return value if isinstance(value, str) else ""
    if isinstance(value, list | dict) and value:
        plain = [item.model_dump(exclude_defaults=True) if isinstance(item, BaseModel) else item for item in value]
        return json.dumps(plain)
    return repr(value) if isinstance(value, float) else json.dumps(value)
