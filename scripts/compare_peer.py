"""Our PPO beside TRL's on the embedded world: CPU seconds until held-out gold is .75, and the learning curves.

    python scripts/compare_peer.py --runs runs/seeds --peer /path/to/python-of-trl-1.12 [--seeds 0-4]
    python scripts/compare_peer.py --runs runs/seeds --peer ... --compatibility
    python scripts/compare_peer.py --runs runs/seeds --steps 28 --settings update.value_lam=0.95

Needs finished chains RUNS/<seed>/{sft,train-rm} (`make seeds`). The peer, trl 1.12.0, has an environment of its own
(scripts/peer/trl_ppo_world.py); without --peer only ours is measured. Both have the same base, SFT policy, reward
model, prompts, batch, rates and ranges, one thread, and are judged by the same program on the same 300 prompts.

As users run them: ours with configs/ppo.yaml, value pretraining counted; the peer with a fresh adapter on the merged
SFT model, and on a copy of the reward model as its critic. --compatibility: ours is set up as the peer is
(scripts/peer/like_trl.py), the peer continues the SFT and the reward adapter as ours does, and both share the order of
prompts and minibatches and the sampling noise, so that the curves should coincide. --settings KEY=VALUE ...: the peer
is our own PPO with these settings, and ours is as shipped. Resumable; ends with tables and one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import numpy
import quickstart_gold as q
from peer import curves, like_trl
from peer.curves import OURS, PEER
from safetensors.torch import save_file

from rlhf.commands import export
from rlhf.config import load
from rlhf.config.stages import PpoConfig
from rlhf.data.batches import DataOrder
from rlhf.demo import catalogue, gold
from rlhf.evaluation import policy_samples as measure
from rlhf.models import adapters, open_base
from rlhf.models.base import Base
from rlhf.preflight import prepare
from rlhf.rollouts.engine import Sampling, uniforms
from rlhf.rollouts.hf import HfEngine
from rlhf.runs import progress, run_directory, runtime, storage
from rlhf.runs.tracking import Tracker
from rlhf.stages.ppo import run as ppo
from rlhf.stages.registry import STAGES
from rlhf.training import policy_update as updates

VALUE_RATE = 1e-3  # the best that was found for a critic trained by gradients
ONE_THREAD = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}


def config_of(args: argparse.Namespace, seed: int, out: Path) -> PpoConfig:
    """The config, moved to this seed's chain; with --compatibility with the peer's settings in its keys, and on the
    other side of --settings with those."""
    chain = args.runs / str(seed)
    overrides = [
        f"run_dir={out}/{args.side}",
        f"seed={seed}",
        f"policy={chain}/sft",
        f"rewards.0.run={chain}/train-rm",
        f"prompts.path=demo:prompts?seed={seed}",
        f"steps={args.steps}",
        "save_every=null",
        "report_to=none",
        "rewards.0.examination=null",
    ]
    if args.settings and args.side == PEER:
        overrides += args.settings
    if args.compatibility:
        shipped = load.load(PpoConfig, args.config)
        overrides += ["value.fit=gradient", f"optim.value_learning_rate={VALUE_RATE}"]
        overrides += ["missing_eos.mode=subtract", f"missing_eos.penalty={-shipped.missing_eos.score}"]
        overrides += ["value.pretrain_steps=0", "optim.max_grad_norm=1e9", f"update.value_lam={shipped.update.lam}"]
    return load.load(PpoConfig, args.config, overrides)


def evaluation_sampling(config: PpoConfig) -> Sampling:
    return measure.sampling_of(config.sampling, runtime.derived_seed(config.seed, "compare", "evaluation"))


def measure_ours(args: argparse.Namespace, seed: int, out: Path) -> None:
    """Train step by step in this process; writes ``out/SIDE.json``."""
    config = config_of(args, seed, out)
    plan = prepare.prepare(config, STAGES["ppo"].needs(config))
    lines: list[dict[str, Any]] = []
    with run_directory.open_run(Path(config.run_dir), "ppo", plan.inputs, load.dump(config), overwrite=True) as run:
        with mock.patch.object(ppo, "Training", like_trl.LikeTrl if args.compatibility else like_trl.Measured):
            training = ppo._set_up(config, plan, run)
        training.tracker = Tracker(run.path, "none")
        base = training.roles.host("policy").base
        prompts = q.test_prompts(base, q.NUM_PROMPTS, seed)
        engine = HfEngine(training.roles, "policy", base.chat, 100)
        started, excluded = time.process_time(), 0.0
        while True:
            if training.progress.step % args.every == 0:
                now = time.process_time()
                samples = measure.respond(engine, base.chat, prompts, evaluation_sampling(config))
                responses = [sample.response_ids for sample in samples]
                lines.append(
                    {"step": training.progress.step, "cpu_s": now - started - excluded, "responses": responses}
                )
                excluded += time.process_time() - now
            if training.progress.step == args.steps:
                break
            if not training.progress.step:
                training.standardise()
                while training.progress.pretraining is None:
                    training.pretrain_value()
            training.step()
    write_judged(base, seed, lines, out / f"{args.side}.json", curves.means(run_directory.read_metrics(run.path)))


def measure_peer(args: argparse.Namespace, seed: int, out: Path) -> None:
    """Hand the peer its job and judge what it wrote; writes ``out/peer.json``."""
    config = config_of(args, seed, out)
    plan = prepare.prepare(config, STAGES["ppo"].needs(config))
    base = open_base.reopen_base(plan.parents["policy"], runtime.set_up(config.runtime, seed))
    out.mkdir(parents=True, exist_ok=True)
    job = job_of(args, config, plan, base, out)
    storage.write_json(out / "job.json", job)
    Path(job["out"]).unlink(missing_ok=True)
    program = Path(__file__).parent / "peer" / "trl_ppo_world.py"
    with (out / "peer.log").open("wb") as log:
        subprocess.run(
            [args.peer, str(program), str(out / "job.json")],
            check=True,
            stdout=log,
            stderr=log,
            env={**os.environ, **ONE_THREAD},
        )
    lines = [json.loads(line) for line in Path(job["out"]).read_text().splitlines()]
    write_judged(base, seed, lines, out / f"{PEER}.json")


def job_of(args: argparse.Namespace, config: PpoConfig, plan: prepare.Plan, base: Base, out: Path) -> dict[str, Any]:
    """Files, ids and settings for the peer; with --compatibility also our run's random numbers."""
    models = {}
    for name, run in (("policy", config.policy), ("reward", str(config.rewards[0].run))):
        target = args.out / "models" / str(config.seed) / name
        if not target.exists():
            export.export(run, target, adapter_only=False)
        models |= {f"{name}_model": str(target), f"{name}_adapter": str(Path(run) / "adapter")}
    settings, _ = adapters.read(Path(config.policy) / "adapter")
    how = evaluation_sampling(config)
    noise = {"evaluation": uniforms(how.seed, range(q.NUM_PROMPTS), how.max_new_tokens)}
    rows, permutations = ppo._prompts(config, plan, base.chat)[0], []
    if args.compatibility:
        order = DataOrder(len(rows), config.batch.batch_size, config.seed)
        rows = [rows[index] for _ in range(config.steps) for index in order.next()]
        seed = runtime.derived_seed(config.seed, "ppo", "rollouts")
        noise["rollouts"] = uniforms(seed, range(len(rows)), how.max_new_tokens)
        permutations = [order_of(config, step, e) for step in range(config.steps) for e in range(config.update.epochs)]
    save_file(noise, out / "noise.safetensors")
    missing, kl, update, batch = config.missing_eos, config.kl, config.update, config.batch
    return {
        **models,
        "base": str(catalogue.resolve_model("demo:base")),
        "start": "adapter" if permutations else "fresh",
        "reward_constant": json.loads((Path(models["reward_model"]) / export.PROOF).read_text())["constant"],
        "critic": args.critic,
        "pad_id": base.chat.pad_id,
        "eos_id": base.chat.end_id,
        "lora": {"r": settings.r, "lora_alpha": settings.lora_alpha, "target_modules": sorted(settings.target_modules)},
        "prompts": [row.ids for row in rows],
        "noise": str(out / "noise.safetensors"),
        "permutations": permutations,
        "held_out": [row.ids for row in q.test_prompts(base, q.NUM_PROMPTS, config.seed)],
        "evaluate_every": args.every,
        "out": str(out / "peer.jsonl"),
        "value_learning_rate": VALUE_RATE,
        "ppo": {
            "output_dir": str(out / "trl"),
            "seed": config.seed,
            "learning_rate": config.optim.learning_rate,
            "lr_scheduler_type": config.optim.schedule,
            "weight_decay": config.optim.weight_decay,
            "per_device_train_batch_size": batch.batch_size,
            "num_ppo_epochs": update.epochs,
            "num_mini_batches": batch.batch_size // batch.minibatch_size,
            "local_rollout_forward_batch_size": batch.batch_size,
            "total_episodes": config.steps * batch.batch_size,
            "response_length": config.sampling.max_new_tokens,
            "temperature": config.sampling.temperature,
            "missing_eos_penalty": -missing.score,
            "kl_coef": kl.coef,
            "kl_estimator": kl.estimator,
            "cliprange": update.clip_range,
            "cliprange_value": update.value_clip_range,
            "gamma": update.gamma,
            "lam": update.lam,
            "vf_coef": like_trl.VALUE_COEF,
            "adam_epsilon": like_trl.EPS,
        },
    }


