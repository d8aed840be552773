"""The truth about a finished chain on the embedded world: gold of its policies, on prompts that chose nothing."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy

from rlhf.config.sections import DataSection, RuntimeSection
from rlhf.data import sources, tokenised
from rlhf.data.batches import PassSize
from rlhf.data.fitting import Limit
from rlhf.data.turns import prompt_of
from rlhf.demo import gold, minimal_pairs
from rlhf.evaluation import policy_samples as measure
from rlhf.metrics.intervals import Interval, grouped_bootstrap, paired_bootstrap
from rlhf.models import open_base
from rlhf.models.base import Base
from rlhf.models.heads import ScalarHead
from rlhf.models.roles import SharedBase
from rlhf.report import plots
from rlhf.rollouts.engine import Sampling
from rlhf.rollouts.hf import HfEngine
from rlhf.runs import artifacts, progress, run_directory, runtime
from rlhf.scoring.scorer import Sample
from rlhf.scoring.shared import SharedScorer

TEMPERATURES = (0.25, 0.5, 0.75, 1.0)
NUM_PROMPTS, MAX_NEW_TOKENS, PROBES = 300, 64, 60
AXES = ("gold", *gold.AXES)
CURVES = {
    "eval/score": "held-out score",
    "eval/exact_kl_nats": "KL to SFT, nats",
    "rollout/response_tokens": "tokens",
}


@dataclass(frozen=True)
class Judged:
    """The judged samples of one policy at one temperature: axis -> [N] and the end-token rate."""

    axes: dict[str, list[float]]
    end_token_rate: float

    def mean(self, axis: str = "gold") -> float:
        return float(numpy.mean(self.axes[axis]))

    def intervals(self) -> dict[str, Interval]:
        """Of each axis, over the prompts."""
        return {axis: grouped_bootstrap(self.axes[axis], range(len(self.axes[axis]))) for axis in AXES}


@dataclass(frozen=True)
class Ticket:
    """A prompt with the answers of SFT and PPO, and their gold."""

    prompt: str
    answers: dict[str, tuple[str, float]]


@dataclass(frozen=True)
class Outcome:
    """What was measured: the summary for the file, each policy's intervals by axis, and all answers side by side."""

    summary: dict[str, Any]
    intervals: dict[str, dict[str, Interval]]
    tickets: list[Ticket]


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
    with progress.waiting(f"{len(prompts)} held-out tickets answered by {slot} at temperature {temperature:g}"):
        return measure.respond(engine, base.chat, prompts, how)


def judge(samples: Sequence[Sample]) -> Judged:
    """Gold and its axes of each sample."""
    found = [gold.judge(sample.prompt[-1].content, sample.response) for sample in samples]
    axes = {axis: [row[axis] for row in found] for axis in AXES}
    return Judged(axes, sum(sample.finished for sample in samples) / len(samples))


def open_roles(out: Path) -> tuple[Base, SharedBase]:
    """Base, SFT policy, PPO policy and reward model of a finished chain on one base."""
    manifest = artifacts.read(out / "ppo", "policy")
    device = runtime.set_up(RuntimeSection(), 0)
    base = open_base.reopen_base(manifest, device)
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
    pairs = list(minimal_pairs.minimal_pairs(PROBES, seed))
    samples = []
    for pair in pairs:
        prompt = prompt_of(pair["prompt"])
        for text in (pair["chosen"], pair["rejected"]):
            ids = [*base.chat.response_ids(prompt, text), base.chat.end_id]
            samples.append(Sample(prompt, text, base.chat.prompt_ids(prompt), ids, True, ids))
    with progress.waiting("The reward model on pairs of replies that differ in one thing"):
        scores = SharedScorer(roles, "reward", PassSize(32)).score(samples).mean
    for pair, difference in zip(pairs, (scores[0::2] - scores[1::2]).tolist(), strict=True):
        hits.setdefault(pair["fact"], []).append(0.5 + 0.5 * float(numpy.sign(difference)))
    return {fact: float(numpy.mean(values)) for fact, values in hits.items()}


