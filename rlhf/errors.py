"""What can be wrong, said once: a problem with its code, place and fix, and the exit code that follows."""

from __future__ import annotations

import errno
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass

EXIT_OK, EXIT_BUG = 0, 1
EXIT_CODES = {"BUG": EXIT_BUG, "CFG": 2, "DAT": 3, "MOD": 4, "CKP": 5, "RES": 6, "GRD": 7, "SEC": 8, "VER": 10}
MAX_SHOWN = 20
MEMORY = ("out of memory", "bad_alloc", "can't allocate memory", "Cannot allocate memory", "can't start new thread")
DISK = {errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EFBIG, errno.EMFILE}
PLACE = {errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EEXIST}


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong.

    Args:
        code: three letters and three digits; the letters say whose it is: CFG usage or config, DAT data,
            MOD model or tokenizer, CKP run directory or checkpoint, RES resources, GRD guard, SEC security,
            VER a negative verdict that was asked for.
        where: file, line, key or row, as precise as known.
        what: what is wrong there, with the offending value.
        fix: what to do about it; empty where the message already says so.
    """

    code: str
    where: str
    what: str
    fix: str = ""

    def __str__(self) -> str:
        fix = f" Fix: {self.fix}" if self.fix else ""
        return f"error[{self.code}] {self.where}: {self.what}{fix}"


class RlhfError(Exception):
    """A mistake of the user's or of the machine, made of one or more problems; never a bug."""

    def __init__(self, *problems: Problem) -> None:
        assert problems, "an error names at least one problem"
        self.problems: tuple[Problem, ...] = problems
        super().__init__(render(problems))

    @property
    def exit_code(self) -> int:
        return EXIT_CODES[self.problems[0].code[:3]]


def render(problems: Sequence[Problem]) -> str:
    """All problems, one a line, at most ``MAX_SHOWN``."""
    lines = [str(problem) for problem in problems[:MAX_SHOWN]]
    hidden = len(problems) - len(lines)
    return "\n".join(lines + ([f"... and {hidden} more"] if hidden else []))


def render_json(problems: Sequence[Problem], exit_code: int) -> str:
    """The same, whole, for programs: {"exit_code": int, "problems": [{code, where, what, fix}]}."""
    return json.dumps({"exit_code": exit_code, "problems": [asdict(problem) for problem in problems]})


def of_the_machine(error: Exception) -> Problem | None:
    """The problem behind an exception of the disk, the memory or a place without rights; None for any other."""
    fix = "--resume goes on from the last checkpoint, which is whole"
    if isinstance(error, OSError) and error.errno in DISK:
        return Problem("RES010", str(error.filename or "disk"), f"cannot be written or read: {error.strerror}.", fix)
    if isinstance(error, OSError) and error.errno in PLACE:
        what = f"cannot be read or written: {error.strerror}."
        return Problem("RES002", str(error.filename), what, "name another place, or get the right to use this one")
    text = str(error)
    if isinstance(error, MemoryError) or any(words in text for words in MEMORY):
        first = text.splitlines()[0] if text else "out of memory"
        fix = f"a smaller micro_batch_size or sampling.concurrency, gradient_checkpointing; {fix}"
        return Problem("RES011", "memory", f"gave out: {first}", fix)
    return None
