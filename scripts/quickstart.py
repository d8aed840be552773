"""SFT -> reward model -> PPO on the embedded world, then the truth about it: gold, on prompts that chose nothing.

    python scripts/quickstart.py [--seed 0] [--out runs/quickstart]

Each stage runs in its own process with the shipped config; what is finished and unchanged is not run again. The end is
a table (base, SFT, SFT at its best temperature, PPO; per axis; 95 % intervals over prompts), plots and summary.json.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
import torch

from rlhf import artifacts, progress, runs, runtime
from rlhf.config.sections import DataSection, RuntimeSection
from rlhf.data import sources, tokenised
from rlhf.data.fitting import Limit
from rlhf.data.turns import prompt_of
from rlhf.demo import gold, probes
from rlhf.evaluation import plots
from rlhf.evaluation import policy as measure
from rlhf.metrics.intervals import grouped_bootstrap, paired_bootstrap
from rlhf.models import opening
from rlhf.models.base import Base
from rlhf.models.heads import ScalarHead
from rlhf.models.roles import SharedBase
from rlhf.rollouts.engine import Sampling
from rlhf.rollouts.hf import HfEngine
from rlhf.scoring.scorer import Sample
from rlhf.scoring.shared import SharedScorer

TEMPERATURES = (0.25, 0.5, 0.75, 1.0)
NUM_PROMPTS, MAX_NEW_TOKENS, PROBES = 300, 64, 60
STAGES = ("sft", "train-rm", "ppo", "eval-rm")


@dataclass(frozen=True)
class Judged:
    """The judged samples of one policy at one temperature: axis -> [N] and the end-token rate."""

    axes: dict[str, list[float]]
    end_token_rate: float

    def mean(self, axis: str = "gold") -> float:
        return float(numpy.mean(self.axes[axis]))


@contextmanager
def stopwatch(seconds: dict[str, float], name: str) -> Iterator[None]:
    """Adds the block's wall-clock seconds to ``seconds[name]``."""
    started = time.perf_counter()
    yield
    seconds[name] = seconds.get(name, 0.0) + time.perf_counter() - started


def run_stage(stage: str, out: Path, seed: int, *overrides: str) -> None:
    """One shipped config, moved to ``out`` and to this seed; data of the seed, splits as ever."""
    data = f"&seed={seed}" if stage == "eval-rm" else f"?seed={seed}"
    own = {
        "sft": [f"data.path=demo:demonstrations{data}"],
        "train-rm": [f"policy={out}/sft", f"data.path=demo:preferences{data}"],
        "ppo": [f"policy={out}/sft", f"rewards.0.run={out}/train-rm", f"prompts.path=demo:prompts{data}"],
        "eval-rm": [f"reward={out}/train-rm", f"data.path=demo:preferences?split=test&size=300{data}"],
    }[stage]
    command = [sys.executable, "-m", "rlhf", stage, "-c", f"configs/{stage}.yaml", "--resume", "--overwrite"]
    command += [f"run_dir={out}/{stage}", f"seed={seed}", *own, *overrides]
    code = subprocess.run(command, check=False).returncode
    if code:
        raise SystemExit(code)


def test_prompts(base: Base, size: int, seed: int) -> list[tokenised.PromptRow]:
    """Prompts of the test split, which no stage trains on or chooses by."""
    loaded = sources.load_prompts(DataSection(path=f"demo:prompts?split=test&size={size}&seed={seed}"))
    return tokenised.prompt_rows(loaded.records, base.chat, Limit(base.context_length), loaded.dropped)[0]


def sample(
    roles: SharedBase, slot: str, base: Base, prompts: Sequence[Any], temperature: float, seed: int
) -> list[Sample]:
    """One response to each prompt."""
    engine = HfEngine(roles, slot, base.chat, 100)
    how = Sampling(MAX_NEW_TOKENS, temperature, runtime.derived_seed(seed, "quickstart", slot, str(temperature)))
    return measure.respond(engine, base.chat, prompts, how)


