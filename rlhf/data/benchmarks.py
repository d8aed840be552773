"""Rows of RewardBench 1 and 2 and of RM-Bench: comparisons of right with wrong responses, with subset and id."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from rlhf.data import rows
from rlhf.data.records import Comparison, Judgement, Messages
from rlhf.data.rows import Row, RowError, need, text_of

STYLES = 3


@dataclass(frozen=True)
class BenchmarkRow(Comparison):
    """A comparison whose first ``num_correct`` responses are right; ``subset`` is RM-Bench's domain."""

    num_correct: int = 1
    subset: str = ""
    id: str = ""


def rewardbench(row: Row, where: str) -> BenchmarkRow:
    """From ``prompt``, ``chosen``, ``rejected`` and ``subset``; conversations as well as texts."""
    head, best, worst = rows.parts_of_pair(row)
    return _made(row, head, (best,), (worst,), "subset", where)


def rewardbench2(row: Row, where: str) -> BenchmarkRow:
    """From ``prompt``, lists ``chosen`` and ``rejected``, and ``subset``; Ties are told by their ``id``."""
    right, wrong = _texts(row, "chosen"), _texts(row, "rejected")
    count = row.get("num_correct", len(right))
    if count != len(right):
        raise RowError(f"'num_correct': {count!r}, but 'chosen' has {len(right)} responses.")
    return _made(row, rows.prompt_of(need(row, "prompt")), right, wrong, "subset", where)


def rm_bench(row: Row, where: str) -> BenchmarkRow:
    """From ``prompt``, ``domain``, three texts (concise, detailed, markdown) in ``chosen`` and ``rejected`` each."""
    right, wrong = _texts(row, "chosen"), _texts(row, "rejected")
    if not len(right) == len(wrong) == STYLES:
        raise RowError(f"'chosen': need {STYLES} styles each, got {len(right)} and {len(wrong)} ('rejected').")
    return _made(row, rows.prompt_of(need(row, "prompt")), right, wrong, "domain", where)


def _texts(row: Row, field: str) -> tuple[str, ...]:
    found = need(row, field)
    if not isinstance(found, list) or not found:
        raise RowError(f"'{field}': need a list of texts.")
    return tuple(text_of(text, f"{field}[{index}]") for index, text in enumerate(found))


def _made(
    row: Row, head: Messages, right: Sequence[str], wrong: Sequence[str], subset: str, where: str
) -> BenchmarkRow:
    rows.check_turns(head, "prompt", ends_with="user")
    judgements = tuple(Judgement(i, len(right) + j) for i in range(len(right)) for j in range(len(wrong)))
    name, number = text_of(need(row, subset), subset), str(row.get("id", ""))
    return BenchmarkRow(head, (*right, *wrong), judgements, where, num_correct=len(right), subset=name, id=number)


READERS: dict[str, tuple[tuple[str, ...], Callable[[Row, str], BenchmarkRow]]] = {
    "rewardbench": (("prompt", "chosen", "rejected", "subset"), rewardbench),
    "rewardbench2": (("prompt", "chosen", "rejected", "subset"), rewardbench2),
    "rm-bench": (("prompt", "chosen", "rejected", "domain"), rm_bench),
}
