"""A run directory while its stage is at work: opening it, the log, the metrics, the samples."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from rlhf import artifacts, storage
from rlhf.errors import Problem, RlhfError

log = logging.getLogger("rlhf")


def changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Every input that differs between two identities, as 'key: old -> new'."""
    return [
        f"{key}: {_short(old.get(key))} -> {_short(new.get(key))}"
        for key in sorted({*old, *new})
        if old.get(key) != new.get(key)
    ]


def status(run_dir: Path, identity: Mapping[str, Any]) -> list[str] | None:
    """None: a finished run with this identity is there. Else the reasons why it is not, the first one telling most."""
    if not run_dir.exists() or (run_dir.is_dir() and not any(run_dir.iterdir())):
        return ["no run yet"]
    if not artifacts.is_finished(run_dir):
        return ["unfinished run"]
    return changes(artifacts.read(run_dir).identity, identity) or None


def mark_current(run_dir: Path) -> None:
    """Give an up-to-date run's manifest today's time, so that make sees it as newer than its touched inputs."""
    (run_dir / artifacts.MANIFEST).touch()


def open_run(run_dir: Path, identity: Mapping[str, Any], config_text: str, overwrite: bool) -> Run:
    """A fresh run directory that holds ``config.yaml``; what stood there is refused, or moved aside if ``overwrite``.

    Raises:
        RlhfError: CKP006 if another run stands there and ``overwrite`` is false; CFG010 if the path is a file.
    """
    if run_dir.exists() and not run_dir.is_dir():
        raise RlhfError(Problem("CFG010", str(run_dir), "run_dir is a file.", "name a directory"))
    reasons = status(run_dir, identity)
    if reasons != ["no run yet"]:
        if not overwrite:
            what = "; ".join(reasons or ["a finished run stands there"])
            fix = "another run_dir, or --overwrite, which moves the old run aside"
            raise RlhfError(Problem("CKP006", str(run_dir), f"not empty, and not this run: {what}.", fix))
        aside = storage.move_aside(run_dir)
        log.warning("The run that stood in %s is now %s.", run_dir, aside)
    run_dir.mkdir(parents=True, exist_ok=True)
    storage.write_text(run_dir / artifacts.CONFIG, config_text)
    return Run(run_dir)


class Run:
    """The only writer of a run directory."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._handler = logging.FileHandler(path / artifacts.LOG, encoding="utf-8")
        self._handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        log.addHandler(self._handler)

    def close(self) -> None:
        log.removeHandler(self._handler)
        self._handler.close()

    def __enter__(self) -> Run:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def write_metrics(self, step: int, values: Mapping[str, float]) -> None:
        """One line of metrics.jsonl. A value that is not finite is written as a string: "nan", never 0 or a gap."""
        row = {"step": step, **{key: plain(value) for key, value in values.items()}}
        storage.append_text(self.path / artifacts.METRICS, json.dumps(row) + "\n")

    def write_samples(self, name: str, rows: Iterable[Mapping[str, Any]]) -> None:
        """samples/NAME.jsonl, whole."""
        (self.path / artifacts.SAMPLES).mkdir(exist_ok=True)
        write_samples(self.path / artifacts.SAMPLES / f"{name}.jsonl", rows)

    def finish(self, manifest: artifacts.Manifest) -> artifacts.Manifest:
        """Write the manifest, last. Figures that are not finite stand in it as "nan" or "inf"."""
        metrics = {name: plain(value) for name, value in manifest.metrics.items()}
        complete = artifacts.write(self.path, replace(manifest, metrics=metrics))
        log.info("Finished %s in %.0f s.", self.path, manifest.seconds)
        return complete


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
