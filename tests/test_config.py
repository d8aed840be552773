"""YAML as people mean it, and every config mistake with its place and fix."""

from __future__ import annotations

import contextlib
import math
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf.config import load, stages, yaml_reader
from rlhf.errors import RlhfError, render_json
from rlhf.stages.registry import STAGES

CONFIGS = Path(__file__).parents[1] / "configs"
PPO = "prompts: {path: demo:prompts}\n"


def problems(tmp_path, text, *overrides, config_class=stages.PpoConfig):
    path = tmp_path / "run.yaml"
    path.write_text(text)
    with pytest.raises(RlhfError) as caught:
        load.load(config_class, path, overrides)
    return caught.value


@pytest.mark.parametrize("path", sorted(CONFIGS.rglob("*.yaml")), ids=lambda path: path.stem)
def test_every_shipped_config_loads_and_comes_back_from_its_dump(path, tmp_path):
    config_class = stages.PipelineConfig if path.stem == "pipeline" else STAGES[path.stem].config_class
    config = load.load(config_class, path)
    again = tmp_path / "again.yaml"
    again.write_text(load.dump(config))
    assert load.load(config_class, again) == config


def test_default_run_directory_config_and_command_share_the_stages_id():
    for name, stage in STAGES.items():
        assert stage.default_config == f"configs/{name}.yaml"
        assert stage.config_class.model_fields["run_dir"].default == f"runs/{name}"


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-5", 1e-5),
        ("5", 5),
        ("-3", -3),
        (".5", 0.5),
        ("010", "010"),
        ("no", "no"),
        ("12:30", "12:30"),
        ("~", None),
        ("true", True),
        ("1_000", "1_000"),
        ("2026-01-01", "2026-01-01"),
        ("'5'", "5"),
        (".inf", math.inf),
    ],
)
def test_plain_scalars_mean_what_they_look_like(text, value):
    found = yaml_reader.read_text(f"a: {text}", "x")[0]["a"]
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        (PPO + "stps: 5", "run.yaml:2:1 stps: unknown key. Fix: did you mean 'steps'?"),
        (PPO + "learning_rate: 1e-5", "did you mean 'optim.learning_rate'?"),
        (PPO + "kl: {coef: -0.1}", "run.yaml:2:6 kl.coef: must be greater than or equal to 0, got -0.1"),
        (PPO + "kl_coef: 0.1", "did you mean 'kl.coef'?"),
        (PPO + "steps: many", "steps: must be a valid integer, got 'many'"),
        (PPO + "steps: 0", "steps: must be greater than or equal to 1"),
        (PPO + "steps: 2\nsteps: 3", "run.yaml:3:1 steps: already set at line 2. Fix: keep one"),
        (PPO + "optim: {learning_rate: .nan}", "optim.learning_rate"),
        (PPO + "optim: {learning_rate: 1e6}", "optim.learning_rate"),
        (PPO + "batch: {batch_size: 64, minibatch_size: 48}", "minibatch_size 48 does not divide batch_size 64"),
        (PPO + "update: {clip_range: 2}", "update.clip_range"),
        (PPO + "update: {gamma: 1.2}", "update.gamma"),
        (PPO + "sampling: {temperature: 0}", "sampling.temperature"),
        (PPO + "rewards: [{run: a, function: b}]", "exactly one of run, runs, model, function and url"),
        (PPO + "kl: {place: loss}", "normalise_advantages: false"),
        (PPO + "seed: -1", "seed"),
        (PPO + "runtime: {gradient_checkpointing: yes}", "write true or false"),
        ("steps: 2", "prompts: required, and not set"),
        ("- a", "expected a mapping at the top level, got a list"),
        ("a:\n\tb: 1", "indent with spaces"),
        ("a: !!python/object/apply:os.system [ls]", "SEC002"),
        ("[" * 40 + "]" * 40, "SEC003"),
        ("", "empty"),
    ],
)
def test_config_mistakes_name_place_and_fix(tmp_path, text, wanted):
    assert wanted in str(problems(tmp_path, text))


def test_all_problems_come_together_in_the_order_of_the_file(tmp_path):
    error = problems(tmp_path, PPO + "seed: x\nkl: {coef: -1}\nfoo: 1\n", "steps=0")
    keys = [problem.where.split()[1] for problem in error.problems]
    assert keys == ["seed", "kl.coef", "foo", "steps=0"]
    assert error.exit_code == 2 and '"exit_code": 2' in render_json(error.problems, error.exit_code)


def test_overrides_win_and_reach_into_lists(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(PPO + "steps: 5\nrewards: [{run: a}]\n")
    config = load.load(stages.PpoConfig, path, ["steps=7", "rewards.0.weight=0.5", "optim.learning_rate=1e-4"])
    assert (config.steps, config.rewards[0].weight, config.optim.learning_rate) == (7, 0.5, 1e-4)
    assert "not of the form" in str(problems(tmp_path, PPO, "steps"))
    assert "counted from 0" in str(problems(tmp_path, PPO + "rewards: [{run: a}]", "rewards.3.weight=1"))


def test_training_length_is_epochs_or_steps_and_not_both(tmp_path):
    text = "data: {path: demo:demonstrations}\n"
    for bad in (text, text + "steps: 5\nepochs: 1"):
        assert "exactly one of epochs and steps" in str(problems(tmp_path, bad, config_class=stages.SftConfig))


@given(st.text(max_size=200))
@settings(max_examples=300, deadline=None)
def test_any_text_is_read_or_refused_in_order(text):
    with contextlib.suppress(RlhfError):
        yaml_reader.read_text(text, "x")
