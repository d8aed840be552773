"""Bars appear on a terminal, one at a time, and tables are whole where there is none."""

from __future__ import annotations

import io
import sys

import pytest
from rich.console import Console

from rlhf import progress


@pytest.fixture
def terminal(monkeypatch):
    """A terminal that remembers what it was sent."""
    console = Console(file=io.StringIO(), force_terminal=True, width=80)
    monkeypatch.setattr(progress, "console", console)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    return console


def test_a_bar_shows_what_is_done_and_one_inside_it_stays_hidden(terminal):
    with progress.bar("Outer", 2) as outer:
        assert not outer.disable
        assert list(progress.track([1, 2, 3], "Inner", 3)) == [1, 2, 3]
        outer.advance(outer.task_ids[0])
        outer.refresh()
    shown = terminal.file.getvalue()
    assert "Outer" in shown and "1/2" in shown and "left" in shown and "Inner" not in shown
    assert list(progress.track([1], "After", 1)) == [1] and "After" in terminal.file.getvalue()


def test_a_failure_inside_a_bar_lets_the_next_one_appear(terminal):
    with pytest.raises(ZeroDivisionError), progress.bar("First", 1):
        _ = 1 / 0
    with progress.bar("Second", 1) as second:
        assert not second.disable


def test_nothing_is_drawn_where_there_is_no_terminal(monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: False, raising=False)
    assert sum(progress.track(range(4), "Sampling", 4)) == 6
    assert capsys.readouterr().err == ""


def test_a_table_is_whole_without_a_terminal(capsys):
    names = tuple(f"column {number}" for number in range(10))
    progress.show(progress.table("A title", names, [tuple("0.123" for _ in names)]))
    shown = capsys.readouterr().err
    assert all(name in shown for name in names) and shown.count("0.123") == 10
