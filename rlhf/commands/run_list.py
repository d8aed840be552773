"""The runs below a directory: stage, date, state and headline figure of each, without opening a model."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rlhf.errors import RlhfError
from rlhf.runs import artifacts, run_directory, storage
from rlhf.runs.artifacts import Manifest

RUNS = Path("runs")
ASIDE = re.compile(r"\.old-\d+$")
SHOWN = 3
COLUMNS = ("run", "stage", "date", "state", "figures")
NEXT = "Next: rlhf pipeline, which runs the stages of configs/pipeline.yaml, or rlhf init, which writes these configs."


@dataclass(frozen=True)
class Entry:
    """One run as the list has it.

    Args:
        step: the last one that an unfinished run wrote figures of; None for a finished run, or before the first.
    """

    run_dir: str
    stage: str
    date: str
    state: str
    figures: str = ""
    step: int | None = None
    is_finished: bool = False
    is_moved_aside: bool = False


def below(directory: Path) -> list[Entry]:
    """Every run in ``directory``, itself too, at any depth, by path."""
    return [_entry(path) for path in sorted(_runs_in(directory))]


def lines(entries: Sequence[Entry], directory: Path) -> list[str]:
    """The list as a table; of no run, what to do next."""
    if not entries:
        return [f"No run in {directory} yet. {NEXT}"]
    rows = [COLUMNS, *((one.run_dir, one.stage, one.date, _state(one), one.figures) for one in entries)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(f"{text:<{width}}" for text, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def _runs_in(directory: Path) -> Iterator[Path]:
    """A link to a run counts as one; other links are not followed, hidden directories are half-written ones."""
    if run_directory.is_begun(directory):
        yield directory
    for place, names, _ in os.walk(directory):
        names[:] = sorted(name for name in names if not name.startswith(".") and name not in artifacts.PARTS)
        yield from (path for name in names if run_directory.is_begun(path := Path(place, name)))


def _entry(path: Path) -> Entry:
    aside = ASIDE.search(path.name) is not None
    if not artifacts.is_finished(path):
        return _unfinished(path, aside)
    try:
        manifest = artifacts.read(path)
    except RlhfError as error:
        what = error.problems[0].what.rstrip(".")
        return Entry(str(path), "?", _day(path / artifacts.MANIFEST), f"damaged: {what}", is_moved_aside=aside)
    state = "finished"
    if changed := _changed(path, manifest):
        state = f"damaged: {', '.join(changed[:2])}{', ...' if len(changed) > 2 else ''}"
    elif failed := artifacts.failed_gates(manifest):
        named = (f"{one.code} {one.where.removeprefix(f'{path}: ')}" for one in failed)
        state = f"failed a gate: {', '.join(named)}"
    figures = HEADLINES.get(manifest.stage, lambda _: "")(manifest)
    return Entry(
        str(path), manifest.stage, manifest.created[:10], state, figures, is_finished=True, is_moved_aside=aside
    )


def _unfinished(path: Path, aside: bool) -> Entry:
    date = _day(path / artifacts.STARTED)
    try:
        stage = run_directory.started(path)["stage"]
    except RlhfError as error:
        what = f"damaged: {artifacts.STARTED} {error.problems[0].what.rstrip('.')}"
        return Entry(str(path), "?", date, what, is_moved_aside=aside)
    step = run_directory.last_step(path)
    state = "unfinished, before its first step" if step is None else f"unfinished at step {step}"
    return Entry(str(path), stage, date, state, step=step, is_moved_aside=aside)


def _state(entry: Entry) -> str:
    return f"{entry.state} (moved aside)" if entry.is_moved_aside else entry.state


def _changed(path: Path, manifest: Manifest) -> list[str]:
    """Files that are missing or of another size; their content is compared where a run is used."""
    found = []
    for name, entry in manifest.files.items():
        if not storage.is_file(path / name):
            found.append(f"{name} is missing")
        elif (path / name).stat().st_size != entry["size"]:
            found.append(f"{name} has another size")
    return found


def _day(path: Path) -> str:
    return datetime.fromtimestamp(path.stat().st_mtime, UTC).date().isoformat() if storage.is_file(path) else "?"


def _sft(manifest: Manifest) -> str:
    measured = manifest.metrics
    return _joined(
        ("held-out loss", measured.get("eval/loss")),
        ("before", measured.get("eval/base_loss")),
        ("end rate", measured.get("eval/end_token_rate")),
    )


def _reward(manifest: Manifest) -> str:
    return _joined(("accuracy", manifest.metrics.get("eval/accuracy")), ("members", manifest.details.get("members")))


def _examination(manifest: Manifest) -> str:
    failed = [str(name) for name in manifest.details.get("failed") or []]
    named = f" ({', '.join(failed[:SHOWN])}{', ...' if len(failed) > SHOWN else ''})" if failed else ""
    if verdict := manifest.details.get("verdict"):
        return f"verdict {verdict}{named}"
    return _joined(("no verdict, accuracy", manifest.metrics.get("eval/accuracy")))


def _ppo(manifest: Manifest) -> str:
    measured, details = manifest.metrics, manifest.details
    best = details.get("best_step")
    return _joined(
        ("score", measured.get("eval/score")),
        ("before", measured.get("start/score")),
        ("KL", measured.get("eval/exact_kl_nats")),
        ("best step", None if best is None else f"{best} of {details.get('last_step')}"),
    )


def _collect(manifest: Manifest) -> str:
    return _joined(("prompts", manifest.metrics.get("collect/prompts")))


HEADLINES: dict[str, Callable[[Manifest], str]] = {
    "sft": _sft, "train-rm": _reward, "eval-rm": _examination, "ppo": _ppo, "collect": _collect,
}  # fmt: skip


def _joined(*figures: tuple[str, Any]) -> str:
    return ", ".join(f"{name} {_short(value)}" for name, value in figures if value is not None)


def _short(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else value if isinstance(value, str) else json.dumps(value)
