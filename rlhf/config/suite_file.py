"""Edge cases as a file: prompts with answers that must outrank others."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from rlhf.config import load
from rlhf.config.sections import NonNegative, Section, Text
from rlhf.errors import Problem, RlhfError
from rlhf.records import Message, Messages

Texts = Annotated[list[Text], Field(min_length=1)]


class TurnSection(Section):
    role: Literal["system", "user", "assistant"] = Field(description="whose turn")
    content: Text = Field(description="its text")


class CaseSection(Section):
    """One prompt: every answer in ``better`` must score above every one in ``worse``."""

    name: Text = Field(description="by which it is called in reports")
    history: list[TurnSection] = Field(default_factory=list, description="turns before the prompt")
    prompt: Text = Field(description="the user's turn that is answered")
    better: Texts = Field(description="answers that must outrank")
    worse: Texts = Field(description="answers that must be outranked")
    margin: NonNegative = Field(0.0, description="by more than this, in units of the score")

    @model_validator(mode="after")
    def _turns_alternate(self) -> CaseSection:
        turns = self.history[1:] if self.history and self.history[0].role == "system" else self.history
        if len(turns) % 2 or any(turn.role != ("user", "assistant")[i % 2] for i, turn in enumerate(turns)):
            raise ValueError("history: user and assistant must alternate and end with the assistant")
        if shared := set(self.better) & set(self.worse):
            raise ValueError(f"{min(shared)!r} stands in better and in worse")
        return self

    @property
    def messages(self) -> Messages:
        earlier = tuple(Message(turn.role, turn.content) for turn in self.history)
        return (*earlier, Message("user", self.prompt))


class SuiteConfig(Section):
    """A regression test of what rewards or policies must not forget."""

    cases: Annotated[list[CaseSection], Field(min_length=1)] = Field(description="the edge cases")

    @model_validator(mode="after")
    def _names_differ(self) -> SuiteConfig:
        name, count = Counter(case.name for case in self.cases).most_common(1)[0]
        if count > 1:
            raise ValueError(f"{count} cases are called {name!r}")
        return self


def read(path: str | Path) -> list[CaseSection]:
    """The cases of a file.

    Raises:
        RlhfError: CFG001 and others, with the line of each mistake.
    """
    if not Path(path).is_file():
        raise RlhfError(Problem("CFG001", str(path), "no such suite.", "name a YAML file with cases"))
    return load.load(SuiteConfig, Path(path)).cases
