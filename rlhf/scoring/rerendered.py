"""Scores by a reward run on another base than the policy's."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace

from rlhf.data.chat_format import ChatFormat
from rlhf.models import open_base
from rlhf.records import Message
from rlhf.scoring.scorer import Sample, Scorer, Scores

log = logging.getLogger("rlhf")


class Rerendered:
    """Gives ``inner`` the same conversations in the tokens of its own base: text, its template, its tokenizer.

    Tokens that are special there are no text: where a response happens to write one it is left out, and counted.
    """

    def __init__(self, inner: Scorer, chat: ChatFormat, where: str) -> None:
        self.inner, self.chat, self.where = inner, chat, where

    def score(self, samples: Sequence[Sample]) -> Scores:
        """As ``inner``.

        Raises:
            RlhfError: MOD022 for a conversation longer than that base's context.
        """
        rendered, num_cleaned = [], 0
        for sample in samples:
            response = self.chat.without_special(sample.response, is_answer=True)
            prompt = tuple(
                Message(m.role, self.chat.without_special(m.content, m.role == "assistant")) for m in sample.prompt
            )
            num_cleaned += (prompt, response) != (sample.prompt, sample.response)
            prompt_ids, ids = self.chat.prompt_ids(prompt), self.chat.response_ids(prompt, response)
            scored = [*ids, self.chat.end_id] if sample.finished else ids
            if not scored:  # cut off before any text: the head reads the end of the prompt
                prompt_ids, scored = prompt_ids[:-1], prompt_ids[-1:]
            open_base.require_context(self.chat, len(prompt_ids), len(scored), self.where)
            rendered.append(replace(sample, prompt_ids=prompt_ids, response_ids=scored, scored_ids=scored))
        if num_cleaned:
            log.warning("%s: special tokens of its own in %d conversations were left out.", self.where, num_cleaned)
        return self.inner.score(rendered)
