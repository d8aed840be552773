"""PPO: advantages by generalized advantage estimation against a critic, and the clipped surrogate."""

from __future__ import annotations

from torch import Tensor

from rlhf.algorithms.algorithm import PolicyTerms, Rewarded
from rlhf.config.ppo_sections import PpoUpdateSection
from rlhf.losses import policy
from rlhf.losses.policy import PolicyLoss


def advantages(batch: Rewarded, settings: PpoUpdateSection) -> Tensor:
    """[B, T] A_t = delta_t + gamma * lam * A_{t+1},   delta_t = r_t + gamma * V_{t+1} - V_t.

    Reference: Schulman et al. 2016, https://arxiv.org/abs/1506.02438, eq. 16.
    """
    assert batch.values is not None, "PPO's settings ask for a critic"
    return policy.gae_advantages(batch.rewards, batch.values, batch.mask, settings.gamma, settings.lam)


def loss(terms: PolicyTerms, settings: PpoUpdateSection) -> PolicyLoss:
    """L = -sum min(rho * A, clip(rho, 1 - eps, 1 + eps) * A) / num_tokens,   rho = exp(new - old).

    Reference: Schulman et al. 2017, https://arxiv.org/abs/1707.06347, eq. 7.
    """
    return policy.policy_loss(
        terms.logprobs, terms.old_logprobs, terms.advantages, terms.mask, settings.clip_range, terms.num_tokens
    )
