"""scripts/gpu_check.py at its smallest: every phase of a PPO step, checks that fail, reasons for what is skipped."""

from __future__ import annotations

import importlib
import importlib.util
import json
import sys
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[1] / "scripts"
PHASES = ["rollout", "rescoring", "values and scores", "policy update", "value update", "value fit"]


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    return importlib.import_module("gpu_check")


def run(script, monkeypatch, directory, *arguments):
    monkeypatch.setattr(sys, "argv", ["gpu_check.py", "--tiny", "--out", str(directory), *arguments])
    with pytest.raises(SystemExit) as stop:
        script.main()
    return stop.value.code, json.loads((directory / "gpu_check.json").read_text("utf-8"))


def test_a_step_is_timed_measured_and_checked_a_phase_at_a_time(script, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(script, "TINY", script.TINY[:1])
    rc, found = run(script, monkeypatch, tmp_path)
    assert rc == 0 and found["failed"] == [] and len(found["checks"]) >= 5
    rows = {row["phase"]: row for row in found["phases"]}
    assert list(rows) == PHASES
    case = script.TINY[0]
    prompts = case.rows * case.prompt - 3  # one prompt is three tokens shorter
    sampled = rows["rollout"]["tokens"]
    assert case.rows <= sampled <= case.rows * case.response
    assert all(rows[name]["tokens"] == prompts + sampled for name in PHASES[1:-1])
    assert rows["value fit"]["tokens"] == 2 * sampled
    for name in ("rollout", "rescoring", "policy update", "value update"):
        assert rows[name]["predicted_bytes"] == pytest.approx(rows[name]["measured_bytes"], rel=0.1), name
    assert "tokens/s" in capsys.readouterr().out


def test_a_check_that_fails_is_the_exit_code(script, monkeypatch, tmp_path):
    monkeypatch.setattr(script, "TINY", script.TINY[:1])
    monkeypatch.setattr(script, "RATIO_TOLERANCE", -1.0)
    rc, found = run(script, monkeypatch, tmp_path)
    assert rc == 1 and found["failed"] == ["tiny float32: update sees the rollout's policy"]


def test_what_is_not_run_is_named_with_its_reason(script, monkeypatch, tmp_path):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    rc, found = run(script, monkeypatch, tmp_path, "--minutes", "0")
    assert rc == 0 and found["phases"] == []
    assert [row["why"].split(",")[0] for row in found["skipped"]] == ["0 s are left", "bitsandbytes is not installed"]
