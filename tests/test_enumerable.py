"""A problem small enough to write its optimum down: pi*(y) proportional to pi_ref(y) exp(r(y) / beta).

A vocabulary of 4 letters and an end, at most 3 tokens: 1 + 4 + 16 strings that end early and 64 of full length, 85 in
all, over 21 prefixes.
"""

from __future__ import annotations

import itertools

import pytest
import torch

from rlhf.losses import policy, tensors

END, LETTERS, LONGEST, BETA = 4, (0, 1, 2, 3), 3, 0.5
PREFIXES = [prefix for n in range(LONGEST) for prefix in itertools.product(LETTERS, repeat=n)]
EPISODES = [(*prefix, END) for n in range(LONGEST) for prefix in itertools.product(LETTERS, repeat=n)] + list(
    itertools.product(LETTERS, repeat=LONGEST)
)
LENGTHS = torch.tensor([len(episode) for episode in EPISODES])
MASK = tensors.response_mask(LENGTHS, LONGEST)
assert len(EPISODES) == 85
STATE = torch.tensor([[PREFIXES.index(e[:t]) if t < len(e) else 0 for t in range(LONGEST)] for e in EPISODES])
TOKEN = torch.tensor([[e[t] if t < len(e) else 0 for t in range(LONGEST)] for e in EPISODES])


def logprobs_of(table):
    return table.log_softmax(-1)[STATE, TOKEN]


def problem(seed):
    generator = torch.Generator().manual_seed(seed)
    ref = torch.randn(len(PREFIXES), 5, dtype=torch.float64, generator=generator)
    reward = 1.2 * torch.randn(len(EPISODES), dtype=torch.float64, generator=generator)
    ref_logprobs = logprobs_of(ref)
    target = (ref_logprobs * MASK).sum(1) + reward / BETA
    return ref, reward, ref_logprobs, target.log_softmax(0)


def distance(table, target):
    logp = (logprobs_of(table) * MASK).sum(1)
    return float((logp.exp() * (logp - target)).sum())


def solve(kl_of_reward, loss_of_kl, seed=0, steps=900, batch=512):
    """Plain PPO steps on sampled episodes with a table policy and the exact value of every prefix."""
    ref, reward, ref_logprobs, target = problem(seed)
    table = ref.clone().requires_grad_()
    optimizer = torch.optim.Adam([table], lr=0.03)
    generator = torch.Generator().manual_seed(seed + 1)
    start = distance(table.detach(), target)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 0.03 * (1 - step / steps)
        with torch.no_grad():
            whole = (logprobs_of(table) * MASK).sum(1).exp()
            rows = torch.multinomial(whole, batch, replacement=True, generator=generator)
            old, mask = logprobs_of(table)[rows], MASK[rows]
            kl = kl_of_reward(old, ref_logprobs[rows])
            rewards = policy.token_rewards(kl, reward[rows], mask, BETA)
            returns = policy.gae_advantages(rewards, torch.zeros_like(rewards), mask, 1.0, 1.0)
            values = torch.zeros(len(PREFIXES), dtype=torch.float64)
            counts = torch.zeros(len(PREFIXES), dtype=torch.float64)
            values.index_add_(0, STATE[rows][mask], returns[mask])
            counts.index_add_(0, STATE[rows][mask], torch.ones_like(returns[mask]))
            advantages = returns - (values / counts.clamp(min=1))[STATE[rows]]
        new = logprobs_of(table)[rows]
        outcome = policy.policy_loss(new, old, advantages, mask, 0.2, batch)
        loss = outcome.loss + BETA * loss_of_kl(new, old, ref_logprobs[rows], mask, batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return start, distance(table.detach(), target)


def no_kl(new, old, ref, mask=None, num=None):
    return torch.zeros_like(new) if mask is None else torch.zeros(())


def nothing(logprobs, ref_logprobs):
    return torch.zeros_like(logprobs)


def k1_loss(new, old, ref, mask, num):
    return tensors.masked_sum(policy.k1(new, ref), mask) / num


def token_k2_loss(new, old, ref, mask, num):
    weight = (new - old).detach().exp()
    return tensors.masked_sum(weight * policy.k2(new, ref), mask) / num


def k3_loss(new, old, ref, mask, num):
    return tensors.masked_sum(policy.k3(new, ref), mask) / num


@pytest.mark.parametrize("seed", [0, 1])
def test_k1_in_the_reward_reaches_the_optimum(seed):
    start, end = solve(policy.k1, no_kl, seed)
    assert start > 1 and end < 0.05


@pytest.mark.parametrize("seed", [0, 1])
def test_k2_in_the_loss_reaches_the_optimum(seed):
    start, end = solve(nothing, policy.k2_kl_loss, seed)
    assert start > 1 and end < 0.05


@pytest.mark.parametrize(
    ("kl", "loss"),
    [(nothing, k1_loss), (nothing, k3_loss), (nothing, token_k2_loss), (policy.k3, no_kl)],
    ids=["k1 in the loss", "k3 in the loss", "k2 of tokens in the loss", "k3 in the reward"],
)
def test_other_places_of_other_estimators_miss_it(kl, loss):
    _, end = solve(kl, loss)
    assert end > 0.15
