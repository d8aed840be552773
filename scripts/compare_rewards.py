"""Kinds of reward models beside each other on the embedded world, on the same held-out comparisons and SFT samples.

    python scripts/compare_rewards.py [--seeds 0-2] [--out runs/compare-rewards] [--rankings 1100] [--set KEY=VALUE ...]

For each seed one SFT policy, one reward model a variant of ``VARIANTS``, and of each: accuracy, calibration error
before and after a temperature (fitted on other prompts than it is measured on), and the gold of the best of 16 SFT
samples by the unbiased estimator. Intervals are 95 %, over prompts; differences to the first variant are paired.
``--set`` changes every reward model, ``--rankings`` how many it is trained on. What is finished stays, and so another
run with more seeds or variants goes on. Ends with a table and OUT/report.json.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import quickstart as q
from quickstart_gold import MAX_NEW_TOKENS

from rlhf.commands import generate, rank
from rlhf.commands.scorers import open_scorer
from rlhf.config.sections import DataSection, RuntimeSection
from rlhf.data import sources, tokenised
from rlhf.data.batches import PassSize
from rlhf.data.dropped import DroppedRows
from rlhf.data.fitting import Limit
from rlhf.evaluation import figures
from rlhf.evaluation import reward as examine
from rlhf.evaluation.figures import FigureSettings
from rlhf.metrics import best_of_n, intervals
from rlhf.models import open_base
from rlhf.models.roles import SharedBase
from rlhf.records import prompt_key
from rlhf.rollouts.engine import Sampling
from rlhf.runs import artifacts, progress, runtime, storage
from rlhf.scoring.open_scorer import open_run

VARIANTS: dict[str, list[str]] = {
    "single": [],
    "ensemble of 5": ["members=5"],
    "four heads": [
        "data.path=demo:preferences?seed={seed}&size={rankings}&ratings=helpful,safe,friendly,concise",
        "heads=[helpful, safe, friendly, concise]",
        "combine=fitted",
    ],
}
GOLD = "rlhf.demo.gold:reward"
COMPARED, PROMPTS, BEST_OF, MAX_LENGTH = 300, 100, 16, 160
HOW = FigureSettings(num_bins=10, num_resamples=2000, seed=0, fit_fraction=0.3)
FIGURES = ("accuracy", "ece", "ece_after", "temperature", "best_of_1", "best_of_16")


def directory(out: Path, seed: int, variant: str) -> Path:
    return out / str(seed) / variant.replace(" ", "-")


def train(out: Path, seed: int, rankings: int, sets: list[str]) -> None:
    """The SFT policy of a seed and its reward models."""
    q.run_stage("sft", out / str(seed), seed)
    data = f"data.path=demo:preferences?seed={seed}&size={rankings}"
    for name, own in VARIANTS.items():
        changes = [text.format(seed=seed, rankings=rankings) for text in own]
        q.run_stage("train-rm", out / str(seed), seed, f"run_dir={directory(out, seed, name)}", data, *changes, *sets)


def measure(out: Path, seed: int, prompts: int = PROMPTS, compared: int = COMPARED) -> dict[str, Any]:
    """Figures of a seed's reward models, and what they were made of; ``OUT/SEED/measured.json``."""
    runs = {name: directory(out, seed, name) for name in VARIANTS}
    digests = {name: artifacts.read(run, "reward").digest for name, run in runs.items()}
    wanted = {"digests": digests, "prompts": prompts, "compared": compared}
    path = out / str(seed) / "measured.json"
    if path.is_file() and (found := json.loads(path.read_text("utf-8")))["of"] == wanted:
        return dict(found)
    records = sources.load_prompts(DataSection(path=f"demo:prompts?split=test&size={prompts}&seed={seed}")).records
    settings = Sampling(MAX_NEW_TOKENS, 1.0, runtime.derived_seed(seed, "compare rewards"))
    policy = str(out / str(seed) / "sft")
    samples = generate.sample(policy, None, records, BEST_OF, settings, "prompts")
    device = runtime.set_up(RuntimeSection(), seed)
    gold = open_scorer([GOLD], device, 32).score(samples).mean.tolist()
    data = f"demo:preferences?split=test&size={compared}&seed={seed + 1}"
    rankings = sources.load_comparisons(DataSection(path=data)).records
    found = {"of": wanted, "variants": {}}
    for name, run in runs.items():
        chosen = rank.order_keys(samples, open_scorer([str(run)], device, 32).score(samples))
        starts = range(0, len(samples), BEST_OF)
        found["variants"][name] = {
            "seconds": artifacts.read(run).seconds,
            **_on_comparisons(run, rankings, device),
            "prompts": [f"{seed}/{prompt_key(samples[start].prompt)}" for start in starts],
            **{
                f"best_of_{n}": [
                    best_of_n.best_of_n(chosen[start : start + BEST_OF], gold[start : start + BEST_OF], n)
                    for start in starts
                ]
                for n in (1, BEST_OF)
            },
        }
    storage.write_json(path, found)
    return found


