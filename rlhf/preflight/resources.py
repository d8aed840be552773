"""Whether a run has the disk, the memory and the rights that it will need, worked out before anything is computed."""

from __future__ import annotations

import importlib.util
import math
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from rlhf.config.stages import HeldOutSection
from rlhf.errors import Problem
from rlhf.hub import names
from rlhf.hub.model_files import StoredTensor
from rlhf.runs import artifacts
from rlhf.runs.artifacts import Manifest

FLOAT32 = 4
WITH_MOMENTS = 3  # a trained parameter and its two Adam moments
SPARE = 1.2  # the checkpoint that is being written stands beside those that are kept, and a margin
BESIDES = 32 << 20  # tokenizer, log, metrics and samples
MAX_NAME = 255
ADAPTER_WEIGHTS = f"{artifacts.ADAPTER}/adapter_model.safetensors"
FIRST_MEMBER = f"{artifacts.MEMBERS}/0"
NOT_ADAPTED = ("embed", "wte", "wpe", "lm_head")
MEMINFO = Path("/proc/meminfo")


@dataclass(frozen=True)
class Written:
    """Bytes that a run writes: its largest checkpoint, and all that it keeps at the end."""

    largest: int
    kept: int

    @property
    def needed(self) -> int:
        """Free disk that the run must find: 2.2 times its only checkpoint, or all that it keeps and 1.2 times one."""
        return math.ceil(self.kept + SPARE * self.largest) + BESIDES


def lora_parameters(tensors: Mapping[str, StoredTensor], rank: int, target_modules: str | list[str]) -> int:
    """Parameters of a LoRA adapter: rank times inputs and outputs of every linear layer that gets one."""
    return rank * sum(
        sum(tensor.shape)
        for name, tensor in tensors.items()
        if len(tensor.shape) == 2 and name.endswith(".weight") and not any(word in name for word in NOT_ADAPTED)
        if target_modules == "all-linear" or name.split(".")[-2] in target_modules
    )


def slot(tensors: Mapping[str, StoredTensor], start: Manifest, trains_whole: bool) -> int:
    """Bytes of a role that starts from a run: its adapter, a fresh one of rank 16, or every weight in float32."""
    if trains_whole:
        return whole(tensors)
    return _stored_adapter(start) or FLOAT32 * lora_parameters(tensors, 16, "all-linear")


def run_dir_problem(run_dir: str) -> Problem | None:
    """Why the run directory cannot be made or written to; None if nothing speaks against it."""
    return directory_problem(run_dir, f"run_dir: {names.shown(run_dir)}", "run_dir")


def directory_problem(directory: str, where: str, called: str) -> Problem | None:
    """The same for any directory; ``called`` is what messages call it."""
    path = Path(directory)
    if not directory.isprintable():
        return Problem("SEC006", where, "has a control character.", "name a directory")
    if any(len(os.fsencode(part)) > MAX_NAME for part in path.parts):
        return Problem("RES002", where, f"has a part longer than {MAX_NAME} bytes.", "a shorter name")
    place = nearest_existing(path)
    if not place.is_dir():
        what = f"{called} is a file." if place == path else f"cannot be made: {place} is a file."
        return Problem("RES002", where, what, "name a directory")
    if path.is_symlink() and place != path:
        return Problem("RES002", where, "is a symbolic link to what is not there.", "name a directory")
    if not os.access(place, os.W_OK | os.X_OK):
        what = "cannot be written to." if place == path else f"cannot be made: {place} is not writable."
        return Problem("RES002", where, what, f"another {called}, or the right to write there")
    return None


def disk_problem(run_dir: str, need: Written, free: int) -> Problem | None:
    """RES003 where the file system of the run directory has less free than the run writes."""
    if free >= need.needed:
        return None
    what = f"needs {size(need.needed)} of disk, free are {size(free)}: {_disk_parts(need)}."
    return Problem("RES003", f"run_dir: {run_dir}", what, "free some, name another run_dir, or save less often")


