"""A role as a model of its own: the adapter added into a base that was loaded for this alone."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model
from transformers import AutoModelForSequenceClassification, GenerationConfig

from rlhf.config.train_rm import COMBINED
from rlhf.errors import Problem, RlhfError
from rlhf.models import adapters, open_base
from rlhf.models.base import Base
from rlhf.models.heads import ScalarHead
from rlhf.runs import artifacts
from rlhf.runs.artifacts import Manifest


def policy(base: Base, adapter: Path | None) -> Any:
    """The causal language model with the adapter (where there is one) inside its weights. Changes ``base``, which
    nobody else may hold."""
    merged = base.model
    if adapter is not None:
        config, state = adapters.read(adapter)
        wrapped = get_peft_model(base.model, config, adapter_name="default")
        adapters.load(wrapped, "default", state)
        merged = wrapped.merge_and_unload(safe_merge=True)  # type: ignore[operator]
    merged.generation_config = generation_config(base)
    return merged


def copy_of(run_dir: str | Path, manifest: Manifest, device: torch.device) -> Base:
    """A model of its own, in float32, that is the function of a finished run's: where a role whose every weight is
    trained starts."""
    section = open_base.model_of(manifest).model_copy(update={"dtype": "float32", "quantize": None})
    base = open_base.require_same(open_base.open_base(section, device), manifest)
    model = policy(base, artifacts.adapter_of(run_dir))
    model.generation_config = GenerationConfig()
    return replace(base, model=model.eval().requires_grad_(False))


def generation_config(base: Base) -> GenerationConfig:
    """Sampling as the policy was trained: temperature 1, no filter, ending as its responses do, or as the tokenizer."""
    own = base.tokenizer.eos_token_id
    ends = [*base.chat.end_ids, *([own] if own not in (None, *base.chat.end_ids) else [])]
    return GenerationConfig(
        do_sample=True, temperature=1.0, top_k=0, top_p=1.0, eos_token_id=ends, pad_token_id=base.chat.pad_id
    )


def reward(base: Base, adapter: Path | None, head: ScalarHead) -> tuple[Any, list[float]]:
    """A sequence classifier with one label for each number of the head, and the constants that its class has no place
    for.

    A standardised score is the classifier's logit plus its constant: ``score`` has no bias, so that its weight takes
    the scale, and the shift is left over.

    Raises:
        RlhfError: MOD040 for a gate or an architecture without such a class, MOD041 where no token can be the padding:
            transformers reads the last token that is not.
    """
    if head.gate is not None:
        what = "the weights of its heads depend on the prompt, and the class has no place for that."
        raise RlhfError(Problem("MOD040", "head", what, "export one of its heads, or all of them"))
    merged = policy(base, adapter)
    config = deepcopy(merged.config)
    config.num_labels, config.pad_token_id = len(head.names), padding(base)
    if head.names != (COMBINED,):
        config.id2label = dict(enumerate(head.names))
        config.label2id = {name: number for number, name in enumerate(head.names)}
    try:
        classifier = AutoModelForSequenceClassification.from_config(config, dtype=merged.dtype)
    except ValueError:
        what = f"{type(merged).__name__} has no sequence classifier in transformers."
        raise RlhfError(Problem("MOD040", base.source, what, "rlhf score")) from None
    outcome = classifier.load_state_dict(merged.state_dict(), strict=False)
    assert outcome.missing_keys == ["score.weight"], outcome.missing_keys
    folded = head.folded()
    with torch.no_grad():
        classifier.score.weight.copy_(folded.linear.weight.to(classifier.score.weight))
    return classifier.to(base.device).eval(), folded.linear.bias.tolist()


def padding(base: Base) -> int:
    """The pad token where it is not the end token, else another token that no response ends with."""
    tokenizer, end = base.tokenizer, base.chat.end_id
    for token in (tokenizer.pad_token_id, tokenizer.unk_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id):
        if token is not None and token != end:
            return int(token)
    what = "has no token beside the end token that could be the padding."
    raise RlhfError(Problem("MOD041", base.source, what, "a tokenizer with a pad token"))
