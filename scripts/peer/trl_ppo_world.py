"""TRL's PPOTrainer on models, prompts and settings that it is handed; run in an environment that has trl==1.12.0.

    PEER_PYTHON scripts/peer/trl_ppo_world.py JOB.json

scripts/compare_peer.py writes the job and judges what this writes: one JSON line an evaluation, with the step, the CPU
seconds spent so far (loading and evaluations left out) and the ids of the sampled answers to the held-out prompts.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

os.environ.update(HF_HUB_OFFLINE="1", TRL_EXPERIMENTAL_SILENCE="1", CUDA_VISIBLE_DEVICES="")

import numpy
import torch
import trl.experimental.ppo.ppo_trainer as peer
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GenerationConfig,
    TrainerCallback,
)
from trl.experimental.ppo import PPOConfig, PPOTrainer

EVALUATION_BATCH = 100


def policy_of(job: dict[str, Any]) -> PeftModel:
    """The trained policy: a fresh adapter on the merged SFT model, whose reference is the adapter switched off; or the
    SFT adapter itself, on the bare base, with a second copy of it as the reference."""
    if job["start"] == "fresh":
        merged = AutoModelForCausalLM.from_pretrained(job["policy_model"], dtype=torch.float32)
        return get_peft_model(merged, LoraConfig(task_type="CAUSAL_LM", **job["lora"]))
    base = AutoModelForCausalLM.from_pretrained(job["base"], dtype=torch.float32)
    model = PeftModel.from_pretrained(base, job["policy_adapter"], is_trainable=True)
    model.load_adapter(job["policy_adapter"], "reference")
    model.set_adapter("default")
    return model


def reward_of(job: dict[str, Any]) -> Any:
    """The exported reward model, with the constant that its class has no place for as the bias of its head."""
    model = AutoModelForSequenceClassification.from_pretrained(job["reward_model"], dtype=torch.float32)
    return with_bias(model, model.score.weight, job["reward_constant"]).requires_grad_(False).eval()


def value_of(job: dict[str, Any]) -> Any:
    """The critic, which starts as the reward model: every weight of a copy, a fresh adapter on a copy, or the reward
    run's own adapter on the bare base; its head is trained in each case."""
    exported = reward_of(job)
    if job["critic"] == "full":
        return exported.requires_grad_(True)
    if job["start"] == "fresh":
        model, config, state = exported, LoraConfig(**job["lora"]), None
    else:
        config = LoraConfig.from_pretrained(job["reward_adapter"])
        config.task_type, config.inference_mode, config.base_model_name_or_path = None, False, None
        state = load_file(Path(job["reward_adapter"]) / "adapter_model.safetensors")
        model = AutoModelForSequenceClassification.from_pretrained(job["base"], num_labels=1, dtype=torch.float32)
        model.config.pad_token_id = exported.config.pad_token_id
        with_bias(model, exported.score.weight, job["reward_constant"])
    adapted = get_peft_model(model, config)
    if state is not None:
        outcome = set_peft_model_state_dict(adapted, state)
        assert not outcome.unexpected_keys, outcome.unexpected_keys
    model.score.requires_grad_(True)
    return model


def with_bias(model: Any, weight: Tensor, bias: float) -> Any:
    """Give the classifier a head of one number with this weight and bias."""
    model.score = nn.Linear(weight.shape[1], 1)
    with torch.no_grad():
        model.score.weight.copy_(weight)
        model.score.bias.fill_(bias)
    return model


@contextmanager
def sampling_by(noise: Tensor) -> Iterator[None]:
    """Let ``generate`` draw each row's tokens with that row's own uniforms [B, T], by the inverse of the cumulative
    distribution: the same law as multinomial's, with randomness that another program can share."""
    step = 0

    def draw(probs: Tensor, num_samples: int) -> Tensor:
        nonlocal step
        assert num_samples == 1 and len(probs) == len(noise)
        cumulative = probs.double().cumsum(-1)
        places = torch.searchsorted(cumulative, noise[:, step, None] * cumulative[:, -1:], right=True)
        step += 1
        return places.clamp(max=probs.shape[-1] - 1)

    with mock.patch.object(torch, "multinomial", draw):
        yield


