"""Whether the Hugging Face hub answers: asked once a process, within seconds, before a library would wait for it."""

from __future__ import annotations

import logging
import sys
from functools import cache
from threading import Thread

import huggingface_hub  # loads its parts when they are asked for
from huggingface_hub import constants

from rlhf.errors import Problem

log = logging.getLogger("rlhf")
SECONDS = 4.0
GATEWAY = (502, 503, 504)  # what stands between here and the hub answers, not the hub
OFFLINE = "HF_HUB_OFFLINE is set"


@cache
def trouble() -> str | None:
    """Why the hub cannot be reached, in words; None where it answers.

    The libraries try each request six times with growing pauses, a minute in all. Where the hub does not answer they
    are switched to offline mode, so that they read from their cache or fail at once.
    """
    if constants.HF_HUB_OFFLINE:
        return OFFLINE
    reason = _ask()
    if reason is not None:
        constants.HF_HUB_OFFLINE = True
        if "datasets.config" in sys.modules:  # it holds a copy
            sys.modules["datasets.config"].HF_HUB_OFFLINE = True  # type: ignore[attr-defined]
    return reason


def model_problem(where: str, name: str, revision: str | None) -> Problem | None:
    """MOD001 where the hub does not answer and its cache has no model ``name``; what is in the cache is used, and that
    is said."""
    if trouble() is None:
        return None
    if isinstance(huggingface_hub.try_to_load_from_cache(name, "config.json", revision=revision), str):
        say_cached(name)
        return None
    return not_reached("MOD001", where, f"hf download {name}{f' --revision {revision}' if revision else ''}")


def not_reached(code: str, where: str, download: str) -> Problem:
    """That the hub cannot be asked for something that its cache does not have; ``download`` is the command for it."""
    reason = trouble()
    if reason == OFFLINE:
        fix = f"unset HF_HUB_OFFLINE, name a local path, or run where there is a network: {download}"
        return Problem(code, where, f"not in the cache, and {OFFLINE}.", fix)
    fix = f"a local path; or HTTPS_PROXY in the environment; or, where there is a network, {download}"
    return Problem(code, where, f"the hub cannot be reached ({reason}), and its cache does not have this.", fix)


def say_cached(name: str) -> None:
    """That ``name`` was read from the cache because the hub does not answer; nothing where that was asked for."""
    reason = trouble()
    if reason not in (None, OFFLINE):
        _say_cached(name, reason)


@cache
def _say_cached(name: str, reason: str) -> None:
    log.warning("The hub cannot be reached (%s): %s is read from the cache.", reason, name)


def _ask() -> str | None:
    """One request to the hub. A thread of its own bounds what no setting does, such as the look-up of its name."""
    session = huggingface_hub.get_session()
    said: list[str | None] = []

    def ask() -> None:
        try:
            status = session.head(constants.ENDPOINT, timeout=2 * SECONDS).status_code
            said.append(f"{constants.ENDPOINT} answers {status}" if status in GATEWAY else None)
        except Exception as error:  # whatever the client raises, the hub did not answer
            first = " ".join(str(error).split())[:80] or type(error).__name__
            said.append(f"{constants.ENDPOINT}: {first}")

    thread = Thread(target=ask, daemon=True)
    thread.start()
    thread.join(SECONDS)
    return said[0] if said else f"no answer from {constants.ENDPOINT} within {SECONDS:g} s"