def order_of(config: PpoConfig, step: int, epoch: int) -> list[int]:
    """The rows of a batch in the order in which our update after ``step`` steps takes them."""
    seed = runtime.derived_seed(config.seed, "ppo", "minibatches", step + 1)
    size, part = config.batch.batch_size, config.batch.minibatch_size
    return [int(row) for rows in updates.minibatches(size, part, seed, epoch) for row in rows]


def write_judged(
    base: Base, seed: int, lines: Sequence[dict[str, Any]], path: Path, means: Mapping[str, float] | None = None
) -> None:
    """Mean gold of the answers at every evaluation, with its step and CPU seconds; and of ours means over the steps."""
    texts = [row.messages[-1].content for row in q.test_prompts(base, q.NUM_PROMPTS, seed)]
    end, curve = base.chat.end_id, []
    for line in lines:
        answers = [base.chat.decode(ids[:-1] if ids[-1] == end else ids) for ids in line["responses"]]
        judged = [gold.judge(text, answer)["gold"] for text, answer in zip(texts, answers, strict=True)]
        ended = sum(ids[-1] == end for ids in line["responses"]) / len(judged)
        row = {"step": line["step"], "cpu_s": line["cpu_s"], "gold": float(numpy.mean(judged)), "end_token_rate": ended}
        curve.append(row)
    storage.write_json(path, {"seed": seed, "curve": curve, "means": means or {}})


