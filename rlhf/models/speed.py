"""How fast the machine at hand multiplies matrices and reads memory, measured for two seconds."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch.nn.functional import linear

from rlhf.models.fused import logits
from rlhf.models.fused.few_rows import in_order, product
from rlhf.planning.clock import Speed

TOKENS, READ_BYTES, SECONDS = 512, 1 << 28, 0.4
THIN, LAYERS = 16, 32  # rows that sample together; weights that follow one another, so that none waits in a cache


def measured(
    d: int, f: int, width: int, sums: bool, tokens: int = TOKENS, read_bytes: int = READ_BYTES, seconds: float = SECONDS
) -> Speed:
    """Of products as a model of hidden size ``d`` and inner size ``f`` makes them, in numbers of ``width`` bytes.

    Args:
        sums: whether sampling puts base and adapter, summed up, in order for products of few rows.
        seconds: spent on each figure. No random number is drawn from the global generators.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.float32 if width == 4 else torch.bfloat16
    own = torch.Generator(device).manual_seed(0)
    x, weight = (torch.randn(n, d, device=device, generator=own).to(dtype) for n in (tokens, f))
    memory = torch.ones(read_bytes // 4, device=device)
    flops = 2 * tokens * d * f / _seconds(lambda: linear(x, weight), device, seconds)
    bandwidth = read_bytes / _seconds(lambda: memory.sum(), device, seconds)
    few, layers = x[:THIN].contiguous(), [in_order(weight) if sums else weight.clone() for _ in range(LAYERS)]
    thin = 2 * len(few) * d * f * LAYERS / _seconds(lambda: [product(few, layer) for layer in layers], device, seconds)
    launch = _seconds(lambda: [few[:1] + few[:1] for _ in range(LAYERS)], device, seconds) / LAYERS
    wide = None
    if dtype != torch.float32 and device.type == "cpu":
        wide = 2 * tokens * d * f / _seconds(lambda: logits.product(x, weight), device, seconds)
    return Speed(flops, bandwidth, thin, launch, wide)


def _seconds(work: Callable[[], object], device: torch.device, seconds: float) -> float:
    """The mean of as many runs as fit into ``seconds``, after one to warm up."""
    work()
    _wait(device)
    count, started = 0, time.perf_counter()
    while time.perf_counter() - started < seconds:
        work()
        _wait(device)
        count += 1
    return (time.perf_counter() - started) / count


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()
