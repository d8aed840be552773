"""An examination for people: its tables, and the figures that stand in the manifest."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table

from rlhf.runs.progress import grid, table


def figures_table(report: Mapping[str, Any]) -> Table:
    """What was measured on the comparisons."""
    margins, fitted = report["margin_quantiles"], report["temperature"]
    rows = [
        (
            "comparisons",
            f"{report['comparisons']} of {report['prompts']} prompts, {report['ties_left_out']} ties left out",
        ),
        ("accuracy", shown(report["accuracy"])),
        ("accuracy on the fifth that it is surest of", shown(report["accuracy_when_sure"])),
        ("accuracy of 'the longer wins'", f"{report['accuracy_of_longer_wins']:.3f}"),
        ("accuracy over that of length alone", shown(report["accuracy_over_length"])),
        ("correlation of score and length, equal preference", shown(report["length_correlation"])),
        ("margins, 5 / 50 / 95 %", " / ".join(f"{margins[key]:.2f}" for key in ("0.05", "0.5", "0.95"))),
        ("calibration error (ECE)", f"{shown(report['ece'])}, calibrated: {report['ece_of_a_calibrated_model']:.3f}"),
        ("Brier score", shown(report["brier"])),
        ("negative log-likelihood", shown(report["negative_log_likelihood"])),
        *ranking_rows(report),
        ("labels that no score explains", shown(report["label_noise"])),
        ("temperature, on other prompts", shown(fitted)),
    ]
    if fitted:
        effect = [fitted[when]["ece"]["estimate"] for when in ("before", "after")]
        rows.append(("calibration error before and after it", f"{effect[0]:.3f} -> {effect[1]:.3f}"))
    rows += calibration_rows(report)
    together = report.get("members") or {}
    for name, figure in together.get("accuracy_by_member", {}).items():
        rows.append((f"accuracy, member {name}", shown(figure)))
    if together:
        correlation = together["error_correlation"]
        said = "-" if correlation is None else f"{correlation:.3f}"
        rows.append(("correlation of the members' errors, mean of pairs", said))
    for key, label in (("accuracy_by_source", "source"), ("accuracy_by_annotator", "annotator")):
        for name, row in (report[key] or {}).items():
            rows.append((f"accuracy, {label} {name}", shown(row["accuracy"])))
    for row in report["accuracy_by_margin"] or []:
        rows.append((f"accuracy where scores differ by {row['low']:.2f} to {row['high']:.2f}", shown(row["interval"])))
    if drift := report.get("drift"):
        rows += [
            ("drift: responses", f"{drift['responses']} to {drift['prompts']} prompts"),
            ("drift: accuracy", shown(drift["accuracy"])),
            ("drift: accuracy lost", shown(drift["accuracy_lost"])),
            ("drift: mean score lost, in deviations", shown(drift["score_lost"])),
            ("drift: mean length gained, tokens", shown(drift["length_gained"])),
            ("drift: members' disagreement gained, raw scores", shown(drift["disagreement_gained"])),
            ("drift: share of scores outside the range of data's", shown(drift["outside"])),
            ("drift: calibration error (ECE)", shown(drift["ece"])),
            *ranking_rows(drift, "drift: "),
        ]
    if report["disagreement"]:
        rows.append(("chance that members disagree more on an error", shown(report["disagreement"]["error_auroc"])))
    return table("Reward model", ("figure", "value"), rows)


def ranking_rows(report: Mapping[str, Any], label: str = "") -> list[tuple[str, str]]:
    """Kendall's tau-b and NDCG of ranked lists; that there are none is said."""
    found = report.get("ranking")
    if not found:
        return [(f"{label}Kendall's tau-b and NDCG", "- (pairs alone)")]
    return [
        (
            f"{label}{name}, lists of three or more",
            f"{shown(found[key])} on {found[key]['lists']}" if found[key] else "-",
        )
        for name, key in (("Kendall's tau-b", "kendall_tau_b"), ("NDCG", "ndcg"))
    ]


