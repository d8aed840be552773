"""One checkpoint on the disk: a dict of Stateful objects as safetensors and JSON, whole or not at all, and verified."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors.torch import load_file
from safetensors.torch import save as save_tensors
from torch import Tensor

from rlhf.errors import Problem, RlhfError
from rlhf.runs import artifacts, storage

log = logging.getLogger("rlhf")
TENSORS, VALUES, MANIFEST = "tensors.safetensors", "values.json", "checkpoint.json"
FORMAT = 2


class Stateful(Protocol):
    """Whatever changes during a run and must come back exactly."""

    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: dict[str, Any]) -> None: ...


@dataclass(frozen=True)
class Entry:
    """What a checkpoint's own manifest says.

    Args:
        step: training step, as in its name; order: what is newest, also among checkpoints of one step.
        metrics_size: bytes of metrics.jsonl at that moment; seconds: time that the run had taken.
        states: names of what is held; files: path relative to ``RUN/checkpoints`` -> size and SHA-256.
        versions: of the libraries that wrote it.
    """

    step: int
    order: int
    metrics_size: int
    seconds: float
    states: list[str]
    files: dict[str, dict[str, Any]]
    versions: dict[str, str]
    format: int = FORMAT


def save(
    directory: Path,
    step: int,
    order: int,
    seconds: float,
    metrics_size: int,
    state: Mapping[str, Stateful],
    needs: Sequence[str] = (),
) -> None:
    """Write every state, whole or not at all. No pickle: tensors in safetensors, all else in JSON.

    Raises:
        RlhfError: GRD005 if a tensor is not finite; nothing is written then.
    """
    packed = _packed(state, directory)
    with storage.staged_directory(directory) as staging:
        _write(staging, *packed)
        files = {f"{directory.name}/{name}": _file(staging / name) for name in (TENSORS, VALUES)}
        for need in needs:
            paths = [path for path in sorted((directory.parent / need).rglob("*")) if path.is_file()]
            files |= {path.relative_to(directory.parent).as_posix(): _file(path) for path in paths}
        versions = {name: metadata.version(name) for name in artifacts.PACKAGES}
        entry = Entry(step, order, metrics_size, seconds, sorted(state), files, versions)
        storage.write_text(staging / MANIFEST, _render(entry))


def save_state(directory: Path, state: Mapping[str, Stateful]) -> None:
    """The states alone, whole or not at all, for ``read``: what a checkpoint then names among its needs.

    Raises:
        RlhfError: GRD005 as ``save``.
    """
    packed = _packed(state, directory)
    with storage.staged_directory(directory) as staging:
        _write(staging, *packed)


def require_finite(tensors: Mapping[str, Tensor], target: Path) -> None:
    """Raise GRD005 for weights that are not numbers, before anything of them is written to ``target``."""
    broken = [name for name, tensor in tensors.items() if not bool(torch.isfinite(tensor).all())]
    if broken:
        what = f"{len(broken)} tensors are not finite, such as {broken[0]}; nothing was written."
        raise RlhfError(Problem("GRD005", str(target), what, "a lower learning rate"))


def read_entry(directory: Path) -> Entry | None:
    """A checkpoint's manifest; None if it is missing or not, byte for byte, what was written."""
    try:
        text = (directory / MANIFEST).read_text("utf-8")
        value = json.loads(text)
        entry = Entry(**{key: item for key, item in value.items() if key != "digest"})
    except (OSError, ValueError, TypeError, AttributeError):
        return None
    return entry if text == _render(entry) else None


def damaged(directory: Path, entry: Entry) -> str | None:
    """The first file that is missing or differs from the manifest, and how; None if all is whole."""
    own = {f"{directory.name}/{name}" for name in (TENSORS, VALUES)}
    if not own <= set(entry.files):
        return f"{MANIFEST} belongs to another checkpoint"
    for name, wanted in entry.files.items():
        try:
            found = _file(directory.parent / name)
        except OSError as error:
            return f"{name}: {error.strerror}"
        if found != wanted:
            return (
                f"{name} has {found['size']} bytes, SHA-256 {found['sha256'][:12]}; "
                f"expected {wanted['size']}, {wanted['sha256'][:12]}"
            )
    return None


