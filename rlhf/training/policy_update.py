"""The policy's update on one batch: epochs of minibatches, micro-batches that add up exactly."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from rlhf.algorithms.algorithm import Algorithm, PolicyTerms
from rlhf.config.ppo_sections import UpdateSection
from rlhf.losses import policy, tensors
from rlhf.models import forward
from rlhf.models.roles import Roles
from rlhf.training.experience import Experience, MicroBatch, Passes
from rlhf.training.optimizer import Optimizer

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
    for rows in torch.randperm(num_rows, generator=generator).split(size):
        yield rows.tolist()


@dataclass(frozen=True)
class PolicySettings:
    """What the policy's update reads of the config.

    Args:
        temperature: of the rollouts, whose tempered policy is the one that is trained.
        kl_in_loss: whether the KL to the reference is a term of the loss.
    """

    update: UpdateSection
    minibatch_size: int
    temperature: float
    kl_in_loss: bool


@dataclass(frozen=True)
class PolicyUpdate:
    """The role "policy" and its optimizer, moved by an algorithm's loss."""

    roles: Roles
    optimizer: Optimizer
    algorithm: Algorithm
    passes: Passes
    settings: PolicySettings

    def learn(self, batch: Experience, seed: int, step: int, kl_coef: float) -> dict[str, float]:
        """``update.epochs`` passes over the batch; returns the means over the minibatches.

        Ends a pass and all later ones before a step whose minibatch has a mean update KL above ``update.target_kl``.
        """
        totals = Totals()
        for figures, rows in self._gradients(batch, seed, kl_coef):
            target = self.settings.update.target_kl
            if target is not None and figures["approx_kl"] > target:
                self.optimizer.clear()
                log.info("Step %d: update KL %.4f, epochs ended early.", step, figures["approx_kl"])
                break
            figures["grad_norm"] = self.optimizer.step(place("policy", step, rows))
            totals.add(figures)
        return {
            **totals.means("update/policy_"),
            "update/optimizer_steps": totals.count,
            "update/learning_rate": self.optimizer.learning_rate,
            "update/kl_coef": kl_coef,
        }

    def _gradients(self, batch: Experience, seed: int, kl_coef: float) -> Iterator[tuple[dict[str, float], list[int]]]:
        """The gradient of one minibatch after the other; what is yielded are its figures and its rows."""
        advantages = self.prepare(batch)
        for epoch in range(self.settings.update.epochs):
            for rows in minibatches(len(batch.samples), self.settings.minibatch_size, seed, epoch):
                yield self.accumulate(batch, advantages, rows, kl_coef), rows

    def prepare(self, batch: Experience) -> Tensor:
        """[B, T] the advantages, normalised over the whole batch or only centred."""
        shape = tensors.normalize if self.settings.update.normalise_advantages else tensors.center
        return shape(batch.advantages, batch.mask)

    def accumulate(self, batch: Experience, advantages: Tensor, rows: list[int], kl_coef: float) -> dict[str, float]:
        """Accumulate the policy's gradient on the minibatch ``rows``; nothing is applied."""
        num_tokens = int(batch.mask[rows].sum())
        totals = {"loss": 0.0, "clip_fraction": 0.0, "approx_kl": 0.0, "ratio": 0.0}
        for part in batch.micro_batches(rows, self.passes):
            old = part.of(batch.old_logprobs)
            # The backward pass belongs inside: checkpointing runs the forward again with the adapter that is active.
            with self.roles.acting_as("policy") as (model, _):
                logprobs, entropy = self._forward(model, part)
                terms = PolicyTerms(logprobs, old, part.of(advantages), part.mask, num_tokens, len(rows))
                figures = self.algorithm.loss(terms, self.settings.update)
                loss = figures.loss
                if self.settings.kl_in_loss and batch.ref_logprobs is not None:
                    ref = part.of(batch.ref_logprobs)
                    loss = loss + kl_coef * policy.k2_kl_loss(logprobs, old, ref, part.mask, num_tokens)
                if entropy is not None:
                    coef = self.settings.update.entropy_coef
                    loss = loss - coef * tensors.masked_sum(entropy, part.mask) / num_tokens
                loss.backward()
            totals["loss"] += float(loss.detach())
            for name in ("clip_fraction", "approx_kl", "ratio"):
                totals[name] += float(getattr(figures, name))
        return totals

    def _forward(self, model: object, part: MicroBatch) -> tuple[Tensor, Tensor | None]:
        """[b, T] logprobs and, where the loss has a bonus for it, entropy; with gradient."""
        if self.settings.update.entropy_coef:
            return forward.response_logprobs_and_entropy(model, part.sequences, self.settings.temperature)
        return forward.response_logprobs(model, part.sequences, self.settings.temperature), None


def place(role: str, step: int, rows: Sequence[int]) -> str:
    return f"{role}, step {step}, responses {', '.join(map(str, rows))} of the batch"
