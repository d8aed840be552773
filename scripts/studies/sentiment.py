"""The sentiment task of Ziegler et al. (2019, arXiv 1909.08593) on a real language model, end to end.

    python scripts/studies/sentiment.py --model DIR [--seeds 0-2] [--dtypes float32,bfloat16] [--out runs/sentiment]

The policy continues reviews; the more positive, the better. For each dtype and seed, with own prompts and by this
project's own command line: texts of the model, each cut at a sentence's end, teach it to stop (``rlhf sft``); pairs of
its answers are labelled by gold with noise (``rlhf collect``); a reward model learns the labels (``rlhf train-rm``) and
is examined (``rlhf eval-rm``); PPO optimises against it, whatever the examination says. Its cheap competitor is the
best of n SFT answers by the same reward model (``rlhf rank``). Gold is vaderSentiment (``pip install
'rlhf-pipeline[studies]'``). It trains and chooses nothing, and is measured on prompts that no stage has seen.

Resumable: what is finished is left alone. Ends with tables of what is there (``--report`` prints them alone) and
OUT/report.json. ``--model`` is an instruct model of any size; what is asked of it was chosen for one of 135 M
parameters, where a seed takes half an hour to an hour on one core.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import sentiment_report
import sentiment_world as world
import yaml

from rlhf.runs import storage

TOKENS, TEMPERATURE, BEST_OF = 48, 0.7, 16
RATES = {"sft": 5e-4, "train-rm": 3e-4, "ppo": 1.5e-4}
STEPS, EVALUATED_EVERY = 10, 2
SAMPLING = {"max_new_tokens": TOKENS, "temperature": TEMPERATURE}
CHAIN = ("sft", "comparisons", "examination", "train-rm", "eval-rm", "ppo")
STAGE_OF = {"comparisons": "collect", "examination": "collect"}


@dataclass(frozen=True)
class Chain:
    """One seed at one dtype, in the directory ``at``."""

    model: str
    dtype: str
    seed: int
    at: Path

    def run(self, name: str) -> str:
        return str(self.at / name)

    def data(self, name: str) -> Path:
        return self.at / "data" / f"{name}.jsonl"


def configs(chain: Chain) -> dict[str, dict[str, Any]]:
    """The config of every stage, by its name in ``CHAIN``."""

    def learning(stage: str) -> dict[str, Any]:
        return {"learning_rate": RATES[stage], "warmup_ratio": 0.1}

    def collected(name: str) -> dict[str, Any]:
        return {
            "run_dir": chain.run(name),
            "policy": chain.run("sft"),
            "prompts": {"path": str(chain.data(name))},
            "samples_per_prompt": 2,
            "labeller": {"function": "sentiment_world:label"},
        }

    def preferences(name: str) -> dict[str, str]:
        return {"path": f"{chain.run(name)}/preferences.jsonl"}

    found: dict[str, dict[str, Any]] = {
        "sft": {
            "run_dir": chain.run("sft"),
            "model": {"path": chain.model, "dtype": chain.dtype},
            "data": {"path": str(chain.data("sft"))},
            "max_length": 192,
            "holdout_fraction": 0.1,
            "epochs": 1,
            "optim": learning("sft"),
            "batch": {"batch_size": 16, "micro_batch_size": 8},
            "sampling": SAMPLING,
            "end_token_samples": 64,
            "min_end_token_rate": 0.5,
        },
        "comparisons": collected("comparisons"),
        "examination": collected("examination"),
        "train-rm": {
            "run_dir": chain.run("train-rm"),
            "policy": chain.run("sft"),
            "data": preferences("comparisons"),
            "max_length": 192,
            "holdout_fraction": 0.1,
            "epochs": 1,
            "optim": learning("train-rm"),
            "batch": {"batch_size": 16, "micro_batch_size": 8},
            "sampling": SAMPLING,
            "standardise_samples": 64,
        },
        "eval-rm": {
            "run_dir": chain.run("eval-rm"),
            "reward": chain.run("train-rm"),
            "data": preferences("examination"),
            "max_length": 256,
            "probes": {"num_prompts": 40},
        },
        "ppo": {
            "run_dir": chain.run("ppo"),
            "policy": chain.run("sft"),
            "rewards": [{"run": chain.run("train-rm"), "examination": chain.run("eval-rm"), "accept": "failed"}],
            "prompts": {"path": str(chain.data("ppo"))},
            "sampling": SAMPLING,
            "kl": {"coef": 0.05},
            "batch": {"batch_size": 32, "minibatch_size": 16, "micro_batch_size": 8},
            "optim": {"learning_rate": RATES["ppo"]},
            "value": {"pretrain_steps": 3},
            "steps": STEPS,
            "save_every": EVALUATED_EVERY,
            "use": "last",
            "report_to": "none",
            "evaluation": {
                "every": EVALUATED_EVERY,
                "num_prompts": 32,
                "data": {"path": str(chain.data("validation"))},
            },
        },
    }
    return {name: {"seed": chain.seed, **config} for name, config in found.items()}


def rlhf(chain: Chain, name: str, *arguments: str, out: Path | None = None) -> None:
    """One command in a process of its own, which finds ``sentiment_world``; ``out`` is its standard output.

    Raises:
        SystemExit: with its exit code, where it failed.
    """
    print(f"[{chain.dtype}, seed {chain.seed}] {name}", file=sys.stderr, flush=True)
    here = os.pathsep.join(filter(None, (str(Path(__file__).parent), os.environ.get("PYTHONPATH"))))
    command = [sys.executable, "-m", "rlhf", *arguments]
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": here}, stdout=subprocess.PIPE if out else None)
    if done.returncode:
        print(f"rlhf {' '.join(arguments)}: exit code {done.returncode}", file=sys.stderr)
        raise SystemExit(done.returncode)
    if out:
        out.write_bytes(done.stdout)


def once(path: Path, make: Callable[[Path], None]) -> None:
    """``make`` a file under another name, unless it is there."""
    if not path.is_file():
        make(path.with_suffix(".part"))
        path.with_suffix(".part").replace(path)


def sampled(chain: Chain, policy: str, prompts: str) -> Callable[[Path], None]:
    """What ``once`` makes of answers of ``policy`` to one part of the prompts."""
    how = ("--temperature", f"{TEMPERATURE}", "--max-new-tokens", f"{TOKENS}", "--seed", f"{chain.seed}")
    files = ("--prompts", str(chain.data(prompts)), "--out")
    return lambda out: rlhf(chain, out.stem, "generate", policy, *how, *files, str(out))


def on_device() -> list[str]:
    """What ``rlhf plan`` is told of the GPU, where there is one: it plans for a CPU otherwise."""
    import torch

    if not torch.cuda.is_available():
        return []
    return ["--gpu", f"{torch.cuda.get_device_properties(0).total_memory >> 20}MB"]


def run(chain: Chain, texts: list[str], sizes: dict[str, int]) -> None:
    """Everything of one seed at one dtype that is not there yet."""
    chain.data("").parent.mkdir(parents=True, exist_ok=True)
    for name, rows in world.parts(texts, chain.seed, sizes).items():
        once(chain.data(name), lambda path, rows=rows: world.write(path, rows))  # type: ignore[misc]
    own, cut = chain.data("own-texts"), chain.data("sft")
    once(own, sampled(chain, chain.model, "demonstrations"))
    once(cut, lambda path: world.write(path, world.demonstrations(world.read(own))))
    for name, config in configs(chain).items():
        storage.write_text(chain.at / f"{name}.yaml", yaml.safe_dump(config, sort_keys=False))
    stages = [{"stage": STAGE_OF.get(name, name), "config": str(chain.at / f"{name}.yaml")} for name in CHAIN]
    pipeline = chain.at / "pipeline.yaml"
    storage.write_text(pipeline, yaml.safe_dump({"stages": stages}))
    rlhf(chain, "the chain", "pipeline", "-c", str(pipeline))
    answers = {"base": chain.model, "sft-answers": chain.run("sft"), "ppo-answers": chain.run("ppo")}
    for name, policy in answers.items():
        once(chain.data(name), sampled(chain, policy, "test"))
    once(
        chain.data("ranked"),
        lambda out: rlhf(
            chain,
            "best of n",
            "rank",
            chain.run("sft"),
            "--reward",
            chain.run("train-rm"),
            "--judge",
            "sentiment_world:gold",
            "--prompts",
            str(chain.data("test")),
            "-n",
            str(BEST_OF),
            "--out",
            str(out),
        ),
    )
    files = [str(chain.at / f"{name}.yaml") for name in CHAIN if name not in STAGE_OF]
    once(
        chain.at / sentiment_report.PLAN,
        lambda out: rlhf(chain, "plan", "plan", *files, *on_device(), "--measure", "--json", out=out),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="directory or hub id of an instruct model")
    parser.add_argument("--reviews", type=Path, help="file of reviews, one a line, whose openings are continued")
    parser.add_argument("--seeds", default="0-2", help="first-last, or one number")
    parser.add_argument("--dtypes", default="float32,bfloat16", help="of the frozen base")
    parser.add_argument("--out", type=Path, default=Path("runs/sentiment"))
    parser.add_argument(
        "--small", action="store_true", help="a quarter of the prompts: whether it runs, not what it shows"
    )
    parser.add_argument("--report", action="store_true", help="the tables of what is there, and nothing else")
    args = parser.parse_args()
    if not args.report:
        if args.model is None:
            parser.error("--model is needed")
        world.analyser()
        first, _, last = args.seeds.partition("-")
        texts = world.openings_of(args.reviews) if args.reviews else world.openings()
        sizes = {name: -(-size // 4) if args.small else size for name, size in world.SIZES.items()}
        for dtype in args.dtypes.split(","):
            for seed in range(int(first), int(last or first) + 1):
                run(Chain(args.model, dtype, seed, args.out / dtype / str(seed)), texts, sizes)
    sentiment_report.report(args.out)


if __name__ == "__main__":
    main()
