"""What ``init`` measured of a model and of the rows of a part; everything that is chosen follows from it."""

from __future__ import annotations

from dataclasses import dataclass

from rlhf.data.records import Comparison, Demonstration, Prompt

FORMS = ("demonstrations", "preferences", "rankings", "ratings", "prompts")


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
    """The rows of all files, by what they are; ``counts`` has a line for each file."""

    demonstrations: tuple[Demonstration, ...]
    comparisons: tuple[Comparison, ...]
    prompts: tuple[Prompt, ...]
    counts: tuple[str, ...]


@dataclass(frozen=True)
class Lengths:
    """Tokens of each row of one part, in order: the whole row (the longer response), its prompt, its best response."""

    whole: tuple[int, ...]
    prompt: tuple[int, ...]
    response: tuple[int, ...]
