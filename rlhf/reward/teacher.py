"""Distillation: what other reward runs give to the responses, as the target of a student's score differences."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rlhf.data.batches import PassSize
from rlhf.data.tokenised import Group
from rlhf.evaluation import member_figures as together
from rlhf.evaluation import reward as examine
from rlhf.metrics.pairs import pair_accuracy
from rlhf.models import open_base
from rlhf.models.roles import SharedBase
from rlhf.preflight.prepare import Plan
from rlhf.records import Comparison
from rlhf.scoring.open_scorer import open_run
from rlhf.scoring.rerendered import Rerendered
from rlhf.scoring.scorer import Sample, Scores

log = logging.getLogger("rlhf")


@dataclass(frozen=True)
class Teacher:
    """Mean raw score of the teachers for the responses [K] of each record, by its place; and how large they are."""

    scores: dict[str, Tensor]
    parameters: int

    def of(self, groups: Sequence[Group]) -> list[Tensor]:
        """One [K] tensor a group."""
        return [self.scores[group.record.where] for group in groups]

    def report(self, groups: Sequence[Group], student: float, parameters: int) -> dict[str, Any]:
        """What the student keeps of the teachers' accuracy on held-out comparisons, and of their size."""
        found = examine.compare(together.FixedScorer(Scores(torch.cat(self.of(groups)))), groups)
        accuracy = pair_accuracy(found.differences)
        log.info(
            "Teachers: accuracy %.3f with %.1f M parameters; student: %.3f with %.1f M.",
            accuracy,
            self.parameters / 1e6,
            student,
            parameters / 1e6,
        )
        return {
            "teacher_accuracy": accuracy,
            "accuracy_kept": student / accuracy if accuracy else None,
            "teacher_parameters": self.parameters,
            "student_parameters": parameters,
        }


def learn(
    runs: Sequence[str], plan: Plan, records: Sequence[Comparison], device: torch.device, micro_batch_size: int
) -> Teacher | None:
    """Score every response with each teacher, one after the other; each is loaded alone and given back.

    Raises:
        RlhfError: MOD022 for a conversation that a teacher's base has no room for.
    """
    if not runs:
        return None
    samples = [Sample(record.prompt, text, [], [], True, []) for record in records for text in record.responses]
    columns, parameters = [], 0
    for index, run in enumerate(runs):
        base = open_base.reopen_base(plan.parents[f"teachers.{index}"], device)
        parameters += sum(parameter.numel() for parameter in base.model.parameters())
        raw = open_run(run, SharedBase(base), PassSize(micro_batch_size), raw=True)
        columns.append(Rerendered(raw, base.chat, run).score(samples).mean.double())
        log.info("%s has scored %d responses.", run, len(samples))
    mean = torch.stack(columns, 1).mean(1).float()
    parts = mean.split([len(record.responses) for record in records])
    return Teacher({record.where: part for record, part in zip(records, parts, strict=True)}, parameters)
