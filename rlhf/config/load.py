"""From a YAML file and ``--set`` to a stage config: all problems together, each with its line and its fix."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from rlhf import secrets
from rlhf.config import fields, foreign, recorded, yaml_reader
from rlhf.config.sections import KIND, Section
from rlhf.errors import Problem, RlhfError

Config = TypeVar("Config", bound=Section)
Path_ = tuple[str | int, ...]
INDEX = re.compile(r"[0-9]{1,6}")
VARIABLE = re.compile(r"\$\{[^}]*\}")


@dataclass(frozen=True)
class _Source:
    """What was read, and where each part of it stands: in the file, or in an override by the path that it set."""

    name: str
    value: Any
    places: yaml_reader.Places
    origins: dict[Path_, str]

    def where(self, path: Path_) -> tuple[tuple[int, int, int], str]:
        """A key for sorting by appearance, and the place as a message says it."""
        key = yaml_reader.shown(secrets.mask(".".join(map(str, path))))
        for index, (set_path, text) in enumerate(self.origins.items()):
            if path and path[: len(set_path)] == set_path:
                return (1, index, 0), f"{text} ({key})"
        line, column = self.places.get(path) or self.places.get(path[:-1]) or (1, 1)
        return (0, line, column), f"{self.name}:{line}:{column} {key}".rstrip()


def load(config_class: type[Config], path: Path | None, overrides: Sequence[str] = ()) -> Config:
    """Read and validate a stage config; precedence is defaults, file, ``overrides`` ('a.b=c').

    The config that a run has recorded may be of an older version: keys that are gone are translated there.

    Raises:
        RlhfError: with every problem, in the order of the file, then of the overrides; SEC alone, where a secret
            stands in it, and without the secret.
    """
    value, places = yaml_reader.read_file(path) if path else ({}, {})
    if path and recorded.is_recorded(path):
        value = fields.update(config_class, value)
    return _settled(config_class, value, places, str(path) if path else "config", overrides)


def load_text(config_class: type[Config], text: str, name: str) -> Config:
    """The same for a file that is not written yet; ``name`` stands in the messages."""
    return _settled(config_class, *yaml_reader.read_text(text, name), name, ())


def _settled(
    config_class: type[Config], value: Any, places: yaml_reader.Places, name: str, overrides: Sequence[str]
) -> Config:
    if not isinstance(value, dict):
        what = f"expected a mapping at the top level, got {_kind(value)}."
        raise RlhfError(Problem("CFG002", f"{name}:1", what, "write key: value"))
    source = _Source(name, value, places, {})
    for item in overrides:
        _override(value, item, source.origins)
    if secret := list(_secrets(source, config_class)):
        raise RlhfError(*secret)
    found = list(_variables(source))
    try:
        config = config_class.model_validate(value)
    except ValidationError as error:
        found += [_problem(entry, config_class, source) for entry in error.errors()]
    if found:
        raise RlhfError(*[problem for _, problem in sorted(dict.fromkeys(found), key=lambda item: item[0])])
    return config


def dump(config: Section) -> str:
    """The resolved config as YAML: every key, in the order of the class."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=110)


def _override(config: dict[str, Any], item: str, origins: dict[Path_, str]) -> None:
    key, equals, text = item.partition("=")
    where = f"--set {yaml_reader.shown(key if secrets.is_secret_name(key) else secrets.mask(item))}"
    if not equals or not all(key.split(".")):
        fix = f"-c {item}" if item.endswith((".yaml", ".yml")) else "for instance --set steps=10"
        raise RlhfError(Problem("CFG005", where, "not of the form key.subkey=value.", fix))
    if found := yaml_reader.UNWRITABLE.search(key):
        raise RlhfError(Problem("CFG005", where, f"contains the character {found[0]!a}, which no text can hold."))
    value, _ = yaml_reader.read_text(text, where)
    path: Path_ = ()
    here: Any = config
    for word in key.split("."):
        part = int(word) if isinstance(here, list) and INDEX.fullmatch(word) else word
        if isinstance(part, int) and part >= len(here):
            raise RlhfError(Problem("CFG005", where, f"the list has {len(here)} items, counted from 0."))
        if not isinstance(here, dict) and not isinstance(part, int):
            prefix = yaml_reader.shown(".".join(map(str, path)))
            raise RlhfError(
                Problem("CFG005", where, f"{prefix} is {_kind(here)}, which has no key {yaml_reader.shown(str(part))}.")
            )
        path, parent = (*path, part), here
        if isinstance(here, dict) and not isinstance(here.get(part), dict | list):
            here[part] = {}
        here = here[part]
    parent[part] = value
    origins[path] = where


