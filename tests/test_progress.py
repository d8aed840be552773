"""Bars, waits and tables: what is shown where, how it fits, and what is said once."""

from __future__ import annotations

import io
import logging
import sys
import threading
import time

import pytest
from rich.console import Console
from rich.text import Text

from rlhf.runs import progress
from rlhf.runs.bars import Bar, Recent


@pytest.fixture
def terminal(monkeypatch):
    """A terminal that remembers what it was sent."""
    console = Console(file=io.StringIO(), force_terminal=True, width=80)
    monkeypatch.setattr(progress, "console", console)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    return console


@pytest.fixture
def said(monkeypatch):
    """What reaches the screen as lines, with a console handler of its own."""
    console = Console(file=io.StringIO(), width=80)
    monkeypatch.setattr(progress, "console", console)
    logger = logging.getLogger("rlhf")
    before = logger.handlers[:], logger.level, logger.propagate, logger.filters[:]
    progress.log_to_console()
    yield lambda: console.file.getvalue().splitlines()
    logger.handlers[:], logger.level, logger.propagate, logger.filters[:] = before


def test_a_bar_shows_figures_and_what_goes_on_inside_it(terminal):
    with progress.bar("Outer", 2) as outer:
        outer.advance("loss 0.5")
        for _ in progress.track([1, 2, 3], "Inner", 3):
            seen = progress._line(outer).plain
        with progress.waiting("Saving"):
            assert progress._line(outer).plain.endswith("loss 0.5 0:00 left Saving")
    assert seen.startswith("Outer 1/2 ━") and seen.endswith("loss 0.5 0:00 left Inner 2/3")
    shown = terminal.file.getvalue()
    assert "Outer" in shown and "\x1b[?25l" in shown and shown.count("\x1b[?25h") == 1
    assert list(progress.track([1], "After", 1)) == [1] and "After" in terminal.file.getvalue()


@pytest.mark.parametrize(
    ("width", "shown"),
    [
        (6, "PPO 11"),
        (11, "PPO 11/1000"),
        (20, "PPO 11/1000"),
        (21, "PPO 11/1000 ────────"),
        (22, "PPO 11/1000 32:58 left"),
        (39, "PPO 11/1000 ──────────────── 32:58 left"),
        (40, "PPO 11/1000 ───────────────── 32:58 left"),
        (41, "PPO 11/1000 score 1.84 KL 3.20 32:58 left"),
        (49, "PPO 11/1000 score 1.84 KL 3.20 32:58 left"),
        (50, "PPO 11/1000 ──────── score 1.84 KL 3.20 32:58 left"),
        (200, f"PPO 11/1000 {40 * '─'} score 1.84 KL 3.20 32:58 left"),
    ],
)
def test_a_bar_fits_into_any_width_and_keeps_the_most_important(width, shown):
    bar = Bar("PPO", 1000)
    bar.begin(10)
    bar.advance("score 1.84 KL 3.20")
    bar.started -= 2.0  # one step in two seconds, 989 left: 32 min 58 s
    assert bar.line(width).plain.rstrip() == shown and bar.line(width).cell_len <= width


def test_speed_counts_from_where_a_run_goes_on():
    bar = Bar("SFT", 100)
    bar.begin(90)
    bar.started -= 61.0
    assert bar.line(60).plain.endswith(" 1:01"), "nothing is known yet: elapsed"
    bar.advance()
    assert bar.line(60).plain.endswith(" 9:09 left"), "nine more steps of 61 seconds"
    bar.started -= 3600.0
    assert bar.line(60).plain.endswith(" 9:09:09 left")


def test_the_mean_of_the_last_ten_is_shown():
    recent = Recent()
    assert recent.mean(4.0) == 4.0 and recent.mean(6.0) == 5.0
    assert [recent.mean(float(value)) for value in range(20)][-1] == sum(range(10, 20)) / 10


def test_a_failure_inside_a_bar_lets_the_next_one_appear(terminal):
    with pytest.raises(ZeroDivisionError), progress.bar("First", 1):
        _ = 1 / 0
    terminal.file.truncate(0)
    with progress.bar("Second", 1):
        assert "Second 0/1" in terminal.file.getvalue()


