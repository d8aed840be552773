"""Settings that choose among the data of a hub are refused where there is nothing to choose."""

from __future__ import annotations

from rlhf.config.sections import SourceSection
from rlhf.errors import Problem, RlhfError

NOT_REACHED = "DAT015"


def refuse_settings(data: SourceSection, kind: str, *settings: str, fix: str = "") -> None:
    """Raise DAT001 for settings that mean nothing for this kind of data; none is ignored."""
    given = [name for name in settings if getattr(data, name) is not None]
    if given:
        what = f"{' and '.join(given)}: {kind} has no such thing."
        raise RlhfError(Problem("DAT001", data.path, what, fix or "remove the setting"))
