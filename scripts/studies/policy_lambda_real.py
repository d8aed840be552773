"""What ``update.lam`` does to the policy's gradient of a real language model: signal, noise and bias, without training.

    OMP_NUM_THREADS=1 python scripts/studies/policy_lambda_real.py --model DIR [--responses 192] [--tokens 128]

One fixed policy continues film reviews. There are two rewards, each one number at the end: the log-odds of "positive"
against "negative" by which the same model ends the review, and a lexicon's good words less its bad ones. The critic is
solved for on the other half of the responses: after one batch of 64, or after all of them. The policy's parameters are
a linear map of the last hidden state before the output head, at the identity. Its gradient is exact, and no lambda
needs a backward pass of its own.

A row says how much of the outcomes the critic explains (of all tokens, and of each third) and for every lambda three
figures: the cosine of the expected gradient with that for lambda 1, which is unbiased; its norm against that one's; and
the expected cosine of the gradient of 64 responses with the unbiased expectation, which is what learning lives on.
Expectations are over pairs of different responses, so that noise does not flatter them; +- is a standard error, by a
jackknife over 32 responses. Resumable: responses are kept under --out. On one thread 32 responses of 128 tokens take
about three minutes with a model of 135 M parameters.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from rlhf import runtime
from rlhf.config.sections import ModelSection, RuntimeSection
from rlhf.data.batches import collate
from rlhf.data.records import Message
from rlhf.data.tokenised import PromptRow
from rlhf.evaluation import policy as measure
from rlhf.models import forward, opening
from rlhf.models.base import Base
from rlhf.models.roles import SharedBase
from rlhf.ppo import objective, tensors
from rlhf.ppo.least_squares import LeastSquares
from rlhf.rollouts.engine import Sampling
from rlhf.rollouts.hf import HfEngine

PART, BATCH, TEMPERATURE, MICRO = 32, 64, 0.8, 8
LAMBDAS = (0.9, 0.95, 0.99, 1.0)
FILMS = ("heist film", "musical", "western", "ghost story", "war film", "comedy", "chess drama", "road movie")
TURNS = ("I went in expecting", "From the first scene on", "Halfway through", "What stayed with me is")
VERDICT, POSITIVE, NEGATIVE = "\n\nOverall, the review is", " positive", " negative"
GOOD = "good great excellent wonderful beautiful brilliant love loved enjoy enjoyed best amazing superb moving charming"
BAD = "bad poor terrible awful boring dull hate hated worst disappointing disappointed weak slow mess waste"


def prompts(base: Base) -> list[PromptRow]:
    texts = [f"A review of the new {film}. {turn}" for film in FILMS for turn in TURNS]
    return [PromptRow((Message("user", text),), base.chat.tokenizer.encode(text)) for text in texts]


def lexicon(text: str) -> float:
    """Good words less bad ones."""
    words = [word.strip(".,;:!?\"'()").lower() for word in text.split()]
    return float(sum(word in GOOD.split() for word in words) - sum(word in BAD.split() for word in words))


@torch.no_grad()
def directions(base: Base, hidden: Tensor, ids: Tensor) -> Tensor:
    """[N, d] gradient of each token's tempered log-probability in the hidden state [N, d] before it."""
    head = base.model.get_output_embeddings().weight
    parts = []
    for rows, chosen in zip(hidden.split(256), ids.split(256), strict=True):
        probabilities = (rows @ head.t()).float().div_(TEMPERATURE).softmax(-1)
        parts.append((head[chosen] - probabilities.to(head.dtype) @ head) / TEMPERATURE)
    return torch.cat(parts)


