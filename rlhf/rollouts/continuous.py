"""The fast engine: transformers' continuous batching, in process, with the trainer's own adapter."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import groupby
from typing import Any

import torch
from transformers import ContinuousBatchingConfig, GenerationConfig
from transformers.utils.import_utils import is_flash_attn_2_available, is_flash_attn_3_available

from rlhf.errors import Problem, RlhfError
from rlhf.models import packing
from rlhf.models.fused import decoding
from rlhf.rollouts.engine import Rollout, Sampling
from rlhf.rollouts.hf import HfEngine

log = logging.getLogger("rlhf")
PAGE = 32
PREFILL_TOKENS = 1024


class ContinuousEngine(HfEngine):
    """Samples with the role ``slot``; a row that has ended makes room for the next, equal prompts share their prefill.

    The noise belongs to the call and not to the row: the same seed and first row give the same samples only for the
    same rows in the same order. What it attends by is said once.
    """

    attends_by = ""

    def generate(self, prompts: Sequence[Sequence[int]], sampling: Sampling, rows: Sequence[int]) -> Rollout:
        """As ``HfEngine.generate``.

        Raises:
            RlhfError: also RES007 where the library gives fewer rows than it was asked for.
        """
        assert len(prompts) == len(rows)
        width, ends = max(map(len, prompts)), self._ends(sampling)
        self._require_room(width, sampling.max_new_tokens)
        groups = [(list(key), len(list(same))) for key, same in groupby(map(tuple, prompts))]
        count = groups[0][1] if len({size for _, size in groups}) == 1 else 1
        asked = [ids for ids, _ in groups] if count > 1 else [list(prompt) for prompt in prompts]
        settings = GenerationConfig(
            max_new_tokens=sampling.max_new_tokens,
            do_sample=sampling.temperature > 0,
            eos_token_id=ends,
            pad_token_id=self.chat.pad_id,
            temperature=sampling.temperature or 1.0,
            top_k=0,
            top_p=sampling.top_p,
            num_return_sequences=count,
            repetition_penalty=1.0,
            num_beams=1,
            use_cache=True,
        )
        pages = -(-(width + sampling.max_new_tokens) // PAGE) + 1
        batching = ContinuousBatchingConfig(
            page_size=PAGE,
            num_blocks=pages * min(self.concurrency, len(prompts)) + 1,
            return_logprobs=True,
            max_batch_tokens=max(PREFILL_TOKENS, self.concurrency),
            seed=(sampling.seed * 1_000_003 + rows[0]) % 2**31,
            max_requests_per_batch=self.concurrency,
            auto_switch_to_flash=False,
        )
        acting = self.roles.acting_as(self.slot)
        with acting as (model, _), self._attention(model), decoding.in_place_of(model, None):
            found = model.generate_batch(
                asked, generation_config=settings, continuous_batching_config=batching, warmup=False
            )
        failed = next((row.error for row in found.values() if row.error), None)
        if failed or len(found) != len(prompts):
            what = f"continuous batching gave {len(found)} of {len(prompts)} rows{f': {failed}' if failed else '.'}"
            raise RlhfError(Problem("RES007", "sampling.engine", what, "sampling.engine: hf, or a lower concurrency"))
        tokens = [self._cut(row.generated_tokens, ends) for row in found.values()]
        logprobs = [row.logprobs[: len(ids)] for row, ids in zip(found.values(), tokens, strict=True)]
        return Rollout(tokens, [ids[-1] in ends for ids in tokens], logprobs)

    @contextmanager
    def _attention(self, model: Any) -> Iterator[None]:
        """Until the end of the block with attention that the library knows, which is not our own: flash attention where
        it can run, else SDPA. The library leaves global switches as it likes them; they are set back."""
        own, deterministic = model.config._attn_implementation, torch.are_deterministic_algorithms_enabled()
        if own in (packing.ATTENTION, "sdpa"):
            self._say(_switch(model), model.device.type)
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(deterministic, warn_only=True)
            model.eval()
            model.set_attn_implementation(own)

    def _say(self, attends_by: str, device: str) -> None:
        if attends_by == self.attends_by:
            return
        self.attends_by = attends_by
        hint = ""
        if device == "cuda" and attends_by == "sdpa":
            hint = ", with a mask over all rows; in bfloat16 with the package flash-attn it needs none"
        log.info("Continuous batching attends by %s%s.", attends_by, hint)


def flash_version(model: Any) -> int | None:
    """Of the flash attention that is installed and runs for this model on its device; None: none does.

    transformers would also fetch a kernel from the hub: code that nobody asked for.
    """
    if model.device.type != "cuda" or model.dtype not in (torch.bfloat16, torch.float16):
        return None
    if not getattr(model, "_supports_flash_attn", False):
        return None
    if is_flash_attn_3_available(kernels_fallback_ok=False):
        return 3
    return 2 if is_flash_attn_2_available(kernels_fallback_ok=False) else None


def _switch(model: Any) -> str:
    """Give the model flash attention where it can run, else SDPA; the name of what it has then."""
    if version := flash_version(model):
        try:
            model.set_attn_implementation(f"flash_attention_{version}")
            return f"flash_attention_{version}"
        except (ImportError, ValueError) as error:
            log.warning("flash-attn is installed and cannot be used: %s", " ".join(str(error).split())[:160])
    model.set_attn_implementation("sdpa")
    return "sdpa"
