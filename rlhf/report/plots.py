"""The pictures of a report, drawn without a screen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

from rlhf.metrics.intervals import Interval
from rlhf.runs import artifacts, run_directory

BLUE, ORANGE, GREY = "#3465a4", "#d9822b", "#888888"


def reliability(bins: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Share of comparisons that the model gets right, against how sure it was."""
    figure, axes = plt.subplots(figsize=(4.5, 4))
    axes.plot([0.5, 1], [0.5, 1], color=GREY, linestyle="--", label="calibrated")
    confidence, share = [entry["confidence"] for entry in bins], [entry["accuracy"] for entry in bins]
    axes.plot(confidence, share, "o-", color=BLUE, label="reward model")
    for entry in bins:
        axes.annotate(
            f"{entry['count']:.0f}",
            (entry["confidence"], entry["accuracy"]),
            fontsize=7,
            xytext=(3, -9),
            textcoords="offset points",
            color=GREY,
        )
    axes.set(xlabel="predicted probability of its winner", ylabel="share that is right", title="Reliability")
    axes.legend()
    _write(figure, path)


def accuracy_by_length_gap(bins: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Accuracy by how much longer the preferred response is."""
    figure, axes = plt.subplots(figsize=(4.5, 3.2))
    labels = [f"{entry['low']:.0f} to {entry['high']:.0f}" for entry in bins]
    axes.bar(labels, [entry["accuracy"] for entry in bins], color=BLUE)
    axes.axhline(0.5, color=GREY, linestyle="--")
    axes.set(xlabel="tokens of the preferred response minus the other's", ylabel="accuracy", ylim=(0, 1))
    axes.tick_params(axis="x", labelsize=8)
    _write(figure, path)


def intervals(rows: Mapping[str, Mapping[str, Any]], label: str, path: Path) -> None:
    """One line a row: its estimate and its 95 % interval, around 0."""
    figure, axes = plt.subplots(figsize=(5.5, 0.3 * len(rows) + 1.2))
    names = list(rows)[::-1]
    for place, name in enumerate(names):
        axes.plot(rows[name]["ci95"], [place, place], color=BLUE)
        axes.plot([rows[name]["estimate"]], [place], "o", markersize=4, color=BLUE)
    axes.axvline(0, color=GREY, linestyle="--")
    axes.set_yticks(range(len(rows)), names)
    axes.set(xlabel=label)
    _write(figure, path)


def learning_curve(points: Sequence[Mapping[str, Any]], fitted: Sequence[Mapping[str, float]], path: Path) -> None:
    """Held-out accuracy over the prompts that were trained on, and the fitted curve up to twice as many."""
    figure, axes = plt.subplots(figsize=(5, 3.6))
    axes.plot([row["prompts"] for row in fitted], [row["accuracy"] for row in fitted], "--", color=GREY, label="fitted")
    for row in points:
        axes.plot([row["prompts"]] * len(row["by_seed"]), row["by_seed"], ".", markersize=4, color=ORANGE)
        axes.plot([row["prompts"]] * 2, row["accuracy"]["ci95"], color=BLUE)
    axes.plot(
        [row["prompts"] for row in points],
        [row["accuracy"]["estimate"] for row in points],
        "o",
        color=BLUE,
        label="measured, 95 %",
    )
    axes.set_xscale("log", base=2)
    axes.set_xticks([row["prompts"] for row in points], [f"{row['prompts']:.0f}" for row in points])
    axes.set(xlabel="prompts trained on", ylabel="accuracy on held-out comparisons", title="Learning curve")
    axes.legend()
    _write(figure, path)


def curves(rows: Sequence[Mapping[str, Any]], names: Mapping[str, str], path: Path) -> None:
    """Metrics over steps, one panel each; ``names`` maps a metric to its label."""
    figure, panels = plt.subplots(1, len(names), figsize=(3.6 * len(names), 3), squeeze=False)
    for axes, (name, label) in zip(panels[0], names.items(), strict=True):
        axes.plot(*_points(rows, name), "o-", markersize=3, color=BLUE)
        axes.set(xlabel="PPO step", title=label)
    _write(figure, path)


def held_out(run_dir: Path, metric: str, best: Sequence[tuple[int, float]]) -> None:
    """RUN/plots/held_out.png: training and held-out loss over the steps that metrics.jsonl tells, and ``best`` ones.

    An ensemble has a held-out curve a member, one after the other as they were trained.

    Args:
        metric: what the names of the held-out losses begin with.
    """
    rows = run_directory.read_metrics(run_dir)
    names = sorted({name for row in rows for name in row if name.startswith(metric)})
    figure, axes = plt.subplots(figsize=(5.5, 3.6))
    axes.plot(*_points(rows, "train/loss"), color=GREY, linewidth=1, label="training, each step's batch")
    for index, name in enumerate(names):
        axes.plot(*_points(rows, name), "o-", markersize=3, color=BLUE, label=None if index else "held out")
    axes.plot(*zip(*best, strict=True), "D", color=ORANGE, label="best step")
    axes.set(xlabel="optimizer step", ylabel="loss")
    axes.legend()
    directory = run_dir / artifacts.PLOTS
    directory.mkdir(exist_ok=True)
    _write(figure, directory / "held_out.png")


def _points(rows: Sequence[Mapping[str, Any]], name: str) -> tuple[list[int], list[float]]:
    """Steps and values of a metric, where it is there and finite."""
    points = [(row["step"], row[name]) for row in rows if isinstance(row.get(name), int | float)]
    return [step for step, _ in points], [value for _, value in points]


def bars(groups: Mapping[str, Mapping[str, Interval]], ylabel: str, path: Path) -> None:
    """Grouped bars with their intervals: one group a row of ``groups``, one bar a series."""
    series = list(next(iter(groups.values())))
    figure, axes = plt.subplots(figsize=(7, 3.4))
    width = 0.8 / len(series)
    colours = [GREY, "#8fb3dd", BLUE, ORANGE, "#6a9a3b"]
    for index, name in enumerate(series):
        places = [place + (index - (len(series) - 1) / 2) * width for place in range(len(groups))]
        found = [row[name] for row in groups.values()]
        heights = [one.estimate for one in found]
        errors = [[one.estimate - one.low for one in found], [one.high - one.estimate for one in found]]
        style = {"elinewidth": 1, "ecolor": "#333333", "capsize": 2}
        axes.bar(places, heights, width, label=name, color=colours[index % 5], yerr=errors, error_kw=style)
    axes.set_xticks(range(len(groups)), list(groups))
    axes.set(ylabel=ylabel, ylim=(0, 1.05))
    axes.legend(ncols=len(series), fontsize=8, loc="upper center", bbox_to_anchor=(0.5, 1.16), frameon=False)
    _write(figure, path)


def _write(figure: Any, path: Path) -> None:
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)
