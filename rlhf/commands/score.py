"""``rlhf score``: score given responses with a finished reward run, or with a sequence classifier from elsewhere."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from rlhf.commands.generate import is_run
from rlhf.config.rewards import ClassifierSection
from rlhf.config.sections import RuntimeSection
from rlhf.data import lines, sources, tokenised
from rlhf.data.batches import PassSize
from rlhf.errors import Problem, RlhfError
from rlhf.models import open_base
from rlhf.models.base import NO_LIMIT
from rlhf.models.roles import SharedBase
from rlhf.preflight import examined
from rlhf.records import Demonstration, prompt_key
from rlhf.runs import artifacts, runtime
from rlhf.scoring.aggregate import disagreement
from rlhf.scoring.open_scorer import open_classifier, open_run
from rlhf.scoring.scorer import Sample, Scorer, Scores


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
    given = read(data)
    device = runtime.set_up(RuntimeSection(), 0)
    if is_run(source):
        samples, scorer = _of_run(source, given, device, micro_batch_size)
    else:
        section = ClassifierSection(path=source, label=int(label) if label and label.isdigit() else label)
        samples, scorer = [one.sample() for one in given], open_classifier(section, device, micro_batch_size)
    rows = scored_rows(samples, scorer.score(samples))
    lines.write(out, ({**row, **one.said} for row, one in zip(rows, given, strict=True)))


@dataclass(frozen=True)
class Given:
    """A prompt with a response that was read, and whether it ``finished``; None where the row does not say."""

    record: Demonstration
    finished: bool | None

    @property
    def said(self) -> dict[str, bool]:
        """What a row that is written says of it."""
        return {} if self.finished is None else {"finished": self.finished}

    def sample(self, prompt_ids: Sequence[int] = (), response_ids: Sequence[int] = ()) -> Sample:
        """For a scorer; the ids, with an end token, for one that reads them. Without ``finished`` it has ended."""
        ids, finished = list(response_ids), self.finished is not False
        ids = ids if finished else ids[:-1]
        if prompt_ids and not ids:  # cut off before any text: the head reads the end of the prompt
            prompt_ids, ids = prompt_ids[:-1], list(prompt_ids[-1:])
        return Sample(self.record.prompt, self.record.messages[-1].content, list(prompt_ids), ids, finished, ids)


def read(data: str) -> list[Given]:
    """Prompts with responses, also a policy's samples that were cut off."""
    records, fields = lines.load_with(sources.load_samples, data, (), ("finished",))
    known = {"true": True, "false": False}
    return [Given(record, known.get(said)) for record, said in zip(records, fields["finished"], strict=True)]


def scored_rows(samples: Sequence[Sample], scores: Scores) -> list[dict[str, Any]]:
    """Samples as JSON rows with their score, and with what the members and every head say where there are some."""
    rows = []
    for index, (sample, more) in enumerate(zip(samples, _of_members(samples, scores), strict=True)):
        row: dict[str, Any] = {
            "prompt": [{"role": message.role, "content": message.content} for message in sample.prompt],
            "response": sample.response,
            "score": float(scores.mean[index]),
            **more,
        }
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
    name: str, given: Sequence[Given], device: torch.device, micro_batch_size: int
) -> tuple[list[Sample], Scorer]:
    source = examined.source_of(name)
    manifest = artifacts.read(source.run, "reward")
    known = examined.length_calibration(name) if source.length_calibration else None
    base = open_base.reopen_base(manifest, device)
    runtime.set_threads(RuntimeSection(), base.model, device)
    roles = SharedBase(base)
    scorer = open_run(source.run, roles, PassSize(micro_batch_size), head=source.head, calibration=known)
    samples = []
    turns = tokenised.turns([one.record for one in given], base.chat, last_only=True, max_length=NO_LIMIT)
    for one, turn in zip(given, turns, strict=True):
        open_base.require_context(base.chat, len(turn.prompt_ids), len(turn.response_ids), one.record.where)
        samples.append(one.sample(turn.prompt_ids, turn.response_ids))
    return samples, scorer
