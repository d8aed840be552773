"""What the explained variance says of a critic, and what is true, at 53 to 1,024 tokens.

    OMP_NUM_THREADS=1 python scripts/studies/critic_length.py [--lengths 53,256,512,1024] [--repeats 3]

Everything is synthetic, so that the truth is known. A response of T tokens has the outcome sqrt(.3) u + sqrt(.4) W_T +
sqrt(.3) e: u is known from the prompt on, W_t is a random walk that each token moves, and e is never seen. The right
value before token t is sqrt(.3) u + sqrt(.4) W_t; it explains .3 + .4 (T - 1) / 2T of the outcomes. A hidden state has
32 dimensions. It carries u, W_t, the position and five autoregressive processes that mean nothing, mixed and noisy.

First table, each cell: the figure as it was (against lambda-returns made of the critic's own values), as it is (against
the outcomes of the same 64 responses, before the critic learns from them), and the truth (against the outcomes of 512
fresh responses). Second table: how often a critic of outcomes that nobody can foretell passes a threshold, at the two
shortest lengths. About five minutes on one thread. The critic by least squares has 128 random features instead of
1,024; the one by gradients is a residual layer and a head, which start and learn as the value role does.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, Protocol
from unittest import mock

import torch
from torch import Tensor

from rlhf.losses import policy, tensors
from rlhf.training import solved_critic
from rlhf.training.policy_update import minibatches
from rlhf.training.solved_critic import LeastSquares, ridge
from rlhf.training.trained_critic import RIDGE

HIDDEN, NUISANCES, NOISE, FEATURES = 32, 5, 0.3, 128
PROMPT, WALK, UNSEEN = 0.3, 0.4, 0.3  # shares of the outcome's variance
BATCH, MINIBATCH, EPOCHS, CLIP, RATE, FRESH = 64, 16, 2, 0.2, 1e-3, 512
BATCHES, LAMBDAS, THRESHOLDS = (1, 4, 20), (0.95, 1.0), (0.05, 0.1, 0.2, 0.3)


@dataclass(frozen=True)
class Responses:
    """outcome: [B]; hidden: [B, T, d] before each token; right: [B, T] the values that are right."""

    outcome: Tensor
    hidden: Tensor
    right: Tensor

    @property
    def mask(self) -> Tensor:
        return torch.ones(self.right.shape, dtype=torch.bool)

    @property
    def rewards(self) -> Tensor:
        return policy.token_rewards(torch.zeros(self.right.shape), self.outcome, self.mask, 0.0)


def draw(num: int, length: int, generator: torch.Generator, foretold: bool = True) -> Responses:
    """``num`` responses of ``length`` tokens; with ``foretold`` False their outcomes have nothing to do with them."""

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    prompt, moves = normal(num, 1).expand(num, length), normal(num, length) / length**0.5
    walk = moves.cumsum(1) - moves
    position = torch.linspace(-1, 1, length).expand(num, length)
    nuisances = [normal(num, NUISANCES)]
    for _ in range(length - 1):
        nuisances.append(0.98 * nuisances[-1] + (1 - 0.98**2) ** 0.5 * normal(num, NUISANCES))
    known = torch.cat([torch.stack([prompt, walk, position], -1), torch.stack(nuisances, 1)], -1)
    mix = torch.linalg.qr(torch.randn(HIDDEN, HIDDEN, generator=torch.Generator().manual_seed(1)))[0]
    hidden = known @ mix[: known.shape[-1]] + NOISE * normal(num, length, HIDDEN)
    right = PROMPT**0.5 * prompt + WALK**0.5 * walk
    outcome = right[:, -1] + WALK**0.5 * moves[:, -1] + UNSEEN**0.5 * normal(num)
    return Responses(outcome if foretold else normal(num), hidden, right)


class Critic(Protocol):
    def values(self, hidden: Tensor) -> Tensor: ...
    def learn(self, responses: Responses, returns: Tensor, number: int) -> None: ...


class Solved:
    """The critic by least squares, as it is in PPO."""

    def __init__(self) -> None:
        with mock.patch.object(solved_critic, "FEATURES", FEATURES):
            self.critic = LeastSquares(HIDDEN, torch.device("cpu"))

    def values(self, hidden: Tensor) -> Tensor:
        """[N, d] -> [N]"""
        nothing: Any = None
        return self.critic.read(nothing, hidden)[0]

    def learn(self, responses: Responses, returns: Tensor, number: int) -> None:
        rows = list(range(len(returns)))
        states = [(rows, responses.hidden.flatten(0, 1))]
        batch: Any = SimpleNamespace(states=states, returns=returns, mask=responses.mask)
        self.critic.learn(batch, number, number)


class Trained(torch.nn.Module):
    """A stand-in for the value role: a residual layer for its adapter, a head; start and loss are the role's."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.up = torch.nn.Parameter(torch.randn(HIDDEN, FEATURES, generator=generator) / HIDDEN**0.5)
        self.down = torch.nn.Parameter(torch.zeros(FEATURES, HIDDEN))
        self.head, self.bias = torch.nn.Parameter(torch.zeros(HIDDEN)), torch.nn.Parameter(torch.zeros(()))
        self.optimizer = torch.optim.AdamW(self.parameters(), RATE, weight_decay=0.0)

    def forward(self, hidden: Tensor) -> Tensor:
        return (hidden + (hidden @ self.up).relu() @ self.down) @ self.head + self.bias

    @torch.no_grad()
    def values(self, hidden: Tensor) -> Tensor:
        """[N, d] -> [N]"""
        return torch.cat([self(rows) for rows in hidden.split(16384)])

    def learn(self, responses: Responses, returns: Tensor, number: int) -> None:
        hidden, mask = responses.hidden, responses.mask
        if not number:
            rows = torch.cat([hidden.flatten(0, 1), returns.flatten()[:, None], torch.ones(returns.numel(), 1)], 1)
            weight, bias = ridge((rows.t().double() @ rows.double()), RIDGE)
            self.head.data.copy_(weight), self.bias.data.copy_(bias)
            return
        old = self.values(hidden.flatten(0, 1)).view(returns.shape)
        for epoch in range(EPOCHS):
            for chosen in minibatches(len(returns), MINIBATCH, number, epoch):
                loss = policy.value_loss(
                    self(hidden[chosen]), old[chosen], returns[chosen], mask[chosen], CLIP, returns[chosen].numel()
                ).loss
                self.optimizer.zero_grad()
                loss.backward()
                self.optimizer.step()


