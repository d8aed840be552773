"""What becomes of a config of TRL or LlamaFactory: our keys, and what is to be known of the others."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import yaml

from rlhf import secrets
from rlhf.config import load
from rlhf.config.migrations import ELSEWHERE, IN_STAGE
from rlhf.config.sections import Section
from rlhf.config.yaml_reader import shown
from rlhf.errors import Problem, RlhfError


@dataclass
class Migration:
    """What has become of an old config.

    Args:
        config: our dotted key -> value.
        gone: old key -> why it has no counterpart; ``undecided``: what a person must decide, by our key or the old one;
            ``written``: our keys that the old file left to its tool's defaults.
    """

    tool: str
    stage: str
    config_class: type[Section]
    old: dict[str, Any]
    config: dict[str, Any] = field(default_factory=dict)
    gone: dict[str, str] = field(default_factory=dict)
    undecided: dict[str, str] = field(default_factory=dict)
    written: list[str] = field(default_factory=list)

    def take(self, key: str) -> Any:
        """The value of an old key that is dealt with here; None where it is not set."""
        return self.old.pop(key, None)

    def number(self, key: str, least: float = 0) -> Any:
        """The same for a number of at least ``least``."""
        value = self.take(key)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int | float) or not value >= least):
            what = f"need a number of {least} or more, got {plain(value)}."
            raise RlhfError(Problem("CFG030", shown(key), what, "mend the old file"))
        return value

    def put(self, key: str, ours: str, value: Any) -> None:
        """An old key under our name for it, if this stage's config has it."""
        ours = IN_STAGE[self.stage].get(ours, ours)
        if ours in set(load.keys_of(self.config_class)):
            self.config[ours] = value
        else:
            self.gone[key] = ELSEWHERE.get(ours.split(".")[0], ELSEWHERE[""]).format(stage=self.stage)

    def text(self, source: str) -> str:
        """The new file: what is to be known of it as comments, then the keys."""
        lines = [f"# From {source} ({self.tool}) by rlhf migrate."]
        for title, said in (("To decide", self.undecided), ("No counterpart", self.gone)):
            lines += [f"# {title}:"] if said else []
            lines += [f"#   {key}: {reason}." for key, reason in said.items()]
        if self.written:
            lines.append(f"# Defaults of {self.tool}, written out: {', '.join(self.written)}.")
        order = list(load.keys_of(self.config_class))
        config = nested({key: self.config[key] for key in sorted(self.config, key=order.index)})
        return "\n".join(lines) + "\n" + yaml.safe_dump(config, sort_keys=False, allow_unicode=True)


def nested(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Dotted keys as mappings in mappings."""
    whole: dict[str, Any] = {}
    for key, value in flat.items():
        *path, last = key.split(".")
        here = whole
        for part in path:
            here = here.setdefault(part, {})
        here[last] = value
    return whole


def plain(value: Any) -> str:
    """A value fit for one line of a message."""
    return shown(secrets.mask(str(value)))
