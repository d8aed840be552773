"""From prompts to a batch to learn from: sample, score, rescore, reward, estimate advantages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rlhf.algorithms.algorithm import Algorithm, Rewarded
from rlhf.config.ppo_sections import KlSection, MissingEosSection, UpdateSection
from rlhf.data.batches import Sequences
from rlhf.data.tokenised import PromptRow
from rlhf.errors import Problem, RlhfError
from rlhf.evaluation import policy_samples as measure
from rlhf.losses import policy as objective
from rlhf.losses import tensors
from rlhf.models import forward
from rlhf.rollouts.engine import Sampling
from rlhf.scoring.scorer import Sample, Scorer, Scores
from rlhf.training.critics import Critic, ValueTargets
from rlhf.training.experience import Experience


@dataclass(frozen=True)
class CollectorSettings:
    """The sections of the config that a collector reads.

    Args:
        sampling: with the seed that all rollouts of the run share.
        reads_reference: whether something in a step reads the reference.
    """

    sampling: Sampling
    missing_eos: MissingEosSection
    kl: KlSection
    update: UpdateSection
    samples_per_prompt: int
    reads_reference: bool


@dataclass(frozen=True)
class Collector:
    """Answers prompts with the policy as it is, and works out everything that the update needs."""

    policy: measure.SampledPolicy
    scorer: Scorer
    critic: Critic
    algorithm: Algorithm
    settings: CollectorSettings

    def collect(self, prompts: Sequence[PromptRow], first_row: int, kl_coef: float) -> Experience:
        """Answer each prompt ``samples_per_prompt`` times.

        Args:
            first_row: global number of the first response; the noise of a response depends on the seed and its number.
            kl_coef: weight of the KL penalty in the reward, as it is in this step.
        """
        settings = self.settings
        repeated = [prompt for prompt in prompts for _ in range(settings.samples_per_prompt)]
        samples = self.policy.respond(repeated, settings.sampling, range(first_row, first_row + len(repeated)))
        judged = self.scorer.score(samples)
        scores = self._settled(judged, samples, first_row)
        mask = tensors.response_mask(torch.tensor([len(sample.response_ids) for sample in samples]), _width(samples))
        figures, states = self._rescored(samples, mask)
        coef = kl_coef if settings.kl.place == "reward" else 0.0
        rewards = objective.token_rewards(kl_penalty(settings.kl, figures), scores, mask, coef)
        values = figures.setdefault("old_values", torch.zeros(mask.shape))
        rewarded = Rewarded(rewards, scores, mask, settings.samples_per_prompt, values if states else None)
        targets = ValueTargets(*settings.update.value_targets())
        return Experience(
            samples,
            scores,
            mask,
            rewards=rewards,
            advantages=self.algorithm.advantages(rewarded, settings.update),
            returns=targets.returns(rewards, values, mask),
            outcomes=targets.outcomes(rewards, mask),
            states=states,
            disagreement=judged.disagreement,
            terms=judged.terms,
            **figures,
        )

    def _settled(self, judged: Scores, samples: Sequence[Sample], first_row: int) -> Tensor:
        """[B] the scores after the missing-EOS rule.

        Raises:
            RlhfError: GRD006 where one is not finite.
        """
        finished = torch.tensor([sample.finished for sample in samples])
        scores = settle(self.settings.missing_eos)(judged.mean.cpu(), finished).float()
        if not bool(torch.isfinite(scores).all()):
            bad = ", ".join(str(row) for row in (~torch.isfinite(scores)).nonzero().flatten().tolist())
            what = f"the scores of responses {bad} of this batch are not finite; nothing was learnt from it."
            fix = "look at the reward run or function"
            raise RlhfError(Problem("GRD006", f"response {first_row} and on", what, fix))
        return scores

    def _rescored(
        self, samples: Sequence[Sample], mask: Tensor
    ) -> tuple[dict[str, Tensor], list[tuple[list[int], Tensor]]]:
        """Figures [B, T] of the roles and the critic by their names in ``Experience``, and what the critic read."""
        figures: dict[str, Tensor] = {}
        states: list[tuple[list[int], Tensor]] = []
        for rows, sequences in self.policy.batched(samples):
            part, reference = self._of_roles(sequences)
            if read := self.critic.read(sequences, reference):
                values, hidden = read
                states.append((rows, hidden.cpu()))
                part["old_values"] = forward.scatter(values, sequences)
            for name, figure in part.items():
                figures.setdefault(name, torch.zeros(mask.shape))[rows, : figure.shape[1]] = figure.float().cpu()
        return figures, states

    def _of_roles(self, sequences: Sequences) -> tuple[dict[str, Tensor], Tensor | None]:
        """Figures [b, T] of policy and reference, and the reference's states [N, d]; without the reference where no
        step reads it."""
        roles, temperature = self.policy.roles, self.settings.sampling.temperature
        if not self.settings.reads_reference:
            logprobs, entropy = forward.policy_alone(roles, sequences, temperature)
            return {"old_logprobs": logprobs, "entropy": entropy}, None
        both = forward.policy_and_reference(roles, sequences, temperature)
        figures = {
            "old_logprobs": both.logprobs,
            "ref_logprobs": both.ref_logprobs,
            "exact_kl": both.exact_kl,
            "entropy": both.entropy,
        }
        return figures, both.ref_hidden


def settle(section: MissingEosSection) -> measure.ScoreRule:
    """The rule for responses without an end token, as a function of scores [B] and finished [B]."""
    if section.mode == "replace":
        return lambda scores, finished: objective.replace_missing_eos(scores, finished, section.score)
    return lambda scores, finished: objective.subtract_missing_eos(scores, finished, section.penalty)


def kl_penalty(section: KlSection, figures: Mapping[str, Tensor]) -> Tensor:
    """[B, T] the KL that the reward carries: sampled (k1), over the vocabulary, or 0 without the reference."""
    if figures.get("ref_logprobs") is None:
        return torch.zeros_like(figures["old_logprobs"])
    if section.estimator == "exact":
        return figures["exact_kl"]
    return objective.k1(figures["old_logprobs"], figures["ref_logprobs"])


def _width(samples: Sequence[Sample]) -> int:
    return max(len(sample.response_ids) for sample in samples)
