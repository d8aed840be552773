"""The metrics in TensorBoard, W&B, trackio or MLflow beside metrics.jsonl, through accelerate's trackers."""

from __future__ import annotations

import logging
import os
import shutil
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from accelerate import PartialState, tracking

from rlhf import secrets
from rlhf.errors import Problem, RlhfError
from rlhf.runs import artifacts, run_directory

log = logging.getLogger("rlhf")
FOLDER, TENSORBOARD = "trackers", "tensorboard"
PROJECT = "rlhf"


def names_of(report_to: str | Sequence[str]) -> list[str]:
    """The trackers that a config asks for, each once."""
    named = [report_to] if isinstance(report_to, str) else report_to
    return [name for name in dict.fromkeys(named) if name != "none"]


class Tracker:
    """Shows the rows of metrics.jsonl elsewhere: each of them once, also where a run is cut off and goes on.

    When a run goes on, metrics.jsonl has been cut back to the checkpoint. TensorBoard's files are written anew from it.
    A service keeps what it was sent; RUN/trackers counts it, so that what comes again is not sent again, and what was
    never sent (a tracker that the config names only now) is.

    Raises:
        RlhfError: RES020 where a tracker cannot be started or written.
    """

    def __init__(self, run_dir: Path, report_to: str | Sequence[str]) -> None:
        self.targets = [_Target(run_dir, name) for name in names_of(report_to)]
        if not self.targets:
            return
        rows = run_directory.read_metrics(run_dir)
        for target in self.targets:
            for row in rows:
                values = {key: float(value) for key, value in row.items() if key != "step"}
                target.write(row["step"], values)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        for target in self.targets:
            target.write(step, values)

    def close(self) -> None:
        for target in self.targets:
            with _told(target.name, "closed"):
                target.tracker.finish()


class _Target:
    """One tracker, and how many rows it has been sent: a byte each in RUN/trackers/NAME.sent.

    The byte is written first: a kill between the two loses a point there, and never doubles one.
    """

    def __init__(self, run_dir: Path, name: str) -> None:
        self.name, self.position = name, 0
        folder = run_dir / FOLDER
        folder.mkdir(exist_ok=True)
        self.count, known = folder / f"{name}.sent", folder / f"{name}.id"
        if name == TENSORBOARD:
            self.count.unlink(missing_ok=True)
            shutil.rmtree(run_dir / TENSORBOARD, ignore_errors=True)
        self.count.touch()
        self.sent = self.count.stat().st_size
        identifier = known.read_text("utf-8") if known.is_file() else None
        with _told(name, "started"):
            self.tracker = _open(name, run_dir, identifier or uuid.uuid4().hex[:16], identifier is not None, known)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Send the next row of metrics.jsonl, unless it was sent already."""
        self.position += 1
        if self.position <= self.sent:
            return
        with self.count.open("ab") as file:
            file.write(b".")
        with _told(self.name, "written"):
            self.tracker.log(dict(values), step=step)


def _open(name: str, run_dir: Path, identifier: str, again: bool, known: Path) -> Any:
    """The tracker, started. What it is told of the run is the identity of run.json, in which no secret stands."""
    PartialState(cpu=True)  # accelerate's trackers ask whether theirs is the main process, and need no device for it
    if name == TENSORBOARD:
        tracker: Any = tracking.TensorBoardTracker(TENSORBOARD, run_dir)
        tracker.start()
        return tracker
    title = run_dir.resolve().name
    identity = run_directory.started(run_dir)["identity"] if (run_dir / artifacts.STARTED).is_file() else {}
    told = {
        key: value if isinstance(value, int | float) else secrets.mask(str(value)) for key, value in identity.items()
    }
    if name == "wandb":
        known.write_text(identifier, "utf-8")
        tracker = tracking.WandBTracker(
            os.environ.get("WANDB_PROJECT", PROJECT),
            name=title,
            id=identifier,
            resume="allow",
            dir=str(run_dir),
            config=told,
            settings={"console": "off"},
        )
    elif name == "trackio":
        known.write_text(identifier, "utf-8")
        project = os.environ.get("TRACKIO_PROJECT", PROJECT)
        tracker = tracking.TrackioTracker(project, name=f"{title}-{identifier}", resume="allow", config=told)
    else:
        run_id = identifier if again else None
        tracker = tracking.MLflowTracker(PROJECT, run_id=run_id, run_name=title)
    tracker.start()
    if name == "mlflow" and not again:
        known.write_text(tracker.tracker.info.run_id, "utf-8")
        tracker.store_init_configuration(told)
    return tracker


@contextmanager
def _told(name: str, what: str) -> Iterator[None]:
    """Whatever a tracker's library raises, with the tracker's name."""
    try:
        yield
    except Exception as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        fix = "see to its settings, or leave it out of report_to; --resume goes on from the last checkpoint"
        raise RlhfError(
            Problem("RES020", f"report_to: {name}", f"cannot be {what}: {first.rstrip('.')}.", fix)
        ) from error
