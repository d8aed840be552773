"""Scores by a reward role on the shared base."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from rlhf.data.batches import PassSize, collate
from rlhf.models import forward
from rlhf.models.roles import Roles
from rlhf.runs.progress import track
from rlhf.scoring.scorer import Sample, Scores


class SharedScorer:
    """Reads the head of ``slot`` at the last token. A response that was cut off has no end there: the caller's
    missing-EOS rule decides what such a score is worth.

    Args:
        size: of the forward passes.
        raw: scores as they were trained, whose differences are log-odds, instead of the standardised ones.
        head: whose scores they are, where the role has several; None: its first one, the combination.
    """

    def __init__(self, roles: Roles, slot: str, size: PassSize, raw: bool = False, head: str | None = None) -> None:
        self.roles, self.slot, self.size, self.raw = roles, slot, size, raw
        self.column = roles.head(slot).names.index(head) if head else 0

    @torch.no_grad()
    def score(self, samples: Sequence[Sample]) -> Scores:
        """[B] scores of the head, and of each head by its name where there are several."""
        names = self.roles.head(self.slot).names
        scores = torch.zeros(len(samples), len(names))
        parts = self.size.split([len(sample.prompt_ids) + len(sample.scored_ids) for sample in samples])
        for rows in track(parts, "Scoring", len(parts)):
            chosen = [samples[row] for row in rows]
            prompts, responses = [s.prompt_ids for s in chosen], [s.scored_ids for s in chosen]
            sequences = collate(prompts, responses, 0, self.roles.device)
            with self.roles.acting_as(self.slot) as (model, head):
                found = forward.end_scores(model, head, sequences)
                scores[rows] = (found * head.scale + head.shift if self.raw else found).float().cpu()
        named = dict(zip(names, scores.unbind(1), strict=True))
        if len(names) > 1:
            named.pop(names[0])  # the combination is no head
        return Scores(scores[:, self.column], heads=named)