def load(directory: Path, entry: Entry, state: Mapping[str, Stateful]) -> None:
    """Give every state of a verified checkpoint back.

    Raises:
        RlhfError: CKP021 if the states are not the same ones, or of another shape.
    """
    if entry.states != sorted(state):
        what = f"holds {', '.join(entry.states)}; needed: {', '.join(sorted(state))}."
        raise RlhfError(Problem("CKP021", str(directory), what, "a checkpoint of this stage"))
    for name, version in entry.versions.items():
        if version != metadata.version(name):
            log.warning(
                "%s is %s here and was %s: what follows may differ in its bits.", name, metadata.version(name), version
            )
    found = read(directory)
    for name, part in state.items():
        try:
            part.load_state_dict(found[name])
        except (ValueError, RuntimeError) as error:
            what = f"{name} does not fit: {str(error).splitlines()[0]}"
            raise RlhfError(
                Problem("CKP021", str(directory), what, "the config that the run was started with")
            ) from None


def read(directory: Path) -> dict[str, dict[str, Any]]:
    """name -> state, of a verified checkpoint or of what ``save_state`` wrote."""
    tensors = load_file(directory / TENSORS)
    values = json.loads((directory / VALUES).read_text("utf-8"))
    return {name: _unpack(value, tensors) for name, value in values.items()}


def _render(entry: Entry) -> str:
    """The manifest with its own digest, in one form only: any other byte is damage."""
    digest = storage.sha256_json(vars(entry))
    return json.dumps({**vars(entry), "digest": digest}, sort_keys=True, ensure_ascii=False) + "\n"


def _packed(state: Mapping[str, Stateful], target: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """All tensors by path, and the rest as JSON values; ``target`` is where an error says they were to go."""
    tensors: dict[str, Tensor] = {}
    values = {name: _pack(part.state_dict(), name, tensors) for name, part in state.items()}
    require_finite(tensors, target)
    return tensors, values


def _write(directory: Path, tensors: dict[str, Tensor], values: dict[str, Any]) -> None:
    storage.write_bytes(directory / TENSORS, save_tensors(tensors))
    storage.write_json(directory / VALUES, values)


def _file(path: Path) -> dict[str, Any]:
    return {"sha256": storage.sha256(path), "size": path.stat().st_size}


def _pack(value: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    """``value`` as JSON that says its types; tensors go to ``tensors`` under their path."""
    if isinstance(value, Tensor):
        assert path not in tensors, f"{path}: two tensors of one name"
        tensors[path] = value.detach().cpu().clone().contiguous()
        return {"tensor": path}
    if isinstance(value, dict):
        items = [[_pack(key, "", tensors), _pack(item, f"{path}/{key}", tensors)] for key, item in value.items()]
        return {"dict": items}
    if isinstance(value, list | tuple):
        kind = "list" if isinstance(value, list) else "tuple"
        return {kind: [_pack(item, f"{path}/{index}", tensors) for index, item in enumerate(value)]}
    if isinstance(value, float):
        return {"float": value.hex()}
    assert value is None or isinstance(value, bool | int | str), f"{path}: {type(value)} has no place in a checkpoint"
    return value


def _unpack(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    if not isinstance(value, dict):
        return value
    kind, inner = next(iter(value.items()))
    if kind == "tensor":
        return tensors[inner]
    if kind == "dict":
        return {_unpack(key, tensors): _unpack(item, tensors) for key, item in inner}
    if kind == "float":
        return float.fromhex(inner)
    found = [_unpack(item, tensors) for item in inner]
    return found if kind == "list" else tuple(found)
