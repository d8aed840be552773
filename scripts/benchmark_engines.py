"""What the two rollout engines cost: CPU seconds for a thousand sampled tokens, one thread, random weights.

    python scripts/benchmark_engines.py [--size A B] [--rounds N] [--json FILE]

Sizes are those of scripts/benchmark_ppo.py. Rows are answered 32 at a time, with 48 tokens at most: prompts that
differ, and prompts that are answered four times each, whose prefill the continuous engine shares; responses of full
length, and responses that end with a chance of 1 in 20 after every token, which leave the continuous engine's batch.
The fastest of N rounds counts. A ratio above 1 says that the continuous engine pays there. Its noise is its own, so
that where responses end by chance the two have other lengths.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import time
from pathlib import Path
from typing import Any

os.environ.update(OMP_NUM_THREADS="1", OMP_WAIT_POLICY="PASSIVE", HF_HUB_OFFLINE="1")

import torch
from benchmark_ppo import SIZES
from measuring import random_base
from peft import LoraConfig
from transformers import LlamaConfig

from rlhf.models.roles import SharedBase
from rlhf.rollouts.continuous import ContinuousEngine
from rlhf.rollouts.engine import Sampling
from rlhf.rollouts.hf import HfEngine

CONCURRENCY, NEW_TOKENS, PROMPT, CHANCE = 32, 48, 64, 20
SHAPES = {  # rows, answers a prompt, whether responses end by chance
    "prompts that differ, full length": (32, 1, False),
    "four answers a prompt, full length": (32, 4, False),
    "prompts that differ, random ends": (64, 1, True),
    "four answers a prompt, random ends": (64, 4, True),
}


def measure(size: str, rounds: int) -> dict[str, dict[str, float]]:
    """Shape -> CPU seconds for a thousand tokens by engine, and their ratio hf / continuous."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    shape = SIZES[size]
    config = LlamaConfig(max_position_embeddings=1024, tie_word_embeddings=True, **shape)
    base = random_base(config, "float32", torch.device("cpu"), None)
    base.chat.end_id = shape["vocab_size"]  # no token
    base.chat.end_ids = (base.chat.end_id,)
    lora = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    roles = SharedBase(base)
    roles.add("policy", adapter=lora, trained=True)
    engines = {"hf": HfEngine, "continuous": ContinuousEngine}
    found: dict[str, dict[str, float]] = {}
    for name, (rows, answers, ends) in SHAPES.items():
        chance = random.Random(0)
        prompts = [
            [chance.randrange(10, shape["vocab_size"]) for _ in range(chance.randint(PROMPT // 2, PROMPT))]
            for _ in range(rows // answers)
        ]
        repeated = [prompt for prompt in prompts for _ in range(answers)]
        stops = base.tokenizer.convert_ids_to_tokens(range(10, 10 + shape["vocab_size"] // CHANCE)) if ends else []
        how = Sampling(NEW_TOKENS, 1.0, 0, stop_tokens=tuple(stops))
        each: dict[str, float] = {}
        for engine, kind in engines.items():
            each[engine] = min(_seconds(kind(roles, "policy", base.chat, CONCURRENCY), repeated, how, rounds))
        found[name] = {**each, "hf / continuous": each["hf"] / each["continuous"]}
        print(f"{size} {name:36} {each['hf']:7.3f} {each['continuous']:10.3f} {each['hf'] / each['continuous']:15.2f}")
    return found


def _seconds(engine: HfEngine, prompts: list[list[int]], how: Sampling, rounds: int) -> list[float]:
    """CPU seconds for a thousand tokens, by round."""
    found = []
    for _ in range(rounds):
        started = time.process_time()
        rollout = engine.generate(prompts, how, range(len(prompts)))
        found.append((time.process_time() - started) * 1000 / sum(map(len, rollout.tokens)))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", nargs="+", default=["A", "B"], choices=["A", "B"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, help="write the last line there too")
    arguments = parser.parse_args()
    print(f"{'':38} {'hf':>7} {'continuous':>10} {'hf / continuous':>15}")
    report: dict[str, Any] = {size: measure(size, arguments.rounds) for size in arguments.size}
    line = json.dumps(report)
    if arguments.json:
        arguments.json.write_text(line, "utf-8")
    print(line)


if __name__ == "__main__":
    main()
