"""``rlhf check --deep``: what is wrong between sound rows, in their tokens, and between the data sets of a chain."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

from rlhf.commands import reader
from rlhf.data import deep
from rlhf.data.chat_format import ChatFormat
from rlhf.data.deep import Finding
from rlhf.data.rows import EQUAL, SPECIAL_TOKEN, TOO_LONG
from rlhf.data.sources import Loaded
from rlhf.errors import RlhfError
from rlhf.models import open_base
from rlhf.preflight.prepare import Checked
from rlhf.records import Comparison, Demonstration

UNREAD = "token lengths and model weights (a --dry-run counts tokens)"


def add_findings(results: Sequence[dict[str, Any]], checked: Sequence[Checked | None]) -> None:
    """Add ``found`` to each data set of ``results``: {"level", "kind", "where", "what", "code"}."""
    for result, one in zip(results, checked, strict=True):
        if one is None:
            continue
        chat, note = _chat(one)
        result["not_checked"] += [note] if note else []
        for key, loaded in one.plan.data.items():
            found = deep.look(loaded.records, loaded.source)
            if chat:
                result["not_checked"] = [note.replace(UNREAD, "model weights") for note in result["not_checked"]]
                own = list(_in_tokens(one, key, chat))
                refused = {entry.where for entry in own if entry.kind == "special token"}
                own += _too_many(loaded)
                result["data"][key] |= {"dropped": loaded.num_dropped, "notes": loaded.notes()}
                found = [*own, *(e for e in found if e.kind != "special token" or e.where not in refused)]
            found += _leaks(one, key, checked)
            result["data"][key]["found"] = [asdict(entry) | {"level": entry.level} for entry in found]


def _chat(one: Checked) -> tuple[ChatFormat | None, str]:
    """The tokenizer that the stage reads with, where it can be had; else why not."""
    found = reader.of(one)
    if found.classifier:
        return None, "tokens: a model from elsewhere reads through its own template"
    if found.model is None:
        return None, f"tokens: {found.note}"
    return open_base.open_chat(found.model), ""


def _in_tokens(one: Checked, key: str, chat: ChatFormat) -> Iterator[Finding]:
    """Special tokens, rows that are too long, and responses that only differ behind the cut. Which of them the stage
    would drop is counted with the rows that were dropped when the data were read."""
    read = next(item.rows for item in one.needs.inputs if item.key == key)
    limit, cut = read.max_tokens, read.truncates
    dropped = one.plan.data[key].dropped
    for record in (*one.plan.data[key].records, *one.plan.data[key].left_out):
        special = [(message.role, chat.special_in(message.content)) for message in deep.texts_of(record)]
        if refused := next(((role, token) for role, token in special if token), None):
            what = f"a {refused[0]} turn contains the special token {refused[1]!r}."
            if dropped.drops_bad_rows:
                dropped.add(SPECIAL_TOKEN, record.where, record.num_rows)
                yield Finding("special token", record.where, f"{what[:-1]}: the row is dropped.")
            else:
                yield Finding("special token", record.where, what, "DAT060")
            continue
        try:
            rows = _ids(record, chat, read.last_turn_only)
        except RlhfError as error:
            yield Finding("template", record.where, error.problems[0].what)
            continue
        longest = max(map(len, rows))
        if limit and longest > limit:
            how = "the end is cut" if cut else "the row is dropped"
            yield Finding("too long", record.where, f"{longest} tokens, more than {limit}: {how}.")
            if not cut:
                dropped.add(TOO_LONG, record.where, record.num_rows)
                continue
        if isinstance(record, Comparison) and (what := _alike(record, [row[:limit] if cut else row for row in rows])):
            if dropped.drops_bad_rows:
                dropped.add(EQUAL, record.where, record.num_rows)
                yield Finding("alike", record.where, f"{what}: the row is dropped.")
            else:
                yield Finding("alike", record.where, f"{what}.", "DAT071")


def _ids(record: Any, chat: ChatFormat, last_only: bool) -> list[list[int]]:
    if isinstance(record, Demonstration):
        return [chat.demonstration(record.messages, last_only)[0]]
    prompt = chat.prompt_ids(record.prompt)
    if not isinstance(record, Comparison):
        return [prompt]
    return [[*prompt, *chat.response_ids(record.prompt, response), chat.end_id] for response in record.responses]


def _alike(record: Comparison, rows: Sequence[Sequence[int]]) -> str:
    """What is wrong where two differently ranked responses are the same tokens; nothing else."""
    for judgement in record.judgements:
        if judgement.probability != 0.5 and list(rows[judgement.first]) == list(rows[judgement.second]):
            what = f"responses {judgement.first + 1} and {judgement.second + 1} are ranked differently, "
            return f"{what}and the same tokens as they are trained on"
    return ""


def _too_many(loaded: Loaded) -> list[Finding]:
    """More dropped rows than the stage would take."""
    return [Finding("dropped", problem.where, problem.what, "DAT020") for problem in loaded.dropped.problems()]


def _leaks(one: Checked, key: str, checked: Sequence[Checked | None]) -> Iterator[Finding]:
    """Prompts that measure and are trained on, by any stage that is checked here."""
    held_out_from = next(item.held_out_from for item in one.needs.inputs if item.key == key)
    if held_out_from is None:
        return
    sets: dict[tuple[str, str], dict[str, Sequence[Any]]] = {}
    for other in filter(None, checked):
        for item in other.needs.inputs:
            if item.is_trained_on and item.key in other.plan.data:
                name, records = f"{other.stage} {item.key}", other.plan.data[item.key].records
                sets.setdefault((other.stage, item.key), {})[name] = records
    for trained, records_of in sets.items():
        code: deep.Code = "DAT072" if trained == held_out_from else ""
        yield from deep.leaks(records_of, one.plan.data[key].records, "measures", code)
