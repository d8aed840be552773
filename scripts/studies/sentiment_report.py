"""What the sentiment study has found so far, from the files of its chains alone: tables, and OUT/report.json."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy
import sentiment_world as world

from rlhf.metrics import best_of_n
from rlhf.metrics.intervals import grouped_bootstrap, paired_bootstrap
from rlhf.runs import artifacts, progress, run_directory, storage

PLAN = "plan.json"
POLICIES = {"model, not cut": "base", "SFT": "sft-answers", "PPO": "ppo-answers"}
NO_TEXT = 0.0
"""Gold of a prompt to which all answers are empty: ``rlhf rank`` writes none of them."""
BEST_OF, STAGES = (1, 4, 16), ("sft", "comparisons", "train-rm", "eval-rm", "ppo")
Row = dict[str, Any]


def finished(out: Path) -> dict[str, list[Path]]:
    """By dtype the directories of all chains that have reached their end, in the order of their seeds."""
    chains: dict[str, list[Path]] = {}
    for end in sorted(out.glob(f"*/*/{PLAN}"), key=lambda path: (path.parents[1].name, int(path.parent.name))):
        chains.setdefault(end.parents[1].name, []).append(end.parent)
    return chains


def manifest(at: Path, stage: str) -> Row:
    return dict(json.loads((at / stage / artifacts.MANIFEST).read_text("utf-8")))


def gold_of(rows: Sequence[Row]) -> list[float]:
    return world.gold([], [row["response"] for row in rows])


def prompt_of(row: Row) -> str:
    """What a prompt says, whether it stands there as text or as turns."""
    prompt = row["prompt"]
    return str(prompt if isinstance(prompt, str) else prompt[-1]["content"])


def chosen(rows: Iterable[Row], key: str, n: int) -> dict[str, float]:
    """By prompt, the gold that the best of ``n`` of its samples by ``key`` is expected to have (``judge`` is gold).

    As ``rlhf rank`` does it: one that was cut off ranks behind all that ended.
    """
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(prompt_of(row), []).append(row)
    found = {}
    for prompt, own in groups.items():
        keys, worth = [(row["finished"], row[key]) for row in own], [row["judge"] for row in own]
        found[prompt] = best_of_n.best_of_n(keys, worth, min(n, len(own)))
    return found


def policies(at: Path) -> dict[str, tuple[list[float], float | None, float]]:
    """Of each policy: gold for each test prompt, KL to SFT in nats where it was measured, and the share that ended."""
    prompts = [row["prompt"] for row in world.read(at / "data" / "test.jsonl")]
    found = {}
    kl: dict[str, float] = {"SFT": 0.0, "PPO": manifest(at, "ppo")["metrics"]["eval/exact_kl_nats"]}
    for name, file in POLICIES.items():
        rows = world.read(at / "data" / f"{file}.jsonl")
        ended = float(numpy.mean([row["finished"] for row in rows]))
        found[name] = gold_of(rows), kl.get(name), ended
    ranked = world.read(at / "data" / "ranked.jsonl")
    ended = float(numpy.mean([row["finished"] for row in ranked]))
    for key, by in (("score", "the reward model"), ("judge", "gold")):
        for n in BEST_OF if key == "score" else BEST_OF[1:]:
            values = chosen(ranked, key, n)
            name = f"best of {n} by {by}" if n > 1 else "SFT, mean of 16 samples"
            worth = [values.get(prompt, NO_TEXT) for prompt in prompts]
            found[name] = worth, best_of_n.kl_bound(n), ended
    return found


def together(chains: Sequence[Path]) -> dict[str, Row]:
    """The policies over all seeds of a dtype; intervals are over prompts, differences to SFT are paired."""
    measured = [policies(at) for at in chains]
    groups = [
        f"{at.name}/{index}" for at, one in zip(chains, measured, strict=True) for index in range(len(one["SFT"][0]))
    ]
    sft = numpy.concatenate([one["SFT, mean of 16 samples"][0] for one in measured])
    found = {}
    for name in measured[0]:
        values = numpy.concatenate([one[name][0] for one in measured])
        means = [float(numpy.mean(one[name][0])) for one in measured]
        found[name] = {
            "gold": asdict(grouped_bootstrap(values, groups)),
            "by_seed": means,
            "over_sft": asdict(paired_bootstrap(values, sft, groups)),
            "kl": _mean(one[name][1] for one in measured),
            "ended": float(numpy.mean([one[name][2] for one in measured])),
        }
    return found


def alike(samples: Sequence[Row], words: int = 3) -> float:
    """Share of the answers that begin with the commonest ``words`` words."""
    begun = Counter(" ".join(row["response"].split()[:words]) for row in samples)
    return begun.most_common(1)[0][1] / len(samples)


def curve(chains: Sequence[Path]) -> list[Row]:
    """Each evaluation of PPO on the validation prompts of all seeds: gold, the reward model's score, KL, sameness."""
    points: dict[int, list[tuple[Row, list[Row]]]] = {}
    for at in chains:
        for row in run_directory.read_metrics(at / "ppo"):
            if "eval/score" in row:
                samples = world.read(at / "ppo" / artifacts.SAMPLES / f"step-{row['step']}.jsonl")
                points.setdefault(row["step"], []).append((row, samples))
    found = []
    for step, own in sorted(points.items()):
        values = [value for _, samples in own for value in gold_of(samples)]
        found.append(
            {
                "step": step,
                "gold": asdict(grouped_bootstrap(values, range(len(values)))),
                "score": float(numpy.mean([row["eval/score"] for row, _ in own])),
                "kl": [row["eval/exact_kl_nats"] for row, _ in own],
                "alike": _mean(alike(samples) for _, samples in own),
            }
        )
    return found


