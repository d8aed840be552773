"""The sections that PPO's config alone has."""

from __future__ import annotations

import math
from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from rlhf.config.sections import (
    Count,
    DataSection,
    Finite,
    Fraction,
    LearningRate,
    NonNegative,
    OptimSection,
    Positive,
    Section,
)


class PromptsSection(DataSection):
    max_tokens: Count = Field(512, description="longer prompts are dropped and counted")


class MissingEosSection(Section):
    """The rule for a response that was cut off without its end token."""

    mode: Literal["replace", "subtract"] = Field("replace", description="replace the score, or subtract a penalty")
    score: Finite = Field(-1.0, description="the score of a cut-off response, in mode replace")
    penalty: NonNegative = Field(1.0, description="what is subtracted from its score, in mode subtract")


class PpoBatchSection(Section):
    """Counted in responses."""

    batch_size: Count = Field(64, description="responses a step")
    minibatch_size: Count = Field(16, description="responses an optimizer step; divides batch_size")
    micro_batch_size: Count = Field(16, description="responses a forward pass; never changes a gradient")
    micro_batch_tokens: Count | None = Field(
        None, description="tokens a forward pass, so that it may hold fewer responses; null: no limit"
    )

    @model_validator(mode="after")
    def _divides(self) -> PpoBatchSection:
        if self.batch_size % self.minibatch_size:
            fits = math.gcd(self.batch_size, self.minibatch_size)
            raise ValueError(
                f"minibatch_size {self.minibatch_size} does not divide batch_size {self.batch_size}; {fits} does"
            )
        return self


class KlSection(Section):
    """The KL penalty against the SFT reference."""

    coef: NonNegative = Field(
        0.05,
        description="weight of the KL, in score units a nat; 0 with value.fit: gradient runs the reference in "
        "evaluations alone",
    )
    place: Literal["reward", "loss"] = Field("reward", description="in the per-token reward, or as k2 in the loss")
    estimator: Literal["k1", "exact"] = Field("k1", description="in the reward: sampled, or over the full vocabulary")
    target: Positive | None = Field(None, description="nats a response that an adaptive coefficient steers to")
    horizon: Count = Field(10_000, description="responses over which the adaptive coefficient adjusts")

    @model_validator(mode="after")
    def _loss_takes_k2(self) -> KlSection:
        if self.place == "loss" and self.estimator == "exact":
            raise ValueError("estimator exact works in the reward only; the loss takes the k2 form")
        return self


class UpdateSection(Section):
    """What every algorithm's update on one batch of rollouts has. A subclass adds the settings of one algorithm."""

    algorithm: ClassVar[str]  # its module in rlhf/algorithms
    needs_critic: ClassVar[bool] = False
    smallest_group: ClassVar[int] = 1  # responses to one prompt that it needs at least

    epochs: Count = Field(2, description="passes over a batch")
    normalise_advantages: bool = Field(True, description="over the whole batch; false with kl.place: loss centres only")
    entropy_coef: NonNegative = Field(0.0, description="weight of an entropy bonus")
    target_kl: Positive | None = Field(None, description="nats a token of update KL that end a batch's epochs early")

    def value_targets(self) -> tuple[float, float]:
        """gamma and lambda of what a critic learns and is judged by."""
        return 1.0, 1.0


class PpoUpdateSection(UpdateSection):
    """The clipped update on one batch of rollouts."""

    algorithm = "ppo"
    needs_critic = True

    clip_range: Annotated[float, Field(gt=0, lt=1)] = Field(0.2, description="of the probability ratio")
    value_clip_range: Positive | None = Field(
        0.2, description="of the value's change, with value.fit: gradient; null: unclipped"
    )
    gamma: Fraction = Field(1.0, description="discount a token")
    lam: Fraction = Field(
        1.0,
        description="lambda of the policy's advantages; below 1, tokens further than 1 / (1 - lam) from the end of a "
        "response learn of its score through the critic alone (docs/critic.md)",
    )
    value_lam: Fraction | None = Field(
        1.0,
        description="lambda of the critic's targets; below 1 they are partly the critic's own values; null: lam",
    )

    def value_targets(self) -> tuple[float, float]:
        return self.gamma, self.lam if self.value_lam is None else self.value_lam


class PpoOptimSection(OptimSection):
    learning_rate: LearningRate = Field(1e-5, description="of the policy")
    value_learning_rate: LearningRate = Field(1e-5, description="of the value role, with value.fit: gradient")
    schedule: Literal["constant", "linear", "cosine"] = Field("constant", description="after the warm-up, over steps")


class ValueSection(Section):
    """The critic, whose values the advantages are measured against."""

    fit: Literal["least_squares", "gradient"] = Field(
        "least_squares",
        description="a head on the frozen reference's hidden states, fitted to every batch at once; or a role of its "
        "own, trained by the value loss",
    )
    start: Literal["reward", "zero"] = Field(
        "reward",
        description="with fit: gradient: a copy of the reward adapter and head, or the SFT adapter and a head of zeros",
    )
    pretrain_steps: Annotated[int, Field(ge=0)] = Field(
        10, description="at most so many batches before the policy moves; the first sets the head by least squares"
    )
    min_explained_variance: Annotated[float, Field(le=1)] = Field(
        0.1,
        description="share of the outcomes' variance, on a batch that the critic has not learned from, that ends the "
        "value pretraining; chance reached 0.1 in 0 of 240 batches of 64 responses (docs/critic.md)",
    )


class Limit(Section):
    """Where a figure is warned about, and where it stops the run."""

    warn: Finite | None = Field(None, description="said once when the figure goes beyond; null: never")
    stop: Finite | None = Field(None, description="exit 7 after guards.patience steps beyond; null: never")


class GuardSection(Section):
    """What PPO is watched by; see rlhf/training/guards.py."""

    patience: Count = Field(3, description="steps in a row beyond a stop limit that end the run")
    kl_nats: Limit = Field(
        default_factory=lambda: Limit(warn=50.0, stop=None), description="above: exact KL a response to the reference"
    )
    entropy_nats: Limit = Field(
        default_factory=lambda: Limit(warn=0.02, stop=None), description="below: mean entropy of a token"
    )
    score_std: Limit = Field(
        default_factory=lambda: Limit(warn=1e-4, stop=None), description="below: spread of a batch's scores"
    )
    clip_fraction: Limit = Field(
        default_factory=lambda: Limit(warn=0.5, stop=None), description="above: share of clipped tokens in an update"
    )

    @property
    def limits(self) -> dict[str, Limit]:
        """Figure -> its limit."""
        return {name: value for name, value in self if isinstance(value, Limit)}


class EvaluationSection(Section):
    """Measuring on held-out prompts during PPO."""

    every: Count = Field(10, description="steps between evaluations; the start and the end are always measured")
    data: DataSection | None = Field(None, description="prompts; null: a share of the training prompts, kept out")
    holdout_fraction: Annotated[float, Field(gt=0, lt=1)] = Field(0.1, description="that share")
    num_prompts: Count = Field(64, description="at most so many prompts")
