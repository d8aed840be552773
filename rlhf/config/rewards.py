"""What gives responses their scores: a reward run, a model from elsewhere, a Python function, or a service."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal
from urllib.parse import urlsplit

from pydantic import Field, model_validator

from rlhf.config.sections import GATE, Count, Finite, HeadName, NonNegative, Section, TemplateKwargs, Text
from rlhf.data.thinking import Thinking


class ClassifierSection(Section):
    """A sequence classifier from elsewhere: any base, any tokenizer, an encoder too."""

    path: Text = Field(description="directory or hub id of an AutoModelForSequenceClassification")
    revision: str | None = Field(None, description="hub revision (branch, tag or commit)")
    dtype: Literal["float32", "bfloat16"] = Field("float32", description="of its weights")
    label: Text | Annotated[int, Field(ge=0)] | None = Field(
        None, description="label (name or number) whose logit is the score; null: the only one"
    )
    chat_template: Literal["chatml", "plain"] | None = Field(
        None, description="named template for a tokenizer that has none; an encoder reads prompt and response as a pair"
    )
    thinking: Thinking = Field(
        "strip",
        description="what it reads of an answer with thinking in <think> marks. strip: the answer alone; keep: all of "
        "it; off: as strip, and its template is asked for none",
    )
    template_kwargs: TemplateKwargs = Field(
        default_factory=dict, description="variables that its chat template is given"
    )
    max_length: Count | None = Field(None, description="tokens that it reads; null: what its config says")
    too_long: Literal["error", "cut_prompt"] = Field(
        "error", description="stop at a longer conversation, or leave out the beginning of its prompt and say so"
    )
    trust_remote_code: bool = Field(False, description="run Python code that comes with the model; needs revision")


class RewardSource(Section):
    """One term of the reward: exactly one of a reward run, several of them, a model from elsewhere, a function or
    a service."""

    run: Text | None = Field(None, description="a finished reward run; on another base it is loaded beside the policy")
    runs: Annotated[list[Text], Field(min_length=2)] | None = Field(
        None, description="several reward runs, also on other bases, whose members are one ensemble"
    )
    head: HeadName | None = Field(
        None, description="of a reward run with several heads, the one that scores; null: what they are combined to"
    )
    aggregate: Literal["mean", "min", "mean_minus_std", "mean_minus_variance"] = Field(
        "mean", description="how the standardised scores of an ensemble's members become one"
    )
    disagreement_coef: NonNegative = Field(
        0.5, description="weight of the members' disagreement in mean_minus_std and mean_minus_variance"
    )
    reference_samples: Annotated[int, Field(ge=0)] = Field(
        2, description="SFT answers to each prompt that members' scores are compared relative to; 0: as they stand"
    )
    model: ClassifierSection | None = Field(None, description="a sequence classifier from elsewhere")
    function: Text | None = Field(None, description="module:function (prompts, responses -> floats)")
    url: Text | None = Field(None, description="http://HOST:PORT of an rlhf serve; its token is RLHF_SERVICE_TOKEN")
    weight: Finite = Field(1.0, description="factor of this term in the sum")
    standardise_samples: Annotated[int, Field(ge=2)] | None = Field(
        None,
        description="SFT samples that set shift and scale of scores that are no run's; null: as they are",
    )
    examination: Text | None = Field(
        None,
        json_schema_extra=GATE,
        description="finished eval-rm run of this very reward; its failure stops PPO",
    )
    length_calibration: Text | None = Field(
        None, description="finished eval-rm run of this very reward; what it found length to be paid for is taken off"
    )
    accept: Literal["failed"] | None = Field(
        None, json_schema_extra=GATE, description="failed: go on with a reward whose examination failed"
    )

    @model_validator(mode="after")
    def _one_source(self) -> RewardSource:
        if sum(source is not None for source in (self.run, self.runs, self.model, self.function, self.url)) != 1:
            raise ValueError("give exactly one of run, runs, model, function and url")
        if self.url is not None and (wrong := wrong_url(self.url)):
            raise ValueError(f"url {wrong}")
        is_run = self.run is not None or self.runs is not None
        if is_run and self.standardise_samples is not None:
            raise ValueError("standardise_samples is not for a reward run, which is standardised already")
        if not is_run and self.head is not None:
            raise ValueError("head is for run or runs: nothing else has heads")
        if not is_run and self.aggregate != "mean":
            raise ValueError("aggregate is for run or runs: nothing else has members")
        default = RewardSource.model_fields["disagreement_coef"].default
        if self.disagreement_coef != default and not self.aggregate.startswith("mean_minus"):
            raise ValueError("disagreement_coef is for aggregate: mean_minus_std or mean_minus_variance")
        if self.examination is not None and self.run is None and self.model is None:
            raise ValueError("examination is of one run or one model; nothing else is examined")
        if self.length_calibration is not None and self.run is None and self.model is None:
            raise ValueError("length_calibration is of one run or one model; nothing else is examined")
        if self.accept and self.examination is None:
            raise ValueError("accept: failed needs the examination that failed")
        return self

    @property
    def compares(self) -> bool:
        """Whether members are compared with each other, and in differences to a reference."""
        return self.aggregate != "mean" and self.reference_samples > 0

    @property
    def name(self) -> str:
        """What it is called in logs and in the provenance of labels."""
        named = self.model.path if self.model else " + ".join(self.runs or ())
        return self.run or self.function or self.url or named

    @property
    def short_name(self) -> str:
        """The end of its name, in characters that every tracker takes in the name of a metric."""
        if self.url:
            parts = [urlsplit(self.url).netloc + urlsplit(self.url).path.rstrip("/")]
        elif self.function:
            parts = [self.function.replace(":", ".")]
        else:
            paths = [self.model.path] if self.model else [self.run] if self.run else self.runs or []
            parts = [Path(path).name or Path(path).resolve().name for path in paths]
        return re.sub(r"[^A-Za-z0-9_.-]+", "_", ".".join([*parts, *([self.head] if self.head else [])]))


def term_names(sources: Sequence[RewardSource]) -> list[str]:
    """Short names of the terms of a reward, no two alike: where two would be, each ends with its place in the list."""
    names = [source.short_name for source in sources]
    numbered = [f"{name}.{index}" if names.count(name) > 1 else name for index, name in enumerate(names)]
    if len(set(numbered)) == len(numbered):
        return numbered
    return [f"{name}.{index}" for index, name in enumerate(names)]


def wrong_url(url: str) -> str | None:
    """Why the address of a service is none; None for one that could be."""
    try:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.port == 0:
            return "must be http://HOST:PORT or https://HOST:PORT"
    except ValueError as error:
        return f"is no address: {error}"
    if parts.username is not None or parts.password is not None:
        return "must hold no user or password: RLHF_SERVICE_TOKEN in the environment"
    return "must have neither query nor fragment" if parts.query or parts.fragment else None
