"""JSON lines on the standard streams, for commands that stand in a shell pipe."""

from __future__ import annotations

import json
import logging
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from rlhf import storage
from rlhf.config.sections import DataSection
from rlhf.data.sources import Loaded

log = logging.getLogger("rlhf")


def load(read: Callable[[DataSection], Loaded], source: str) -> tuple[Any, ...]:
    """The records of ``source``; ``-`` is JSONL on standard input, whose errors name lines. Warnings are logged."""
    with tempfile.TemporaryDirectory(prefix="rlhf-") as directory:
        path = source
        if source == "-":
            path = str(Path(directory) / "stdin.jsonl")
            Path(path).write_bytes(sys.stdin.buffer.read())
        loaded = read(DataSection(path=path))
    for note in loaded.notes():
        log.warning("%s: %s.", source, note)
    return loaded.records


def write(out: str, rows: Iterable[Mapping[str, Any]]) -> None:
    """To the file ``out``, whole, or to standard output where it is ``-``."""
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    if out == "-":
        sys.stdout.write(text)
        sys.stdout.flush()
    else:
        storage.write_text(Path(out), text)
