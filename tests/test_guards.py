"""What stops a run before it is spoilt: figures that are not numbers, and limits on what PPO drifts to."""

from __future__ import annotations

import logging
import math
from types import SimpleNamespace

import pytest
import torch

from rlhf import errors
from rlhf.config.ppo_sections import GuardSection, Limit
from rlhf.errors import RlhfError
from rlhf.models import adapters
from rlhf.runs.tracking import Tracker
from rlhf.stages.sft.run import _Record
from rlhf.training.guards import Guard

KL = "rollout/exact_kl_nats"


@pytest.fixture
def said(caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("rlhf"), "propagate", True)
    return caplog


def test_a_limit_is_warned_about_once_until_the_figure_has_been_back(said):
    guard = Guard(GuardSection(kl_nats=Limit(warn=5.0, stop=None)))
    for step, value in enumerate((4.0, 6.0, 7.0, 5.0, 6.0), 1):
        guard.check(step, {KL: value})
    assert [record.getMessage().split(":")[0] for record in said.records] == ["Step 2", "Step 5"]
    assert "above guards.kl_nats.warn (5)" in said.text


@pytest.mark.parametrize(
    ("name", "key", "good", "bad"),
    [
        ("kl_nats", KL, 4.0, 6.0),
        ("kl_nats", KL, 4.0, math.nan),
        ("entropy_nats", "rollout/entropy_nats", 6.0, 4.0),
        ("score_std", "rollout/score_std", 6.0, 0.0),
        ("clip_fraction", "update/policy_clip_fraction", 4.0, 6.0),
    ],
)
def test_a_stop_limit_ends_the_run_after_so_many_steps_in_a_row(name, key, good, bad):
    guard = Guard(GuardSection(patience=3, **{name: Limit(warn=None, stop=5.0)}))
    for step, value in enumerate((bad, bad, good, bad, bad), 1):
        guard.check(step, {key: value})
    again = Guard(guard.section)
    again.load_state_dict(guard.state_dict())
    with pytest.raises(RlhfError, match=rf"GRD020.*step 6.*{name}.*for 3 steps") as caught:
        again.check(6, {key: bad})
    assert caught.value.exit_code == 7


def test_no_guard_speaks_at_the_figures_of_a_sound_run(said):
    guard = Guard(GuardSection())
    figures = {KL: 5.0, "rollout/entropy_nats": 0.9, "rollout/score_std": 1.0, "update/policy_clip_fraction": 0.2}
    for step in range(50):
        guard.check(step, figures)
    assert not said.records


def test_sft_stops_before_a_step_whose_gradient_is_not_finite(tmp_path):
    model = torch.nn.Linear(2, 1)
    model(torch.tensor([[1.0, math.inf]])).sum().backward()
    record = _Record(SimpleNamespace(path=tmp_path), Tracker(tmp_path, "none"))
    with pytest.raises(RlhfError, match=r"GRD001.*sft step 4.*not applied"):
        record.on_pre_optimizer_step(None, SimpleNamespace(global_step=3), None, model=model)
    model.zero_grad()
    model(torch.ones(1, 2)).sum().backward()
    record.on_pre_optimizer_step(None, SimpleNamespace(global_step=3), None, model=model)


def test_weights_that_are_not_finite_are_not_written(tmp_path, monkeypatch):
    monkeypatch.setattr(adapters, "weights", lambda *_: {"a": torch.tensor([1.0, math.nan])})
    with pytest.raises(RlhfError, match="GRD005"):
        adapters.save(None, "policy", tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (OSError(28, "No space left on device", "runs/x"), 6, "runs/x: cannot be written or read: No space left"),
        (MemoryError(), 6, "memory: gave out"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"), 6, "can't allocate"),
        (RuntimeError("CUDA out of memory. Tried to allocate"), 6, "CUDA out of memory"),
        (RuntimeError("std::bad_alloc"), 6, "bad_alloc"),
    ],
)
def test_a_machine_that_gives_out_is_no_bug(error, code, words):
    problem = errors.of_the_machine(error)
    assert words in str(problem) and "--resume" in str(problem) and RlhfError(problem).exit_code == code
    assert errors.of_the_machine(ValueError("x")) is None
