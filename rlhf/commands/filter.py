"""``rlhf filter``: the rows of a data set of responses that are worth training on, and a count of all others."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rlhf.commands.score import read, scored_rows
from rlhf.commands.scorers import check_names, open_scorer
from rlhf.config.sections import RuntimeSection
from rlhf.data import lines
from rlhf.data.duplicates import near_duplicates
from rlhf.data.selection import best_share, length_outliers
from rlhf.errors import Problem, RlhfError
from rlhf.records import plain_text
from rlhf.runs import runtime
from rlhf.scoring.scorer import Sample, Scores

log = logging.getLogger("rlhf")


@dataclass(frozen=True)
class Rules:
    """What drops a row, in this order; None: nothing does.

    Args:
        near_duplicates: overlap in word triples with a better row (an earlier one, without a reward).
        length_outliers: robust standard deviations of the log length of responses.
        max_disagreement: standard deviation of the scores of several rewards, or of an ensemble's members; with one
            response a prompt there is no reference, and the constant that each leaves free is in it.
        min_score: what a row's score must reach.
        keep_share: of the rows that are left; the best are kept.
    """

    near_duplicates: float | None = None
    length_outliers: float | None = None
    max_disagreement: float | None = None
    min_score: float | None = None
    keep_share: float | None = None

    @property
    def of_scores(self) -> dict[str, float | None]:
        return {
            "--max-disagreement": self.max_disagreement,
            "--min-score": self.min_score,
            "--keep-share": self.keep_share,
        }


def filter_rows(data: str, rewards: Sequence[str], rules: Rules, micro_batch_size: int, out: str) -> dict[str, Any]:
    """Write the rows that are kept, in their order and with their scores; return the counts.

    Raises:
        RlhfError: CFG040 for a rule that needs a reward without one, or no rule; DAT013 where no row is left.
    """
    _check(rewards, rules)
    check_names(rewards)
    samples = [one.sample() for one in read(data)]
    scores = None
    if rewards:
        scorer = open_scorer(rewards, runtime.set_up(RuntimeSection(), 0), micro_batch_size)
        scores = scorer.score(samples)
    kept, dropped = select(samples, scores, rules)
    counts = {"rows": len(samples), "dropped": dropped, "kept": len(kept)}
    log.info("%s", sentence(counts))
    if not kept:
        raise RlhfError(Problem("DAT013", data, f"no rows left of {len(samples)}.", "weaker rules"))
    rows = scored_rows(samples, scores) if scores else [_plain(sample) for sample in samples]
    lines.write(out, (rows[index] for index in kept))
    return counts


def select(samples: Sequence[Sample], scores: Scores | None, rules: Rules) -> tuple[list[int], dict[str, int]]:
    """Rows that are kept, in their order, and how many each rule dropped; so is what was cut off or has no text.

    Raises:
        RlhfError: CFG040 for ``max_disagreement`` where the reward has no members.
    """
    left = list(range(len(samples)))
    dropped: dict[str, int] = {}
    values = scores.mean.tolist() if scores else [0.0] * len(samples)

    def drop(reason: str, rows: set[int]) -> None:
        dropped[reason] = len(rows)
        left[:] = [row for row in left if row not in rows]

    for reason, bad in (
        ("cut off", {row for row in left if not samples[row].finished}),
        ("empty", {row for row in left if samples[row].finished and samples[row].is_empty}),
    ):
        if bad:
            drop(reason, bad)
    if rules.near_duplicates is not None:
        texts = [f"{plain_text(sample.prompt)}\n{sample.response}" for sample in samples]
        better_first = sorted(left, key=lambda row: (-values[row], row))
        drop("near-duplicates", set(near_duplicates(texts, rules.near_duplicates, better_first)))
    if rules.length_outliers is not None and left:
        found = length_outliers([len(samples[row].response) for row in left], rules.length_outliers)
        drop("length outliers", {left[place] for place in found})
    if rules.max_disagreement is not None:
        if scores is None or scores.members is None:
            raise RlhfError(Problem("CFG040", "--max-disagreement", "one reward without members cannot disagree."))
        spread = scores.members.double().std(1, correction=0)
        drop("rewards disagree", {row for row in left if float(spread[row]) > rules.max_disagreement})
    if rules.min_score is not None:
        drop(f"score below {rules.min_score:g}", {row for row in left if values[row] < rules.min_score})
    if rules.keep_share is not None and left:
        best = best_share([values[row] for row in left], rules.keep_share)
        drop(f"not in the best {rules.keep_share:g}", {row for place, row in enumerate(left) if place not in best})
    return left, dropped


def sentence(counts: dict[str, Any]) -> str:
    """The counts in words."""
    parts = [f"{count} dropped: {reason}" for reason, count in counts["dropped"].items()]
    return f"{counts['rows']} rows; {'; '.join(parts)}; {counts['kept']} kept."


def _check(rewards: Sequence[str], rules: Rules) -> None:
    named = [name for name, value in rules.of_scores.items() if value is not None]
    if named and not rewards:
        raise RlhfError(Problem("CFG040", named[0], "needs scores.", "--reward"))
    if rewards and not named and rules.near_duplicates is None:
        raise RlhfError(Problem("CFG040", "--reward", "no rule uses its scores.", "--keep-share or --min-score"))
    if rules == Rules():
        fix = "--keep-share, --min-score, --near-duplicates or --length-outliers"
        raise RlhfError(Problem("CFG040", "rlhf filter", "no rule is given.", fix))


def _plain(sample: Sample) -> dict[str, Any]:
    prompt = [{"role": message.role, "content": message.content} for message in sample.prompt]
    return {"prompt": prompt, "response": sample.response}
