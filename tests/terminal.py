"""A terminal for tests: commands of rlhf under a pty, in forks of a process that has loaded everything, and the screen
that a person is left with."""

from __future__ import annotations

import contextlib
import fcntl
import io
import json
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from dataclasses import dataclass, field
from pathlib import Path

from rich.cells import cell_len

ERASE, CURSOR_UP = "\x1b[2K", "\x1b[1A"
HIDE, SHOW = "\x1b[?25l", "\x1b[?25h"
COLOUR = re.compile(r"\x1b\[[0-9;]*m")
_ESCAPE = re.compile(r"\x1b(\[[0-9;?]*[A-Za-z]|.)")
PATIENCE = 120.0


@dataclass
class Session:
    """What one command did.

    Args:
        sent: all that the terminal was sent, what was typed included; stdout: what went into a pipe instead.
    """

    code: int
    sent: str
    stdout: str
    columns: int

    @property
    def lines(self) -> list[str]:
        """The screen at the end."""
        return screen(self.sent, self.columns)

    def frames(self, title: str) -> list[str]:
        """Every state of a bar that was drawn."""
        texts = [COLOUR.sub("", text) for text in re.split(r"[\r\n]|\x1b\[[0-9;?]*[A-KZh-l]", self.sent)]
        return [text for text in texts if text.startswith(title)]


def screen(sent: str, columns: int) -> list[str]:
    """The lines of a terminal, however many, after it was sent this; a control sequence not known here is an error."""
    rows, row, column = [[]], 0, 0
    position = 0
    while position < len(sent):
        if escape := _ESCAPE.match(sent, position):
            position = escape.end()
            if escape[0] == ERASE:
                rows[row] = []
            elif escape[0] == CURSOR_UP:
                row -= 1
            else:
                assert COLOUR.fullmatch(escape[0]) or escape[0] in (HIDE, SHOW), repr(escape[0])
            continue
        character = sent[position]
        position += 1
        if character == "\r":
            column = 0
        elif character == "\b":
            column = max(0, column - 1)
        elif character == "\n":
            row += 1
        else:
            width = cell_len(character)
            if column + width > columns:
                row, column = row + 1, 0
            while len(rows) <= row:
                rows.append([])
            rows[row] += [" "] * (column + width - len(rows[row]))
            rows[row][column : column + width] = [character, *[""] * (width - 1)]
            column += width
        while len(rows) <= row:
            rows.append([])
    return ["".join(cells).rstrip() for cells in rows]


@dataclass
class Request:
    """A command, and the terminal that it runs in.

    Args:
        typed: pairs of what to wait for on the screen, and what is typed then.
        prelude: Python that the child executes first.
        is_piped: standard output is a pipe; is_fed: standard input is a pipe that holds what is typed.
    """

    arguments: list[str]
    cwd: str
    columns: int = 80
    typed: list[tuple[str, str]] = field(default_factory=list)
    environment: dict[str, str] = field(default_factory=dict)
    prelude: str = ""
    is_piped: bool = False
    is_fed: bool = False


class Terminal:
    """Starts the process that forks."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def run(self, *arguments: str, cwd: Path, **settings) -> Session:
        request = Request([str(one) for one in arguments], str(cwd), **settings)
        self.process.stdin.write(json.dumps(vars(request)) + "\n")
        self.process.stdin.flush()
        return Session(**json.loads(self.process.stdout.readline()), columns=request.columns)

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()


def _serve() -> None:
    """One request a line. Everything that commands need is loaded first."""
    import torch

    from rlhf import cli  # noqa: F401
    from rlhf.stages.train_rm import run as train_rm  # noqa: F401

    torch.set_num_threads(1)
    for line in sys.stdin:
        answer = _run(Request(**json.loads(line)))
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()


def _run(request: Request) -> dict[str, object]:
    """In a child with a pty of its own."""
    stdout_end, stdout_pipe = os.pipe()
    stdin_pipe, stdin_end = os.pipe()
    pid, terminal = pty.fork()
    if pid == 0:
        time.sleep(0.05)  # until the size of the terminal is set
        if request.is_piped:
            os.dup2(stdout_pipe, 1)
        if request.is_fed:
            os.dup2(stdin_pipe, 0)
        for end in (stdout_end, stdout_pipe, stdin_pipe, stdin_end):
            os.close(end)
        _become(request)
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 50, request.columns, 0, 0))
    os.close(stdout_pipe)
    os.close(stdin_pipe)
    if request.is_fed:
        os.write(stdin_end, "".join(text for _, text in request.typed).encode())
        request.typed.clear()
    os.close(stdin_end)
    sent, stdout = _drive(pid, terminal, stdout_end, request.typed)
    os.close(terminal)
    _, status = os.waitpid(pid, 0)
    return {"code": os.waitstatus_to_exitcode(status), "sent": sent, "stdout": stdout}


def _drive(pid: int, terminal: int, pipe: int, typed: list[tuple[str, str]]) -> tuple[str, str]:
    """Reads until the command ends, and types what is to be typed. One that hangs is killed."""
    sent, stdout, seen, waiting = b"", b"", 0, list(typed)
    ends, until = {terminal, pipe}, time.monotonic() + PATIENCE
    while terminal in ends:
        if time.monotonic() > until:
            os.kill(pid, signal.SIGKILL)
        for end in select.select(ends, [], [], 1.0)[0]:
            try:
                found = os.read(end, 65536)
            except OSError:  # the other end of a pty is closed
                found = b""
            if not found:
                ends.discard(end)
            elif end == terminal:
                sent += found
            else:
                stdout += found
        if waiting and (place := sent.find(waiting[0][0].encode(), seen)) >= 0:
            seen = place + len(waiting[0][0].encode())
            os.write(terminal, waiting.pop(0)[1].encode())
    return sent.decode("utf-8", "replace"), stdout.decode("utf-8", "replace")


def _become(request: Request) -> None:
    """The command, as if it had just been started in this terminal; does not return."""
    for name in ("NO_COLOR", "FORCE_COLOR", "COLUMNS", "LINES", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        os.environ.pop(name, None)
    os.environ |= {"TERM": "xterm-256color", **request.environment}
    os.chdir(request.cwd)
    sys.stdin = os.fdopen(0)
    sys.stdout, sys.stderr = (io.TextIOWrapper(os.fdopen(end, "wb", 0), "utf-8", write_through=True) for end in (1, 2))
    sys.argv = ["rlhf", *request.arguments]
    code = 99
    try:
        from rlhf import cli
        from rlhf.runs import progress

        progress.console.__init__(stderr=True, highlight=False, soft_wrap=True)  # it looks at the terminal when made
        exec(request.prelude, {})
        cli.main()
    except SystemExit as stop:
        code = stop.code or 0
    except BaseException:
        with contextlib.suppress(BaseException):
            import traceback

            traceback.print_exc()
    os._exit(code)


if __name__ == "__main__":
    _serve()
