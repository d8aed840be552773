"""CPU seconds and memory of one PPO step, on random weights, alone or beside another trainer.

    python scripts/benchmark_ppo.py [--size A B] [--rounds N] [--json FILE] [--set key=value ...]
                                    [--peer PYTHON --peer-script FILE [--peer-critic full|lora]]

The work: N prompts of 16 to 64 tokens, 48 sampled tokens each, temperature 0.7 and no stop; old and reference logprobs,
values, scores of a reward role; then 4 epochs of 4 minibatches for the policy, and what the critic learns. Float32,
LoRA r 16 on every linear layer, one thread, each run in a fresh process. Size A is a Llama of 1.1 M parameters and N
32, B one of 30 M and N 16. With a peer both are run in turn, and the ratios are of medians of CPU seconds a step, peer
over ours. The peer's script prints JSON with total_cpu_s and peak_rss_mb. With ``--peer-critic lora`` both have the
same critic: the peer's value model has LoRA of the same rank, and ours is a role trained by gradients (value.fit:
gradient).
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

THREADS = {
    "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"
}  # fmt: skip
SIZES: dict[str, dict[str, Any]] = {
    "A": {
        "hidden_size": 128,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "intermediate_size": 384,
        "vocab_size": 2048,
    },
    "B": {
        "hidden_size": 512,
        "num_hidden_layers": 8,
        "num_attention_heads": 8,
        "num_key_value_heads": 8,
        "intermediate_size": 1408,
        "vocab_size": 8192,
    },
}
BATCH = {"A": 32, "B": 16}
STEPS = {"A": 3, "B": 2}
SHORTEST, LONGEST, NEW_TOKENS, EPOCHS, MINIBATCHES = 16, 64, 48, 4, 4
LORA_CRITIC = """
import json, runpy, sys
from peft import LoraConfig, inject_adapter_in_model
from transformers import AutoModelForSequenceClassification as Classifier
load = Classifier.from_pretrained
def with_adapter(path, *args, **settings):
    model = load(path, *args, **settings)
    if str(path).endswith("value"):
        model = inject_adapter_in_model(LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"), model)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("lora_" in name or name.startswith("score"))
    return model
Classifier.from_pretrained = with_adapter
sys.argv = sys.argv[1:]
sys.path.insert(0, sys.argv[0].rpartition("/")[0])
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def ours(size: str, changes: list[str]) -> dict[str, Any]:
    """Run the work in this process: CPU seconds a step by phase, and the peak of the resident set."""
    import torch
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, LlamaConfig

    from rlhf.algorithms.algorithm import algorithm_of
    from rlhf.config import load
    from rlhf.config.stages import PpoConfig
    from rlhf.data.batches import PassSize
    from rlhf.data.chat_format import ChatFormat
    from rlhf.data.tokenised import PromptRow
    from rlhf.evaluation.policy_samples import SampledPolicy, sampling_of
    from rlhf.models.base import Base, load_tokenizer, settle
    from rlhf.models.heads import ScalarHead
    from rlhf.models.roles import SharedBase
    from rlhf.records import Message
    from rlhf.rollouts.hf import HfEngine
    from rlhf.runs import runtime
    from rlhf.scoring.shared import SharedScorer
    from rlhf.training.collector import Collector, CollectorSettings
    from rlhf.training.critics import Critic
    from rlhf.training.experience import Passes
    from rlhf.training.optimizer import Optimizer
    from rlhf.training.policy_update import PolicySettings, PolicyUpdate
    from rlhf.training.solved_critic import LeastSquares
    from rlhf.training.trained_critic import ValueRole, ValueSettings

    torch.set_num_threads(1)
    shape, N, steps = SIZES[size], BATCH[size], STEPS[size]
    settings = [
        "prompts.path=x",
        f"batch.batch_size={N}",
        f"batch.minibatch_size={N // MINIBATCHES}",
        f"sampling.max_new_tokens={NEW_TOKENS}",
        "sampling.temperature=0.7",
        f"update.epochs={EPOCHS}",
        *changes,
    ]
    config = load.load(PpoConfig, None, settings)
    device = runtime.set_up(config.runtime, 0)
    imports = runtime.peak_rss_mb()
    model = AutoModelForCausalLM.from_config(
        LlamaConfig(max_position_embeddings=1024, tie_word_embeddings=True, **shape)
    )
    settle(model)
    tokenizer = load_tokenizer("demo:base")
    chat = ChatFormat(tokenizer, None, 1024)
    chat.end_id = shape["vocab_size"]  # no token: every response has its full length
    chat.end_ids = (chat.end_id,)
    base = Base(model, tokenizer, chat, "random", "", device)
    roles = SharedBase(base)
    lora = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    trains_value = config.value.fit == "gradient"
    for name in ("policy", "reference", "reward/0", *(("value",) if trains_value else ())):
        head = ScalarHead(base.hidden_size) if name in ("reward/0", "value") else None
        roles.add(name, adapter=lora, head=head, trained=name in ("policy", "value"))
    optimizer = Optimizer(roles.trained_parameters("policy"), 1e-5, 10_000)
    section, algorithm = config.batch, algorithm_of(config.update)
    size = PassSize(section.micro_batch_size, section.micro_batch_tokens)
    passes = Passes(size, chat.pad_id, device)
    critic: Critic = LeastSquares(base.hidden_size, device)
    if trains_value:
        learning = ValueSettings(config.update.epochs, section.minibatch_size, config.update.value_clip_range)
        critic = ValueRole(roles, Optimizer(roles.trained_parameters("value"), 1e-5, 10_000), passes, learning)
    engine = HfEngine(roles, "policy", chat, config.sampling.concurrency)
    scorer = SharedScorer(roles, "reward/0", PassSize(config.batch.micro_batch_size))
    collector = Collector(
        SampledPolicy(roles, engine, chat, size),
        scorer,
        critic,
        algorithm,
        CollectorSettings(
            sampling_of(config.sampling, 0),
            config.missing_eos,
            config.kl,
            config.update,
            config.samples_per_prompt,
            config.reads_reference(),
        ),
    )
    learned = PolicySettings(
        config.update, section.minibatch_size, config.sampling.temperature, config.kl.place == "loss"
    )
    policy = PolicyUpdate(roles, optimizer, algorithm, passes, learned)
    chance = random.Random(0)
    message = (Message("user", "x"),)

    def prompt() -> PromptRow:
        length = chance.randint(SHORTEST, LONGEST)
        return PromptRow(message, [chance.randrange(10, shape["vocab_size"]) for _ in range(length)])

    spent: dict[str, list[float]] = {"rollout": [], "score": [], "update": [], "total": []}
    sampled = [0.0]
    generate = engine.generate

    def timed(*args: Any) -> Any:
        started = time.process_time()
        found = generate(*args)
        sampled[0] = time.process_time() - started
        return found

    engine.generate = timed  # type: ignore[method-assign]
    for step in range(steps + 1):
        started = time.process_time()
        batch = collector.collect([prompt() for _ in range(N)], step * N, 0.05)
        collected = time.process_time()
        figures = policy.learn(batch, step, step, 0.05)
        critic.learn(batch, step, step)
        ended = time.process_time()
        assert figures["update/optimizer_steps"] == EPOCHS * MINIBATCHES
        assert int(batch.mask.sum()) == N * NEW_TOKENS
        if step:
            phases = (sampled[0], collected - started - sampled[0], ended - collected, ended - started)
            for name, seconds in zip(spent, phases, strict=True):
                spent[name].append(seconds)
    return {
        **{f"{name}_cpu_s": statistics.fmean(values) for name, values in spent.items()},
        "peak_rss_mb": runtime.peak_rss_mb(),
        "imports_rss_mb": imports,
        "response_tokens_per_cpu_s": N * NEW_TOKENS / statistics.fmean(spent["total"]),
    }


def in_fresh_process(size: str, changes: list[str]) -> dict[str, Any]:
    command = [sys.executable, __file__, "--here", "--size", size, "--set", *changes]
    return _last_json(command, dict(os.environ, **THREADS))


def peer(python: str, script: Path, size: str, critic: str) -> dict[str, Any]:
    """One run of the peer: the figures that its script prints."""
    start = [python, str(script)] if critic == "full" else [python, "-c", LORA_CRITIC, str(script)]
    command = [*start, "--size", size, "--steps", str(STEPS[size]), "--batch", str(BATCH[size]), "--threads", "1"]
    found = _last_json(command, dict(os.environ, **THREADS))
    names = {"gen": "rollout", "score": "score", "opt": "update", "total": "total"}
    return {
        **{f"{ours}_cpu_s": found[f"{theirs}_cpu_s"] for theirs, ours in names.items()},
        "peak_rss_mb": found["peak_rss_mb"],
        "imports_rss_mb": found["rss_after_import_mb"],
        "response_tokens_per_cpu_s": found["response_tokens_per_cpu_s"],
    }


def _last_json(command: list[str], environment: dict[str, str]) -> dict[str, Any]:
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command[:3])} failed:\n{done.stderr[-2000:]}")
    found: dict[str, Any] = json.loads(done.stdout[done.stdout.index("{") :])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", nargs="+", default=["A", "B"], choices=["A", "B"])
    parser.add_argument("--rounds", type=int, default=3, help="processes of each, one after the other")
    parser.add_argument("--json", type=Path, help="write the last line there too")
    parser.add_argument("--set", nargs="*", default=[], dest="changes", help="changes of the PPO config")
    parser.add_argument("--peer", help="python of the peer's environment")
    parser.add_argument("--peer-script", type=Path)
    parser.add_argument("--peer-critic", choices=["full", "lora"], default="full")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.here:
        print(json.dumps(ours(arguments.size[0], arguments.changes)))
        return
    same = ["value.fit=gradient"] if arguments.peer and arguments.peer_critic == "lora" else []
    runs: dict[str, Any] = {size: {"ours": [], "peer": []} for size in arguments.size}
    print(f"{'':8} {'rollout':>8} {'score':>8} {'update':>8} {'total':>8} CPU s a step   {'peak':>6} (imports)")
    for _ in range(arguments.rounds):
        for size in arguments.size:
            found = {"ours": in_fresh_process(size, [*same, *arguments.changes])}
            if arguments.peer:
                found["peer"] = peer(arguments.peer, arguments.peer_script, size, arguments.peer_critic)
            for who, figures in found.items():
                runs[size][who].append(figures)
                phases = " ".join(
                    f"{figures[f'{name}_cpu_s']:8.3f}" for name in ("rollout", "score", "update", "total")
                )
                memory = f"{figures['peak_rss_mb']:5.0f} MB ({figures['imports_rss_mb']:.0f})"
                print(f"{size} {who:6} {phases}                {memory}", flush=True)
    report: dict[str, Any] = {"sizes": runs, "peer_critic": arguments.peer_critic if arguments.peer else None}
    report["median_cpu_s"] = {
        size: {who: statistics.median(f["total_cpu_s"] for f in figures) for who, figures in by.items() if figures}
        for size, by in runs.items()
    }
    if arguments.peer:
        report["ratios"] = {size: by["peer"] / by["ours"] for size, by in report["median_cpu_s"].items()}
    line = json.dumps(report)
    if arguments.json:
        arguments.json.write_text(line, "utf-8")
    print(line)


if __name__ == "__main__":
    main()
