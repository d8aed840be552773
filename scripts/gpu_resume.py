"""A PPO run of the embedded world that is cut off and resumed on this device, next to the run that was not."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

from rlhf.runs import artifacts
from rlhf.runs.run_directory import read_metrics

ROOT = Path(__file__).parents[1]
CUT, STEPS = 1, 2
REWARD = "def short(prompts, responses):\n    return [-len(response) / 40 for response in responses]\n"
SFT: dict[str, Any] = {
    "data": {"path": "demo:demonstrations?size=64"}, "steps": 2, "max_length": 256, "end_token_samples": 4,
    "min_end_token_rate": 0.0, "require_improvement": False, "batch": {"batch_size": 8, "micro_batch_size": 8},
    "sampling": {"max_new_tokens": 24},
}  # fmt: skip
PPO: dict[str, Any] = {
    "policy": "runs/sft", "prompts": {"path": "demo:prompts?size=40", "max_tokens": 96}, "steps": STEPS,
    "rewards": [{"function": "reward:short"}], "save_every": CUT, "keep_checkpoints": STEPS + 1, "report_to": "none",
    "batch": {"batch_size": 8, "minibatch_size": 8, "micro_batch_size": 8}, "sampling": {"max_new_tokens": 24},
    "value": {"pretrain_steps": 0}, "evaluation": {"every": STEPS, "num_prompts": 4},
}  # fmt: skip
LARGEST = 1e-2  # by which a figure of the first rollout after the cut may differ where bits are not promised


def outcome(at: Path, same_bits: bool) -> tuple[bool, str]:
    """Whether the resumed run went on as is claimed, and in words.

    Args:
        at: an empty directory to work in.
        same_bits: whether every figure must be the same, as on a CPU; else those of the rollout after the cut are
            compared, which is sampled and scored by the weights that were saved.
    """
    whole, again = run(at)
    first = next(row for row in whole if "rollout/score" in row and row["step"] == CUT + 1)
    same = next(row for row in again if "rollout/score" in row and row["step"] == CUT + 1)
    names = [name for name in first if name.startswith("rollout/") and isinstance(first[name], float)]
    apart = max(abs(first[name] - same[name]) for name in names)
    if figures(whole) == figures(again):
        return True, "every figure is that of the run that was not cut off"
    found = f"figures of the rollout after the cut are at most {apart:.2g} apart"
    return not same_bits and apart <= LARGEST, f"{found}, not bit for bit"


def figures(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Without times and memory."""
    return [{key: row[key] for key in row if not key.startswith(("time/", "memory/"))} for row in rows]


def run(at: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The metrics of a whole run, and of a copy of it that is set back to step ``CUT`` and resumed."""
    (at / "reward.py").write_text(REWARD, "utf-8")
    _stage(at, "sft", SFT, "runs/sft")
    _stage(at, "ppo", PPO, "runs/whole")
    whole, copy = at / "runs/whole", at / "runs/cut"
    shutil.copytree(whole, copy)
    (copy / artifacts.MANIFEST).unlink()
    shutil.rmtree(copy / artifacts.ADAPTER)
    for path in copy.glob(f"{artifacts.CHECKPOINTS}/step-*"):
        if int(path.name.split("-")[1]) > CUT:
            shutil.rmtree(path)
    _stage(at, "ppo", PPO, "runs/cut", "--resume")
    return read_metrics(whole), read_metrics(copy)


def _stage(at: Path, stage: str, config: dict[str, Any], run_dir: str, *arguments: str) -> None:
    """One stage in a process of its own.

    Raises:
        RuntimeError: with the end of what it said, where it failed.
    """
    (at / f"{stage}.yaml").write_text(yaml.safe_dump(config), "utf-8")
    command = [sys.executable, "-m", "rlhf", stage, "-c", f"{stage}.yaml", f"run_dir={run_dir}", *arguments]
    paths = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    done = subprocess.run(
        command, cwd=at, env={**os.environ, "PYTHONPATH": paths}, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise RuntimeError(f"rlhf {stage}: exit code {done.returncode}: {done.stderr[-800:]}")


if __name__ == "__main__":
    print(json.dumps(outcome(Path(sys.argv[1]), same_bits="--same-bits" in sys.argv)))
