"""JSON lines on the standard streams, for commands that stand in a shell pipe."""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from rlhf import storage


def stdin_as_file() -> Path:
    """Standard input as a JSONL file in a temporary directory, so that its errors name lines."""
    path = Path(tempfile.mkdtemp(prefix="rlhf-")) / "stdin.jsonl"
    path.write_bytes(sys.stdin.buffer.read())
    return path


def write(out: str, rows: Iterable[Mapping[str, Any]]) -> None:
    """To the file ``out``, whole, or to standard output where it is ``-``."""
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    if out == "-":
        sys.stdout.write(text)
        sys.stdout.flush()
    else:
        storage.write_text(Path(out), text)
