"""From prompts to a batch that PPO can learn from: sample, score, rescore, reward, estimate advantages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from rlhf.config.ppo import KlSection, MissingEosSection
from rlhf.config.stages import PpoConfig
from rlhf.data.batches import Sequences, collate
from rlhf.data.tokenised import PromptRow
from rlhf.errors import Problem, RlhfError
from rlhf.evaluation import policy as measure
from rlhf.models import forward
from rlhf.models.base import Base
from rlhf.models.roles import Roles
from rlhf.ppo import objective, tensors
from rlhf.rollouts.engine import RolloutEngine
from rlhf.scoring.scorer import Sample, Scorer
from rlhf.snapshots import Stateful


@dataclass(frozen=True)
class Experience:
    """One batch of rollouts, B responses of at most T tokens, all fixed while the update runs.

    Args:
        scores: [B] after the missing-EOS rule.
        mask: [B, T] bool, True on response tokens up to and including the end token.
        old_logprobs, entropy: [B, T] of the tempered policy; ref_logprobs, exact_kl: None where no step reads the
            reference.
        old_values: [B, T] before the critic learns from this batch; rewards: [B, T].
        advantages: [B, T] not yet normalised; returns: [B, T] what the critic learns.
        outcomes: [B, T] the rewards from each token to the end, which ``old_values`` are judged by.
        states: what the critic read: rows of a micro-batch, and the hidden states [n, d] before their response tokens.
        disagreement: [B] of an ensemble's members that are compared in differences.
        terms: name -> [B] of each term of the score as it enters the sum, before the missing-EOS rule.
    """

    samples: list[Sample]
    scores: Tensor
    mask: Tensor
    old_logprobs: Tensor
    entropy: Tensor
    old_values: Tensor
    rewards: Tensor
    advantages: Tensor
    returns: Tensor
    outcomes: Tensor
    ref_logprobs: Tensor | None = None
    exact_kl: Tensor | None = None
    states: Sequence[tuple[list[int], Tensor]] = ()
    disagreement: Tensor | None = None
    terms: Mapping[str, Tensor] = field(default_factory=dict)

    def sequences(self, rows: Sequence[int], pad_id: int, device: torch.device) -> Sequences:
        """The token ids of some rows, padded only as far as these need."""
        chosen = [self.samples[row] for row in rows]
        return collate([s.prompt_ids for s in chosen], [s.response_ids for s in chosen], pad_id, device)

    @property
    def metrics(self) -> dict[str, float]:
        """What a person watches of a batch."""
        finished = [sample.finished for sample in self.samples]
        gaps = [
            (torch.tensor(sample.logprobs) - own[: len(sample.logprobs)]).abs()
            for sample, own in zip(self.samples, self.old_logprobs, strict=True) if sample.logprobs is not None
        ]  # fmt: skip
        lengths = self.mask.sum(1).double()
        others = {} if self.disagreement is None else {"rollout/disagreement": float(self.disagreement.mean())}
        if self.ref_logprobs is not None and self.exact_kl is not None:
            kl = tensors.masked_sum(self.old_logprobs - self.ref_logprobs, self.mask) / len(finished)
            others["rollout/kl_nats"] = float(kl)
            others["rollout/exact_kl_nats"] = float(self.exact_kl.double().sum(1).mean())
        return {
            "rollout/score": float(self.scores.double().mean()),
            "rollout/score_std": float(self.scores.double().std(correction=0)),
            **{f"rollout/score/{name}": float(term.double().mean()) for name, term in self.terms.items()},
            "rollout/entropy_nats": float(tensors.masked_mean(self.entropy, self.mask)),
            "rollout/response_tokens": float(lengths.mean()),
            "rollout/end_token_rate": sum(finished) / len(finished),
            **self._explained(),
            **({"rollout/engine_gap_nats": float(torch.cat(gaps).mean())} if gaps else {}),
            **others,
        }

    def _explained(self) -> dict[str, float]:
        """How much of the real outcomes the critic foretold, over all tokens and by thirds of each response."""
        name, masks = "rollout/explained_variance", tensors.thirds(self.mask)
        parts = {name: self.mask, **{f"{name}_{third}_third": mask for third, mask in masks.items()}}
        return {
            key: float(tensors.explained_variance(self.old_values, self.outcomes, mask)) for key, mask in parts.items()
        }


class Critic(Protocol):
    """What gives the values of the states that responses go through, and learns from what came of them."""

    def read(self, sequences: Sequences, reference: Tensor | None) -> tuple[Tensor, Tensor]: ...
    def start(self, batch: Experience) -> None: ...
    def learn(self, batch: Experience, seed: int, step: int) -> dict[str, float]: ...
    def state(self) -> dict[str, Stateful]: ...
    def save(self, directory: Path) -> None: ...


def settle(section: MissingEosSection) -> measure.ScoreRule:
    """The rule for responses without an end token, as a function of scores [B] and finished [B]."""
    if section.mode == "replace":
        return lambda scores, finished: objective.replace_missing_eos(scores, finished, section.score)
    return lambda scores, finished: objective.subtract_missing_eos(scores, finished, section.penalty)


def collect(
    config: PpoConfig, roles: Roles, critic: Critic, engine: RolloutEngine, scorer: Scorer, base: Base,
    prompts: Sequence[PromptRow], seed: int, first_row: int, kl_coef: float,
) -> Experience:  # fmt: skip
    """Answer each prompt ``samples_per_prompt`` times and work out everything the update needs.

    Args:
        first_row: global number of the first response; the noise of a response depends on ``seed`` and its number.
    """
    repeated = [prompt for prompt in prompts for _ in range(config.samples_per_prompt)]
    numbers = range(first_row, first_row + len(repeated))
    samples = measure.respond(engine, base.chat, repeated, measure.sampling_of(config.sampling, seed), numbers)
    found = scorer.score(samples)
    finished = torch.tensor([sample.finished for sample in samples])
    scores = settle(config.missing_eos)(found.mean.cpu(), finished).float()
    if not bool(torch.isfinite(scores).all()):
        bad = ", ".join(str(row) for row in (~torch.isfinite(scores)).nonzero().flatten().tolist())
        what = f"the scores of responses {bad} of this batch are not finite; nothing was learnt from it."
        raise RlhfError(Problem("GRD006", f"response {first_row} and on", what, "look at the reward run or function"))
    mask = tensors.response_mask(torch.tensor([len(sample.response_ids) for sample in samples]), _width(samples))
    whole: dict[str, Tensor] = {}
    states: list[tuple[list[int], Tensor]] = []
    size, tokens = config.batch.micro_batch_size, config.batch.micro_batch_tokens
    for rows, sequences in measure.batched(samples, base.chat.pad_id, base.device, size, tokens):
        figures, reference = _rescored(config, roles, sequences)
        read, hidden = critic.read(sequences, reference)
        states.append((rows, hidden.cpu()))
        figures["old_values"] = forward.scatter(read, sequences)
        for name, part in figures.items():
            whole.setdefault(name, torch.zeros(mask.shape))[rows, : part.shape[1]] = part.float().cpu()
    coef = kl_coef if config.kl.place == "reward" else 0.0
    rewards = objective.token_rewards(kl_penalty(config.kl, whole), scores, mask, coef)
    advantages, returns = estimate(config, rewards, whole["old_values"], mask)
    return Experience(
        samples, scores, mask, rewards=rewards, advantages=advantages, returns=returns,
        outcomes=objective.outcomes(rewards, mask, config.update.gamma), states=states,
        disagreement=found.disagreement, terms=found.terms, **whole,
    )  # fmt: skip


def _rescored(config: PpoConfig, roles: Roles, sequences: Sequences) -> tuple[dict[str, Tensor], Tensor | None]:
    """Figures [B, T] of the roles by their names in ``Experience``, and the reference's states; without the reference
    where no step reads it."""
    temperature = config.sampling.temperature
    if not config.reads_reference():
        logprobs, entropy = forward.policy_alone(roles, sequences, temperature)
        return {"old_logprobs": logprobs, "entropy": entropy}, None
    both = forward.policy_and_reference(roles, sequences, temperature)
    figures = {
        "old_logprobs": both.logprobs, "ref_logprobs": both.ref_logprobs, "exact_kl": both.exact_kl,
        "entropy": both.entropy,
    }  # fmt: skip
    return figures, both.ref_hidden


def kl_penalty(section: KlSection, figures: Mapping[str, Tensor]) -> Tensor:
    """[B, T] the KL that the reward carries: sampled (k1), over the vocabulary, or 0 without the reference."""
    if figures.get("ref_logprobs") is None:
        return torch.zeros_like(figures["old_logprobs"])
    if section.estimator == "exact":
        return figures["exact_kl"]
    return objective.k1(figures["old_logprobs"], figures["ref_logprobs"])


def estimate(config: PpoConfig, rewards: Tensor, values: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Advantages of the policy and returns for the critic, each with its own lambda."""
    update = config.update
    advantages = objective.gae_advantages(rewards, values, mask, update.gamma, update.lam)
    value_lam = update.lam if update.value_lam is None else update.value_lam
    targets = objective.gae_advantages(rewards, values, mask, update.gamma, value_lam)
    return advantages, objective.returns_from(targets, values, mask)


def _width(samples: Sequence[Sample]) -> int:
    return max(len(sample.response_ids) for sample in samples)
