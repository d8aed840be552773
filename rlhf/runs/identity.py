"""What makes a run the run it is: its inputs by name, and how those of two runs are compared.

Gates (fields marked with GATE) and what is kept with the run (KEPT) are not part of it. Keys that an older
version did not know, or that it called by another name, are no difference by themselves.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from rlhf.config import fields, keys
from rlhf.config.keys import ALWAYS
from rlhf.config.sections import Section

NOT_IDENTITY = ("run_dir", "runtime", "report_to", "save_every", "keep_checkpoints")


class _Missing:
    """In place of the value of a key that one side does not have. None is a value: lora: null is not no lora."""

    def __str__(self) -> str:
        return "nothing"


MISSING = _Missing()


@dataclass(frozen=True)
class Identity:
    """The inputs of a run.

    Args:
        values: dotted key -> value, and the digests of data, parents and models.
        defaults: keys whose value is their default, each with the item or optional section that it belongs to; ALWAYS
            where it belongs to none.
        config_class: of the stage; None: nothing is known of gates and older keys.
    """

    values: dict[str, Any]
    defaults: Mapping[str, str] = field(default_factory=dict)
    config_class: type[Section] | None = None

    def changes(self, old: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
        """Key -> (old, new) for every input that differs from those of another run, which may be of an older version.

        A key that ``old`` does not know is no difference while it has its default, provided that ``old`` knows the
        optional section or list item that the key is in.
        """
        if self.config_class:
            translated = fields.as_today(self.config_class, old)
            old = {key: value for key, value in translated.items() if fields.is_identity(self.config_class, key)}
        found: dict[str, tuple[Any, Any]] = {}
        for key in sorted({*old, *self.values}):
            before, now = old.get(key, MISSING), self.values.get(key, MISSING)
            if before != now and not (before is MISSING and self._is_default(key, old)):
                found[key] = (before, now)
        return found

    def _is_default(self, key: str, old: Mapping[str, Any]) -> bool:
        owner = self.defaults.get(key)
        return owner is not None and (owner == ALWAYS or any(known.startswith(f"{owner}.") for known in old))


def of(config: Section, digests: dict[str, Any]) -> Identity:
    """The identity of a config with the digests of what it names."""
    kind = type(config)
    values = {key: value for key, value in keys.flatten(config).items() if key.split(".")[0] not in NOT_IDENTITY}
    values = {key: value for key, value in (values | digests).items() if fields.is_identity(kind, key)}
    return Identity(values, keys.defaults(config), kind)


def gates(config: Section) -> dict[str, Any]:
    """The gates of a config: dotted key -> value."""
    return {key: value for key, value in keys.flatten(config).items() if fields.is_gate(type(config), key)}
