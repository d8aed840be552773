"""What checkpoints cost: seconds of a save over fifty steps, in the quickstart's PPO and on a base of 118 M parameters.

    python scripts/checkpoint_cost.py [--quickstart runs/quickstart]

The small one is read from a finished quickstart. The large one is three steps on a random model, a few minutes.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from rlhf.demo import catalogue as demo
from rlhf.runs import artifacts, progress, run_directory

SAVED = re.compile(r"Saved \S+ in ([0-9.]+) s")
SHORT = ("batch.batch_size=16", "batch.micro_batch_size=8", "runtime.threads=2", "sampling.max_new_tokens=32")


def build(directory: Path) -> None:
    """A random Llama of 118 M parameters with the embedded world's tokenizer."""
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(demo.BASE)
    config = LlamaConfig(
        vocab_size=32_000,
        hidden_size=768,
        num_hidden_layers=12,
        num_attention_heads=12,
        num_key_value_heads=12,
        intermediate_size=2304,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = LlamaForCausalLM(config)
    progress.console.print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.0f} M parameters")
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)


def stage(name: str, *overrides: str) -> None:
    subprocess.run([sys.executable, "-m", "rlhf", name, "-c", f"configs/{name}.yaml", *overrides], check=True)


def large(home: Path) -> Path:
    """PPO's run directory after three steps, each with its checkpoint."""
    build(home / "model")
    data = ("data.path=demo:demonstrations?size=64", "end_token_samples=2", "min_end_token_rate=0")
    stage("sft", f"run_dir={home}/sft", f"model.path={home}/model", "epochs=1", *data, *SHORT)
    stage(
        "ppo",
        f"run_dir={home}/ppo",
        f"policy={home}/sft",
        "rewards=[{function: 'rlhf.demo.gold:reward'}]",
        "steps=3",
        "prompts.path=demo:prompts?size=200",
        "batch.minibatch_size=8",
        "save_every=1",
        "evaluation.every=100",
        "evaluation.num_prompts=2",
        "value.pretrain_steps=0",
        "report_to=none",
        *SHORT,
    )
    return home / "ppo"


def cost(run: Path) -> tuple[float, float]:
    """Median seconds of a save and of a step."""
    saves = [float(found) for found in SAVED.findall((run / artifacts.LOG).read_text())]
    rows = [row for row in run_directory.read_metrics(run) if "time/update_s" in row]
    return statistics.median(saves), statistics.median(row["time/rollout_s"] + row["time/update_s"] for row in rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quickstart", type=Path, default=Path("runs/quickstart"))
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="rlhf-cost-") as directory:
        places = {"118 M": large(Path(directory))}
        if (args.quickstart / "ppo").is_dir():
            places = {"quickstart": args.quickstart / "ppo", **places}
        found = {name: cost(run) for name, run in places.items()}
    rows = [(name, f"{save:.2f}", f"{step:.2f}", f"{save / (50 * step):.2%}") for name, (save, step) in found.items()]
    progress.show(progress.table("A checkpoint", ("", "save, s", "step, s", "save / 50 steps"), rows))
    print(json.dumps({name: {"save_s": save, "step_s": step} for name, (save, step) in found.items()}))


if __name__ == "__main__":
    main()
