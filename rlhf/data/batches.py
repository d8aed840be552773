"""Batches: padded sequences, micro-batches of like length, and an order of the data that can be resumed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Sequences:
    """B whole sequences, prompt then response, padded on the right; only generation pads on the left.

    Args:
        ids: [B, L]; attention_mask: [B, L] 1 on real tokens.
        prompt_lengths, response_lengths: [B]; a response's length counts its end token.
        lengths: of the whole sequences, as numbers.
        mask: [B, T] bool, True on real response tokens, from the lengths and never from the ids.
    """

    ids: Tensor
    attention_mask: Tensor
    prompt_lengths: Tensor
    response_lengths: Tensor
    mask: Tensor
    lengths: tuple[int, ...]

    @property
    def starts(self) -> Tensor:
        """[B] where each sequence begins when they stand one behind the other."""
        whole = self.prompt_lengths + self.response_lengths
        return whole.cumsum(0) - whole

    @property
    def targets(self) -> tuple[Tensor, Tensor]:
        """[N] row and [N] position of each real response token in ``ids``, row by row."""
        rows, steps = self.mask.nonzero(as_tuple=True)
        return rows, self.prompt_lengths[rows] + steps


def collate(
    prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]], pad_id: int, device: torch.device
) -> Sequences:
    """Join and pad; every prompt and every response has at least one token."""
    assert all(len(prompt) > 0 for prompt in prompts), "the first token of a response is predicted from its prompt"
    assert all(len(response) > 0 for response in responses), "a response has at least its end token"
    whole = [[*prompt, *response] for prompt, response in zip(prompts, responses, strict=True)]
    lengths = torch.tensor([len(row) for row in whole])
    response_lengths = torch.tensor([len(response) for response in responses])
    width, steps = int(lengths.max()), int(response_lengths.max())
    ids = torch.tensor([row + [pad_id] * (width - len(row)) for row in whole])
    attention_mask = (torch.arange(width)[None] < lengths[:, None]).long()
    mask = torch.arange(steps)[None] < response_lengths[:, None]
    return Sequences(
        ids.to(device),
        attention_mask.to(device),
        (lengths - response_lengths).to(device),
        response_lengths.to(device),
        mask.to(device),
        tuple(map(len, whole)),
    )


def micro_batches(lengths: Sequence[int], max_sequences: int, max_tokens: int | None = None) -> list[list[int]]:
    """Indices sorted by length, at most ``max_sequences`` and ``max_tokens`` at a time, padding counted.

    Collated on their own they hold little padding. A sequence longer than ``max_tokens`` stands alone.
    """
    parts: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda index: (lengths[index], index)):
        is_open = parts and len(parts[-1]) < max_sequences
        if is_open and (max_tokens is None or lengths[index] * (len(parts[-1]) + 1) <= max_tokens):
            parts[-1].append(index)
        else:
            parts.append([index])
    return parts


@dataclass(frozen=True)
class PassSize:
    """How many rows a forward pass takes at most, and how many tokens, padding counted (None: no limit)."""

    rows: int
    tokens: int | None = None

    def split(self, lengths: Sequence[int]) -> list[list[int]]:
        """As ``micro_batches``."""
        return micro_batches(lengths, self.rows, self.tokens)


class DataOrder:
    """Endless batches of row numbers. Stateful.

    Each epoch is a permutation made from (seed, epoch) alone; a batch that an epoch cannot fill goes on into the next.
    """

    def __init__(self, num_rows: int, batch_size: int, seed: int) -> None:
        assert num_rows > 0 and batch_size > 0
        self.num_rows, self.batch_size, self.seed = num_rows, batch_size, seed
        self.epoch, self.offset = 0, 0
        self._order = self._permutation()

    def next(self) -> list[int]:
        """The next ``batch_size`` row numbers."""
        chosen: list[int] = []
        while len(chosen) < self.batch_size:
            if self.offset >= self.num_rows:
                self.epoch, self.offset = self.epoch + 1, 0
                self._order = self._permutation()
            taken = self._order[self.offset : self.offset + self.batch_size - len(chosen)]
            self.offset += len(taken)
            chosen += taken
        return chosen

    def state_dict(self) -> dict[str, Any]:
        return {"epoch": self.epoch, "offset": self.offset}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.epoch, self.offset = state["epoch"], state["offset"]
        self._order = self._permutation()

    def _permutation(self) -> list[int]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        order: list[int] = torch.randperm(self.num_rows, generator=generator).tolist()
        return order
