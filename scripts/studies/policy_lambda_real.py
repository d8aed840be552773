"""What ``update.lam`` does to the policy's gradient of a real language model: signal, noise and bias, without training.

    OMP_NUM_THREADS=1 python scripts/studies/policy_lambda_real.py reviews --model DIR --responses 192 --tokens 128
    OMP_NUM_THREADS=1 python scripts/studies/policy_lambda_real.py stories --model DIR --responses 2048 --tokens 384

One fixed policy continues film reviews or stories. Its one parameter moves the last hidden state along v, the mean
output row of the tokens of good words less that of bad ones; so the gradient of every token's log-probability is exact,
and no lambda needs a backward pass. The reward is one number at the end. "valence" is the sum of the tokens' products
with v; its truth is known, because each token's share can be paid at once (rewards to go). "judged" is the log-odds of
"positive" against "negative" by which the same model sums up a review. The critic is solved for on the other half of
the responses: after one batch of 64, or after all of them.

A row says how much of the outcomes the critic explains (of all tokens, and of each third). A cell says, for one
response: the expected gradient and its standard error; its part from the first third of the response; and signal to
noise, the expectation divided by the standard deviation. Resumable: what was sampled is kept under --out. On one thread
the first command takes about seven minutes with a model of 135 M parameters, and the second about as long with one of
260,000.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from rlhf.config.sections import ModelSection, RuntimeSection
from rlhf.data.batches import collate
from rlhf.data.tokenised import PromptRow
from rlhf.evaluation import policy_samples as measure
from rlhf.losses import policy as objective
from rlhf.losses import tensors
from rlhf.models import forward, open_base
from rlhf.models.base import Base
from rlhf.models.roles import SharedBase
from rlhf.records import Message
from rlhf.rollouts.engine import Sampling
from rlhf.rollouts.hf import HfEngine
from rlhf.runs import runtime
from rlhf.training.solved_critic import LeastSquares

PART, BATCH, TEMPERATURE = {"reviews": 32, "stories": 256}, 64, 0.8
LAMBDAS = (0.9, 0.95, 0.99, 1.0)
FILMS = ("heist film", "musical", "western", "ghost story", "war film", "comedy", "chess drama", "road movie")
TURNS = ("I went in expecting", "From the first scene on", "Halfway through", "What stayed with me is")
HEROES = ("girl", "boy", "cat", "dog", "bird", "bear", "mouse", "frog")
WISHES = ("to play", "a friend", "to go home", "a big cake")
OPENINGS = {
    "reviews": [f"A review of the new {film}. {turn}" for film in FILMS for turn in TURNS],
    "stories": [
        f"Once upon a time, there was a little {hero} who wanted {wish}." for hero in HEROES for wish in WISHES
    ],
}
REWARDS = {"reviews": ("valence", "judged"), "stories": ("valence",)}
VERDICT, POSITIVE, NEGATIVE = "\n\nOverall, the review is", " positive", " negative"
GOOD = (
    " good great excellent wonderful beautiful brilliant love loved enjoy enjoyed best amazing superb moving charming"
)
GOOD += " happy happily fun smiled laughed hugged friend friends proud kind nice"
BAD = " bad poor terrible awful boring dull hate hated worst disappointing disappointed weak slow mess waste"
BAD += " sad cried cry scared angry hurt lost mean afraid sorry broke"


def ids_of(base: Base, text: str) -> list[int]:
    return base.chat.tokenizer(text, add_special_tokens=False).input_ids  # type: ignore[no-any-return]


def prompts(base: Base, world: str) -> list[PromptRow]:
    """With the beginning of a text, for models that were trained with one."""
    texts = OPENINGS[world] * (PART[world] // len(OPENINGS[world]))
    return [PromptRow((Message("user", text),), base.chat.tokenizer(text).input_ids) for text in texts]


@torch.no_grad()
def slopes(products: Tensor, head: Tensor, hidden: Tensor, ids: Tensor) -> Tensor:
    """[N] derivative of each token's tempered log-probability along v; ``products`` [V] of the output rows with v."""
    parts = []
    for rows, chosen in zip(hidden.split(256), ids.split(256), strict=True):
        probabilities = (rows @ head.t()).float().div_(TEMPERATURE).softmax(-1)
        parts.append((products[chosen] - probabilities @ products) / TEMPERATURE)
    return torch.cat(parts)


