"""``rlhf compare``: two policies on the same prompts, under one reward model or the mean of several."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rlhf import examined, runtime, storage
from rlhf.config.sections import RuntimeSection
from rlhf.config.suite import CaseSection
from rlhf.config.suite import read as read_suite
from rlhf.data import lines, sources
from rlhf.errors import Problem, RlhfError
from rlhf.evaluation import comparison, suite
from rlhf.evaluation.comparison import Side
from rlhf.evaluation.policy import sample_rows
from rlhf.progress import show, table
from rlhf.rollouts.engine import Sampling
from rlhf.scoring.scorer import Sample, Scorer
from rlhf.stages.generate import refuse_other_kinds, sample
from rlhf.stages.scorers import check_names, open_scorer

log = logging.getLogger("rlhf")
REPORT, ROWS = "report.json", "rows.jsonl"


def compare(
    policies: tuple[str, str], prompts: str, rewards: Sequence[str], samples: int, slice_by: Sequence[str],
    template: str | None, how: Sampling, micro_batch_size: int, num_worst: int, num_resamples: int, out: Path | None,
    suite_file: Path | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Sample both policies with the same noise, score all responses, and work out who wins where.

    Args:
        policies: baseline and candidate; one is open at a time, and none while the rewards are.
        slice_by: fields of the prompts' rows; a table for the values of each.
        suite_file: edge cases that both policies answer once, greedily.
        out: directory for ``report.json`` and ``rows.jsonl``, every response with its score.
    """
    cases = read_suite(suite_file) if suite_file else []
    for policy in policies:
        refuse_other_kinds(policy, template)
    check_names(rewards)
    records, fields = lines.load_with(sources.load_prompts, prompts, slice_by)
    repeated = [record.prompt for record in records for _ in range(samples)]
    labels = {field: [value for value in fields[field] for _ in range(samples)] for field in slice_by}
    labels = {"prompt length": comparison.thirds_by_length(repeated), **labels}
    responses = [sample(policy, template, records, samples, how, prompts) for policy in policies]
    asked, greedy = suite.prompts(cases, str(suite_file)), replace(how, temperature=0.0)
    answers = [sample(policy, template, asked, 1, greedy, str(suite_file)) if cases else [] for policy in policies]
    scorer = open_scorer(rewards, runtime.set_up(RuntimeSection(), how.seed), micro_batch_size)
    baseline, candidate = (_scored(scorer, *side) for side in zip(policies, responses, strict=True))
    seed = runtime.derived_seed(how.seed, "resamples")
    found = {
        "rewards": list(rewards),
        "accepted": examined.marks_of(policies),
        **comparison.report(baseline, candidate, labels, seed, num_resamples, num_worst),
    }  # fmt: skip
    if cases:
        found["suite"] = _suite(cases, answers, scorer)
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        storage.write_json(out / REPORT, found)
        lines.write(str(out / ROWS), _rows(baseline, candidate))
    return found


def _suite(cases: Sequence[CaseSection], answers: Sequence[Sequence[Sample]], scorer: Scorer) -> dict[str, Any]:
    judge = suite.examine(cases, scorer)
    baseline, candidate = (suite.policy_outcomes(cases, own, scorer) for own in answers)
    lost = suite.regressions(judge, baseline, candidate)
    return {"judge": judge, "baseline": baseline, "candidate": candidate, "regressions": lost}


def _scored(scorer: Scorer, name: str, responses: Sequence[Any]) -> Side:
    return Side(name, responses, scorer.score(responses).mean.double().numpy())


def _rows(baseline: Side, candidate: Side) -> list[dict[str, Any]]:
    """Baseline's and candidate's response to a prompt one after the other."""
    both = [sample_rows(side.samples, score=side.scores.tolist()) for side in (baseline, candidate)]
    pairs = zip(*both, strict=True)
    return [
        {"policy": role, **row} for pair in pairs for role, row in zip(("baseline", "candidate"), pair, strict=True)
    ]


def refuse_if_worse(found: Mapping[str, Any]) -> None:
    """Raise VER001 where the candidate is worse beyond doubt, VER002 for an edge case that it has lost."""
    name, problems = found["candidate"]["name"], []
    if worse := comparison.is_worse(found):
        what = " and ".join(f"{name.replace('_', ' ')} {_rate(found[name])}" for name in worse)
        problems.append(Problem("VER001", name, f"is worse than {found['baseline']['name']}: {what}."))
    for case in found.get("suite", {}).get("regressions", []):
        problems.append(Problem("VER002", name, f"fails the edge case '{case}', which the baseline passes."))
    if problems:
        raise RlhfError(*problems)


def print_report(found: Mapping[str, Any]) -> None:
    """Tables and the worst regressions, on standard error."""
    a, b = found["baseline"], found["candidate"]
    equal = found["length_controlled_win_rate"]
    difference = found["score_difference"]
    rows = [
        ("prompts, comparisons, ties", f"{found['prompts']}, {found['comparisons']}, {found['ties']}"),
        ("win rate of the candidate", _rate(found["win_rate"])),
        ("at equal length", _rate(equal) if equal else "unknown: every difference in length is the same"),
        ("score, candidate - baseline", _rate(difference, "+.3f")),
        ("score", f"{a['score']:.3f} -> {b['score']:.3f}"),
        ("characters", f"{a['characters']:.0f} -> {b['characters']:.0f}"),
        ("cut off", f"{a['cut_off']} -> {b['cut_off']}"),
    ]
    title, note = f"{a['name']} (baseline) -> {b['name']} (candidate)", "\n".join(found["accepted"])
    show(table(title, ("figure", "value"), rows, note))
    for name, slices in found["slices"].items():
        parts = [
            (entry["slice"], str(entry["prompts"]), _rate(entry["win_rate"]) + (" (few)" if entry["few"] else ""),
             f"{entry['score_difference']:+.3f}")
            for entry in slices
        ]  # fmt: skip
        show(table(f"By {name}", ("slice", "prompts", "win rate", "score difference"), parts))
    if "suite" in found:
        _print_suite(found["suite"])
    for entry in found["worst"]:
        log.info("Lost by %.3f: %s", -entry["score_difference"], entry["prompt"])
        for role in ("baseline", "candidate"):
            own = entry[role]
            cut = "" if own["finished"] else ", cut off"
            log.info("  %-9s (%.3f%s): %s", role, own["score"], cut, json.dumps(own["response"], ensure_ascii=False))


def _print_suite(found: Mapping[str, Any]) -> None:
    outcomes = zip(found["judge"], found["baseline"], found["candidate"], strict=True)
    rows = [(three[0]["case"], *(f"{'passed' if one['passed'] else 'FAILED'} {one['gap']:+.2f}" for one in three))
            for three in outcomes]  # fmt: skip
    show(table("Edge cases", ("case", "judge", "baseline", "candidate"), rows))
    if unfit := suite.failed(found["judge"]):
        log.warning("The reward itself fails %d edge cases and judges no policy by them: %s.", len(unfit),
                    ", ".join(unfit))  # fmt: skip


def _rate(entry: Mapping[str, Any], form: str = ".3f") -> str:
    low, high = entry["ci95"]
    return f"{entry['estimate']:{form}} [{low:{form}}, {high:{form}}]"
