"""Names of models and data sets: an existing local path or a hub id, and nothing that leads elsewhere."""

from __future__ import annotations

import os
import re
from pathlib import Path

from rlhf.errors import Problem

HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", re.ASCII)
REVISION = re.compile(r"[\w.-]+(/[\w.-]+)*", re.ASCII)
COMMIT = re.compile(r"[0-9a-f]{40}")
MAX_HUB_ID = 96
SHOWN = 80


def refused(name: str, key: str, not_found: str, is_file: bool = False) -> Problem | None:
    """What is wrong with the name of a model or data set; None for an existing path and for a hub id.

    Nothing is opened or fetched for it.

    Args:
        not_found: code for what is neither there nor a hub id. What would lead out of where a hub id belongs
            (``..``, percent signs, backslashes, control characters) is SEC006.
        is_file: the name ends like a data file, so that ``../x.jsonl`` is a path that is not there, not a hub id.
    """
    if exists(name):
        return None
    where = f"{key}: {shown(name)}"
    if hidden := leads_elsewhere(name, is_file):
        what = f"no such path, and no hub id: it has {hidden}."
        return Problem("SEC006", where, what, "an existing path, or a hub id such as name or organisation/name")
    if len(name) > MAX_HUB_ID or not HUB_ID.fullmatch(name):
        return Problem(not_found, where, "no such path, and no hub id.", "check the path")
    return None


def refused_revision(revision: str | None, key: str) -> Problem | None:
    """A branch, tag or commit has no part that leads elsewhere."""
    if revision is None or (REVISION.fullmatch(revision) and not leads_elsewhere(revision)):
        return None
    return Problem("SEC006", f"{key}: {shown(revision)}", "no branch, tag or commit.", "name a revision of the hub")


def unpinned_code(trust_remote_code: bool, revision: str | None, key: str) -> Problem | None:
    """Code that comes with a model is run only from a commit: a branch may hold other code tomorrow."""
    if not trust_remote_code or COMMIT.fullmatch(revision or ""):
        return None
    what = "remote code without a pinned revision refused."
    return Problem("SEC004", key, what, "set revision to a commit (40 hexadecimal digits)")


def exists(name: str) -> bool:
    """Also for names that no path can have, where ``Path.exists`` raises."""
    return os.path.exists(name)  # noqa: PTH110


def leads_elsewhere(name: str, is_file: bool = False) -> str | None:
    """What in a name would lead out of a directory, in words; None if nothing does."""
    if any(ord(letter) < 32 or ord(letter) == 127 for letter in name):
        return "a control character"
    for sign, words in (("\\", "a backslash"), ("%", "a percent sign")):
        if sign in name:
            return words
    return "the part '..'" if ".." in Path(name).parts and not is_file else None


def shown(name: str) -> str:
    """A name fit for one line of a message."""
    line = name.encode("unicode_escape").decode("ascii") if not name.isprintable() else name
    return line if len(line) <= SHOWN else f"{line[: SHOWN - 3]}..."
