"""What the keys of TRL's and LlamaFactory's configs are called here, and why some have no counterpart."""

from __future__ import annotations

from typing import Any

TRL, LLAMAFACTORY = "TRL", "LlamaFactory"

# Old key -> ours, with the value as it is. What a stage's config does not have is named by ELSEWHERE.
SAME: dict[str, str] = {
    "output_dir": "run_dir", "seed": "seed", "model_name_or_path": "model.path", "model_revision": "model.revision",
    "trust_remote_code": "model.trust_remote_code", "attn_implementation": "model.attn_implementation",
    "learning_rate": "optim.learning_rate", "weight_decay": "optim.weight_decay",
    "max_grad_norm": "optim.max_grad_norm", "warmup_ratio": "optim.warmup_ratio",
    "gradient_checkpointing": "runtime.gradient_checkpointing", "save_steps": "save_every",
    "save_total_limit": "keep_checkpoints", "max_length": "max_length", "max_seq_length": "max_length",
    "cutoff_len": "max_length", "packing": "packing", "lora_r": "lora.r", "lora_rank": "lora.r",
    "lora_alpha": "lora.alpha", "lora_dropout": "lora.dropout", "use_dora": "lora.use_dora",
    "use_rslora": "lora.use_rslora", "center_rewards_coefficient": "centering_coef",
    "num_ppo_epochs": "update.epochs", "ppo_epochs": "update.epochs", "kl_coef": "kl.coef",
    "cliprange": "update.clip_range", "cliprange_value": "update.value_clip_range", "gamma": "update.gamma",
    "lam": "update.lam", "response_length": "sampling.max_new_tokens", "max_new_tokens": "sampling.max_new_tokens",
    "temperature": "sampling.temperature", "local_rollout_forward_batch_size": "sampling.concurrency",
    "ppo_target": "kl.target", "max_samples": "data.limit", "dataset_config": "data.name",
    "dataset_train_split": "data.split",
}  # fmt: skip

# Old key -> the key of ours that follows from it.
COUNTED = {
    "lr_scheduler_type": "optim.schedule",
    "num_train_epochs": "epochs",
    "per_device_train_batch_size": "batch.batch_size",
}

# Old key -> ours, its value there ({} is the old one, empty where no value follows from it alone), and what to mind;
# for an answer to a person, where migrate has a step of its own.
ROUGHLY: dict[str, tuple[str, str, str]] = {
    "lr": ("optim.learning_rate", "{}", ""), "beta": ("kl.coef", "{}", ""), "init_kl_coef": ("kl.coef", "{}", ""),
    "dataset_name": ("data.path", "{}", ""), "dataset": ("data.path", "{}", ""), "max_steps": ("steps", "{}", ""),
    "eval_steps": ("evaluation.every", "{}", ""), "max_prompt_length": ("prompts.max_tokens", "{}", ""),
    "lr_scheduler_type": ("optim.schedule", "{}", "constant, linear or cosine"),
    "per_device_train_batch_size": (
        "batch.micro_batch_size", "{}",
        "batch.batch_size is the rows of an optimizer step: this times gradient_accumulation_steps",
    ),
    "gradient_accumulation_steps": ("batch.batch_size", "", "it is per_device_train_batch_size times this"),
    "total_episodes": ("steps", "", "it is this divided by batch.batch_size"),
    "warmup_steps": ("optim.warmup_ratio", "", "it is this divided by the number of steps"),
    "missing_eos_penalty": ("missing_eos.penalty", "{}", "with missing_eos.mode=subtract"),
    "dtype": ("model.dtype", "{}", "float32 or bfloat16"), "torch_dtype": ("model.dtype", "{}", "float32 or bfloat16"),
    "bf16": ("model.dtype", "bfloat16", ""), "fp16": ("model.dtype", "", "float16 is not offered; float32 or bfloat16"),
    "load_in_4bit": ("model.quantize", "nf4", ""), "load_in_8bit": ("model.quantize", "int8", ""),
    "quantization_bit": ("model.quantize", "", "nf4 for 4 bits, int8 for 8"),
    "lora_target_modules": ("lora.target_modules", "", "a list, such as '[q_proj, v_proj]', or all-linear"),
    "lora_target": ("lora.target_modules", "", "a list, such as '[q_proj, v_proj]', or all-linear"),
    "sft_model_path": ("policy", "", "the run that rlhf sft made"),
    "adapter_name_or_path": ("policy", "", "the run that rlhf sft made"),
    "reward_model_path": ("rewards", "", "'[{run: RUN}]' for what rlhf train-rm made, '[{model: {path: MODEL}}]' else"),
    "reward_model": ("rewards", "", "'[{run: RUN}]' for what rlhf train-rm made, '[{model: {path: MODEL}}]' else"),
    "val_size": ("holdout_fraction", "", "a share of the prompts"), "mask_history": ("loss_on", "last_turn", ""),
    "use_cpu": ("runtime.device", "cpu", ""), "no_cuda": ("runtime.device", "cpu", ""),
}  # fmt: skip

