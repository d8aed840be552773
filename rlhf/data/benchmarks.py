"""Rows of RewardBench 1 and 2 and of RM-Bench: comparisons of right with wrong responses, with subset and id."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from rlhf.data import rankings, trl
from rlhf.data.rows import Row, RowError, need, text_of
from rlhf.data.turns import Answered, prompt_of
from rlhf.records import Comparison, Judgement

STYLES = 3


@dataclass(frozen=True)
class BenchmarkRow(Comparison):
    """A comparison whose first ``num_correct`` responses are right; ``subset`` is RM-Bench's domain."""

    num_correct: int = 1
    subset: str = ""
    id: str = ""


def rewardbench(row: Row, where: str) -> BenchmarkRow:
    """From ``prompt``, ``chosen``, ``rejected`` and ``subset``; conversations as well as texts."""
    return _made(row, trl.parts_of_pair(row), 1, "subset", where)


def rewardbench2(row: Row, where: str) -> BenchmarkRow:
    """From ``prompt``, lists ``chosen`` and ``rejected``, and ``subset``; Ties are told by their ``id``."""
    right, wrong = _texts(row, "chosen"), _texts(row, "rejected")
    count = row.get("num_correct", len(right))
    if count != len(right):
        raise RowError(f"'num_correct': {count!r}, but 'chosen' has {len(right)} responses.")
    return _made(row, _answered(row, right, wrong), len(right), "subset", where)


def rm_bench(row: Row, where: str) -> BenchmarkRow:
    """From ``prompt``, ``domain``, three texts (concise, detailed, markdown) in ``chosen`` and ``rejected`` each."""
    right, wrong = _texts(row, "chosen"), _texts(row, "rejected")
    if not len(right) == len(wrong) == STYLES:
        raise RowError(f"'chosen': need {STYLES} styles each, got {len(right)} and {len(wrong)} ('rejected').")
    return _made(row, _answered(row, right, wrong), len(right), "domain", where)


def _texts(row: Row, field: str) -> list[Any]:
    found = need(row, field)
    if not isinstance(found, list) or not found:
        raise RowError(f"'{field}': need a list of texts.")
    return found


def _answered(row: Row, right: Sequence[Any], wrong: Sequence[Any]) -> Answered:
    texts = {f"chosen[{index}]": text for index, text in enumerate(right)}
    texts |= {f"rejected[{index}]": text for index, text in enumerate(wrong)}
    return rankings.answered_by(texts, prompt_of(need(row, "prompt")))


def _made(row: Row, found: Answered, num_right: int, subset: str, where: str) -> BenchmarkRow:
    judgements = tuple(Judgement(i, j) for i in range(num_right) for j in range(num_right, len(found.answers)))
    name, number = text_of(need(row, subset), subset), str(row.get("id", ""))
    return BenchmarkRow(
        found.prompt,
        found.answers,
        judgements,
        where,
        joined=found.joined,
        num_correct=num_right,
        subset=name,
        id=number,
    )


READERS: dict[str, tuple[tuple[str, ...], Callable[[Row, str], BenchmarkRow]]] = {
    "rewardbench": (("prompt", "chosen", "rejected", "subset"), rewardbench),
    "rewardbench2": (("prompt", "chosen", "rejected", "subset"), rewardbench2),
    "rm-bench": (("prompt", "chosen", "rejected", "domain"), rm_bench),
}