def collect(base: Base, world: str, number: int, tokens: int) -> dict[str, Tensor]:
    """Part ``number``: lengths, judged [B]; of all tokens hidden [N, d] before them, their slopes and valences [N]."""
    roles = SharedBase(base)
    roles.add("policy")
    rows = prompts(base, world)
    size, how = len(rows), Sampling(tokens, TEMPERATURE, 5)
    numbers = range(number * size, (number + 1) * size)
    samples = measure.respond(HfEngine(roles, "policy", base.chat, size), base.chat, rows, how, numbers)
    verdict, positive, negative = ids_of(base, VERDICT), ids_of(base, POSITIVE)[0], ids_of(base, NEGATIVE)[0]
    head, judged, hidden = base.model.get_output_embeddings().weight.detach(), [], []
    for start in range(0, size, size // 4):
        chosen = samples[start : start + size // 4]
        longer = [[*sample.response_ids, *verdict, positive] for sample in chosen]
        batch = collate([sample.prompt_ids for sample in chosen], longer, base.chat.pad_id, base.device)
        with torch.no_grad(), roles.acting_as("policy") as (model, _):
            states = forward.states_before(model, batch).split([len(ids) for ids in longer])
        for sample, found in zip(chosen, states, strict=True):
            judged.append(found[-1] @ (head[positive] - head[negative]))
            hidden.append(found[: len(sample.response_ids)])
    ids = torch.tensor([token for sample in samples for token in sample.response_ids])
    direction = head[ids_of(base, GOOD)].float().mean(0) - head[ids_of(base, BAD)].float().mean(0)
    products = head.float() @ (direction / direction.norm())
    return {
        "lengths": torch.tensor([len(sample.response_ids) for sample in samples]),
        "judged": torch.stack(judged).float(),
        "hidden": torch.cat(hidden).float(),
        "slopes": slopes(products, head, torch.cat(hidden), ids),
        "valences": products[ids],
    }


class Responses:
    """All parts together. mask, slopes: [B, T]; hidden: a list of [n, d], one for each response; size: of a part."""

    def __init__(self, parts: list[dict[str, Tensor]]) -> None:
        def together(name: str) -> Tensor:
            return torch.cat([part[name] for part in parts])

        lengths, self.size = together("lengths"), len(parts[0]["lengths"])
        self.mask = tensors.response_mask(lengths, int(lengths.max()))
        self.hidden = together("hidden").split(lengths.tolist())
        zeros = torch.zeros(self.mask.shape)
        self.slopes = zeros.masked_scatter(self.mask, together("slopes"))
        self.valences = tensors.center(zeros.masked_scatter(self.mask, together("valences")), self.mask)
        self.scores = {"valence": self.valences.sum(1), "judged": together("judged")}

    def values(self, outcomes: Tensor, batches: int | None) -> Tensor:
        """[B, T] values of critics that learned from the other half: so many batches of 64, None: all of them."""
        found, halves = torch.zeros(self.mask.shape), torch.arange(len(self.mask)) // self.size % 2
        for half in (0, 1):
            critic = LeastSquares(self.hidden[0].shape[1], torch.device("cpu"))
            for rows in (halves != half).nonzero().flatten().split(BATCH)[:batches]:
                states = [(rows.tolist(), torch.cat([self.hidden[row] for row in rows]))]
                batch: Any = SimpleNamespace(states=states, returns=outcomes, mask=self.mask)
                critic.learn(batch, 0, 0)
            for row in (halves == half).nonzero().flatten().tolist():
                nothing: Any = None
                found[row, self.mask[row]] = critic.read(nothing, self.hidden[row])[0]
        return found

    def gradient(self, advantages: Tensor) -> str:
        """What a cell says."""
        parts = tensors.center(advantages, self.mask) * self.slopes
        whole, first = parts.sum(1), tensors.masked_sum(parts, tensors.thirds(self.mask)["first"]) / len(parts)
        error = float(whole.std()) / len(whole) ** 0.5
        return f"{whole.mean():.2f} ± {error:.2f}; {first:.2f}; {whole.mean() / whole.std():.2f}"


def report(responses: Responses, names: tuple[str, ...]) -> None:
    mask, lengths = responses.mask, responses.mask.sum(1)
    print(f"{len(lengths)} responses of {int(lengths.min())} to {int(lengths.max())} tokens.")
    print("| reward | critic | explained | " + " | ".join(f"{lam:g}" for lam in LAMBDAS) + " |\n|" + "---|" * 7)
    for name in names:
        scores = responses.scores[name]
        rewards = objective.token_rewards(torch.zeros(mask.shape), (scores - scores.mean()) / scores.std(), mask, 0.0)
        outcomes = objective.outcomes(rewards, mask, 1.0)
        if name == "valence":
            to_go = objective.outcomes(responses.valences / scores.std(), mask, 1.0)
            print(f"| {name} | rewards to go | | | | | {responses.gradient(to_go)} |", flush=True)
        critics = {"none": None, "1 batch": 1, "all batches": len(lengths)}
        for critic, batches in critics.items():
            values = responses.values(outcomes, batches) if batches else torch.zeros(mask.shape)
            masks = [mask, *tensors.thirds(mask).values()]
            explained = " ".join(f"{float(tensors.explained_variance(values, outcomes, one)):.2f}" for one in masks)
            made = (objective.gae_advantages(rewards, values, mask, 1.0, lam) for lam in LAMBDAS)
            cells = " | ".join(responses.gradient(advantages) for advantages in made)
            print(f"| {name} | {critic} | {explained} | {cells} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("world", choices=tuple(OPENINGS))
    parser.add_argument("--model", required=True, help="directory of a language model")
    parser.add_argument("--responses", type=int, default=192, help="a multiple of 32 (reviews) or 256 (stories)")
    parser.add_argument("--tokens", type=int, default=128, help="of each response, at most")
    parser.add_argument("--out", type=Path, default=Path("runs/policy-lambda"))
    args = parser.parse_args()
    if args.responses % PART[args.world] or args.responses < 2 * PART[args.world]:
        parser.error(f"--responses takes a multiple of {PART[args.world]}, twice it at least")
    numbers = range(args.responses // PART[args.world])
    files = [args.out / f"{args.world}-{args.tokens}-{number}.pt" for number in numbers]
    if not all(file.is_file() for file in files):
        base = open_base.open_base(ModelSection(path=args.model), runtime.set_up(RuntimeSection(), 0))
        args.out.mkdir(parents=True, exist_ok=True)
        for number, file in enumerate(files):
            if not file.is_file():
                torch.save(collect(base, args.world, number, args.tokens), file.with_suffix(".part"))
                file.with_suffix(".part").replace(file)
                print(f"{(number + 1) * PART[args.world]} responses", flush=True)
    report(Responses([torch.load(file, weights_only=True) for file in files]), REWARDS[args.world])


if __name__ == "__main__":
    main()
