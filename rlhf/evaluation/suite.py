"""Edge cases as a regression test: of a reward, and of policies under a reward."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from rlhf.config.suite_file import CaseSection
from rlhf.errors import Problem, RlhfError
from rlhf.records import Prompt
from rlhf.scoring.scorer import Sample, Scorer

log = logging.getLogger("rlhf")


def examine(cases: Sequence[CaseSection], scorer: Scorer) -> list[dict[str, Any]]:
    """For each case whether every better answer outranks every worse one by more than its margin, the smallest gap
    that was found, and between which answers."""
    samples = [_given(case, text) for case in cases for text in (*case.better, *case.worse)]
    scores = iter(scorer.score(samples).mean.tolist())
    found = []
    for case in cases:
        better = [(next(scores), text) for text in case.better]
        worse = [(next(scores), text) for text in case.worse]
        (low, weakest), (high, strongest) = min(better), max(worse)
        found.append(
            {
                "case": case.name,
                "passed": low - high > case.margin,
                "gap": low - high,
                "margin": case.margin,
                "better": weakest,
                "worse": strongest,
            }
        )
    return found


def prompts(cases: Sequence[CaseSection], where: str) -> list[Prompt]:
    """The prompts of the cases, for a policy to answer."""
    return [Prompt(case.messages, f"{where} ({case.name})") for case in cases]


def policy_outcomes(cases: Sequence[CaseSection], responses: Sequence[Sample], scorer: Scorer) -> list[dict[str, Any]]:
    """For each case whether the policy's own response ended, and outranks every worse answer by more than the margin.

    Args:
        responses: one a case.
    """
    worse = [_given(case, text) for case in cases for text in case.worse]
    scores = scorer.score([*responses, *worse]).mean.tolist()
    own, others = scores[: len(cases)], iter(scores[len(cases) :])
    found = []
    for case, response, score in zip(cases, responses, own, strict=True):
        gap = score - max(next(others) for _ in case.worse)
        passed = response.finished and gap > case.margin
        found.append({"case": case.name, "passed": passed, "gap": gap, "response": response.response})
    return found


def failed(outcomes: Sequence[Mapping[str, Any]]) -> list[str]:
    """The names of the cases that did not pass."""
    return [entry["case"] for entry in outcomes if not entry["passed"]]


def refuse_failed(outcomes: Sequence[Mapping[str, Any]], where: str) -> None:
    """Raise VER002 for each case that did not pass."""
    problems = []
    for entry in outcomes:
        if not entry["passed"]:
            what = f"{entry['better']!r} must outrank {entry['worse']!r} by more than {entry['margin']:g}"
            problems.append(Problem("VER002", f"{where} ({entry['case']})", f"{what}: the gap is {entry['gap']:.3f}."))
    if problems:
        raise RlhfError(*problems)
    if outcomes:
        log.info("%s: all %d edge cases passed.", where, len(outcomes))


def regressions(
    judge: Sequence[Mapping[str, Any]], baseline: Sequence[Mapping[str, Any]], candidate: Sequence[Mapping[str, Any]]
) -> list[str]:
    """Cases that the baseline passes and the candidate does not, among those that the judge itself passes."""
    unfit = {*failed(judge), *failed(baseline)}
    return [name for name in failed(candidate) if name not in unfit]


def _given(case: CaseSection, text: str) -> Sample:
    return Sample(case.messages, text, [], [], True, [])
