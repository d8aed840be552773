"""The configs of a chain, each key with its reason, from the measured facts alone."""

from __future__ import annotations

from typing import Any

from rlhf.config.stages import SftConfig
from rlhf.records import split_by_prompt
from rlhf.start import choose
from rlhf.start.basis import Basis
from rlhf.start.choose import Size
from rlhf.start.facts import ModelFacts
from rlhf.start.render import Choice, Tree

SEED = 0
MEASURED = 15  # times in a training
NUM_SAMPLES = SftConfig.model_fields["end_token_samples"].default
DATA = {
    "sft": "data/sft.jsonl", "reward": "data/preferences.jsonl", "ppo": "data/prompts.jsonl", "eval": "data/eval.jsonl",
}  # fmt: skip


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
    length = _length(basis, "sft", "prompt and answer")
    share, num_train = _held_out(basis, "sft", 0.05, 64)
    batch = choose.batch_size(num_train, 32, 50)
    steps, passes = choose.least_steps(model)
    epochs = choose.epochs(num_train, batch, steps, passes)
    tokens, why_tokens = choose.train_tokens(model)
    num_samples = min(NUM_SAMPLES, len(records) - num_train)
    least_end, why_end = choose.least_end_rate(model, basis.share_that_fits, num_samples, basis.as_it_is)
    return {
        "run_dir": "runs/sft",
        "seed": SEED,
        "model": _model(model, size),
        "data": _data("sft", f"{len(records)} rows: {_origin(basis)}"),
        "max_length": length,
        "holdout_fraction": Choice(share, "of the prompts, to measure loss and end-token rate on"),
        **({"loss_on": Choice("last_turn", _why_last(basis))} if basis.last_only else {}),
        "lora": {
            "r": Choice(16, "on every linear layer; a larger rank learns more from much data"),
            "alpha": 32.0,
            "train_tokens": Choice(tokens, why_tokens),
        },
        "optim": {
            "learning_rate": Choice(size.sft, choose.rate_source(size, "sft")),
            "warmup_ratio": 0.05,
            "schedule": "cosine",
        },
        "batch": _batch(batch, length.value, size, num_train, "demonstrations"),
        **(
            {"steps": Choice(0, "an instruct model without demonstrations: taken as it is, its endings measured here")}
            if basis.as_it_is
            else _training(num_train, batch, epochs, _why_epochs(epochs, steps))
        ),
        "sampling": basis.sampling,
        "min_end_token_rate": Choice(least_end, why_end),
        **basis.runtime,
    }


def train_rm(basis: Basis) -> Tree:
    """A row is a prompt with all its responses, so that a forward pass takes fewer of them."""
    size, records = basis.size, basis.parts.reward
    length = _length(basis, "reward", "prompt and longest response")
    share, num_train = _held_out(basis, "reward", 0.1, 32)
    batch = choose.batch_size(num_train, 64, 20)
    epochs = choose.epochs(num_train, batch, 40, 3)
    responses = max(len(record.responses) for record in records)
    why_epochs = f"{_why_epochs(epochs, 40)}; more than one overfits (InstructGPT, N+ details)"
    tokens, what = responses * length.value, f"prompts, with up to {responses} responses each,"
    return {
        "run_dir": "runs/train-rm",
        "seed": SEED,
        "policy": Choice("runs/sft", "gives the base, the tokenizer and the adapter to start from"),
        "data": _data("reward", f"{len(records)} prompts with responses, on prompts of their own"),
        "max_length": length,
        "holdout_fraction": Choice(share, "of the prompts, to measure accuracy on"),
        "use_margins": Choice(
            any(judgement.margin is not None for row in records for judgement in row.judgements),
            "whether a pair's margin is subtracted from its score difference",
        ),
        "optim": {
            "learning_rate": Choice(size.reward, choose.rate_source(size, "reward")),
            "warmup_ratio": 0.05,
            "schedule": "cosine",
        },
        "batch": _batch(batch, tokens, size, num_train, what),
        **_training(num_train, batch, epochs, why_epochs),
        "sampling": basis.sampling,
        "standardise_samples": Choice(min(256, max(32, num_train)), "SFT samples that set the scores' shift and scale"),
        **basis.runtime,
    }


def eval_rm(basis: Basis) -> Tree:
    length = _length(basis, "eval", "prompt and longest response")
    responses = max(len(record.responses) for record in basis.parts.eval)
    return {
        "run_dir": "runs/eval-rm",
        "seed": SEED,
        "reward": "runs/train-rm",
        "data": _data("eval", f"{len(basis.parts.eval)} prompts that nothing was trained on"),
        "max_length": length,
        "micro_batch_size": choose.micro_batch_size(responses * length.value, basis.size.tokens, 16),
    }


