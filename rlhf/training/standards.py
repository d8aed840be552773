"""Reward terms whose scale is set on answers of the policy before it moves."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

from rlhf.data.tokenised import PromptRow
from rlhf.evaluation.policy_samples import SampledPolicy
from rlhf.rollouts.engine import Sampling
from rlhf.runs.progress import waiting
from rlhf.scoring.scorer import StandardisedScorer

log = logging.getLogger("rlhf")


@dataclass(frozen=True)
class Standard:
    """A reward term whose shift and scale are set on ``num_samples`` answers."""

    name: str
    num_samples: int
    scorer: StandardisedScorer

    def fit(self, policy: SampledPolicy, prompts: Sequence[PromptRow], sampling: Sampling) -> None:
        """Set them on answers to the prompts in turn; responses that were cut off are left out."""
        wanted, scorer = self.num_samples, self.scorer
        rows = [prompts[row % len(prompts)] for row in range(wanted)]
        with waiting(f"Setting the scale of {self.name} on {wanted} answers of the SFT policy"):
            samples = policy.respond(rows, sampling)
            ended = [sample for sample in samples if sample.finished]
            scorer.fit(ended)
        log.info(
            "%s standardised on %d SFT samples (%d more were cut off): shift %.3f, scale %.3f.",
            self.name,
            len(ended),
            wanted - len(ended),
            scorer.shift,
            scorer.scale,
        )
