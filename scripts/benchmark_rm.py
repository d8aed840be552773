"""CPU seconds of reward training on rankings of four, beside TRL's pairwise trainer on the same comparisons.

    python scripts/benchmark_rm.py [--size A B] [--rounds N] [--json FILE]

The work: 8 prompts of 16 to 64 tokens with 4 ranked responses of 16 to 96 tokens each, 48 comparisons, random weights
of the sizes of ``benchmark_ppo.py``, LoRA r 16 on every linear layer, float32, one thread, each in a fresh process.
Here it is one optimizer step on 32 sequences; the pairwise trainer takes six steps of 8 pairs, without gradient
checkpointing. The last line is JSON; ``ratios`` are of medians of CPU seconds for the 48 comparisons, TRL / ours.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmark_ppo import SIZES, THREADS

PROMPTS, RANKED, STEPS = 8, 4, {"A": 6, "B": 3}


def rankings(vocabulary: int, count: int) -> list[tuple[list[int], list[list[int]]]]:
    """Prompts, each with its responses, the best first."""
    chance = random.Random(0)

    def ids(shortest: int, longest: int) -> list[int]:
        return [chance.randrange(10, vocabulary) for _ in range(chance.randint(shortest, longest))]

    return [(ids(16, 64), [ids(16, 96) for _ in range(RANKED)]) for _ in range(count)]


def model_of(size: str) -> Any:
    from transformers import AutoModelForCausalLM, LlamaConfig

    settings = LlamaConfig(max_position_embeddings=1024, tie_word_embeddings=True, pad_token_id=0, **SIZES[size])
    return AutoModelForCausalLM.from_config(settings)


def ours(size: str) -> dict[str, float]:
    """The stage's own step, on the rankings."""
    import torch
    from peft import LoraConfig

    from rlhf.config.train_rm import RewardConfig
    from rlhf.data.batches import DataOrder
    from rlhf.data.chat_format import ChatFormat
    from rlhf.data.tokenised import Group
    from rlhf.models.base import Base, load_tokenizer, settle
    from rlhf.models.heads import ScalarHead
    from rlhf.models.roles import SharedBase
    from rlhf.records import Comparison, Judgement, Message
    from rlhf.reward.length_penalty import LengthPenalty
    from rlhf.reward.member_step import Learner
    from rlhf.reward.member_turns import Member
    from rlhf.runs import runtime
    from rlhf.training.optimizer import Optimizer

    config = RewardConfig.model_validate({"data": {"path": "x"}, "steps": 1, "batch": {"batch_size": PROMPTS}})
    device = runtime.set_up(config.runtime, 0)
    model = model_of(size)
    settle(model)
    tokenizer = load_tokenizer("demo:base")
    base = Base(model, tokenizer, ChatFormat(tokenizer, None, 1024), "random", "", device)
    roles = SharedBase(base)
    lora = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    roles.add("reward", adapter=lora, head=ScalarHead(base.hidden_size), trained=True)
    optimizer = Optimizer(roles.trained_parameters("reward"), 1e-4, 100)
    member = Member("reward", [], 1, optimizer, DataOrder(1, 1, 0), LengthPenalty(0.0, []))
    pairs = tuple(Judgement(i, j, 1.0) for i, j in itertools.combinations(range(RANKED), 2))
    record = Comparison((Message("user", "x"),), ("",) * RANKED, pairs, "here")
    learner, spent = Learner(config, base, roles), []
    for step in range(STEPS[size] + 1):
        drawn = rankings(SIZES[size]["vocab_size"], PROMPTS)
        groups = [Group(prompt, responses, pairs, record) for prompt, responses in drawn]
        started = time.process_time()
        learner.step(member, groups, step)
        spent.append(time.process_time() - started)
    assert torch.get_num_threads() == 1
    return {"cpu_s": statistics.fmean(spent[1:]), "peak_rss_mb": runtime.peak_rss_mb()}


def pairwise(size: str) -> dict[str, float]:
    """TRL's RewardTrainer on the same comparisons, pair by pair."""
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForSequenceClassification, LlamaConfig, TrainerCallback
    from trl import RewardConfig, RewardTrainer

    from rlhf.models.base import load_tokenizer
    from rlhf.runs import runtime

    rows = [
        {"chosen_ids": [*prompt, *responses[i]], "rejected_ids": [*prompt, *responses[j]]}
        for prompt, responses in rankings(SIZES[size]["vocab_size"], PROMPTS)
        for i, j in itertools.combinations(range(RANKED), 2)
    ]
    settings = LlamaConfig(
        max_position_embeddings=1024, tie_word_embeddings=True, pad_token_id=0, num_labels=1, **SIZES[size]
    )
    model = AutoModelForSequenceClassification.from_config(settings)
    clock: list[float] = []

    class Clock(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            clock.append(time.process_time())

        def on_step_end(self, *_: Any, **__: Any) -> None:
            clock[-1] = time.process_time() - clock[-1]

    steps = len(rows) // 8
    with tempfile.TemporaryDirectory() as directory:
        arguments = RewardConfig(
            output_dir=directory,
            per_device_train_batch_size=8,
            max_steps=(STEPS[size] + 1) * steps,
            bf16=False,
            use_cpu=True,
            report_to=[],
            save_strategy="no",
            gradient_checkpointing=False,
            disable_tqdm=True,
            max_length=None,
            learning_rate=1e-4,
            logging_steps=1000,
        )
        trainer = RewardTrainer(
            model=model,
            args=arguments,
            train_dataset=Dataset.from_list(rows),
            processing_class=load_tokenizer("demo:base"),
            peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="SEQ_CLS"),
            callbacks=[Clock()],
        )
        trainer.train()
    return {"cpu_s": sum(clock[steps:]) / STEPS[size], "peak_rss_mb": runtime.peak_rss_mb()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", nargs="+", default=["A", "B"], choices=["A", "B"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, help="write the last line there too")
    parser.add_argument("--here", choices=["ours", "trl"], help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.here:
        print("FOUND", json.dumps((ours if arguments.here == "ours" else pairwise)(arguments.size[0])))
        return
    runs: dict[str, dict[str, list[dict[str, float]]]] = {size: {"ours": [], "trl": []} for size in arguments.size}
    for _, size, who in itertools.product(range(arguments.rounds), arguments.size, ("ours", "trl")):
        command = [sys.executable, __file__, "--here", who, "--size", size]
        done = subprocess.run(command, env=dict(os.environ, **THREADS), capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(done.stderr[-2000:])
        found = json.loads(done.stdout.rpartition("FOUND ")[2])
        runs[size][who].append(found)
        print(
            f"{size} {who:5} {found['cpu_s']:7.3f} CPU s for 48 comparisons, {found['peak_rss_mb']:.0f} MB", flush=True
        )
    medians = {size: {who: statistics.median(f["cpu_s"] for f in by[who]) for who in by} for size, by in runs.items()}
    report = {"sizes": runs, "ratios": {size: by["trl"] / by["ours"] for size, by in medians.items()}}
    if arguments.json:
        arguments.json.write_text(json.dumps(report), "utf-8")
    print(json.dumps(report))


if __name__ == "__main__":
    main()
