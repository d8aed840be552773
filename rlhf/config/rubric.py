"""A labelling rubric: by which criteria responses are judged, what each means, and what it weighs."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Annotated

from pydantic import Field, model_validator

from rlhf.config import load
from rlhf.config.sections import Finite, HeadName, Section, Text
from rlhf.config.train_rm import COMBINED, RewardConfig
from rlhf.errors import Problem, RlhfError


class CriterionSection(Section):
    name: HeadName = Field(description="by which labels and heads are called")
    weight: Finite = Field(1.0, description="factor of its head in the score")
    description: Text = Field(description="what a labeller is told")


class RubricConfig(Section):
    """What people, or another model, were asked to judge by."""

    name: Text = Field(description="by which it is called in reports")
    description: Text | None = Field(None, description="what holds for all criteria")
    criteria: Annotated[list[CriterionSection], Field(min_length=1)] = Field(description="each is a head")

    @model_validator(mode="after")
    def _names_differ(self) -> RubricConfig:
        name, count = Counter(criterion.name for criterion in self.criteria).most_common(1)[0]
        if count > 1:
            raise ValueError(f"{count} criteria are called {name!r}")
        return self

    @property
    def weights(self) -> dict[str, float]:
        """Name -> weight, in the order of the file."""
        return {criterion.name: criterion.weight for criterion in self.criteria}


def read(path: str | Path) -> RubricConfig:
    """A rubric from its file.

    Raises:
        RlhfError: CFG001 and others, with the line of each mistake.
    """
    if not Path(path).is_file():
        raise RlhfError(Problem("CFG001", str(path), "no such rubric.", "name a YAML file with name and criteria"))
    return load.load(RubricConfig, Path(path))


def heads_of(config: RewardConfig) -> dict[str, float]:
    """Name -> weight of each head, in the order of the columns; empty for a model of one score.

    Raises:
        RlhfError: CFG033 for heads that are no criteria of the rubric, or that cannot be combined; as ``read``.
    """
    weights = read(config.rubric).weights if config.rubric else {}
    if isinstance(config.heads, list):
        found = {name: weights.get(name, 1.0) for name in config.heads}
    else:
        found = dict(sorted(config.heads.items())) if config.heads else weights
    problems = [
        Problem("CFG033", f"heads: {name}", f"no criterion of {config.rubric}.", f"one of {', '.join(weights)}")
        for name in found
        if config.rubric and name not in weights
    ]
    if len(found) > 1 and COMBINED in found:
        what = f"{COMBINED!r} is what the combination of several heads is called."
        problems.append(Problem("CFG033", f"rubric: {config.rubric}", what, "call the criterion otherwise"))
    if len(found) == 1 and config.combine != "weights":
        what = f"{config.combine} is for two heads or more, and there is one."
        problems.append(Problem("CFG033", "combine", what, "combine: weights"))
    if found and config.combine == "weights" and not any(found.values()):
        problems.append(Problem("CFG033", "heads", "every weight is 0.", "a weight for at least one"))
    if problems:
        raise RlhfError(*problems)
    return found


def lines(rubric: RubricConfig) -> list[str]:
    """For a report: each criterion with its weight and its description."""
    return [f"{one.name} ({one.weight:g}): {' '.join(one.description.split())}" for one in rubric.criteria]