def measure_chain(out: Path, seed: int) -> Outcome:
    """Gold of every policy on the same prompts, the KL, and figures of the reward model's examination."""
    base, roles = open_roles(out)
    prompts = test_prompts(base, NUM_PROMPTS, seed)
    sft = {t: sample(roles, "sft", base, prompts, t, seed) for t in TEMPERATURES}
    by_temperature = {t: judge(samples) for t, samples in sft.items()}
    best = max(by_temperature, key=lambda t: by_temperature[t].mean())
    answers = sample(roles, "ppo", base, prompts, 1.0, seed)
    policies = {
        "base": judge(sample(roles, "base", base, prompts, 1.0, seed)),
        "SFT": by_temperature[1.0],
        f"SFT, T={best:g}": by_temperature[best],
        "PPO": judge(answers),
    }
    roles.slots |= {"policy": roles.slots["ppo"], "reference": roles.slots["sft"]}
    kl = measure.exact_kl(roles, answers, base.chat.pad_id, 1.0, PassSize(32))
    run_directory.write_samples(out / "samples.jsonl", measure.sample_rows(answers, gold=policies["PPO"].axes["gold"]))
    with progress.waiting("Working out the intervals"):
        intervals = {name: judged.intervals() for name, judged in policies.items()}
        summary = _summary(policies, by_temperature, best)
    examined = json.loads((out / "eval-rm" / artifacts.EXAMINATION).read_text())
    summary |= {
        "table": {name: {axis: asdict(one) for axis, one in row.items()} for name, row in intervals.items()},
        "reward_model": {
            "accuracy": examined["accuracy"]["estimate"],
            "accuracy_ci95": examined["accuracy"]["ci95"],
            "ece": examined["ece"]["estimate"],
            "minimal_pairs": probe_accuracies(roles, base, seed),
        },
        "kl": float(kl.mean()),
    }
    return Outcome(summary, intervals, _tickets({"SFT": sft[1.0], "PPO": answers}, policies))


def _summary(policies: dict[str, Judged], by_temperature: dict[float, Judged], best: float) -> dict[str, Any]:
    groups = range(NUM_PROMPTS)
    sft, ppo = policies["SFT"], policies["PPO"]
    gain = paired_bootstrap(ppo.axes["gold"], sft.axes["gold"], groups)
    over = paired_bootstrap(ppo.axes["gold"], by_temperature[best].axes["gold"], groups)
    return {
        "gold": {
            "base": policies["base"].mean(),
            "sft": sft.mean(),
            "ppo": ppo.mean(),
            "gain": gain.estimate,
            "ci95": [gain.low, gain.high],
            "num_prompts": NUM_PROMPTS,
            "sft_best_temperature": {"temperature": best, "gold": by_temperature[best].mean()},
            "sft_by_temperature": {str(t): judged.mean() for t, judged in by_temperature.items()},
            "gain_over_best_temperature": {"gain": over.estimate, "ci95": [over.low, over.high]},
        },
        "axes": {axis: {"sft": sft.mean(axis), "ppo": ppo.mean(axis)} for axis in gold.AXES},
        "end_token_rate": {name: judged.end_token_rate for name, judged in policies.items()},
    }


def _tickets(answers: dict[str, list[Sample]], policies: dict[str, Judged]) -> list[Ticket]:
    return [
        Ticket(
            next(iter(answers.values()))[row].prompt[-1].content,
            {name: (own[row].response, policies[name].axes["gold"][row]) for name, own in answers.items()},
        )
        for row in range(NUM_PROMPTS)
    ]


def draw(outcome: Outcome, out: Path) -> None:
    """The plots: the table with its intervals, and the curves of PPO."""
    directory = out / artifacts.PLOTS
    directory.mkdir(exist_ok=True)
    groups = {axis: {name: row[axis] for name, row in outcome.intervals.items()} for axis in AXES}
    plots.bars(groups, "mean on held-out prompts, 95 % intervals", directory / "result.png")
    plots.curves(run_directory.read_metrics(out / "ppo"), CURVES, directory / "curves.png")
