"""The block that ``make reproduce-gpu`` prints to be pasted, of a report of known figures; it asks for no GPU."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[1] / "scripts"
WHERE = {
    "device": "NVIDIA L4", "memory_gib": 22.0, "cuda": "12.8", "python": "3.11.7",
    "versions": {"torch": "2.13.0", "trl": "1.16.0"}, "commit": "abc123",
}  # fmt: skip
INTERVAL = {"estimate": 0.25, "low": 0.1, "high": 0.4}
POLICY = {"gold": INTERVAL, "by_seed": [0.2, 0.3], "over_sft": INTERVAL, "kl": None, "ended": 0.9}
COST = {"stage": "ppo", "seconds": 1234.5, "peak_mb": 5000.0, "planned_mb": None, "step_s": 3.25, "planned_step_s": 2.0}
REPORT = {"bfloat16": {"seeds": ["0", "1"], "policies": {"PPO": POLICY}, "costs": [COST], "curve": []}}


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    return importlib.import_module("reproduce_gpu")


def test_the_block_has_machine_versions_commit_tables_and_one_line_of_json(script, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(sys, "argv", ["reproduce_gpu.py", "--out", str(tmp_path), "--block"])
    with pytest.raises(SystemExit, match="not there yet: .*machine.json, .*report.json"):
        script.main()
    (tmp_path / "machine.json").write_text(json.dumps(WHERE))
    (tmp_path / "report.json").write_text(json.dumps(REPORT))
    script.main()
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "**Qwen/Qwen2.5-0.5B-Instruct** at `7ae557604adf`, bfloat16, seeds 0, 1"
    assert lines[1] == "NVIDIA L4, 22.0 GiB, CUDA 12.8; commit abc123"
    assert lines[2] == "Python 3.11.7, torch 2.13.0, trl 1.16.0"
    assert "| PPO | +0.25 [+0.10, +0.40] | +0.25 [+0.10, +0.40] | - | 0.90 |" in lines
    assert "| ppo | 1,234 | 3.25 | 2.00 | 5,000 | - |" in lines
    pasted = json.loads(lines[-1])
    assert pasted["bfloat16"] == REPORT["bfloat16"] and pasted["machine"] == WHERE and len(pasted["revision"]) == 40


def test_without_a_gpu_nothing_is_downloaded_or_run(script, monkeypatch, tmp_path):
    monkeypatch.setattr(script.torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(script, "download", lambda: pytest.fail("downloaded"))
    monkeypatch.setattr(sys, "argv", ["reproduce_gpu.py", "--out", str(tmp_path)])
    with pytest.raises(SystemExit, match="No CUDA device here"):
        script.main()
