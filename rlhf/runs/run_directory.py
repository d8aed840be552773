"""A run directory while its stage is at work: opening it, going on with it, the log, the metrics, the samples."""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from rlhf.errors import Problem, RlhfError
from rlhf.runs import artifacts, storage
from rlhf.runs.identity import Identity
from rlhf.runs.progress import waiting

log = logging.getLogger("rlhf")
TAIL = 1 << 16  # bytes: more than the longest line of metrics


def described(changes: Mapping[str, tuple[Any, Any]]) -> list[str]:
    """Each as 'key: old -> new'."""
    return [f"{key}: {_short(old)} -> {_short(new)}" for key, (old, new) in changes.items()]


def status(run_dir: Path, identity: Identity) -> list[str] | None:
    """None: a finished run with this identity is there. Else the reasons why it is not, the first one telling most."""
    if not run_dir.exists() or (run_dir.is_dir() and all(_is_nothing(path.name) for path in run_dir.iterdir())):
        return ["no run yet"]
    if not artifacts.is_finished(run_dir):
        return ["unfinished run"]
    return described(identity.changes(artifacts.read(run_dir).identity)) or None


def _is_nothing(name: str) -> bool:
    """What stands in a run directory before the first step, evaluation or sample: nothing would be lost."""
    preliminary = (artifacts.LOCK, artifacts.CONFIG, artifacts.STARTED, artifacts.LOG, artifacts.RUBRIC)
    return name in preliminary or (name.startswith(".") and ".tmp-" in name)


def mark_current(run_dir: Path) -> None:
    """Give an up-to-date run's manifest today's time, so that make sees it as newer than its touched inputs."""
    (run_dir / artifacts.MANIFEST).touch()


def open_run(
    run_dir: Path,
    stage: str,
    identity: Identity,
    config_text: str,
    *,
    overwrite: bool = False,
    resume: bool = False,
    allowed: Sequence[str] = (),
) -> Run:
    """The run directory of a stage that starts, or with ``resume`` of one that goes on where it was cut off.

    What else stands there is refused, or moved aside if ``overwrite``. With both, an unfinished run of this identity
    goes on, and anything else is moved aside.

    Args:
        allowed: identity keys (or their sections) whose change a resumed run may have.

    Raises:
        RlhfError: CKP006 if another run stands there; CKP007 if another process writes it; CKP008 if the unfinished
            run is not this one; CFG010 if the path is a file.
    """
    if run_dir.exists() and not run_dir.is_dir():
        raise RlhfError(Problem("CFG010", str(run_dir), "run_dir is a file.", "name a directory"))
    lock = _lock(run_dir)
    try:
        reasons = status(run_dir, identity)
        again = reasons == ["unfinished run"] and resume and _may_resume(run_dir, stage, identity, allowed, overwrite)
        if not again and reasons != ["no run yet"]:
            if not overwrite:
                raise _not_this_run(run_dir, reasons)
            aside = storage.move_aside(run_dir)
            log.warning("The run that stood in %s is now %s.", run_dir, aside)
            os.close(lock)
            lock = _lock(run_dir)
        if resume and not again and not overwrite:
            log.info("Nothing to resume in %s: starts at the beginning.", run_dir)
        storage.sweep(run_dir)
        artifacts.write_config(run_dir, config_text)
        storage.write_json(run_dir / artifacts.STARTED, {"format": 1, "stage": stage, "identity": identity.values})
    except BaseException:
        os.close(lock)
        raise
    return Run(run_dir, lock, again)


@contextmanager
def locked(run_dir: Path) -> Iterator[None]:
    """For a change to a finished run: nobody else writes it. CKP007 if another process does."""
    lock = _lock(run_dir)
    try:
        yield
    finally:
        os.close(lock)


def is_begun(run_dir: Path) -> bool:
    """Whether a stage was started here, and perhaps finished."""
    return artifacts.is_finished(run_dir) or storage.is_file(run_dir / artifacts.STARTED)


def last_step(run_dir: Path) -> int | None:
    """The step of the last figures that were written; None before the first."""
    path = run_dir / artifacts.METRICS
    if not storage.is_file(path):
        return None
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - TAIL))
        rows = file.read().splitlines()
    for row in reversed(rows):
        try:
            return int(json.loads(row)["step"])
        except (ValueError, KeyError, TypeError):
            continue  # cut off where the process ended, or where the tail begins
    return None


def started(run_dir: Path) -> dict[str, Any]:
    """Stage and identity of a run that has been started.

    Raises:
        RlhfError: CKP001 where no stage was ever started, CKP003 if the file is not readable.
    """
    path = run_dir / artifacts.STARTED
    if not path.is_file():
        raise RlhfError(Problem("CKP001", str(run_dir), "no run was started here.", "run the stage that makes it"))
    try:
        found = json.loads(path.read_text("utf-8"))
        return {"stage": str(found["stage"]), "identity": dict(found["identity"])}
    except (ValueError, KeyError, TypeError) as error:
        raise RlhfError(Problem("CKP003", str(path), f"is not readable: {error}.", "make the run again")) from None


