"""What a person sees while a stage works: log lines as sentences, and a bar with the remaining time."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from rlhf import masking

WIDE = 150
Item = TypeVar("Item")
_is_shown = False
console = Console(stderr=True, highlight=False, soft_wrap=True)


class _ConsoleHandler(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        style = "yellow" if record.levelno >= logging.WARNING else None
        console.print(self.format(record), style=style, markup=False)


def log_to_console(quiet: bool = False) -> None:
    """Send the package's log to standard error, once; secrets are masked there and in run logs."""
    logger = logging.getLogger("rlhf")
    logger.setLevel(logging.INFO)
    logger.propagate = False
    for handler in [handler for handler in logger.handlers if isinstance(handler, _ConsoleHandler)]:
        logger.removeHandler(handler)
    handler = _ConsoleHandler(logging.WARNING if quiet else logging.INFO)
    handler.setFormatter(logging.Formatter("%(message)s"))
    logger.addHandler(handler)
    masking.guard(logger)


@contextmanager
def bar(title: str, total: int) -> Iterator[Progress]:
    """A progress bar with elapsed and remaining time on a terminal, nothing elsewhere, and nothing inside another."""
    global _is_shown
    hidden, before = _is_shown or not sys.stderr.isatty(), _is_shown
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True, disable=hidden) as progress:
        progress.add_task(title, total=total)
        _is_shown = before or not hidden
        try:
            yield progress
        finally:
            _is_shown = before


def track(items: Iterable[Item], title: str, total: int) -> Iterator[Item]:
    """Yield ``items`` under a progress bar."""
    with bar(title, total) as progress:
        for item in items:
            yield item
            progress.advance(progress.task_ids[0])


def table(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]], note: str = "") -> Table:
    """A table for ``show``; the first column is text, the others are numbers. ``note`` stands below it."""
    shown = Table(title=title, title_justify="left", title_style="bold", caption=note or None, caption_justify="left")
    for index, column in enumerate(columns):
        shown.add_column(column, justify="left" if index == 0 else "right")
    for row in rows:
        shown.add_row(*row)
    return shown


def show(shown: Table) -> None:
    """Print a table, whole also where the terminal is narrow or none."""
    Console(stderr=True, width=max(console.width, WIDE)).print(shown)
