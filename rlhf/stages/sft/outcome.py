"""What SFT measures: the held-out loss of any of its models, and how the policy that was written ends its responses."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from rlhf.config.stages import SftConfig
from rlhf.data import tokenised
from rlhf.data.batches import PassSize
from rlhf.data.chat_format import ChatFormat
from rlhf.data.tokenised import PromptRow, Turn
from rlhf.errors import Problem, RlhfError
from rlhf.evaluation import policy_samples, stopping
from rlhf.evaluation.stopping import Answers
from rlhf.models import adapters, open_base
from rlhf.models.base import Base
from rlhf.models.roles import SharedBase
from rlhf.preflight import missing_ends
from rlhf.records import Demonstration, Prompt
from rlhf.rollouts.open_engine import open_engine
from rlhf.runs import artifacts, runtime
from rlhf.runs.artifacts import BaseIdentity
from rlhf.runs.run_directory import Run
from rlhf.scoring.scorer import Sample

log = logging.getLogger("rlhf")
LARGEST_LOSS = 700.0  # whose exponential is a float


@dataclass(frozen=True)
class HeldOutRows:
    """Turns that the loss is measured on, and prompts that are answered to see whether the policy ends."""

    turns: list[Turn]
    prompts: list[PromptRow]


@dataclass(frozen=True)
class Outcome:
    """What was measured of a policy, and the identity of its base. ``ending`` is what the gates read."""

    metrics: dict[str, float]
    ending: dict[str, Any]
    base: BaseIdentity


def held_out_rows(config: SftConfig, records: Sequence[Demonstration], chat: ChatFormat) -> HeldOutRows:
    """The held-out records as ids.

    Raises:
        RlhfError: DAT051 where no answer fits ``max_length``, MOD022 where nothing can be sampled behind a prompt.
    """
    turns = tokenised.turns(records, chat, config.loss_on == "last_turn", config.max_length)
    if not turns:
        what = f"none of the {len(records)} held-out rows has an answer within max_length ({config.max_length})."
        raise RlhfError(Problem("DAT051", "data", what, "a larger max_length or holdout_fraction"))
    prompts = [Prompt(record.messages[:-1], record.where) for record in records]
    new_tokens = config.sampling.max_new_tokens
    rows = tokenised.prompts_with_room(prompts, chat, config.max_length, new_tokens, "sampling.max_new_tokens")
    return HeldOutRows(turns, rows[: config.end_token_samples])


def loss_of(config: SftConfig, base: Base, model: Any, turns: Sequence[Turn]) -> float:
    """Of ``model``, which lives on ``base``: nats a response token, end token included."""
    return policy_samples.response_loss(
        model, turns, base.chat.pad_id, base.device, PassSize(config.batch.micro_batch_size)
    )


def trained_tokens(config: SftConfig, base: Base) -> list[str]:
    """Tokens whose rows are no longer the base's; an adapter that was made before had its own warning."""
    return config.lora.train_tokens if config.lora and not config.adapter else [base.chat.end_token]


def measure(config: SftConfig, device: torch.device, rows: HeldOutRows, answers: Answers, run: Run) -> Outcome:
    """Held-out loss of the base, of what training started from and of the policy, and how the policy ends.

    The artifact is measured as every later stage will load it, on a base that TRL has not touched.
    """
    base, trained_on = open_base.open_base(config.model, device), config.model
    roles = SharedBase(base)
    roles.add("base")
    losses = {"base": _loss(config, roles, "base", rows.turns)}
    if config.adapter:
        roles.add("start", adapter=adapters.directory_of(config.adapter))
    losses["start"] = _loss(config, roles, "start", rows.turns) if config.adapter else losses["base"]
    if config.lora:
        roles.add("policy", adapter=run.path / artifacts.ADAPTER)
    else:
        del roles
        trained_on = config.model.model_copy(
            update={
                "path": str(run.path / artifacts.MODEL),
                "revision": None,
                "end_tokens": list(base.chat.end_tokens[1:]),
            }
        )
        del base  # two of them would stand at once
        base = open_base.open_base(trained_on, device)
        roles = SharedBase(base)
        roles.add("policy")
    loss = _loss(config, roles, "policy", rows.turns)
    samples = _respond(config, roles, "policy", rows.prompts)
    run.write_samples("held_out", policy_samples.sample_rows(samples))
    rate = _end_rate(samples)
    log.info(
        "Held out: loss %.3f -> %.3f a token, perplexity %.2f -> %.2f; %.0f %% of %d samples end by themselves.",
        losses["start"],
        loss,
        _perplexity(losses["start"]),
        _perplexity(loss),
        100 * rate,
        len(samples),
    )
    new_tokens = config.sampling.max_new_tokens
    ending = stopping.figures(base, trained_tokens(config, base), samples, answers, new_tokens)
    if rate < missing_ends.least_end_rate(config, ending) and config.lora and config.steps != 0:
        ending["base_end_token_rate"] = _end_rate(_respond(config, roles, "base", rows.prompts))
    metrics = {
        "eval/base_loss": losses["base"],
        "eval/start_loss": losses["start"],
        "eval/loss": loss,
        "eval/perplexity": _perplexity(loss),
        "eval/end_token_rate": rate,
    }
    return Outcome(metrics, ending, open_base.identity_of(base, trained_on))


def _loss(config: SftConfig, roles: SharedBase, slot: str, turns: Sequence[Turn]) -> float:
    with roles.acting_as(slot) as (model, _):
        return loss_of(config, roles.base, model, turns)


def _perplexity(loss: float) -> float:
    return math.inf if loss > LARGEST_LOSS else math.exp(loss)


def _respond(config: SftConfig, roles: SharedBase, slot: str, prompts: Sequence[PromptRow]) -> list[Sample]:
    chat = roles.base.chat
    engine = open_engine(roles, slot, chat, config.sampling)
    seed = runtime.derived_seed(config.seed, "sft", "end token")
    return policy_samples.respond(engine, chat, prompts, policy_samples.sampling_of(config.sampling, seed))


def _end_rate(samples: Sequence[Sample]) -> float:
    return sum(sample.finished for sample in samples) / len(samples)
