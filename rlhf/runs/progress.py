"""What a person sees while a command works: log lines as sentences, a bar on a terminal, a line before a long wait."""

from __future__ import annotations

import importlib
import io
import logging
import os
import sys
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from types import ModuleType
from typing import TypeVar

from rich.cells import cell_len
from rich.console import Console
from rich.live import Live
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from rlhf import secrets
from rlhf.runs.bars import Bar

WIDE = 150  # characters of a table where there is no terminal to fit it into
MIN_TEXT = 12  # characters of a column of words that may be broken
PATIENCE = 1.0  # seconds that a wait may last before a line says what it is for
LATER_STAGE = "RLHF_LATER_STAGE"  # in the environment of every stage process of a chain but the first
ONCE_A_CHAIN = {"is_once_a_chain": True}  # ``extra`` of a record
Item = TypeVar("Item")
console = Console(stderr=True, highlight=False, soft_wrap=True)
_open: list[Bar] = []  # bars and waits that the main thread is in, the outermost first
_live: Live | None = None  # draws the outermost bar
_num_stages = 0


class _ConsoleHandler(logging.Handler):
    """Writes to standard error.

    Args:
        announces: whether it says what a long wait is for.
    """

    def __init__(self, level: int, announces: bool) -> None:
        super().__init__(level)
        self.announces, self.last_wait = announces, ""

    def emit(self, record: logging.LogRecord) -> None:
        if getattr(record, "is_once_a_chain", False) and os.environ.get(LATER_STAGE):
            return
        if record.levelno >= logging.ERROR:
            close_bar()
        style = "yellow" if record.levelno >= logging.WARNING else None
        console.print(self.format(record), style=style, markup=False)
        self.last_wait = ""

    def announce(self, what: str) -> None:
        """One line, unless it is the very line above."""
        if self.announces and what != self.last_wait:
            self.handle(logging.makeLogRecord({"name": "rlhf", "levelno": logging.INFO, "msg": f"{what} ..."}))
            self.last_wait = what


def log_to_console(quiet: bool = False, announces: bool = True) -> None:
    """Send the package's log to standard error, once; secrets are masked there and in run logs.

    A record with ``extra=ONCE_A_CHAIN`` is shown by the first stage of a chain alone; every run.log has it.

    Args:
        announces: whether long waits are announced; ``quiet`` silences them too.
    """
    logger = logging.getLogger("rlhf")
    logger.setLevel(logging.INFO)
    logger.propagate = False
    for handler in [handler for handler in logger.handlers if isinstance(handler, _ConsoleHandler)]:
        logger.removeHandler(handler)
    handler = _ConsoleHandler(logging.WARNING if quiet else logging.INFO, announces and not quiet)
    handler.setFormatter(logging.Formatter("%(message)s"))
    logger.addHandler(handler)
    secrets.guard(logger)


def stage_environment() -> dict[str, str]:
    """The environment of a chain's next stage process: only the first one shows what holds for all of them."""
    global _num_stages
    _num_stages += 1
    return {**os.environ, **({LATER_STAGE: "1"} if _num_stages > 1 else {})}


@contextmanager
def bar(title: str, total: int) -> Iterator[Bar]:
    """A bar on a terminal that can erase a line, nothing elsewhere; inside another one it is what goes on there.

    What others print meanwhile appears above it, and a file keeps what is printed into it.
    """
    global _live
    shown = Bar(title, total)
    with _inside(shown):
        if _live or not (_is_main_thread() and sys.stderr.isatty() and console.is_interactive):
            yield shown
            return
        line = partial(_line, shown)
        _live = Live(get_renderable=line, console=console, transient=True, redirect_stdout=sys.stdout.isatty())
        try:  # a signal may come anywhere
            _live.start(refresh=True)
            yield shown
        finally:
            close_bar()


def track(items: Iterable[Item], title: str, total: int) -> Iterator[Item]:
    """Yield ``items`` under a bar; where there is none, a long wait is announced by its title."""
    is_outermost = not _open
    with bar(title, total) as shown, _announced(title, is_outermost and not _live):
        for item in items:
            yield item
            shown.advance()


