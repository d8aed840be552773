"""The whole PPO objective for language models on one page of pure functions.

Letters: B responses, T response tokens. A response is one episode; its real tokens, up to and including the end token,
come first in a row and are True in ``mask`` [B, T] bool. What is masked may be NaN and never matters.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rlhf.losses.tensors import masked_sum

MAX_WEIGHT = 2.0


def k1(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """[B, T] log(p / q) at the sampled token: unbiased for KL(p || q), of either sign.

    Reference: Schulman, Approximating KL divergence, http://joschu.net/blog/kl-approx.html.
    """
    return logprobs - ref_logprobs


def k2(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """[B, T] (log(p / q))^2 / 2: biased as a number; its gradient is that of KL(p || q). Reference: as ``k1``."""
    return 0.5 * (logprobs - ref_logprobs).square()


def k3(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """[B, T] q/p - 1 - log(q/p): unbiased and never negative. A monitor only. Reference: as ``k1``."""
    log_ratio = ref_logprobs - logprobs
    return log_ratio.exp() - 1.0 - log_ratio


def replace_missing_eos(scores: Tensor, finished: Tensor, score: float) -> Tensor:
    """[B] scores, those of responses without an end token replaced by ``score``; ``finished`` [B] bool.

    A reward model knows nothing at a token that is not an end. Reference: Huang et al. 2024, detail 23.
    """
    return scores.masked_fill(~finished, score)


def subtract_missing_eos(scores: Tensor, finished: Tensor, penalty: float) -> Tensor:
    """[B] scores, less ``penalty`` for responses without an end token; ``finished`` [B] bool."""
    return scores - penalty * (~finished).to(scores.dtype)


def token_rewards(kl: Tensor, scores: Tensor, mask: Tensor, coef: float) -> Tensor:
    """[B, T] reward of every token: -coef * kl, plus the score on the last real token; 0 where ``mask`` is False.

    Args:
        kl: [B, T] fixed at rollout: k1, or exact over the vocabulary. k3 here is biased (Tang and Munos 2025,
            https://arxiv.org/abs/2506.09477).
        scores: [B].

    Reference: Ziegler et al. 2019, https://arxiv.org/abs/1909.08593, eq. 2; spread over tokens as in Stiennon 2020.
    """
    rewards = (-coef * kl).masked_fill(~mask, 0.0)
    last = mask.sum(1) - 1
    rows = torch.arange(len(scores), device=scores.device)
    return rewards.index_put((rows, last), scores.to(rewards.dtype), accumulate=True)


def gae_advantages(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float) -> Tensor:
    """[B, T] advantage of every response token, by generalized advantage estimation; exactly 0 outside ``mask``.

        delta_t = r_t + gamma * V_{t+1} - V_t
        A_t     = delta_t + gamma * lam * A_{t+1}

    V and A after the last real token are zero.

    Args:
        rewards: [B, T]; values: [B, T] value of the state before token t is written.

    Reference: Schulman et al. 2016, https://arxiv.org/abs/1506.02438, eq. 16.
    """
    rewards, values = rewards.masked_fill(~mask, 0.0), values.masked_fill(~mask, 0.0)
    advantages = torch.zeros_like(rewards)
    next_value = next_advantage = torch.zeros_like(rewards[:, 0])
    for t in reversed(range(rewards.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        next_advantage = delta + gamma * lam * next_advantage
        advantages[:, t] = next_advantage
        next_value = values[:, t]
    return advantages.masked_fill(~mask, 0.0)


def outcomes(rewards: Tensor, mask: Tensor, gamma: float) -> Tensor:
    """[B, T] what came of every state: the sum over k >= t of gamma^(k - t) r_k; exactly 0 outside ``mask``.

    No value enters, so a critic can be judged by it. ``gae_advantages`` with lambda 1 is this minus the value.
    """
    return gae_advantages(rewards, torch.zeros_like(rewards), mask, gamma, 1.0)


def returns_from(advantages: Tensor, values: Tensor, mask: Tensor) -> Tensor:
    """[B, T] targets of the value role: raw advantages + values; 0 outside ``mask``. Normalise after, never before."""
    return (advantages + values).masked_fill(~mask, 0.0)


@dataclass(frozen=True)
class PolicyLoss:
    """0-d tensors; each is this micro-batch's sum over tokens divided by the minibatch's token count.

    Args:
        ratio: mean probability ratio; clip_fraction: share of tokens where the clipped term is the smaller one;
        approx_kl: k3 of the update, from the old to the new policy.
    """

    loss: Tensor
    ratio: Tensor
    clip_fraction: Tensor
    approx_kl: Tensor


def policy_loss(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor, clip_range: float, num_tokens: int
) -> PolicyLoss:
    """The clipped surrogate, negated.

        L = -sum min(rho * A, clip(rho, 1 - eps, 1 + eps) * A) / num_tokens,   rho = exp(new - old)

    Args:
        logprobs: [B, T] with gradient; old_logprobs, advantages: [B, T] without.
        num_tokens: real tokens of the whole minibatch, so that its micro-batches add up exactly.

    Reference: Schulman et al. 2017, https://arxiv.org/abs/1707.06347, eq. 7.
    """
    log_ratio = (logprobs - old_logprobs).masked_fill(~mask, 0.0)
    advantages = advantages.masked_fill(~mask, 0.0)
    ratio = log_ratio.exp()
    plain = ratio * advantages
    clipped = ratio.clamp(1.0 - clip_range, 1.0 + clip_range) * advantages
    with torch.no_grad():
        share = masked_sum((clipped < plain).to(ratio.dtype), mask) / num_tokens
        approx_kl = masked_sum(ratio - 1.0 - log_ratio, mask) / num_tokens
        mean_ratio = masked_sum(ratio, mask) / num_tokens
    loss = -masked_sum(torch.minimum(plain, clipped), mask) / num_tokens
    return PolicyLoss(loss, mean_ratio, share, approx_kl)


@dataclass(frozen=True)
class ValueLoss:
    """0-d tensors, sums over this micro-batch's tokens divided by the minibatch's token count."""

    loss: Tensor
    clip_fraction: Tensor


def value_loss(
    values: Tensor, old_values: Tensor, returns: Tensor, mask: Tensor, clip_range: float | None, num_tokens: int
) -> ValueLoss:
    """Half the squared error, the larger of the plain one and that of the value clipped around its old value.

    Args:
        values: [B, T] with gradient; old_values, returns: [B, T] without.
        clip_range: None leaves the value unclipped.

    Reference: Baselines' PPO2, described in Huang et al. 2022, The 37 implementation details of PPO, detail 9.
    """
    zero = torch.zeros_like(returns)
    values, old_values, returns = (torch.where(mask, x, zero) for x in (values, old_values, returns))
    plain = (values - returns).square()
    if clip_range is None:
        return ValueLoss(0.5 * masked_sum(plain, mask) / num_tokens, zero.sum())
    bounded = old_values + (values - old_values).clamp(-clip_range, clip_range)
    clipped = (bounded - returns).square()
    share = masked_sum((clipped > plain).to(values.dtype), mask) / num_tokens
    return ValueLoss(0.5 * masked_sum(torch.maximum(plain, clipped), mask) / num_tokens, share.detach())


def k2_kl_loss(logprobs: Tensor, old_logprobs: Tensor, ref_logprobs: Tensor, mask: Tensor, num_tokens: int) -> Tensor:
    """The KL to the reference as a loss: k2 of whole responses, weighted by the ratio to the policy that sampled; 0-d.

        L = sum_b w_b * (sum_t log p_bt - log q_bt)^2 / 2 / num_tokens,   w_b = min(exp(sum_t new_bt - old_bt), 2)

    The weight has no gradient. It is 1 for a policy that has not moved; uncut, its variance would grow with the length
    of the responses (truncated importance sampling, Ionides 2008, https://doi.org/10.1198/106186008X320456).
    The gradient is that of the KL between the distributions of responses. Summed token by token instead, k2 forgets
    that a token also chooses the states behind it, and misses the optimum; k1 in the loss has zero expected gradient,
    k3 follows another divergence (Liu et al. 2025, https://arxiv.org/abs/2510.01555). Go with centred, unscaled
    advantages.
    """
    log_weight = (logprobs - old_logprobs).masked_fill(~mask, 0.0).sum(1)
    log_ratio = (logprobs - ref_logprobs).masked_fill(~mask, 0.0).sum(1)
    weight = log_weight.detach().exp().clamp(max=MAX_WEIGHT)
    return (weight * 0.5 * log_ratio.square()).sum() / num_tokens


def adapted_coef(coef: float, kl: float, target: float, horizon: int, num_responses: int) -> float:
    """The KL coefficient after a batch whose mean KL a response was ``kl`` nats; steers it to ``target``.

    Reference: Ziegler et al. 2019, section 2.2: proportional control, the relative error clipped to +-0.2.
    """
    error = max(-0.2, min(0.2, kl / target - 1.0))
    return coef * (1.0 + error * num_responses / horizon)
