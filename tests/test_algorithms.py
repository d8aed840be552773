"""An algorithm is one module and its settings: what the loop does with one that it has never seen."""

from __future__ import annotations

import json
from typing import ClassVar

import pytest
from pydantic import Field, ValidationError
from tiny import finished_sft

from rlhf import algorithms
from rlhf.config import load
from rlhf.config.ppo_sections import UpdateSection
from rlhf.config.stages import PpoConfig
from rlhf.models.roles import SharedBase
from rlhf.preflight import prepare
from rlhf.runs import run_directory
from rlhf.stages.ppo import run as ppo
from rlhf.stages.registry import STAGES
from rlhf.training.collector import Collector

BATCH_MEAN = '''
"""REINFORCE against the mean outcome of the batch."""

import torch

from rlhf.losses.policy import PolicyLoss
from rlhf.losses.tensors import masked_sum


def advantages(batch, settings):
    assert batch.values is None
    outcomes = batch.rewards.sum(1)
    return settings.strength * (outcomes - outcomes.mean())[:, None] * batch.mask


def loss(terms, settings):
    found = -masked_sum(terms.logprobs * terms.advantages, terms.mask) / terms.num_tokens
    nothing = torch.zeros(())
    return PolicyLoss(found, nothing, nothing, nothing)
'''


class BatchMeanSection(UpdateSection):
    algorithm: ClassVar[str] = "batch_mean"
    smallest_group: ClassVar[int] = 2

    strength: float = Field(2.0)


class BatchMeanConfig(PpoConfig):
    update: BatchMeanSection = Field(default_factory=BatchMeanSection)  # type: ignore[assignment]


def lengths(prompts, responses):
    return [float(len(response)) for response in responses]


def config(**changes):
    values = {
        "prompts": {"path": "prompts.jsonl"},
        "sampling": {"max_new_tokens": 6},
        "evaluation": {"num_prompts": 4},
        "rewards": [{"function": f"{__name__}:lengths"}],
        "steps": 2,
        "save_every": 1,
        "report_to": "none",
        "batch": {"batch_size": 8, "minibatch_size": 4, "micro_batch_size": 3},
        "samples_per_prompt": 2,
    }
    return BatchMeanConfig.model_validate({**values, **changes})


def test_an_algorithm_without_critic_is_one_module_and_its_settings(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    finished_sft(tmp_path)
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"prompt": f"p{n}"}) + "\n" for n in range(30)))
    (tmp_path / "more").mkdir()
    (tmp_path / "more/batch_mean.py").write_text(BATCH_MEAN)
    monkeypatch.setattr(algorithms, "__path__", [*algorithms.__path__, str(tmp_path / "more")])
    acted, batches, act, collect = set(), [], SharedBase.acting_as, Collector.collect
    monkeypatch.setattr(SharedBase, "acting_as", lambda self, name: acted.add(name) or act(self, name))
    monkeypatch.setattr(Collector, "collect", lambda *given: batches.append(collect(*given)) or batches[-1])
    chosen = config()
    plan = prepare.prepare(chosen, STAGES["ppo"].needs(chosen))
    with run_directory.open_run(tmp_path / chosen.run_dir, "ppo", plan.inputs, load.dump(chosen)) as run:
        manifest = ppo.run(chosen, plan, run)
    assert acted == {"policy", "reference"}, "no pass of a critic"
    assert len(batches) == 2 and all(not batch.states and not batch.old_values.any() for batch in batches)
    for batch in batches:
        outcomes = [sum(row) for row in batch.rewards.tolist()]
        for row, outcome in enumerate(outcomes):
            for t, real in enumerate(batch.mask[row].tolist()):
                wanted = 2.0 * (outcome - sum(outcomes) / len(outcomes)) if real else 0.0
                assert float(batch.advantages[row, t]) == pytest.approx(wanted, abs=1e-5)
    keys = {key for line in run_directory.read_metrics(run.path) for key in line}
    assert "update/policy_loss" in keys and not [key for key in keys if "explained" in key or "value" in key]
    assert manifest.details["value_pretraining"]["batches"] == 0
    names = {path.name for path in (run.path / "checkpoints/last").iterdir()}
    states = json.loads((run.path / "checkpoints/step-2/checkpoint.json").read_text())["states"]
    assert names == {"policy"} and "value" not in states
    before, after = (
        (tmp_path / place / "adapter/adapter_model.safetensors").read_bytes()
        for place in ("runs/sft", f"{chosen.run_dir}/checkpoints/last/policy")
    )
    assert before != after


def test_a_group_smaller_than_the_algorithm_compares_is_refused():
    with pytest.raises(ValidationError, match="batch_mean compares .* samples_per_prompt must be 2 or more, got 1"):
        config(samples_per_prompt=1)
