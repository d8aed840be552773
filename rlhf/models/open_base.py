"""Opening the base that a config or a finished run names, and making sure that it is the same one."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

import torch

from rlhf.config.sections import ModelSection
from rlhf.data.chat_format import ChatFormat
from rlhf.data.rendering import Rendering
from rlhf.errors import Problem, RlhfError
from rlhf.models.base import Base, Loading, load_base, load_context_length, load_tokenizer, resolve, with_ends
from rlhf.preflight import origins
from rlhf.runs import artifacts, runtime
from rlhf.runs.artifacts import BaseIdentity, Manifest
from rlhf.runs.progress import waiting

log = logging.getLogger("rlhf")
CONSENT, model_of = origins.CONSENT, origins.model_of


def open_base(model: ModelSection, device: torch.device) -> Base:
    """The frozen base of a config."""
    runtime.require_dtype(model.dtype, device)
    with waiting(f"Loading the model {model.path}"):
        base = load_base(
            model.path,
            Loading(
                revision=model.revision,
                dtype=model.dtype,
                device=device,
                template=model.chat_template,
                trust_remote_code=model.trust_remote_code,
                attn_implementation=model.attn_implementation,
                quantize=model.quantize,
                rendering=rendering_of(model),
            ),
        )
    _say_date(base.chat, model)
    _say_thinking(base.chat, model)
    return base


def _say_thinking(chat: ChatFormat, model: ModelSection) -> None:
    """A setting that the template does not read makes no difference, which is easily missed."""
    if model.thinking != "strip" and chat.thinking_marks is None:
        log.info("The chat template of %s marks no thinking: model.thinking makes no difference.", model.path)
    elif model.thinking == "off" and not chat.has_thinking_switch:
        log.warning(
            "The chat template of %s has no switch for thinking: what it thinks is left out of what is read.",
            model.path,
        )
    for name in chat.unread_kwargs:
        log.warning("The chat template of %s does not read %s of model.template_kwargs.", model.path, name)


def _say_date(chat: ChatFormat, model: ModelSection) -> None:
    """A date that nobody recorded is another one tomorrow, and one that is not printed does nothing."""
    if chat.date and not model.template_date:
        log.warning(
            "The chat template of %s prints the date, and none is recorded: it reads %s, and tomorrow's tokens will "
            "differ. model.template_date keeps it.",
            model.path,
            chat.date,
        )
    elif model.template_date and not chat.date:
        log.info("The chat template of %s prints no date: model.template_date makes no difference.", model.path)


def with_date(model: ModelSection, kept: str | None) -> ModelSection:
    """The section of a model that is opened for the first time in a chain, with the date that its template prints.

    Args:
        kept: the date that an earlier start of the same run, or the adapter that it goes on from, has kept.
    """
    if model.template_date:
        return model
    chat = open_chat(model.model_copy(update={"template_date": kept}))
    if chat.date is None:
        return model
    log.info(
        "The chat template of %s prints the date: every stage of this chain reads %s%s.",
        model.path,
        chat.date,
        ", as kept" if kept else "",
    )
    return model.model_copy(update={"template_date": chat.date})


def open_chat(model: ModelSection) -> ChatFormat:
    """The tokenizer and chat format, without weights."""
    tokenizer = load_tokenizer(model.path, revision=model.revision, trust_remote_code=model.trust_remote_code)
    context_length = load_context_length(model.path, model.revision, model.trust_remote_code)
    path = resolve(model.path, model.revision, model.trust_remote_code)
    rendering = with_ends(rendering_of(model), tokenizer, path, model.revision)
    return ChatFormat(tokenizer, model.chat_template, context_length, rendering)


def rendering_of(model: ModelSection) -> Rendering:
    """What a model section says of its conversations besides the template."""
    ends = None if model.end_tokens is None else tuple(model.end_tokens)
    return Rendering(ends, model.template_date, model.thinking, model.template_kwargs)


def identity_of(base: Base, model: ModelSection) -> BaseIdentity:
    """What a manifest says of the base."""
    return BaseIdentity(
        source=model.path,
        digest=base.digest,
        dtype=model.dtype,
        revision=model.revision,
        chat_template=model.chat_template,
        attn_implementation=model.attn_implementation,
        trust_remote_code=model.trust_remote_code,
        quantize=model.quantize,
        end_tokens=list(base.chat.end_tokens[1:]),
        template_date=base.chat.date,
        thinking=model.thinking,
        template_kwargs=dict(model.template_kwargs),
    )


def identity_of_result(run_dir: Path, parent: Manifest) -> BaseIdentity:
    """The base of a run that starts from ``parent``: the same, or where every weight was trained its own model."""
    assert parent.base is not None
    if artifacts.adapter_of(run_dir) is not None:
        return parent.base
    directory = run_dir / artifacts.MODEL
    return replace(
        parent.base,
        source=str(directory),
        digest=artifacts.model_digest(directory),
        dtype="float32",
        revision=None,
        quantize=None,
    )


def reopen_base(manifest: Manifest, device: torch.device, whole: bool = False) -> Base:
    """The base of a finished run; ``whole``: unquantised, as its files have it, also where the run quantised it.

    Raises:
        RlhfError: MOD020 if the files under its name are no longer those that the run was made on.
    """
    model = model_of(manifest)
    return require_same(open_base(model.model_copy(update={"quantize": None}) if whole else model, device), manifest)


def require_same(base: Base, manifest: Manifest) -> Base:
    """The base, if it is what the run was made on; else MOD020."""
    assert manifest.base is not None
    if base.digest != manifest.base.digest:
        what = (
            f"is not the base of this run: digest {base.digest[:12]}, the run was made on {manifest.base.digest[:12]}."
        )
        raise RlhfError(Problem("MOD020", manifest.base.source, what, "restore the model, or make the run again"))
    return base


def require_context(chat: ChatFormat, prompt_tokens: int, new_tokens: int, where: str) -> None:
    """Raise MOD022 where prompt and response together are longer than what the base was made for."""
    context = chat.context_length
    if context and prompt_tokens + new_tokens > context:
        what = f"prompt {prompt_tokens} + response {new_tokens} tokens exceed the base's context of {context}."
        raise RlhfError(Problem("MOD022", where, what, "shorter prompts or responses"))
