"""The keys of a config by its fields: where each stands, which are gates, and which ones configs had once."""

from __future__ import annotations

import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from rlhf.config.rewards import RewardSource
from rlhf.config.sections import DataSection, Section

ANY = "*"
Pattern = tuple[str, ...]
"""Names of fields from the outside in; ANY stands for the number of a list's item and the key of a mapping."""


@dataclass(frozen=True)
class Gone:
    """A key that a section had once.

    Args:
        now: the key of the same section that took its place; None: nothing did.
        values: (old value, value of ``now``); where nothing took its place, the old values that meant what is always
            done today.
    """

    now: str | None
    values: tuple[tuple[Any, Any], ...]


GONE: dict[type[Section], dict[str, Gone]] = {
    DataSection: {"drop_equal": Gone("on_bad_row", ((True, "drop"), (False, "error")))},
    RewardSource: {"accept_failed": Gone("accept", ((True, "failed"), (False, None)))},
}


@cache
def fields_of(config_class: type[BaseModel]) -> dict[Pattern, FieldInfo]:
    """Every field of a config, those of its sections included, through lists, mappings and unions."""
    found: dict[Pattern, FieldInfo] = {}
    for name, field in config_class.model_fields.items():
        found[(name,)] = field
        for place, section in places_in(field.annotation):
            found |= {(name, *place, *inner): own for inner, own in fields_of(section).items()}
    return found


def places_in(annotation: Any, place: Pattern = ()) -> Iterator[tuple[Pattern, type[BaseModel]]]:
    """The sections that a type holds, alone or in lists, mappings and unions, and where in it."""
    origin, inner = typing.get_origin(annotation), typing.get_args(annotation)
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield place, annotation
    elif origin in (typing.Union, types.UnionType):
        found = [item for one in inner for item in places_in(one, place)]
        yield from (item for item in found if not any(_is_kind_of(item[1], other) for _, other in found))
    elif origin is typing.Annotated:
        yield from places_in(inner[0], place)
    elif origin in (list, dict):
        yield from places_in(inner[-1], (*place, ANY))


def default_of(config_class: type[BaseModel], name: str) -> Any:
    """A field's default; of a field that a kind must have, and that its other kinds need not, the others' default."""
    owners = [owner for owner in config_class.__mro__ if issubclass(owner, Section) and name in owner.model_fields]
    declared = [owner.model_fields[name] for owner in owners]
    field = next((one for one in declared if not one.is_required()), declared[0])
    return field.get_default(call_default_factory=True)


def _is_kind_of(section: type[BaseModel], other: type[BaseModel]) -> bool:
    """Whether a section is one of the kinds of another, whose keys it has."""
    return section is not other and issubclass(section, other)


@cache
def gates(config_class: type[BaseModel]) -> frozenset[Pattern]:
    """The fields that are marked as gates."""
    return _marked(config_class, "gate")


def _marked(config_class: type[BaseModel], mark: str) -> frozenset[Pattern]:
    return frozenset(
        pattern
        for pattern, field in fields_of(config_class).items()
        if isinstance(field.json_schema_extra, dict) and field.json_schema_extra.get(mark)
    )


def is_gate(config_class: type[BaseModel], key: str) -> bool:
    """Whether a dotted key is a gate, or stands below one."""
    return _is_below(key, gates(config_class))


def is_identity(config_class: type[BaseModel], key: str) -> bool:
    """Whether a dotted key is part of what makes a run the run it is: neither a gate nor kept with the run."""
    return not is_gate(config_class, key) and not _is_below(key, _kept(config_class))


@cache
def _kept(config_class: type[BaseModel]) -> frozenset[Pattern]:
    return _marked(config_class, "kept")


def _is_below(key: str, patterns: frozenset[Pattern]) -> bool:
    path = tuple(key.split("."))
    return any(_matches(pattern, path[: len(pattern)]) for pattern in patterns)


def gone(config_class: type[BaseModel], path: Sequence[str | int]) -> tuple[int, Gone] | None:
    """The entry of GONE for a key that the config no longer knows, and how many parts of ``path`` are its section's."""
    sections: list[type[BaseModel]] = [config_class]
    parts = [str(part) for part in path]
    for depth in range(len(parts)):
        name = ".".join(parts[depth:])
        known = [section for section in sections if parts[depth] in section.model_fields]
        for owner in () if known else (base for section in sections for base in section.__mro__):
            if entry := GONE.get(owner, {}).get(name):
                return depth, entry
        sections = [section for place, section in _sections_at(config_class, tuple(parts[: depth + 1]))]
    return None


def as_today(config_class: type[BaseModel], old: Mapping[str, Any]) -> dict[str, Any]:
    """Dotted key -> value of an older version, by today's keys. What has no counterpart stays as it is."""
    found: dict[str, Any] = {}
    known = fields_of(config_class)
    for key, value in old.items():
        path = key.split(".")
        is_known = tuple(ANY if part.isdigit() else part for part in path) in known
        if not is_known and (entry := gone(config_class, path)) and (new := _translated(entry[1], value)):
            found |= {".".join([*path[: entry[0]], name]): own for name, own in new.items()}
        elif is_known or not (entry and _means_today(entry[1], value)):
            found[key] = value
    return found


def update(config_class: type[BaseModel], value: Any, path: tuple[str | int, ...] = ()) -> Any:
    """The same for a config as it was read from YAML."""
    if isinstance(value, list):
        return [update(config_class, item, (*path, index)) for index, item in enumerate(value)]
    if not isinstance(value, dict):
        return value
    found: dict[Any, Any] = {}
    for key, item in value.items():
        entry = gone(config_class, (*path, key)) if isinstance(key, str) else None
        if entry and entry[0] == len(path) and _means_today(entry[1], item):
            found |= _translated(entry[1], item)
        else:
            found[key] = update(config_class, item, (*path, key))
    return found


def advice(config_class: type[BaseModel], path: Sequence[str | int], value: Any) -> str | None:
    """What to write in place of a key that is gone; None for one that never was."""
    entry = gone(config_class, path)
    if entry is None:
        return None
    if entry[1].now is None:
        return "remove it" if _means_today(entry[1], value) else "remove it: this version cannot do that"
    new = _translated(entry[1], value)
    return f"it is now {entry[1].now}" + "".join(f": write {name}: {_written(own)}" for name, own in new.items())


def _written(value: Any) -> str:
    return "null" if value is None else str(value)


def _means_today(entry: Gone, value: Any) -> bool:
    return any(value == old and type(value) is type(old) for old, _ in entry.values)


def _translated(entry: Gone, value: Any) -> dict[str, Any]:
    """Today's key and value; empty where there is none."""
    found = [new for old, new in entry.values if value == old and type(value) is type(old)]
    return {entry.now: found[0]} if entry.now and found else {}


def _sections_at(config_class: type[BaseModel], path: Pattern) -> Iterator[tuple[Pattern, type[BaseModel]]]:
    """The sections whose keys stand directly below ``path``."""
    for pattern, field in fields_of(config_class).items():
        for place, section in places_in(field.annotation):
            if _matches((*pattern, *place), path):
                yield (*pattern, *place), section


def _matches(pattern: Pattern, path: Pattern) -> bool:
    return len(pattern) == len(path) and all(a in (ANY, b) for a, b in zip(pattern, path, strict=True))
