"""A config as dotted keys: their values, and which of them have their default."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from pydantic import BaseModel

from rlhf.config import fields
from rlhf.config.sections import Section

ALWAYS = ""


def flatten(config: Section) -> dict[str, Any]:
    """Dotted key -> value, for comparing two configs key by key."""
    return dict(flattened("", config))


def flattened(key: str, value: Any) -> Iterator[tuple[str, Any]]:
    """The same for a value of a config, whose keys stand below ``key``."""
    if isinstance(value, BaseModel):
        value = value.model_dump(mode="json")
    if isinstance(value, dict) and value:
        for name, item in value.items():
            yield from flattened(f"{key}.{name}" if key else name, item)
    elif isinstance(value, list) and any(isinstance(item, dict | BaseModel) for item in value):
        for index, item in enumerate(value):
            yield from flattened(f"{key}.{index}", item)
    else:
        yield key, value


def defaults(config: Section) -> dict[str, str]:
    """Keys whose value is their default, each with the list item or optional section that it belongs to; ALWAYS where
    it belongs to none."""
    return dict(_defaults("", config, None, ALWAYS))


def _defaults(prefix: str, section: Section, given: Section | None, owner: str) -> Iterator[tuple[str, str]]:
    """Keys of a section that have their default: the field's own, or that of ``given``, the default of the section."""
    for name in type(section).model_fields:
        candidates = [fields.default_of(type(section), name)] + ([getattr(given, name)] if given else [])
        yield from _defaults_below(prefix + name, getattr(section, name), candidates, owner)


def _defaults_below(key: str, value: Any, candidates: list[Any], owner: str) -> Iterator[tuple[str, str]]:
    if value in candidates:
        yield from ((name, owner) for name, _ in flattened(key, value))
    elif isinstance(value, Section):
        given = next((one for one in candidates if isinstance(one, type(value))), None)
        yield from _defaults(f"{key}.", value, given, key if None in candidates else owner)
    elif isinstance(value, list):
        for index, item in enumerate(value):
            if isinstance(item, Section):
                yield from _defaults(f"{key}.{index}.", item, None, f"{key}.{index}")
