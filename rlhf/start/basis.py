"""What all stages of a chain have in common: the model, the parts with their lengths, and the length of an answer."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from rlhf.start import choose
from rlhf.start.choose import Size
from rlhf.start.facts import Lengths, Limit, ModelFacts
from rlhf.start.parts import Parts
from rlhf.start.render import Choice

LONG_PROMPT = 0.95  # the quantile of the prompts behind which the context holds an answer


@dataclass(frozen=True)
class Basis:
    """What all stages have in common."""

    model: ModelFacts
    parts: Parts
    lengths: dict[str, Lengths]
    limit: Limit
    last_only: bool
    new_tokens: int

    @property
    def size(self) -> Size:
        return choose.size_of(self.model.num_parameters)

    @property
    def as_it_is(self) -> bool:
        """Whether SFT is left out: the model answers already, and nothing was said of how it should."""
        return self.model.is_instruct and not self.parts.demonstrated

    @property
    def has_length_to_learn(self) -> bool:
        """Whether the model has a length of its own, and SFT is to teach it that of the data."""
        return self.model.is_instruct and not self.as_it_is

    @property
    def share_that_fits(self) -> float:
        """Of the answers in the data, those that ``max_new_tokens`` holds."""
        return choose.share_that_fits(self.lengths["sft"].response, self.new_tokens)

    @property
    def runtime(self) -> dict[str, Any]:
        why = "activations are computed again in the backward pass: a third more time, a tenth of the memory"
        return {"runtime": {"gradient_checkpointing": Choice(True, why)}} if self.size.is_large else {}

    @property
    def sampling(self) -> dict[str, Any]:
        answers = self.lengths["sft"].response
        usual = choose.quantile(answers, choose.QUANTILE)
        wanted, why = choose.SLACK * usual, f"1.5 times the {choose.QUANTILE} quantile of the answers, {usual} tokens"
        if self.as_it_is:
            wanted = max(wanted, choose.LEAST_OWN)
            why = f"the model answers at its own length, which {choose.LEAST_OWN} tokens mostly hold"
        elif self.has_length_to_learn:
            why += "; an instruct model answers at its own length until SFT has taught it this one"
        if self.new_tokens < wanted:
            why += "; no more than 1,024, half of the context, and what the context holds behind a long prompt"
        found = {"max_new_tokens": Choice(self.new_tokens, why), "temperature": Choice(1.0, "the same in all stages")}
        if self.size.tokens < choose.SIZES[0].tokens:
            found["concurrency"] = Choice(32, "answers sampled at a time; fewer take less memory for keys and values")
        return found


def basis(model: ModelFacts, parts: Parts, lengths: dict[str, Lengths], limit: Limit, last_only: bool) -> Basis:
    """Preferences teach the last turn alone: nobody preferred the earlier ones."""
    found = Basis(model, parts, lengths, limit, last_only or not parts.demonstrated, 0)
    prompts = [lengths[part].prompt for part in ("sft", "ppo") if lengths[part].prompt]
    long = max(choose.quantile(some, LONG_PROMPT) for some in prompts)
    tokens = choose.new_tokens(lengths["sft"].response, long, model.context_length, found.as_it_is)
    return replace(found, new_tokens=tokens)