def judge(samples: Sequence[Sample]) -> Judged:
    """Gold and its axes of each sample."""
    found = [gold.judge(sample.prompt[-1].content, sample.response) for sample in samples]
    axes = {axis: [row[axis] for row in found] for axis in ("gold", *gold.AXES)}
    return Judged(axes, sum(sample.finished for sample in samples) / len(samples))


def open_roles(out: Path) -> tuple[Base, SharedBase]:
    """Base, SFT policy, PPO policy and reward model of a finished chain on one base."""
    manifest = artifacts.read(out / "ppo", "policy")
    device = runtime.set_up(RuntimeSection(), 0)
    base = opening.reopen_base(manifest, device)
    runtime.set_threads(RuntimeSection(), base.model, device)
    roles = SharedBase(base)
    roles.add("base")
    roles.add("sft", adapter=out / "sft" / artifacts.ADAPTER)
    roles.add("ppo", adapter=out / "ppo" / artifacts.ADAPTER)
    head = ScalarHead.load(out / "train-rm" / artifacts.HEAD)
    roles.add("reward", adapter=out / "train-rm" / artifacts.ADAPTER, head=head)
    return base, roles


def probe_accuracies(roles: SharedBase, base: Base, seed: int) -> dict[str, float]:
    """Share of minimal pairs that the reward model orders rightly (ties 1/2), by what differs."""
    hits: dict[str, list[float]] = {}
    pairs = list(probes.minimal_pairs(PROBES, seed))
    samples = []
    for pair in pairs:
        prompt = prompt_of(pair["prompt"])
        for text in (pair["chosen"], pair["rejected"]):
            ids = [*base.chat.response_ids(prompt, text), base.chat.end_id]
            samples.append(Sample(prompt, text, base.chat.prompt_ids(prompt), ids, True, ids))
    scores = SharedScorer(roles, "reward", 32).score(samples).mean
    for pair, difference in zip(pairs, (scores[0::2] - scores[1::2]).tolist(), strict=True):
        hits.setdefault(pair["fact"], []).append(0.5 + 0.5 * float(numpy.sign(difference)))
    return {fact: float(numpy.mean(values)) for fact, values in hits.items()}


def evaluate(out: Path, seed: int, seconds: dict[str, float]) -> tuple[dict[str, Any], dict[str, Judged]]:
    """Gold of every policy on the same prompts, the KL, and the reward model's examination."""
    with stopwatch(seconds, "eval"):
        base, roles = open_roles(out)
        prompts = test_prompts(base, NUM_PROMPTS, seed)
        by_temperature = {t: judge(sample(roles, "sft", base, prompts, t, seed)) for t in TEMPERATURES}
        best = max(by_temperature, key=lambda t: by_temperature[t].mean())
        answers = sample(roles, "ppo", base, prompts, 1.0, seed)
        shown = {
            "base": judge(sample(roles, "base", base, prompts, 1.0, seed)),
            "SFT": by_temperature[1.0],
            f"SFT, T={best:g}": by_temperature[best],
            "PPO": judge(answers),
        }
        roles.slots |= {"policy": roles.slots["ppo"], "reference": roles.slots["sft"]}
        kl = measure.exact_kl(roles, answers, base.chat.pad_id, 1.0, 32)
        facts = probe_accuracies(roles, base, seed)
    groups = list(range(len(prompts)))
    gain = paired_bootstrap(shown["PPO"].axes["gold"], shown["SFT"].axes["gold"], groups)
    over = paired_bootstrap(shown["PPO"].axes["gold"], by_temperature[best].axes["gold"], groups)
    examined = json.loads((out / "eval-rm" / artifacts.EXAMINATION).read_text())
    runs.write_samples(out / "samples.jsonl", measure.sample_rows(answers, gold=shown["PPO"].axes["gold"]))
    summary = {
        "gold": {
            "base": shown["base"].mean(),
            "sft": shown["SFT"].mean(),
            "ppo": shown["PPO"].mean(),
            "gain": gain.estimate,
            "ci95": [gain.low, gain.high],
            "num_prompts": len(prompts),
            "sft_best_temperature": {"temperature": best, "gold": by_temperature[best].mean()},
            "sft_by_temperature": {str(t): found.mean() for t, found in by_temperature.items()},
            "gain_over_best_temperature": {"gain": over.estimate, "ci95": [over.low, over.high]},
        },
        "axes": {a: {"sft": shown["SFT"].mean(a), "ppo": shown["PPO"].mean(a)} for a in gold.AXES},
        "reward_model": {
            "accuracy": examined["accuracy"]["estimate"],
            "accuracy_ci95": examined["accuracy"]["ci95"],
            "ece": examined["ece"]["estimate"],
            "minimal_pairs": facts,
        },
        "kl": float(kl.mean()),
        "end_token_rate": {name: found.end_token_rate for name, found in shown.items()},
    }
    return summary, shown


