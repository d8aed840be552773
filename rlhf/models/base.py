"""The frozen base and its tokenizer, loaded so that nothing of their own settings leaks into a run."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig
from transformers.utils import cached_file

from rlhf import secrets
from rlhf.data.chat_format import ChatFormat
from rlhf.data.rendering import Rendering
from rlhf.demo import catalogue as demo
from rlhf.errors import Problem, RlhfError, of_the_machine
from rlhf.hub import connection, model_files, names
from rlhf.models import ends, packing, quantised
from rlhf.models.fused import self_checks
from rlhf.runs import artifacts

log = logging.getLogger("rlhf")
NO_LIMIT = 1 << 30
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
    quantize: str | None = None

    @property
    def hidden_size(self) -> int:
        return int(self.model.config.get_text_config().hidden_size)

    @property
    def context_length(self) -> int:
        return self.chat.context_length or NO_LIMIT


def load_tokenizer(source: str, revision: str | None = None, trust_remote_code: bool = False) -> Any:
    """The tokenizer of a model directory, hub id or demo:base."""
    path = resolve(source, revision, trust_remote_code)
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, revision=revision, trust_remote_code=trust_remote_code)
    except Exception as error:  # the Rust tokenizers raise nothing narrower
        raise cannot_load(source, "tokenizer", error) from None
    if tokenizer.pad_token_id is None:
        _say_no_pad(source)
    return tokenizer


def load_context_length(source: str, revision: str | None = None, trust_remote_code: bool = False) -> int | None:
    """How many tokens the model was made for, from its config alone; None where it sets no limit."""
    path = resolve(source, revision, trust_remote_code)
    try:
        return context_length(AutoConfig.from_pretrained(path, revision=revision, trust_remote_code=trust_remote_code))
    except (OSError, ValueError, KeyError) as error:
        raise cannot_load(source, "config", error) from None


@dataclass(frozen=True)
class Loading:
    """How a base is loaded; as the keys of a config's model section, and where to."""

    revision: str | None = None
    dtype: str = "float32"
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    template: str | None = None
    trust_remote_code: bool = False
    attn_implementation: str | None = None
    quantize: str | None = None
    rendering: Rendering = field(default_factory=Rendering)


def load_base(source: str, loading: Loading | None = None) -> Base:
    """Load, freeze, put in eval mode, switch dropout and the model's own generation settings off.

    A quantised base is made on its device and stays there: it is never moved, merged into or saved.

    Raises:
        RlhfError: MOD001 where nothing can be loaded, MOD003 where the tokenizer is larger than the embeddings,
            MOD004 for logits that the logprobs here do not follow, MOD005 where weights are missing, MOD006 where files
            are damaged, MOD008 where weights are not finite, MOD009 for an architecture that is built in another way,
            RES005 where the library for ``quantize`` is missing, SEC004 for remote code that is not pinned, SEC005 for
            pickle, SEC006 for names that lead elsewhere, SEC007 for remote code.
    """
    loading = loading or Loading()
    revision, device, quantize = loading.revision, loading.device, loading.quantize
    tokenizer = load_tokenizer(source, revision, loading.trust_remote_code)
    path = resolve(source, revision, loading.trust_remote_code)
    if Path(path).is_dir():
        model_files.read(Path(path), source)
    rendering = with_ends(loading.rendering, tokenizer, path, revision)
    try:
        model, report = AutoModelForCausalLM.from_pretrained(
            path,
            revision=revision,
            dtype=getattr(torch, loading.dtype),
            trust_remote_code=loading.trust_remote_code,
            attn_implementation=loading.attn_implementation,
            use_safetensors=True,
            output_loading_info=True,
            **_quantisation(loading),
        )
    except (OSError, ValueError, RuntimeError, ImportError, SafetensorError) as error:
        raise cannot_load(source, "model", error) from None
    refuse_incomplete(source, report["missing_keys"], "a causal language model")
    refuse_unknown(source, model, tokenizer)
    # Adapters name their base by this: as the config has it, so that equal runs are equal files on every machine.
    model.name_or_path = model.config._name_or_path = source
    directory = (
        Path(path) if Path(path).is_dir() else Path(str(cached_file(path, "config.json", revision=revision))).parent
    )
    if quantize:
        quantised.settle(model)
        refuse_not_finite(source, quantised.source_weights(directory))
    else:
        model.to(device)
        refuse_not_finite(source, model.named_parameters())
    _refuse_other_logits(source, model)
    settle(model, self_checks.text_ids(tokenizer))
    chat = ChatFormat(tokenizer, loading.template, context_length(model.config), rendering)
    return Base(model, tokenizer, chat, source, artifacts.model_digest(directory), device, quantize)


def with_ends(rendering: Rendering, tokenizer: Any, path: str, revision: str | None) -> Rendering:
    """The same with the model's own end tokens where none are named.

    Raises:
        RlhfError: MOD031 for a token that the tokenizer does not have.
    """
    if rendering.ends is None:
        return replace(rendering, ends=ends.of_model(path, tokenizer, revision))
    ends.token_ids(rendering.ends, tokenizer, "model.end_tokens")
    return rendering


def _quantisation(loading: Loading) -> dict[str, Any]:
    if loading.quantize is None:
        return {}
    settings = quantised.settings(loading.quantize, getattr(torch, loading.dtype))
    return {"quantization_config": settings, "device_map": {"": loading.device}}