def _not_this_run(run_dir: Path, reasons: Sequence[str] | None) -> RlhfError:
    fix = "another run_dir, or --overwrite, which moves the old run aside"
    if reasons == ["unfinished run"]:
        fix = f"--resume, which goes on with it; {fix}"
    what = f"not empty, and not this run: {'; '.join(reasons or ['a finished run stands there'])}."
    return RlhfError(Problem("CKP006", str(run_dir), what, fix))


def _lock(run_dir: Path) -> int:
    run_dir.mkdir(parents=True, exist_ok=True)
    descriptor = storage.lock(run_dir / artifacts.LOCK)
    if descriptor is None:
        what = "another process is writing this run."
        raise RlhfError(Problem("CKP007", str(run_dir), what, "wait for it, or name another run_dir"))
    return descriptor


def _may_resume(run_dir: Path, stage: str, identity: Identity, allowed: Sequence[str], overwrite: bool) -> bool:
    """Whether the unfinished run is this one, but for what is ``allowed`` to differ; raises CKP008 if not."""
    if not (run_dir / artifacts.STARTED).is_file():
        return False
    before = started(run_dir)
    changes = identity.changes(before["identity"])
    refused = {
        name: change
        for name, change in changes.items()
        if not _is_allowed(name, allowed) and not _is_mere_length(name, identity.values)
    }
    if before["stage"] != stage:
        refused = {"stage": (before["stage"], stage), **refused}
    if not refused:
        for change in described(changes):
            log.warning("Resumes with a change: %s.", change)
        return True
    if overwrite:
        return False
    fix = f"restore it, or --allow-change {next(iter(refused))}"
    raise RlhfError(
        *(Problem("CKP008", str(run_dir), f"was started with other inputs: {one}.", fix) for one in described(refused))
    )


def _is_allowed(name: str, allowed: Sequence[str]) -> bool:
    return any(name == key or name.startswith(f"{key}.") for key in allowed)


def _is_mere_length(name: str, identity: Mapping[str, Any]) -> bool:
    """With a constant learning rate the first steps do not depend on how many follow, unless another member does."""
    constant = identity.get("optim.schedule") == "constant" and not identity.get("optim.warmup_ratio")
    return name in ("steps", "epochs") and constant and identity.get("members", 1) == 1


class Run:
    """The only writer of a run directory.

    Args:
        lock: descriptor that holds the directory's lock.
        resumed: the directory holds the beginning of this run.

    ``complete`` adds to the manifest what no stage knows of itself: which gates the run failed, and what was accepted.
    """

    complete: Callable[[artifacts.Manifest], artifacts.Manifest] | None = None

    def __init__(self, path: Path, lock: int, resumed: bool = False) -> None:
        self.path, self.resumed, self._lock = path, resumed, lock
        self._handler = logging.FileHandler(path / artifacts.LOG, "a" if resumed else "w", encoding="utf-8")
        self._handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        log.addHandler(self._handler)

    def close(self) -> None:
        log.removeHandler(self._handler)
        self._handler.close()
        os.close(self._lock)

    def __enter__(self) -> Run:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def write_metrics(self, step: int, values: Mapping[str, float]) -> None:
        """One line of metrics.jsonl. A value that is not finite is written as a string: "nan", never 0 or a gap."""
        row = {"step": step, **{key: plain(value) for key, value in values.items()}}
        storage.append_text(self.path / artifacts.METRICS, json.dumps(row) + "\n")

    def metrics_size(self) -> int:
        """Bytes of metrics.jsonl so far."""
        path = self.path / artifacts.METRICS
        return path.stat().st_size if path.is_file() else 0

    def rewind(self, metrics_size: int) -> None:
        """Cut metrics.jsonl back to ``metrics_size`` bytes: the lines after it are about to be written again."""
        storage.truncate(self.path / artifacts.METRICS, metrics_size)

    def write_samples(self, name: str, rows: Iterable[Mapping[str, Any]]) -> None:
        """samples/NAME.jsonl, whole."""
        (self.path / artifacts.SAMPLES).mkdir(exist_ok=True)
        write_samples(self.path / artifacts.SAMPLES / f"{name}.jsonl", rows)

    def finish(self, manifest: artifacts.Manifest) -> artifacts.Manifest:
        """Write the manifest, last. Figures that are not finite stand in it as "nan" or "inf"."""
        metrics = {name: plain(value) for name, value in manifest.metrics.items()}
        manifest = replace(manifest, metrics=metrics)
        manifest = self.complete(manifest) if self.complete else manifest
        with waiting(f"Hashing what stands in {self.path}"):
            written = artifacts.write(self.path, manifest)
        log.info("Finished %s in %.0f s.", self.path, manifest.seconds)
        return written


def write_samples(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """JSON lines, the file whole."""
    storage.write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    path = run_dir / artifacts.METRICS
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()] if path.is_file() else []


def plain(value: Any) -> Any:
    """A number fit for strict JSON: not-finite floats become "nan", "inf" or "-inf"."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 40 else text[:12] + "..."