# The same where a stage has it under another name.
IN_STAGE: dict[str, dict[str, str]] = {
    "sft": {},
    "train-rm": {},
    "ppo": {"data.path": "prompts.path", "data.limit": "prompts.limit", "data.name": "prompts.name",
            "data.split": "prompts.split", "max_length": "prompts.max_tokens"},
    "collect": {"data.path": "prompts.path", "data.limit": "prompts.limit", "data.name": "prompts.name",
                "data.split": "prompts.split"},
}  # fmt: skip

ELSEWHERE = {
    "model": "the base comes with the SFT run that 'policy' names; it belongs into sft.yaml",
    "lora": "the adapter starts from that of the SFT run that 'policy' names; it belongs into sft.yaml",
    "": "rlhf {stage} has no such setting",
}

_ONE_DEVICE = "one process, one device"
_METRICS = "every step is written to metrics.jsonl"
_HELD_OUT = "a share of the prompts is held out (holdout_fraction); evaluation.every measures on it during training"
_EXPORT = "rlhf export writes what is uploaded"
_ADAMW = "the optimizer is AdamW with its usual betas"
_QUANTISED = "model.quantize: nf4 is bitsandbytes' NF4 with nested scales, int8 its 8-bit layers"
_SPEED = "says how, not what, is computed"

