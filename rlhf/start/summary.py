"""What a person is told: the title of each config, and what ``init`` found and decided as the lines of a table."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rlhf.start import choose
from rlhf.start.basis import Basis
from rlhf.start.parts import Parts
from rlhf.start.read_files import File
from rlhf.start.render import Choice, Tree

OWN_LENGTH = (
    "an instruct model answers at its own length until SFT has taught it that of the data: if GRD002 says that too few "
    "answers end, more epochs, or a larger sampling.max_new_tokens"
)
TITLES = {
    "sft": "Supervised fine-tuning. Every later role starts from this run's adapter.",
    "train-rm": "Reward model: the SFT adapter goes on, with a scalar head, on pairs and rankings.",
    "eval-rm": "Examination of the reward model on comparisons whose prompts no stage has seen.",
    "ppo": "PPO: policy, reference, value and reward are four adapters on one frozen base.",
    "pipeline": "The whole chain; each stage runs in its own process, finished and unchanged ones are skipped.",
}


def of_data(files: Sequence[File], split: Parts, basis: Basis) -> list[tuple[str, str]]:
    """What each file held, what of it was left out and why, and how many rows and prompts each part has."""
    found: list[tuple[str, str]] = []
    for file in files:
        rows = f"{file.dropped.num_rows:,} rows read, {len(file.records):,} {file.kind} used"
        found.append(("data", "; ".join((f"{file.path}: {rows}", *file.notes))))
        found += [("dropped", file.dropped.sentence())] if file.dropped.total else []
    counts = [
        f"{name} {rows:,} ({prompts:,} prompts)" for name, (rows, prompts) in basis.parts.counts().items() if rows
    ]
    found.append(("parts", f"{', '.join(counts)}; no prompt is in two parts"))
    if split.left_out:
        found.append(("left out", f"rows of prompts that serve another stage: {split.left_out:,}"))
    if num_long := len(split.ppo) - len(basis.parts.ppo):
        what = f"prompts for PPO behind which the context does not hold an answer of {basis.new_tokens:,} tokens"
        found.append(("left out", f"{what}: {num_long:,}"))
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
        (
            "model",
            f"{model.path}: {model.num_parameters / 1e6:,.1f} M parameters, {kind}, "
            f"context {model.context_length or 'without limit'}",
        ),
        ("template", f"{model.template} (the tokenizer has none)" if model.template else "the tokenizer's own"),
        ("beginning", model.bos),
        ("end token", f"{model.end_token!r}"),
        ("trained tokens", f"{', '.join(tokens) or 'none'}: {why}"),
        *([("own length", OWN_LENGTH)] if basis.has_length_to_learn else []),
        ("padding", pad),
        ("limit", f"rows up to {basis.limit.tokens:,} tokens" + (f": {basis.limit.note}" if basis.limit.note else "")),
        ("answers", f"{basis.share_that_fits:.1%} of those in the data fit max_new_tokens, {basis.new_tokens:,}"),
    ]
    for name, tree in configs.items():
        if name != "pipeline":
            found.append((name, _summary(name, tree)))
    return found


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
        ends = f"{value('min_end_token_rate'):.0%} of its answers must end by themselves"
        return f"max_length {value('max_length')}; no steps: the instruct model is taken as it is; {ends}"
    epochs = f"{value('epochs')} epochs at most, the step with the lowest held-out loss is kept"
    found = f"max_length {value('max_length')}, {batch}, {rate}, {epochs}"
    if name != "sft":
        return found
    loss = "the last turn" if "loss_on" in tree else "every turn of the assistant"
    return f"{found}; loss on {loss}; {value('min_end_token_rate'):.0%} of the sampled answers must end by themselves"
