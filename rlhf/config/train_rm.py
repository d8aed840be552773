"""The config of reward training."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Discriminator, Field, Tag, model_validator

from rlhf.config.sections import (
    Count,
    DataSection,
    Finite,
    HeadName,
    NonNegative,
    OptimSection,
    Positive,
    ReportTo,
    RewardBatchSection,
    RoleLoraSection,
    SamplingSection,
    Section,
    Text,
)
from rlhf.config.stages import HeldOutSection, LongRows, StageConfig, TrainedForAWhile

Weights = Annotated[dict[HeadName, Finite], Field(min_length=1)]
Heads = Annotated[
    Annotated[list[HeadName], Field(min_length=1), Tag("list")] | Annotated[Weights, Tag("weights")],
    Discriminator(lambda value: "list" if isinstance(value, list) else "weights"),
]
COMBINED = "score"
OF_HEADS = ("combine", "gate_penalty", "rating_coef")


@dataclass(frozen=True)
class Objective:
    """What is learned from the labels: the keys of a reward config that say so, which stand at its top level."""

    loss: Literal["bradley_terry", "plackett_luce", "outcome"]
    use_margins: bool
    margin_coef: float
    weight_by_margin: bool
    label_smoothing: float
    teacher_weight: float


@dataclass(frozen=True)
class Combination:
    """What makes several heads one score: the same for those keys."""

    combine: Literal["weights", "fitted", "gate"]
    gate_penalty: float
    rating_coef: float


class EnsembleSection(Section):
    """In what the members of an ensemble differ, beside their seed and with it their head and order of the data."""

    data: Literal["bootstrap", "folds", "all"] = Field(
        "bootstrap", description="prompts of a member: drawn with replacement, all but its own of k folds, or all"
    )
    ranks: list[Count] | None = Field(None, description="rank of each member's adapter, instead of lora.r for all")
    layers: list[Annotated[list[int], Field(min_length=2, max_length=2)] | None] | None = Field(
        None,
        description="first and last block that each member trains, below 0 from the end; null: all. The adapter of the "
        "others stays that of the policy",
    )
    target_modules: list[Annotated[list[Text], Field(min_length=1)] | None] | None = Field(
        None, description="linear layers whose adapter each member trains, by their last names; null: all"
    )


class RewardConfig(StageConfig, TrainedForAWhile, LongRows):
    """Bradley-Terry reward model on comparisons."""

    run_dir: Text = "runs/train-rm"
    policy: Text = Field("runs/sft", description="SFT run: gives the base, the tokenizer and the adapter to start from")
    init_from: Text | None = Field(
        None, description="reward run to go on from, adapter and head; null: the policy's adapter and a fresh head"
    )
    teachers: list[Text] = Field(
        default_factory=list, description="reward runs, also on other bases, whose mean score differences are fitted"
    )
    teacher_weight: Annotated[float, Field(gt=0, le=1)] = Field(
        1.0, description="share of the teachers in the loss; the rest is that of the labels"
    )
    data: DataSection = Field(description="comparisons")
    consensus: Literal["majority", "dawid_skene"] | None = Field(
        None,
        description="one label from all annotators' rows on the same responses: what most say, or the probability of "
        "Dawid and Skene's model, which weighs each by his reliability; null: every row as it stands",
    )
    hold_out_annotators: Annotated[list[Text], Field(min_length=1)] | None = Field(
        None, description="annotators whose rows are not trained on, but measured against"
    )
    train_fraction: Annotated[float, Field(gt=0, le=1)] | None = Field(
        None, description="share of the training prompts that is used, for rlhf learning-curve; null: all of them"
    )
    lora: RoleLoraSection | None = Field(
        default_factory=RoleLoraSection, description="adapter that is trained; null: every weight of a copy is"
    )
    members: Count = Field(
        1, description="adapters and heads trained one after the other; more than one are an ensemble in one run"
    )
    ensemble: EnsembleSection = Field(default_factory=EnsembleSection)
    heads: Heads | None = Field(
        None, description="attributes that get a head each, as a list or with their weights; null: one score"
    )
    rubric: Text | None = Field(
        None, description="YAML file of criteria, which are the heads with their weights where heads names none"
    )
    combine: Literal["weights", "fitted", "gate"] = Field(
        "weights",
        description="what makes the heads one score: a weighted sum; one whose weights are fitted on half of the "
        "held-out overall comparisons; weights that depend on the prompt, fitted on those of the training prompts",
    )
    gate_penalty: Positive = Field(1.0, description="weight of the gate's squared weights, which keeps it near even")
    rating_coef: Positive = Field(1.0, description="weight of the squared error of ratings beside comparisons")
    loss: Literal["bradley_terry", "plackett_luce", "outcome"] = Field(
        "bradley_terry",
        description="of all pairs of a ranking, of choosing the best of what is left in turn, or of the labels that "
        "responses have of their own (good or bad)",
    )
    use_margins: bool = Field(False, description="subtract a comparison's margin from its score difference")
    margin_coef: Positive = Field(1.0, description="factor of the margins that use_margins subtracts")
    weight_by_margin: bool = Field(
        False, description="multiply a comparison's loss by its margin, which says how strongly it is preferred"
    )
    label_smoothing: Annotated[float, Field(ge=0, lt=0.5)] = Field(
        0.0, description="share of the labels that are taken to be wrong"
    )
    centering_coef: NonNegative = Field(
        0.001, description="weight of the mean squared score, which keeps scores near 0"
    )
    length_coef: NonNegative = Field(
        0.0, description="weight of what score and length differences have in common, which unlearns 'longer is better'"
    )
    optim: OptimSection = Field(default_factory=lambda: OptimSection(learning_rate=2e-4))
    batch: RewardBatchSection = Field(
        default_factory=RewardBatchSection, description="counted in prompts, each with its responses"
    )
    sampling: SamplingSection = Field(
        default_factory=SamplingSection, description="how the SFT policy is sampled to standardise the scores"
    )
    standardise_samples: Count = Field(256, description="SFT samples that set the scores' shift and scale")
    evaluation: HeldOutSection = Field(
        default_factory=HeldOutSection,
        description="of the loss that is trained on, without centering_coef and length_coef; each member of an "
        "ensemble by itself, on the same held-out prompts, not on its own fold",
    )
    use: Literal["best", "last"] = Field(
        "best",
        description="the step that is kept: with evaluation.every the measured one with the lowest held-out loss (the "
        "earlier of equal ones; of each member its own), or the last",
    )
    contradicted: Annotated[int, Field(ge=0)] = Field(
        0, description="so many comparisons that the model contradicts most surely are listed in contradicted.jsonl"
    )
    report_to: ReportTo = Field("none", description="tracker of the metrics, or a list of them; beside metrics.jsonl")

    @model_validator(mode="after")
    def _margins_are_read(self) -> RewardConfig:
        if self.loss == "plackett_luce":
            named = [key for key in ("use_margins", "weight_by_margin", "label_smoothing") if getattr(self, key)]
            if named:
                raise ValueError(f"{named[0]} is for loss: bradley_terry")
        if self.margin_coef != RewardConfig.model_fields["margin_coef"].default and not self.use_margins:
            raise ValueError("margin_coef is for use_margins: true")
        if self.teacher_weight != RewardConfig.model_fields["teacher_weight"].default and not self.teachers:
            raise ValueError("teacher_weight is for teachers")
        return self

    @model_validator(mode="after")
    def _annotators_compare(self) -> RewardConfig:
        if self.loss == "outcome" and (self.consensus or self.hold_out_annotators):
            raise ValueError("consensus and hold_out_annotators are of comparisons, loss: outcome of single responses")
        if self.loss == "plackett_luce" and self.consensus == "dawid_skene":
            raise ValueError("consensus: dawid_skene gives probabilities, and loss: plackett_luce takes whole rankings")
        if self.consensus and any(source.weight is not None for source in self.data.mixture or ()):
            raise ValueError("consensus makes one of rows that a weight of data.mixture draws twice: leave weights out")
        return self

    @model_validator(mode="after")
    def _members_share_a_base(self) -> RewardConfig:
        if self.members == 1 and self.ensemble != EnsembleSection():
            raise ValueError("ensemble is for members: 2 or more")
        if self.members > 1 and self.lora is None:
            raise ValueError("members are adapters on one base, and lora: null trains every weight")
        for key in ("ranks", "layers", "target_modules"):
            given = getattr(self.ensemble, key)
            if given is not None and len(given) != self.members:
                raise ValueError(f"ensemble.{key} has {len(given)} entries for {self.members} members")
        return self

    @model_validator(mode="after")
    def _heads_fit(self) -> RewardConfig:
        names = list(self.heads or ())
        if len(set(names)) < len(names):
            raise ValueError("heads has a name twice")
        if len(names) > 1 and COMBINED in names:
            raise ValueError(f"heads: {COMBINED!r} is what the combination of several heads is called")
        fields, several = RewardConfig.model_fields, bool(names or self.rubric)
        changed = [key for key in OF_HEADS if getattr(self, key) != fields[key].default]
        if changed and not several:
            raise ValueError(f"{changed[0]} is for heads")
        if several and self.loss != "bradley_terry":
            raise ValueError("heads are for loss: bradley_terry, which takes comparisons and ratings")
        if self.gate_penalty != fields["gate_penalty"].default and self.combine != "gate":
            raise ValueError("gate_penalty is for combine: gate")
        if self.combine == "weights":
            return self
        if isinstance(self.heads, dict):
            raise ValueError("heads with weights are for combine: weights; the others fit them")
        named = [key for key in ("length_coef", "teachers") if getattr(self, key)]
        if named:
            raise ValueError(f"{named[0]} is about the score, which combine: {self.combine} makes only after training")
        return self

    @property
    def objective(self) -> Objective:
        return Objective(
            self.loss,
            self.use_margins,
            self.margin_coef,
            self.weight_by_margin,
            self.label_smoothing,
            self.teacher_weight,
        )

    @property
    def combination(self) -> Combination:
        return Combination(self.combine, self.gate_penalty, self.rating_coef)

    @property
    def ranks(self) -> list[int | None]:
        """Rank of each member's adapter; None: that of the policy's."""
        if self.ensemble.ranks is not None:
            return [*self.ensemble.ranks]
        return [self.lora.r if self.lora else None] * self.members
