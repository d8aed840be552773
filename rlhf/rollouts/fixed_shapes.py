"""Sampling by a decode step of fixed shapes, which a CUDA graph can hold; the host waits once in 16 tokens.

Keys and values have room for the longest answer from the start, and a step attends to a part of it behind a mask. The
part grows in strides, and every stride has a graph of its own. A CPU launches nothing, and reads no more than it must:
there the cache grows.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from rlhf.models import grouped
from rlhf.models.fused.decoding import Decoder, Rows

log = logging.getLogger("rlhf")
EVERY = 16  # tokens between two looks at which rows have ended
COMPARED = 3  # steps that a graph repeats before it is trusted
STRIDE = 256  # places by which attention reaches further at a time
ALIGNED = 16  # attention copies a mask whose rows are not a multiple of this long
FLOOR, STEPS = 1e-5, 4  # how far a graph's hidden states may be off: a share of their size, and steps of their dtype

Choose = Callable[[Tensor, Tensor], Tensor]
Step = Callable[[], None]


@dataclass(frozen=True)
class Request:
    """B prompts of at most W tokens, padded on the left, and how to answer with at most T tokens. It is on the host.

    Args:
        ids: [B, W]; real: [B, W] bool, False on padding.
        noise: [B, T] of the tokens to come.
        ends: tokens that end a response.
        choose: gives tokens [B] from logits [B, V] and noise [B].
    """

    ids: Tensor
    real: Tensor
    noise: Tensor
    ends: Sequence[int]
    choose: Choose


class KeyValues:
    """Keys and values of every block, [B, heads, capacity, D], in memory that never moves."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.blocks: dict[int, tuple[Tensor, Tensor]] = {}

    def fill(self, mask: Tensor | None, own: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attention of the prompts, whose keys and values come first; see ``Decoder.states``."""
        self.blocks[own.layer_idx] = self._room(k), self._room(v)
        return grouped.sdpa(own, q, k, v, mask, scaling=own.scaling)[0]  # type: ignore[no-any-return]

    def _room(self, part: Tensor) -> Tensor:
        whole = part.new_zeros(*part.shape[:2], self.capacity, part.shape[3])
        whole[:, :, : part.shape[2]] = part
        return whole

    def extend(self, place: Tensor, bias: Tensor, own: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attention of one more token a row, whose key and value go to ``place`` [1].

        Args:
            bias: [B, 1, 1, reach] 0 where there is a token, -inf elsewhere; places beyond are not read.
        """
        room = self.blocks[own.layer_idx]
        for whole, part in zip(room, (k, v), strict=True):
            whole.index_copy_(2, place, part)
        keys, values = (whole[:, :, : bias.shape[-1]] for whole in room)
        return grouped.sdpa(own, q, keys, values, bias, scaling=own.scaling)[0]  # type: ignore[no-any-return]


class DecodeStep:
    """The state of B rows in buffers that never move, and the step from one token of each to the next.

    Made of a request, it has read the prompts and chosen the first token. ``model``'s head and embedding, and what
    ``decoder`` has of the adapters, are those of this moment.
    """

    def __init__(self, model: Any, decoder: Decoder, request: Request) -> None:
        count, width = request.ids.shape
        num_tokens = request.noise.shape[1]
        self.decoder, self.head, self.choose = decoder, model.get_output_embeddings(), request.choose
        self.embed, self.device = decoder.inner.embed_tokens, model.device
        self.cache, self.reach, self.width = KeyValues(_rounded_up(width + num_tokens, ALIGNED)), 0, width
        lengths = request.real.sum(1)
        # One addition moves all on: where the token's key goes, the token's number, and its position in each row.
        self.counters = torch.cat([torch.tensor([width - 1, 0]), lengths - 1]).to(self.device)
        self.place, self.number, self.positions = self.counters[:1], self.counters[1:2], self.counters[2:]
        self.noise, self.ends = request.noise.to(self.device), torch.tensor(list(request.ends), device=self.device)
        self.token = torch.zeros(count, dtype=torch.long, device=self.device)
        self.tokens = torch.zeros(count, num_tokens, dtype=torch.long, device=self.device)
        self.ended = torch.zeros(count, dtype=torch.bool, device=self.device)
        self._read(request)

    def _read(self, request: Request) -> None:
        """Read the prompts; no padding is computed, but in attention."""
        real, (count, width) = request.real.to(self.device), request.ids.shape
        places = mask = None
        if not bool(request.real.all()):
            places = request.real.flatten().nonzero()[:, 0].to(self.device)
            square = torch.ones(width, width, dtype=torch.bool, device=self.device)
            mask = (square.tril() & real[:, None] | torch.eye(width, dtype=torch.bool, device=self.device))[:, None]
        x = self.embed(request.ids.to(self.device))
        capacity = self.cache.capacity
        self.bias = x.new_full((count, 1, 1, capacity), -torch.inf)
        self.bias[:, 0, 0, :width].masked_fill_(real, 0.0)
        turns = self.decoder.turns(x[:1], torch.arange(capacity, device=self.device)[None])
        self.turns = torch.stack(turns, 1)  # [capacity, 2, 1, D]
        rows, attend = Rows(count, width, places), partial(self.cache.fill, mask)
        states = self.decoder.states(x, self._turns((real.cumsum(1) - 1).clamp_min(0)), rows, attend)
        self._take(states[:, -1])

    def reach_to(self, num_tokens: int) -> bool:
        """Let attention reach the last of ``num_tokens`` new tokens; whether it had to reach further for that."""
        before, wanted = self.reach, _rounded_up(self.width + num_tokens, STRIDE)
        self.reach = min(wanted, self.cache.capacity)
        return self.reach != before

    def advance(self) -> None:
        """Read the last token of every row and choose the next: while attention reaches as far, the same launches every
        time, on the same memory."""
        self.bias.index_fill_(3, self.place, 0.0)
        bias = self.bias[..., : self.reach]
        rows, attend = Rows(len(self.token), 1, None), partial(self.cache.extend, self.place, bias)
        states = self.decoder.states(self.embed(self.token[:, None]), self._turns(self.positions), rows, attend)
        self._take(states[:, 0])

    def _turns(self, positions: Tensor) -> Sequence[Tensor]:
        return self.turns.index_select(0, positions.flatten()).unbind(1)

    def _take(self, states: Tensor) -> None:
        """Choose a token from the hidden states [B, d] before it."""
        self.states = states.contiguous()
        noise = self.noise.index_select(1, self.number)[:, 0]
        self.token.copy_(self.choose(self.head(self.states), noise))
        self.tokens.index_copy_(1, self.number, self.token[:, None])
        self.ended.logical_or_((self.token[:, None] == self.ends).any(1))
        self.counters.add_(1)

    def snapshot(self) -> list[Tensor]:
        """Copies of all that steps change, except keys and values: a step that is taken again writes the same ones."""
        return [part.clone() for part in self._changed()]

    def restore(self, snapshot: Sequence[Tensor]) -> None:
        for part, value in zip(self._changed(), snapshot, strict=True):
            part.copy_(value)

    def _changed(self) -> list[Tensor]:
        return [self.counters, self.token, self.tokens, self.ended, self.bias]


class Graphs:
    """Makes graphs of decode steps, until one does not do as its step does: from then on there are none."""

    def __init__(self) -> None:
        self.num_made, self.refused = 0, False

    def of(self, step: DecodeStep, num_steps: int) -> tuple[Step, int]:
        """What takes each of ``num_steps`` steps, and how many of them it has taken: some where it is a graph."""
        capture = CAPTURES.get(step.device.type)
        if capture is None or self.refused or num_steps < EVERY:
            return step.advance, 0
        before = step.snapshot()
        wanted = _after(step, step.advance)
        step.restore(before)
        try:
            replay = capture(step.advance)
            why = _difference(_after(step, replay), wanted)
        except RuntimeError as error:
            why = f"could not be captured ({' '.join(str(error).split())[:160]})"
        if why is None:
            self.num_made += 1
            return replay, COMPARED
        self.refused = True
        log.warning("A CUDA graph of the decode step %s: tokens are sampled without one, and more slowly.", why)
        step.restore(before)
        return step.advance, 0


def capture(step: Step) -> Step:
    """What replays a CUDA graph of ``step``, which has run before."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay  # type: ignore[no-any-return]


CAPTURES: dict[str, Callable[[Step], Step]] = {"cuda": capture}  # by type of device


def _after(step: DecodeStep, advance: Step) -> list[Tensor]:
    for _ in range(COMPARED):
        advance()
    return [*step.snapshot(), step.states.clone()]


def _difference(found: Sequence[Tensor], wanted: Sequence[Tensor]) -> str | None:
    """How a graph's outcome differs from the step's, as the end of a sentence; the host waits once."""
    same = torch.stack([(a == b).all() for a, b in zip(found[:-1], wanted[:-1], strict=True)]).all()
    share = (found[-1] - wanted[-1]).double().norm() / wanted[-1].double().norm()
    is_same, error = torch.stack([same.double(), share]).tolist()
    if not is_same:
        return "chose other tokens than the step itself"
    limit = max(FLOOR, STEPS * torch.finfo(wanted[-1].dtype).eps)
    return None if error <= limit else f"gave hidden states that differ by {error:.2g} of their size from the step's"


def sample(step: DecodeStep, graphs: Graphs) -> list[list[int]]:
    """[B] the tokens of each row, some beyond its end: all rows go on until the host sees that all have ended."""
    num_rows, num_tokens = step.tokens.shape
    rows: list[list[int]] = [[] for _ in range(num_rows)]
    with _any_kernel():
        for start in range(0, num_tokens, EVERY):
            stop, chosen = min(start + EVERY, num_tokens), max(start, 1)  # the prompts gave the first token
            if step.reach_to(stop):
                advance, taken = graphs.of(step, num_tokens - chosen)
                chosen += taken
            for _ in range(chosen, stop):
                advance()
            part = torch.cat([step.tokens[:, start:stop], step.ended[:, None]], 1).tolist()
            ended = [bool(new.pop()) for new in part]
            for row, new in zip(rows, part, strict=True):
                row += new
            if all(ended):
                break
    return rows


def _rounded_up(count: int, size: int) -> int:
    return -(-count // size) * size


@contextmanager
def _any_kernel() -> Iterator[None]:
    """Where only deterministic kernels are asked for, writing to one place sorts the places first: ten launches for
    one. With a single place there is nothing to be undetermined."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(False)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


def obstacle(decoder: Decoder) -> str | None:
    """Why a model's step cannot be of fixed shapes; None: it can."""
    kind = str(getattr(decoder.inner.rotary_emb, "rope_type", "default"))
    if "dynamic" in kind or kind == "longrope":
        return f"its position embedding ({kind}) changes with the length"
    return None