def collect(base: Base, number: int, tokens: int) -> dict[str, Tensor]:
    """Part ``number``: lengths [B], judged, lexicon [B] the scores; hidden, directions [N, d]."""
    roles = SharedBase(base)
    roles.add("policy")
    engine = HfEngine(roles, "policy", base.chat, PART)
    rows = prompts(base)
    assert len(rows) == PART
    numbers = range(number * PART, (number + 1) * PART)
    samples = measure.respond(engine, base.chat, rows, Sampling(tokens, TEMPERATURE, 5), numbers)
    verdict, positive, negative = (base.chat.tokenizer.encode(text) for text in (VERDICT, POSITIVE, NEGATIVE))
    head, judged, hidden = base.model.get_output_embeddings().weight, [], []
    for start in range(0, PART, MICRO):
        chosen = samples[start : start + MICRO]
        longer = [[*sample.response_ids, *verdict, positive[0]] for sample in chosen]
        batch = collate([sample.prompt_ids for sample in chosen], longer, base.chat.pad_id, base.device)
        with torch.no_grad(), roles.acting_as("policy") as (model, _):
            states = forward.states_before(model, batch).split([len(ids) for ids in longer])
        for sample, rows in zip(chosen, states, strict=True):
            judged.append(rows[-1] @ (head[positive[0]] - head[negative[0]]))
            hidden.append(rows[: len(sample.response_ids)])
    ids = torch.tensor([token for sample in samples for token in sample.response_ids])
    states = torch.cat(hidden)
    return {
        "lengths": torch.tensor([len(sample.response_ids) for sample in samples]),
        "judged": torch.stack(judged).float(), "lexicon": torch.tensor([lexicon(s.response) for s in samples]),
        "hidden": states.float(), "directions": directions(base, states, ids).float(),
    }  # fmt: skip


class Responses:
    """All parts together. hidden, directions: a list of [n, d], one for each response."""

    def __init__(self, parts: list[dict[str, Tensor]]) -> None:
        lengths = torch.cat([part["lengths"] for part in parts])
        self.mask = tensors.response_mask(lengths, int(lengths.max()))
        self.scores = {name: torch.cat([part[name] for part in parts]) for name in ("judged", "lexicon")}
        for name in ("hidden", "directions"):
            rows = torch.cat([part[name] for part in parts]).split(lengths.tolist())
            setattr(self, name, list(rows))

    hidden: list[Tensor]
    directions: list[Tensor]

    def rewards(self, name: str) -> tuple[Tensor, Tensor]:
        """[B, T] rewards, the scores standardised; and the outcomes [B, T]."""
        scores = self.scores[name]
        scores = (scores - scores.mean()) / scores.std()
        rewards = objective.token_rewards(torch.zeros(self.mask.shape), scores, self.mask, 0.0)
        return rewards, objective.outcomes(rewards, self.mask, 1.0)


def values_of(responses: Responses, outcomes: Tensor, batches: int | None) -> Tensor:
    """[B, T] values of critics that learnt from the other half: from so many batches of 64, None: from all of them."""
    mask, found = responses.mask, torch.zeros(responses.mask.shape)
    halves = torch.arange(len(mask)) // PART % 2
    for half in (0, 1):
        learnt = (halves != half).nonzero().flatten()
        critic = LeastSquares(responses.hidden[0].shape[1], torch.device("cpu"))
        for rows in learnt.split(BATCH)[:batches]:
            states = torch.cat([responses.hidden[row] for row in rows])
            batch: Any = SimpleNamespace(states=[(rows.tolist(), states)], returns=outcomes, mask=mask)
            critic.learn(batch, 0, 0)
        for row in (halves == half).nonzero().flatten().tolist():
            nothing: Any = None
            found[row, mask[row]] = critic.read(nothing, responses.hidden[row])[0]
    return found


def gradients(responses: Responses, advantages: Tensor) -> Tensor:
    """[B, d * d] of each response: the sum over tokens of advantage times the gradient of the log-probability."""
    rows = []
    for row, (hidden, slopes) in enumerate(zip(responses.hidden, responses.directions, strict=True)):
        weight = advantages[row, responses.mask[row]]
        rows.append((slopes.t() @ (weight[:, None] * hidden)).flatten())
    return torch.stack(rows)