def settle(model: Any, text_ids: Sequence[int] | None = None) -> None:
    """Freeze, put in eval mode, drop what the model says of sampling and dropout, and let it take packed rows, which
    is tried on ``text_ids``: ordinary text."""
    model.requires_grad_(False)
    model.eval()
    model.generation_config = GenerationConfig()
    without_dropout(model)
    contiguous_into_head(model)
    packing.enable(model, text_ids)


def without_dropout(model: nn.Module) -> None:
    """Dropout makes the ratio of the first minibatch differ from 1; a base that is not trained has no use for it."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if hasattr(module, "attention_dropout"):
            setattr(module, "attention_dropout", 0.0)  # noqa: B010


def contiguous_into_head(model: Any) -> None:
    """Sampling hands the head a slice, the last token of every row: for that, bfloat16 on a CPU copies the head's whole
    weight once a row (36 GB for 64 rows at 1.5 B parameters)."""
    model.get_output_embeddings().register_forward_pre_hook(lambda _, inputs: tuple(x.contiguous() for x in inputs))


def weights_checksum(model: nn.Module) -> str:
    """SHA-256 of all parameters that carry no adapter, by name, and of the scales of quantised ones; equal before and
    after any stage."""
    digest = hashlib.sha256()
    for name, tensor in sorted([*model.named_parameters(), *quantised.stored(model)], key=lambda item: item[0]):
        if "lora_" not in name and "trainable_tokens" not in name:
            digest.update(name.replace(".base_layer", "").encode())
            digest.update(tensor.data.cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def resolve(source: str, revision: str | None, trust_remote_code: bool) -> str:
    """What transformers is given to load. A run's manifest names it too, so that the name is checked here again."""
    if demo.is_demo(source):
        return str(demo.resolve_model(source))
    problems = (
        names.refused(source, "model", "MOD001"),
        names.refused_revision(revision, "model.revision"),
        names.unpinned_code(trust_remote_code, revision, "model.trust_remote_code"),
        model_files.with_adapter(Path(source), source),
    )
    if found := [problem for problem in problems if problem]:
        raise RlhfError(*found)
    if not names.exists(source) and (away := connection.model_problem(source, source, revision)):
        raise RlhfError(away)
    return source


def context_length(config: Any) -> int | None:
    """How many tokens a model was made for; None where its config sets no limit."""
    return getattr(config.get_text_config(), "max_position_embeddings", None)


def cannot_load(source: str, what: str, error: Exception) -> RlhfError:
    """What is said of an exception that loading ended with."""
    if problem := of_the_machine(error):
        return RlhfError(problem)
    if "trust_remote_code" in str(error):
        fix = "another model, or model.trust_remote_code: true with model.revision at a commit whose code you have read"
        return RlhfError(Problem("SEC007", source, f"the {what} needs Python code of its own, which is refused.", fix))
    first = " ".join(secrets.mask(str(error)).split())[:160]
    fix = "download the model again" if Path(source).is_dir() else "name a model directory, or another hub id"
    return RlhfError(Problem("MOD001", source, f"the {what} cannot be loaded: {first}", fix))


@cache
def _say_no_pad(source: str) -> None:
    """Once a process: masks come from lengths, so that padding with the end token hides no end token."""
    log.warning("The tokenizer of %s has no pad token: rows are padded with the end token, which is masked.", source)


def refuse_not_finite(source: str, weights: Iterable[tuple[str, Tensor]]) -> None:
    """One broken weight makes every loss NaN, and attention can hide it for a while; quantising hides it for good."""
    bad = {
        name: int((~tensor.isfinite()).sum())
        for name, tensor in weights
        if tensor.is_floating_point() and not tensor.isfinite().all()
    }
    if bad:
        shown = ", ".join(f"{count} in {name}" for name, count in list(bad.items())[:3])
        what = f"{sum(bad.values())} weights are NaN or infinite: {shown}."
        raise RlhfError(Problem("MOD008", source, what, "download the model again"))


def refuse_unknown(source: str, model: Any, tokenizer: Any) -> None:
    """MOD003 for a tokenizer larger than the embeddings, MOD004 for logits that are scaled, MOD009 for a model that is
    not a backbone with an output head; needs no weights."""
    if not hasattr(model, model.base_model_prefix) or model.get_output_embeddings() is None:
        what = f"{type(model).__name__} ({model.config.model_type}) is not a backbone with an output head on it."
        raise RlhfError(Problem("MOD009", source, what, "a model of another architecture"))
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


def refuse_incomplete(source: str, missing: set[str], needed: str) -> None:
    """transformers fills a weight that the files lack with random numbers, and only warns."""
    if missing:
        what = f"lacks {len(missing)} weights: {', '.join(sorted(missing)[:3])}."
        raise RlhfError(Problem("MOD005", source, what, f"a whole download of {needed}"))


@torch.no_grad()
def _refuse_other_logits(source: str, model: Any) -> None:
    """The logprobs here are of head(backbone(ids)): whatever else a model does to its logits must show."""
    ids = torch.tensor([[1, 2, 1]], device=model.device)
    inner = getattr(model, model.base_model_prefix)
    hidden = inner(input_ids=ids, use_cache=False).last_hidden_state
    ours, own = model.get_output_embeddings()(hidden).float(), model(input_ids=ids, use_cache=False).logits.float()
    if not torch.allclose(ours, own, rtol=1e-2, atol=1e-2 * float(own.abs().max()), equal_nan=True):
        raise RlhfError(Problem("MOD004", source, "changes its logits behind the output head.", "another model"))
