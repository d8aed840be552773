"""How well a reward model agrees with each annotator on prompts that were not trained on, also those held out."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy

from rlhf.data import fitting, tokenised
from rlhf.data.consensus import Annotated
from rlhf.data.dropped import DroppedRows
from rlhf.data.fitting import Limit
from rlhf.evaluation import reward as examine
from rlhf.metrics import intervals
from rlhf.records import Comparison, prompt_key
from rlhf.reward.quality import RewardRoles
from rlhf.runs import artifacts, storage
from rlhf.runs.progress import show, table
from rlhf.runs.run_directory import Run

log = logging.getLogger("rlhf")


@dataclass(frozen=True)
class Unseen:
    """How annotators' judgements that were not trained on are read, and the seed of their intervals."""

    chat: Any
    limit: Limit
    drops_bad_rows: bool
    seed: int


def write(
    rewards: RewardRoles, annotated: Annotated, trained: Sequence[Comparison], unseen_rows: Unseen, run: Run
) -> dict[str, float]:
    """annotators.json and a table of it; the figures for the manifest.

    The accuracy of an annotator is on all of his judgements with a preference whose prompts are none of ``trained``.
    """
    known = {prompt_key(record.prompt) for record in trained}
    unseen = [record for record in annotated.everyone if prompt_key(record.prompt) not in known]
    accuracies = _accuracies(rewards, unseen, unseen_rows, annotated.report) if unseen else {}
    rows = {name: {**row, "accuracy": accuracies.get(name)} for name, row in annotated.report["annotators"].items()}
    of_held_out = accuracies.get(None)
    report = {**annotated.report, "annotators": rows, "accuracy_on_held_out_annotators": of_held_out}
    storage.write_json(run.path / artifacts.ANNOTATORS, report)
    show(table("Annotators", COLUMNS, [_row(name, row) for name, row in rows.items()]))
    figures = {} if report["alpha"] is None else {"eval/annotators_alpha": report["alpha"]}
    if of_held_out:
        low, high = of_held_out["ci95"]
        log.info(
            "On annotators held out: accuracy %.3f [%.3f, %.3f] on %d comparisons.",
            of_held_out["estimate"],
            low,
            high,
            of_held_out["comparisons"],
        )
        figures |= {
            "eval/accuracy_held_out_annotators": of_held_out["estimate"],
            "eval/accuracy_held_out_annotators_low": low,
            "eval/accuracy_held_out_annotators_high": high,
        }
    elif any(row["held_out"] for row in rows.values()):
        log.warning("The annotators held out judged no prompt that is not trained on: no accuracy on them.")
    return figures


COLUMNS = ("annotator", "votes", "agreement", "with the others", "reliability", "accuracy on them, unseen prompts")


def _accuracies(
    rewards: RewardRoles, records: Sequence[Comparison], how: Unseen, report: dict[str, Any]
) -> dict[str | None, dict[str, Any]]:
    """Of every annotator who preferred something there, and under None of those held out together."""
    dropped = DroppedRows("annotators", 1.0, how.drops_bad_rows, sum(one.num_rows for one in records))
    plain = fitting.without_special(records, how.chat, dropped)
    groups, _ = tokenised.groups(plain, how.chat, how.limit, dropped)
    if dropped.total:
        log.info("Annotators' accuracy: %s.", dropped.sentence())
    pairs = examine.compare(rewards.scorer(), groups)
    right, held_out = examine.right(pairs), [name for name, row in report["annotators"].items() if row["held_out"]]
    found: dict[str | None, dict[str, Any]] = {}
    for name, whose in [*((name, {name}) for name in report["annotators"]), (None, set(held_out))]:
        own = numpy.array([annotator in whose for annotator in pairs.annotators], dtype=bool)
        if own.any():
            keys = [key for key, is_own in zip(pairs.groups, own, strict=True) if is_own]
            one = intervals.grouped_bootstrap(right[own], keys, seed=how.seed)
            found[name] = {"estimate": one.estimate, "ci95": [one.low, one.high], "comparisons": int(own.sum())}
    return found


def _row(name: str, row: dict[str, Any]) -> tuple[str, ...]:
    """What is not known is '-'."""
    found, reliable = row["accuracy"], row["reliability"]
    accuracy = f"{found['estimate']:.3f} [{found['ci95'][0]:.3f}, {found['ci95'][1]:.3f}]" if found else "-"
    shares = [_share(row[key]) for key in ("agreement", "agreement_with_others")]
    right = _share(reliable["right"]) if reliable else "-"
    return (f"{name} (held out)" if row["held_out"] else name, str(row["votes"]), *shares, right, accuracy)


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
