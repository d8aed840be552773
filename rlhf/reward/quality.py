"""What a trained reward model is measured by, and how its scores get their scale."""

from __future__ import annotations

import hashlib
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy
import torch
from torch import Tensor

from rlhf.config.sections import RewardBatchSection, SamplingSection
from rlhf.data.batches import PassSize
from rlhf.data.tokenised import Group, PromptRow
from rlhf.errors import Problem, RlhfError
from rlhf.evaluation import head_figures
from rlhf.evaluation import member_figures as together
from rlhf.evaluation import policy_samples as measure
from rlhf.evaluation import reward as examine
from rlhf.evaluation.figures import FigureSettings
from rlhf.evaluation.reward import Pairs
from rlhf.metrics.member_errors import chance_above
from rlhf.models.base import Base
from rlhf.models.heads import ScalarHead
from rlhf.models.roles import Roles
from rlhf.reward import length_penalty
from rlhf.rollouts.open_engine import open_engine
from rlhf.runs import runtime
from rlhf.runs.run_directory import Run
from rlhf.scoring.ensemble import EnsembleScorer
from rlhf.scoring.scorer import Sample, Scorer, Scores
from rlhf.scoring.shared import SharedScorer

log = logging.getLogger("rlhf")
SMALL_SCALE = 0.1


@dataclass(frozen=True)
class RewardRoles:
    """The reward roles of a run, one a member, and how much of them a forward pass takes."""

    roles: Roles
    slots: Sequence[str]
    batch: RewardBatchSection

    def scorer(self) -> Scorer:
        """Raw scores of the reward role, or the mean of several."""
        found = [self._scorer(slot, raw=True) for slot in self.slots]
        return found[0] if len(found) == 1 else EnsembleScorer(found)

    def scores(self, slot: str, samples: Sequence[Sample], raw: bool) -> Scores:
        """What one of the roles gives."""
        return self._scorer(slot, raw).score(samples)

    def _scorer(self, slot: str, raw: bool) -> SharedScorer:
        size = PassSize(self.batch.micro_batch_size, self.batch.micro_batch_tokens)
        return SharedScorer(self.roles, slot, size, raw)


def held_out(
    rewards: RewardRoles, groups: Sequence[Group], seed: int, has_length_coef: bool
) -> tuple[dict[str, float], dict[str, Any], Pairs]:
    """Figures on held-out prompts; of an ensemble those of its mean, and what is to be told of its members.

    Args:
        has_length_coef: whether what scores and lengths have in common is measured too.
    """
    slots = rewards.slots
    kept = together.RecordingScorer(rewards.scorer())
    pairs, members = together.compare(kept, groups)
    labelled = _of_labels(kept, groups)
    shared = (
        length_penalty.correlation(pairs.length_gaps.tolist(), pairs.differences.tolist()) if has_length_coef else None
    )
    labelled |= {} if shared is None else {"eval/length_correlation": shared}
    assert kept.found is not None
    of_heads = _of_heads(groups, kept.found, seed)
    judged = {name: row["accuracy"] for name, row in of_heads.items() if row["accuracy"]}
    labelled |= {f"eval/accuracy/{name}": accuracy["estimate"] for name, accuracy in judged.items()}
    told = {"heads_held_out": of_heads} if of_heads else {}
    if not len(pairs.differences):
        return labelled, {**told, **({"members": len(slots)} if members else {})}, pairs
    accuracy = examine.accuracy(pairs, seed)
    log.info(
        "Held out: accuracy %.3f [%.3f, %.3f] on %d comparisons of %d prompts.",
        accuracy.estimate,
        accuracy.low,
        accuracy.high,
        len(pairs.differences),
        len(groups),
    )
    figures = {
        "eval/accuracy": accuracy.estimate,
        "eval/accuracy_low": accuracy.low,
        "eval/accuracy_high": accuracy.high,
        "eval/ece": examine.calibration_error(pairs),
        "eval/comparisons": len(pairs.differences),
        **labelled,
    }
    if not members:
        return figures, told, pairs
    said = together.report(pairs, members)
    alone = said["accuracy"]
    log.info("Its %d members alone: accuracy %.3f to %.3f.", len(slots), min(alone), max(alone))
    return figures, {**told, "members": len(slots), "members_held_out": said}, pairs


def write_comparisons(pairs: Pairs, run: Run) -> None:
    """Each held-out comparison's outcome."""
    rows = [
        {"prompt": hashlib.sha256(key.encode()).hexdigest()[:16], "right": float(right), "difference": float(gap)}
        for key, right, gap in zip(pairs.groups, examine.right(pairs), pairs.differences, strict=True)
    ]
    run.write_samples("held_out", rows)


def _of_heads(groups: Sequence[Group], scores: Scores, seed: int) -> dict[str, Any]:
    """Each head on the labels of its attribute."""
    found = head_figures.report(groups, scores, FigureSettings(10, 2000, seed, 0.0))
    for name, row in found.items():
        said = []
        if row["accuracy"]:
            said.append(f"accuracy {row['accuracy']['estimate']:.3f} on {row['comparisons']} comparisons")
        if row["rating_correlation"] is not None:
            said.append(f"correlation {row['rating_correlation']:.3f} with {row['ratings']} ratings")
        log.info("Held out, %s: %s.", name, ", ".join(said) or "no figure")
    return found


