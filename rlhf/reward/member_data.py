"""Which prompts each member of an ensemble is trained on."""

from __future__ import annotations

from collections.abc import Sequence

import numpy


def bootstrapped(prompts: Sequence[str], seed: int) -> list[int]:
    """Row numbers of as many prompts as there are, drawn with replacement; a prompt comes with all its rows.

    Args:
        prompts: [N] the prompt of each row.

    Reference: Breiman 1996, Bagging predictors, with prompts in place of rows.
    """
    rows = _rows_by_prompt(prompts)
    drawn = numpy.random.default_rng(seed).integers(0, len(rows), len(rows))
    return [row for index in drawn for row in rows[index]]


def all_but_fold(prompts: Sequence[str], member: int, count: int, seed: int) -> list[int]:
    """Row numbers of all prompts but those of fold ``member`` of ``count``; the folds of one seed are disjoint."""
    rows = _rows_by_prompt(prompts)
    places = numpy.random.default_rng(seed).permutation(len(rows))
    return [row for index, place in enumerate(places) if place % count != member for row in rows[index]]


def _rows_by_prompt(prompts: Sequence[str]) -> list[list[int]]:
    found: dict[str, list[int]] = {}
    for row, prompt in enumerate(prompts):
        found.setdefault(prompt, []).append(row)
    return list(found.values())