class Evaluations(TrainerCallback):
    """Samples answers to the held-out prompts before the first step and after each ``every`` of them."""

    def __init__(self, job: dict[str, Any], policy: Any, noise: Tensor) -> None:
        self.job, self.policy, self.noise = job, policy, noise
        self.started = self.excluded = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
        self.started = time.process_time()
        self.write(0)

    def on_step_end(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
        if state.global_step % self.job["evaluate_every"] == 0:
            self.write(state.global_step)

    def write(self, step: int) -> None:
        now = time.process_time()
        line = {"step": step, "cpu_s": now - self.started - self.excluded, "responses": self.answers()}
        with Path(self.job["out"]).open("a") as out:
            out.write(json.dumps(line) + "\n")
        self.excluded += time.process_time() - now

    @torch.no_grad()
    def answers(self) -> list[list[int]]:
        """One answer to each held-out prompt, its end token left in, as ids."""
        job, found = self.job, []
        how = GenerationConfig(
            max_new_tokens=job["ppo"]["response_length"],
            temperature=job["ppo"]["temperature"],
            top_k=0,
            top_p=1.0,
            do_sample=True,
            eos_token_id=job["eos_id"],
            pad_token_id=job["pad_id"],
        )
        for start in range(0, len(job["held_out"]), EVALUATION_BATCH):
            ids, mask = left_padded(job["held_out"][start : start + EVALUATION_BATCH], job["pad_id"])
            with sampling_by(self.noise[start : start + len(ids)]):
                whole = self.policy.generate(input_ids=ids, attention_mask=mask, generation_config=how)
            for row in whole[:, ids.shape[1] :].tolist():
                end = row.index(job["eos_id"]) + 1 if job["eos_id"] in row else len(row)
                found.append(row[:end])
        return found


def left_padded(rows: Sequence[Sequence[int]], pad_id: int) -> tuple[Tensor, Tensor]:
    """[B, L] ids and their mask."""
    width = max(map(len, rows))
    ids = torch.tensor([[pad_id] * (width - len(row)) + list(row) for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    return ids, mask


def share_randomness(trainer: PPOTrainer, job: dict[str, Any], noise: Tensor) -> None:
    """Prompts in the job's order, its noise for every rollout and its order of the rows in every epoch."""
    size = trainer.args.batch_size
    batches = [left_padded(job["prompts"][i : i + size], job["pad_id"]) for i in range(0, len(job["prompts"]), size)]
    trainer.dataloader = [{"input_ids": ids, "attention_mask": mask} for ids, mask in batches]
    rollouts, orders, generate = iter(noise.split(size)), iter(job["permutations"]), peer.batch_generation

    def generate_with_noise(*args: Any, **rest: Any) -> Any:
        with sampling_by(next(rollouts)):
            return generate(*args, **rest)

    peer.batch_generation = generate_with_noise
    numpy.random.permutation = lambda count: numpy.array(next(orders))


def main(job: dict[str, Any]) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(job["ppo"]["seed"])
    noise = load_file(job["noise"])
    tokenizer = AutoTokenizer.from_pretrained(job["policy_model"], padding_side="left")
    policy, value = policy_of(job), value_of(job)
    config = PPOConfig(
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        num_sample_generations=0,
        stop_token="eos",
        gradient_accumulation_steps=1,
        **job["ppo"],
        ref_adapter_name="reference" if job["start"] == "adapter" else None,
    )
    # The trainer's own optimizer has one learning rate for both; all else here is what it would make.
    groups = [
        {"params": [p for p in model.parameters() if p.requires_grad], "lr": rate}
        for model, rate in ((policy, config.learning_rate), (value, job["value_learning_rate"]))
    ]
    optimizer = torch.optim.AdamW(groups, eps=config.adam_epsilon, weight_decay=config.weight_decay, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    trainer = PPOTrainer(
        args=config,
        processing_class=tokenizer,
        model=policy,
        ref_model=None,
        reward_model=reward_of(job),
        value_model=value,
        train_dataset=Dataset.from_dict({"input_ids": job["prompts"]}),
        optimizers=(optimizer, schedule),
        callbacks=[Evaluations(job, policy, noise["evaluation"])],
    )
    trainer.log = lambda metrics, *rest: print(json.dumps(metrics), flush=True)
    if job["permutations"]:
        share_randomness(trainer, job, noise["rollouts"])
    trainer.train()


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()))