def test_a_signal_while_a_bar_is_first_drawn_leaves_none_behind(terminal, monkeypatch):
    start = progress.Live.start

    def interrupted(live, refresh=False):
        start(live, refresh)
        raise KeyboardInterrupt

    monkeypatch.setattr(progress.Live, "start", interrupted)
    with pytest.raises(KeyboardInterrupt), progress.bar("First", 1):
        pass
    shown = terminal.file.getvalue()
    assert progress._live is None and shown.rfind("\x1b[?25h") > shown.rfind("\x1b[?25l")


def test_another_thread_draws_no_bar(terminal):
    thread = threading.Thread(target=lambda: list(progress.track([1], "Scoring", 1)))
    with progress.waiting("Serving"):
        thread.start()
        thread.join()
    assert terminal.file.getvalue() == ""


def test_nothing_is_drawn_where_there_is_no_terminal(monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: False, raising=False)
    assert sum(progress.track(range(4), "Sampling", 4)) == 6
    assert capsys.readouterr().err == ""


def waits(seconds=0.1):
    time.sleep(seconds)


def test_a_long_wait_is_announced_once_and_a_short_one_never(said, monkeypatch):
    monkeypatch.setattr(progress, "PATIENCE", 0.02)
    for _ in range(2):
        with progress.waiting("Reading [rows]"):
            waits()
    with progress.waiting("Looking"):
        pass
    for _ in progress.track([1], "Scoring", 1):
        waits()
    with progress.waiting("The probes"):
        list(progress.track([1], "Scoring", 1))
        waits()
    logging.getLogger("rlhf").info("Done.")
    with progress.waiting("The probes"):
        waits()
    waits()
    assert said() == ["Reading [rows] ...", "Scoring ...", "The probes ...", "Done.", "The probes ..."]


def test_with_json_no_wait_is_announced(said, monkeypatch):
    monkeypatch.setattr(progress, "PATIENCE", 0.01)
    for settings in ({"announces": False}, {"quiet": True}):
        progress.log_to_console(**settings)
        with progress.waiting("Reading"):
            waits(0.05)
    assert said() == []


def test_a_slow_import_is_announced_and_a_second_one_is_none(said, monkeypatch, tmp_path):
    monkeypatch.setattr(progress, "PATIENCE", 0.02)
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "slow_to_load.py").write_text("import time\ntime.sleep(0.1)\nVALUE = 7\n")
    assert progress.load("slow_to_load").VALUE == 7 and progress.load("slow_to_load").VALUE == 7
    assert said() == ["Loading torch and transformers ..."]


def test_what_holds_for_a_whole_chain_is_shown_by_its_first_stage_alone(said, monkeypatch):
    monkeypatch.setattr(progress, "_num_stages", 0)
    first, second = progress.stage_environment(), progress.stage_environment()
    assert progress.LATER_STAGE not in first and second[progress.LATER_STAGE] == "1"
    log, kept = logging.getLogger("rlhf"), []
    file = logging.Handler()
    file.emit = lambda record: kept.append(record.getMessage())
    log.addHandler(file)
    for environment in (first, second):
        monkeypatch.setattr(progress.os, "environ", environment)
        log.info("Running on the CPU.", extra=progress.ONCE_A_CHAIN)
        log.info("A step.")
    assert said() == ["Running on the CPU.", "A step.", "A step."] and kept == ["Running on the CPU.", "A step."] * 2


def test_a_table_is_whole_everywhere_and_a_list_where_it_is_too_wide(capsys, monkeypatch):
    names = tuple(f"column {number}" for number in range(10))
    made = progress.table("A title", names, [("first words", *("0.123" for _ in names[1:]))])
    progress.show(made)
    for shown in (capsys.readouterr().err, progress.as_text(made, made)):
        assert all(name in shown for name in names) and shown.count("0.123") in (9, 18)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    for width in (40, 100, 120):
        monkeypatch.setattr(progress, "console", Console(width=width))
        progress.show(made)
        shown = Text.from_ansi(capsys.readouterr().err).plain
        assert max(map(len, shown.splitlines())) <= width
        assert shown.count("0.123") == 9 and "…" not in shown
        assert ("  column 3 0.123\n" in shown) == (width == 40)
    monkeypatch.setattr(progress, "console", Console(width=30))
    progress.show(progress.grid([("pass", "-0.492 [-0.614, -0.369]", "[red]unbelievable[/red]")]))
    assert "".join(capsys.readouterr().err.split()) == "pass-0.492[-0.614,-0.369][red]unbelievable[/red]"