def ppo(basis: Basis) -> Tree:
    """Batches in responses; as many steps as answer every prompt four times, within bounds."""
    size, records = basis.size, basis.parts.ppo
    longest = choose.up(max(basis.lengths["ppo"].prompt))
    context = basis.model.context_length
    long = min(longest, context - basis.new_tokens) if context else longest
    share, num_train = _held_out(basis, "ppo", 0.1, 8)
    batch = 1 << (min(size.batch, num_train).bit_length() - 1)
    steps = min(200, max(8, -(-4 * num_train // batch)))
    tokens = long + basis.new_tokens
    micro = choose.micro_batch_size(tokens, size.tokens, batch)
    return {
        "run_dir": "runs/ppo",
        "seed": SEED,
        "policy": Choice("runs/sft", "the policy's start, and the reference of the KL penalty"),
        "rewards": [{"run": "runs/train-rm", "examination": "runs/eval-rm"}],
        "prompts": {
            **_data("ppo", f"{len(records)} prompts of their own"),
            "max_tokens": Choice(long, f"the longest has {max(basis.lengths['ppo'].prompt)} tokens"),
        },
        "sampling": basis.sampling,
        "missing_eos": _missing_end(basis),
        "batch": {
            "batch_size": Choice(batch, f"answers a step, from {num_train} prompts; 512 in N+ details, on eight GPUs"),
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
    }


def _missing_end(basis: Basis) -> Tree:
    """The fixed score of N+ details where hardly any answer is cut off; else a penalty that cutting pays little."""
    penalty, why = choose.missing_end(basis.share_that_fits, basis.as_it_is)
    if penalty == 1.0:
        return {"mode": "replace", "score": Choice(-1.0, f"of an answer that was cut off (N+ details, 23): {why}")}
    return {"mode": "subtract", "penalty": Choice(penalty, why)}


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


def _data(part: str, why: str) -> dict[str, Any]:
    return {"path": Choice(DATA[part], why)}


def _origin(basis: Basis) -> str:
    if basis.as_it_is:
        return "preferred answers, to measure on; epochs: 1 instead of steps: 0 would train on them"
    return "demonstrations" if basis.parts.demonstrated else "the preferred answers of prompts of their own"


def _why_last(basis: Basis) -> str:
    if not basis.parts.demonstrated:
        return "only the last turn was preferred; nobody judged the earlier ones"
    return "the template writes earlier turns differently once a conversation goes on"


def _length(basis: Basis, part: str, of: str) -> Choice:
    """The person's limit, or the longest row of the part."""
    whole, limit = basis.lengths[part].whole, basis.limit
    tokens = limit.tokens if limit.is_given else min(limit.tokens, choose.up(max(whole)))
    why = f"{of}: the longest of {len(whole):,} rows has {max(whole):,} tokens"
    return Choice(tokens, f"{why}; {limit.note}" if limit.note else why)


def _held_out(basis: Basis, part: str, usual: float, least: int) -> tuple[float, int]:
    """The share of the prompts that is held out, and the rows that are left to train on."""
    share = choose.holdout_fraction(basis.parts.counts()[part][1], usual, least)
    return share, len(split_by_prompt(getattr(basis.parts, part), share, SEED)[0])


def _training(num_rows: int, batch: int, epochs: int, why: str) -> Tree:
    """Epochs, and the held-out loss along the way: what is kept is the best step, not the last."""
    steps = -(-num_rows * epochs // batch)
    return {
        "epochs": Choice(epochs, why),
        "evaluation": {
            "every": Choice(max(1, steps // MEASURED), f"of {steps} steps: the held-out loss is measured so often"),
            "patience": Choice(3, "measurements without a new best end the training"),
        },
        "use": Choice("best", "the step with the lowest held-out loss"),
        "save_every": Choice(max(1, steps // 4), "checkpoints that --resume goes on from"),
    }


def _batch(batch: int, tokens: int, size: Size, num_rows: int, what: str) -> Tree:
    return {
        "batch_size": Choice(batch, f"{what} an optimizer step; {num_rows} make {-(-num_rows // batch)} steps a pass"),
        "micro_batch_size": Choice(choose.micro_batch_size(tokens, size.tokens, batch), _why_micro(tokens, size)),
    }


def _why_micro(tokens: int, size: Size) -> str:
    return f"rows of up to {tokens} tokens, {size.tokens} tokens a forward pass; changes memory and time, no gradient"


def _why_epochs(epochs: int, least: int) -> str:
    return "one pass" if epochs == 1 else f"as few as make {least} steps, at most this"
