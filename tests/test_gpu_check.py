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
    """And single claims; resuming, whose processes take half a minute, by a stand-in."""
    monkeypatch.setattr(script, "TINY", script.TINY[:1])
    resumed = importlib.import_module("gpu_resume")
    monkeypatch.setattr(resumed, "outcome", lambda at, same_bits: (same_bits, "a stand-in"))
    rc, found = run(script, monkeypatch, tmp_path)
    assert rc == 0 and found["failed"] == []
    names = {check["check"] for check in found["checks"]}
    assert names >= {
        "sampler and trainer agree in bfloat16",
        "logits are float32",
        "two equal updates agree",
        "packed documents need no mask",
        "float32 with shared keys holds no scores",
        "a resumed run goes on",
        "tiny float32: the peak is as planned",
        "tiny float32: update sees the rollout's policy",
    }
    last = capsys.readouterr().out.splitlines()[-1]
    pasted = json.loads(last)
    assert pasted["failed"] == [] and {"device", "versions", "commit"} <= set(pasted["machine"])
    assert len(pasted["checks"]) == len(names) and len(pasted["phases"]) == len(PHASES)
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


def test_a_check_that_fails_is_the_exit_code(script, monkeypatch, tmp_path):
    monkeypatch.setattr(script, "TINY", script.TINY[:1])
    monkeypatch.setattr(script, "RATIO_TOLERANCE", -1.0)
    monkeypatch.setattr(script.Claims, "run", lambda self: None)
    rc, found = run(script, monkeypatch, tmp_path)
    assert rc == 1 and found["failed"] == ["tiny float32: update sees the rollout's policy"]


def test_what_is_not_run_is_named_with_its_reason(script, monkeypatch, tmp_path):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    rc, found = run(script, monkeypatch, tmp_path, "--minutes", "0")
    assert rc == 0 and found["phases"] == []
    whys = ["0 s are left", "0 s are left", "bitsandbytes is not installed"]
    assert [row["why"].split(",")[0] for row in found["skipped"]] == whys


@pytest.mark.slow
def test_a_run_of_the_embedded_world_that_is_cut_off_goes_on_bit_for_bit(script, tmp_path):
    assert importlib.import_module("gpu_resume").outcome(tmp_path, same_bits=True)[0]


def test_a_resumed_run_is_held_to_bits_on_a_cpu_and_to_its_first_rollout_elsewhere(script, monkeypatch):
    resume = importlib.import_module("gpu_resume")

    def rows(apart, time):
        return [{"step": step, "rollout/score": step + apart * (step == 2), "time/rollout_s": time} for step in (1, 2)]

    for apart, same_bits, holds in ((0.0, True, True), (1e-4, True, False), (1e-4, False, True), (0.1, False, False)):
        monkeypatch.setattr(resume, "run", lambda at, apart=apart: (rows(0.0, 1.0), rows(apart, 2.0)))
        assert resume.outcome(Path(), same_bits)[0] == holds, (apart, same_bits)
