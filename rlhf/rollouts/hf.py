"""The golden engine: every setting fixed and the choice of tokens our own, by one of two loops.

On a GPU a model whose blocks are known is sampled by ``rlhf.rollouts.fixed_shapes``. transformers' ``generate``, with a
cache that grows, samples on a CPU, other models, and what is shown token by token.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, TopPLogitsWarper

from rlhf.data.chat_format import ChatFormat
from rlhf.errors import Problem, RlhfError
from rlhf.models import packing
from rlhf.models.ends import token_ids
from rlhf.models.fused import decoding
from rlhf.models.roles import Roles
from rlhf.rollouts import fixed_shapes
from rlhf.rollouts.cache import roomy
from rlhf.rollouts.engine import Rollout, Sampling, draw, uniforms
from rlhf.runs.progress import track

log = logging.getLogger("rlhf")
GROWING = ("cpu",)  # types of device on which the cache grows


class HfEngine:
    """Samples with the role ``slot``, at most ``concurrency`` rows at a time.

    Args:
        streamer: of transformers, is given the tokens of a single row as they come; then there is no progress bar.
    """

    def __init__(self, roles: Roles, slot: str, chat: ChatFormat, concurrency: int, streamer: Any = None) -> None:
        self.roles, self.slot, self.chat, self.concurrency = roles, slot, chat, concurrency
        self.streamer = streamer
        self.graphs = fixed_shapes.Graphs()

    def generate(self, prompts: Sequence[Sequence[int]], sampling: Sampling, rows: Sequence[int]) -> Rollout:
        """Sample one response to each prompt. Temperature 0 is greedy.

        Raises:
            RlhfError: MOD022 if prompt and new tokens exceed the model's context, MOD031 for a stop token that the
                tokenizer does not have.
        """
        assert len(prompts) == len(rows)
        tokens: list[list[int]] = [[] for _ in prompts]
        order = sorted(range(len(prompts)), key=lambda index: (len(prompts[index]), index))
        parts = [order[start : start + self.concurrency] for start in range(0, len(order), self.concurrency)]
        for chosen in parts if self.streamer else track(parts, "Sampling", len(parts)):  # no bar beside running text
            found = self._generate([prompts[i] for i in chosen], sampling, [rows[i] for i in chosen])
            for index, ids in zip(chosen, found, strict=True):
                tokens[index] = ids
        ends = self._ends(sampling)
        return Rollout(tokens, [ids[-1] in ends for ids in tokens])

    @torch.no_grad()
    def _generate(self, prompts: Sequence[Sequence[int]], sampling: Sampling, rows: Sequence[int]) -> list[list[int]]:
        width = max(map(len, prompts))
        self._require_room(width, sampling.max_new_tokens)
        ids = torch.tensor([[self.chat.pad_id] * (width - len(prompt)) + list(prompt) for prompt in prompts])
        real = torch.tensor([[False] * (width - len(prompt)) + [True] * len(prompt) for prompt in prompts])
        noise, ends = uniforms(sampling.seed, rows, sampling.max_new_tokens), self._ends(sampling)
        request = fixed_shapes.Request(ids, real, noise, ends, choosing(sampling))
        acting = self.roles.acting_as(self.slot)
        with acting as (model, _), decoding.in_place_of(model, packing.known_blocks(model)) as decoder:
            if decoder := self._of_fixed_shapes(model, decoder):
                found = fixed_shapes.sample(fixed_shapes.DecodeStep(model, decoder, request), self.graphs)
            else:
                found = self._grown(model, request)
        return [self._cut(row, ends) for row in found]

    def _of_fixed_shapes(self, model: Any, decoder: decoding.Decoder | None) -> decoding.Decoder | None:
        """The decoder, where steps of fixed shapes are to sample; the one place that decides it."""
        if self.roles.device.type in GROWING or self.streamer is not None:
            return None
        obstacle = "its blocks are not known" if decoder is None else fixed_shapes.obstacle(decoder)
        if obstacle:
            _say_slow(type(model).__name__, obstacle)
        return None if obstacle else decoder

    def _grown(self, model: Any, request: fixed_shapes.Request) -> list[list[int]]:
        """By transformers' ``generate``, with a cache that grows."""
        width, num_tokens = request.ids.shape[1], request.noise.shape[1]
        settings = GenerationConfig(
            max_new_tokens=num_tokens,
            do_sample=False,
            num_beams=1,
            use_cache=True,
            eos_token_id=list(request.ends),
            pad_token_id=self.chat.pad_id,
            repetition_penalty=1.0,
            temperature=1.0,
            top_k=50,
            top_p=1.0,
            renormalize_logits=False,
        )
        device = self.roles.device
        whole = model.generate(
            input_ids=request.ids.to(device),
            attention_mask=request.real.long().to(device),
            generation_config=settings,
            logits_processor=LogitsProcessorList([_Choose(request, device)]),
            streamer=self.streamer,
            past_key_values=roomy(model, width + num_tokens),
        )
        return whole[:, width:].tolist()  # type: ignore[no-any-return]

    def _ends(self, sampling: Sampling) -> list[int]:
        """The end tokens, the template's first, and the stop tokens."""
        return [*self.chat.end_ids, *token_ids(sampling.stop_tokens, self.chat.tokenizer, "sampling.stop_tokens")]

    def _cut(self, row: list[int], ends: Sequence[int]) -> list[int]:
        """Up to and including the first token that ends a response."""
        return next((row[: place + 1] for place, token in enumerate(row) if token in ends), row)

    def _require_room(self, width: int, new_tokens: int) -> None:
        context = self.chat.context_length
        if context and width + new_tokens > context:
            what = f"prompt {width} + max_new_tokens {new_tokens} exceed the model's context of {context} tokens."
            raise RlhfError(Problem("MOD022", "sampling.max_new_tokens", what, "shorter prompts or responses"))


@cache
def _say_slow(kind: str, why: str) -> None:
    log.info("%s samples by transformers' generate, which waits for the GPU at every token: %s.", kind, why)


def choosing(sampling: Sampling) -> fixed_shapes.Choose:
    """Gives tokens [B] from logits [B, V], which are lost, and noise [B]: at temperature 0 the likeliest."""
    keep = TopPLogitsWarper(sampling.top_p) if sampling.top_p < 1.0 else None

    def choose(logits: Tensor, noise: Tensor) -> Tensor:
        if not sampling.temperature:
            return logits.float().argmax(-1)
        logits = logits.float().div_(sampling.temperature)
        return draw(keep(torch.empty(0), logits) if keep else logits, noise)

    return choose


class _Choose(LogitsProcessor):
    """Chooses the token of every row by the row's own noise, and leaves ``generate`` only that one to take."""

    def __init__(self, request: fixed_shapes.Request, device: torch.device) -> None:
        self.choose, self.width, self.noise = request.choose, request.ids.shape[1], request.noise.to(device)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        chosen = self.choose(scores, self.noise[:, input_ids.shape[1] - self.width])  # scores are generate's own copy
        return scores.fill_(-torch.inf).scatter_(1, chosen[:, None], 0.0)
