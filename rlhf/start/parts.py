"""Which prompt serves which stage: parts that share no prompt, by a hash of the prompt alone."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from rlhf.errors import Problem, RlhfError
from rlhf.records import Comparison, Demonstration, Message, Messages, Prompt, prompt_key
from rlhf.start.facts import Rows

# Labelled pairs teach the reward model, and it needs the most; PPO answers a prompt many times over.
SHARES = {"sft": 25, "reward": 45, "ppo": 20, "eval": 10}
LEAST = 4


@dataclass(frozen=True)
class Parts:
    """The rows of each stage, and how many rows of a prompt that serves another stage were left out.

    Args:
        demonstrated: whether the files hold demonstrations; else ``sft`` has the best answers of comparisons.
    """

    sft: tuple[Demonstration, ...]
    reward: tuple[Comparison, ...]
    ppo: tuple[Prompt, ...]
    eval: tuple[Comparison, ...]
    left_out: int
    demonstrated: bool = False

    def counts(self) -> dict[str, tuple[int, int]]:
        """Part -> rows and distinct prompts."""
        found: dict[str, Sequence[Any]] = {name: getattr(self, name) for name in SHARES}
        return {name: (len(rows), len({prompt_key(row.prompt) for row in rows})) for name, rows in found.items()}


def split(rows: Rows) -> Parts:
    """Every prompt in one part, the same one whatever else is in the files.

    A prompt with preferences goes to any part for which there are no rows of its own kind in the files; without
    preferences there is no part but ``sft``. Where ``sft`` gets preferences, the best answer is the demonstration.

    Raises:
        RlhfError: DAT031 where a part would have fewer than four prompts.
    """
    kinds = {
        name: {prompt_key(row.prompt) for row in getattr(rows, name)}
        for name in ("demonstrations", "comparisons", "prompts")
    }
    if not rows.comparisons:
        found = Parts(rows.demonstrations, (), (), (), len(rows.prompts))
    else:
        part_of = {key: _part(key, kinds) for key in set().union(*kinds.values())}
        found = _gather(rows, part_of, kinds["demonstrations"])
    require(found, bool(rows.comparisons))
    return replace(found, demonstrated=bool(rows.demonstrations))


def place(key: str) -> float:
    """Where a prompt stands between 0 and 1, uniformly."""
    return int.from_bytes(hashlib.sha256(f"part/{key}".encode()).digest()[:8], "big") / 2**64


def best_answer(record: Comparison) -> str:
    """The response that no judgement puts behind another one; the first of several."""
    beaten = {judgement.second for judgement in record.judgements if judgement.probability != 0.5}
    return next(text for index, text in enumerate(record.responses) if index not in beaten)


def ranks(record: Comparison) -> list[int]:
    """1 for the best: one more than the number of responses that are preferred to it."""
    beaten = [judgement.second for judgement in record.judgements if judgement.probability != 0.5]
    return [1 + beaten.count(index) for index in range(len(record.responses))]


def as_json(record: Demonstration | Comparison | Prompt) -> dict[str, Any]:
    """A record as a row of the forms that ``rlhf`` reads."""
    if isinstance(record, Prompt):
        return {"prompt": _prompt(record.messages)}
    if isinstance(record, Demonstration):
        if len(record.messages) == 2:
            return {"prompt": record.messages[0].content, "completion": record.messages[1].content}
        return {"messages": _turns(record.messages)}
    if len(record.responses) > 2 or record.judgements[0].probability == 0.5:
        return {"prompt": _prompt(record.prompt), "responses": list(record.responses), "ranks": ranks(record)}
    judgement = record.judgements[0]
    chosen, rejected = record.responses[judgement.first], record.responses[judgement.second]
    margin = {} if judgement.margin is None else {"margin": judgement.margin}
    share = {} if judgement.probability == 1.0 else {"probability": judgement.probability}
    return {"prompt": _prompt(record.prompt), "chosen": chosen, "rejected": rejected, **margin, **share}


def require(found: Parts, with_preferences: bool) -> None:
    """Raise DAT031 where a part has fewer than four prompts."""
    counts = {name: prompts for name, (_, prompts) in found.counts().items()}
    needed = list(SHARES) if with_preferences else ["sft"]
    if few := [name for name in needed if counts[name] < LEAST]:
        shown = ", ".join(f"{name} {counts[name]}" for name in needed)
        what = f"too few prompts: the parts have {shown}, and {', '.join(few)} needs {LEAST}."
        raise RlhfError(Problem("DAT031", "--data", what, "more rows; 60 distinct prompts are enough as a rule"))


def _part(key: str, kinds: dict[str, set[str]]) -> str:
    compared, shown, asked = (key in kinds[name] for name in ("comparisons", "demonstrations", "prompts"))
    open_to = {
        "sft": shown or (compared and not kinds["demonstrations"]),
        "reward": compared,
        "ppo": asked or (compared and not kinds["prompts"]),
        "eval": compared,
    }
    shares = {name: share for name, share in SHARES.items() if open_to[name]}
    point, total = place(key) * sum(shares.values()), 0.0
    for name, share in shares.items():
        total += share
        if point < total:
            return name
    return next(reversed(shares))


def _gather(rows: Rows, part_of: dict[str, str], shown: set[str]) -> Parts:
    sft: list[Demonstration] = [row for row in rows.demonstrations if part_of[prompt_key(row.prompt)] == "sft"]
    compared: dict[str, list[Comparison]] = {"reward": [], "eval": []}
    ppo = {prompt_key(row.messages): row for row in rows.prompts if part_of[prompt_key(row.messages)] == "ppo"}
    used = len(sft) + len(ppo)
    for row in rows.comparisons:
        key = prompt_key(row.prompt)
        part = part_of[key]
        used += part != "sft" or key not in shown
        if part in compared:
            compared[part].append(row)
        elif part == "ppo":
            ppo.setdefault(key, Prompt(row.prompt, row.where))
        elif key not in shown:
            sft.append(Demonstration((*row.prompt, Message("assistant", best_answer(row))), row.where))
    num_rows = len(rows.demonstrations) + len(rows.comparisons) + len(rows.prompts)
    return Parts(tuple(sft), tuple(compared["reward"]), tuple(ppo.values()), tuple(compared["eval"]), num_rows - used)


def _prompt(messages: Messages) -> Any:
    return messages[0].content if len(messages) == 1 else _turns(messages)


def _turns(messages: Messages) -> list[dict[str, str]]:
    return [{"role": message.role, "content": message.content} for message in messages]
