"""The frozen base and its tokenizer, loaded so that nothing of their own settings leaks into a run."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig
from transformers.utils import cached_file

from rlhf import artifacts
from rlhf.data.chat import ChatFormat
from rlhf.demo import registry as demo
from rlhf.errors import Problem, RlhfError

transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()


@dataclass(frozen=True)
class Base:
    """A causal language model that no stage ever trains or changes, with its tokenizer and chat format."""

    model: Any
    tokenizer: Any
    chat: ChatFormat
    source: str
    digest: str
    device: torch.device

    @property
    def hidden_size(self) -> int:
        return int(self.model.config.get_text_config().hidden_size)

    @property
    def context_length(self) -> int:
        return int(self.model.config.get_text_config().max_position_embeddings)


def load_tokenizer(source: str, revision: str | None = None, trust_remote_code: bool = False) -> Any:
    """The tokenizer of a model directory, hub id or demo:base."""
    path = _resolve(source)
    try:
        return AutoTokenizer.from_pretrained(path, revision=revision, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise _cannot_load(source, "tokenizer", error) from None


def load_base(
    source: str, *, revision: str | None = None, dtype: str = "float32", device: torch.device | None = None,
    template: str | None = None, trust_remote_code: bool = False, attn_implementation: str | None = None,
) -> Base:  # fmt: skip
    """Load, freeze, put in eval mode, switch dropout and the model's own generation settings off.

    Raises:
        RlhfError: MOD001 where nothing can be loaded, MOD003 where the tokenizer is larger than the embeddings,
            MOD004 for logits that the logprobs here do not follow, MOD005 where weights are missing, SEC005 for pickle.
    """
    device = device or torch.device("cpu")
    tokenizer = load_tokenizer(source, revision, trust_remote_code)
    path = _resolve(source)
    try:
        model, report = AutoModelForCausalLM.from_pretrained(
            path, revision=revision, dtype=getattr(torch, dtype), trust_remote_code=trust_remote_code,
            attn_implementation=attn_implementation, use_safetensors=True, output_loading_info=True,
        )  # fmt: skip
    except (OSError, ValueError, RuntimeError, ImportError, SafetensorError) as error:
        if Path(path).is_dir() and list(Path(path).glob("*.bin")) and not list(Path(path).glob("*.safetensors")):
            what = "has only pickle weights, which are refused."
            raise RlhfError(Problem("SEC005", source, what, "a revision with safetensors")) from None
        raise _cannot_load(source, "model", error) from None
    _refuse_incomplete(source, report["missing_keys"])
    _refuse_unknown(source, model, tokenizer)
    model.requires_grad_(False)
    model.eval()
    model.generation_config = GenerationConfig()
    without_dropout(model)
    model.to(device)
    _refuse_other_logits(source, model)
    directory = (
        Path(path) if Path(path).is_dir() else Path(str(cached_file(path, "config.json", revision=revision))).parent
    )
    return Base(model, tokenizer, ChatFormat(tokenizer, template), source, artifacts.model_digest(directory), device)


def without_dropout(model: nn.Module) -> None:
    """Dropout makes the ratio of the first minibatch differ from 1; a base that is not trained has no use for it."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if hasattr(module, "attention_dropout"):
            setattr(module, "attention_dropout", 0.0)  # noqa: B010


def weights_checksum(model: nn.Module) -> str:
    """SHA-256 of all parameters that carry no adapter, by name; equal before and after any stage."""
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        if "lora_" not in name and "trainable_tokens" not in name:
            digest.update(name.replace(".base_layer", "").encode())
            digest.update(parameter.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _resolve(source: str) -> str:
    return str(demo.resolve_model(source)) if demo.is_demo(source) else source


def _cannot_load(source: str, what: str, error: Exception) -> RlhfError:
    first = " ".join(str(error).split())[:160]
    offline = os.environ.get("HF_HUB_OFFLINE") == "1"
    fix = "unset HF_HUB_OFFLINE, or name a directory" if offline else "a model directory, or a hub id while online"
    return RlhfError(Problem("MOD001", source, f"the {what} cannot be loaded: {first}", fix))


def _refuse_unknown(source: str, model: Any, tokenizer: Any) -> None:
    config = model.config.get_text_config()
    rows = model.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > rows:
        what = f"the tokenizer has {len(tokenizer)} tokens, the embeddings {rows} rows."
        raise RlhfError(Problem("MOD003", source, what, "the tokenizer that belongs to this model"))
    for name in ("logits_scaling", "logit_scale", "final_logit_softcapping"):
        value = getattr(config, name, None)
        if value not in (None, 1, 1.0):
            what = f"scales its logits ({name} = {value}), which is not supported."
            raise RlhfError(Problem("MOD004", source, what, "another model"))


def _refuse_incomplete(source: str, missing: set[str]) -> None:
    """transformers fills a weight that the files lack with random numbers, and only warns."""
    if missing:
        what = f"lacks {len(missing)} weights: {', '.join(sorted(missing)[:3])}."
        raise RlhfError(Problem("MOD005", source, what, "a whole download of a causal language model"))


@torch.no_grad()
def _refuse_other_logits(source: str, model: Any) -> None:
    """The logprobs here are of head(backbone(ids)): whatever else a model does to its logits must show."""
    ids = torch.tensor([[1, 2, 1]], device=model.device)
    inner = getattr(model, model.base_model_prefix)
    hidden = inner(input_ids=ids, use_cache=False).last_hidden_state
    ours, own = model.get_output_embeddings()(hidden).float(), model(input_ids=ids, use_cache=False).logits.float()
    if not torch.allclose(ours, own, rtol=1e-2, atol=1e-2 * float(own.abs().max()), equal_nan=True):
        raise RlhfError(Problem("MOD004", source, "changes its logits behind the output head.", "another model"))
