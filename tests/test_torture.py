"""A short run of scripts/torture.py: killed, interrupted, damaged and starved runs end with the same bits."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[1] / "scripts" / "torture.py"
SHORT = {
    "kills": 3,
    "signals": 3,
    "flips": 40,
    "truncations": 10,
    "writes": 4,
    "drops": 3,
    "rivals": 3,
    "memory": 0,
    "cold": 0,
    "processes": 2,
}


def test_whatever_happens_to_a_run_it_ends_with_the_same_bits(tmp_path):
    numbers = [text for name, number in SHORT.items() for text in (f"--{name}", str(number))]
    command = [sys.executable, str(SCRIPT), "--short", "--out", str(tmp_path / "t"), *numbers]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = json.loads((tmp_path / "t" / "torture.json").read_text())["lines"]
    assert {line["stage"] for line in lines} == {"sft", "train-rm", "ppo"}
    tried = {(line["test"], line["stage"]): line["tried"] for line in lines}
    assert len(tried) == 27 and all(number >= 3 for (test, _), number in tried.items() if test != "memory gives out")
