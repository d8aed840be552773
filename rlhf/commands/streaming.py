"""A conversation in the terminal: its turns as they are typed, and an answer printed while it is sampled."""

from __future__ import annotations

import importlib.util
import io
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import typer
from torch import Tensor

from rlhf.data.chat_format import ChatFormat
from rlhf.errors import Problem, RlhfError
from rlhf.runs import interrupts

UNFINISHED = "\ufffd"  # what the first bytes of a character are decoded as


class Stopped(Exception):
    """A signal came while an answer was being sampled."""


class Stream:
    """A streamer of transformers that prints an answer token by token; all that it prints is the answer's text.

    transformers' TextStreamer decodes line by line, which loses spaces with some tokenizers, and waits for a space.

    Args:
        write: prints without a line break.
    """

    def __init__(self, chat: ChatFormat, write: Callable[[str], None]) -> None:
        self.chat, self.write = chat, write
        self.ids: list[int] = []
        self.printed, self.has_prompt = "", False

    def put(self, tokens: Tensor) -> None:
        """The prompt first, which is not printed, then each token.

        Raises:
            Stopped: where a deferred signal waits.
        """
        if interrupts.pending() is not None:
            raise Stopped
        if self.has_prompt:
            self.ids += tokens.flatten().tolist()
            self._print(self._settled(self.chat.decode(self.ids)))
        self.has_prompt = True

    def end(self) -> None:
        """What is left is printed by ``finish``."""

    def finish(self, text: str) -> None:
        """Print the rest of ``text``, the whole answer, and end the line."""
        if not text.startswith(self.printed):
            self.write("\n")  # a tokenizer that takes back what it decoded: the answer again, as it is
            self.printed = ""
        self._print(text)
        self.write("\n")

    def _print(self, text: str) -> None:
        if text.startswith(self.printed):
            self.write(text[len(self.printed) :])
            self.printed = text

    def _settled(self, text: str) -> str:
        """Without what the next token may still change: an unfinished character, or spaces that are cleaned up."""
        if getattr(self.chat.tokenizer, "clean_up_tokenization_spaces", False):
            return text[: max(text.rfind(" "), text.rfind("\n"), 0)].rstrip(" ")
        return text.rstrip(UNFINISHED)


def write(text: str) -> None:
    """To standard output, at once."""
    sys.stdout.write(text)
    sys.stdout.flush()


def open_streams() -> None:
    """Print what the terminal's encoding lacks as a question mark, and edit the line where both ends are a terminal.

    Without the line editor a terminal cuts a line at 4095 bytes.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")
    if _edits_lines():
        importlib.import_module("readline")


def read_turn(is_interactive: bool) -> str | None:
    """The next line that is not empty, without space around it; None at the end of the input or for /quit.

    Raises:
        RlhfError: DAT011 for what is not UTF-8.
    """
    while True:
        try:
            line = _read(is_interactive)
            line.encode()  # an invalid byte may also have come through as a lone surrogate
        except EOFError:
            return None
        except UnicodeError:
            what = "a turn is not UTF-8."
            raise RlhfError(Problem("DAT011", "standard input", what, "text in UTF-8")) from None
        except interrupts.Interrupted as stop:
            if not is_interactive or stop.signum != signal.SIGINT:
                raise
            interrupts.forget()
            typer.echo("\n/quit or Ctrl-D leaves.", err=True)
            continue
        if line.strip() == "/quit":
            return None
        if line.strip():
            return line.strip()


@contextmanager
def stoppable() -> Iterator[None]:
    """Inside, Ctrl-C ends the answer and not the command; any other signal is raised at the end."""
    try:
        with interrupts.deferred(b""):
            yield
    finally:
        signum = interrupts.pending()
        if signum == signal.SIGINT:
            interrupts.forget()
        elif signum is not None:
            raise interrupts.Interrupted(signum)


def _read(is_interactive: bool) -> str:
    if _edits_lines():
        return input("> ")
    if is_interactive:
        typer.echo("> ", nl=False, err=True)
    line = sys.stdin.readline()
    if not line:
        raise EOFError
    return line


def _edits_lines() -> bool:
    return sys.stdin.isatty() and sys.stdout.isatty() and importlib.util.find_spec("readline") is not None
