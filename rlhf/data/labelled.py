"""Responses with a label of their own, good or bad, and the comparisons that they give."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rlhf.data.rows import EqualResponses
from rlhf.records import Comparison, Judgement, Messages, prompt_key


@dataclass(frozen=True)
class Labelled:
    """A response that is good or bad, without one to compare it with: see ``compared``."""

    prompt: Messages
    response: str
    good: bool
    where: str
    joined: bool = False


def rated(labelled: Sequence[Labelled]) -> tuple[list[Comparison], list[tuple[str, EqualResponses]]]:
    """All responses to one prompt as one record, rated 1 where good and 0 where bad, and compared good with bad; what
    is equal. A prompt whose responses are all alike says something too: how good they are."""
    found, _, equal = _grouped(labelled, alone_too=True)
    return found, equal


def compared(labelled: Sequence[Labelled]) -> tuple[list[Comparison], list[str], list[tuple[str, EqualResponses]]]:
    """Comparisons of the good with the bad responses to one prompt; the places of rows without one; what is equal.

    Two responses with the same label are not compared. A prompt whose responses are all good, or all bad, holds no
    preference.
    """
    return _grouped(labelled, alone_too=False)


def _grouped(
    labelled: Sequence[Labelled], alone_too: bool
) -> tuple[list[Comparison], list[str], list[tuple[str, EqualResponses]]]:
    groups: dict[str, list[Labelled]] = {}
    for item in labelled:
        groups.setdefault(prompt_key(item.prompt), []).append(item)
    found: list[Comparison] = []
    alone: list[str] = []
    equal: list[tuple[str, EqualResponses]] = []
    for group in groups.values():
        good = [index for index, item in enumerate(group) if item.good]
        bad = [index for index, item in enumerate(group) if not item.good]
        texts = tuple(item.response for item in group)
        if not (good and bad) and not alone_too:
            alone += [item.where for item in group]
        elif {texts[index] for index in good} & {texts[index] for index in bad}:
            equal += [(item.where, EqualResponses("'completion': labelled good and bad.")) for item in group]
        else:
            judgements = tuple(Judgement(first, second) for first in good for second in bad)
            ratings = tuple(float(item.good) for item in group) if alone_too else None
            joined = any(item.joined for item in group)
            found.append(
                Comparison(
                    group[0].prompt, texts, judgements, group[0].where, ratings, joined=joined, num_rows=len(group)
                )
            )
    return found, alone, equal
