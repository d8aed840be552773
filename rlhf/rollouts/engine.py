"""What every rollout engine offers: ids in, ids out, and noise that belongs to a row."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.functional import pad

from rlhf.limits import DRAWN_VALUES

BLOCK, FEW = 512, 4096  # tokens of a block; vocabularies that are searched whole
BELOW_ONE = 1 - 2**-52


@dataclass(frozen=True)
class Sampling:
    """How to sample. PPO leaves ``top_p`` alone, or the sampling policy is not the trained one."""

    max_new_tokens: int
    temperature: float
    seed: int
    top_p: float = 1.0
    stop_tokens: tuple[str, ...] = ()


@dataclass(frozen=True)
class Rollout:
    """Sampled ids of each row, end token kept, padding dropped; ``finished`` where a row wrote it, or a stop token.

    Args:
        logprobs: what the engine says of its tokens under the tempered policy, in nats; None if it says nothing.
    """

    tokens: list[list[int]]
    finished: list[bool]
    logprobs: list[list[float]] | None = None


class RolloutEngine(Protocol):
    """An engine. Its logprobs, if any, are a monitor: old logprobs are the trainer's own rescoring."""

    def generate(self, prompts: Sequence[Sequence[int]], sampling: Sampling, rows: Sequence[int]) -> Rollout: ...


def uniforms(seed: int, rows: Sequence[int], steps: int) -> Tensor:
    """[B, steps] float64 in [0, 1): the noise of a row depends on (seed, row) alone, not on what it is batched with."""
    found = torch.empty(len(rows), steps, dtype=torch.float64)
    for index, row in enumerate(rows):
        digest = hashlib.sha256(f"rollout/{seed}/{row}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
        found[index] = torch.rand(steps, dtype=torch.float64, generator=generator)
    return found


def draw(logits: Tensor, noise: Tensor) -> Tensor:
    """[B] the token where the cumulative distribution of softmax(``logits`` [B, V]) passes ``noise`` [B].

    In float64, of at most ``DRAWN_VALUES`` numbers at a time: 64 rows of a vocabulary of 128k are one pass on a GPU.
    """
    rows = max(1, DRAWN_VALUES["cpu" if logits.device.type == "cpu" else "cuda"] // logits.shape[-1])
    return torch.cat([_draw(*part) for part in zip(logits.split(rows), noise.split(rows), strict=True)])


def _draw(logits: Tensor, noise: Tensor) -> Tensor:
    """In a large vocabulary first the block, by the sums of all blocks, then the token in it. Sums in another order
    differ in the sixteenth digit, and a token with them where the noise lies that near to an edge."""
    if logits.shape[-1] <= FEW:
        cumulative = logits.softmax(-1, dtype=torch.float64).cumsum(-1)
        return _passed(cumulative, noise * cumulative[:, -1])
    probs = pad(logits, (0, -logits.shape[-1] % BLOCK), value=-torch.inf).softmax(-1, dtype=torch.float64)
    blocks = probs.unflatten(-1, (-1, BLOCK))
    ends = blocks.sum(-1).cumsum(-1)
    wanted = noise * ends[:, -1]
    block = _passed(ends, wanted)
    before = pad(ends, (1, 0)).gather(1, block[:, None])[:, 0]
    inside = blocks[torch.arange(len(block), device=block.device), block].cumsum(-1)
    return block * BLOCK + _passed(inside, wanted - before)


def _passed(cumulative: Tensor, wanted: Tensor) -> Tensor:
    """[B] the first place of ``cumulative`` [B, n] that is more than ``wanted`` [B], which rounding may not put at its
    end: what comes there has no probability."""
    below = torch.minimum(wanted, cumulative[:, -1] * BELOW_ONE)
    return torch.searchsorted(cumulative, below[:, None], right=True)[:, 0]