def reward_model(at: Path) -> Row:
    """What the labels, the examination and the test prompts say about the reward model of one chain."""
    examined = json.loads((at / "eval-rm" / artifacts.EXAMINATION).read_text("utf-8"))
    rows = world.read(at / "examination" / artifacts.PREFERENCES)
    ranked = world.read(at / "data" / "ranked.jsonl")
    share, pairs = world.agreement(rows)
    gains = [policies(at)[name][0] for name in ("PPO", "SFT, mean of 16 samples")]
    correlation = numpy.corrcoef([row["score"] for row in ranked], [row["judge"] for row in ranked])[0, 1]
    return {
        "labels_agree": run_directory.plain(share),
        "pairs": pairs,
        "accuracy": examined["accuracy"],
        "verdict": examined["verdict"],
        "correlation": run_directory.plain(float(correlation)),
        "gain": float(numpy.mean(gains[0]) - numpy.mean(gains[1])),
        "beyond": [one for one in examined["verdicts"] if one["verdict"] != "pass"],
    }


def costs(chains: Sequence[Path]) -> list[Row]:
    """Seconds and peak memory of each stage, the mean over seeds, beside what ``rlhf plan`` predicts."""
    plans = {one["stage"]: one for one in json.loads((chains[0] / PLAN).read_text("utf-8"))}
    found = []
    for stage in STAGES:
        own, plan = [manifest(at, stage) for at in chains], plans.get(stage, {})
        found.append(
            {
                "stage": stage,
                "seconds": _mean(one["seconds"] for one in own),
                "peak_mb": _mean(peak_mb(one["metrics"]) for one in own),
                "planned_mb": plan["peak"] / (1 << 20) if plan else None,
                "step_s": _mean(step_seconds(at / stage, one) for at, one in zip(chains, own, strict=True)),
                "planned_step_s": sum(work["seconds"] for work in plan.get("work") or []) or None,
            }
        )
    return found


def peak_mb(metrics: Row) -> float | None:
    """On the GPU where there was one, else of the process."""
    return metrics.get("memory/peak_cuda_mb", metrics.get("memory/peak_rss_mb"))


