"""The sections that stage configs are made of; a default stands here and nowhere else."""

from __future__ import annotations

from datetime import date
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    StringConstraints,
    Tag,
    model_validator,
)

from rlhf.config.thinking import Thinking

Text = Annotated[str, StringConstraints(min_length=1)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Finite = Annotated[float, Field(allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1)]
LearningRate = Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]
HeadName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z]\w*(-\w+)*$")]


def _is_day(value: str) -> str:
    date.fromisoformat(value)
    return value


Day = Annotated[str, StringConstraints(pattern=r"^\d{4}-\d\d-\d\d$"), AfterValidator(_is_day)]

RESERVED = (
    "messages",
    "conversation",
    "chat_template",
    "add_generation_prompt",
    "continue_final_message",
    "tokenize",
    "tokenizer_kwargs",
    "padding",
    "truncation",
    "max_length",
    "return_tensors",
    "return_dict",
    "return_assistant_tokens_mask",
    "tools",
    "documents",
    "strftime_now",
)


def _variables(value: dict[str, Any]) -> dict[str, Any]:
    if taken := [name for name in value if name in RESERVED]:
        raise ValueError(f"{', '.join(taken)}: rlhf sets these itself, or has no use for them")
    return value


TemplateKwargs = Annotated[dict[str, bool | int | float | str], AfterValidator(_variables)]

TrackerName = Literal["tensorboard", "wandb", "trackio", "mlflow"]
ReportTo = Annotated[
    Annotated[Literal["none", TrackerName], Tag("name")] | Annotated[list[TrackerName], Tag("list")],
    Discriminator(lambda value: "list" if isinstance(value, list) else "name"),
]


GATE: dict[str, Any] = {"gate": True}
"""``json_schema_extra`` of a field that bounds or accepts what a run read or measured. It changes no result, so it is
not part of a run's identity: a finished run is judged again from the figures in its manifest."""


KEPT: dict[str, Any] = {"kept": True}
"""``json_schema_extra`` of a field that is drawn once and then kept with the run. It is not part of a run's identity:
null means what was drawn."""


class Section(BaseModel):
    """A closed, immutable, strictly typed group of settings. Validators reject; they never repair."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


KIND = "kind:"


def tag(kind: type[Section]) -> str:
    """What pydantic calls a kind in a union of several; no key of a config begins so."""
    return f"{KIND}{kind.__name__}"


class ModelSection(Section):
    path: Text = Field("demo:base", description="directory, hub id, or demo:base")
    revision: str | None = Field(None, description="hub revision (branch, tag or commit)")
    dtype: Literal["float32", "bfloat16"] = Field("float32", description="of the frozen base; adapters stay float32")
    quantize: Literal["nf4", "int8"] | None = Field(
        None, description="bits of the frozen base's linear layers (bitsandbytes); dtype is what they compute in"
    )
    chat_template: Literal["chatml", "plain"] | None = Field(
        None, description="named template for a base whose tokenizer has none; recorded in the artifact"
    )
    end_tokens: list[Text] | None = Field(
        None,
        description="tokens that end a response besides the one that the template writes, which is trained and which "
        "rewards read in their place; null: those of the model's generation_config",
    )
    thinking: Thinking = Field(
        "strip",
        description="of models whose template marks thinking in front of answers. strip: rewards and later turns read "
        "the answer without it; keep: it is part of the response, trained and read; off: as strip, and the template is "
        "asked for none",
    )
    template_kwargs: TemplateKwargs = Field(
        default_factory=dict, description="variables that the chat template is given, such as reasoning_effort: low"
    )
    template_date: Day | None = Field(
        None,
        json_schema_extra=KEPT,
        description="YYYY-MM-DD that a template which prints today's date gets instead, in every later stage too; "
        "null: the day on which the chain is started",
    )
    attn_implementation: Literal["eager", "sdpa", "flash_attention_2"] | None = Field(
        None, description="null: what transformers chooses"
    )
    trust_remote_code: bool = Field(False, description="run Python code that comes with the model; needs revision")


class LoraSection(Section):
    r: Count = Field(16, description="rank")
    alpha: Positive = Field(32.0, description="the update is scaled by alpha / r")
    dropout: Annotated[float, Field(ge=0, lt=1)] = Field(0.0, description="on the adapter's input")
    target_modules: Literal["all-linear"] | list[Text] = Field("all-linear", description="layers that get an adapter")
    train_tokens: list[Text] = Field(
        default_factory=list, description="tokens whose embedding rows are trained too, such as an untrained end token"
    )
    use_dora: bool = Field(False, description="weight-decomposed updates (DoRA, https://arxiv.org/abs/2402.09353)")
    use_rslora: bool = Field(
        False, description="scale by alpha / sqrt(r) instead of alpha / r (https://arxiv.org/abs/2312.03732)"
    )


class RoleLoraSection(Section):
    """The adapter of a role that starts from a policy: that policy's, in all but the rank."""

    r: Count | None = Field(
        None, description="rank, which contains the policy's; null: that one, or 16 for a policy without adapter"
    )


FormName = Literal[
    "prompt-completion",
    "prompt-response",
    "messages",
    "sharegpt",
    "alpaca",
    "text",
    "chosen",
    "pair",
    "shared-head",
    "ranking",
    "transcripts",
    "rated",
    "unpaired",
    "prompt",
]


PATHS = "JSONL, JSON array, CSV or TSV (also .gz), parquet, a directory, a hub id, or demo:NAME?size=N&seed=S"


