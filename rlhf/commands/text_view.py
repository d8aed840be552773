"""Rows for ``check --show`` where no tokenizer can be had: their text by turns, without tokens."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from rlhf.preflight.prepare import Checked
from rlhf.records import Comparison, Demonstration, Messages, Prompt

Row = dict[str, Any]


def rows(checked: Checked, count: int) -> dict[str, list[Row]]:
    """The first rows of each data set, as ``showing.rows`` gives them; marked are the turns that carry loss."""
    return {
        item.key: [
            row
            for record in checked.plan.data[item.key].records[:count]
            for row in _shown(record, item.rows.last_turn_only)
        ]
        for item in checked.needs.inputs
        if item.key in checked.plan.data
    }


def standing(record: Comparison, index: int) -> str:
    """Which other responses this one is preferred to."""
    worse = [str(one.second + 1) for one in record.judgements if one.first == index and one.probability > 0.5]
    return f" (preferred to {', '.join(worse)})" if worse else ""


def _shown(record: Any, last_only: bool) -> Iterator[Row]:
    if isinstance(record, Demonstration):
        last = len(record.messages) - 1
        marked = [
            one.role == "assistant" and (index == last or not last_only) for index, one in enumerate(record.messages)
        ]
        parts = [[text, loss] for text, loss in zip(_turns(record.messages), marked, strict=True)]
        yield {"where": record.where, "about": f"text; {sum(marked)} turns carry loss", "parts": parts}
    elif isinstance(record, Prompt):
        parts = [[text, False] for text in _turns(record.messages)]
        yield {"where": record.where, "about": "text; the response follows", "parts": parts}
    else:
        for index, response in enumerate(record.responses):
            parts = [[text, False] for text in [*_turns(record.prompt), f"assistant: {response}"]]
            about = f"text; response {index + 1}{standing(record, index)}"
            yield {"where": record.where, "about": about, "parts": parts}


def _turns(messages: Messages) -> list[str]:
    """A line for each turn, the last one without its line break."""
    return [f"{one.role}: {one.content}\n" for one in messages]
