"""Why a policy does not end its responses by itself: the causes that can be seen, each with its fix."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from rlhf.models.base import Base
from rlhf.models.embeddings import looks_initialised, looks_untrained
from rlhf.scoring.scorer import Sample

log = logging.getLogger("rlhf")
FIX = "train longer, raise sampling.max_new_tokens, or set min_end_token_rate openly"


def warn_of_untrained_end(base: Base, trained: Sequence[str]) -> None:
    """Said before the hours of training: a frozen row that was never trained is hardly ever written."""
    if base.chat.end_token not in trained and end_looks_untrained(base):
        log.warning(
            "The row of the end token %r in the embeddings is like those of tokens never seen in pretraining, and it "
            "stays frozen: lora.train_tokens: [%r] trains it.", base.chat.end_token, base.chat.end_token,
        )  # fmt: skip


def end_looks_untrained(base: Base) -> bool:
    weight = base.model.get_input_embeddings().weight
    return looks_initialised(weight) or looks_untrained(weight, base.chat.end_id)


def causes(base: Base, trained: Sequence[str], samples: Sequence[Sample], num_truncated: int) -> tuple[str, str]:
    """What speaks for each of three causes, and the fix that follows: an end token that is untrained, not the one that
    the base knows, or cut off the training rows.

    Args:
        trained: tokens whose rows the adapter trains.
        num_truncated: training rows that lost their end token to ``max_length``.
    """
    chat = base.chat
    found, fixes = [], []
    if chat.end_token not in trained and end_looks_untrained(base):
        found.append("its row in the embeddings is untrained, and stays frozen")
        fixes.append(f"lora.train_tokens: [{chat.end_token!r}]")
    own = base.tokenizer.eos_token_id
    others = sum(own in sample.response_ids for sample in samples) if own not in (None, chat.end_id) else 0
    if others:
        name = base.tokenizer.eos_token
        found.append(f"{others} of {len(samples)} write {name!r} instead, with which the base ends")
        fixes.append(f"sampling.stop_tokens: [{name!r}] in every stage, or lora.train_tokens: [{chat.end_token!r}]")
    if num_truncated:
        found.append(f"{num_truncated} training rows were cut at max_length and lost it")
        fixes.append("too_long: drop, or a larger max_length")
    if not fixes and chat.end_token not in trained:
        fixes.append(f"lora.train_tokens: [{chat.end_token!r}]")
    return "; ".join(found), "; ".join([*fixes, FIX])
