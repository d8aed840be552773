"""Rows as the model will see them: the text of their tokens, and what of it carries loss or is read by a head."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import groupby
from typing import Any

from rlhf.commands.reader import Reading
from rlhf.commands.text_view import Row, standing
from rlhf.data.chat_format import ChatFormat
from rlhf.errors import RlhfError
from rlhf.findings import Findings
from rlhf.models import open_base
from rlhf.models.sequence_classifier import Reader, open_reader
from rlhf.preflight.needs import Rows
from rlhf.preflight.prepare import Checked
from rlhf.records import Demonstration, Prompt


def rows(checked: Checked, count: int, reading: Reading) -> dict[str, list[Row]]:
    """The first rows of each data set: {"where", "about", "parts": [[text, is marked]]}.

    Marked are the tokens that carry loss (demonstrations) and the end token, where the head reads (comparisons).

    Args:
        reading: whose tokenizer and template are read with.

    Raises:
        RlhfError: what the chat format refuses, by row.
    """
    if reading.classifier:
        chat: ChatFormat | Reader = open_reader(reading.classifier)
    else:
        assert reading.model, "there is one or the other"
        chat = open_base.open_chat(reading.model)
    findings = Findings()
    found: dict[str, list[Row]] = {}
    read = {item.key: item.rows for item in checked.needs.inputs}
    for key, loaded in checked.plan.data.items():
        found[key] = []
        for record in loaded.records[:count]:
            try:
                found[key] += _shown(record, chat, read[key])
            except RlhfError as error:
                if checked.plan.data[key].dropped.drops_bad_rows and all(p.code == "DAT060" for p in error.problems):
                    said = f"{error.problems[0].what[:-1]}: the row is dropped"
                    found[key].append({"where": record.where, "about": said, "parts": []})
                else:
                    findings.extend(
                        replace(problem, where=f"{record.where} ({problem.where})") for problem in error.problems
                    )
    findings.refuse()
    return found


def _shown(record: Any, chat: ChatFormat | Reader, read: Rows) -> Iterator[Row]:
    limit, cut = read.max_tokens, read.truncates
    if isinstance(chat, Reader):
        for index, response in enumerate(record.responses):
            ids = chat.read(record.prompt, response, True).ids
            about = f"response {index + 1}{standing(record, index)}, read as {chat.form}"
            yield _row(record.where, chat, ids, [False] * len(ids), about, chat.context_length, False)
        return
    if isinstance(record, Demonstration):
        ids, marked = chat.demonstration(record.messages, read.last_turn_only)
        yield _row(record.where, chat, ids, marked, f"{sum(marked)} carry loss", limit, cut)
    elif isinstance(record, Prompt):
        ids = chat.prompt_ids(record.messages)
        yield _row(record.where, chat, ids, [False] * len(ids), "the response follows", limit, False)
    else:
        for index, response in enumerate(record.responses):
            ids = [*chat.prompt_ids(record.prompt), *chat.response_ids(record.prompt, response), chat.end_id]
            marked = [False] * (len(ids) - 1) + [True]
            about = f"response {index + 1}{standing(record, index)}, the head reads the last"
            yield _row(record.where, chat, ids, marked, about, limit, cut)


def _row(
    where: str,
    chat: ChatFormat | Reader,
    ids: Sequence[int],
    marked: Sequence[bool],
    about: str,
    limit: int | None,
    cut: bool,
) -> Row:
    said = f"{len(ids)} tokens, {about}"
    if limit and len(ids) > limit:
        said += f"; longer than {limit}: {'cut to that' if cut else 'dropped'}"
        ids, marked = (ids[:limit], marked[:limit]) if cut else (ids, marked)
    return {"where": where, "about": said, "parts": parts(chat.tokenizer, ids, marked)}


def parts(tokenizer: Any, ids: Sequence[int], marked: Sequence[bool]) -> list[list[Any]]:
    """Runs of equally marked tokens as [text, is marked]; joined, the texts are what the whole sequence decodes to."""
    found: list[list[Any]] = []
    end, before = 0, ""
    for is_marked, run in groupby(marked):
        end += len(list(run))
        text = str(tokenizer.decode(ids[:end], skip_special_tokens=False, clean_up_tokenization_spaces=False))
        found.append([text.removeprefix(before), is_marked])
        before = text
    return found
