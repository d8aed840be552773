"""One config class a stage: everything that a run depends on, and nothing else; reward training has train_rm.py."""

from __future__ import annotations

import math
from typing import Annotated, Literal

from pydantic import Field, model_validator

from rlhf.config.examination import ProbesSection, ThresholdSection
from rlhf.config.ppo_sections import (
    EvaluationSection,
    GuardSection,
    KlSection,
    MissingEosSection,
    PpoBatchSection,
    PpoOptimSection,
    PpoUpdateSection,
    PromptsSection,
    ValueSection,
)
from rlhf.config.rewards import AnyReward, ClassifierSection, FunctionReward, RunReward
from rlhf.config.sections import (
    GATE,
    BatchSection,
    Count,
    DataSection,
    Fraction,
    HeadName,
    LoraSection,
    ModelSection,
    OptimSection,
    PolicySamplingSection,
    Positive,
    ReportTo,
    RoleLoraSection,
    RuntimeSection,
    SamplingSection,
    Section,
    Seed,
    Text,
)


class StageConfig(Section):
    run_dir: Text = Field(description="where the run is written")
    seed: Seed = Field(0, description="everything random comes from it")
    runtime: RuntimeSection = Field(default_factory=RuntimeSection)


class TrainedForAWhile(Section):
    """Length of a training stage: passes over the data, or optimizer steps; exactly one of the two."""

    epochs: Positive | None = Field(None, description="passes over the training data; instead of steps")
    steps: Count | None = Field(None, description="optimizer steps; instead of epochs")
    save_every: Count | None = Field(None, description="steps between checkpoints; null: none before the end")
    keep_checkpoints: Annotated[int, Field(ge=2)] = Field(2, description="newest checkpoints that are kept")

    @model_validator(mode="after")
    def _one_length(self) -> TrainedForAWhile:
        if (self.epochs is None) == (self.steps is None):
            raise ValueError("give exactly one of epochs and steps")
        return self


class HeldOutSection(Section):
    """Measuring the held-out loss during training, which changes no step of it."""

    every: Count | None = Field(
        None,
        description="optimizer steps between measurements of the held-out loss, each a forward pass over all held-out "
        "rows; the start and the end are measured too; null: not during training",
    )
    patience: Count | None = Field(
        None, description="measurements in a row without a new best that end training early; null: never"
    )

    @model_validator(mode="after")
    def _patience_counts_measurements(self) -> HeldOutSection:
        if self.patience is not None and self.every is None:
            raise ValueError("patience counts measurements: set every too")
        return self


class LongRows(Section):
    """What happens to rows beyond ``max_length``."""

    max_length: Annotated[int, Field(ge=8)] = Field(512, description="prompt and response together, in tokens")
    too_long: Literal["drop", "truncate"] = Field(
        "drop", description="drop and count such rows, or cut the response's end (and its end token) and count them"
    )
    holdout_fraction: Annotated[float, Field(gt=0, lt=1)] = Field(
        0.05, description="share of the prompts kept out of training to measure on"
    )


