"""How a reward model orders the responses of ranked lists, prompt by prompt."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy

from rlhf.data.labels import levels
from rlhf.data.tokenised import Group
from rlhf.evaluation import figures
from rlhf.evaluation.figures import FigureSettings
from rlhf.metrics import intervals, ranking
from rlhf.records import prompt_key
from rlhf.scoring.scorer import Scores

FEWEST = 3


def report(groups: Sequence[Group], scores: Scores, settings: FigureSettings) -> dict[str, Any] | None:
    """Kendall's tau-b and NDCG, each a mean over the lists of three and more responses, with a 95 % interval over
    prompts; None where all rows are pairs.

    A list's grades are its ratings where it has them, else how many responses each is ranked above or beside (the
    levels of its ranking). Gains are grades minus the list's lowest, so that the worst response is worth nothing and
    the origin of a scale means nothing. Lists that rank only some of their responses, and those in which a figure has
    no value (all grades or all scores equal), are left out of it and counted.

    Args:
        scores: of all responses, in the order of the groups.
    """
    values = scores.mean.double().cpu().split([len(group.responses) for group in groups])
    lists = [(group, own.numpy()) for group, own in zip(groups, values, strict=True) if len(group.responses) >= FEWEST]
    if not lists:
        return None
    graded = [(group, grades, own) for group, own in lists if (grades := grades_of(group)) is not None]
    keys = [prompt_key(group.record.prompt) for group, _, _ in graded]
    taus = [ranking.kendall_tau_b(grades, own) for _, grades, own in graded]
    gains = [ranking.ndcg(grades - grades.min(), own) for _, grades, own in graded]
    return {
        "lists": len(lists),
        "without_whole_ranking": len(lists) - len(graded),
        "by_ratings": sum(group.record.ratings is not None for group, _, _ in graded),
        "kendall_tau_b": _mean(taus, keys, settings),
        "ndcg": _mean(gains, keys, settings),
    }


def grades_of(group: Group) -> numpy.ndarray | None:
    """[K] overall grades of a group's responses, higher is better; None where it ranks only some of them."""
    if group.record.ratings is not None:
        return numpy.array(group.record.ratings, dtype=float)
    ahead = levels(group.record.of(None), len(group.responses))
    return None if ahead is None else len(ahead) - 1 - numpy.array(ahead, dtype=float)


def _mean(values: Sequence[float], keys: Sequence[str], settings: FigureSettings) -> dict[str, Any] | None:
    """With the number of lists that it is of; None where no list has a value."""
    known = [(value, key) for value, key in zip(values, keys, strict=True) if not numpy.isnan(value)]
    if not known:
        return None
    found = intervals.grouped_bootstrap(
        [value for value, _ in known],
        [key for _, key in known],
        num_resamples=settings.num_resamples,
        seed=settings.seed,
    )
    return {**(figures.interval(found) or {}), "lists": len(known)}