def calibration_rows(report: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What a correction by length does to the prompts that it was not fitted on."""
    found = report.get("length_calibration")
    if not found:
        return [("length calibration", "- (nothing to fit)")]
    rows = [
        (
            "length calibration: taken off a token",
            f"{found['coef']:.4f} [{found['ci95'][0]:.4f}, {found['ci95'][1]:.4f}]",
        )
    ]
    for name, key in (
        ("accuracy", "accuracy"),
        ("length correlation", "length_correlation"),
        ("NLL", "negative_log_likelihood"),
    ):
        rows.append(
            (f"{name} with it, on other prompts", f"{_short(found['before'][key])} -> {shown(found['after'][key])}")
        )
    return rows


def _short(figure: Mapping[str, Any] | None) -> str:
    return f"{figure['estimate']:.3f}" if figure else "-"


def heads_table(report: Mapping[str, Any]) -> Table:
    """Each head on the labels of its attribute, and the best of the other heads there."""
    rows = []
    for name, row in report["heads"].items():
        others = {other: value for other, value in (row["accuracy_of"] or {}).items() if other != name}
        best = max(others, key=lambda other: others[other], default=None)
        rows.append(
            (
                name,
                f"{row['comparisons']}",
                shown(row["accuracy"]),
                "-" if best is None else f"{others[best]:.3f} ({best})",
                f"{row['ratings']}",
                "-" if row["rating_correlation"] is None else f"{row['rating_correlation']:.3f}",
            )
        )
    columns = ("head", "comparisons", "accuracy", "best other head's", "ratings", "correlation")
    return table("Heads", columns, rows)


def verdict_lines(verdicts: Sequence[Mapping[str, Any]]) -> Table:
    """One line a verdict, as eval.json has them."""
    return grid(
        (one["verdict"], f"{one['estimate']:.0f}" if one["key"] == "min_prompts" else shown(one), one["says"])
        for one in verdicts
    )


def shown(figure: Mapping[str, Any] | None) -> str:
    """An estimate with its interval; '-' for a figure that has no value here."""
    return f"{figure['estimate']:.3f} [{figure['ci95'][0]:.3f}, {figure['ci95'][1]:.3f}]" if figure else "-"


def metrics(report: Mapping[str, Any]) -> dict[str, float]:
    """The figures of the manifest."""
    low, high = report["accuracy"]["ci95"]
    found = {
        "eval/accuracy": report["accuracy"]["estimate"],
        "eval/accuracy_low": low,
        "eval/accuracy_high": high,
        "eval/ece": report["ece"]["estimate"],
        "eval/brier": report["brier"]["estimate"],
    }
    for name in ("temperature", "label_noise", "length_correlation"):
        if report[name]:
            found[f"eval/{name}"] = report[name]["estimate"]
    for name in ("kendall_tau_b", "ndcg"):
        if (report.get("ranking") or {}).get(name):
            found[f"eval/{name}"] = report["ranking"][name]["estimate"]
    for name, row in report.get("heads", {}).items():
        found |= {f"eval/accuracy/{name}": row["accuracy"]["estimate"]} if row["accuracy"] else {}
    return found | {
        f"probe/{name}": row["change"]["estimate"] for name, row in report["probes"].items() if row["change"]
    }


def benchmark_table(report: Mapping[str, Any]) -> Table:
    """A benchmark's figures, subsets and what they add up to."""
    rows = [(f"{name}, {row['rows']} rows", shown(row)) for name, row in report.get("subsets", {}).items()]
    rows += [(name, shown(figure)) for name, figure in report.get("sections", {}).items()]
    if report.get("ties"):
        rows.append(("Ties", f"{report['ties']['score']:.3f}"))
    for domain, found in report.get("domains", {}).items():
        rows.append((domain, " / ".join(f"{found[key]:.3f}" for key in ("hard", "normal", "easy", "overall"))))
    rows += [(key, f"{report[key]:.3f}") for key in ("hard", "normal", "easy", "overall") if key in report]
    if unknown := report.get("of_no_section"):
        rows.append(("in no section", ", ".join(unknown)))
    return table(report["benchmark"], ("figure", "value"), rows)


def benchmark_metrics(report: Mapping[str, Any]) -> dict[str, float]:
    """The figures of the manifest."""
    found = {f"benchmark/{key}": report[key] for key in ("hard", "normal", "easy", "overall") if key in report}
    return found | {f"benchmark/{name}": one["estimate"] for name, one in report.get("sections", {}).items() if one}
