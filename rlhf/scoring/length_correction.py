"""Scores with what a reward model gives for length alone taken off."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from rlhf.preflight.examined import LengthCalibration
from rlhf.scoring.scorer import Sample, Scorer, Scores


def tokens_read(sample: Sample) -> int:
    """Tokens of the response that a reward role reads, with its end token where it ended."""
    return len(sample.scored_ids)


class LengthCorrected:
    """score - coef * (tokens - mean_length) of another scorer, and of each of its members.

    Args:
        tokens: of a sample's response, counted as they were when the correction was fitted.
    """

    def __init__(
        self, inner: Scorer, calibration: LengthCalibration, tokens: Callable[[Sample], int] = tokens_read
    ) -> None:
        self.inner, self.calibration, self.tokens = inner, calibration, tokens

    def score(self, samples: Sequence[Sample]) -> Scores:
        """[B], and [B, m] of an ensemble; heads stay as they are."""
        found = self.inner.score(samples)
        lengths = torch.tensor([float(self.tokens(sample)) for sample in samples])
        excess = self.calibration.coef * (lengths - self.calibration.mean_length)
        members = None if found.members is None else found.members - excess.to(found.members)[:, None]
        return replace(found, mean=found.mean - excess.to(found.mean), members=members)
