"""LoRA adapters: made, read, written in PEFT's own layout, and grown to a larger rank."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from peft.utils.other import get_pattern_key
from safetensors.torch import load_file
from safetensors.torch import save as save_tensors
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from rlhf.config.sections import LoraSection, RoleLoraSection
from rlhf.errors import Problem, RlhfError
from rlhf.models.base import Base
from rlhf.models.ends import token_ids
from rlhf.runs import artifacts
from rlhf.runs.snapshots import require_finite
from rlhf.runs.storage import staged_directory, write_bytes, write_json

FIRST_FACTOR = re.compile(r"(base_model\.model\.)?(?P<module>.+)\.lora_(?P<kind>embedding_)?A(\.weight)?")
CONFIG, WEIGHTS, PICKLED = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"


def fresh_lora(lora: LoraSection, model: Any, tokenizer: Any) -> LoraConfig:
    """The LoRA config of a new adapter on ``model``.

    Raises:
        RlhfError: MOD030 for target modules that match nothing, MOD031 for tokens that the tokenizer does not have.
    """
    targets = linear_names(model) if lora.target_modules == "all-linear" else list(lora.target_modules)
    present = linear_names(model)
    missing = [name for name in targets if name not in present]
    if missing:
        what = f"{', '.join(missing)} match no linear layer; there are {', '.join(present)}."
        raise RlhfError(Problem("MOD030", "lora.target_modules", what))
    tokens = token_ids(lora.train_tokens, tokenizer, "lora.train_tokens")
    conv = any(isinstance(module, Conv1D) for module in model.modules())
    return LoraConfig(
        r=lora.r,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=targets,
        task_type="CAUSAL_LM",
        bias="none",
        fan_in_fan_out=conv,
        trainable_token_indices=_token_rows(tokens, model),
        use_dora=lora.use_dora,
        use_rslora=lora.use_rslora,
    )


def start_of(policy: str, lora: RoleLoraSection, base: Base) -> Path | LoraConfig:
    """What a role that starts from a policy begins with: its adapter, or a fresh one where it has none."""
    adapter = artifacts.adapter_of(policy)
    if adapter is not None:
        return adapter
    rank = lora.r or LoraSection().r
    return fresh_lora(LoraSection(r=rank, alpha=2.0 * rank), base.model, base.tokenizer)


def _token_rows(tokens: list[int], model: Any) -> list[int] | dict[str, list[int]] | None:
    """Which rows PEFT trains. From a list it takes the embedding and a head tied to it; a head of its own, which
    decides how often a token is written, must be named."""
    if not tokens or model.config.get_text_config().tie_word_embeddings:
        return tokens or None
    names = {id(module): name.rpartition(".")[2] for name, module in model.named_modules()}
    return {names[id(layer)]: tokens for layer in (model.get_input_embeddings(), model.get_output_embeddings())}


def linear_names(model: Any) -> list[str]:
    """Last names of the linear layers inside the model, adapted or not; the output head is none of them."""
    head = model.get_output_embeddings()
    names = {
        name.removesuffix(".base_layer").rpartition(".")[2]
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D)
        and module is not head
        and "lora_" not in name
        and "token_adapter" not in name
    }
    return sorted(names)


def directory_of(source: str) -> Path:
    """Where a policy run, or a plain adapter directory, has its adapter.

    Raises:
        RlhfError: CKP004 for a run whose every weight was trained.
    """
    if artifacts.is_plain_adapter(source):
        return Path(source)
    found = artifacts.adapter_of(source)
    if found is None:
        fix = f"model.path: {Path(source) / artifacts.MODEL}, which is a base like any other"
        raise RlhfError(Problem("CKP004", source, "trained every weight: it has no adapter.", fix))
    return found


def read(directory: Path) -> tuple[LoraConfig, dict[str, Tensor]]:
    """Config and weights of an adapter directory; the config comes back without dropout, ready to train.

    Raises:
        RlhfError: CKP010 if a file is missing, MOD033 for an adapter that also trains whole modules or biases, SEC005
            if there are only pickle weights.
    """
    if (directory / PICKLED).is_file() and not (directory / WEIGHTS).is_file():
        what = "pickle weights are refused."
        raise RlhfError(Problem("SEC005", str(directory / PICKLED), what, f"an adapter with {WEIGHTS}"))
    for name in (CONFIG, WEIGHTS):
        if not (directory / name).is_file():
            raise RlhfError(Problem("CKP010", str(directory / name), "missing.", "make the run again"))
    config = LoraConfig.from_pretrained(str(directory))
    _refuse_more_than_lora(config, directory)
    config.inference_mode, config.lora_dropout, config.base_model_name_or_path = False, 0.0, None
    return config, load_file(directory / WEIGHTS)


def _refuse_more_than_lora(config: LoraConfig, directory: Path) -> None:
    """Whole modules and biases would be changed on the base that all roles share."""
    also = [f"modules_to_save: {', '.join(config.modules_to_save)}"] if config.modules_to_save else []
    if config.bias != "none":
        also.append(f"bias: {config.bias}")
    if also:
        what = f"trains more than LoRA and single token rows ({'; '.join(also)}), which roles on one base cannot hold."
        fix = "merge it into its model and name that as model.path, or train an adapter without them"
        raise RlhfError(Problem("MOD033", str(directory / CONFIG), what, fix))


def weights(model: PeftModel, adapter: str) -> dict[str, Tensor]:
    """The adapter's own tensors under PEFT's names, on the CPU."""
    state = get_peft_model_state_dict(model, adapter_name=adapter, save_embedding_layers=False)
    return {name: tensor.detach().cpu().clone().contiguous() for name, tensor in state.items()}


def save(model: PeftModel, adapter: str, directory: Path) -> None:
    """Write ``adapter_config.json`` and ``adapter_model.safetensors``, whole or not at all.

    Raises:
        RlhfError: GRD005 if a weight is not finite; nothing is written then.
    """
    tensors = weights(model, adapter)
    require_finite(tensors, directory)
    with staged_directory(directory) as staging:
        config = model.peft_config[adapter]
        was = config.inference_mode
        config.inference_mode = True
        config.save_pretrained(str(staging))
        config.inference_mode = was
        # PEFT keeps the targets in a set: in order, equal adapters are equal files.
        written = json.loads((staging / CONFIG).read_text("utf-8"))
        written["target_modules"] = sorted(written["target_modules"])
        write_json(staging / CONFIG, written)
        write_bytes(staging / WEIGHTS, save_tensors(tensors, metadata={"format": "pt"}))


def load(model: PeftModel, name: str, state: dict[str, Tensor]) -> None:
    """Give an adapter its tensors, all of them and no others."""
    outcome = set_peft_model_state_dict(model, state, adapter_name=name)
    # A tied output head shares the embedding's trained rows, and PEFT writes them once.
    shared = "trainable_tokens_delta" if any("trainable_tokens_delta" in key for key in state) else "\0"
    missing = [key for key in outcome.missing_keys if belongs(key, name) and shared not in key]
    assert not outcome.unexpected_keys and not missing, f"adapter {name}: {outcome.unexpected_keys} {missing}"


def belongs(parameter: str, adapter: str) -> bool:
    """PEFT puts the adapter's name behind its own; a layer of the model may have the same name ("value")."""
    return re.search(rf"\.(lora_\w+|trainable_tokens_\w+)\.{re.escape(adapter)}(\.|$)", parameter) is not None


