"""What ``update.lam`` does to the policy's gradient at 53 to 1,024 tokens, where the true gradient is known.

    OMP_NUM_THREADS=1 python scripts/studies/policy_lambda.py [--lengths 53,256,512,1024]

A policy has three softmaxes over 8 tokens, one for each third of the response. The outcome, one number at the end, is
linear in the tokens: each kind of token has in each third an early effect, which the hidden state carries from the next
token on, and a late one, which it hardly shows before the end; .2 of the variance is known from the prompt and .2 is
chance. So the gradient of the expected outcome is known in closed form. The critic is the one by least squares, after 1
and after 20 batches of 64 responses; "right" knows everything, "none" is the mean.

Each cell: the share of the true gradient that arrives in the first and in the last third, then the expected cosine with
the true gradient of that of 64 responses and of one. Shares below 1 that differ between the thirds are a bias. The
cosines hold bias and noise together; with one response noise decides, with 64 bias. Less than a minute on one thread.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass

import torch
from critic_length import BATCH, HIDDEN, NOISE, Responses, Solved
from torch import Tensor

from rlhf.losses import policy, tensors

KINDS, THIRDS, FRESH, LATE_NOISE = 8, 3, 2048, 2.0
EARLY, LATE, PROMPT, CHANCE = 0.3, 0.3, 0.2, 0.2  # shares of the outcome's variance
CRITICS = ("none", "1 batch", "20 batches", "right")


@dataclass(frozen=True)
class World:
    """probabilities, early, late: [3, K] of the policy, and the effects of a token on the outcome, of mean 0."""

    probabilities: Tensor
    early: Tensor
    late: Tensor
    third: Tensor  # [T] which third a position is in

    @property
    def true_gradient(self) -> Tensor:
        """[3, K] of the expected outcome in the policy's logits."""
        counts = torch.bincount(self.third, minlength=THIRDS)[:, None]
        return counts * self.probabilities * (self.early + self.late)


def build(length: int) -> World:
    generator = torch.Generator().manual_seed(length)
    probabilities = torch.randn(THIRDS, KINDS, generator=generator).mul(0.5).softmax(-1)
    mask = torch.ones(1, length, dtype=torch.bool)
    third = sum(index * part[0].long() for index, part in enumerate(tensors.thirds(mask).values()))
    effects = []
    for share in (EARLY, LATE):
        effect = torch.randn(THIRDS, KINDS, generator=generator)
        effect -= (probabilities * effect).sum(-1, keepdim=True)
        variance = (probabilities * effect.square()).sum(-1)[third].sum()
        effects.append(effect * (share / variance).sqrt())
    assert isinstance(third, Tensor)
    return World(probabilities, effects[0], effects[1], third)


def draw(world: World, num: int, generator: torch.Generator) -> tuple[Responses, Tensor]:
    """Responses, and their tokens [B, T]."""

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    length, third = len(world.third), world.third
    rows = world.probabilities[third]
    tokens = torch.multinomial(rows, num, replacement=True, generator=generator).t()
    early, late = world.early[third, tokens], world.late[third, tokens]
    prompt = normal(num, 1).expand(num, length)
    sums = [part.cumsum(1) - part for part in (early, late)]
    position = torch.linspace(-1, 1, length).expand(num, length)
    known = torch.stack([prompt, sums[0], sums[1] + LATE_NOISE * normal(num, length), position], -1)
    mix = torch.linalg.qr(torch.randn(HIDDEN, HIDDEN, generator=torch.Generator().manual_seed(1)))[0]
    right = PROMPT**0.5 * prompt + sums[0] + sums[1]
    outcome = right[:, -1] + early[:, -1] + late[:, -1] + CHANCE**0.5 * normal(num)
    return Responses(outcome, known @ mix[: known.shape[-1]] + NOISE * normal(num, length, HIDDEN), right), tokens


def taught(world: World, batches: int) -> Solved:
    """The critic by least squares after so many batches."""
    critic, generator = Solved(), torch.Generator().manual_seed(7)
    for number in range(batches):
        responses, _ = draw(world, BATCH, generator)
        outcomes = policy.outcomes(responses.rewards, responses.mask, 1.0)
        critic.learn(responses, outcomes, number)
    return critic


def gradients(world: World, advantages: Tensor, tokens: Tensor) -> Tensor:
    """[B, 3, K] of each response: the sum over tokens of the advantage times the gradient of log softmax."""
    found = torch.zeros(len(tokens), THIRDS, KINDS)
    for third in range(THIRDS):
        chosen = world.third == third
        weight = advantages[:, chosen]
        found[:, third].scatter_add_(1, tokens[:, chosen], weight)
        found[:, third] -= weight.sum(1, keepdim=True) * world.probabilities[third]
    return found


def cosine(found: Tensor, truth: Tensor, size: int) -> float:
    """Expected cosine of the mean of ``size`` rows of ``found`` [B, n] with ``truth`` [n]."""
    mean, noise = found.mean(0), float(found.var(0).sum())
    squared = float(mean.square().sum()) - noise / len(found)
    return float(mean @ truth / truth.norm()) / (squared + noise / size) ** 0.5


def cell(world: World, found: Tensor) -> str:
    truth, mean = world.true_gradient, found.mean(0)
    shares = [float((mean[i] * truth[i]).sum() / truth[i].square().sum()) for i in (0, THIRDS - 1)]
    cosines = [cosine(found.flatten(1), truth.flatten(), size) for size in (BATCH, 1)]
    return ", ".join(" ".join(f"{value:.2f}" for value in pair).replace("0.", ".") for pair in (shares, cosines))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", default="53,256,512,1024")
    args = parser.parse_args()
    torch.set_num_threads(1)
    names = (".95", ".99", "1", "1 - 2.65/T", "1 - 20/T")
    print("| T | critic | explained | " + " | ".join(names) + " |\n|" + "---|" * (3 + len(names)))
    for length in (int(length) for length in args.lengths.split(",")):
        world = build(length)
        responses, tokens = draw(world, FRESH, torch.Generator().manual_seed(3))
        outcomes, mask = policy.outcomes(responses.rewards, responses.mask, 1.0), responses.mask
        critics = {name: taught(world, int(name.split()[0])) for name in CRITICS if "batch" in name}
        known = {"none": torch.full(mask.shape, float(responses.outcome.mean())), "right": responses.right}
        for name in CRITICS:
            if name in critics:
                values = torch.cat([critics[name].values(rows) for rows in responses.hidden]).view(mask.shape)
            else:
                values = known[name]
            cells = []
            for lam in (0.95, 0.99, 1.0, 1 - 2.65 / length, 1 - 20 / length):
                advantages = policy.gae_advantages(responses.rewards, values, mask, 1.0, lam)
                advantages = tensors.center(advantages, mask)
                cells.append(cell(world, gradients(world, advantages, tokens)))
            explained = float(tensors.explained_variance(values, outcomes, mask))
            print(f"| {length} | {name} | {explained:.2f} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
