"""Looking at a model and at files: what they are, and how long their rows are in the model's tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

from rlhf.config.sections import DataSection
from rlhf.data import rankings, sources, tokenised
from rlhf.data import rows as forms
from rlhf.data.chat import TEMPLATES, ChatFormat
from rlhf.data.records import Comparison, Message
from rlhf.data.rows import RowError
from rlhf.demo import registry as demo
from rlhf.errors import Problem, RlhfError
from rlhf.models import embeddings
from rlhf.models.base import load_context_length, load_tokenizer, refuse_unknown
from rlhf.start.facts import FORMS, Lengths, ModelFacts, Rows
from rlhf.start.parts import Parts

Found = TypeVar("Found")
READERS = {
    "demonstrations": sources.load_demonstrations, "preferences": sources.load_comparisons,
    "rankings": sources.load_comparisons, "prompts": sources.load_prompts,
}  # fmt: skip
ANSWERS = ("completion", "response", "output", "conversations")


def model(path: str) -> tuple[ModelFacts, ChatFormat]:
    """Tokenizer, config and, where they are here, embeddings; no other weight is read.

    Raises:
        RlhfError: MOD001 where nothing can be loaded, MOD003, MOD004, MOD010 to MOD015 for what no stage would take.
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
        path=path, num_parameters=sum(parameter.numel() for parameter in shape.parameters()), context_length=context,
        template=template, end_token=chat.end_token, pad_token=tokenizer.pad_token, ends=_ends(directory, tokenizer),
        marks=marks, untrained=None if weight is None else _untrained(weight, tokenizer, marks),
        is_initialised=weight is not None and embeddings.looks_initialised(weight), bos=_beginning(chat),
    )  # fmt: skip
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


def files(paths: Sequence[str]) -> Rows:
    """All rows of all files, by what the first row of each file is.

    Raises:
        RlhfError: what is wrong with any row of any file; DAT003 for a form that is not known.
    """
    found: dict[str, list[Any]] = {"demonstrations": [], "comparisons": [], "prompts": []}
    counts: list[str] = []
    problems: list[Problem] = []
    for path in paths:
        try:
            data = DataSection(path=path, max_dropped_fraction=1.0)
            form = form_of(next(sources.raw_rows(data), (path, {}))[1], path)
            records, notes = _read(data, form)
        except RlhfError as error:
            problems += error.problems
            continue
        found["comparisons" if form in FORMS[1:4] else form] += records
        counts.append("; ".join([f"{path}: {len(records)} {form}", *notes]))
    if problems:
        raise RlhfError(*problems)
    shown, compared, asked = (tuple(records) for records in found.values())
    return Rows(shown, compared, asked, tuple(counts))


def form_of(row: Mapping[str, Any], path: str) -> str:
    """What kind of record a row is, by its fields.

    Raises:
        RlhfError: DAT003.
    """
    if "chosen" in row and "rejected" in row:
        return "preferences"
    if "responses" in row and ("ranks" in row or _ratings(row)):
        return "rankings" if "ranks" in row else "ratings"
    if type(row.get("label")) is bool:
        return "preferences"
    turns = row.get("messages")
    last = turns[-1] if isinstance(turns, list) and turns else None
    if any(name in row for name in ANSWERS) or (isinstance(last, Mapping) and last.get("role") == "assistant"):
        return "demonstrations"
    if any(name in row for name in ("prompt", "messages", "instruction")):
        return "prompts"
    what = f"no known form of a row: it has {forms.names(sorted(row)) or 'no field'}."
    fix = "prompt with chosen and rejected, with responses and ranks or ratings, with completion, or alone; or messages"
    raise RlhfError(Problem("DAT003", path, what, fix))