class SourceSection(Section):
    """One place that rows come from."""

    path: Text = Field(description=PATHS)
    name: str | None = Field(None, description="subset of a hub data set")
    split: str | None = Field(None, description="split of a hub data set or saved directory")
    revision: str | None = Field(None, description="hub revision")
    columns: dict[str, str] = Field(default_factory=dict, description="our field name -> the name in the data")
    form: FormName | None = Field(None, description="form of the rows; null: what their fields show")
    limit: Count | None = Field(None, description="read only the first N rows (of each source), for a trial")


class MixtureSource(SourceSection):
    """One source of a mixture."""

    weight: Positive | None = Field(
        None, description="its share of the rows drawn, in proportion to the other weights; all null: every row once"
    )


class DataSection(SourceSection):
    """Rows from one place, or drawn from several."""

    path: Text | None = Field(  # type: ignore[assignment]
        None, description=f"{PATHS}; or mixture"
    )
    mixture: Annotated[list[MixtureSource], Field(min_length=1)] | None = Field(
        None, description="several sources instead of path, each with its weight"
    )
    mixture_rows: Count | None = Field(
        None, description="rows drawn from a mixture with weights; null: as many as its sources hold"
    )
    on_bad_row: Literal["drop", "error"] = Field(
        "drop",
        json_schema_extra=GATE,
        description="a row that cannot be read, or whose responses are equal: drop and count it, or stop",
    )
    max_dropped_fraction: Fraction = Field(
        0.05,
        json_schema_extra=GATE,
        description="share of bad, equal and too long rows together; more dropped rows than this is an error",
    )

    @model_validator(mode="after")
    def _one_place_or_a_mixture(self) -> DataSection:
        if (self.path is None) == (self.mixture is None):
            raise ValueError("give exactly one of path and mixture")
        weights = [source.weight for source in self.mixture or ()]
        if None in weights and any(weights):
            raise ValueError("give every source of a mixture a weight, or none of them")
        if self.mixture_rows and not any(weights):
            raise ValueError("mixture_rows needs a mixture with weights")
        named = [key for key in ("name", "split", "revision", "columns", "form") if self.mixture and getattr(self, key)]
        if named:
            raise ValueError(f"{' and '.join(named)}: set it in each source of the mixture")
        return self

    @property
    def sources(self) -> list[MixtureSource]:
        """Every place that rows come from; ``limit`` holds for each."""
        if self.mixture is None:
            keys = SourceSection.model_fields
            return [MixtureSource.model_validate({key: getattr(self, key) for key in keys})]
        limits = [[limit for limit in (source.limit, self.limit) if limit] for source in self.mixture]
        return [
            source.model_copy(update={"limit": min(limit, default=None)})
            for source, limit in zip(self.mixture, limits, strict=True)
        ]


class OptimSection(Section):
    learning_rate: LearningRate = Field(description="peak learning rate of AdamW")
    weight_decay: NonNegative = Field(0.0, description="decoupled, on every trained parameter")
    warmup_ratio: Fraction = Field(0.0, description="share of the optimizer steps with a linearly rising rate")
    schedule: Literal["constant", "linear", "cosine"] = Field("linear", description="after the warm-up")
    max_grad_norm: Positive = Field(1.0, description="gradient norm is clipped to this, per role")


EngineName = Literal["hf", "continuous"]
CONCURRENCY: Any = Field(64, description="responses sampled at a time")
ENGINE: Any = Field(
    "hf", description="hf: a row's samples depend on no other row; continuous: faster, ended rows leave the batch"
)


class SamplingSection(Section):
    max_new_tokens: Count = Field(64, description="longest response, in tokens")
    temperature: Positive = Field(1.0, description="sampling temperature; logprobs and KL are of the tempered policy")
    concurrency: Count = CONCURRENCY
    engine: EngineName = ENGINE
    stop_tokens: list[Text] = Field(
        default_factory=list,
        description="tokens that end a response too, besides the one that the chat template writes",
    )


class PolicySamplingSection(Section):
    """How a finished policy is sampled: as its own run samples it, where a setting is null."""

    max_new_tokens: Count | None = Field(None, description="longest response, in tokens; null: as the policy's run")
    temperature: Positive | None = Field(None, description="sampling temperature; null: as the policy's run")
    concurrency: Count = CONCURRENCY
    engine: EngineName = ENGINE
    stop_tokens: list[Text] | None = Field(
        None, description="tokens that end a response too; null: as the policy's run"
    )

    @property
    def given(self) -> dict[str, Any]:
        """The settings that are not null."""
        return {key: value for key, value in self if value is not None}

    def of(self, trained: SamplingSection) -> SamplingSection:
        """All settings: those of ``trained`` where these are null."""
        return trained.model_copy(update=self.given)


class RuntimeSection(Section):
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="auto: cuda where there is one")
    threads: Count | None = Field(None, description="CPU threads; null: one for a base below 10 M parameters, else all")
    gradient_checkpointing: bool = Field(False, description="recompute activations in the backward pass to save memory")


class BatchSection(Section):
    """Counted in responses (PPO), demonstrations (SFT) or prompts with all their responses (reward modelling)."""

    batch_size: Count = Field(16, description="rows an optimizer step")
    micro_batch_size: Count = Field(16, description="rows a forward pass; never changes a gradient")


class RewardBatchSection(BatchSection):
    micro_batch_tokens: Count | None = Field(
        None, description="tokens a forward pass, so that it may hold fewer prompts; null: no limit"
    )
