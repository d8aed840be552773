"""What of a TRL or LlamaFactory config has more than another name here, step by step."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from rlhf.config import yaml_reader
from rlhf.config.migration import Migration, plain
from rlhf.config.migrations import ELSEWHERE, LLAMAFACTORY, TRL

TRACKERS = ("tensorboard", "wandb", "trackio", "mlflow")
PLACEHOLDER = "data.jsonl"


def runs(found: Migration) -> None:
    """Models that are runs here."""
    for key, ours, made in (
        ("sft_model_path", "policy", "rlhf sft"),
        ("adapter_name_or_path", "policy", "rlhf sft"),
        ("reward_model_path", "rewards", "rlhf train-rm"),
        ("reward_model", "rewards", "rlhf train-rm"),
    ):
        value = found.take(key)
        if value is not None:
            what = f"{key} is {plain(value)}; what stands here is a run that {made} has made"
            if found.stage == "ppo" and ours == "rewards" and found.tool == TRL:
                found.config["rewards"] = [{"model": {"path": str(value)}}]
                found.undecided["rewards"] = (
                    f"{key} is read as a sequence classifier; what rlhf train-rm has made is a run"
                )
            elif found.stage == "ppo" or (ours == "policy" and found.stage == "train-rm"):
                found.undecided[ours] = what
            else:
                found.gone[key] = f"rlhf {found.stage} starts from no run"


def data(found: Migration, data_sets: Mapping[str, Any]) -> None:
    section = "prompts" if found.stage == "ppo" else "data"
    listed = found.take("datasets")
    named = found.take("dataset_name") or found.take("dataset")
    if isinstance(listed, list) and all(isinstance(item, dict) and item.get("path") for item in listed):
        sources = [{key: item[key] for key in ("path", "name", "split") if item.get(key)} for item in listed]
        extra = sorted({key for item in listed for key in item} - {"path", "name", "split"})
        if extra:
            found.undecided[f"{section}.mixture"] = f"{', '.join(extra)} of datasets: columns and files are named here"
    else:
        names = [name.strip() for name in str(named).split(",")] if named else []
        sources = [_source(found, name, data_sets) for name in names]
        if unknown := [name for name in names if found.tool == LLAMAFACTORY and name not in data_sets]:
            what = "named in dataset_info.json; the file or hub id belongs here"
            found.undecided[f"{section}.path"] = f"{', '.join(map(plain, unknown))}: {what}"
    shares = str(found.take("interleave_probs") or "").split(",")
    if len(sources) > 1 and len(shares) == len(sources):
        weights = [yaml_reader.scalar(share.strip()) for share in shares]
        sources = [{**source, "weight": weight} for source, weight in zip(sources, weights, strict=True)]
    if not sources:
        found.undecided[f"{section}.path"] = f"the file names no data set; {PLACEHOLDER} stands for it"
        sources = [{"path": PLACEHOLDER}]
    if found.tool == TRL and len(sources) == 1 and named:
        found.old.setdefault("dataset_train_split", "train")
    if len(sources) > 1:
        found.config[f"{section}.mixture"] = sources
    else:
        found.config |= {f"{section}.{key}": value for key, value in sources[0].items()}


def _source(found: Migration, name: str, data_sets: Mapping[str, Any]) -> dict[str, Any]:
    """A data set of LlamaFactory by its entry in dataset_info.json; any other name is a path or hub id."""
    entry = data_sets.get(name)
    if not isinstance(entry, dict):
        return {"path": name}
    folder = str(found.old.get("dataset_dir") or "data")
    path = f"{folder}/{entry['file_name']}" if "file_name" in entry else str(entry.get("hf_hub_url", name))
    called = {"prompt": "instruction", "query": "input", "response": "output", "messages": "conversations"}
    columns = {called.get(key, key): value for key, value in (entry.get("columns") or {}).items()}
    renamed = {ours: theirs for ours, theirs in columns.items() if ours != theirs}
    source = {"path": path, "name": entry.get("subset"), "split": entry.get("split"), "columns": renamed}
    return {key: value for key, value in source.items() if value}


def batch(found: Migration) -> None:
    """Counted on one process: what one device takes, times the accumulation."""
    micro = found.number("per_device_train_batch_size", 1)
    accumulated = found.number("gradient_accumulation_steps", 1) or 1
    whole, minibatches = micro * accumulated, found.number("num_mini_batches", 1) or 1
    if found.stage == "ppo":
        whole *= found.number("ppo_buffer_size", 1) or 1
        found.config["batch.minibatch_size"] = whole // minibatches if found.tool == TRL else micro * accumulated
    found.config |= {"batch.batch_size": whole, "batch.micro_batch_size": micro}
    found.undecided["batch.batch_size"] = f"{whole} for one process; times the number of processes, if there were more"


def length(found: Migration) -> None:
    episodes, epochs = found.number("total_episodes", 1), found.number("num_train_epochs")
    steps = found.number("max_steps", -1)
    if steps and steps > 0 and (found.stage != "ppo" or found.tool == LLAMAFACTORY):
        found.config["steps"] = steps
    elif episodes:
        found.config["steps"] = math.ceil(episodes / found.config["batch.batch_size"])
    elif found.stage == "ppo":
        found.undecided["steps"] = f"{epochs or 'the'} passes over the prompts; here a number of batches"
    else:
        found.config["epochs"] = float(epochs)


def schedule(found: Migration) -> None:
    kind, warmup = found.take("lr_scheduler_type"), found.number("warmup_steps")
    known = {"linear": "linear", "cosine": "cosine", "constant": "constant", "constant_with_warmup": "constant"}
    if isinstance(kind, str) and kind in known:
        found.config["optim.schedule"] = known[kind]
    elif kind:
        found.undecided["optim.schedule"] = f"{plain(kind)} is not offered; constant, linear or cosine"
    if warmup and warmup < 1:
        found.config["optim.warmup_ratio"] = warmup
    elif warmup and "steps" in found.config:
        found.config["optim.warmup_ratio"] = round(min(1.0, warmup / found.config["steps"]), 6)
    elif warmup:
        found.undecided["optim.warmup_ratio"] = f"warmup_steps is {warmup}; here a share of all steps"


def precision(found: Migration) -> None:
    named = [found.take(key) for key in ("dtype", "torch_dtype")]
    bf16 = [found.take(key) for key in ("bf16", "pure_bf16")]
    chosen = "bfloat16" if any(bf16) else next((name for name in named if name), None)
    if found.take("fp16") or chosen == "float16":
        found.undecided["model.dtype"] = "float16 is not offered; float32 or bfloat16"
    elif chosen in ("float32", "bfloat16") and found.stage == "sft":
        found.config["model.dtype"] = chosen
    elif chosen in ("float32", "bfloat16"):
        found.gone["dtype"] = f"{chosen}: {ELSEWHERE['model']}"
    elif chosen:
        found.undecided["model.dtype"] = f"{plain(chosen)}: float32 or bfloat16 is said here"


def quantised(found: Migration) -> None:
    """4 and 8 bits by bitsandbytes."""
    bits = found.take("quantization_bit")
    four, eight = found.take("load_in_4bit") or bits == 4, found.take("load_in_8bit") or bits == 8
    if four or eight:
        found.put("quantization_bit", "model.quantize", "nf4" if four else "int8")
    elif bits:
        found.undecided["model.quantize"] = f"{plain(bits)} bits are not offered; nf4 or int8"


def lora(found: Migration) -> None:
    key = "lora_target_modules" if "lora_target_modules" in found.old else "lora_target"
    targets, kind = found.take(key), found.old.get("finetuning_type")
    if targets in ("all", "all-linear", ["all"], ["all-linear"]):
        found.put(key, "lora.target_modules", "all-linear")
    elif targets:
        parts = targets if isinstance(targets, list) else str(targets).split(",")
        found.put(key, "lora.target_modules", [str(part).strip() for part in parts])
    if kind == "full" or (found.tool == TRL and not found.old.get("use_peft")):
        found.config["lora"] = None
        found.undecided["lora"] = "null trains every weight, as there; without this line an adapter is trained"
        return
    if kind == "freeze":
        found.undecided["lora"] = "a part of the weights was trained there; here an adapter is, or all of them (null)"
    if found.stage != "sft":
        return
    if found.tool == TRL and not targets:
        found.undecided["lora.target_modules"] = "not set: PEFT chose layers by architecture; here all linear ones"
    if found.tool == LLAMAFACTORY and found.old.get("lora_alpha") is None:
        found.config["lora.alpha"] = 2 * found.old["lora_rank"]
        found.written.append("lora.alpha")


def whole(found: Migration) -> None:
    """Where every weight is trained there is no adapter to set, and the weights are float32."""
    if "lora" not in found.config:
        return
    for key in [key for key in found.config if key.startswith("lora.")]:
        del found.config[key]
    found.written = [key for key in found.written if not key.startswith("lora.")]
    if found.config.pop("model.quantize", None):
        found.undecided["model.quantize"] = "quantised weights cannot be trained"
    if found.config.get("model.dtype") == "bfloat16":
        found.config["model.dtype"] = "float32"
        found.undecided["model.dtype"] = "bfloat16 there; here weights that are trained are float32"
    if found.config.pop("model.trust_remote_code", None):
        found.undecided["model.revision"] = "a model that is trained whole cannot keep Python code of its own"


def ppo(found: Migration) -> None:
    """One optimizer there is two here; without a penalty a cut-off response kept its score."""
    if found.stage != "ppo":
        return
    found.config |= {"value.fit": "gradient", "optim.value_learning_rate": found.old["learning_rate"]}
    penalty = found.take("missing_eos_penalty")
    found.config |= {"missing_eos.mode": "subtract", "missing_eos.penalty": 0.0 if penalty is None else penalty}
    found.written += ["missing_eos"] if penalty is None else []
    if (estimator := found.take("kl_estimator")) not in (None, "k1"):
        found.undecided["kl.estimator"] = f"{plain(estimator)} in the reward is biased; k1 or exact"


def others(found: Migration) -> None:
    reported = found.take("report_to")
    listed = [reported] if isinstance(reported, str) else reported or []
    if unknown := [name for name in listed if name not in (*TRACKERS, "none")]:
        found.undecided["report_to"] = f"{plain(unknown)}: here {', '.join(TRACKERS)}"
    if known := [name for name in listed if name in TRACKERS]:
        found.config["report_to"] = known
    if found.take("use_cpu") or found.take("no_cuda"):
        found.config["runtime.device"] = "cpu"
    if found.take("mask_history"):
        found.put("mask_history", "loss_on", "last_turn")
    if (share := found.number("val_size")) and share < 1:
        found.put("val_size", "holdout_fraction", share)
    elif share:
        found.undecided["holdout_fraction"] = f"val_size is {share} rows; here a share of the prompts"
    if found.stage != "ppo" and {"max_length", "max_seq_length", "cutoff_len"} & found.old.keys():
        found.undecided["too_long"] = "rows beyond max_length were cut; here they are dropped and counted, or truncate"
    if found.stage == "sft" and found.old.get("trust_remote_code"):
        found.undecided["model.revision"] = "code that comes with a model runs only from a commit, which belongs here"
