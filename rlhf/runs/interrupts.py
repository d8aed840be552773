"""SIGINT and SIGTERM: what is under way is finished and saved first; a second signal ends the process at once."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

FINISHING = b"Finishing this step, then saving. Once more to quit at once.\n"
AT_ONCE, WHOLE = b"Second signal: quits at once", b"; the last checkpoint is whole"
OVER_A_BAR, CURSOR = b"\r\x1b[2K", b"\x1b[?25h"  # erase the line, as a bar may stand there; a bar hides the cursor

_deferring: bytes | None = None  # what the first signal says where it only raises a flag
_received: int | None = None
_raised = False


class Interrupted(BaseException):
    """A signal ended the run; ``saved`` names the checkpoint that holds all of it, or is empty.

    No Exception, so that no ``except Exception`` of a library takes it for an error of its own.
    """

    def __init__(self, signum: int, saved: str = "") -> None:
        super().__init__(signal.Signals(signum).name)
        self.signum, self.saved = signum, saved

    @property
    def exit_code(self) -> int:
        return 128 + self.signum


def install() -> None:
    """Handle SIGINT and SIGTERM from now on."""
    forget()
    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, _on_signal)


@contextmanager
def deferred(message: bytes = FINISHING) -> Iterator[None]:
    """Inside, the first signal only writes ``message`` and raises a flag, which the loop asks for by ``pending``."""
    global _deferring
    _deferring = message
    try:
        yield
    finally:
        _deferring = None


def pending() -> int | None:
    """The signal that waits for the end of the step."""
    return _received


def forget() -> None:
    """The signal was answered without leaving: the next one is a first one again."""
    global _received, _raised
    _received, _raised = None, False


def raised() -> int | None:
    """The signal that was raised at once: an error that follows it is what some library made of being left."""
    return _received if _raised else None


def _on_signal(signum: int, _: FrameType | None) -> None:
    """Only system calls here: a handler may run inside a half-done write of a buffered stream."""
    global _received, _raised
    drawn = os.isatty(2) and os.environ.get("TERM") != "dumb"
    if _received is not None:
        os.write(2, (OVER_A_BAR + CURSOR if drawn else b"") + AT_ONCE + (b"" if _deferring == b"" else WHOLE) + b".\n")
        os._exit(128 + signum)
    _received = signum
    if _deferring is None:
        _raised = True
        raise Interrupted(signum)
    if _deferring:
        os.write(2, (OVER_A_BAR if drawn else b"") + _deferring)
