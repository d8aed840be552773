"""What must never be shown: the values of secrets, found in the environment and in texts, and masked everywhere."""

from __future__ import annotations

import json
import logging
import os
import re
import sys
import traceback
from collections.abc import Iterable, Iterator, Mapping
from urllib.parse import quote

MASK = "***"
MIN_LENGTH = 6
CUT = "..."

_SECRET_NAME = re.compile(r"(^|_)(TOKEN|SECRET|PASSWD|CREDENTIALS?)$|_KEY$|APIKEY$|PASSWORD", re.IGNORECASE)
_NAMES = r"(?<![a-z])(?:[\w-]*[_-])?(?:api)?(?:token|key|sig|signature|secret|password|passwd|credentials?)"
_IN_TEXT = (
    # user:password@ and user@ of a URL, also where the URL was cut inside it
    re.compile(r"(?P<kept>\w://)[^\s/@'\"]+(?=@)"),
    re.compile(r"(?P<kept>\w://[^\s/@:'\"]*:)[^\s/@'\"]*?(?=\.\.\.)"),
    # ?token=VALUE and --set hf_token=VALUE; "api_key": "VALUE" (without quotes it may be a sentence)
    re.compile(rf"(?P<kept>{_NAMES}=['\"]?)[^\s&'\",;}}#]+", re.IGNORECASE),
    re.compile(rf"(?P<kept>{_NAMES}['\"]?:\s*['\"])[^'\"]+", re.IGNORECASE),
    re.compile(r"(?P<kept>\bBearer\s+)[\w.~+/=-]{8,}"),
    # what the best known services hand out, wherever it stands
    re.compile(
        r"(?P<kept>)(?<![A-Za-z0-9])(?:hf_[A-Za-z0-9]{16,}|gh[pousr]_[A-Za-z0-9]{16,}|github_pat_\w{16,}"
        r"|glpat-[\w-]{16,}|xox[abprs]-[\w-]{10,}|(?:AKIA|ASIA)[A-Z0-9]{16}|AIza[\w-]{30,}"
        r"|sk-(?=[\w-]*[0-9])(?=[\w-]*[A-Z])[\w-]{20,})"
    ),
)


def secret_values(environment: Mapping[str, str]) -> dict[str, str]:
    """Value -> name of each variable whose name says that it is a secret.

    A value shorter than ``MIN_LENGTH`` is left out: it hides nothing, and masking it would maim ordinary words.
    """
    return {
        value.strip(): name
        for name, value in environment.items()
        if is_secret_name(name) and len(value.strip()) >= MIN_LENGTH
    }


def is_secret_name(name: str) -> bool:
    """Whether a variable or key of this name holds a secret: HF_TOKEN, api_key, DB_PASSWORD."""
    return _SECRET_NAME.search(name) is not None


def mask(text: str, environment: Mapping[str, str] | None = None) -> str:
    """``text`` with every secret in it replaced by ``MASK``.

    A secret is the value of a secret variable (also as JSON, ``repr`` or a URL write it, and also where a message cut
    it short), or what a text shows to be one: a URL's user and password, ``token=``, and well-known kinds of token.
    """
    for value in _longest_first(secret_values(os.environ if environment is None else environment)):
        for written in _ways_to_write(value):
            text = text.replace(written, MASK)
        if CUT in text:
            text = _without_beginnings(text, value)
    for pattern in _IN_TEXT:
        text = pattern.sub(rf"\g<kept>{MASK}", text)
    return text


def holds_secret(text: str, environment: Mapping[str, str] | None = None) -> str | None:
    """What kind of secret a text holds, in words that do not show it; None if it holds none."""
    values = secret_values(os.environ if environment is None else environment)
    for value in _longest_first(values):
        if any(written in text for written in _ways_to_write(value)):
            return f"the value of the environment variable {values[value]}"
    return "a password or token" if any(pattern.search(text) for pattern in _IN_TEXT) else None


class SecretFilter(logging.Filter):
    """Masks a record's whole message and its traceback before any handler formats them."""

    def filter(self, record: logging.LogRecord) -> bool:
        record.msg, record.args = mask(record.getMessage()), ()
        if record.exc_info and record.exc_info[1] is not None:
            record.exc_text, record.exc_info = "".join(masked_traceback(record.exc_info[1])).rstrip(), None
        if record.stack_info:
            record.stack_info = mask(record.stack_info)
        return True


def guard(logger: logging.Logger) -> None:
    """Mask what ``logger``, and the handlers that it has now, are given."""
    for place in (logger, *logger.handlers):
        if not any(isinstance(known, SecretFilter) for known in place.filters):
            place.addFilter(SecretFilter())


def show_traceback(error: BaseException) -> None:
    """A traceback on standard error. ``sys.excepthook`` would not do: typer puts its own there with every command."""
    sys.stderr.write("".join(masked_traceback(error)))


def masked_traceback(error: BaseException) -> Iterator[str]:
    """The lines of a traceback, masked; values of local variables are not in it."""
    return (mask(part) for part in traceback.format_exception(error))


def _longest_first(values: Iterable[str]) -> list[str]:
    return sorted(values, key=len, reverse=True)


def _ways_to_write(value: str) -> list[str]:
    ways = {value, json.dumps(value)[1:-1], json.dumps(value, ensure_ascii=False)[1:-1], repr(value)[1:-1]}
    return _longest_first(ways | {quote(value), quote(value, safe="")})


def _without_beginnings(text: str, value: str) -> str:
    """Mask the beginning of a value in front of ``...``, which is how messages show what is long."""
    for length in range(len(value) - 1, MIN_LENGTH - 1, -1):
        text = text.replace(value[:length] + CUT, MASK + CUT)
    return text