def memory_problem(source: str, need: int, available: int) -> Problem | None:
    """RES004 where the weights, and what is trained beside them, do not fit into the memory that is available now."""
    if available >= need:
        return None
    what = f"needs {size(need)} of memory at least, available are {size(available)}."
    return Problem("RES004", f"model {source}", what, "a smaller model, dtype: bfloat16, or end other programs")


def library_problem(quantize: str | None, where: str) -> Problem | None:
    """RES005 where a base is to be quantised and the library that does it is not installed."""
    if quantize is None or importlib.util.find_spec("bitsandbytes"):
        return None
    fix = "pip install 'rlhf-pipeline[quantized]', or quantize: null"
    return Problem("RES005", where, f"{quantize} needs bitsandbytes, which is not installed.", fix)


def free_disk(run_dir: str) -> int:
    """Bytes that may still be written where the run directory stands or will stand."""
    return shutil.disk_usage(nearest_existing(Path(run_dir))).free


def available_memory() -> int | None:
    """Bytes that Linux can give without swapping; None where it does not say."""
    try:
        lines = MEMINFO.read_text("ascii").splitlines()
    except OSError:
        return None
    found = [line.split()[1] for line in lines if line.startswith("MemAvailable:")]
    return int(found[0]) * 1024 if found else None


def disk_figure(need: Written, free: int) -> str:
    """The same for a plan, as a sentence without its final full stop."""
    return f"disk: {size(need.needed)} needed, {size(free)} free ({_disk_parts(need)})"


def memory_figure(least: int, peak: int, available: int | None) -> str:
    """Memory for a plan, as a sentence without its final full stop."""
    known = f"{size(available)} available" if available is not None else "what is available is not known here"
    scarce = available is not None and peak > available
    hint = "; rlhf plan says which settings would fit" if scarce else ""
    return (
        f"memory: {size(least)} at least for the weights and what is trained, {size(peak)} at the peak in the longest "
        f"rows that the config allows, {known}{hint}"
    )


def nearest_existing(path: Path) -> Path:
    """The path itself, or the first directory above it that is there."""
    return next((place for place in (path, *path.absolute().parents) if names.exists(str(place))), Path("/"))


def size(num_bytes: float) -> str:
    """Bytes for people: 1.4 GiB."""
    for unit in ("bytes", "KiB", "MiB"):
        if num_bytes < 1024:
            return f"{num_bytes:.0f} {unit}" if unit == "bytes" else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1024
    return f"{num_bytes:.1f} GiB"


def _disk_parts(need: Written) -> str:
    return f"{size(need.kept)} kept, {SPARE} x the largest checkpoint of {size(need.largest)}, {size(BESIDES)} besides"


def num_checkpoints(num_steps: int, save_every: int | None, keep: int) -> int:
    """How many stand at the end. Rows may still be dropped or held out, so that this is the most."""
    return min(keep, 1 + num_steps // save_every) if save_every else 1


def keeps_best(evaluation: HeldOutSection, use: str, steps: int | None) -> bool:
    """Whether a training keeps the weights of its best step so far."""
    return evaluation.every is not None and use == "best" and steps != 0


def whole(tensors: Mapping[str, StoredTensor]) -> int:
    """Bytes of every weight in float32."""
    return FLOAT32 * sum(tensor.num_elements for tensor in tensors.values())


def _stored_adapter(manifest: Manifest) -> int:
    """Size of a finished run's adapter."""
    found = manifest.files.get(ADAPTER_WEIGHTS) or manifest.files.get(f"{FIRST_MEMBER}/{ADAPTER_WEIGHTS}") or {}
    return int(found.get("size", 0))


def hidden_size(tensors: Mapping[str, StoredTensor]) -> int:
    """Width of the embeddings, by the names that the architectures give them; 0 where none is known."""
    known = (tensor.shape[-1] for name, tensor in tensors.items() if re.search(r"embed_tokens|wte|embed_in", name))
    return next(known, 0)
