"""``rlhf rank``: the best of n samples of a policy by a reward, and what the best of fewer would have been worth."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rlhf.commands.generate import refuse_other_kinds, sample, settle
from rlhf.commands.score import scored_rows
from rlhf.commands.scorers import check_names, open_scorer
from rlhf.config.sections import RuntimeSection
from rlhf.data import lines, sources
from rlhf.errors import Problem, RlhfError
from rlhf.metrics import best_of_n, intervals
from rlhf.preflight import examined
from rlhf.records import prompt_key
from rlhf.runs import runtime
from rlhf.runs.policy_sampling import Asked
from rlhf.runs.progress import show, table
from rlhf.scoring.scorer import Sample, Scores

log = logging.getLogger("rlhf")
NUM_RESAMPLES = 1000


@dataclass(frozen=True)
class Options:
    """How samples are ranked.

    Args:
        judge: another reward, which chooses nothing and measures what is chosen.
        samples: responses a prompt.
        top: responses of each prompt that are written; None: all.
        template: named template for a policy whose tokenizer has none.
    """

    judge: str | None
    samples: int
    top: int | None
    template: str | None
    asked: Asked
    micro_batch_size: int


def rank(policy: str, prompts: str, rewards: Sequence[str], options: Options, out: str) -> dict[str, Any]:
    """Write the responses to each prompt best first, and return what the best of 1, 2, 4 ... samples is worth.

    An empty response is not written. A prompt to which every response is empty is left out of both, and counted.
    """
    refuse_other_kinds(policy, options.template)
    how = settle(policy, options.asked)
    check_names([*rewards, *([options.judge] if options.judge else [])])
    records = lines.load(sources.load_prompts, prompts)
    responses = sample(policy, options.template, records, options.samples, how, prompts)
    ranked = _with_text(policy, responses, options.samples)
    device = runtime.set_up(RuntimeSection(), how.seed)
    found = open_scorer(rewards, device, options.micro_batch_size).score(ranked)
    judged = None
    if options.judge:
        judged = open_scorer([options.judge], device, options.micro_batch_size).score(ranked).mean.tolist()
    lines.write(out, _rows(ranked, found, judged, options.samples, options.top))
    return {
        "policy": policy,
        "accepted": examined.marks_of([policy]),
        "rewards": list(rewards),
        "judge": options.judge,
        "prompts": len(records),
        "samples": options.samples,
        "cut_off": sum(not response.finished for response in responses),
        "empty": sum(response.is_empty for response in responses),
        "prompts_without_text": len(records) - len(ranked) // options.samples,
        "best_of": worth(ranked, found, judged, options.samples, how.seed),
    }


def _with_text(policy: str, responses: Sequence[Sample], samples: int) -> list[Sample]:
    """The responses to every prompt that has one with text; what is left out, and what ranks behind, is said.

    Raises:
        RlhfError: DAT013 where no response to any prompt has text.
    """
    groups = [responses[start : start + samples] for start in range(0, len(responses), samples)]
    kept = [one for group in groups if not all(own.is_empty for own in group) for one in group]
    num_cut, num_empty = sum(not one.finished for one in responses), sum(one.is_empty for one in responses)
    if num_cut:
        log.warning("%d of %d responses were cut off; they rank behind those that ended.", num_cut, len(responses))
    if num_empty:
        log.warning("%d of %d responses have no text; they rank last and are not written.", num_empty, len(responses))
    if not kept:
        what = f"none of {len(responses)} responses has text."
        raise RlhfError(Problem("DAT013", policy, what, "a policy that writes something, or other prompts"))
    if num_left := (len(responses) - len(kept)) // samples:
        log.warning("%d of %d prompts are left out: no response to them has text.", num_left, len(groups))
    return kept


def worth(
    responses: Sequence[Sample], scores: Scores, judged: Sequence[float] | None, samples: int, seed: int
) -> list[dict[str, Any]]:
    """For n = 1, 2, 4 ... ``samples``: the bound on KL, and the reward (and the judge) of the best of n, each with
    a 95 % interval over prompts. An empty response counts with its own score where it is all that was drawn."""
    chosen_by = order_keys(responses, scores)
    values = {"reward": scores.mean.tolist(), **({"judge": judged} if judged else {})}
    groups = [slice(start, start + samples) for start in range(0, len(responses), samples)]
    prompts = [prompt_key(response.prompt) for response in responses[::samples]]
    found = []
    for n in best_of_n.sizes(samples):
        entry: dict[str, Any] = {"n": n, "kl_bound": best_of_n.kl_bound(n)}
        for name, own in values.items():
            means = [best_of_n.best_of_n(chosen_by[group], own[group], n) for group in groups]
            interval = intervals.grouped_bootstrap(means, prompts, NUM_RESAMPLES, seed=seed)
            entry[name] = {"estimate": interval.estimate, "ci95": [interval.low, interval.high]}
        found.append(entry)
    return found


def order_keys(responses: Sequence[Sample], scores: Scores) -> list[tuple[bool, bool, float]]:
    """What responses are ranked by: one that has no text is behind all others, and one that was cut off behind every
    one that ended, whatever their scores, which mean little."""
    return [
        (not response.is_empty, response.finished, score)
        for response, score in zip(responses, scores.mean.tolist(), strict=True)
    ]


def _rows(
    responses: Sequence[Sample], scores: Scores, judged: Sequence[float] | None, samples: int, top: int | None
) -> list[dict[str, Any]]:
    """One row a response with text, those of one prompt best first; equal ones share a rank."""
    keys, rows = order_keys(responses, scores), scored_rows(responses, scores)
    found = []
    for start in range(0, len(rows), samples):
        own = [row for row in range(start, start + samples) if not responses[row].is_empty]
        for index in sorted(own, key=lambda row: (keys[row], -row), reverse=True)[:top]:
            place = 1 + sum(keys[other] > keys[index] for other in own)
            measured = {"judge": judged[index]} if judged else {}
            found.append({**rows[index], **measured, "rank": place, "finished": responses[index].finished})
    return found


def print_report(found: Mapping[str, Any]) -> None:
    """What the best of n is worth, as a table on standard error."""
    names = ["reward", *(["judge"] if found["judge"] else [])]
    rows = []
    for entry in found["best_of"]:
        figures = [
            f"{entry[name]['estimate']:.3f} [{entry[name]['ci95'][0]:.3f}, {entry[name]['ci95'][1]:.3f}]"
            for name in names
        ]
        rows.append((f"best of {entry['n']}", f"{entry['kl_bound']:.2f}", *figures))
    num_prompts = found["prompts"] - found["prompts_without_text"]
    title, note = f"{found['policy']}, {num_prompts} prompts", "\n".join(found["accepted"])
    show(table(title, ("", "KL at most, nats", *names), rows, note))
