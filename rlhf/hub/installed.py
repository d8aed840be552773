"""Whether the libraries that a config asks for, and that are no dependency, are installed."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence

from rlhf.errors import Problem


def missing_trackers(report_to: str | Sequence[str] | None) -> list[Problem]:
    """A problem for each tracker that is asked for and not there. Nothing is imported for it."""
    named = [report_to] if isinstance(report_to, str) else report_to or []
    return [
        Problem("RES021", f"report_to: {name}", f"the package {name} is not installed.", f"pip install {name}")
        for name in dict.fromkeys(named)
        if name != "none" and not _is_there(name)
    ]


def missing_for_serving() -> list[Problem]:
    """RES005 where the libraries of the HTTP service are not installed."""
    lacking = [name for name in ("fastapi", "uvicorn") if not _is_there(name)]
    if not lacking:
        return []
    what = f"needs {' and '.join(lacking)}, not installed."
    return [Problem("RES005", "rlhf serve", what, "pip install 'rlhf-pipeline[serve]'")]


def missing_for_annotators() -> list[Problem]:
    """RES024 where the libraries for several annotators' labels are not installed."""
    lacking = [
        name
        for name, package in (("crowd-kit", "crowdkit"), ("krippendorff", "krippendorff"))
        if not _is_there(package)
    ]
    if not lacking:
        return []
    what = f"needs {' and '.join(lacking)}, not installed."
    return [Problem("RES024", "consensus, hold_out_annotators", what, "pip install 'rlhf-pipeline[annotators]'")]


def _is_there(package: str) -> bool:
    """A folder of that name, such as the one that W&B writes, is no package."""
    spec = importlib.util.find_spec(package)
    return spec is not None and spec.origin is not None