@dataclass(frozen=True)
class Figures:
    """old, new: on the batch that the critic learns from next; truth: on fresh responses, where that was asked for."""

    old: float
    new: float
    truth: float = float("nan")


def figures(values: Tensor, responses: Responses, value_lam: float) -> Figures:
    """What is said of ``values`` [B, T]."""
    rewards, mask = responses.rewards, responses.mask
    returns = policy.returns_from(policy.gae_advantages(rewards, values, mask, 1.0, value_lam), values, mask)
    outcomes = policy.outcomes(rewards, mask, 1.0)
    of_both = (float(tensors.explained_variance(values, target, mask)) for target in (returns, outcomes))
    return Figures(*of_both)


def learning(
    make: Callable[[], Critic],
    length: int,
    value_lam: float,
    seed: int,
    foretold: bool = True,
    fresh: Responses | None = None,
) -> Iterator[tuple[int, Figures]]:
    """What is said of a critic after 0, 1, 2, ... batches; the truth after each of ``BATCHES``."""
    generator, critic = torch.Generator().manual_seed(seed), make()
    for number in range(BATCHES[-1] + 1):
        responses = draw(BATCH, length, generator, foretold)
        values = critic.values(responses.hidden.flatten(0, 1)).view(responses.right.shape)
        found = figures(values, responses, value_lam)
        if fresh is not None and number in BATCHES:
            values = critic.values(fresh.hidden.flatten(0, 1)).view(fresh.right.shape)
            found = Figures(found.old, found.new, figures(values, fresh, 1.0).new)
        yield number, found
        rewards, mask, before = responses.rewards, responses.mask, critic.values(responses.hidden.flatten(0, 1))
        before = before.view(mask.shape)
        raw = policy.gae_advantages(rewards, before, mask, 1.0, value_lam)
        critic.learn(responses, policy.returns_from(raw, before, mask), number)


def fixed(length: int, value_lam: float, seed: int) -> dict[str, Figures]:
    """Critics that learn nothing: a number for each response, a walk, both unrelated to the outcome, and the truth."""
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for name in ("unrelated number", "unrelated walk", "right"):
        both = []
        for num in (BATCH, FRESH):
            responses = draw(num, length, generator)
            number = torch.randn(num, 1, generator=generator).expand(num, length)
            walk = torch.randn(num, length, generator=generator).cumsum(1) / length**0.5
            values = {"unrelated number": number, "unrelated walk": walk, "right": responses.right}[name]
            both.append(figures(values, responses, value_lam))
        found[name] = Figures(both[0].old, both[0].new, both[1].new)
    return found


CRITICS: dict[str, Callable[[], Critic]] = {"least squares": Solved, "gradient": Trained}


def mean(found: Sequence[Figures]) -> str:
    """old / new / truth"""
    columns = zip(*((one.old, one.new, one.truth) for one in found), strict=True)
    return " / ".join(f"{sum(column) / len(column):.2f}".replace("0.", ".") for column in columns)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", default="53,256,512,1024")
    parser.add_argument("--repeats", type=int, default=3, help="critics of each kind, on their own data")
    args = parser.parse_args()
    torch.set_num_threads(1)
    lengths, seeds = [int(length) for length in args.lengths.split(",")], range(args.repeats)
    print("| T | critic | value_lam | " + " | ".join(f"after {n} batches" for n in BATCHES) + " |\n|" + "---|" * 6)
    for length in lengths:
        for name in ("unrelated number", "unrelated walk", "right"):
            for lam in LAMBDAS:
                cell = mean([fixed(length, lam, seed)[name] for seed in seeds])
                print(f"| {length} | {name} | {lam:g} |" + f" {cell} |" + " same |" * (len(BATCHES) - 1), flush=True)
        fresh = draw(FRESH, length, torch.Generator().manual_seed(10_000))
        for name, make in CRITICS.items():
            for lam in LAMBDAS:
                runs = [dict(learning(make, length, lam, 100 + seed, fresh=fresh)) for seed in seeds]
                cells = " | ".join(mean([run[number] for run in runs]) for number in BATCHES)
                print(f"| {length} | {name} | {lam:g} | {cells} |", flush=True)
    print("\n| T | critic | value_lam | " + " | ".join(f"{limit:g}" for limit in THRESHOLDS) + " |\n|" + "---|" * 7)
    for length in lengths[:2]:
        for name, make in CRITICS.items():
            for lam in LAMBDAS:
                said = [
                    found.new
                    for seed in seeds
                    for number, found in learning(make, length, lam, 200 + seed, foretold=False)
                    if number
                ]
                shares = " | ".join(f"{sum(one >= limit for one in said) / len(said):.3f}" for limit in THRESHOLDS)
                print(f"| {length} | {name} | {lam:g} | {shares} |", flush=True)


if __name__ == "__main__":
    main()
