"""The config that a run keeps of itself, by the names of a run directory's files."""

from __future__ import annotations

import os
from pathlib import Path

MANIFEST, CONFIG, STARTED = "manifest.json", "config.yaml", "run.json"


def is_recorded(path: Path) -> bool:
    """Whether it is the config that a run, finished or not, keeps of itself."""
    return path.name == CONFIG and any(os.path.isfile(path.parent / name) for name in (MANIFEST, STARTED))  # noqa: PTH113
