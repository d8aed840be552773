"""How many rows of a data set are dropped, for which reasons, where the first of each stands, and how many may be."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from rlhf.data.rows import UNCOMPARED
from rlhf.errors import Problem


class DroppedRows:
    """The rows of one data set that are dropped, counted while it is read and while it is tokenised.

    Args:
        where: the data set, for messages.
        max_fraction: share of ``num_rows`` that may be dropped.
        drops_bad_rows: rows with a fault are dropped, and not refused.

    ``tokenised`` has the places of the rows whose tokens were looked at.
    """

    def __init__(self, where: str, max_fraction: float, drops_bad_rows: bool, num_rows: int = 0) -> None:
        self.where, self.max_fraction, self.drops_bad_rows = where, max_fraction, drops_bad_rows
        self.num_rows = num_rows
        self.tokenised: set[str] = set()
        self._places: dict[str, dict[str, int]] = {}
        self._counted: set[str] = set()
        self._fixes: dict[str, str] = {}

    def add(self, reason: str, where: str, num_rows: int = 1, fix: str = "") -> None:
        """Count the row at ``where`` once, under the first reason that is found. ``fix``: what would keep such rows."""
        if where not in self._counted:
            self._counted.add(where)
            self._places.setdefault(reason, {})[where] = num_rows
            self._fixes[reason] = fix

    def take_in(self, other: DroppedRows) -> None:
        """The rows of another source of the same data set, too."""
        self.num_rows += other.num_rows
        for reason, places in other._places.items():
            for where, num_rows in places.items():
                self.add(reason, where, num_rows)

    @property
    def counts(self) -> dict[str, int]:
        """Reason -> rows."""
        return {reason: sum(places.values()) for reason, places in self._places.items()}

    @property
    def total(self) -> int:
        return sum(self.counts.values())

    def record(self) -> dict[str, Any]:
        """For a manifest: {"rows", "dropped": {reason: rows}}, which ``excess`` judges again."""
        return {"rows": self.num_rows, "dropped": self.counts}

    def sentence(self) -> str:
        """The counts in words, with the first place of each reason."""
        return f"{self.total:,} of {self.num_rows:,} rows dropped: {self._reasons()}"

    def problems(self) -> list[Problem]:
        """DAT020 where more rows are dropped than may be."""
        found = excess(self.record(), self.max_fraction, self.where, self._reasons(), self._keeping())
        return [found] if found else []

    def _reasons(self) -> str:
        firsts = {reason: next(iter(places)) for reason, places in self._places.items()}
        return ", ".join(f"{count:,} with {reason} (first: {firsts[reason]})" for reason, count in self.counts.items())

    def _keeping(self) -> str:
        """What keeps rows, other than to let more of them go."""
        fixes = [fix for fix in self._fixes.values() if fix]
        if any(not fix and reason != UNCOMPARED for reason, fix in self._fixes.items()):
            fixes.append("fix the rows (on_bad_row: error names each)")
        return ", ".join(fixes)


def excess(
    record: Mapping[str, Any], max_fraction: float, where: str, reasons: str = "", keeping: str = ""
) -> Problem | None:
    """DAT020 where ``record`` (as ``DroppedRows.record``, also from a manifest) has more dropped rows than may be."""
    num_rows, total = record["rows"], sum(record["dropped"].values())
    if total <= max_fraction * num_rows:
        return None
    reasons = reasons or ", ".join(f"{count:,} with {reason}" for reason, count in record["dropped"].items())
    what = f"{total:,} of {num_rows:,} rows ({total / num_rows:.1%}) would be dropped: {reasons}."
    enough = math.ceil(100 * total / num_rows - 1e-9) / 100
    fix = f"{keeping or 'fix the rows'}, or max_dropped_fraction: {enough:g} (now {max_fraction:g})"
    return Problem("DAT020", where, what, fix)
