"""A verdict as an exit code, where it was asked for."""

from __future__ import annotations

from rlhf.errors import Problem, RlhfError
from rlhf.runs import artifacts

BEYOND = {"warn": ("warn", "fail"), "fail": ("fail",)}


def require(run_dir: str, fail_on: str) -> None:
    """Raise VER001 where the examination's verdict is ``fail_on`` or worse, VER002 where it has none."""
    details = artifacts.read(run_dir, "examination").details
    found = details.get("verdict")
    if found is None:
        raise RlhfError(Problem("VER002", run_dir, "has no verdict: it is of a benchmark.", "leave --fail-on out"))
    if found in BEYOND[fail_on]:
        failed = f": {', '.join(details['failed'])}" if details["failed"] else ""
        raise RlhfError(Problem("VER001", run_dir, f"the verdict is {found}{failed}.", "its table says what to do"))
