"""From what a config says of sampling to the engine that samples, which is examined before it is used."""

from __future__ import annotations

import logging
from dataclasses import dataclass

import torch

from rlhf.config.sections import SamplingSection
from rlhf.data.batches import collate
from rlhf.data.chat_format import ChatFormat
from rlhf.errors import Problem, RlhfError
from rlhf.models import forward
from rlhf.models.fused import logits
from rlhf.models.roles import Roles
from rlhf.records import Message
from rlhf.rollouts.continuous import ContinuousEngine
from rlhf.rollouts.engine import RolloutEngine, Sampling
from rlhf.rollouts.hf import HfEngine

log = logging.getLogger("rlhf")
CHECKED_TOKENS = 8
WIDE_LIMIT = 1e-3  # nats, where a base computes in float32 at least
MEAN_LIMIT, MEAN_STEPS, LARGEST_STEPS = 0.15, 0.5, 3


@dataclass(frozen=True)
class Gap:
    """Between an engine's logprobs of its samples and the trainer's, in nats a token.

    Args:
        step: what the base's arithmetic resolves of the largest tempered logit.
    """

    mean: float
    largest: float
    step: float


def limits(gap: Gap, dtype: torch.dtype) -> tuple[float, float]:
    """The mean and the largest gap that rounding may leave.

    In bfloat16 two ways through the same blocks give states that differ by about a percent, and logprobs that differ in
    proportion to the logits. Measured were a mean of .07 to .33 steps and at most .15 to 1.3, at logit deviations of 1
    to 23; another temperature (1 for .7) or adapter gave a mean of .2 nats and more, unless hardly a token had two
    choices.
    """
    if dtype.itemsize >= 4:
        return WIDE_LIMIT, WIDE_LIMIT
    return min(MEAN_LIMIT, MEAN_STEPS * gap.step), LARGEST_STEPS * gap.step


def open_engine(roles: Roles, slot: str, chat: ChatFormat, section: SamplingSection) -> RolloutEngine:
    """The engine of ``sampling.engine`` for the role ``slot``.

    Raises:
        RlhfError: MOD044 for a continuous engine whose samples are not those of the trained policy.
    """
    if section.engine == "hf":
        return HfEngine(roles, slot, chat, section.concurrency)
    engine = ContinuousEngine(roles, slot, chat, section.concurrency)
    gap = logprob_gap(engine, section)
    with roles.acting_as(slot) as (model, _):
        mean, largest = limits(gap, model.dtype)
    if not (gap.mean <= mean and gap.largest <= largest):
        what = (
            f"its logprobs are {gap.mean:.3g} nats from those of the policy that is trained, and up to "
            f"{gap.largest:.3g}; allowed: {mean:.3g} and {largest:.3g}."
        )
        raise RlhfError(Problem("MOD044", "sampling.engine: continuous", what, "sampling.engine: hf"))
    log.info(
        "Continuous batching was compared with the trainer's own pass: %.1e nats a token apart, and at most %.1e.",
        gap.mean,
        gap.largest,
    )
    return engine


@torch.no_grad()
def logprob_gap(engine: ContinuousEngine, section: SamplingSection) -> Gap:
    """The gap in a few short samples."""
    whole = engine.chat.prompt_ids((Message("user", "How are you today?"),))
    prompts = [whole, whole[: max(1, len(whole) // 2)], whole, whole[:1]]
    how = Sampling(min(CHECKED_TOKENS, section.max_new_tokens), section.temperature, 0)
    found = engine.generate(prompts, how, range(len(prompts)))
    with engine.roles.acting_as(engine.slot) as (model, _):
        sequences = collate(prompts, found.tokens, engine.chat.pad_id, engine.roles.device)
        wanted = forward.response_logprobs(model, sequences, section.temperature).cpu()
        own = logits.of(model.get_output_embeddings(), forward.states_before(model, sequences))
        step = torch.finfo(model.dtype).eps * float(own.abs().max()) / section.temperature
    assert found.logprobs
    gaps = torch.cat([(torch.tensor(row) - wanted[i, : len(row)]).abs() for i, row in enumerate(found.logprobs)])
    return Gap(float(gaps.mean()), float(gaps.max()), step)
