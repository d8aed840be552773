"""What a model directory holds, read from its config and the headers of its safetensors files, never from a weight."""

from __future__ import annotations

import json
import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf.errors import Problem, RlhfError
from rlhf.findings import Findings
from rlhf.runs import storage

CONFIG, SINGLE, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
ADAPTER_CONFIG = "adapter_config.json"
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.pickle")
MAX_HEADER = 100_000_000


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of a safetensors file."""

    dtype: str
    shape: tuple[int, ...]
    num_bytes: int

    @property
    def num_elements(self) -> int:
        return math.prod(self.shape)


def only_pickles(directory: Path, where: str) -> Problem | None:
    """SEC005 for a directory whose only weights are pickles, which can hold code and are never loaded."""
    if not directory.is_dir() or any(directory.glob("*.safetensors")):
        return None
    if not any(path for pattern in PICKLES for path in directory.glob(pattern)):
        return None
    fix = (
        "a revision with safetensors, or convert the weights with safetensors.torch.save_file where no harm can be done"
    )
    return Problem("SEC005", where, "has only pickle weights, which are refused.", fix)


def with_adapter(directory: Path, where: str) -> Problem | None:
    """MOD007 for a model directory that names an adapter, which transformers would load, and its own base with it."""
    if not storage.is_file(directory / ADAPTER_CONFIG):
        return None
    what = f"holds {ADAPTER_CONFIG}: an adapter is no base."
    return Problem("MOD007", where, what, "the base that the adapter was made on, or a model merged with it")


def no_classifier(directory: Path, where: str) -> Problem | None:
    """MOD043 for a model directory whose config names no sequence classifier: its head would be random."""
    try:
        named = json.loads((directory / CONFIG).read_text("utf-8")).get("architectures") or []
    except (OSError, ValueError, AttributeError):
        return Problem("MOD001", where, f"{directory} has no readable {CONFIG}.", "name a Hugging Face model directory")
    if any(str(name).endswith("ForSequenceClassification") for name in named):
        return None
    what = f"{directory} is {', '.join(map(str, named)) or 'of no architecture'}, no sequence classifier."
    return Problem("MOD043", where, what, "a model with a trained head; for a finished reward run, name it as run")


def read(directory: Path, where: str) -> dict[str, StoredTensor]:
    """Name -> tensor of a model directory's weights.

    Raises:
        RlhfError: MOD001 without config or weights, MOD006 for files that are cut short, missing or no safetensors,
            MOD007 for an adapter, SEC005 for pickles, SEC009 for weights that stand outside of the directory.
    """
    if not (directory / CONFIG).is_file():
        raise RlhfError(Problem("MOD001", where, f"has no {CONFIG}.", "name a Hugging Face model directory"))
    if refused := only_pickles(directory, where) or with_adapter(directory, where):
        raise RlhfError(refused)
    tensors: dict[str, StoredTensor] = {}
    findings = Findings()
    for path in weight_files(directory, where):
        with findings.gathering():
            tensors |= header(path, where)
    findings.refuse()
    return tensors


def header(path: Path, where: str) -> dict[str, StoredTensor]:
    """Name -> tensor of one safetensors file, whose size must be what its header says.

    Raises:
        RlhfError: MOD006.
    """
    if not path.is_file():
        raise _damaged(path, where, "missing")
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        if not 2 <= length <= min(MAX_HEADER, size - 8):
            raise _damaged(path, where, f"no whole safetensors header in {size:,} bytes")
        text = file.read(length)
    try:
        entries = {name: entry for name, entry in json.loads(text).items() if name != "__metadata__"}
        tensors = {name: _tensor(entry) for name, entry in entries.items()}
        end = max((entry["data_offsets"][1] for entry in entries.values()), default=0)
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError):
        raise _damaged(path, where, "its header is not readable") from None
    if 8 + length + end != size:
        raise _damaged(path, where, f"{size:,} bytes, but its header says {8 + length + end:,}")
    return tensors


def weight_files(directory: Path, where: str) -> list[Path]:
    """The files that transformers reads: the single one, else those that the index names."""
    if (directory / SINGLE).is_file():
        return [directory / SINGLE]
    if not (directory / INDEX).is_file():
        what = f"has neither {SINGLE} nor {INDEX}."
        raise RlhfError(Problem("MOD001", where, what, "name a Hugging Face model directory"))
    try:
        named = {str(name) for name in json.loads((directory / INDEX).read_text("utf-8"))["weight_map"].values()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise _damaged(directory / INDEX, where, "not a readable index") from None
    outside = sorted(name for name in named if name != Path(name).name or name == ".." or "\\" in name)
    if outside:
        what = f"{INDEX} names weights outside of the directory: {', '.join(map(repr, outside[:3]))}."
        raise RlhfError(Problem("SEC009", where, what, "a whole download of the model"))
    return [directory / name for name in sorted(named)]


def _tensor(entry: Any) -> StoredTensor:
    start, end = entry["data_offsets"]
    return StoredTensor(str(entry["dtype"]), tuple(int(size) for size in entry["shape"]), int(end) - int(start))


def _damaged(path: Path, where: str, what: str) -> RlhfError:
    return RlhfError(Problem("MOD006", where, f"{path.name}: {what}.", "download the model again"))