def curve_of(args: argparse.Namespace, path: Path) -> list[dict[str, Any]]:
    """The curve that was measured there; empty where there is none with these evaluations."""
    curve = json.loads(path.read_text())["curve"] if path.is_file() else []
    steps = list(range(0, args.steps + 1, args.every))
    return curve if [row["step"] for row in curve] == steps else []


def sides_of(args: argparse.Namespace) -> tuple[str, ...]:
    return (PEER, OURS) if args.peer or args.settings else (OURS,)


def place_of(args: argparse.Namespace, seed: int, side: str) -> Path:
    """The directory of one measurement. Every comparison of settings has the same ours."""
    if args.settings:
        mode = "as-shipped" if side == OURS else "_".join(args.settings).replace("/", "-")
    else:
        mode = f"{'compatibility' if args.compatibility else 'as-run'}-{args.critic}"
    return args.out / mode / str(seed)


def run_all(args: argparse.Namespace, seeds: Sequence[int]) -> None:
    """Every measurement that is missing, each in a process of its own, the peer and ours in turn."""
    for seed in seeds:
        for side in sides_of(args):
            if curve_of(args, place_of(args, seed, side) / f"{side}.json"):
                continue
            command = [sys.executable, *sys.argv, "--one", str(seed), "--side", side]
            subprocess.run(command, check=True, env={**os.environ, **ONE_THREAD})
            progress.console.print(f"seed {seed}, {side}: done")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=Path("runs/seeds"), help="finished chains, one directory a seed")
    parser.add_argument("--out", type=Path, default=Path("runs/compare-peer"))
    parser.add_argument("--config", type=Path, default=Path("configs/ppo.yaml"), help="what both are set up by")
    parser.add_argument("--seeds", default="0-4", help="first-last, or one number")
    parser.add_argument("--peer", help="python of an environment with trl==1.12.0; without it only ours is measured")
    parser.add_argument("--compatibility", action="store_true", help="ours set up as the peer, shared randomness")
    parser.add_argument("--critic", choices=("lora", "full"), default="lora", help="what the peer trains of its critic")
    parser.add_argument("--settings", nargs="+", default=[], metavar="KEY=VALUE", help="ours next to itself with these")
    parser.add_argument("--steps", type=int, default=14)
    parser.add_argument("--every", type=int, default=2, help="steps between evaluations")
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--side", choices=(OURS, PEER), help=argparse.SUPPRESS)
    args = parser.parse_args()
    progress.log_to_console()
    if args.settings and (args.peer or args.compatibility):
        parser.error("--settings compares ours with itself")
    if args.steps % args.every or args.steps < 2 * args.every:
        parser.error("--steps takes a multiple of --every, twice it at least")
    if args.one is not None:
        measure = measure_ours if args.side == OURS or args.settings else measure_peer
        measure(args, args.one, place_of(args, args.one, args.side))
        return
    first, _, last = args.seeds.partition("-")
    seeds = range(int(first), int(last or first) + 1)
    run_all(args, seeds)
    files = {
        seed: {side: place_of(args, seed, side) / f"{side}.json" for side in reversed(sides_of(args))} for seed in seeds
    }
    summary = curves.report({seed: {s: curve_of(args, f) for s, f in sides.items()} for seed, sides in files.items()})
    if args.settings:
        means = {
            seed: {s: json.loads(f.read_text())["means"] for s, f in sides.items()} for seed, sides in files.items()
        }
        summary["means"] = curves.compare_means(list(means.values()))
    print(json.dumps(summary))


if __name__ == "__main__":
    main()
