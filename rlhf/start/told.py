"""What a person is told: the title of each config, and what ``init`` found and decided as the lines of a table."""

from __future__ import annotations

from typing import Any

from rlhf.start import choose
from rlhf.start.chain import Basis
from rlhf.start.parts import Parts
from rlhf.start.render import Choice, Tree

TITLES = {
    "sft": "Supervised fine-tuning. Every later role starts from this run's adapter.",
    "train-rm": "Reward model: the SFT adapter goes on, with a scalar head, on pairs and rankings.",
    "eval-rm": "Examination of the reward model on comparisons whose prompts no stage has seen.",
    "ppo": "PPO: policy, reference, value and reward are four adapters on one frozen base.",
    "pipeline": "The whole chain; each stage runs in its own process, finished and unchanged ones are skipped.",
}
PARTS = {"sft": "sft", "train-rm": "reward", "eval-rm": "eval", "ppo": "ppo"}


def parts_figures(split: Parts, num_equal: int) -> list[tuple[str, str]]:
    """How many rows and prompts each part has, and what was left out."""
    counts = ", ".join(f"{name} {rows} ({prompts} prompts)" for name, (rows, prompts) in split.counts().items() if rows)
    found = [("parts", f"{counts}; no prompt is in two parts")]
    if split.left_out:
        found.append(("left out", f"{split.left_out} rows of prompts that serve another stage"))
    if num_equal:
        found.append(("left out", f"{num_equal} comparisons of responses that are the same tokens"))
    if not split.reward:
        found.append(("stages", "SFT alone: without preferences there is no reward model; rlhf collect makes them"))
    return found


def figures(basis: Basis, configs: dict[str, Tree]) -> list[tuple[str, str]]:
    """What was found of the model, and the figures of each stage."""
    model = basis.model
    pad = f"{model.pad_token!r}, distinct from the end token"
    if model.pad_token in (None, model.end_token):
        pad = "the end token: masks come from lengths, so that its loss is kept; rlhf export names another token"
    kind = "an instruct model" if model.is_instruct else "a base"
    if model.is_initialised:
        kind = "never pretrained"
    tokens, why = choose.train_tokens(model)
    found = [
        ("model", f"{model.path}: {model.num_parameters / 1e6:,.1f} M parameters, {kind}, "
                  f"context {model.context_length or 'without limit'}"),
        ("template", f"{model.template} (the tokenizer has none)" if model.template else "the tokenizer's own"),
        ("beginning", model.bos),
        ("end token", f"{model.end_token!r}"),
        ("trained tokens", f"{', '.join(tokens) or 'none'}: {why}"),
        ("padding", pad),
    ]  # fmt: skip
    for name, tree in configs.items():
        if name != "pipeline":
            found.append((name, _summary(name, tree) + _longer(basis, name, tree)))
    return found


def _longer(basis: Basis, name: str, tree: Tree) -> str:
    """How many rows the stage will drop, where there are any."""
    limit = tree["prompts"]["max_tokens"] if name == "ppo" else tree["max_length"]
    whole = basis.lengths[PARTS[name]].whole
    longer = sum(length > limit.value for length in whole)
    return f"; {longer} of {len(whole)} rows are longer and will be dropped" if longer else ""


def _summary(name: str, tree: Tree) -> str:
    def value(*keys: str) -> Any:
        entry: Any = tree
        for key in keys:
            entry = entry[key]
        return entry.value if isinstance(entry, Choice) else entry

    if name == "eval-rm":
        return f"max_length {value('max_length')}"
    batch = f"batch {value('batch', 'batch_size')} in {value('batch', 'micro_batch_size')}s"
    rate = f"learning rate {value('optim', 'learning_rate'):g}"
    if name == "ppo":
        lengths = (
            f"prompts to {value('prompts', 'max_tokens')}, answers to {value('sampling', 'max_new_tokens')} tokens"
        )
        return f"{lengths}, {batch}, {rate}, {value('steps')} steps"
    if name == "sft" and "steps" in tree:
        return f"max_length {value('max_length')}; no steps: the instruct model is taken as it is"
    return f"max_length {value('max_length')}, {batch}, {rate}, {value('epochs')} epochs"
