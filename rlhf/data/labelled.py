"""Responses with a label of their own, good or bad, and the comparisons that they give."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rlhf.data.records import Comparison, Judgement, Messages, prompt_key
from rlhf.data.rows import EqualResponses


@dataclass(frozen=True)
class Labelled:
    """A response that is good or bad, without one to compare it with: see ``compared``."""

    prompt: Messages
    response: str
    good: bool
    where: str


def compared(labelled: Sequence[Labelled]) -> tuple[list[Comparison], int, list[tuple[str, EqualResponses]]]:
    """Comparisons of the good with the bad responses to one prompt; how many rows have none; what is equal.

    Two responses with the same label are not compared. A prompt whose responses are all good, or all bad, holds no
    preference.
    """
    groups: dict[str, list[Labelled]] = {}
    for item in labelled:
        groups.setdefault(prompt_key(item.prompt), []).append(item)
    found, alone = [], 0
    equal: list[tuple[str, EqualResponses]] = []
    for group in groups.values():
        good = [index for index, item in enumerate(group) if item.good]
        bad = [index for index, item in enumerate(group) if not item.good]
        texts = tuple(item.response for item in group)
        if not good or not bad:
            alone += len(group)
        elif {texts[index] for index in good} & {texts[index] for index in bad}:
            equal += [(item.where, EqualResponses("'completion': labelled good and bad.")) for item in group]
        else:
            judgements = tuple(Judgement(first, second) for first in good for second in bad)
            found.append(Comparison(group[0].prompt, texts, judgements, group[0].where))
    return found, alone, equal
