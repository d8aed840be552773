"""A progress bar as one line of text: what runs, how far it is, figures, the remaining time."""

from __future__ import annotations

import time
from collections import deque

from rich.cells import cell_len
from rich.text import Text

RECENT = 10  # steps whose mean a bar shows
MIN_GRAPHIC, MAX_GRAPHIC = 8, 40  # characters


class Recent:
    """The mean of the last ``RECENT`` values."""

    def __init__(self) -> None:
        self.values: deque[float] = deque(maxlen=RECENT)

    def mean(self, value: float) -> float:
        """With ``value`` as the newest."""
        self.values.append(value)
        return sum(self.values) / len(self.values)


class Bar:
    """How far something is, and how much longer it takes.

    Args:
        total: None for a wait, of which nobody knows how far it is.
    """

    def __init__(self, title: str, total: int | None) -> None:
        self.title, self.total, self.figures = title, total, ""
        self.done = self.done_before = 0
        self.started = time.monotonic()

    def begin(self, done: int) -> None:
        """Steps ``done`` so far, of which the speed does not count: a resumed run, or preparations."""
        self.done = self.done_before = done
        self.started = time.monotonic()

    def advance(self, figures: str = "") -> None:
        """One step further, with the figures to show."""
        self.done += 1
        self.figures = figures

    def so_far(self) -> str:
        return self.title if self.total is None else f"{self.title} {self.done}/{self.total}"

    def line(self, width: int, inside: str = "", is_ascii: bool = False) -> Text:
        """As much as fits: the graphic and what goes on ``inside`` go first, then the figures, then the time."""
        kept = {"head": self.so_far()}
        for name, text in (("time", self._time()), ("figures", self.figures), ("inside", inside)):
            if text and cell_len(" ".join([*kept.values(), text])) <= width:
                kept[name] = text
        right = " ".join(kept[name] for name in ("figures", "time", "inside") if name in kept)
        graphic = min(MAX_GRAPHIC, width - cell_len(f"{kept['head']}  {right}"))
        shown = Text(kept["head"], no_wrap=True, overflow="crop", end="")
        if graphic >= MIN_GRAPHIC and self.total:
            full = round(graphic * min(1.0, self.done / self.total))
            mark, rest = "#-" if is_ascii else "━─"
            shown.append(" ").append(mark * full, "green").append(rest * (graphic - full), "dim")
        shown.append(f" {right}")
        shown.truncate(width)
        return shown

    def _time(self) -> str:
        """Remaining, or elapsed before anything is known of the speed."""
        elapsed, done = time.monotonic() - self.started, self.done - self.done_before
        if not done or self.total is None:
            return _clock(elapsed)
        return f"{_clock(elapsed / done * (self.total - self.done))} left"


def _clock(seconds: float) -> str:
    """0:09, 12:34, 1:02:03."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