def _of_labels(kept: together.RecordingScorer, groups: Sequence[Group]) -> dict[str, float]:
    """How well raw scores tell good responses from bad ones of any prompt, where responses have labels of their own.

    The area under the curve is left out where all are good, or all bad.
    """
    assert kept.found is not None
    ratings = [rating for group in groups for rating in group.record.ratings or [math.nan] * len(group.responses)]
    wanted, scores = numpy.array(ratings), kept.found.mean.double().numpy()
    has = ~numpy.isnan(wanted)
    if not has.any():
        return {}
    good, bad = scores[wanted == 1], scores[wanted == 0]
    area = chance_above(good, bad)
    right = (good > 0).sum() + (bad < 0).sum() + 0.5 * (scores[has] == 0).sum()
    brier = ((1 / (1 + numpy.exp(-scores[has])) - wanted[has]) ** 2).mean()
    figures = {
        "eval/label_accuracy": float(right / has.sum()),
        "eval/label_brier": float(brier),
        "eval/label_share_good": float(wanted[has].mean()),
        "eval/labels": int(has.sum()),
    }
    log.info("Held-out labels: %d, right side of 0 %.3f.", figures["eval/labels"], figures["eval/label_accuracy"])
    return figures if area is None else {**figures, "eval/label_auroc": area}


def standardise(
    rewards: RewardRoles, base: Base, rows: Sequence[PromptRow], sampling: SamplingSection, seed: int, run: Run
) -> dict[str, float]:
    """Set each head's shift and scale so that the SFT policy's samples have mean 0 and standard deviation 1."""
    roles, slots = rewards.roles, rewards.slots
    engine = open_engine(roles, "policy", base.chat, sampling)
    own_seed = runtime.derived_seed(seed, "train-rm", "standardise")
    samples = measure.respond(engine, base.chat, rows, measure.sampling_of(sampling, own_seed))
    ended = [sample for sample in samples if sample.finished]
    if len(ended) < 2:
        what = (
            f"only {len(ended)} of {len(samples)} SFT samples end by themselves: nothing to standardise the scores on."
        )
        fix = "raise sampling.max_new_tokens, or train the SFT policy to stop"
        raise RlhfError(Problem("GRD003", "train-rm", what, fix))
    found = [rewards.scores(slot, ended, raw=False) for slot in slots]  # the shift is 0 and the scale 1 so far
    columns = [scores.mean.double() for scores in found]
    figures: dict[str, float] = {}
    for slot, whole, scores in zip(slots, found, columns, strict=True):
        shift, scale = _fit(roles.head(slot), [scores, *(whole.heads.values() if len(whole.heads) > 1 else ())])
        log.info(
            "Scores of %s standardised on %d SFT samples (%d more were cut off): shift %.3f, scale %.3f.",
            slot,
            len(scores),
            len(samples) - len(ended),
            shift,
            scale,
        )
        suffix = slot.removeprefix("reward").replace("/", "_")
        figures |= {f"eval/score_shift{suffix}": shift, f"eval/score_scale{suffix}": scale}
    named = {"raw_score": columns[0].tolist()} if len(slots) == 1 else {"raw_scores": torch.stack(columns, 1).tolist()}
    if len(found[0].heads) > 1:
        named["raw_heads"] = _rows_of_heads(found)
    run.write_samples("standardise", measure.sample_rows(ended, **named))
    if len(slots) > 1:
        standard = torch.stack([(scores - scores.mean()) / scores.std(correction=0) for scores in columns], 1)
        figures["eval/ensemble_std"] = float(standard.mean(1).std(correction=0))
    return {**figures, "eval/standardise_samples": len(ended)}


def _rows_of_heads(found: Sequence[Scores]) -> list[dict[str, list[float]]]:
    """For each sample and head what every member gives."""
    names = list(found[0].heads)
    columns = torch.stack([torch.stack([scores.heads[name] for name in names], 1) for scores in found], 2)
    return [dict(zip(names, row, strict=True)) for row in columns.tolist()]


def _fit(head: ScalarHead, columns: Sequence[Tensor]) -> tuple[float, float]:
    """Give the head the shift and scale of each of its numbers' scores [B]; returns those of the first."""
    found = []
    for column, (name, scores) in enumerate(zip(head.names, columns, strict=True)):
        shift, scale = float(scores.double().mean()), float(scores.double().std(correction=0))
        if scale < SMALL_SCALE:
            what = "The scores of the SFT samples hardly differ (%s, scale %.3g): dividing by it blows up noise."
            log.warning(what, name, scale)
        with torch.no_grad():
            head.shift[column] = shift
            head.scale[column] = max(scale, 1e-6)
        found.append((shift, scale))
    return found[0]