def figures(own: Tensor, cross: Tensor, one: Tensor, rows: Tensor) -> Tensor:
    """[3] cosine of expectations, ratio of their norms, cosine of a batch with the unbiased expectation.

    Args:
        own, cross, one: [B, B] products of the gradients for a lambda, of those with lambda 1's, and of lambda 1's.
        rows: which responses.
    """

    def expected(products: Tensor) -> Tensor:
        chosen = products[rows][:, rows]
        return (chosen.sum() - chosen.diagonal().sum()) / (len(rows) * (len(rows) - 1))

    squared, both, unbiased = (expected(products) for products in (own, cross, one))
    noise = own.diagonal()[rows].mean() - squared
    lengths = squared.clamp_min(1e-12).sqrt(), unbiased.clamp_min(1e-12).sqrt()
    batch = (squared.clamp_min(0) + noise / BATCH).sqrt()
    return torch.stack([both / (lengths[0] * lengths[1]), lengths[0] / lengths[1], both / (batch * lengths[1])])


def with_errors(own: Tensor, cross: Tensor, one: Tensor) -> str:
    everything, num = torch.arange(len(own)), len(own) // PART
    found = figures(own, cross, one, everything)
    without = torch.stack([figures(own, cross, one, everything[everything // PART != part]) for part in range(num)])
    errors = ((num - 1) / num * (without - without.mean(0)).square().sum(0)).sqrt()
    return " ".join(f"{value:.2f}+-{error:.2f}" for value, error in zip(found.tolist(), errors.tolist(), strict=True))


def report(responses: Responses) -> None:
    lengths = responses.mask.sum(1)
    print(f"{len(lengths)} responses of {int(lengths.min())} to {int(lengths.max())} tokens.")
    print(
        "| reward | critic | explained, by thirds | " + " | ".join(f"{lam:g}" for lam in LAMBDAS) + " |\n|" + "---|" * 7
    )
    for name in responses.scores:
        rewards, outcomes = responses.rewards(name)
        critics = {"none": torch.zeros(rewards.shape), "1 batch": values_of(responses, outcomes, 1)}
        critics["all batches"] = values_of(responses, outcomes, None)
        for critic, values in critics.items():
            masks = [responses.mask, *tensors.thirds(responses.mask).values()]
            explained = [float(tensors.explained_variance(values, outcomes, mask)) for mask in masks]
            made = {}
            for lam in LAMBDAS:
                raw = objective.gae_advantages(rewards, values, responses.mask, 1.0, lam)
                made[lam] = gradients(responses, tensors.center(raw, responses.mask))
            one = made[1.0] @ made[1.0].t()
            cells = [with_errors(made[lam] @ made[lam].t(), made[lam] @ made[1.0].t(), one) for lam in LAMBDAS]
            shown = " ".join(f"{value:.2f}" for value in explained)
            print(f"| {name} | {critic} | {shown} | " + " | ".join(cells) + " |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="directory of a language model")
    parser.add_argument("--responses", type=int, default=192, help=f"a multiple of {PART}")
    parser.add_argument("--tokens", type=int, default=128, help="of each response, at most")
    parser.add_argument("--out", type=Path, default=Path("runs/policy-lambda"))
    args = parser.parse_args()
    files = [args.out / f"{args.tokens}-{number}.pt" for number in range(args.responses // PART)]
    if not all(file.is_file() for file in files):
        device = runtime.set_up(RuntimeSection(), 0)
        base = opening.open_base(ModelSection(path=args.model), device)
        args.out.mkdir(parents=True, exist_ok=True)
        for number, file in enumerate(files):
            if not file.is_file():
                part = collect(base, number, args.tokens)
                torch.save(part, file.with_suffix(".part"))
                file.with_suffix(".part").replace(file)
                print(f"{(number + 1) * PART} responses", flush=True)
    report(Responses([torch.load(file, weights_only=True) for file in files]))


if __name__ == "__main__":
    main()