@contextmanager
def waiting(what: str) -> Iterator[None]:
    """Say what a wait is for: inside a bar there and at once, else on a line of its own after ``PATIENCE`` seconds."""
    with _inside(Bar(what, None)), _announced(what, not _live):
        yield


def load(name: str) -> ModuleType:
    """Import a module that needs torch, which takes seconds when it is the first one."""
    if name in sys.modules:
        return sys.modules[name]
    with waiting("Loading torch and transformers"):
        return importlib.import_module(name)


def close_bar() -> None:
    """Erase the bar, if there is one: what it showed has ended, perhaps by an error."""
    global _live
    if _live:
        _live.stop()
        _live = None


def _line(shown: Bar) -> Text:
    """What fits, and one column less: a full last one would wrap on some terminals."""
    within = _open[_open.index(shown) + 1 :] if shown in _open else []
    inside = ", ".join(each.so_far() for each in within)
    return shown.line(console.width - 1, inside, console.options.ascii_only)


@contextmanager
def _inside(entered: Bar) -> Iterator[None]:
    if not _is_main_thread():
        yield
        return
    _open.append(entered)
    try:
        yield
    finally:
        _open.remove(entered)


@contextmanager
def _announced(what: str, wanted: bool) -> Iterator[None]:
    """A line after ``PATIENCE`` seconds inside, on the screen alone: a run.log has times of its own."""
    if not wanted or not _is_main_thread():
        yield
        return
    timer = threading.Timer(PATIENCE, _announce, (what,))
    timer.daemon = True
    with suppress(RuntimeError):  # memory is short: no thread, and nothing is said
        timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _announce(what: str) -> None:
    for handler in logging.getLogger("rlhf").handlers:
        if isinstance(handler, _ConsoleHandler):
            handler.announce(what)


def _is_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()


def table(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]], note: str = "") -> Table:
    """A table for ``show``; the first column is text, which may be broken, the others are numbers.

    ``note`` stands below it.
    """
    shown = Table(title=title or None, title_justify="left", title_style="bold", caption_justify="left")
    shown.caption = Text(note) if note else None
    cells = list(rows)
    for index, column in enumerate(columns):
        widest = max((cell_len(row[index]) for row in cells), default=0)
        words = (cell_len(word) for row in cells for word in row[index].split())
        least = widest if index else min(MIN_TEXT, max(words, default=0))
        shown.add_column(column, overflow="fold", justify="right" if index else "left", min_width=least)
    for row in cells:
        shown.add_row(*map(Text, row))
    return shown


def grid(rows: Iterable[Sequence[str]]) -> Table:
    """Rows for ``show`` without lines between them; the last column is text, which may be broken."""
    cells = list(rows)
    shown = Table.grid(padding=(0, 2, 0, 0))
    for index in range(len(cells[0]) if cells else 0):
        is_last = index == len(cells[0]) - 1
        least = MIN_TEXT if is_last else max(cell_len(row[index]) for row in cells)
        shown.add_column(overflow="fold", min_width=least)
    for row in cells:
        shown.add_row(*map(Text, row))
    return shown


def show(shown: Table) -> None:
    """Print a table, whole: fitted into a terminal, where a row that does not fit becomes a list."""
    page = Console(stderr=True, highlight=False, width=console.width if sys.stderr.isatty() else WIDE)
    if Measurement.get(page, page.options.update_width(sys.maxsize), shown).minimum <= page.width:
        page.print(shown)
        return
    page.print(shown.title or "", markup=False)
    for cells in zip(*(column.cells for column in shown.columns), strict=True):
        page.print(cells[0], markup=False)
        for column, cell in zip(shown.columns[1:], cells[1:], strict=True):
            page.print(f"  {column.header} {cell}".rstrip(), markup=False)
    if shown.caption:
        page.print(shown.caption)


def as_text(*tables: Table) -> str:
    """Tables for a file, whole and without colours."""
    page = Console(file=io.StringIO(), width=WIDE, force_terminal=False)
    for each in tables:
        page.print(each)
    return page.file.getvalue()  # type: ignore[attr-defined, no-any-return]
