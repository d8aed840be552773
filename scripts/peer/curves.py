"""What two systems' learning curves say of each other: seconds until a target, differences by step, over seeds.

A curve is a list of rows, one an evaluation, with ``step``, ``cpu_s`` (CPU seconds so far) and ``gold``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy

from rlhf.metrics.intervals import Interval, grouped_bootstrap
from rlhf.runs import progress

TARGET = 0.75
OURS, PEER = "ours", "peer"
SHOWN = (
    "rollout/explained_variance", "rollout/explained_variance_first_third", "rollout/explained_variance_middle_third",
    "rollout/explained_variance_last_third", "update/policy_clip_fraction",
)  # fmt: skip
Curve = Sequence[Mapping[str, Any]]


def seconds_until(target: float, curve: Curve) -> float | None:
    """When the polygon through (cpu_s, gold) first reaches ``target``; None if it never does."""
    before = None
    for row in curve:
        if row["gold"] >= target:
            if before is None:
                return float(row["cpu_s"])
            share = (target - before["gold"]) / (row["gold"] - before["gold"])
            return float(before["cpu_s"] + share * (row["cpu_s"] - before["cpu_s"]))
        before = row
    return None


def seconds_a_step(curve: Curve) -> float:
    """From the first evaluation after the start on: what comes before the first step is left out."""
    first, last = curve[1], curve[-1]
    return float((last["cpu_s"] - first["cpu_s"]) / (last["step"] - first["step"]))


def mean_over_seeds(values: Sequence[float]) -> Interval:
    """Their mean, with a 95 % interval that resamples the seeds."""
    return grouped_bootstrap(values, range(len(values)), num_resamples=10_000)


def ratio_over_seeds(ours: Sequence[float], peers: Sequence[float]) -> Interval:
    """Geometric mean of peer / ours, with the interval of the log ratio, which resamples the seeds."""
    found = mean_over_seeds([math.log(peer / own) for own, peer in zip(ours, peers, strict=True)])
    return Interval(math.exp(found.estimate), math.exp(found.low), math.exp(found.high))


def report(found: Mapping[int, Mapping[str, Curve]]) -> dict[str, Any]:
    """The tables of the curves of each seed and side, and their figures."""
    sides = list(next(iter(found.values())))
    until = {side: [seconds_until(TARGET, curves[side]) for curves in found.values()] for side in sides}
    each = {side: [seconds_a_step(curves[side]) for curves in found.values()] for side in sides}
    summary: dict[str, Any] = {"seeds": list(found), f"cpu_s_until_{TARGET}": until, "cpu_s_a_step": each}
    columns = {side: [_shown(value) for value in until[side]] for side in sides}
    if len(sides) == 2:
        pairs = list(zip(until[OURS], until[PEER], strict=True))
        columns["peer / ours"] = [_shown(peer / own if own and peer else None) for own, peer in pairs]
        reached = [(own, peer) for own, peer in pairs if own and peer]
        if reached:
            summary["ratio"] = _ratio(*zip(*reached, strict=True))
        summary["ratio_a_step"] = _ratio(each[OURS], each[PEER])
        summary["difference"] = compare(list(found.values()))
    columns |= {f"{side}, a step": [_shown(value) for value in each[side]] for side in sides}
    rows = [(str(seed), *(values[i] for values in columns.values())) for i, seed in enumerate(found)]
    progress.show(progress.table(f"CPU seconds until held-out gold is {TARGET}", ("seed", *columns), rows))
    return summary


def compare(both: Sequence[Mapping[str, Curve]]) -> dict[str, Any]:
    """Ours minus the peer's gold at every evaluated step, and averaged over the steps; the pairs are the seeds."""
    own, peer = (numpy.array([[row["gold"] for row in curves[side]] for curves in both]) for side in (OURS, PEER))
    steps = [row["step"] for row in both[0][OURS]]
    columns = {**{str(step): own[:, i] - peer[:, i] for i, step in enumerate(steps)}, "mean": (own - peer).mean(1)}
    means = [*own.mean(0), own.mean()], [*peer.mean(0), peer.mean()]
    intervals = {name: mean_over_seeds(values) for name, values in columns.items()}
    rows = [
        (name, f"{ours:.3f}", f"{theirs:.3f}", f"{i.estimate:+.3f}", f"{i.low:+.3f} to {i.high:+.3f}")
        for (name, i), ours, theirs in zip(intervals.items(), *means, strict=True)
    ]
    titles = ("step", OURS, PEER, "difference", "95 % over seeds")
    progress.show(progress.table(f"Held-out gold, mean of {len(both)} seeds", titles, rows))
    return {name: {"mean": i.estimate, "ci95": [i.low, i.high]} for name, i in intervals.items()}


def means(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Of a run's metrics: the means of ``SHOWN`` over its steps, the KL of the last step, the value pretraining."""
    steps = [row for row in rows if "update/policy_loss" in row]
    found = {name: float(numpy.nanmean([float(row[name]) for row in steps])) for name in SHOWN}
    before = [row for row in rows if "pretrain/batch" in row]
    last = {"exact KL at the end": steps[-1]["rollout/exact_kl_nats"], "pretraining batches": len(before) - 1}
    return found | last


def compare_means(both: Sequence[Mapping[str, Mapping[str, float]]]) -> dict[str, Any]:
    """Every figure of ``means``, ours and the peer's, and their difference; the pairs are the seeds."""
    found, rows = {}, []
    for name in both[0][OURS]:
        own, peer = (numpy.array([sides[side][name] for sides in both]) for side in (OURS, PEER))
        gap = mean_over_seeds(own - peer)
        found[name] = {OURS: own.tolist(), PEER: peer.tolist(), "difference": gap.estimate, "ci95": [gap.low, gap.high]}
        interval = f"{gap.low:+.3f} to {gap.high:+.3f}"
        rows.append((name, f"{own.mean():.3f}", f"{peer.mean():.3f}", f"{gap.estimate:+.3f}", interval))
    titles = ("over the steps", OURS, PEER, "difference", "95 % over seeds")
    progress.show(progress.table(f"Means of {len(both)} seeds", titles, rows))
    return found


def _ratio(ours: Sequence[float], peers: Sequence[float]) -> dict[str, Any]:
    found = ratio_over_seeds(ours, peers)
    mean = float(numpy.mean([peer / own for own, peer in zip(ours, peers, strict=True)]))
    return {"geometric_mean": found.estimate, "ci95": [found.low, found.high], "mean": mean, "pairs": len(ours)}


def _shown(value: float | None) -> str:
    return "never" if value is None else f"{value:.2f}"
