"""What the checks before a run find, gathered in one place and raised once."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from rlhf.errors import Problem, RlhfError


@dataclass
class Findings:
    """One collector that checks pass on; each adds what it finds.

    Args:
        problems: what is wrong; ``refuse`` raises it.
        unchecked: what could not be checked, as sentences without their final full stop.
        notes: what a person should know, and what is no reason to stop.
        figures: numbers for the plan, as such sentences.
    """

    problems: list[Problem] = field(default_factory=list)
    unchecked: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    figures: list[str] = field(default_factory=list)

    def add(self, *problems: Problem | None) -> None:
        """Problems, each where there is one."""
        self.problems += [problem for problem in problems if problem]

    def extend(self, problems: Iterable[Problem]) -> None:
        """The same for several."""
        self.problems += problems

    def note(self, *sentences: str) -> None:
        self.notes += sentences

    def not_checked(self, *sentences: str) -> None:
        self.unchecked += sentences

    @contextmanager
    def gathering(self) -> Iterator[None]:
        """Add the problems of an RlhfError that ends the block; what follows the block goes on."""
        try:
            yield
        except RlhfError as error:
            self.extend(error.problems)

    def refuse(self) -> None:
        """Raise all problems together; nothing where there are none."""
        if self.problems:
            raise RlhfError(*self.problems)
