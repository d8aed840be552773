"""The checkpoints of a run: when one is written, which one a resumed run starts from, how many are kept."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf.errors import Problem, RlhfError
from rlhf.runs import artifacts, interrupts, snapshots, storage
from rlhf.runs.progress import waiting
from rlhf.runs.run_directory import Run
from rlhf.runs.snapshots import Entry, Stateful

log = logging.getLogger("rlhf")
BEST = "best"


@dataclass
class Position:
    """Optimizer steps or rounds done so far. Stateful."""

    step: int = 0

    def state_dict(self) -> dict[str, Any]:
        return {"step": self.step}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.step = state["step"]


class Checkpoints:
    """The checkpoints of one run.

    Args:
        state: everything that changes during the run.
        every: steps between checkpoints (what precedes step 1 is saved part by part); None: only the last step, and
            where a signal asks for it.
        keep: newest ones that are kept, at least two, because the newest may turn out damaged.
    """

    def __init__(self, run: Run, state: Mapping[str, Stateful], every: int | None, keep: int = 2) -> None:
        assert keep >= 2
        self.run, self.state, self.every, self.keep = run, state, every, keep
        self.directory = run.path / artifacts.CHECKPOINTS
        self._started, self._seconds_before, self._order = time.perf_counter(), 0.0, 0

    def seconds(self) -> float:
        """Time that the run has taken, over all its processes."""
        return self._seconds_before + time.perf_counter() - self._started

    def resume(self, steps: int) -> bool:
        """Give the newest whole checkpoint back, if the run was opened to go on; whether there was one.

        Args:
            steps: how many the run is to have in the end.

        Raises:
            RlhfError: CKP022 if there are checkpoints and none of them verifies; CKP024 if more steps have been done.
        """
        if not self.run.resumed:
            return False
        found = newest(self.directory)
        if found is None:
            self.run.rewind(0)
            log.info("No checkpoint was committed yet: %s starts at the beginning.", self.run.path)
            return False
        directory, entry = found
        if entry.step > steps:
            what = f"{entry.step} steps are done, and the config asks for {steps}."
            raise RlhfError(Problem("CKP024", str(directory), what, f"steps: {entry.step} or more"))
        snapshots.load(directory, entry, self.state)
        self._seconds_before, self._order = entry.seconds, entry.order
        if self.run.metrics_size() < entry.metrics_size:
            log.warning("metrics.jsonl is shorter than at %s: lines are missing from it.", directory.name)
        self.run.rewind(entry.metrics_size)
        log.info("Resumed from %s.", directory)
        return True

    def end_of_step(self, step: int, needs: Sequence[str] = (), last: bool = False) -> None:
        """Save if it is time to, or if a signal came; then end the run in the second case.

        Args:
            needs: directories beside the checkpoint that belong to it, such as the best roles so far.

        Raises:
            Interrupted: once the checkpoint stands.
        """
        self._order += 1
        signum = interrupts.pending()
        if not (last or signum or (self.every and step % self.every == 0)):
            return
        clock = time.perf_counter()
        name = f"step-{step}" if step else f"start-{self._order}"
        with waiting(f"Saving {name}"):
            snapshots.save(
                self.directory / name, step, self._order, self.seconds(), self.run.metrics_size(), self.state, needs
            )
            self.retire(needs)
        log.info("Saved %s in %.2f s.", name, time.perf_counter() - clock)
        if signum:
            raise interrupts.Interrupted(signum, name)

    def keep_best(self, name: str, save: Callable[[Path], None], needs: Sequence[str]) -> None:
        """Write what is the best so far next to the checkpoints, and delete a former best that none of them needs.

        Args:
            name: of the directory, which begins with ``BEST`` and a hyphen; ``save`` writes it whole or not at all.
            needs: what the next checkpoint will need, this one included.
        """
        assert name.startswith(f"{BEST}-") and name in needs, name
        save(self.directory / name)
        self.retire(needs)

    def retire(self, needs: Sequence[str]) -> None:
        """Delete the checkpoints beyond the newest whole ones, and what none of these needs. A failure is only said."""
        entries = {path: entry for path in candidates(self.directory) if (entry := snapshots.read_entry(path))}
        ordered = sorted(entries, key=lambda path: entries[path].order, reverse=True)
        whole = [path for path in ordered if snapshots.damaged(path, entries[path]) is None][: self.keep]
        used = set(needs) | {file.split("/")[0] for path in whole for file in entries[path].files}
        for path in [*candidates(self.directory), *self.directory.glob(f"{BEST}-*")]:
            if path.name not in used:
                try:
                    storage.remove_directory(path)
                except OSError as error:
                    log.warning("%s could not be removed: %s.", path, error.strerror)


def candidates(directory: Path) -> list[Path]:
    """What looks like a checkpoint by its name."""
    return sorted([*directory.glob("step-*"), *directory.glob("start-*")])


def newest(directory: Path) -> tuple[Path, Entry] | None:
    """The newest checkpoint that verifies; every one that does not is named in the log. None if there is none at all.

    Raises:
        RlhfError: CKP022 if there are some and none verifies; CKP023 for one of a later format.
    """
    paths = candidates(directory)
    entries = {path: snapshots.read_entry(path) for path in paths}
    problems = [f"{path.name}: {snapshots.MANIFEST} is missing or damaged" for path in paths if entries[path] is None]
    for problem in problems:
        log.warning("Checkpoint %s; an earlier one is used.", problem)
    for path in sorted((p for p in paths if entries[p]), key=lambda p: entries[p].order, reverse=True):  # type: ignore[union-attr]
        entry = entries[path]
        assert entry is not None
        if entry.format > snapshots.FORMAT:
            what = f"checkpoint format {entry.format}, this version reads {snapshots.FORMAT}."
            raise RlhfError(Problem("CKP023", str(path), what, "use the rlhf version that wrote it"))
        bad = snapshots.damaged(path, entry)
        if bad is None:
            return path, entry
        problems.append(f"{path.name}: {bad}")
        log.warning("Checkpoint %s: %s; an earlier one is used.", path.name, bad)
    if problems:
        what = f"{len(paths)} checkpoints, none is whole: {'; '.join(problems[:5])}."
        raise RlhfError(Problem("CKP022", str(directory), what, "restore a file, or start anew with --overwrite"))
    return None
