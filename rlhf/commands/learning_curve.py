"""``rlhf learning-curve``: reward models on growing shares of the training prompts, and what more labels would add."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy

from rlhf.commands import pipeline
from rlhf.errors import Problem, RlhfError
from rlhf.evaluation.figures import interval
from rlhf.metrics import learning_curve_fit as curve
from rlhf.metrics.learning_curve_fit import Held
from rlhf.preflight import prepare
from rlhf.records import first_share, prompt_key, split_by_prompt
from rlhf.report import plots
from rlhf.runs import artifacts, storage
from rlhf.runs.progress import show, table
from rlhf.stages.registry import STAGES, open_config

log = logging.getLogger("rlhf")
REPORT, PLOT = "learning-curve.json", "learning-curve.png"
MATTERS = 0.01
FORM = "1 - accuracy = floor + scale * prompts ** -exponent"


@dataclass(frozen=True)
class Point:
    """One run: its share of the training prompts, its seed, and the overrides that make it one."""

    share: float
    seed: int
    run_dir: Path
    overrides: tuple[str, ...]


def run(
    path: Path, overrides: Sequence[str], shares: Sequence[float], seeds: Sequence[int], out: Path, num_resamples: int
) -> dict[str, Any]:
    """Bring every point up to date, smallest first, each in its own process; then fit, draw and judge.

    Args:
        path, overrides: the config of train-rm that all points share.
        shares: of the training prompts, nested; the held-out prompts of a seed are the same for all.
        seeds: none: the config's own.

    Raises:
        RlhfError: CFG005 for shares that do not make a curve, DAT052 where the smallest has fewer prompts than a batch;
            what the stage raises, by its exit code.
    """
    config = open_config("train-rm", path, overrides)
    seeds = list(dict.fromkeys(seeds)) or [config.seed]
    _refuse(config.train_fraction, shares)
    points = [_point(share, seed, overrides, out) for share in shares for seed in seeds]
    _refuse_small(path, points[: len(seeds)])
    for point in points:
        pipeline.bring_up_to_date("train-rm", path, point.overrides)
    report = _report(points, shares, seeds, num_resamples)
    storage.write_json(out / REPORT, report)
    plots.learning_curve(report["curve"], report["predicted"], out / PLOT)
    return report


def print_report(report: Mapping[str, Any]) -> None:
    """The table, and the verdict as a sentence."""
    rows = [
        (
            f"{row['share']:g}",
            f"{row['prompts']:.0f}",
            f"{row['comparisons']:.0f}",
            _shown(row["accuracy"]),
            " ".join(f"{value:.3f}" for value in row["by_seed"]),
        )
        for row in report["curve"]
    ]
    show(table("Learning curve", ("share", "prompts", "comparisons", "held-out accuracy", "by seed"), rows))
    step = report["last_step"]
    log.info("From share %g to %g: %s.", step["from"], step["to"], _shown(step["gained"], "+"))
    log.info("%s", report["verdict"])


def verdict(gain: Mapping[str, Any], accuracy: float, num_seeds: int) -> str:
    """What the predicted gain of doubling says, in a sentence."""
    low, high = gain["ci95"]
    once = " One seed: how much training scatters is not in the interval." if num_seeds == 1 else ""
    said = f"Doubling the labels is predicted to add {_shown(gain, '+')} to the accuracy of {accuracy:.3f}: "
    if high < MATTERS:
        return f"{said}less than a point, so better labels or a larger base come first.{once}"
    if low > 0:
        return f"{said}more labels help.{once}"
    return f"{said}not told apart from nothing; more held-out prompts or seeds would tell.{once}"


def _refuse(train_fraction: float | None, shares: Sequence[float]) -> None:
    if len(shares) < curve.FEWEST or list(shares) != sorted(set(shares)) or not 0 < shares[0] <= shares[-1] <= 1:
        what = f"{', '.join(f'{share:g}' for share in shares)}: need {curve.FEWEST} or more growing shares, up to 1."
        raise RlhfError(Problem("CFG005", "--shares", what, "0.125,0.25,0.5,1"))
    if train_fraction is not None:
        raise RlhfError(Problem("CFG005", "train_fraction", "is what the shares are.", "leave it out"))


def _point(share: float, seed: int, overrides: Sequence[str], out: Path) -> Point:
    run_dir = out / f"share-{share:g}-seed-{seed}"
    return Point(share, seed, run_dir, (*overrides, f"train_fraction={share!r}", f"seed={seed}", f"run_dir={run_dir}"))


def _refuse_small(path: Path, smallest: Sequence[Point]) -> None:
    """The points of the smallest share: what they cannot be trained on is said before the first one is."""
    problems = []
    for point in smallest:
        config = open_config("train-rm", path, point.overrides)
        plan = prepare.prepare(config, STAGES["train-rm"].needs(config))
        records, _ = split_by_prompt(plan.data["data"].records, config.holdout_fraction, config.seed)
        own = {prompt_key(record.prompt) for record in first_share(records, point.share, config.seed)}
        if len(own) < config.batch.batch_size:
            what = f"share {point.share:g} has {len(own)} prompts, and a batch takes {config.batch.batch_size}."
            problems.append(Problem("DAT052", "--shares", what, "larger shares, or a smaller batch.batch_size"))
    if problems:
        raise RlhfError(*problems[:1])


def _report(
    points: Sequence[Point], shares: Sequence[float], seeds: Sequence[int], num_resamples: int
) -> dict[str, Any]:
    manifests = {(point.share, point.seed): artifacts.read(point.run_dir, "reward") for point in points}
    held = [_held([point for point in points if point.seed == seed]) for seed in seeds]
    trained = {share: [manifests[share, seed].details["trained"] for seed in seeds] for share in shares}
    amounts = [float(numpy.mean([one["prompts"] for one in trained[share]])) for share in shares]
    values, draws = curve.accuracies(held), curve.resampled(held, num_resamples, seeds[0])
    law, laws = curve.fit(amounts, values), curve.fit(amounts, draws)
    gain = _interval(float(curve.gain_of_doubling(law, amounts[-1])[0]), curve.gain_of_doubling(laws, amounts[-1]))
    each = [one.right.sum(1) / one.counts.sum() for one in held]
    rows = [
        {
            "share": share,
            "prompts": amounts[index],
            "comparisons": float(numpy.mean([one["comparisons"] for one in trained[share]])),
            "accuracy": _interval(values[index], draws[:, index]),
            "by_seed": [float(own[index]) for own in each],
            "run_dirs": [str(point.run_dir) for point in points if point.share == share],
        }
        for index, share in enumerate(shares)
    ]
    grid = numpy.geomspace(amounts[0], 2 * amounts[-1], 40)
    return {
        "curve": rows,
        "seeds": list(seeds),
        "held_out_prompts": [len(one.counts) for one in held],
        "fit": {
            "form": FORM,
            "floor": float(law.floor[0]),
            "scale": float(law.scale[0]),
            "exponent": float(law.exponent[0]),
        },
        "predicted": [{"prompts": float(n), "accuracy": float(law.accuracy(float(n))[0])} for n in grid],
        "gain_of_doubling": gain,
        "last_step": {
            "from": shares[-2],
            "to": shares[-1],
            "gained": _interval(values[-1] - values[-2], draws[:, -1] - draws[:, -2]),
        },
        "verdict": verdict(gain, float(values[-1]), len(seeds)),
    }


def _held(points: Sequence[Point]) -> Held:
    """What the runs of one seed got right on each of its held-out prompts.

    Raises:
        RlhfError: DAT058 where no held-out comparison has a preference, CKP005 where a run's outcomes are gone.
    """
    columns = []
    for point in points:
        path = point.run_dir / artifacts.SAMPLES / "held_out.jsonl"
        if not path.is_file():
            raise RlhfError(Problem("CKP005", str(path), "missing.", "remove the run: it is made again"))
        rows: dict[str, list[float]] = {}
        for row in map(json.loads, path.read_text("utf-8").splitlines()):
            rows.setdefault(row["prompt"], []).append(row["right"])
        columns.append(rows)
    if not columns[0]:
        what = "no held-out comparison has a preference: there is no accuracy."
        raise RlhfError(Problem("DAT058", str(points[0].run_dir), what, "decided comparisons"))
    keys = sorted(columns[0])
    assert all(sorted(rows) == keys for rows in columns), "held-out prompts depend on seed and data alone"
    counts = numpy.array([len(columns[0][key]) for key in keys], dtype=float)
    return Held(numpy.array([[sum(rows[key]) for key in keys] for rows in columns]), counts)


def _interval(estimate: float, draws: numpy.ndarray) -> dict[str, Any]:
    return interval(curve.interval(estimate, draws)) or {}


def _shown(figure: Mapping[str, Any], sign: str = "") -> str:
    return "{0:{3}.3f} [{1:{3}.3f}, {2:{3}.3f}]".format(figure["estimate"], *figure["ci95"], sign)