def step_seconds(run: Path, made: Row) -> float | None:
    """Of an optimizer step (SFT: the mean) or a rollout with its update (PPO: the median); None where no file says."""
    if "time/train_s" in made["metrics"]:
        return float(made["metrics"]["time/train_s"] / made["details"]["steps"])
    rows = [row for row in run_directory.read_metrics(run) if "time/update_s" in row]
    timed = [row["time/rollout_s"] + row["time/update_s"] for row in rows]
    return float(numpy.median(timed)) if timed else None


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(numpy.mean(known)) if known else None


def shown(interval: Row) -> str:
    return f"{interval['estimate']:+.2f} [{interval['low']:+.2f}, {interval['high']:+.2f}]"


def number(value: float | str | None, digits: int = 2) -> str:
    """A figure of the report, where one that is no number stands as text."""
    return "-" if value is None else value if isinstance(value, str) else f"{value:,.{digits}f}"


def tables(dtype: str, found: Row) -> Iterator[tuple[str, Sequence[str], list[Sequence[str]]]]:
    """Title, columns and rows of every table of a dtype."""
    title = f"{dtype}, seeds {', '.join(found['seeds'])}"
    yield (
        f"{title}: gold on test prompts, 95 % over prompts",
        ("", "gold", "by seed", "over SFT", "KL, nats", "ended"),
        [
            (
                name,
                shown(row["gold"]),
                " ".join(f"{value:+.2f}" for value in row["by_seed"]),
                shown(row["over_sft"]),
                number(row["kl"]),
                number(row["ended"]),
            )
            for name, row in found["policies"].items()
        ],
    )
    yield (
        f"{title}: PPO on validation prompts",
        ("step", "gold", "reward model", "KL, by seed", "begin alike"),
        [
            (
                str(row["step"]),
                shown(row["gold"]),
                f"{row['score']:+.2f}",
                " ".join(number(one) for one in row["kl"]),
                number(row["alike"]),
            )
            for row in found["curve"]
        ],
    )
    yield (
        f"{title}: the reward model",
        ("seed", "labels agree with gold", "accuracy on labels", "correlation with gold", "verdict", "PPO over SFT"),
        [
            (
                seed,
                f"{number(row['labels_agree'])} of {row['pairs']}",
                number(row["accuracy"]["estimate"]),
                number(row["correlation"]),
                row["verdict"],
                f"{row['gain']:+.2f}",
            )
            for seed, row in found["reward_models"].items()
        ],
    )
    yield (
        f"{title}: what the examination did not pass",
        ("seed", "verdict", "figure", "says"),
        [
            (seed, one["verdict"], number(one["estimate"]), f"{one['key']}: {one['says']}")
            for seed, row in found["reward_models"].items()
            for one in row["beyond"]
        ],
    )
    yield (
        f"{title}: cost, mean of a seed",
        ("stage", "seconds", "peak, MiB", "planned, MiB", "seconds a step", "predicted"),
        [
            (
                row["stage"],
                number(row["seconds"], 0),
                number(row["peak_mb"], 0),
                number(row["planned_mb"], 0),
                number(row["step_s"], 1),
                number(row["planned_step_s"], 1),
            )
            for row in found["costs"]
        ],
    )


def report(out: Path) -> None:
    """The tables of every dtype that has a finished chain, and ``out/report.json``.

    Raises:
        SystemExit: if no chain has finished.
    """
    found: dict[str, Row] = {}
    for dtype, chains in finished(out).items():
        found[dtype] = {
            "seeds": [at.name for at in chains],
            "policies": together(chains),
            "curve": curve(chains),
            "reward_models": {at.name: reward_model(at) for at in chains},
            "costs": costs(chains),
        }
        for title, columns, rows in tables(dtype, found[dtype]):
            progress.show(progress.table(title, columns, rows))
    if not found:
        raise SystemExit(f"no chain below {out} has finished")
    storage.write_json(out / "report.json", found)