class SftConfig(StageConfig, TrainedForAWhile, LongRows):
    """Supervised fine-tuning on demonstrations."""

    run_dir: Text = "runs/sft"
    steps: Annotated[int, Field(ge=0)] | None = Field(
        None, description="optimizer steps; instead of epochs; 0: the model is taken as it is, as for an instruct model"
    )
    model: ModelSection = Field(default_factory=ModelSection)
    data: DataSection = Field(description="demonstrations")
    loss_on: Literal["all_turns", "last_turn"] = Field("all_turns", description="assistant turns that carry loss")
    packing: bool = Field(
        False,
        description="several rows in one sequence, without padding between them; a model that needs a mask to keep "
        "them apart takes one such sequence a forward pass",
    )
    group_by_length: bool = Field(False, description="batches of rows of like length: less padding, less mixing")
    lora: LoraSection | None = Field(
        default_factory=LoraSection, description="adapter that is trained; null: every weight of the model is"
    )
    adapter: Text | None = Field(
        None, description="policy run or adapter directory to start from, which gives its settings; null: a fresh one"
    )
    optim: OptimSection = Field(default_factory=lambda: OptimSection(learning_rate=2e-4))
    batch: BatchSection = Field(default_factory=BatchSection)
    sampling: SamplingSection = Field(
        default_factory=SamplingSection, description="how responses are sampled to measure the end-token rate"
    )
    end_token_samples: Count = Field(128, description="held-out prompts sampled to measure the end-token rate")
    min_end_token_rate: Fraction | None = Field(
        0.9,
        json_schema_extra=GATE,
        description="fewer responses that end by themselves is an error; null: 0.9 of the share of the training "
        "answers that fit sampling.max_new_tokens, less two standard deviations of the samples; 0.5 with steps: 0",
    )
    evaluation: HeldOutSection = Field(default_factory=HeldOutSection)
    use: Literal["best", "last"] = Field(
        "best",
        description="the step that is kept: with evaluation.every the measured one with the lowest held-out loss (the "
        "earlier of equal ones), or the last",
    )
    require_improvement: bool = Field(
        True,
        json_schema_extra=GATE,
        description="a held-out loss that is not below that of the base, or of the adapter to start from, is an error; "
        "steps: 0 is exempt",
    )
    report_to: ReportTo = Field("none", description="tracker of the metrics, or a list of them; beside metrics.jsonl")

    @model_validator(mode="after")
    def _micro_batches_fill_a_batch(self) -> SftConfig:
        micro, whole = self.batch.micro_batch_size, self.batch.batch_size
        if whole % min(micro, whole):
            fits = math.gcd(micro, whole)
            raise ValueError(f"batch.micro_batch_size {micro} does not divide batch.batch_size {whole}; {fits} does")
        return self

    @model_validator(mode="after")
    def _what_is_trained(self) -> SftConfig:
        if self.lora is None and self.adapter is not None:
            raise ValueError("lora: null trains every weight, and an adapter to start from has no place there")
        if self.lora is None and self.model.dtype != "float32":
            raise ValueError("lora: null needs model.dtype float32: trained weights lose small updates in bfloat16")
        if self.lora is None and self.model.quantize is not None:
            raise ValueError("lora: null trains every weight, and those of model.quantize cannot be trained")
        if self.lora is None and self.model.trust_remote_code:
            raise ValueError(
                "lora: null writes a model of its own, which cannot carry the code of model.trust_remote_code"
            )
        if self.lora and self.lora.use_dora and self.model.quantize is not None:
            raise ValueError("lora.use_dora needs the norms of whole weights: leave model.quantize out")
        given = self.lora.model_fields_set - {"r", "dropout"} if self.lora and self.adapter else set()
        if given:
            raise ValueError(f"adapter gives its own {', '.join(sorted(given))}: leave lora.{min(given)} out")
        return self


class CollectConfig(StageConfig):
    """Preferences on a policy's own samples, ranked by a labeller."""

    run_dir: Text = "runs/collect"
    policy: Text = Field("runs/sft", description="run whose policy is sampled")
    prompts: DataSection = Field(description="prompts to answer")
    samples_per_prompt: Annotated[int, Field(ge=2)] = Field(4, description="responses a prompt")
    sampling: PolicySamplingSection = Field(default_factory=PolicySamplingSection)
    labeller: AnyReward = Field(
        default_factory=lambda: FunctionReward(function="rlhf.demo.gold:noisy_reward"),
        description="what ranks the responses: the higher its number, the better; equal numbers are ties",
    )

    @model_validator(mode="after")
    def _only_the_order_counts(self) -> CollectConfig:
        if self.labeller.weight != 1.0 or self.labeller.standardise_samples is not None:
            raise ValueError("labeller takes no weight or standardise_samples: only the order of its numbers counts")
        if self.labeller.examination is not None:
            raise ValueError("labeller takes no examination: it is what PPO asks for")
        return self


def _default_rewards() -> list[AnyReward]:
    return [RunReward(run="runs/train-rm")]


