"""``rlhf score``: score given responses with a finished reward run, or with a sequence classifier from elsewhere."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from rlhf import artifacts, examined, runtime
from rlhf.config.rewards import ClassifierSection
from rlhf.config.sections import RuntimeSection
from rlhf.data import lines, sources, tokenised
from rlhf.data.records import Demonstration, prompt_key
from rlhf.errors import Problem, RlhfError
from rlhf.models import opening
from rlhf.models.base import NO_LIMIT
from rlhf.models.roles import SharedBase
from rlhf.reward.aggregate import disagreement
from rlhf.scoring.scorer import Sample, Scorer, Scores
from rlhf.scoring.sources import open_classifier, open_run
from rlhf.stages.generate import is_run


def score(source: str, data: str, out: str, micro_batch_size: int, label: str | None) -> None:
    """Read prompts with responses (JSONL, ``-`` for stdin), write them with their scores.

    Args:
        source: reward run (standardised scores), an examination of one (the same with its length calibration), or
            directory or hub id of a sequence classifier (its logits).
        label: of a classifier with several.
    """
    if is_run(source) and label is not None:
        raise RlhfError(
            Problem("CFG040", "--label", f"{source} is a reward run: all its heads are written.", "leave it out")
        )
    records = lines.load(sources.load_demonstrations, data)
    device = runtime.set_up(RuntimeSection(), 0)
    if is_run(source):
        samples, scorer = _of_run(source, records, device, micro_batch_size)
    else:
        section = ClassifierSection(path=source, label=int(label) if label and label.isdigit() else label)
        samples, scorer = [_sample(record) for record in records], open_classifier(section, device, micro_batch_size)
    lines.write(out, scored_rows(samples, scorer.score(samples)))


def scored_rows(samples: Sequence[Sample], scores: Scores) -> list[dict[str, Any]]:
    """Samples as JSON rows with their score, and with what the members and every head say where there are some."""
    rows = []
    for index, (sample, more) in enumerate(zip(samples, _of_members(samples, scores), strict=True)):
        row: dict[str, Any] = {
            "prompt": [{"role": message.role, "content": message.content} for message in sample.prompt],
            "response": sample.response, "score": float(scores.mean[index]), **more,
        }  # fmt: skip
        if len(scores.heads) > 1:
            row["heads"] = {name: float(values[index]) for name, values in scores.heads.items()}
        rows.append(row)
    return rows


def _of_members(samples: Sequence[Sample], scores: Scores) -> list[dict[str, Any]]:
    """Of an ensemble, what each member says of each response, and how far they disagree on its score relative to the
    first response to the same prompt; null for the first itself."""
    if scores.members is None:
        return [{} for _ in samples]
    first: dict[str, int] = {}
    references = [first.setdefault(prompt_key(sample.prompt), row) for row, sample in enumerate(samples)]
    apart = disagreement(scores.members, scores.members[references]).tolist()
    return [
        {"members": members, "disagreement": apart[row] if references[row] != row else None}
        for row, members in enumerate(scores.members.tolist())
    ]


def _of_run(
    name: str, records: Sequence[Demonstration], device: torch.device, micro_batch_size: int
) -> tuple[list[Sample], Scorer]:
    source = examined.source_of(name)
    assert source.run
    manifest = artifacts.read(source.run, "reward")
    known = examined.length_calibration(name) if source.length_calibration else None
    base = opening.reopen_base(manifest, device)
    runtime.set_threads(RuntimeSection(), base.model, device)
    roles = SharedBase(base)
    scorer = open_run(source.run, roles, micro_batch_size, head=source.head, calibration=known)
    samples = []
    turns = tokenised.turns(records, base.chat, last_only=True, max_length=NO_LIMIT)
    for record, turn in zip(records, turns, strict=True):
        opening.require_context(base.chat, len(turn.prompt_ids), len(turn.response_ids), record.where)
        samples.append(_sample(record, turn.prompt_ids, turn.response_ids))
    return samples, scorer


def _sample(record: Demonstration, prompt_ids: Sequence[int] = (), response_ids: Sequence[int] = ()) -> Sample:
    prompt, response, ids = record.messages[:-1], record.messages[-1].content, list(response_ids)
    return Sample(prompt, response, list(prompt_ids), ids, True, ids)