# Old key -> why it has no counterpart.
GONE: dict[str, str] = {
    "vf_coef": "the value role has an optimizer of its own: optim.value_learning_rate",
    "whiten_rewards": "scores are standardised by rlhf train-rm, advantages by update.normalise_advantages",
    "ppo_whiten_rewards": "scores are standardised by rlhf train-rm, advantages by update.normalise_advantages",
    "ppo_score_norm": "scores are standardised by rlhf train-rm",
    "stop_token": "the end token is the one that the chat template writes; sampling.stop_tokens names more",
    "stop_token_id": "the end token is the one that the chat template writes; sampling.stop_tokens names more",
    "num_sample_generations": "evaluation.every sets when samples are written",
    "top_k": "PPO samples from the whole distribution, which is the one that it trains",
    "top_p": "PPO samples from the whole distribution, which is the one that it trains",
    "template": "the chat template is the tokenizer's; model.chat_template serves a base that has none",
    "chat_template_path": "the chat template is the tokenizer's; model.chat_template serves a base that has none",
    "eos_token": "the end token is the one that the chat template writes; lora.train_tokens trains it",
    "pad_token": "padding is told apart by length, not by its token",
    "train_on_prompt": "loss is on responses only", "dataset_text_field": "data.columns maps names of fields",
    "completion_only_loss": "loss is on responses only", "assistant_only_loss": "loss is on responses only",
    "disable_dropout": "there is no dropout but lora.dropout",
    "lora_task_type": "the stage says it", "lora_modules_to_save": "lora.train_tokens trains rows of the embedding",
    "additional_target": "lora.train_tokens trains rows of the embedding",
    "use_bnb_nested_quant": _QUANTISED,
    "quantization_method": _QUANTISED, "bnb_4bit_quant_type": _QUANTISED,
    "logging_steps": _METRICS, "logging_first_step": _METRICS, "logging_strategy": _METRICS, "plot_loss": _METRICS,
    "logging_dir": _METRICS, "run_name": "a run is called by its run_dir", "exp_name": "a run is called by its run_dir",
    "eval_strategy": _HELD_OUT, "evaluation_strategy": _HELD_OUT, "eval_steps": _HELD_OUT,
    "per_device_eval_batch_size": _HELD_OUT, "do_eval": _HELD_OUT, "dataset_test_split": _HELD_OUT,
    "eval_dataset": _HELD_OUT, "do_train": "the command says it", "do_predict": "rlhf generate samples",
    "push_to_hub": _EXPORT, "hub_model_id": _EXPORT, "hub_strategy": _EXPORT, "hub_private_repo": _EXPORT,
    "hub_token": "a secret belongs into the environment (HF_TOKEN)",
    "optim": _ADAMW, "optim_args": _ADAMW, "adam_beta1": _ADAMW, "adam_beta2": _ADAMW, "adam_epsilon": _ADAMW,
    "deepspeed": _ONE_DEVICE, "fsdp": _ONE_DEVICE, "fsdp_config": _ONE_DEVICE, "ddp_timeout": _ONE_DEVICE,
    "ddp_find_unused_parameters": _ONE_DEVICE, "ds3_gather_for_generation": _ONE_DEVICE, "local_rank": _ONE_DEVICE,
    "overwrite_output_dir": "--overwrite on the command line", "overwrite_cache": "nothing is cached",
    "resume_from_checkpoint": "--resume on the command line", "save_only_model": "a checkpoint holds all of a run",
    "save_strategy": "save_every counts steps", "preprocessing_num_workers": _SPEED, "dataset_num_proc": _SPEED,
    "dataloader_num_workers": _SPEED, "dataloader_pin_memory": _SPEED, "tf32": _SPEED, "flash_attn": _SPEED,
    "use_liger_kernel": _SPEED, "gradient_checkpointing_kwargs": _SPEED, "torch_compile": _SPEED,
    "padding_free": _SPEED, "packing_strategy": _SPEED, "remove_unused_columns": "fields that are not read are named",
    "dataset_streaming": "data are read whole, so that every row is checked first",
    "load_best_model_at_end": "use: best keeps the best of the measured steps, and is the default",
    "neftune_noise_alpha": "not offered", "label_smoothing_factor": "not offered",
    "value_model_path": "with value.fit: gradient the value role starts from the reward run (value.start)",
    "ref_model": "the reference is the SFT run",
    "data_seed": "everything random comes from seed", "dataset_dir": "a path names each file",
    "interleave_probs": "weights of the mixture", "mix_strategy": "weights of the mixture",
    "finetuning_type": "lora says it: null trains every weight", "stage": "the command says it",
    "use_peft": "lora says it: null trains every weight",
}  # fmt: skip

# What a file leaves to its tool's defaults and matters for the outcome; it is written out.
DEFAULTS: dict[tuple[str, str], dict[str, Any]] = {
    (TRL, "sft"): {"learning_rate": 2e-5, "num_train_epochs": 3.0, "per_device_train_batch_size": 8, "max_length": 1024,
                   "lora_dropout": 0.05},
    (TRL, "train-rm"): {"learning_rate": 1e-4, "num_train_epochs": 3.0, "per_device_train_batch_size": 8,
                        "max_length": 1024, "center_rewards_coefficient": 0.0},
    (TRL, "ppo"): {"learning_rate": 3e-6, "per_device_train_batch_size": 8, "num_ppo_epochs": 4, "response_length": 53,
                   "temperature": 0.7, "lr_scheduler_type": "linear", "lam": 0.95},
    (LLAMAFACTORY, "sft"): {"learning_rate": 5e-5, "num_train_epochs": 3.0, "per_device_train_batch_size": 8,
                            "cutoff_len": 2048, "lora_rank": 8},
    (LLAMAFACTORY, "train-rm"): {"learning_rate": 5e-5, "num_train_epochs": 3.0, "per_device_train_batch_size": 8,
                                 "cutoff_len": 2048, "center_rewards_coefficient": 0.0},
    (LLAMAFACTORY, "ppo"): {"learning_rate": 5e-5, "per_device_train_batch_size": 8, "ppo_epochs": 4,
                            "max_new_tokens": 1024, "temperature": 0.95, "lr_scheduler_type": "linear", "lam": 0.95},
}  # fmt: skip