def grow(config: LoraConfig, state: dict[str, Tensor], rank: int) -> tuple[LoraConfig, dict[str, Tensor]]:
    """The same function at a larger rank: A gets new rows at random, B zero columns, alpha grows with the rank.

    Each module by the rank and alpha that it has (``rank_pattern``, ``alpha_pattern``). One that has a larger rank than
    asked for keeps it.

    Raises:
        RlhfError: CFG020 for a smaller rank than the adapter's, which would change the function.
    """
    if rank == config.r:
        return config, state
    if rank < config.r:
        what = f"rank {rank} is smaller than the adapter's {config.r}."
        raise RlhfError(Problem("CFG020", "lora.r", what, "the same rank or a larger one"))
    generator, grown = torch.Generator().manual_seed(rank), dict(state)
    ranks, alphas = {}, {}
    for name, a in state.items():
        if not (found := FIRST_FACTOR.fullmatch(name)):
            continue
        module, kind, own, size = found["module"], found["kind"] or "", a.shape[0], max(rank, a.shape[0])
        alpha = config.alpha_pattern.get(get_pattern_key(config.alpha_pattern, module), config.lora_alpha)
        ranks[module], alphas[module] = size, alpha * _growth(config, own, size)
        other = name.replace(f"lora_{kind}A", f"lora_{kind}B")
        extra, bound, b = torch.empty(size - own, *a.shape[1:]), a.shape[1] ** -0.5, state[other]
        grown[name] = torch.cat([a, extra.uniform_(-bound, bound, generator=generator).to(a.dtype)])
        grown[other] = torch.cat([b, b.new_zeros(b.shape[0], size - own)], 1)
    config.lora_alpha, config.r = config.lora_alpha * _growth(config, config.r, rank), rank
    config.rank_pattern = {module: size for module, size in ranks.items() if size != rank}
    config.alpha_pattern = {module: alpha for module, alpha in alphas.items() if alpha != config.lora_alpha}
    return config, grown


def _growth(config: LoraConfig, own: int, rank: int) -> float:
    """By what alpha grows so that the scaling stays: alpha / r, or alpha / sqrt(r) in rank-stabilised LoRA."""
    return math.sqrt(rank / own) if config.use_rslora else rank / own
