"""Configs of TRL and LlamaFactory as ours: loadable, true to the old values, every other key named with its reason."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from rlhf.commands import inspection
from rlhf.config import keys, load, migrations
from rlhf.errors import RlhfError
from rlhf.stages.registry import STAGES

LF_SFT = """
### model
model_name_or_path: meta-llama/Llama-3.1-8B-Instruct
trust_remote_code: true
### method
stage: sft
do_train: true
finetuning_type: lora
lora_rank: 8
lora_target: q_proj, v_proj
### dataset
dataset: identity,alpaca_en_demo
dataset_dir: sets
template: llama3
cutoff_len: 2048
max_samples: 1000
preprocessing_num_workers: 16
### output
output_dir: saves/llama3-8b/lora/sft
logging_steps: 10
save_steps: 500
plot_loss: true
overwrite_output_dir: true
report_to: none
### train
per_device_train_batch_size: 1
gradient_accumulation_steps: 8
learning_rate: 1.0e-4
num_train_epochs: 3.0
lr_scheduler_type: cosine
warmup_ratio: 0.1
bf16: true
ddp_timeout: 180000000
resume_from_checkpoint: null
### eval
val_size: 0.1
per_device_eval_batch_size: 1
eval_strategy: steps
eval_steps: 500
"""
LF_RM = """
model_name_or_path: meta-llama/Llama-3.1-8B-Instruct
stage: rm
finetuning_type: lora
lora_rank: 16
lora_target: all
dataset: dpo_en_demo
template: llama3
cutoff_len: 1024
output_dir: saves/llama3-8b/lora/reward
gradient_accumulation_steps: 8
per_device_train_batch_size: 2
learning_rate: 1e-5
max_steps: 300
warmup_steps: 30
"""
LF_PPO = """
model_name_or_path: meta-llama/Llama-3.1-8B-Instruct
reward_model: saves/llama3-8b/lora/reward
stage: ppo
finetuning_type: lora
lora_target: all
dataset: alpaca_en_demo
template: llama3
cutoff_len: 512
output_dir: saves/llama3-8b/lora/ppo
per_device_train_batch_size: 4
gradient_accumulation_steps: 2
ppo_buffer_size: 3
ppo_target: 6.0
learning_rate: 1.0e-5
num_train_epochs: 3.0
max_new_tokens: 128
top_k: 0
top_p: 0.9
"""
TRL_SFT = """
model_name_or_path: Qwen/Qwen2.5-0.5B
dtype: bfloat16
dataset_name: trl-lib/Capybara
learning_rate: 2.0e-4
num_train_epochs: 1
packing: true
per_device_train_batch_size: 2
gradient_accumulation_steps: 8
gradient_checkpointing: true
eos_token: <|im_end|>
use_peft: true
lora_r: 32
lora_alpha: 16
output_dir: Qwen2.5-0.5B-SFT-LoRA
logging_steps: 25
report_to: [wandb, comet_ml]
push_to_hub: true
"""
TRL_REWARD = """
model_name_or_path: Qwen/Qwen2.5-0.5B-Instruct
dataset_name: trl-lib/ultrafeedback_binarized
output_dir: Qwen2.5-0.5B-Reward
per_device_train_batch_size: 8
learning_rate: 1.0e-5
eval_strategy: steps
eval_steps: 50
max_length: 2048
center_rewards_coefficient: 1e-2
lr_scheduler_type: constant_with_warmup
warmup_steps: 0.05
"""
TRL_PPO = """
dataset_name: trl-lib/tldr
dataset_test_split: validation
model_name_or_path: EleutherAI/pythia-1b-deduped
sft_model_path: cleanrl/EleutherAI_pythia-1b-deduped__sft__tldr
reward_model_path: cleanrl/EleutherAI_pythia-1b-deduped__reward__tldr
output_dir: models/minimal/ppo_tldr
learning_rate: 3e-6
per_device_train_batch_size: 16
gradient_accumulation_steps: 4
num_mini_batches: 2
total_episodes: 1000000
num_ppo_epochs: 3
kl_coef: 0.03
kl_estimator: k3
cliprange: 0.1
vf_coef: 0.1
lam: 0.9
response_length: 53
missing_eos_penalty: 1.5
stop_token: eos
local_rollout_forward_batch_size: 16
whiten_rewards: false
frobnicate: 3
"""
OLD = {
    "lf_sft": LF_SFT, "lf_rm": LF_RM, "lf_ppo": LF_PPO, "trl_sft": TRL_SFT, "trl_reward": TRL_REWARD,
    "trl_ppo": TRL_PPO,
}  # fmt: skip
WANTED = {
    "lf_sft": ("sft", {
        "model.path": "meta-llama/Llama-3.1-8B-Instruct", "model.dtype": "bfloat16", "lora.r": 8, "lora.alpha": 16.0,
        "lora.target_modules": ["q_proj", "v_proj"], "max_length": 2048, "data.limit": 1000, "epochs": 3.0,
        "batch.batch_size": 8, "batch.micro_batch_size": 1, "optim.learning_rate": 1e-4, "optim.schedule": "cosine",
        "optim.warmup_ratio": 0.1, "holdout_fraction": 0.1, "save_every": 500, "run_dir": "saves/llama3-8b/lora/sft",
        "data.mixture.0.path": "identity",
    }),
    "lf_rm": ("train-rm", {
        "lora.r": 16, "steps": 300, "optim.warmup_ratio": 0.1, "batch.batch_size": 16, "centering_coef": 0.0,
        "data.path": "dpo_en_demo", "optim.learning_rate": 1e-5,
    }),
    "lf_ppo": ("ppo", {
        "batch.batch_size": 24, "batch.minibatch_size": 8, "batch.micro_batch_size": 4, "kl.target": 6.0,
        "sampling.max_new_tokens": 128, "sampling.temperature": 0.95, "update.epochs": 4, "prompts.max_tokens": 512,
        "missing_eos.mode": "subtract", "missing_eos.penalty": 0.0, "optim.value_learning_rate": 1e-5,
    }),
    "trl_sft": ("sft", {
        "data.path": "trl-lib/Capybara", "data.split": "train", "packing": True, "lora.r": 32, "lora.alpha": 16.0,
        "lora.dropout": 0.05, "max_length": 1024, "runtime.gradient_checkpointing": True, "report_to": ["wandb"],
        "batch.batch_size": 16,
    }),
    "trl_reward": ("train-rm", {
        "centering_coef": 0.01, "optim.schedule": "constant", "optim.warmup_ratio": 0.05, "max_length": 2048,
        "epochs": 3.0,
    }),
    "trl_ppo": ("ppo", {
        "steps": 15625, "batch.batch_size": 64, "batch.minibatch_size": 32, "batch.micro_batch_size": 16,
        "update.epochs": 3, "update.clip_range": 0.1, "update.lam": 0.9, "kl.coef": 0.03, "kl.estimator": "k1",
        "missing_eos.penalty": 1.5, "sampling.temperature": 0.7, "sampling.concurrency": 16,
        "prompts.path": "trl-lib/tldr",
        "optim.learning_rate": 3e-6, "optim.value_learning_rate": 3e-6,
    }),
}  # fmt: skip


def migrated(tmp_path, text, stage=None):
    path = tmp_path / "old.yaml"
    path.write_text(text)
    return inspection.migrated(path, stage)


@pytest.mark.parametrize("name", OLD)
def test_a_typical_config_loads_as_ours_with_the_values_that_it_had(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = migrated(tmp_path, OLD[name])
    stage, wanted = WANTED[name]
    (tmp_path / "new.yaml").write_text(found.text("old.yaml"))
    config = load.load(STAGES[stage].config_class, tmp_path / "new.yaml")
    assert found.stage == stage and wanted.items() <= keys.flatten(config).items()


@pytest.mark.parametrize("name", OLD)
def test_every_key_is_translated_or_named(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found, text = migrated(tmp_path, OLD[name]), migrated(tmp_path, OLD[name]).text("old.yaml")
    keys = {line.split(":")[0] for line in OLD[name].splitlines() if line and line[0].isalpha()}
    said = {key for key in keys if key in found.gone or any(key in reason for reason in found.undecided.values())}
    moved = {
        key
        for key in keys
        if migrations.SAME.get(key, migrations.COUNTED.get(key))
        in [*found.config, "lora.r", "data.limit", "max_length"]
    }
    followed = {
        "dataset",
        "dataset_name",
        "lora_target",
        "gradient_accumulation_steps",
        "bf16",
        "dtype",
        "val_size",
        "report_to",
        "ppo_buffer_size",
        "num_mini_batches",
        "total_episodes",
        "max_steps",
        "warmup_steps",
        "missing_eos_penalty",
        "kl_estimator",
        "num_train_epochs",
    }
    assert keys - said - moved - followed == set()
    assert all(f"#   {key}: {reason}." in text for key, reason in (found.gone | found.undecided).items())


def test_what_cannot_be_decided_is_said(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ppo = migrated(tmp_path, TRL_PPO)
    assert set(ppo.undecided) == {"policy", "rewards", "batch.batch_size", "kl.estimator", "lora"}
    assert ppo.gone["frobnicate"] == "not known as a key of TRL, nor here" and "vf_coef" in ppo.gone
    sft = migrated(tmp_path, LF_SFT)
    assert {"model.revision", "data.path", "too_long"} <= set(sft.undecided)
    assert "comet_ml" in migrated(tmp_path, TRL_SFT).undecided["report_to"]
    full = migrated(tmp_path, "output_dir: x\npacking: true\nfp16: true\nlr_scheduler_type: polynomial\n")
    assert {"lora", "model.dtype", "optim.schedule", "data.path"} <= set(full.undecided)
    assert full.config["lora"] is None and not [key for key in full.config if key.startswith("lora.")]
    half = migrated(tmp_path, LF_SFT.replace("finetuning_type: lora", "finetuning_type: full"))
    assert half.config["lora"] is None and half.config.get("model.dtype", "float32") == "float32"
    (tmp_path / "new.yaml").write_text(half.text("old.yaml"))
    assert load.load(STAGES["sft"].config_class, tmp_path / "new.yaml").lora is None
    assert "steps" in migrated(tmp_path, LF_PPO).undecided


def test_defaults_of_the_old_tool_are_written_out_and_listed(tmp_path):
    found = migrated(tmp_path, "model_name_or_path: x\nuse_peft: true\npacking: false\ndataset_name: y\n")
    assert found.config["optim.learning_rate"] == 2e-5 and found.config["epochs"] == 3.0
    assert {"optim.learning_rate", "epochs", "batch.batch_size", "max_length", "lora.dropout"} == set(found.written)


def test_a_name_of_dataset_info_becomes_the_file_and_its_columns(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sets").mkdir()
    info = {
        "identity": {"file_name": "identity.json", "columns": {"prompt": "instruction", "response": "answer"}},
        "alpaca_en_demo": {"hf_hub_url": "org/alpaca", "subset": "en", "split": "train"},
    }
    (tmp_path / "sets" / "dataset_info.json").write_text(json.dumps(info))
    found = migrated(tmp_path, LF_SFT + "mix_strategy: interleave_under\ninterleave_probs: 0.7,0.3\n")
    assert found.config["data.mixture"] == [
        {"path": "sets/identity.json", "columns": {"output": "answer"}, "weight": 0.7},
        {"path": "org/alpaca", "name": "en", "split": "train", "weight": 0.3},
    ]
    assert "data.path" not in found.undecided


@pytest.mark.parametrize(
    ("text", "stage", "wanted"),
    [
        ("stage: dpo\n", None, "CFG030.*stage: 'dpo' has no counterpart"),
        ("finetuning_type: oft\nstage: sft\n", None, "finetuning_type: 'oft'"),
        ("learning_rate: 1e-5\n", None, "do not tell which stage.*--stage with one of sft, train-rm, ppo"),
        ("packing: true\nkl_coef: 0.1\n", None, "has keys of ppo and of sft"),
        ("packing: true\n", "collect", "no stage to migrate to is called 'collect'"),
        ("packing: true\nper_device_train_batch_size: auto\n", None, "need a number of 1 or more, got auto"),
        ("- a\n", None, "no keys at the top level"),
        ("packing: true\nrun: 1\nmodel_name_or_path: https://me:pass1234@host/x\n", None, "SEC008"),
    ],
)
def test_what_cannot_be_translated_is_refused_with_the_reason(tmp_path, text, stage, wanted):
    with pytest.raises(RlhfError, match=wanted) as caught:
        migrated(tmp_path, text, stage)
    assert "pass1234" not in str(caught.value)


def test_a_value_that_our_bounds_refuse_is_left_out_and_said(tmp_path):
    text = "packing: maybe\ndataset_name: x\nsave_total_limit: 1\nmodel_name_or_path: 3\nmax_grad_norm: -1\n"
    found = migrated(tmp_path, text)
    assert "1 is not possible here" in found.undecided["keep_checkpoints"]
    assert {"packing", "model.path", "optim.max_grad_norm"} <= set(
        found.undecided
    ) and "keep_checkpoints" not in found.config


def test_a_secret_is_neither_carried_over_nor_shown(tmp_path):
    text = migrated(tmp_path, "packing: true\nhub_token: hf_abcdefghijklmnopqrst\ndataset_name: x\n").text("old.yaml")
    assert "hf_abc" not in text and "hub_token" in text


def test_the_command_prints_or_writes_and_never_over_a_file(tmp_path):
    (tmp_path / "old.yaml").write_text(TRL_PPO)

    def run(*arguments):
        command = [sys.executable, "-m", "rlhf", *arguments]
        return subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)

    shown = run("migrate", "old.yaml")
    written = run("migrate", "old.yaml", "--out", "ppo.yaml")
    assert shown.returncode == written.returncode == 0, shown.stderr + written.stderr
    assert (tmp_path / "ppo.yaml").read_text() == shown.stdout and "a ppo config" in written.stdout
    again = run("migrate", "old.yaml", "--out", "ppo.yaml")
    assert again.returncode == 2 and "stands there already" in again.stderr


@pytest.mark.parametrize(
    ("text", "wanted"),
    [("load_in_4bit: true", "nf4"), ("load_in_8bit: true", "int8"), ("quantization_bit: 4", "nf4"), ("seed: 1", None)],
)
def test_bits_become_quantize(tmp_path, text, wanted):
    found = migrated(tmp_path, f"model_name_or_path: x\nuse_peft: true\npacking: true\ndataset_name: y\n{text}\n")
    assert found.config.get("model.quantize") == wanted
    three = migrated(tmp_path, "model_name_or_path: x\nuse_peft: true\npacking: true\nquantization_bit: 3\n")
    assert "3 bits are not offered" in three.undecided["model.quantize"]