def lengths(parts: Parts, chat: ChatFormat) -> tuple[Parts, dict[str, Lengths], bool, int]:
    """The rows that can be learnt from, their lengths by part, whether only last turns can carry loss, and how many
    comparisons were left out because their responses are the same tokens.

    Raises:
        RlhfError: what the chat format refuses, by row.
    """
    last_only = False
    try:
        shown = tokenised.each(parts.sft, lambda record: len(chat.demonstration(record.messages, False)[0]))
    except RlhfError as error:
        if any(problem.code != "MOD012" for problem in error.problems):
            raise
        last_only = True
        shown = tokenised.each(parts.sft, lambda record: len(chat.demonstration(record.messages, True)[0]))
    heads = tokenised.each(parts.sft, lambda record: len(chat.prompt_ids(record.prompt)))
    found = {"sft": Lengths(tuple(shown), tuple(heads), tuple(map(int.__sub__, shown, heads)))}
    reward, found["reward"] = _comparisons(parts.reward, chat)
    examined, found["eval"] = _comparisons(parts.eval, chat)
    asked = tuple(tokenised.each(parts.ppo, lambda record: len(chat.prompt_ids(record.messages))))
    found["ppo"] = Lengths(asked, asked, ())
    num_equal = len(parts.reward) - len(reward) + len(parts.eval) - len(examined)
    return replace(parts, reward=reward, eval=examined), found, last_only, num_equal


def _comparisons(records: Sequence[Comparison], chat: ChatFormat) -> tuple[tuple[Comparison, ...], Lengths]:
    measured = tokenised.each(records, lambda record: _comparison(record, chat))
    kept = [(record, row) for record, row in zip(records, measured, strict=True) if row]
    whole, prompt, response = (tuple(row[column] for _, row in kept) for column in range(3))
    return tuple(record for record, _ in kept), Lengths(whole, prompt, response)


def _comparison(record: Comparison, chat: ChatFormat) -> tuple[int, int, int] | None:
    """Whole, prompt and best response in tokens; None where differently ranked responses are the same tokens."""
    prompt = len(chat.prompt_ids(record.prompt))
    responses = [chat.response_ids(record.prompt, text) for text in record.responses]
    strict = [judgement for judgement in record.judgements if judgement.probability != 0.5]
    if any(responses[judgement.first] == responses[judgement.second] for judgement in strict):
        return None
    best = responses[strict[0].first] if strict else responses[0]
    return prompt + max(map(len, responses)) + 1, prompt, len(best) + 1


def _read(data: DataSection, form: str) -> tuple[list[Any], list[str]]:
    if form != "ratings":
        loaded = READERS[form](data)
        if named := [record.where for record in loaded.records if isinstance(record, Comparison) and record.names]:
            what = f"{len(named)} rows, the first {named[0]}, have labels of attributes, and init sets up no heads."
            fix = "init with overall labels, then heads: in train-rm.yaml"
            raise RlhfError(Problem("DAT056", loaded.source, what, fix))
        return list(loaded.records), loaded.notes()
    records: list[Any] = []
    problems: list[Problem] = []
    even = 0
    for where, row in sources.raw_rows(data):
        values = _ratings(row)
        if values and len(set(values)) == 1:
            even += 1
            continue
        try:
            records.append(rankings.ranking(_ranked(row, values), where))
        except RowError as error:
            problems.append(Problem("DAT004", where, str(error), "fix the row, or remove it"))
    if problems:
        raise RlhfError(*problems)
    return records, [f"{even} rows dropped: all ratings equal"] if even else []


def _ratings(row: Mapping[str, Any]) -> list[float] | None:
    values = row.get("ratings", row.get("scores"))
    numbers = isinstance(values, list) and all(type(value) in (int, float) and value == value for value in values)
    return values if numbers else None


def _ranked(row: Mapping[str, Any], values: list[float] | None) -> dict[str, Any]:
    if values is None:
        raise RowError("'ratings': need a list of numbers, one a response.")
    kept = {name: row[name] for name in ("prompt", "responses") if name in row}
    return kept | {"ranks": [1 + sum(other > value for other in values) for value in values]}


def _ends(directory: Path, tokenizer: Any) -> tuple[str, ...]:
    """Tokens that the model's own settings end a text with."""
    ids: list[int] = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    try:
        own = GenerationConfig.from_pretrained(str(directory)).eos_token_id
    except OSError:  # a model need not have one
        own = None
    ids += own if isinstance(own, list) else [] if own is None else [own]
    known = [index for index in ids if index < len(tokenizer)]  # a class's own default may lie beyond the vocabulary
    return tuple(dict.fromkeys(str(tokenizer.convert_ids_to_tokens(index)) for index in known))


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
