"""A sequence classifier from elsewhere, read as a reward model: its own tokenizer, its own template, its own head."""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoModelForSequenceClassification

from rlhf.config import thinking as thoughts
from rlhf.config.rewards import ClassifierSection
from rlhf.data.chat_format import ChatFormat
from rlhf.data.rendering import Rendering
from rlhf.errors import Problem, RlhfError
from rlhf.hub import model_files
from rlhf.models import base as bases
from rlhf.records import Message, Messages, plain_text
from rlhf.runs import storage

log = logging.getLogger("rlhf")
PROOF = "rlhf_export.json"


@dataclass(frozen=True)
class Reading:
    """A conversation as the classifier reads it.

    Args:
        ids, types: token ids and, from tokenizers that tell a pair's two texts apart, token types.
        prompt_tokens: how many of the ids belong to the prompt, from the first one that may be left out.
    """

    ids: list[int]
    types: list[int] | None
    prompt_tokens: tuple[int, int]


class Reader:
    """How a classifier's tokenizer writes conversations.

    A model that ``rlhf export`` wrote reads what its run read: prompt, response and end token. Any other one with a
    chat template reads what the template makes of the whole conversation, the form that such models are published
    with. Without a template, prompt and response are a pair of texts, where the tokenizer marks pairs.

    Raises:
        RlhfError: MOD010 where none of these is there.
    """

    def __init__(self, tokenizer: Any, section: ClassifierSection, exported: bool, context_length: int | None) -> None:
        self.tokenizer, self.context_length = tokenizer, section.max_length or context_length
        self.rendering = Rendering(thinking=section.thinking, kwargs=section.template_kwargs)
        self.chat: ChatFormat | None = None
        if exported or section.chat_template:
            self.chat = ChatFormat(tokenizer, section.chat_template, self.context_length, self.rendering)
        self.form = "prompt, response and end token" if self.chat else "its chat template"
        if self.chat is None and not tokenizer.chat_template:
            self.form = "a pair of texts"
            if not tokenizer.num_special_tokens_to_add(pair=True):
                what = "its tokenizer has no chat template, and marks no pairs."
                fix = "name the template that it was trained with: chat_template: chatml or plain"
                raise RlhfError(Problem("MOD010", section.path, what, fix))
        self._special = [token for token in tokenizer.all_special_tokens if token.strip()]
        self.num_cleaned = 0

    # What measures lengths asks of a chat format; a score is never read from these.
    @property
    def end_id(self) -> int:
        return int(next(i for i in (self.tokenizer.sep_token_id, self.tokenizer.eos_token_id, 0) if i is not None))

    def prompt_ids(self, messages: Messages) -> list[int]:
        """Ids of the prompt's text."""
        return list(self.tokenizer.encode(plain_text(messages), add_special_tokens=False))

    def response_ids(self, messages: Messages, text: str) -> list[int]:
        """Ids of the response's text."""
        return list(self.tokenizer.encode(text, add_special_tokens=False))

    def read(self, messages: Messages, response: str, finished: bool) -> Reading:
        """The ids of one conversation. Special tokens that its texts happen to write are left out and counted."""
        messages = tuple(Message(message.role, self._clean(message.content)) for message in messages)
        if self.rendering.thinking != "keep":
            response = thoughts.split(response)[1] if response.startswith(thoughts.OPEN) else response
        response = self._clean(response, is_answer=True)
        if self.chat:
            prompt = self.chat.prompt_ids(messages)
            answer = self.chat.response_ids(messages, response)
            return Reading([*prompt, *answer, *([self.chat.end_id] if finished else [])], None, (0, len(prompt)))
        if self.tokenizer.chat_template:
            turns = [{"role": m.role, "content": m.content} for m in (*messages, Message("assistant", response))]
            given = self.rendering.given_to(str(self.tokenizer.get_chat_template()))
            ids = list(self.tokenizer.apply_chat_template(turns, tokenize=True, return_dict=False, **given))
            head = self.tokenizer.apply_chat_template(turns[:-1], tokenize=True, return_dict=False, **given)
            return Reading(ids, None, (0, min(len(head), len(ids) - 1)))
        first = plain_text(messages)
        found = self.tokenizer(first, response)
        ids, types = list(found["input_ids"]), found.get("token_type_ids")
        owners = found.sequence_ids(0)
        start = owners.index(0) if 0 in owners else 0
        return Reading(ids, list(types) if types is not None else None, (start, start + owners.count(0)))

    def _clean(self, text: str, is_answer: bool = False) -> str:
        cleaned = self.chat.without_special(text, is_answer) if self.chat else text
        for token in self._special:
            cleaned = cleaned.replace(token, "")
        self.num_cleaned += cleaned != text
        return cleaned


