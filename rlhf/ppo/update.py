"""The policy's update on one batch: epochs of minibatches, micro-batches that add up exactly."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from rlhf.config.stages import PpoConfig
from rlhf.data.batches import Sequences, micro_batches
from rlhf.models import forward
from rlhf.models.base import Base
from rlhf.models.roles import Roles
from rlhf.optimizer import Optimizer
from rlhf.ppo import objective, tensors
from rlhf.ppo.experience import Experience

log = logging.getLogger("rlhf")


@dataclass
class Totals:
    """Sums of the figures of an update's minibatches, for their means."""

    count: int = 0
    sums: dict[str, float] = field(default_factory=dict)

    def add(self, figures: dict[str, float]) -> None:
        self.count += 1
        for name, value in figures.items():
            self.sums[name] = self.sums.get(name, 0.0) + value

    def means(self, prefix: str) -> dict[str, float]:
        return {f"{prefix}{name}": value / self.count for name, value in self.sums.items()}


def minibatches(num_rows: int, size: int, seed: int, epoch: int) -> Iterator[list[int]]:
    """The rows of a batch in random order, ``size`` at a time; the order depends on seed and epoch alone."""
    generator = torch.Generator().manual_seed((seed * 1_000_003 + epoch) % 2**63)
    yield from torch.randperm(num_rows, generator=generator).split(size)  # type: ignore[misc]


def update(
    config: PpoConfig, roles: Roles, optimizer: Optimizer, base: Base, experience: Experience, seed: int, step: int,
    kl_coef: float,
) -> dict[str, float]:  # fmt: skip
    """``update.epochs`` passes of the policy over the batch; returns the means over the minibatches.

    Ends a pass and all later ones before a step whose minibatch has a mean update KL above ``update.target_kl``.
    """
    advantages = prepare_advantages(config, experience)
    totals, stopped = Totals(), False
    for epoch in range(config.update.epochs):
        for rows in minibatches(len(experience.samples), config.batch.minibatch_size, seed, epoch):
            chosen = [int(row) for row in rows]
            figures = _policy_gradient(config, roles, base, experience, advantages, chosen, kl_coef)
            if config.update.target_kl is not None and figures["approx_kl"] > config.update.target_kl:
                _clear(optimizer)
                log.info("Step %d: update KL %.4f, epochs ended early.", step, figures["approx_kl"])
                stopped = True
                break
            figures["grad_norm"] = optimizer.step(place("policy", step, chosen))
            totals.add(figures)
        if stopped:
            break
    return {
        **totals.means("update/policy_"), "update/optimizer_steps": totals.count,
        "update/learning_rate": optimizer.learning_rate, "update/kl_coef": kl_coef,
    }  # fmt: skip


def prepare_advantages(config: PpoConfig, experience: Experience) -> Tensor:
    """[B, T] normalised over the whole batch, or only centred."""
    shape = tensors.normalize if config.update.normalise_advantages else tensors.center
    return shape(experience.advantages, experience.mask)


def _policy_gradient(
    config: PpoConfig, roles: Roles, base: Base, experience: Experience, advantages: Tensor, rows: list[int],
    kl_coef: float,
) -> dict[str, float]:  # fmt: skip
    """Accumulate the policy's gradient on the minibatch ``rows``; nothing is applied."""
    num_tokens = int(experience.mask[rows].sum())
    totals = {"loss": 0.0, "clip_fraction": 0.0, "approx_kl": 0.0, "ratio": 0.0}
    for part, sequences, mask in micro_batches_of(config, base, experience, rows):
        cut = cutter(part, mask)
        old = cut(experience.old_logprobs)
        with roles.acting_as("policy") as (model, _):
            if config.update.entropy_coef:
                logprobs, entropy = forward.response_logprobs_and_entropy(model, sequences, config.sampling.temperature)
            else:
                logprobs = forward.response_logprobs(model, sequences, config.sampling.temperature)
            outcome = objective.policy_loss(logprobs, old, cut(advantages), mask, config.update.clip_range, num_tokens)
            loss = outcome.loss
            if config.kl.place == "loss" and experience.ref_logprobs is not None:
                ref = cut(experience.ref_logprobs)
                loss = loss + kl_coef * objective.k2_kl_loss(logprobs, old, ref, mask, num_tokens)
            if config.update.entropy_coef:
                loss = loss - config.update.entropy_coef * tensors.masked_sum(entropy, mask) / num_tokens
            loss.backward()
        totals["loss"] += float(loss.detach())
        for name in ("clip_fraction", "approx_kl", "ratio"):
            totals[name] += float(getattr(outcome, name))
    return totals


def micro_batches_of(
    config: PpoConfig, base: Base, experience: Experience, rows: Sequence[int]
) -> Iterator[tuple[list[int], Sequences, Tensor]]:
    """Micro-batches of the minibatch: rows of the batch, their sequences, their mask on the device."""
    lengths = [len(experience.samples[row].prompt_ids) + len(experience.samples[row].response_ids) for row in rows]
    for indices in micro_batches(lengths, config.batch.micro_batch_size, config.batch.micro_batch_tokens):
        part = [rows[index] for index in indices]
        sequences = experience.sequences(part, base.chat.pad_id, base.device)
        yield part, sequences, sequences.mask


def cutter(rows: list[int], mask: Tensor):  # type: ignore[no-untyped-def]
    """A function that takes these rows of a [B, T] tensor, as narrow as ``mask``, onto its device."""
    return lambda whole: whole[rows, : mask.shape[1]].to(mask.device)


def place(role: str, step: int, rows: Sequence[int]) -> str:
    return f"{role}, step {step}, responses {', '.join(map(str, rows))} of the batch"


def _clear(optimizer: Optimizer) -> None:
    for parameter in optimizer.parameters:
        parameter.grad = None
