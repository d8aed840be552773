"""Opening a data file, gzipped or not, and refusing one that is not what its name says."""

from __future__ import annotations

import gzip
import io
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rlhf.errors import Problem, RlhfError

SIGNATURES = {b"\x1f\x8b": "gzip", b"PAR1": "parquet", b"PK\x03\x04": "zip"}


@contextmanager
def binary(path: Path, kind: str) -> Iterator[io.BufferedReader]:
    """The file's bytes, unpacked where it is named .gz; ``kind`` is what it should be.

    Raises:
        RlhfError: DAT010 if it cannot be opened or unpacked, or is another format.
    """
    try:
        if not path.exists():
            raise RlhfError(Problem("DAT010", str(path), "no such file.", "check the path"))
        if path.is_dir():
            raise RlhfError(Problem("DAT010", str(path), f"is a directory, need a {kind} file.", "name a file in it"))
        raw = path.open("rb")
    except OSError as error:
        what = f"cannot be opened: {error.strerror}."
        raise RlhfError(Problem("DAT010", str(path), what, "check the path and your rights to read it")) from None
    with raw:
        head = raw.read(4)
        raw.seek(0)
        found = next((name for mark, name in SIGNATURES.items() if head.startswith(mark)), None)
        if path.suffix == ".gz":
            stream: Any = gzip.GzipFile(fileobj=raw)
        elif found:
            what = f"looks like {found}, not {kind}."
            raise RlhfError(Problem("DAT010", str(path), what, "give it its own suffix"))
        else:
            stream = raw
        try:
            yield io.BufferedReader(stream)
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            what, fix = f"not a whole gzip file: {error}.", "fetch or pack it again"
            raise RlhfError(Problem("DAT010", str(path), what, fix)) from None
