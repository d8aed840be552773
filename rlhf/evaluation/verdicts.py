"""Verdicts: what each figure of an examination means, and what to do about it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rlhf.config.examination import Bound, ThresholdSection
from rlhf.evaluation.probes import KNOWN, OWN, own

PASS, WARN, FAIL = "pass", "warn", "fail"
ORDER = (PASS, WARN, FAIL)
NOTHING_LEARNT = {"accuracy": (0.5, "chance"), "accuracy_when_sure": (0.5, "chance"), "over_length": (0.0, "length")}
"""The value of a figure at which the model is no better than what stands beside it."""


@dataclass(frozen=True)
class Verdict:
    """One figure judged: ``key`` is where its bound stands under ``thresholds``, ``says`` and ``do`` are for people."""

    key: str
    verdict: str
    estimate: float
    ci95: list[float]
    says: str
    do: str


def overall(verdicts: Sequence[Verdict]) -> str:
    """The worst of them."""
    return max((one.verdict for one in verdicts), key=ORDER.index, default=PASS)


def failed(verdicts: Sequence[Verdict]) -> list[str]:
    """Keys of the figures that failed."""
    return [one.key for one in verdicts if one.verdict == FAIL]


def table(verdicts: Sequence[Verdict]) -> dict[str, Any]:
    """What an examination's report says of them."""
    return {"verdict": overall(verdicts), "verdicts": [asdict(one) for one in verdicts]}


def judge(report: Mapping[str, Any], thresholds: ThresholdSection) -> list[Verdict]:
    """Every figure that the report has and a bound stands for, in the order of the report.

    A figure is beyond a bound only with the whole of its 95 % interval, because a bound asks for evidence of a defect.
    The figures of ``NOTHING_LEARNT`` need evidence for the model as well: one whose interval reaches the value of a
    model that has learnt nothing is at least a warning, whatever its bound. Too few prompts are a warning of their own.
    """
    return [*_few(report, thresholds), *_comparisons(report, thresholds), *_probes(report, thresholds)]


def side(figure: Mapping[str, Any], bound: Bound, is_above: bool) -> str:
    """pass, warn or fail of one figure; ``is_above``: beyond is above."""
    sign = 1 if is_above else -1
    nearest = sign * (figure["ci95"][0] if is_above else figure["ci95"][1])
    if bound.fail is not None and nearest > sign * bound.fail:
        return FAIL
    return WARN if bound.warn is not None and nearest > sign * bound.warn else PASS


def _few(report: Mapping[str, Any], thresholds: ThresholdSection) -> Iterator[Verdict]:
    count = report["prompts"]
    few = count < thresholds.min_prompts
    yield Verdict(
        "min_prompts",
        WARN if few else PASS,
        count,
        [count, count],
        f"{count} prompts",
        f"examine on at least {thresholds.min_prompts} prompts: fewer prove little, and a pass least of all",
    )


def _comparisons(report: Mapping[str, Any], thresholds: ThresholdSection) -> Iterator[Verdict]:
    for key, figure, is_above, says, do in _figures(report, thresholds):
        if figure is None:
            continue
        verdict = side(figure, getattr(thresholds, key), is_above)
        value, of = NOTHING_LEARNT.get(key, (-math.inf, ""))
        if verdict != FAIL and figure["ci95"][0] <= value:
            verdict = WARN
            says = f"{says}: not shown to be better than {of} on {report['prompts']} prompts"
            do = f"examine on more prompts; if that does not show it, {do}"
        yield Verdict(key, verdict, figure["estimate"], figure["ci95"], says, do)


def _figures(report: Mapping[str, Any], thresholds: ThresholdSection) -> list[tuple[str, Any, bool, str, str]]:
    """Key, figure (None where there is none), whether above is worse, what it is, and what to do about it."""
    rows: list[tuple[str, Any, bool, str, str]] = [
        (
            "accuracy",
            report["accuracy"],
            False,
            "accuracy on the comparisons",
            "more or cleaner comparisons, or a larger base; at 0.5 look for swapped columns",
        ),
        (
            "accuracy_when_sure",
            report["accuracy_when_sure"],
            False,
            "accuracy where it is surest",
            "read the comparisons that are most at odds with the scores: labels that no score explains, "
            "or a blind spot",
        ),
        (
            "over_length",
            report["accuracy_over_length"],
            False,
            "accuracy over that of length alone",
            "balance the comparisons in length: it says little that length does not",
        ),
        (
            "overconfidence",
            report["temperature"],
            True,
            "temperature: differences are too large",
            "train for fewer epochs, or divide the scores by it",
        ),
        (
            "underconfidence",
            report["temperature"],
            False,
            "temperature: differences are too small",
            "train longer; where the training labels are noisier than these, clean them",
        ),
        (
            "label_noise",
            report["label_noise"],
            True,
            "labels that no score explains",
            "clean the labels, or smooth them in the loss",
        ),
        (
            "length_correlation",
            _absolute(report["length_correlation"]),
            True,
            "|correlation| of score and length",
            "balance the comparisons in length",
        ),
    ]
    if drift := report.get("drift"):
        rows += [
            (
                "drift_accuracy",
                drift["accuracy_lost"],
                True,
                "accuracy lost on drift",
                "collect comparisons there, and train on both",
            ),
            (
                "drift_outside",
                drift["outside"],
                True,
                "responses of drift that score outside the range of data's",
                "scores are extrapolated there: examine on such responses, or keep PPO closer (kl.coef)",
            ),
        ]
    for key, by_name, whose in (
        ("careless_annotator", report["accuracy_by_annotator"], "annotator {}: agreement below that of the others"),
        ("source_gap", report["accuracy_by_source"], "source {}: accuracy below that of the others"),
    ):
        do = {
            "careless_annotator": "train and examine without these labels, or weigh them less",
            "source_gap": "look at this source: other people, other tasks or mistaken labels",
        }[key]
        for name, row in (by_name or {}).items():
            if row["comparisons"] >= thresholds.min_comparisons:
                rows.append((key, row["below_others"], True, whose.format(name), do))
    return rows


def _probes(report: Mapping[str, Any], thresholds: ThresholdSection) -> Iterator[Verdict]:
    for name, row in report["probes"].items():
        if (figure := row["change"]) is not None:
            probe, key = KNOWN.get(name) or own(name.removeprefix(OWN), ()), name if name in KNOWN else "own"
            verdict = side(figure, getattr(thresholds.probes, key), True)
            yield Verdict(
                f"probes.{key}", verdict, figure["estimate"], figure["ci95"], f"change by {probe.does}", probe.fix
            )


def _absolute(figure: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """The size of a figure that is bad on both sides; an interval around 0 begins at 0."""
    if figure is None:
        return None
    low, high = figure["ci95"]
    sizes = sorted((abs(low), abs(high)))
    return {"estimate": abs(figure["estimate"]), "ci95": [0.0 if low <= 0 <= high else sizes[0], sizes[1]]}
