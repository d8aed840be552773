"""What a model section says of its conversations besides the template: end tokens, date, thinking."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import date, datetime, time
from typing import Any

from rlhf.config.thinking import SWITCH, Thinking
from rlhf.errors import Problem, RlhfError

CALL = "strftime_now"
FORMAT = re.compile(rf"{CALL}\s*\(\s*(?:'([^'\\\\]*)'|\"([^\"\\\\]*)\")\s*\)")


@dataclass(frozen=True)
class Rendering:
    """How conversations are written and read.

    Args:
        ends: tokens that end a response besides the one that the template writes; None: the model's own.
        date: YYYY-MM-DD, which a template that prints the date gets for today; None: today.
        thinking: strip: left out of what is read; keep: part of the response; off: as strip, and the template is asked
            for none.
        kwargs: variables that the template gets.
    """

    ends: tuple[str, ...] | None = None
    date: str | None = None
    thinking: Thinking = "strip"
    kwargs: Mapping[str, Any] = field(default_factory=dict)

    def given_to(self, template: str) -> dict[str, Any]:
        """What a template is rendered with: ``off`` turns thinking off where the template has the switch."""
        off = {SWITCH: False} if self.thinking == "off" and SWITCH in template else {}
        return {**off, **self.kwargs}


def prints_date(template: str) -> bool:
    """Whether a template asks what day it is, with the function that transformers gives to templates."""
    return re.search(rf"{CALL}\s*\(", template) is not None


def today() -> str:
    return datetime.now().date().isoformat()


def on_day(template: str, day: str) -> str:
    """The template with ``day`` for today: a function of its own takes the place of the one that reads the clock.

    Raises:
        RlhfError: MOD016 where a format is not written out, so that what the function returns is not known beforehand.
    """
    formats = [single or double for single, double in FORMAT.findall(template)]
    if len(formats) != len(re.findall(rf"{CALL}\s*\(", template)):
        what = f"calls {CALL} with a format that is not a plain string, so that its date cannot be kept."
        raise RlhfError(Problem("MOD016", "chat template", what, "a template with the format written out"))
    midnight = datetime.combine(date.fromisoformat(day), time())
    texts = {one: midnight.strftime(one) for one in formats}
    return f"{{%- set {CALL} = {json.dumps(texts)}.get %}}\n{template}"
