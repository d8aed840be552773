"""What ``init`` was asked for and what it measured of a model and of rows; everything that it chooses follows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from rlhf.config.sections import DataSection
from rlhf.records import Comparison, Demonstration, Prompt


@dataclass(frozen=True)
class Options:
    """What a person set on the command line besides data and model.

    Args:
        columns: our field name -> the name in the files that have such a column.
        limit: rows that are read of each file.
        max_length: the longest row; a longer one is left out, however many there are.
        max_dropped_fraction: the share of a file's rows that may be left out.
    """

    columns: Mapping[str, str] = field(default_factory=dict)
    limit: int | None = None
    max_length: int | None = None
    max_dropped_fraction: float = DataSection.model_fields["max_dropped_fraction"].default


@dataclass(frozen=True)
class ModelFacts:
    """A base as its config and tokenizer describe it.

    Args:
        template: the named template that it needs; None where the tokenizer has one of its own.
        ends: the tokens that the model itself ends a text with, by tokenizer and generation config.
        marks: special tokens that a rendered conversation holds, the end token among them.
        untrained: those of ``marks`` whose embedding row looks like that of a token never seen in pretraining;
            None where the weights are not here to be looked at.
        is_initialised: the embeddings, where they are here, look as they were drawn at random.
        bos: what is so of the token at the beginning, in words.
    """

    path: str
    num_parameters: int
    context_length: int | None
    template: str | None
    end_token: str
    pad_token: str | None
    ends: tuple[str, ...]
    marks: tuple[str, ...]
    untrained: tuple[str, ...] | None
    is_initialised: bool
    bos: str

    @property
    def is_instruct(self) -> bool:
        """It came with a template, and ends by itself where the template ends a turn, with a token that it learnt."""
        if self.is_initialised:
            return False
        return self.template is None and self.end_token in self.ends and self.end_token not in (self.untrained or ())


@dataclass(frozen=True)
class Rows:
    """The rows of all files, by what they are."""

    demonstrations: tuple[Demonstration, ...]
    comparisons: tuple[Comparison, ...]
    prompts: tuple[Prompt, ...]


@dataclass(frozen=True)
class Tokens:
    """Tokens of one row: its prompt, its best response and its longest one. A response includes its end token."""

    prompt: int
    best: int
    longest: int

    @property
    def whole(self) -> int:
        return self.prompt + self.longest


@dataclass(frozen=True)
class Lengths:
    """Tokens of each row of one part, in order: the whole row as its stage reads it, its prompt, its best response."""

    whole: tuple[int, ...]
    prompt: tuple[int, ...]
    response: tuple[int, ...]


@dataclass(frozen=True)
class Limit:
    """The longest row that is used, in tokens.

    Args:
        note: why it is this one, where it is not just the longest row.
        is_given: a person set it.
    """

    tokens: int
    note: str = ""
    is_given: bool = False
