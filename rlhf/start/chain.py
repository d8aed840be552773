"""The configs of a chain, each key with its reason, from the measured facts alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rlhf.data.records import split_by_prompt
from rlhf.start import choose
from rlhf.start.choose import Limit, Size
from rlhf.start.facts import Lengths, ModelFacts
from rlhf.start.parts import Parts
from rlhf.start.render import Choice, Tree

SEED = 0
DATA = {
    "sft": "data/sft.jsonl", "reward": "data/preferences.jsonl", "ppo": "data/prompts.jsonl", "eval": "data/eval.jsonl",
}  # fmt: skip


@dataclass(frozen=True)
class Basis:
    """What all stages have in common."""

    model: ModelFacts
    size: Size
    parts: Parts
    lengths: dict[str, Lengths]
    last_only: bool
    new_tokens: int

    @property
    def as_it_is(self) -> bool:
        """Whether SFT is left out: the model answers already, and nothing was said of how it should."""
        return self.model.is_instruct and not self.parts.demonstrated

    @property
    def most(self) -> int | None:
        """The longest sequence: the context, and 2,048 tokens where memory counts."""
        bounds = [self.model.context_length, choose.MOST_TOKENS if self.size.is_large else None]
        return min((bound for bound in bounds if bound), default=None)

    @property
    def runtime(self) -> dict[str, Any]:
        why = "activations are computed again in the backward pass: a third more time, a tenth of the memory"
        return {"runtime": {"gradient_checkpointing": Choice(True, why)}} if self.size.is_large else {}

    @property
    def sampling(self) -> dict[str, Any]:
        answers = self.lengths["sft"].response
        usual = choose.quantile(answers, choose.QUANTILE)
        why = f"1.5 times the {choose.QUANTILE} quantile of the answers, {usual} tokens; the longest has {max(answers)}"
        if self.new_tokens < choose.SLACK * usual:
            why += "; no more than 1,024 and half of the context"
        found = {"max_new_tokens": Choice(self.new_tokens, why), "temperature": Choice(1.0, "the same in all stages")}
        if self.size.tokens < choose.SIZES[0].tokens:
            found["concurrency"] = Choice(32, "answers sampled at a time; fewer take less memory for keys and values")
        return found


def basis(model: ModelFacts, parts: Parts, lengths: dict[str, Lengths], last_only: bool) -> Basis:
    new_tokens = choose.new_tokens(lengths["sft"].response, model.context_length)
    return Basis(model, choose.size_of(model.num_parameters), parts, lengths, last_only, new_tokens)


def build(basis: Basis) -> dict[str, Tree]:
    """Stage -> config, in the order in which they run: SFT alone, or the whole chain where there are preferences."""
    configs: dict[str, Tree] = {"sft": sft(basis)}
    if basis.parts.reward:
        configs |= {"train-rm": train_rm(basis), "eval-rm": eval_rm(basis), "ppo": ppo(basis)}
    steps = [{"stage": name, "config": f"configs/{name}.yaml"} for name in configs]
    return {**configs, "pipeline": {"stages": steps}}


def sft(basis: Basis) -> Tree:
    """Length, batch, rate and the tokens that must be trained."""
    model, size, records = basis.model, basis.size, basis.parts.sft
    long, dropped, share, kept = _lengths(basis, "sft", 0.05, 16)
    batch = choose.batch_size(kept, 32)
    epochs = choose.epochs(kept, batch, size.steps, size.passes)
    tokens, why_tokens = choose.train_tokens(model)
    least_end, why_end = choose.least_end_rate(model, basis.as_it_is)
    return {
        "run_dir": "runs/sft",
        "seed": SEED,
        "model": _model(model, size),
        "data": _data(basis, "sft", dropped, f"{len(records)} rows: {_origin(basis)}"),
        "max_length": Choice(long.tokens, long.why("prompt and answer")),
        "holdout_fraction": Choice(share, "of the prompts, to measure loss and end-token rate on"),
        **({"loss_on": Choice("last_turn", "the template writes earlier turns differently once a conversation goes on")}
           if basis.last_only else {}),
        "lora": {
            "r": Choice(16, "on every linear layer; a larger rank learns more from much data"), "alpha": 32.0,
            "train_tokens": Choice(tokens, why_tokens),
        },
        "optim": {
            "learning_rate": Choice(size.sft, choose.rate_source(size, "sft")), "warmup_ratio": 0.05,
            "schedule": "cosine",
        },
        "batch": _batch(batch, long.tokens, size, kept, "demonstrations"),
        **({"steps": Choice(0, "an instruct model without demonstrations: taken as it is, its endings measured here")}
           if basis.as_it_is else {"epochs": Choice(epochs, _why_epochs(epochs, size.steps))}),
        "sampling": basis.sampling,
        "min_end_token_rate": Choice(least_end, why_end),
        **basis.runtime,
    }  # fmt: skip


def train_rm(basis: Basis) -> Tree:
    """A row is a prompt with all its responses, so that a forward pass takes fewer of them."""
    size, records = basis.size, basis.parts.reward
    long, dropped, share, kept = _lengths(basis, "reward", 0.1, 16)
    batch = choose.batch_size(kept, 64)
    epochs = choose.epochs(kept, batch, 40, 3)
    responses = max(len(record.responses) for record in records)
    return {
        "run_dir": "runs/train-rm",
        "seed": SEED,
        "policy": Choice("runs/sft", "gives the base, the tokenizer and the adapter to start from"),
        "data": _data(basis, "reward", dropped, f"{len(records)} prompts with responses, on prompts of their own"),
        "max_length": Choice(long.tokens, long.why("prompt and longest response")),
        "holdout_fraction": Choice(share, "of the prompts, to measure accuracy on"),
        "use_margins": Choice(any(judgement.margin is not None for row in records for judgement in row.judgements),
                              "whether a pair's margin is subtracted from its score difference"),
        "optim": {
            "learning_rate": Choice(size.reward, choose.rate_source(size, "reward")), "warmup_ratio": 0.05,
            "schedule": "cosine",
        },
        "batch": _batch(batch, responses * long.tokens, size, kept, f"prompts, with up to {responses} responses each,"),
        "epochs": Choice(epochs, f"{_why_epochs(epochs, 40)}; more than one overfits (InstructGPT, N+ details)"),
        "sampling": basis.sampling,
        "standardise_samples": Choice(min(256, max(32, kept)), "SFT samples that set the scores' shift and scale"),
        **basis.runtime,
    }  # fmt: skip


def eval_rm(basis: Basis) -> Tree:
    long, dropped, *_ = _lengths(basis, "eval", 0.0, 0)
    responses = max(len(record.responses) for record in basis.parts.eval)
    return {
        "run_dir": "runs/eval-rm",
        "seed": SEED,
        "reward": "runs/train-rm",
        "data": _data(basis, "eval", dropped, f"{len(basis.parts.eval)} prompts that nothing was trained on"),
        "max_length": Choice(long.tokens, long.why("prompt and longest response")),
        "micro_batch_size": choose.micro_batch_size(responses * long.tokens, basis.size.tokens, 16),
    }


def ppo(basis: Basis) -> Tree:
    """Batches in responses; as many steps as answer every prompt four times, within bounds."""
    size, records = basis.size, basis.parts.ppo
    room = basis.most and basis.most - basis.new_tokens
    long = choose.limit(basis.lengths["ppo"].prompt, room)
    share = choose.holdout_fraction(len(records), 0.1, 8)
    split = _split_lengths(records, basis.lengths["ppo"].prompt, share)
    dropped, kept = choose.dropped_fraction(split, long.tokens), _kept(split[0], long.tokens)
    batch = 1 << (min(size.batch, kept).bit_length() - 1)
    steps = min(200, max(8, -(-4 * kept // batch)))
    tokens = long.tokens + basis.new_tokens
    micro = choose.micro_batch_size(tokens, size.tokens, batch)
    return {
        "run_dir": "runs/ppo",
        "seed": SEED,
        "policy": Choice("runs/sft", "the policy's start, and the reference of the KL penalty"),
        "rewards": [{"run": "runs/train-rm"}],
        "prompts": {
            **_data(basis, "ppo", dropped, f"{len(records)} prompts of their own"),
            "max_tokens": Choice(long.tokens, long.why("prompts")),
        },
        "sampling": basis.sampling,
        "missing_eos": {
            "mode": "replace",
            "score": Choice(-1.0, "of an answer that was cut off, whatever the reward model says (N+ details, 23)"),
        },
        "batch": {
            "batch_size": Choice(batch, f"answers a step, from {kept} prompts; 512 in N+ details, on eight GPUs"),
            "minibatch_size": Choice(max(1, batch // 2), "answers an optimizer step: two a pass"),
            "micro_batch_size": Choice(min(micro, max(1, batch // 2)), _why_micro(tokens, size)),
        },
        "kl": {"coef": Choice(0.05, "score units a nat (N+ details); raise it where samples become strange")},
        "optim": {
            "learning_rate": Choice(size.policy, choose.rate_source(size, "policy")),
            "schedule": "linear",
        },
        "evaluation": {"every": max(1, steps // 5), "holdout_fraction": share},
        "steps": Choice(steps, "every prompt is answered about four times, in 8 to 200 steps"),
        "save_every": Choice(max(1, steps // 4), "checkpoints that --resume goes on from"),
        **basis.runtime,
    }  # fmt: skip


def _model(model: ModelFacts, size: Size) -> Tree:
    found: dict[str, Any] = {"path": model.path}
    if size.is_large:
        found["dtype"] = Choice("bfloat16", "the frozen base; adapters and optimizer stay float32")
    if model.template:
        why = "the tokenizer has no template, and these marks among its tokens"
        if model.template == "plain":
            why = f"the tokenizer has no template: roles as words, {model.end_token!r} at the end of an answer"
        found["chat_template"] = Choice(model.template, why)
    return found


def _data(basis: Basis, part: str, dropped: float, why: str) -> dict[str, Any]:
    found: dict[str, Any] = {"path": Choice(DATA[part], why)}
    if dropped > choose.LEAST_DROPPED:
        found["max_dropped_fraction"] = Choice(dropped, "so many rows are longer than the limit; they are counted")
    return found


def _origin(basis: Basis) -> str:
    if basis.as_it_is:
        return "preferred answers, to measure on; epochs: 1 instead of steps: 0 would train on them"
    return "demonstrations, or the preferred answers of prompts of their own"


def _lengths(basis: Basis, part: str, usual: float, least: int) -> tuple[Limit, float, float, int]:
    """The limit, the share of rows that it drops, the share that is held out, and the rows left to train on."""
    records, found = getattr(basis.parts, part), basis.lengths[part]
    long = choose.limit(found.whole, basis.most)
    num_prompts = basis.parts.counts()[part][1]
    share = choose.holdout_fraction(num_prompts, usual, least) if usual else 0.0
    split = _split_lengths(records, found.whole, share) if usual else [found.whole]
    return long, choose.dropped_fraction(split, long.tokens), share, _kept(split[0], long.tokens)


def _split_lengths(records: Sequence[Any], lengths: Sequence[int], share: float) -> list[list[int]]:
    """Lengths of the rows that the stage will train on, and of those that it will hold out."""
    of = {id(record): length for record, length in zip(records, lengths, strict=True)}
    return [[of[id(record)] for record in half] for half in split_by_prompt(records, share, SEED)]


def _kept(lengths: Sequence[int], limit: int) -> int:
    return sum(length <= limit for length in lengths)


def _batch(batch: int, tokens: int, size: Size, num_rows: int, what: str) -> Tree:
    return {
        "batch_size": Choice(batch, f"{what} an optimizer step; {num_rows} make {-(-num_rows // batch)} steps a pass"),
        "micro_batch_size": Choice(choose.micro_batch_size(tokens, size.tokens, batch), _why_micro(tokens, size)),
    }


def _why_micro(tokens: int, size: Size) -> str:
    return f"rows of up to {tokens} tokens, {size.tokens} tokens a forward pass; changes memory and time, no gradient"


def _why_epochs(epochs: int, least: int) -> str:
    return "one pass" if epochs == 1 else f"as few as make {least} steps, at most this"
