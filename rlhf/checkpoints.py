"""Checkpoints: a dict of Stateful objects as safetensors and JSON, verified when it is read."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from safetensors.torch import load_file, save_file
from torch import Tensor

from rlhf import storage
from rlhf.errors import Problem, RlhfError

TENSORS, VALUES, MANIFEST = "tensors.safetensors", "values.json", "checkpoint.json"


class Stateful(Protocol):
    """Whatever changes during a run and must come back exactly."""

    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: dict[str, Any]) -> None: ...


def save(directory: Path, state: Mapping[str, Stateful]) -> None:
    """Write every state, whole or not at all. No pickle: tensors in safetensors, all else in JSON."""
    tensors: dict[str, Tensor] = {}
    values = {name: _pack(part.state_dict(), name, tensors) for name, part in state.items()}
    with storage.staged_directory(directory) as staging:
        save_file(tensors, staging / TENSORS)
        storage.write_json(staging / VALUES, values)
        files = {name: storage.sha256(staging / name) for name in (TENSORS, VALUES)}
        storage.write_json(staging / MANIFEST, {"format": 1, "states": sorted(state), "files": files})


def load(directory: Path, state: Mapping[str, Stateful]) -> None:
    """Give every state back.

    Raises:
        RlhfError: CKP020 if a file is missing or differs from its hash, CKP021 if the states are not the same ones.
    """
    try:
        manifest = json.loads((directory / MANIFEST).read_text("utf-8"))
        for name in (TENSORS, VALUES):
            if storage.sha256(directory / name) != manifest["files"][name]:
                raise RlhfError(Problem("CKP020", str(directory / name), "differs from its hash.", "an earlier one"))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RlhfError(
            Problem("CKP020", str(directory), f"not a whole checkpoint: {error}.", "an earlier one")
        ) from None
    if manifest["states"] != sorted(state):
        what = f"holds {', '.join(manifest['states'])}; needed: {', '.join(sorted(state))}."
        raise RlhfError(Problem("CKP021", str(directory), what, "a checkpoint of this stage"))
    tensors = load_file(directory / TENSORS)
    values = json.loads((directory / VALUES).read_text("utf-8"))
    for name, part in state.items():
        part.load_state_dict(_unpack(values[name], tensors))


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
