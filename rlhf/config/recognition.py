"""Which kind of config a file is, by its name or else by its keys."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rlhf.config import load, yaml_reader
from rlhf.config.sections import Section
from rlhf.errors import Problem, RlhfError

WITHOUT_COMMAND = {"rubric": "name it as rubric in train-rm.yaml"}
Classes = Mapping[str, type[Section]]


def by_keys(value: Any, classes: Classes) -> list[str]:
    """The kinds that know most of the keys; among these, those with the fewest required keys missing."""
    if not isinstance(value, dict):
        return []
    scores = {kind: (_num_unknown(value, one), _num_missing(value, one)) for kind, one in classes.items()}
    least = min(scores.values())
    return [kind for kind, score in scores.items() if score == least and score[0] < len(value)]


def kind_of(path: Path, classes: Classes, option: str) -> str:
    """The kind that the file's name says, else the only one that its keys fit best.

    Args:
        option: the command line's, which says it where the file does not.

    Raises:
        RlhfError: CFG008 where the keys fit several kinds alike, or none.
    """
    if path.stem in classes:
        return path.stem
    found = by_keys(yaml_reader.read_file(path)[0], classes)
    if len(found) == 1:
        return found[0]
    what = f"its keys fit several configs: {', '.join(found)}." if found else "its keys fit no config."
    raise RlhfError(Problem("CFG008", str(path), what, f"{option} with one of {', '.join(found or classes)}"))


def load_as(kind: str, path: Path, overrides: Sequence[str], classes: Classes, fix: str) -> Any:
    """The config, as ``load.load`` gives it.

    Args:
        fix: what to do about a config of another kind, which stands in it as ``{kind}`` and ``{path}``.

    Raises:
        RlhfError: CFG012 alone for a config of another kind, most of whose keys would be unknown here.
    """
    value = _keys_in(path)
    if isinstance(value, dict) and (others := _of_another_kind(kind, path, value, classes)):
        article = "an" if others[0] in ("sft", "eval-rm") else "a"
        told = WITHOUT_COMMAND.get(others[0]) or fix.format(kind=others[0], path=path)
        raise RlhfError(Problem("CFG012", str(path), f"this is {article} {' or '.join(others)} config.", told))
    return load.load(classes[kind], path, overrides)


def maker_of(run_dir: str, folder: Path, classes: Classes) -> tuple[Path, Any] | None:
    """The config in ``folder`` whose run_dir is ``run_dir``, and where it stands; None where no sound one is."""
    wanted = os.path.normpath(run_dir)
    for path in sorted(folder.glob("*.yaml")):
        for kind in [path.stem] if path.stem in classes else by_keys(_keys_in(path), classes):
            try:
                found = load.load(classes[kind], path)
            except RlhfError:
                continue  # its own check says what is wrong with it
            if os.path.normpath(getattr(found, "run_dir", "")) == wanted:
                return path, found
    return None


def _keys_in(path: Path) -> Any:
    """What stands in the file; None where it cannot be read, which ``load`` says."""
    try:
        return yaml_reader.read_file(path)[0]
    except RlhfError:
        return None


def _of_another_kind(kind: str, path: Path, value: dict[str, Any], classes: Classes) -> list[str]:
    """The kinds that fit better than ``kind`` does. A file's own name speaks against one unknown key."""
    unknown = _num_unknown(value, classes[kind]) - (path.stem == kind)
    others = by_keys(value, classes)
    if kind in others or not others or unknown <= _num_unknown(value, classes[others[0]]):
        return []
    return others


def _num_unknown(value: Mapping[str, Any], config_class: type[Section]) -> int:
    """Keys that the class does not have, each without what stands below it."""
    known = set(load.keys_of(config_class))
    sections = {key.rpartition(".")[0] for key in known}

    def count(here: Mapping[str, Any], prefix: str) -> int:
        num = 0
        for key, item in here.items():
            name = f"{prefix}{key}"
            if name not in known:
                num += 1
            elif name in sections:
                parts = item if isinstance(item, list) else [item]
                num += sum(count(part, f"{name}.") for part in parts if isinstance(part, dict))
        return num

    return count(value, "")


def _num_missing(value: Mapping[str, Any], config_class: type[Section]) -> int:
    fields = config_class.model_fields.items()
    return sum(field.is_required() and name not in value for name, field in fields)
