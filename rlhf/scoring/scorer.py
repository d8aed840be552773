"""The one interface of everything that scores responses, and the weighted sum of several."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from rlhf.errors import Problem, RlhfError
from rlhf.records import Messages


@dataclass(frozen=True)
class Sample:
    """A prompt and a response, as text and as ids; ``response_ids`` has its end or stop token if it is ``finished``.

    Args:
        scored_ids: what a reward role reads: the same, but for an end token in place of a stop token.
        logprobs: what the engine that sampled the response says of its tokens, in nats, if it says anything.
        thinking: what the response thought before its answer, as text; also part of ``response`` where it is kept.
    """

    prompt: Messages
    response: str
    prompt_ids: list[int]
    response_ids: list[int]
    finished: bool
    scored_ids: list[int]
    logprobs: list[float] | None = None
    thinking: str = ""

    @property
    def is_empty(self) -> bool:
        """Whether it has no text that a data set may hold: it is blank, or has a NUL character."""
        return not self.response.strip() or "\0" in self.response


@dataclass(frozen=True)
class Scores:
    """mean [B]; members [B, m] of an ensemble or sum; heads: name -> [B].

    Args:
        disagreement: [B] of an ensemble's members, in differences to a reference response of the same prompt.
        terms: of a sum whose terms have names, name -> [B] as it enters the sum: its weight times its score.
    """

    mean: Tensor
    members: Tensor | None = None
    heads: dict[str, Tensor] = field(default_factory=dict)
    disagreement: Tensor | None = None
    terms: dict[str, Tensor] = field(default_factory=dict)


class Scorer(Protocol):
    """Anything that scores."""

    def score(self, samples: Sequence[Sample]) -> Scores: ...


class StandardisedScorer:
    """(score - shift) / scale of another scorer, both set once on samples. Stateful."""

    def __init__(self, inner: Scorer) -> None:
        self.inner, self.shift, self.scale = inner, 0.0, 1.0

    def fit(self, samples: Sequence[Sample]) -> None:
        """Make the scores of ``samples`` have mean 0 and (population) standard deviation 1.

        Raises:
            RlhfError: GRD003 where there are fewer than two, or none differs: there is no scale.
        """
        values = self.inner.score(samples).mean.double()
        scale = float(values.std(correction=0)) if len(values) > 1 else 0.0
        if not scale > 0:
            what = (
                f"{len(values)} samples with {len(set(values.tolist()))} different scores: nothing to standardise on."
            )
            raise RlhfError(
                Problem("GRD003", "standardise_samples", what, "more samples, or leave standardise_samples out")
            )
        self.shift, self.scale = float(values.mean()), scale

    def score(self, samples: Sequence[Sample]) -> Scores:
        return Scores((self.inner.score(samples).mean - self.shift) / self.scale)

    def state_dict(self) -> dict[str, Any]:
        return {"shift": self.shift, "scale": self.scale}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.shift, self.scale = state["shift"], state["scale"]


class WeightedScorer:
    """The weighted sum of several scorers; the terms are kept as members, and by ``names`` where they have them.

    Its disagreement is the most that those of its ensembles can add up to, and that of the only one exactly.
    """

    def __init__(self, terms: Sequence[tuple[Scorer, float]], names: Sequence[str] = ()) -> None:
        assert terms and len(names) in (0, len(terms))
        self.terms, self.names = list(terms), tuple(names)

    def score(self, samples: Sequence[Sample]) -> Scores:
        found = [scorer.score(samples) for scorer, _ in self.terms]
        members = torch.stack([scores.mean.float().cpu() for scores in found], 1)
        weights = torch.tensor([weight for _, weight in self.terms])
        apart = [
            abs(weight) * scores.disagreement
            for scores, (_, weight) in zip(found, self.terms, strict=True)
            if scores.disagreement is not None
        ]
        named = dict(zip(self.names, (members * weights).unbind(1), strict=True)) if self.names else {}
        together = torch.stack(apart).sum(0) if apart else None
        return Scores(members @ weights, members, disagreement=together, terms=named)
