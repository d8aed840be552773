"""Looking at a model: its size, context, template and tokens, without loading its weights."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from rlhf.data.chat_format import TEMPLATES, ChatFormat
from rlhf.demo import catalogue as demo
from rlhf.errors import Problem, RlhfError
from rlhf.models import embeddings, ends
from rlhf.models.base import load_context_length, load_tokenizer, refuse_unknown
from rlhf.records import Message
from rlhf.start.facts import ModelFacts


def model(path: str) -> tuple[ModelFacts, ChatFormat]:
    """Tokenizer, config and, where they are here, embeddings; no other weight is read.

    Raises:
        RlhfError: MOD001 where nothing can be loaded, MOD003, MOD004, MOD009 to MOD015 for what no stage would take.
    """
    tokenizer = load_tokenizer(path)
    context = load_context_length(path)
    directory = demo.resolve_model(path) if demo.is_demo(path) else Path(path)
    config = AutoConfig.from_pretrained(str(directory))
    with torch.device("meta"):
        shape = AutoModelForCausalLM.from_config(config)
    refuse_unknown(path, shape, tokenizer)
    template = None if tokenizer.chat_template else fitting_template(tokenizer)
    chat = ChatFormat(tokenizer, template, context)
    marks = tuple(chat.marks)
    weight = _embeddings(directory, shape)
    facts = ModelFacts(
        path=path,
        num_parameters=sum(parameter.numel() for parameter in shape.parameters()),
        context_length=context,
        template=template,
        end_token=chat.end_token,
        pad_token=tokenizer.pad_token,
        ends=_ends(directory, tokenizer),
        marks=marks,
        untrained=None if weight is None else _untrained(weight, tokenizer, marks),
        is_initialised=weight is not None and embeddings.looks_initialised(weight),
        bos=_beginning(chat),
    )
    return facts, chat


def fitting_template(tokenizer: Any) -> str:
    """The named template whose tokens the tokenizer has.

    Raises:
        RlhfError: MOD010 where it has neither ChatML's marks nor an end token.
    """
    if {"<|im_start|>", "<|im_end|>"} <= tokenizer.get_vocab().keys():
        return "chatml"
    if tokenizer.eos_token is not None:
        return "plain"
    what = f"has no chat template, and no end token that {' or '.join(TEMPLATES)} could write."
    raise RlhfError(Problem("MOD010", "tokenizer", what, "set its eos_token, or give it a chat template"))


def _ends(directory: Path, tokenizer: Any) -> tuple[str, ...]:
    """Tokens that the model's own settings end a text with."""
    first = [] if tokenizer.eos_token is None else [str(tokenizer.eos_token)]
    return tuple(dict.fromkeys([*first, *ends.of_model(str(directory), tokenizer)]))


def _embeddings(directory: Path, shape: Any) -> Tensor | None:
    """[V, H]; None where the weights are not here, or stand under another name."""
    if not directory.is_dir():
        return None
    names = {id(parameter): name for name, parameter in shape.named_parameters()}
    return embeddings.stored_embeddings(directory, names[id(shape.get_input_embeddings().weight)])


def _untrained(weight: Tensor, tokenizer: Any, marks: Sequence[str]) -> tuple[str, ...]:
    by_id = {tokenizer.convert_tokens_to_ids(mark): mark for mark in marks}
    return tuple(by_id[index] for index in sorted(embeddings.untrained(weight, list(by_id))))


def _beginning(chat: ChatFormat) -> str:
    """What stands at the beginning of a conversation. Two beginnings are refused by the chat format."""
    tokenizer = chat.tokenizer
    begin = tokenizer.bos_token_id
    if begin is None:
        return "none: the tokenizer has none"
    if chat.prompt_ids((Message("user", "hello there"),))[0] == begin:
        return f"one {tokenizer.bos_token!r}, written by the template"
    if tokenizer.encode("hello")[:1] == [begin]:
        return f"none: the template writes no {tokenizer.bos_token!r}, though the tokenizer puts one before plain text"
    return "none: neither template nor tokenizer writes one"