@dataclass(frozen=True)
class Classifier:
    """The loaded model: ``column`` of its logits is the score, plus ``constant``."""

    model: Any
    reader: Reader
    column: int
    constant: float
    device: torch.device


def open_reader(section: ClassifierSection) -> Reader:
    """The reader alone, without weights. Raises as ``load``."""
    tokenizer = bases.load_tokenizer(section.path, section.revision, section.trust_remote_code)
    limit = bases.load_context_length(section.path, section.revision, section.trust_remote_code)
    return Reader(tokenizer, section, _proof(section.path).get("kind") == "reward", limit)


def _proof(path: str) -> dict[str, Any]:
    """What ``rlhf export`` says of a directory that it wrote; nothing of any other."""
    file = Path(path) / PROOF
    return dict(json.loads(file.read_text("utf-8"))) if storage.is_file(file) else {}


def load(section: ClassifierSection, device: torch.device) -> Classifier:
    """Load, freeze, put in eval mode.

    Raises:
        RlhfError: MOD001 where nothing can be loaded, MOD003 where the tokenizer is larger than the embeddings, MOD005
            where weights are missing (a head that is not there would be random), MOD006 for damaged files, MOD008 for
            weights that are not finite, MOD010 where nothing says how a conversation is written, MOD042 for a label
            that is not there; SEC004 to SEC007 as ``load_base``.
    """
    source = section.path
    tokenizer = bases.load_tokenizer(source, section.revision, section.trust_remote_code)
    path = bases.resolve(source, section.revision, section.trust_remote_code)
    if Path(path).is_dir():
        model_files.read(Path(path), source)
    try:
        model, report = AutoModelForSequenceClassification.from_pretrained(
            path,
            revision=section.revision,
            dtype=getattr(torch, section.dtype),
            use_safetensors=True,
            trust_remote_code=section.trust_remote_code,
            output_loading_info=True,
        )
    except (OSError, ValueError, RuntimeError, ImportError, SafetensorError) as error:
        raise bases.cannot_load(source, "sequence classifier", error) from None
    bases.refuse_incomplete(source, report["missing_keys"], "a sequence classifier with its trained head")
    bases.refuse_not_finite(source, model.named_parameters())
    rows = model.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > rows:
        what = f"the tokenizer has {len(tokenizer)} tokens, the embeddings {rows} rows."
        raise RlhfError(Problem("MOD003", source, what, "the tokenizer that belongs to this model"))
    proof = _proof(path)
    reader = Reader(tokenizer, section, proof.get("kind") == "reward", bases.context_length(model.config))
    model.requires_grad_(False)
    column = _column(section, model.config)
    constants = proof.get("constants", {})
    constant = float(constants.get(model.config.id2label[column], proof.get("constant", 0.0)))
    classifier = Classifier(model.eval().to(device), reader, column, constant, device)
    log.info("%s scores as a model of its own and reads %s.", source, reader.form)
    return classifier


def _column(section: ClassifierSection, config: Any) -> int:
    """Which logit is the score."""
    labels = {int(number): str(name) for number, name in config.id2label.items()}
    if section.label is None and config.num_labels == 1:
        return 0
    for number, name in labels.items():
        if section.label is not None and section.label in (number, name):
            return number
    known = ", ".join(f"{number} ({name})" for number, name in sorted(labels.items()))
    what = f"has {config.num_labels} labels, and {section.label!r} is none of them: {known}."
    if section.label is None:
        what = f"has {config.num_labels} labels: {known}."
    raise RlhfError(Problem("MOD042", section.path, what, "label: the one whose logit is the score"))
