"""The golden engine: transformers' ``generate`` with every setting fixed and the choice of tokens our own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, TopPLogitsWarper

from rlhf.data.chat import ChatFormat
from rlhf.errors import Problem, RlhfError
from rlhf.models import decoding, packing
from rlhf.models.ends import token_ids
from rlhf.models.roles import Roles
from rlhf.progress import track
from rlhf.rollouts.cache import roomy
from rlhf.rollouts.engine import Rollout, Sampling, draw, uniforms


class HfEngine:
    """Samples with the role ``slot``, at most ``concurrency`` rows at a time.

    Args:
        streamer: of transformers, is given the tokens of a single row as they come; then there is no progress bar.
    """

    def __init__(self, roles: Roles, slot: str, chat: ChatFormat, concurrency: int, streamer: Any = None) -> None:
        self.roles, self.slot, self.chat, self.concurrency = roles, slot, chat, concurrency
        self.streamer = streamer

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
        device = self.roles.device
        ids = torch.tensor([[self.chat.pad_id] * (width - len(prompt)) + list(prompt) for prompt in prompts])
        mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
        with self.roles.acting_as(self.slot) as (model, _):
            self._require_room(width, sampling.max_new_tokens)
            settings = GenerationConfig(
                max_new_tokens=sampling.max_new_tokens, do_sample=False, num_beams=1, use_cache=True,
                eos_token_id=self._ends(sampling), pad_token_id=self.chat.pad_id, repetition_penalty=1.0,
                temperature=1.0, top_k=50, top_p=1.0, renormalize_logits=False,
            )  # fmt: skip
            processors = LogitsProcessorList([_Choose(sampling, rows, width)] if sampling.temperature else [])
            with decoding.in_place_of(model, packing.known_blocks(model)):
                whole = model.generate(
                    input_ids=ids.to(device), attention_mask=mask.to(device), generation_config=settings,
                    logits_processor=processors, streamer=self.streamer,
                    past_key_values=roomy(model, width + sampling.max_new_tokens),
                )  # fmt: skip
        return [self._cut(row, self._ends(sampling)) for row in whole[:, width:].tolist()]

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


class _Choose(LogitsProcessor):
    """Chooses the token of every row by the row's own noise, and leaves ``generate`` only that one to take."""

    def __init__(self, sampling: Sampling, rows: Sequence[int], width: int) -> None:
        self.noise = uniforms(sampling.seed, rows, sampling.max_new_tokens)
        self.sampling, self.width = sampling, width
        self.keep = TopPLogitsWarper(sampling.top_p) if sampling.top_p < 1.0 else None

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        logits = scores.float().div_(self.sampling.temperature)  # generate's own copy, and not needed afterwards
        if self.keep:
            logits = self.keep(input_ids, logits)
        chosen = draw(logits, self.noise[:, input_ids.shape[1] - self.width].to(logits.device))
        return scores.fill_(-torch.inf).scatter_(1, chosen[:, None], 0.0)
