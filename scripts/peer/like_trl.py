"""Our PPO as TRL 1.12 does it, where the config has no key for it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from rlhf.evaluation import policy as measure
from rlhf.models import forward
from rlhf.ppo import experience as experiences
from rlhf.ppo import objective
from rlhf.ppo.training import Training
from rlhf.ppo.value_role import ValueRole

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

    late: experiences.Experience

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.set_epsilons()

    def set_epsilons(self) -> None:
        assert isinstance(self.critic, ValueRole)
        for optimizer, eps in ((self.optimizer, EPS), (self.critic.optimizer, EPS / VALUE_COEF)):
            for group in optimizer.adamw.param_groups:
                group["eps"] = eps

    def roll_out(self) -> experiences.Experience:
        batch, config = super().roll_out(), self.config
        late = with_state_behind_end(batch.mask)
        samples = [
            replace(sample, response_ids=[*sample.response_ids, self.base.chat.pad_id]) if longer else sample
            for sample, longer in zip(batch.samples, (late.sum(1) > batch.mask.sum(1)).tolist(), strict=True)
        ]
        values = torch.zeros(late.shape)
        parts = measure.batched(samples, self.base.chat.pad_id, self.base.device, config.batch.micro_batch_size)
        for rows, sequences in parts:
            with torch.no_grad(), self.roles.acting_as("value") as (model, head):
                found = forward.state_values(model, head, sequences)
            values[rows, : found.shape[1]] = found.float().cpu()
        penalty = experiences.kl_penalty(config.kl, vars(batch))
        rewards = objective.token_rewards(penalty, batch.scores, late, self.progress.kl_coef)
        advantages, returns = experiences.estimate(config, rewards, values, late)
        self.late = replace(
            batch, samples=samples, mask=late, old_values=values, rewards=rewards, advantages=advantages,
            returns=returns,
        )  # fmt: skip
        return replace(batch, advantages=advantages.masked_fill(~batch.mask, 0.0))

    def step(self) -> float:
        """The critic learns from ``late``, the policy from the batch."""
        learn = self.critic.learn

        def from_late(_: Any, seed: int, step: int) -> dict[str, float]:
            return learn(self.late, seed, step)

        with mock.patch.object(self.critic, "learn", from_late):
            return super().step()


def with_state_behind_end(mask: Tensor) -> Tensor:
    """[B, T] ``mask`` with one more position in every row that is shorter than T."""
    positions = torch.arange(mask.shape[1])
    return positions[None] <= mask.sum(1, keepdim=True)
