"""SIGINT and SIGTERM: what is under way is finished and saved first; a second signal ends the process at once."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

_deferring = False
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
    global _received, _raised
    _received, _raised = None, False
    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, _on_signal)


@contextmanager
def deferred() -> Iterator[None]:
    """Inside, the first signal only raises a flag: the loop asks ``pending`` at the end of each step."""
    global _deferring
    _deferring = True
    try:
        yield
    finally:
        _deferring = False


def pending() -> int | None:
    """The signal that waits for the end of the step."""
    return _received


def raised() -> int | None:
    """The signal that was raised at once: an error that follows it is what some library made of being left."""
    return _received if _raised else None


def _on_signal(signum: int, _: FrameType | None) -> None:
    """Only system calls here: a handler may run inside a half-done write of a buffered stream."""
    global _received, _raised
    if _received is not None:
        os.write(2, b"Second signal: quits at once; the last checkpoint is whole.\n")
        os._exit(128 + signum)
    _received = signum
    if not _deferring:
        _raised = True
        raise Interrupted(signum)
    os.write(2, b"Finishing this step, then saving. Once more to quit at once.\n")
