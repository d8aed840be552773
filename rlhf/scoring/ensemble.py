"""Scores by an ensemble: its members combined, and how far they disagree."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from rlhf.records import prompt_key
from rlhf.scoring import aggregate
from rlhf.scoring.scorer import Sample, Scorer, Scores, WeightedScorer

log = logging.getLogger("rlhf")
Answer = Callable[[Sequence[Sample], Sequence[int]], list[Sample]]


class References:
    """What each member gives, on average, to finished answers of the reference policy to a prompt. Stateful.

    The answers to a prompt are drawn with numbers that follow from its text, and scored once. What was found is kept in
    checkpoints: scored again in other company, the last digits would differ.

    Args:
        answer: one response to the prompt of each sample, drawn with the number beside it.
        count: answers a prompt.
    """

    def __init__(self, answer: Answer, count: int) -> None:
        self.answer, self.count = answer, count
        self.known: dict[str, list[float] | None] = {}

    def of(self, samples: Sequence[Sample], members: Sequence[Scorer]) -> Tensor:
        """[B, m] the prompts' references, 0 for a prompt none of whose answers ended by itself."""
        keys = [_key(sample) for sample in samples]
        new = {key: sample for key, sample in zip(keys, samples, strict=True) if key not in self.known}
        if new:
            self._learn(new, members)
        rows = [self.known[key] or [0.0] * len(members) for key in keys]
        return torch.tensor(rows)

    def _learn(self, new: dict[str, Sample], members: Sequence[Scorer]) -> None:
        asked = [(key, sample, index) for key, sample in new.items() for index in range(self.count)]
        numbers = [int(key[:12], 16) * self.count + index for key, _, index in asked]
        answers = self.answer([sample for _, sample, _ in asked], numbers)
        ended = [(key, answer) for (key, _, _), answer in zip(asked, answers, strict=True) if answer.finished]
        scores = _columns(members, [answer for _, answer in ended]) if ended else torch.zeros(0, len(members))
        without = 0
        for key in new:
            rows = [row for row, (whose, _) in enumerate(ended) if whose == key]
            self.known[key] = scores[rows].mean(0).tolist() if rows else None
            without += not rows
        if without:
            log.warning(
                "%d of %d prompts have no reference: none of %d answers ended by itself.", without, len(new), self.count
            )

    def state_dict(self) -> dict[str, Any]:
        return {"known": dict(self.known)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.known = dict(state["known"])


class EnsembleScorer:
    """Several scorers, each standardised or each raw, as one.

    Args:
        combine: one of ``aggregate.AGGREGATES``, and what weighs the disagreement in it.
        references: where members are compared in differences; None: as they stand, which is what raw scores and
            differences within a prompt need.
    """

    def __init__(
        self, members: Sequence[Scorer], combine: str = "mean", coef: float = 0.0, references: References | None = None
    ) -> None:
        self.members, self.combine, self.coef, self.references = list(members), combine, coef, references

    def score(self, samples: Sequence[Sample]) -> Scores:
        """[B] the members combined, [B, m] each of them, [B] their disagreement where there are references; of the
        heads that all have, the members' mean."""
        found = [member.score(samples) for member in self.members]
        members = _stacked([scores.mean for scores in found])
        known = self.references.of(samples, self.members) if self.references else None
        references = torch.zeros_like(members) if known is None else known
        scores = aggregate.AGGREGATES[self.combine](members, references, self.coef)
        apart = aggregate.disagreement(members, references) if known is not None else None
        names = [name for name in found[0].heads if all(name in scores.heads for scores in found)]
        heads = {name: _stacked([scores.heads[name] for scores in found]).mean(1) for name in names}
        return Scores(scores, members, heads, apart)


def references_of(scorer: Scorer) -> list[References]:
    """What the ensembles among the terms of a reward know of their references."""
    terms = [term for term, _ in scorer.terms] if isinstance(scorer, WeightedScorer) else [scorer]
    return [term.references for term in terms if isinstance(term, EnsembleScorer) and term.references]


def _columns(members: Sequence[Scorer], samples: Sequence[Sample]) -> Tensor:
    return _stacked([member.score(samples).mean for member in members])


def _stacked(columns: Sequence[Tensor]) -> Tensor:
    return torch.stack([column.float().cpu() for column in columns], 1)


def _key(sample: Sample) -> str:
    return hashlib.sha256(prompt_key(sample.prompt).encode()).hexdigest()