class PpoConfig(StageConfig):
    """PPO with a per-token KL penalty against the SFT reference."""

    run_dir: Text = "runs/ppo"
    policy: Text = Field("runs/sft", description="SFT run: the policy's start and the KL reference")
    rewards: Annotated[list[AnyReward], Field(min_length=1)] = Field(
        default_factory=_default_rewards, description="weighted sum of reward terms"
    )
    lora: RoleLoraSection | None = Field(
        default_factory=RoleLoraSection,
        description="adapters of what is trained; null: every weight of a model for each",
    )
    prompts: PromptsSection = Field(description="prompts to answer")
    samples_per_prompt: Count = Field(1, description="responses a prompt in each batch; divides batch.batch_size")
    sampling: SamplingSection = Field(default_factory=SamplingSection)
    missing_eos: MissingEosSection = Field(default_factory=MissingEosSection)
    batch: PpoBatchSection = Field(default_factory=PpoBatchSection)
    kl: KlSection = Field(default_factory=KlSection)
    update: PpoUpdateSection = Field(default_factory=PpoUpdateSection)
    optim: PpoOptimSection = Field(default_factory=PpoOptimSection)
    value: ValueSection = Field(default_factory=ValueSection)
    evaluation: EvaluationSection = Field(default_factory=EvaluationSection)
    steps: Count = Field(200, description="rollouts, each with its update")
    save_every: Count | None = Field(None, description="steps between checkpoints; null: none before the end")
    keep_checkpoints: Annotated[int, Field(ge=2)] = Field(2, description="newest checkpoints that are kept")
    guards: GuardSection = Field(default_factory=GuardSection, json_schema_extra=GATE)
    use: Literal["best", "last"] = Field("best", description="the step that downstream commands get")
    report_to: ReportTo = Field(
        "tensorboard", description="tracker of the metrics, or a list of them; beside metrics.jsonl"
    )

    @model_validator(mode="after")
    def _groups_fill_batches(self) -> PpoConfig:
        if self.batch.batch_size % self.samples_per_prompt:
            raise ValueError(
                f"samples_per_prompt {self.samples_per_prompt} does not divide batch.batch_size {self.batch.batch_size}"
            )
        if self.samples_per_prompt < self.update.smallest_group:
            raise ValueError(
                f"{self.update.algorithm} compares the responses to one prompt: samples_per_prompt must be "
                f"{self.update.smallest_group} or more, got {self.samples_per_prompt}"
            )
        if self.kl.place == "loss" and self.update.normalise_advantages:
            raise ValueError("kl.place: loss needs update.normalise_advantages: false, or it misses its optimum")
        return self

    def reads_reference(self) -> bool:
        """Whether something in a step reads the reference: the penalty, a guard that stops, or the critic."""
        penalised = self.kl.coef > 0 or self.kl.target is not None
        return penalised or self.guards.kl_nats.stop is not None or self.critic == "least_squares"

    @property
    def critic(self) -> Literal["none", "least_squares", "gradient"]:
        """The kind of critic: ``value.fit`` where the algorithm needs one."""
        return self.value.fit if self.update.needs_critic else "none"

    def set_for_gradients(self) -> list[str]:
        """Keys away from their defaults that only a critic trained by gradients has a use for."""
        places: list[tuple[str, Section, str]] = [
            ("update", self.update, "value_clip_range"),
            ("optim", self.optim, "value_learning_rate"),
            ("value", self.value, "start"),
        ]
        return [
            f"{section}.{name}"
            for section, values, name in places
            if getattr(values, name) != type(values).model_fields[name].default
        ]


class EvalRmConfig(StageConfig):
    """Examination of a reward model."""

    run_dir: Text = "runs/eval-rm"
    reward: Text | None = Field(None, description="the reward run to examine")
    runs: Annotated[list[Text], Field(min_length=2)] | None = Field(
        None,
        description="instead of it: several reward runs, also on other bases, as one ensemble of all their members",
    )
    head: HeadName | None = Field(
        None, description="of several heads the one to examine, on the labels of its attribute; null: the combination"
    )
    model: ClassifierSection | None = Field(None, description="instead of it: a sequence classifier from elsewhere")
    data: DataSection = Field(description="comparisons that the reward model has not seen")
    suite: Text | None = Field(None, description="YAML file of edge cases; one that fails is exit 10")
    drift: DataSection | None = Field(
        None,
        description="comparisons of another source, or on samples of a later policy: the same figures on these; also "
        "plain samples (prompt, response), which have no accuracy",
    )
    benchmark: Literal["rewardbench", "rewardbench2", "rm-bench"] | None = Field(
        None, description="data are rows of this benchmark, scored by its rules, instead of comparisons to examine on"
    )
    max_length: Annotated[int, Field(ge=8)] = Field(512, description="longer rows are dropped and counted")
    micro_batch_size: Count = Field(32, description="responses a forward pass")
    num_bins: Annotated[int, Field(ge=2)] = Field(10, description="bins of the reliability plot, of equal mass")
    num_resamples: Annotated[int, Field(ge=100)] = Field(2000, description="bootstrap resamples of the prompts")
    fit_fraction: Annotated[float, Field(gt=0, lt=1)] = Field(
        0.3, description="share of the prompts that a temperature is fitted on; the others show what it does"
    )
    probes: ProbesSection = Field(default_factory=ProbesSection)
    thresholds: ThresholdSection = Field(default_factory=ThresholdSection, json_schema_extra=GATE)

    @model_validator(mode="after")
    def _one_model(self) -> EvalRmConfig:
        if sum(source is not None for source in (self.reward, self.runs, self.model)) != 1:
            raise ValueError("give exactly one of reward, runs and model")
        if self.head is not None and (self.reward is None or self.benchmark):
            raise ValueError("head is of a reward run, on comparisons")
        if self.runs and len(set(self.runs)) < len(self.runs):
            raise ValueError("runs names a run twice")
        if self.benchmark and self.drift:
            raise ValueError("drift is measured from comparisons, and a benchmark's rows are none: leave one out")
        return self


class PipelineStep(Section):
    stage: Text = Field(description="stage to run: sft, train-rm, collect, ppo or eval-rm")
    config: Text = Field(description="its config file")


class PipelineConfig(Section):
    """Stages in order, each in its own process."""

    stages: Annotated[list[PipelineStep], Field(min_length=1)] = Field(description="in the order in which they run")
