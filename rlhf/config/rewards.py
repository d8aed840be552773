"""What gives responses their scores: a reward run, a model from elsewhere, a Python function, or a service."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal
from urllib.parse import urlsplit

from pydantic import Discriminator, Field, GetCoreSchemaHandler, GetJsonSchemaHandler, Tag, model_validator
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema

from rlhf.config.sections import GATE, Count, Finite, HeadName, NonNegative, Section, TemplateKwargs, Text, tag
from rlhf.config.thinking import Thinking


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

    # Every kind has all keys, so that what is recorded of a run names them all. A kind narrows the key that names it.
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

    useless: ClassVar[Mapping[str, str]] = {}
    """Keys that a kind has no use for, each with the reason."""
    is_learned: ClassVar[bool] = True
    """Whether it is a trained model, so that using it without an examination is worth a warning."""

    @model_validator(mode="after")
    def _is_of_one_kind(self) -> RewardSource:
        given = kind_of({key: getattr(self, key) for key in KINDS})
        if given is RewardSource or given is not type(self):
            raise ValueError("give exactly one of run, runs, model, function and url")
        if mistake := self._mistake():
            raise ValueError(mistake)
        return self

    @model_validator(mode="after")
    def _keys_are_used(self) -> RewardSource:
        for key in CHECKED:
            if getattr(self, key) == RewardSource.model_fields[key].default:
                continue
            if key in self.useless:
                raise ValueError(f"{key} {self.useless[key]}")
            if key == "disagreement_coef" and not self.aggregate.startswith("mean_minus"):
                raise ValueError("disagreement_coef is for aggregate: mean_minus_std or mean_minus_variance")
            if key == "accept" and self.examination is None:
                raise ValueError("accept: failed needs the examination that failed")
        return self

    def _mistake(self) -> str | None:
        """What is wrong with what the kind names."""
        return None

    @property
    def name(self) -> str:
        """What it is called in logs and in the provenance of labels."""
        raise NotImplementedError

    @property
    def short_name(self) -> str:
        """The end of its name, in characters that every tracker takes in the name of a metric."""
        parts = [*self._short_parts(), *([self.head] if self.head else [])]
        return re.sub(r"[^A-Za-z0-9_.-]+", "_", ".".join(parts))

    def _short_parts(self) -> list[str]:
        raise NotImplementedError

    def runs_below(self, key: str) -> dict[str, str]:
        """The reward runs that it names, by their places where the source stands at ``key``."""
        return {}

    @property
    def named_runs(self) -> list[str]:
        """The same without their places."""
        return list(self.runs_below("").values())

    @property
    def compares(self) -> bool:
        """Whether members are compared with each other, and in differences to a reference."""
        return self.aggregate != "mean" and self.reference_samples > 0


def _last_part(path: str) -> str:
    return Path(path).name or Path(path).resolve().name


CHECKED = (
    "standardise_samples",
    "head",
    "aggregate",
    "disagreement_coef",
    "examination",
    "length_calibration",
    "accept",
)
NO_SCALE = {"standardise_samples": "is not for a reward run, which is standardised already"}
NO_MEMBERS = {
    "head": "is for run or runs: nothing else has heads",
    "aggregate": "is for run or runs: nothing else has members",
}
NOT_ONE = "is of one run or one model; nothing else is examined"
NOT_EXAMINED = {"examination": NOT_ONE, "length_calibration": NOT_ONE}


class RunReward(RewardSource):
    """A finished reward run."""

    run: Text
    useless = NO_SCALE

    @property
    def name(self) -> str:
        return self.run

    def _short_parts(self) -> list[str]:
        return [_last_part(self.run)]

    def runs_below(self, key: str) -> dict[str, str]:
        return {key: self.run}


class EnsembleReward(RewardSource):
    """Several reward runs, whose members are one ensemble."""

    runs: Annotated[list[Text], Field(min_length=2)]
    useless: ClassVar[Mapping[str, str]] = {**NO_SCALE, **NOT_EXAMINED}

    @property
    def name(self) -> str:
        return " + ".join(self.runs)

    def _short_parts(self) -> list[str]:
        return [_last_part(run) for run in self.runs]

    def runs_below(self, key: str) -> dict[str, str]:
        return {f"{key}.runs.{index}": run for index, run in enumerate(self.runs)}


class ModelReward(RewardSource):
    """A sequence classifier from elsewhere."""

    model: ClassifierSection
    useless = NO_MEMBERS

    @property
    def name(self) -> str:
        return self.model.path

    def _short_parts(self) -> list[str]:
        return [_last_part(self.model.path)]


class FunctionReward(RewardSource):
    """A Python function."""

    function: Text
    is_learned = False
    useless: ClassVar[Mapping[str, str]] = {**NO_MEMBERS, **NOT_EXAMINED}

    @property
    def name(self) -> str:
        return self.function

    def _short_parts(self) -> list[str]:
        return [self.function.replace(":", ".")]


class ServiceReward(RewardSource):
    """A reward over HTTP."""

    url: Text
    is_learned = False
    useless: ClassVar[Mapping[str, str]] = {**NO_MEMBERS, **NOT_EXAMINED}

    @property
    def name(self) -> str:
        return self.url

    def _short_parts(self) -> list[str]:
        return [urlsplit(self.url).netloc + urlsplit(self.url).path.rstrip("/")]

    def _mistake(self) -> str | None:
        wrong = wrong_url(self.url)
        return f"url {wrong}" if wrong else None


KINDS: dict[str, type[RewardSource]] = {
    "run": RunReward,
    "runs": EnsembleReward,
    "model": ModelReward,
    "function": FunctionReward,
    "url": ServiceReward,
}
"""The key that names a source, and its kind."""


def kind_of(value: Any) -> type[RewardSource]:
    """The kind of a source, by the one key of KINDS that it gives; RewardSource, which refuses it, where there is not
    one."""
    if isinstance(value, RewardSource):
        return type(value)
    given = [key for key in KINDS if isinstance(value, Mapping) and value.get(key) is not None]
    return KINDS[given[0]] if len(given) == 1 else RewardSource


class _WithSchemaOfBase:
    """Every kind has the keys of RewardSource, so that one JSON schema says which there are."""

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        self.base = handler.generate_schema(RewardSource)
        return handler(source)

    def __get_pydantic_json_schema__(self, core_schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        return handler(self.base)


AnyReward = Annotated[
    Annotated[RunReward, Tag(tag(RunReward))]
    | Annotated[EnsembleReward, Tag(tag(EnsembleReward))]
    | Annotated[ModelReward, Tag(tag(ModelReward))]
    | Annotated[FunctionReward, Tag(tag(FunctionReward))]
    | Annotated[ServiceReward, Tag(tag(ServiceReward))]
    | Annotated[RewardSource, Tag(tag(RewardSource))],
    Discriminator(lambda value: tag(kind_of(value))),
    _WithSchemaOfBase(),
]
"""A source as a config names it: by one of its five keys."""


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
