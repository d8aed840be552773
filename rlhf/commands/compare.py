"""``rlhf compare``: two policies on the same prompts, under one reward model or the mean of several."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rlhf.commands.generate import own_sampling, refuse_other_kinds, sample, settle
from rlhf.commands.scorers import check_names, open_scorer
from rlhf.config.sections import RuntimeSection
from rlhf.config.suite_file import CaseSection
from rlhf.config.suite_file import read as read_suite
from rlhf.data import lines, sources
from rlhf.errors import Problem, RlhfError
from rlhf.evaluation import comparison, suite
from rlhf.evaluation.comparison import Side
from rlhf.evaluation.contradictions import shown
from rlhf.evaluation.policy_samples import sample_rows
from rlhf.preflight import examined
from rlhf.rollouts.engine import Sampling
from rlhf.runs import runtime, storage
from rlhf.runs.policy_sampling import Asked, Own
from rlhf.runs.progress import show, table
from rlhf.scoring.scorer import Sample, Scorer

log = logging.getLogger("rlhf")
REPORT, ROWS = "report.json", "rows.jsonl"
FLAGS = {"max_new_tokens": "--max-new-tokens", "temperature": "--temperature", "stop_tokens": "--stop-token"}


@dataclass(frozen=True)
class Options:
    """How two policies are compared.

    Args:
        samples: responses a prompt of each.
        slice_by: fields of the prompts' rows; a table for the values of each.
        template: named template for a policy whose tokenizer has none.
    """

    samples: int
    slice_by: Sequence[str]
    template: str | None
    asked: Asked
    micro_batch_size: int
    num_worst: int
    num_resamples: int


def compare(
    policies: tuple[str, str],
    prompts: str,
    rewards: Sequence[str],
    options: Options,
    out: Path | None,
    suite_file: Path | None = None,
) -> dict[str, Any]:
    """Sample both policies with the same noise, each as its run does, score all responses, and work out who wins where.

    Args:
        policies: baseline and candidate; one is open at a time, and none while the rewards are.
        suite_file: edge cases that both policies answer once, greedily.
        out: directory for ``report.json`` and ``rows.jsonl``, every response with its score.
    """
    cases = read_suite(suite_file) if suite_file else []
    for policy in policies:
        refuse_other_kinds(policy, options.template)
    hows = settle_both(policies, options.asked)
    check_names(rewards)
    records, fields = lines.load_with(sources.load_prompts, prompts, options.slice_by)
    repeated = [record.prompt for record in records for _ in range(options.samples)]
    labels = {field: [value for value in fields[field] for _ in range(options.samples)] for field in options.slice_by}
    labels = {"prompt length": comparison.thirds_by_length(repeated), **labels}
    both = list(zip(policies, hows, strict=True))
    responses = [sample(policy, options.template, records, options.samples, how, prompts) for policy, how in both]
    questions = suite.prompts(cases, str(suite_file))
    answers = [
        sample(policy, options.template, questions, 1, replace(how, temperature=0.0), str(suite_file)) if cases else []
        for policy, how in both
    ]
    scorer = open_scorer(rewards, runtime.set_up(RuntimeSection(), options.asked.seed), options.micro_batch_size)
    baseline, candidate = (
        Side(policy, own, scorer.score(own).mean.double().numpy(), _settings(how))
        for (policy, how), own in zip(both, responses, strict=True)
    )
    seed = runtime.derived_seed(options.asked.seed, "resamples")
    found = {
        "rewards": list(rewards),
        "accepted": examined.marks_of(policies),
        **comparison.report(baseline, candidate, labels, seed, options.num_resamples, options.num_worst),
    }
    if cases:
        found["suite"] = _suite(cases, answers, scorer)
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        storage.write_json(out / REPORT, found)
        lines.write(str(out / ROWS), _rows(baseline, candidate))
    return found


def settle_both(policies: tuple[str, str], asked: Asked) -> tuple[Sampling, Sampling]:
    """How each is sampled: as its run does, or where it is not a run, as the run that it is compared with."""
    baseline, candidate = map(own_sampling, policies)
    if baseline.is_of_run and not candidate.is_of_run:
        candidate = Own(baseline.section, f"as {policies[0]}, with which it is compared")
    elif candidate.is_of_run and not baseline.is_of_run:
        baseline = Own(candidate.section, f"as {policies[1]}, with which it is compared")
    first, second = settle(policies[0], asked, baseline), settle(policies[1], asked, candidate)
    one, other = _settings(first), _settings(second)
    if differing := [name for name in one if one[name] != other[name]]:
        texts = ", ".join(f"{name} {one[name]} and {other[name]}" for name in differing)
        flags = " ".join(FLAGS[name] for name in differing)
        text = "The two policies are sampled differently, each as its own run does: %s. %s samples them alike."
        log.warning(text, texts, flags)
    return first, second


def _settings(how: Sampling) -> dict[str, Any]:
    return {
        "max_new_tokens": how.max_new_tokens,
        "temperature": how.temperature,
        "stop_tokens": list(how.stop_tokens),
        "top_p": how.top_p,
    }


def _suite(cases: Sequence[CaseSection], answers: Sequence[Sequence[Sample]], scorer: Scorer) -> dict[str, Any]:
    judge = suite.examine(cases, scorer)
    baseline, candidate = (suite.policy_outcomes(cases, own, scorer) for own in answers)
    lost = suite.regressions(judge, baseline, candidate)
    return {"judge": judge, "baseline": baseline, "candidate": candidate, "regressions": lost}


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
        problems.append(Problem("VER001", name, f"is worse than {found['baseline']['name']}: {' and '.join(worse)}."))
    for case in found.get("suite", {}).get("regressions", []):
        problems.append(Problem("VER002", name, f"fails the edge case '{case}', which the baseline passes."))
    if problems:
        raise RlhfError(*problems)


def print_report(found: Mapping[str, Any]) -> None:
    """Tables and the worst regressions, on standard error."""
    a, b = found["baseline"], found["candidate"]
    title, note = f"{a['name']} (baseline) -> {b['name']} (candidate)", "\n".join(found["accepted"])
    show(table(title, ("figure", "value"), _figures(found), note))
    if found["contradiction"]:
        log.warning("%s", found["contradiction"])
    for name, slices in found["slices"].items():
        parts = [
            (
                entry["slice"],
                str(entry["prompts"]),
                f"{entry['score_difference']:+.3f}",
                shown(entry["win_rate"]) + (" (few)" if entry["few"] else ""),
                f"{entry['cut_off']['baseline']} -> {entry['cut_off']['candidate']}",
            )
            for entry in slices
        ]
        show(table(f"By {name}", ("slice", "prompts", "score difference", "win rate", "cut off"), parts))
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
    rows = [
        (three[0]["case"], *(f"{'passed' if one['passed'] else 'FAILED'} {one['gap']:+.2f}" for one in three))
        for three in outcomes
    ]
    show(table("Edge cases", ("case", "judge", "baseline", "candidate"), rows))
    if unfit := suite.failed(found["judge"]):
        log.warning(
            "The reward itself fails %d edge cases and judges no policy by them: %s.", len(unfit), ", ".join(unfit)
        )


def _figures(found: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The score difference first, then the win rate, each with and without the responses that were cut off."""
    a, b = found["baseline"], found["candidate"]
    ended, equal = found["both_ended"], found["length_controlled_win_rate"]
    rows = [
        ("prompts, comparisons, ties", f"{found['prompts']}, {found['comparisons']}, {found['ties']}"),
        ("score, candidate - baseline", shown(found["score_difference"], "+.3f")),
        ("win rate of the candidate", shown(found["win_rate"])),
    ]
    if a["cut_off"] or b["cut_off"]:
        rows[-1] = ("win rate, a cut-off response loses", rows[-1][1])
        only = f"where both ended, {ended['comparisons']} of {found['comparisons']}{' (few)' if ended['few'] else ''}"
        difference = shown(ended["score_difference"], "+.3f") if ended["comparisons"] else "-"
        rows.insert(2, (f"  {only}", difference))
        rows.append((f"  {only}", shown(ended["win_rate"]) if ended["comparisons"] else "-"))
    rows += [
        ("win rate at equal length", shown(equal) if equal else "unknown: every difference in length is the same"),
        ("score", f"{a['score']:.3f} -> {b['score']:.3f}"),
        ("characters", f"{a['characters']:.0f} -> {b['characters']:.0f}"),
        ("cut off", f"{_cut_off(a)} -> {_cut_off(b)}"),
    ]
    return [*rows, ("empty", f"{a['empty']} -> {b['empty']}")] if a["empty"] or b["empty"] else rows


def _cut_off(side: Mapping[str, Any]) -> str:
    return f"{side['cut_off']} ({side['cut_off_share']:.0%}) at {side['sampling']['max_new_tokens']} tokens"
