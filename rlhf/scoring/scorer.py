"""The one interface of everything that scores responses, and the weighted sum of several."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from rlhf.data.records import Messages


@dataclass(frozen=True)
class Sample:
    """A prompt and a response, as text and as ids; ``response_ids`` has its end or stop token if it is ``finished``.

    Args:
        scored_ids: what a reward role reads: the same, but for an end token in place of a stop token.
    """

    prompt: Messages
    response: str
    prompt_ids: list[int]
    response_ids: list[int]
    finished: bool
    scored_ids: list[int]


@dataclass(frozen=True)
class Scores:
    """mean [B]; members [B, m] of an ensemble or sum; heads: name -> [B]."""

    mean: Tensor
    members: Tensor | None = None
    heads: dict[str, Tensor] = field(default_factory=dict)


class Scorer(Protocol):
    """Anything that scores."""

    def score(self, samples: Sequence[Sample]) -> Scores: ...


class WeightedScorer:
    """The weighted sum of several scorers; the terms are kept as members."""

    def __init__(self, terms: Sequence[tuple[Scorer, float]]) -> None:
        assert terms
        self.terms = list(terms)

    def score(self, samples: Sequence[Sample]) -> Scores:
        members = torch.stack([scorer.score(samples).mean.float().cpu() for scorer, _ in self.terms], 1)
        weights = torch.tensor([weight for _, weight in self.terms])
        return Scores(members @ weights, members)