def _on_comparisons(run: Path, rankings: Any, device: Any) -> dict[str, Any]:
    """What ``eval-rm`` says of accuracy and calibration, and of each comparison whether it is ordered rightly."""
    base = open_base.reopen_base(artifacts.read(run), device)
    dropped = DroppedRows("data", 0.0, False, len(rankings))
    groups, _ = tokenised.groups(rankings, base.chat, Limit(MAX_LENGTH), dropped)
    assert not dropped.total, dropped.sentence()
    scores = examine.score(open_run(str(run), SharedBase(base), PassSize(32), raw=True), groups)
    pairs = examine.pairs_of(groups, scores)
    said = figures.report(pairs, examine.responses_of(groups, scores), HOW)
    fitted = said["temperature"]
    return {
        "accuracy": said["accuracy"],
        "temperature": {key: fitted[key] for key in ("estimate", "ci95")},
        "ece": fitted["before"]["ece"],
        "ece_after": fitted["after"]["ece"],
        "right": examine.right(pairs).tolist(),
        "of_prompts": pairs.groups,
    }


def report(found: dict[int, dict[str, Any]]) -> dict[str, Any]:
    """For each seed and all together: figures of each variant and paired differences to the first one."""
    by_seed = [{"seed": seed, "variants": _figures([one])} for seed, one in found.items()]
    return {"seeds": by_seed, "together": _figures(list(found.values()))}


def _figures(found: list[dict[str, Any]]) -> dict[str, Any]:
    """Of one seed or several. Accuracy and gold are over the prompts of all; calibration, which is of one model, is the
    mean over the seeds, with an interval only where there is one seed."""
    first = next(iter(VARIANTS))
    rows: dict[str, Any] = {}
    for name in VARIANTS:
        own, others = ([one["variants"][which] for one in found] for which in (name, first))
        row = {
            "accuracy": _mean(_joined(own, "right"), _keys(own, "of_prompts")),
            **{key: _of_models([one[key] for one in own]) for key in ("ece", "ece_after", "temperature")},
            **{key: _mean(_joined(own, key), _keys(own, "prompts")) for key in ("best_of_1", "best_of_16")},
            "seconds": sum(one["seconds"] for one in own) / len(own),
        }
        if name != first:
            row["over_first"] = {
                "accuracy": _over(own, others, "right", "of_prompts"),
                "best_of_16": _over(own, others, "best_of_16", "prompts"),
            }
        rows[name] = row
    return rows


def _joined(own: list[dict[str, Any]], key: str) -> list[float]:
    return [value for one in own for value in one[key]]


def _keys(own: list[dict[str, Any]], key: str) -> list[str]:
    return [f"{index}/{prompt}" for index, one in enumerate(own) for prompt in one[key]]


def _mean(values: list[float], keys: list[str]) -> dict[str, Any] | None:
    return figures.interval(intervals.grouped_bootstrap(values, keys, seed=0))


def _over(own: list[dict[str, Any]], others: list[dict[str, Any]], key: str, keys: str) -> dict[str, Any] | None:
    return figures.interval(
        intervals.paired_bootstrap(_joined(own, key), _joined(others, key), _keys(own, keys), seed=0)
    )


def _of_models(of_each: list[dict[str, Any]]) -> dict[str, Any]:
    if len(of_each) == 1:
        return of_each[0]
    return {"estimate": sum(one["estimate"] for one in of_each) / len(of_each), "ci95": None}


def show(said: dict[str, Any]) -> None:
    """One row a seed and variant, then all seeds together."""
    parts = [(str(one["seed"]), one["variants"]) for one in said["seeds"]]
    parts += [("all", said["together"])] if len(parts) > 1 else []
    rows = [
        (seed, name, *(_shown(row[key]) for key in FIGURES), f"{row['seconds']:.0f}")
        for seed, variants in parts
        for name, row in variants.items()
    ]
    progress.show(progress.table("Reward models", ("seed", "", *FIGURES, "seconds"), rows))
    over = [
        (seed, name, _shown(row["over_first"]["accuracy"]), _shown(row["over_first"]["best_of_16"]))
        for seed, variants in parts
        for name, row in variants.items()
        if "over_first" in row
    ]
    title = f"Over {next(iter(VARIANTS))}, paired"
    progress.show(progress.table(title, ("seed", "", "accuracy", "best of 16, gold"), over))


def _shown(figure: dict[str, Any]) -> str:
    bounds = f" [{figure['ci95'][0]:.3f}, {figure['ci95'][1]:.3f}]" if figure["ci95"] else ""
    return f"{figure['estimate']:.3f}{bounds}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", default="0-2", help="such as 0-2 or 5")
    parser.add_argument("--out", type=Path, default=Path("runs/compare-rewards"))
    parser.add_argument("--rankings", type=int, default=1100, help="that each reward model is trained on")
    parser.add_argument("--set", nargs="*", default=[], help="overrides of train-rm for every variant")
    chosen = parser.parse_args()
    progress.log_to_console(quiet=True)
    low, _, high = chosen.seeds.partition("-")
    seeds = range(int(low), int(high or low) + 1)
    for seed in seeds:
        train(chosen.out, seed, chosen.rankings, chosen.set)
    said = report({seed: measure(chosen.out, seed) for seed in seeds})
    storage.write_json(chosen.out / "report.json", said)
    show(said)


if __name__ == "__main__":
    main()
