"""Our PPO as TRL 1.12 does it, where the config has no key for it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from rlhf.algorithms.algorithm import Rewarded
from rlhf.losses import policy
from rlhf.models import forward
from rlhf.training.collector import kl_penalty
from rlhf.training.critics import ValueTargets
from rlhf.training.experience import Experience
from rlhf.training.loop import Training
from rlhf.training.trained_critic import ValueRole

EPS, VALUE_COEF = 1e-8, 0.1  # of transformers' AdamW and of TRL's PPOConfig


class Measured(Training):
    """A run whose held-out evaluations are the script's."""

    def evaluate(self) -> dict[str, float]:
        return {}


class LikeTrl(Measured):
    """Our run as TRL 1.12 does it, where the config has no key for it.

    - The score is the reward of one more state, the one behind the end token, whose value is learnt too; a response as
      long as the longest of its batch has the score on its last token, as ever.
    - AdamW's epsilon is 1e-8. The weight of the value loss is an epsilon as well: Adam on c times a gradient is Adam
      on the gradient with epsilon / c.

    TRL clips no gradient: its loop never comes to max_grad_norm. In the config that is a limit beyond all norms.
    """

    late: Experience

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.set_epsilons()

    def set_epsilons(self) -> None:
        assert isinstance(self.critic, ValueRole)
        for optimizer, eps in ((self.policy.optimizer, EPS), (self.critic.optimizer, EPS / VALUE_COEF)):
            for group in optimizer.adamw.param_groups:
                group["eps"] = eps

    def roll_out(self) -> Experience:
        batch, collector = super().roll_out(), self.collector
        settings = collector.settings
        late = with_state_behind_end(batch.mask)
        samples = [
            replace(sample, response_ids=[*sample.response_ids, self.policy.passes.pad_id]) if longer else sample
            for sample, longer in zip(batch.samples, (late.sum(1) > batch.mask.sum(1)).tolist(), strict=True)
        ]
        values = torch.zeros(late.shape)
        for rows, sequences in collector.policy.batched(samples):
            with torch.no_grad(), self.roles.acting_as("value") as (model, head):
                found = forward.state_values(model, head, sequences)
            values[rows, : found.shape[1]] = found.float().cpu()
        penalty = kl_penalty(settings.kl, vars(batch))
        rewards = policy.token_rewards(penalty, batch.scores, late, self.progress.kl_coef)
        rewarded = Rewarded(rewards, batch.scores, late, settings.samples_per_prompt, values)
        advantages = collector.algorithm.advantages(rewarded, settings.update)
        returns = ValueTargets(*settings.update.value_targets()).returns(rewards, values, late)
        self.late = replace(
            batch,
            samples=samples,
            mask=late,
            old_values=values,
            rewards=rewards,
            advantages=advantages,
            returns=returns,
        )
        return replace(batch, advantages=advantages.masked_fill(~batch.mask, 0.0))

    def step(self) -> float:
        """The critic learns from ``late``, the policy from the batch."""
        learn = ValueRole.learn

        def from_late(critic: ValueRole, batch: Experience, seed: int, step: int) -> dict[str, float]:
            return learn(critic, self.late, seed, step)

        with mock.patch.object(ValueRole, "learn", from_late):
            return super().step()


def with_state_behind_end(mask: Tensor) -> Tensor:
    """[B, T] ``mask`` with one more position in every row that is shorter than T."""
    positions = torch.arange(mask.shape[1])
    return positions[None] <= mask.sum(1, keepdim=True)
