"""Where the figures of a comparison say different things, and why, in one sentence."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

BETTER, WORSE, OPEN = "better", "worse", "not shown to be different"


def sentence(report: Mapping[str, Any]) -> str | None:
    """None where the figures agree.

    They contradict each other where win rate and score difference say opposite things, each with the whole of its
    interval; and where without the responses that were cut off the win rate says something else, or the score the
    opposite. Failing that, length explains a win rate that at equal length no longer says what it says.
    """
    rate, difference = report["win_rate"], report["score_difference"]
    by_rate, by_score = verdict(rate, 0.5), verdict(difference, 0.0)
    cut_off = report["baseline"]["cut_off"] + report["candidate"]["cut_off"]
    is_opposite = {by_rate, by_score} == {BETTER, WORSE}
    parts = []
    if is_opposite:
        parts.append(
            f"the candidate is {by_rate} by the win rate, {shown(rate)}, and {by_score} by the score, "
            f"{shown(difference, '+.3f')}"
        )
    rate_without, score_without = _without_cut_off(report)
    if cut_off and (is_opposite or rate_without != by_rate or {by_score, score_without} == {BETTER, WORSE}):
        parts.append(_of_cut_off(report))
    if parts:
        return f"The figures contradict each other: {'; '.join(parts)}."
    equal = report["length_controlled_win_rate"]
    if equal and by_rate != OPEN and verdict(equal, 0.5) != by_rate:
        return (
            f"Length explains the win rate: it is {shown(rate)}, but {shown(equal)} at equal length, which says that "
            f"the candidate is {verdict(equal, 0.5)}."
        )
    return None


def verdict(figure: Mapping[str, Any], neutral: float) -> str:
    """What the whole interval says of the candidate."""
    low, high = figure["ci95"]
    return BETTER if low > neutral else WORSE if high < neutral else OPEN


def shown(figure: Mapping[str, Any], form: str = ".3f") -> str:
    """The estimate with its interval."""
    low, high = figure["ci95"]
    return f"{figure['estimate']:{form}} [{low:{form}}, {high:{form}}]"


def _without_cut_off(report: Mapping[str, Any]) -> tuple[str, str]:
    """What win rate and score difference say where both responses ended; a few prompts of many show nothing."""
    ended = report["both_ended"]
    if not ended["comparisons"] or (ended["few"] and not report["few"]):
        return OPEN, OPEN
    return verdict(ended["win_rate"], 0.5), verdict(ended["score_difference"], 0.0)


def _of_cut_off(report: Mapping[str, Any]) -> str:
    """How many responses were cut off, what the win rate makes of them, and the figures without them."""
    parts = []
    for role in ("baseline", "candidate"):
        side = report[role]
        limit = side["sampling"].get("max_new_tokens")
        at = f" (max_new_tokens {limit})" if limit and side["cut_off"] else ""
        parts.append(f"{side['cut_off']} of {report['comparisons']} responses of the {role}{at}")
    ended = report["both_ended"]
    text = f"{' and '.join(parts)} were cut off, and each counts as lost to one that ended; "
    if not ended["comparisons"]:
        return f"{text}there is no comparison in which both ended"
    only = "only " if ended["few"] else ""
    return (
        f"{text}in the {only}{ended['comparisons']} comparisons in which both ended the win rate is "
        f"{shown(ended['win_rate'])} and the score difference {shown(ended['score_difference'], '+.3f')}"
    )
