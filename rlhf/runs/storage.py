"""Every byte that a run puts on the disk passes through here: write, fsync, rename, remove."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

CHUNK = 1 << 20


def before(operation: str, path: Path) -> None:
    """Called before every operation (write, sync, rename, remove): the seam where a test fails or counts the Nth."""


def is_file(path: Path) -> bool:
    """Also for names that no file can have, where ``Path.is_file`` raises."""
    return os.path.isfile(path)  # noqa: PTH113


def write_bytes(path: Path, data: bytes) -> None:
    """Replace ``path`` whole: a temporary file beside it, fsync, rename, fsync of the directory."""
    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    try:
        before("write", path)
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            before("sync", path)
            os.fsync(file.fileno())
        before("rename", path)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_directory(path.parent)


def write_text(path: Path, text: str) -> None:
    write_bytes(path, text.encode("utf-8"))


def write_json(path: Path, value: Any) -> None:
    """Indented JSON with a final newline; NaN and infinity are refused, never written."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def append_text(path: Path, text: str) -> None:
    before("write", path)
    with path.open("a", encoding="utf-8") as file:
        file.write(text)


def truncate(path: Path, size: int) -> None:
    """Cut the file to ``size`` bytes; a shorter or missing one is left as it is."""
    if path.is_file() and path.stat().st_size > size:
        before("write", path)
        os.truncate(path, size)
        sync_file(path)


@contextmanager
def staged_directory(target: Path) -> Iterator[Path]:
    """A temporary directory beside ``target`` that takes its name when the block ends well, and vanishes otherwise.

    An existing ``target`` is replaced.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    staging = target.with_name(f".{target.name}.tmp-{os.getpid()}")
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir()
    try:
        yield staging
        _set_modes(staging)
        for path in sorted(staging.rglob("*")):
            if path.is_file():
                sync_file(path)
        for path in sorted(path for path in staging.rglob("*") if path.is_dir()):
            sync_directory(path)
        sync_directory(staging)
        if target.exists():
            remove_directory(target)
        before("rename", target)
        os.replace(staging, target)
        sync_directory(target.parent)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _set_modes(staging: Path) -> None:
    """Give everything the mode that a plain ``open`` or ``mkdir`` gives here: libraries write some files as 0600 and
    rename them, and a copy keeps the mode of what it was made from."""
    probe = staging / f".probe.tmp-{os.getpid()}"
    probe.mkdir()
    (probe / "file").touch()
    of_files, of_directories = ((path.stat().st_mode & 0o777) for path in (probe / "file", probe))
    shutil.rmtree(probe)
    for path in (staging, *staging.rglob("*")):
        wanted = of_directories if path.is_dir() else of_files
        if not path.is_symlink() and path.stat().st_mode & 0o777 != wanted:
            path.chmod(wanted)


def copy_directory(source: Path, target: Path) -> None:
    """``target`` becomes a copy of ``source``, whole or not at all."""
    with staged_directory(target) as staging:
        shutil.copytree(source, staging, dirs_exist_ok=True)


def remove_directory(path: Path) -> None:
    """Rename out of sight first, so that a half-removed directory is never taken for a whole one."""
    trash = path.with_name(f".{path.name}.trash-{os.getpid()}")
    before("remove", path)
    os.replace(path, trash)
    shutil.rmtree(trash)


def sweep(directory: Path) -> None:
    """Remove what a killed process left behind, at any depth: half-written and half-removed directories and files."""
    for path in list(directory.rglob(".*")):
        if ".tmp-" in path.name or ".trash-" in path.name:
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)


def lock(path: Path) -> int | None:
    """An open descriptor that holds the lock of ``path`` until it is closed or the process ends; None if taken."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        return None
    return descriptor


def move_aside(path: Path) -> Path:
    """Rename ``path`` to the first free ``NAME.old-N`` and return it; nothing is deleted."""
    number = 1
    while (aside := path.with_name(f"{path.name}.old-{number}")).exists():
        number += 1
    os.replace(path, aside)
    return aside


def sync_file(path: Path) -> None:
    before("sync", path)
    with path.open("rb") as file:
        os.fsync(file.fileno())


def sync_directory(path: Path) -> None:
    before("sync", path)
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def sha256_json(value: Any) -> str:
    """Digest of a JSON value, independent of key order."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, ensure_ascii=False).encode("utf-8")).hexdigest()