def show(summary: dict[str, Any], shown: dict[str, Judged], out: Path) -> None:
    """The tables on the screen, the plots on the disk."""
    axes = ("gold", *gold.AXES)
    rows = []
    for name, found in shown.items():
        intervals = [grouped_bootstrap(found.axes[axis], list(range(NUM_PROMPTS))) for axis in axes]
        rows.append((name, *(f"{i.estimate:.2f} \u00b1{(i.high - i.low) / 2:.2f}" for i in intervals)))
    title = f"Gold on {NUM_PROMPTS} held-out prompts, 95 % intervals over prompts"
    progress.show(progress.table(title, ("", *axes), rows))
    reward = summary["reward_model"]
    facts = [(fact, f"{value:.2f}") for fact, value in reward["minimal_pairs"].items()]
    progress.show(progress.table("Reward model on minimal pairs", ("one thing differs", "accuracy"), facts))
    figures = summary["gold"]
    progress.console.print(
        f"PPO - SFT: {figures['gain']:+.3f} {figures['ci95'][0]:+.3f} to {figures['ci95'][1]:+.3f}; "
        f"PPO - SFT at its best temperature: {figures['gain_over_best_temperature']['gain']:+.3f}; "
        f"KL {summary['kl']:.1f} nats; {summary['seconds']['total']:.0f} s, {summary['peak_rss_mb']:.0f} MB."
    )
    (out / artifacts.PLOTS).mkdir(exist_ok=True)
    series = {axis: {name: found.mean(axis) for name, found in shown.items()} for axis in axes}
    plots.bars(series, "mean on held-out prompts", out / artifacts.PLOTS / "result.png")
    curves = {
        "eval/score": "held-out score",
        "eval/exact_kl_nats": "KL to SFT, nats",
        "rollout/response_tokens": "tokens",
    }
    plots.curves(runs.read_metrics(out / "ppo"), curves, out / artifacts.PLOTS / "curves.png")
    progress.console.print(f"{out}/summary.json, {out}/plots/, {out}/samples.jsonl")


def quickstart(out: Path, seed: int) -> dict[str, Any]:
    """The chain, its evaluation, and ``out/summary.json``."""
    seconds: dict[str, float] = {}
    out.mkdir(parents=True, exist_ok=True)
    for stage in STAGES:
        with stopwatch(seconds, "eval" if stage == "eval-rm" else stage):
            run_stage(stage, out, seed)
    summary, shown = evaluate(out, seed, seconds)
    children = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
    summary["seconds"] = {**seconds, "total": sum(seconds.values())}
    summary["peak_rss_mb"] = max(children, runtime.peak_rss_mb())
    summary["seed"] = seed
    (out / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    show(summary, shown, out)
    return summary


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/quickstart"))
    chosen = parser.parse_args()
    progress.log_to_console()
    torch.manual_seed(chosen.seed)
    quickstart(chosen.out, chosen.seed)
