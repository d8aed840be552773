"""The scripts that time a PPO step and the two engines, at their smallest."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest
import torch

SCRIPTS = Path(__file__).parents[1] / "scripts"
sys.path.insert(0, str(SCRIPTS))
before = dict(os.environ)
import benchmark_engines  # noqa: E402
import benchmark_ppo  # noqa: E402
import benchmark_rm  # noqa: E402

os.environ.clear()
os.environ.update(before)
TINY = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 4,
    "intermediate_size": 48, "vocab_size": 300,
}  # fmt: skip


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    monkeypatch.setitem(benchmark_ppo.SIZES, "A", TINY)
    monkeypatch.setitem(benchmark_ppo.BATCH, "A", 8)
    monkeypatch.setitem(benchmark_ppo.STEPS, "A", 1)


@pytest.mark.parametrize("critic", ["least_squares", "gradient"])
def test_a_step_with_each_critic_is_timed_by_phase(critic):
    found = benchmark_ppo.ours("A", [f"value.fit={critic}"])
    phases = sum(found[f"{phase}_cpu_s"] for phase in ("rollout", "score", "update"))
    assert found["total_cpu_s"] == pytest.approx(phases) and min(found.values()) > 0


def test_a_step_of_reward_training_is_timed(monkeypatch):
    monkeypatch.setitem(benchmark_rm.SIZES, "A", TINY)
    monkeypatch.setitem(benchmark_rm.STEPS, "A", 1)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    assert benchmark_rm.ours("A")["cpu_s"] > 0


def test_equal_critics_are_a_value_role_on_both_sides(monkeypatch, capsys):
    asked = []

    def run(size, changes):
        asked.append(changes)
        return {f"{phase}_cpu_s": 2.0 for phase in ("rollout", "score", "update", "total")} | figures

    figures = {"peak_rss_mb": 9.0, "imports_rss_mb": 1.0, "response_tokens_per_cpu_s": 1.0}
    monkeypatch.setattr(benchmark_ppo, "in_fresh_process", run)
    monkeypatch.setattr(benchmark_ppo, "peer", lambda *_: {**run(None, ["peer"]), "total_cpu_s": 5.0})
    for critic in ("full", "lora"):
        arguments = ["x", "--size", "A", "--rounds", "1", "--peer", "p", "--peer-script", "f", "--peer-critic", critic]
        monkeypatch.setattr(sys, "argv", arguments)
        benchmark_ppo.main()
        assert json.loads(capsys.readouterr().out.splitlines()[-1])["ratios"] == {"A": 2.5}
    assert asked == [[], ["peer"], ["value.fit=gradient"], ["peer"]]


def test_the_engines_are_timed_on_the_same_rows(monkeypatch, capsys):
    monkeypatch.setattr(benchmark_engines, "NEW_TOKENS", 4)
    monkeypatch.setattr(benchmark_engines, "SHAPES", {"differ": (4, 1, False), "four each, random ends": (8, 4, True)})
    found = benchmark_engines.measure("A", 1)
    for row in found.values():
        assert row["hf / continuous"] == pytest.approx(row["hf"] / row["continuous"])
    assert "four each, random ends" in capsys.readouterr().out