def _secrets(source: _Source, config_class: type[Section]) -> Iterator[Problem]:
    """A key that asks for a secret and is none of ours, and text that holds one; the message never shows it."""
    known = {key.rpartition(".")[2] for key in keys_of(config_class)}
    for path, value in _leaves((), source.value):
        asks = value is not None and any(secrets.is_secret_name(str(part)) and part not in known for part in path)
        if asks or any(secrets.holds_secret(str(part)) for part in (*path, value)):
            fix = "remove it, and set the variable that the tool reads, such as HF_TOKEN, in the environment"
            yield Problem("SEC008", source.where(path)[1], "a secret in a config is refused.", fix)


def _variables(source: _Source) -> Iterator[tuple[tuple[int, int, int], Problem]]:
    for path, value in _leaves((), source.value):
        if isinstance(value, str) and (found := VARIABLE.search(value)):
            order, where = source.where(path)
            what = f"{yaml_reader.shown(found[0])} is not filled in: a config takes no environment variables."
            yield order, Problem("CFG011", where, what, "write the value, or hand it over with --set")


def _leaves(path: Path_, value: Any) -> Iterator[tuple[Path_, Any]]:
    items: Any = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    if not items:
        yield path, value
    for part, item in items:
        yield from _leaves((*path, part), item)


def _problem(entry: Any, config_class: type[Section], source: _Source) -> tuple[tuple[int, int, int], Problem]:
    path = _existing(entry["loc"], source.value)
    order, where = source.where(path)
    given = entry.get("input")
    match entry["type"]:
        case "extra_forbidden":
            fix = fields.advice(config_class, path, given) or _suggestion(path, config_class)
            return order, Problem("CFG001", where, "unknown key.", fix)
        case "missing":
            return order, Problem("CFG006", where, "required, and not set.", f"set {'.'.join(map(str, path))}")
        case "value_error":
            return order, Problem("CFG007", where, f"{entry['ctx']['error']!s}.")
    message = entry["msg"].replace("Input should be", "must be")
    return order, Problem("CFG003", where, f"{message}, got {_shown(given)}.", _fix(given, entry["type"]))


def _existing(loc: Sequence[str | int], value: Any) -> Path_:
    """The part of pydantic's location that names keys of the config (it adds names of union members)."""
    path: list[str | int] = []
    here = value
    for index, part in enumerate(loc):
        if str(part).startswith(KIND):
            continue
        known = (isinstance(here, dict) and part in here) or (isinstance(here, list) and isinstance(part, int))
        if not known and index < len(loc) - 1:
            continue
        if not known and isinstance(here, list):
            continue
        if not known and not isinstance(here, dict):
            continue
        path.append(part)
        here = here[part] if known else None  # type: ignore[index]
    return tuple(path)


def _suggestion(path: Path_, config_class: type[Section]) -> str:
    keys = list(keys_of(config_class))
    parent = ".".join(str(part) for part in path[:-1] if not isinstance(part, int))
    leaf = str(path[-1])
    siblings = {key.rpartition(".")[2]: key for key in keys if key.rpartition(".")[0] == parent}
    if near := difflib.get_close_matches(leaf, siblings, n=1):
        return f"did you mean '{siblings[near[0]]}'?"
    elsewhere = foreign.ours(leaf, keys) or next((key for key in keys if key.rpartition(".")[2] == leaf), None)
    if elsewhere:
        return f"did you mean '{elsewhere}'?"
    return f"known keys here: {', '.join(sorted(siblings))}" if siblings else ""


def keys_of(config_class: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Every dotted key of a config, sections before what they hold; places in lists are left out."""
    for name, field in config_class.model_fields.items():
        yield prefix + name
        for inner in sections_in(field.annotation):
            yield from keys_of(inner, f"{prefix}{name}.")


def sections_in(annotation: Any) -> Iterator[type[BaseModel]]:
    """The sections that a type holds, alone or in a list or a union."""
    return (section for _, section in fields.places_in(annotation))


def _fix(given: Any, kind: str) -> str:
    if isinstance(given, str) and given.lower() in ("yes", "no", "on", "off") and "bool" in kind:
        return "write true or false"
    if isinstance(given, str) and kind in ("int_type", "float_type"):
        return "write a plain number"
    return ""


def _kind(value: Any) -> str:
    return {list: "a list", dict: "a mapping", str: "text", type(None): "nothing"}.get(type(value), f"{value!r}")


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
