"""Why a policy does not end its responses by itself: the figures that tell the causes apart. SFT's gates read them."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from rlhf.data.tokenised import Dialogue
from rlhf.models.base import Base
from rlhf.models.embeddings import looks_initialised, looks_untrained
from rlhf.scoring.scorer import Sample

log = logging.getLogger("rlhf")
HELD = 0.95


def warn_of_untrained_end(base: Base, trained: Sequence[str]) -> None:
    """Said before the hours of training: a frozen row that was never trained is hardly ever written."""
    if base.chat.end_token not in trained and end_looks_untrained(base):
        log.warning(
            "The row of the end token %r in the embeddings is like those of tokens never seen in pretraining, and it "
            "stays frozen: lora.train_tokens: [%r] trains it.",
            base.chat.end_token,
            base.chat.end_token,
        )


def end_looks_untrained(base: Base) -> bool:
    weight = base.model.get_input_embeddings().weight
    return looks_initialised(weight) or looks_untrained(weight, base.chat.end_id)


@dataclass(frozen=True)
class Answers:
    """The answers that a policy was trained on: their lengths in tokens, the end token included, and how many of them
    lost that end to ``max_length``."""

    lengths: list[int]
    num_without_end: int

    def figures(self, max_new_tokens: int) -> dict[str, Any]:
        """How many are longer than what is sampled, and the length that 95 % of them do not exceed."""
        ordered, num = sorted(self.lengths), len(self.lengths)
        return {
            "num": num,
            "num_longer": sum(length > max_new_tokens for length in ordered),
            "num_without_end": self.num_without_end,
            "tokens_95_percent": ordered[math.ceil(HELD * num) - 1],
        }


def answers_of(rows: Sequence[Dialogue], end_id: int) -> Answers:
    """Every run of tokens that carry loss is one answer."""
    found = [
        [token for token, _ in run]
        for row in rows
        for is_trained, run in groupby(zip(row.ids, row.trained, strict=True), lambda pair: pair[1])
        if is_trained
    ]
    return Answers([len(answer) for answer in found], sum(answer[-1] != end_id for answer in found))


def figures(
    base: Base, trained: Sequence[str], samples: Sequence[Sample], answers: Answers, max_new_tokens: int
) -> dict[str, Any]:
    """What a judgement of the end-token rate rests on, as JSON values for the manifest.

    Args:
        trained: tokens whose rows in the embeddings are trained.
        samples: the policy's own responses.
    """
    chat, own = base.chat, base.tokenizer.eos_token_id
    other = base.tokenizer.eos_token if own not in (None, *chat.end_ids) else None
    return {
        "end_token": chat.end_token,
        "max_new_tokens": max_new_tokens,
        "num_samples": len(samples),
        "end_row_untrained": chat.end_token not in trained and end_looks_untrained(base),
        "base_end_token": other,
        "num_base_end": sum(own in sample.response_ids for sample in samples) if other else 0,
        "num_ended_by": {
            token: sum(sample.finished and sample.response_ids[-1] == index for sample in samples)
            for token, index in zip(chat.end_tokens, chat.end_ids, strict=True)
        },
        "answers": answers.figures(max_new_tokens),
    }
