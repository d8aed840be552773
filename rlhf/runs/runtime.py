"""The machine under a run: device, threads, determinism, and how much memory was used at the peak."""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import random
import resource
import sys
from typing import Any

import numpy
import torch
from torch import nn

from rlhf.config.sections import RuntimeSection
from rlhf.errors import Problem, RlhfError
from rlhf.runs.progress import ONCE_A_CHAIN

log = logging.getLogger("rlhf")
SMALL_MODEL = 10_000_000
WORKSPACE, WORKSPACES = "CUBLAS_WORKSPACE_CONFIG", (":4096:8", ":16:8")  # that give cuBLAS one order of summation
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, KEPT_BYTES = -1, -3, 1 << 30


def choose_device(section: RuntimeSection) -> torch.device:
    """The device that the config names; ``auto`` takes cuda where there is one.

    Raises:
        RlhfError: RES001 where cuda is asked for and absent.
    """
    if section.device == "cuda" and not torch.cuda.is_available():
        raise RlhfError(Problem("RES001", "runtime.device", "cuda is not available here.", "runtime.device: cpu"))
    if section.device == "auto" and not torch.cuda.is_available() and torch.backends.mps.is_available():
        log.warning("This Mac's GPU (MPS) is not supported and not used: the run is on the CPU.")
    name = ("cuda" if torch.cuda.is_available() else "cpu") if section.device == "auto" else section.device
    return torch.device(name)


def require_dtype(dtype: str, device: torch.device) -> None:
    """Raise RES006 where a GPU would only emulate bfloat16, as those before Ampere do."""
    if device.type != "cuda" or dtype != "bfloat16" or torch.cuda.is_bf16_supported(including_emulation=False):
        return
    what = f"{torch.cuda.get_device_name(device)} has no bfloat16, and float16 overflows where bfloat16 does not."
    raise RlhfError(Problem("RES006", "model.dtype: bfloat16", what, "model.dtype: float32, or a newer GPU"))


def set_up(section: RuntimeSection, seed: int) -> torch.device:
    """Seed every generator, flush denormals, ask for deterministic kernels; returns the device.

    Gradients of a head that reads one token are denormal nearly everywhere else; flushing them makes reward training
    about three times as fast on a CPU and changes no digit that matters. Deterministic kernels need no memory filled
    with NaN before it is written, which torch would do as well: a pass over what many operations give.

    On a CPU the same seed gives the same bits. On CUDA it does not in training, and nothing here says so: attention's
    backward pass adds up in the order in which its blocks finish, unless an operation without a deterministic kernel
    is an error everywhere, and the sums that choose a token have none (docs/determinism.md). What can be had is asked
    for, before cuBLAS starts and reads its variable.
    """
    _ask_cublas()
    random.seed(seed)
    numpy.random.seed(seed)
    torch.manual_seed(seed)
    torch.set_flush_denormal(True)
    keep_freed_memory()
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    device = choose_device(section)
    if device.type == "cuda":
        log.info("On CUDA nothing is claimed bit for bit: see docs/determinism.md.", extra=ONCE_A_CHAIN)
    return device


def _ask_cublas() -> None:
    """Give CUDA's matrix products one order of summation; a value of the user's stands, and is named if it has none."""
    if os.environ.setdefault(WORKSPACE, WORKSPACES[0]) not in WORKSPACES:
        log.warning("%s=%s: cuBLAS may sum in another order at each call.", WORKSPACE, os.environ[WORKSPACE])


def keep_freed_memory() -> None:
    """Let glibc hand the same pages out again instead of returning each large tensor's to the system and asking for
    zeroed ones; elsewhere nothing happens."""
    libc = ctypes.CDLL(None)
    if sys.platform == "linux" and hasattr(libc, "mallopt"):
        libc.mallopt(M_TRIM_THRESHOLD, KEPT_BYTES)
        libc.mallopt(M_MMAP_THRESHOLD, KEPT_BYTES)


def set_threads(section: RuntimeSection, model: nn.Module, device: torch.device) -> None:
    """CPU threads: what the config says, or one for a model too small for a second thread to pay."""
    if device.type != "cpu":
        return
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    threads = section.threads or (1 if num_parameters < SMALL_MODEL else torch.get_num_threads())
    torch.set_num_threads(threads)
    log.info("Running on the CPU with %d thread%s.", threads, "" if threads == 1 else "s", extra=ONCE_A_CHAIN)


class Generators:
    """The random generators of python, numpy and torch. Stateful.

    The stages draw from generators of their own; a reward function of the user's, or a library, may draw from these.
    """

    def state_dict(self) -> dict[str, Any]:
        kind, keys, *rest = numpy.random.get_state()
        return {
            "python": random.getstate(),
            "numpy": (str(kind), numpy.asarray(keys).tolist(), *rest),
            "torch": torch.get_rng_state(),
            "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        random.setstate(state["python"])
        kind, keys, *rest = state["numpy"]
        numpy.random.set_state((kind, numpy.array(keys, dtype=numpy.uint32), *rest))
        torch.set_rng_state(state["torch"])
        if state["cuda"]:
            torch.cuda.set_rng_state_all(state["cuda"])


def derived_seed(seed: int, *names: str | int) -> int:
    """A seed below 2**31 for one purpose, from the config's seed and the purpose's name."""
    text = "/".join(map(str, (seed, *names)))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big") >> 1


def peak_rss_mb() -> float:
    """Largest resident set of this process so far, in MB."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (1 << 20) if sys.platform == "darwin" else peak / 1024


def peak_memory() -> dict[str, float]:
    """Peak memory as metrics, on the host and, where there is one, on the GPU."""
    figures = {"memory/peak_rss_mb": peak_rss_mb()}
    if torch.cuda.is_available():
        figures["memory/peak_cuda_mb"] = torch.cuda.max_memory_allocated() / (1 << 20)
    return figures
