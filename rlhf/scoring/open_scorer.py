"""From what a config names as a reward to what scores: the one place where reward runs and models are opened for it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from rlhf.config.rewards import (
    ClassifierSection,
    EnsembleReward,
    FunctionReward,
    ModelReward,
    RewardSource,
    RunReward,
    ServiceReward,
)
from rlhf.data.batches import PassSize
from rlhf.models import open_base, sequence_classifier
from rlhf.models.base import Base
from rlhf.models.heads import ScalarHead
from rlhf.models.roles import SharedBase
from rlhf.preflight.examined import LengthCalibration, length_calibration
from rlhf.runs import artifacts
from rlhf.runs.artifacts import Manifest
from rlhf.runs.progress import waiting
from rlhf.scoring.classifier import ClassifierScorer
from rlhf.scoring.ensemble import Answer, EnsembleScorer, References
from rlhf.scoring.function import FunctionScorer
from rlhf.scoring.length_correction import LengthCorrected
from rlhf.scoring.rerendered import Rerendered
from rlhf.scoring.scorer import Scorer
from rlhf.scoring.service import ServiceScorer
from rlhf.scoring.shared import SharedScorer

log = logging.getLogger("rlhf")


@dataclass(frozen=True)
class Host:
    """What a source is opened beside, and in what portions it reads.

    Args:
        base: the policy's.
        shared: its roles, where a reward run may be one more of them. A run on another base, a model from elsewhere and
            a run beside roles that share nothing are loaded as models of their own.
        size: of the forward passes; a model from elsewhere has no limit on tokens.
        answer: samples the reference policy, for an ensemble whose members are compared in differences.
    """

    base: Base
    shared: SharedBase | None
    size: PassSize
    answer: Answer | None = None


@dataclass(frozen=True)
class Reading:
    """Which number of a reward run is read: raw or standardised, of which head, and what is taken off for length."""

    raw: bool = False
    head: str | None = None
    calibration: LengthCalibration | None = None


def open_source(source: RewardSource, slot: str, manifest: Manifest | None, host: Host) -> Scorer:
    """What scores for one term of a reward.

    Args:
        slot: name of the role that a reward run becomes; of an ensemble's members its beginning.
        manifest: of the reward run, where the source is one.
    """
    return OPENERS[type(source)](source, slot, manifest, host)


def _of_run(source: RunReward, slot: str, manifest: Manifest | None, host: Host) -> Scorer:
    assert manifest
    reading = Reading(head=source.head, calibration=_known(source))
    return _together(source, _members(source.run, slot, manifest, host, reading), host)


def _of_ensemble(source: EnsembleReward, slot: str, manifest: Manifest | None, host: Host) -> Scorer:
    reading = Reading(head=source.head)
    members = [
        member
        for index, run in enumerate(source.runs)
        for member in _members(run, f"{slot}/{index}", artifacts.read(run, "reward"), host, reading)
    ]
    return _together(source, members, host)


def _of_model(source: ModelReward, slot: str, manifest: Manifest | None, host: Host) -> Scorer:
    scorer, known = open_classifier(source.model, host.base.device, host.size.rows), _known(source)
    return LengthCorrected(scorer, known, scorer.tokens_read) if known else scorer


def _of_function(source: FunctionReward, slot: str, manifest: Manifest | None, host: Host) -> Scorer:
    return FunctionScorer(source.function)


def _of_service(source: ServiceReward, slot: str, manifest: Manifest | None, host: Host) -> Scorer:
    return ServiceScorer(source.url)


OPENERS: dict[type[RewardSource], Callable[[Any, str, Manifest | None, Host], Scorer]] = {
    RunReward: _of_run,
    EnsembleReward: _of_ensemble,
    ModelReward: _of_model,
    FunctionReward: _of_function,
    ServiceReward: _of_service,
}
"""What opens each kind of source."""


def _known(source: RewardSource) -> LengthCalibration | None:
    return length_calibration(source.length_calibration) if source.length_calibration else None


def _together(source: RewardSource, members: Sequence[Scorer], host: Host) -> Scorer:
    if len(members) == 1:
        assert source.aggregate == "mean", "checked before any weight is loaded"
        return members[0]
    references = References(host.answer, source.reference_samples) if host.answer and source.compares else None
    return EnsembleScorer(members, source.aggregate, source.disagreement_coef, references)


def open_run(
    run_dir: str,
    roles: SharedBase,
    size: PassSize,
    raw: bool = False,
    head: str | None = None,
    calibration: LengthCalibration | None = None,
) -> Scorer:
    """What scores for a finished reward run, on the base of ``roles``; of an ensemble the mean of its members.

    Args:
        raw, head: as ``SharedScorer``.
        calibration: what is taken off for length, from scores that are not raw.
    """
    assert not (raw and calibration)
    host, reading = Host(roles.base, roles, size), Reading(raw, head, calibration)
    members = _add_members(roles, "reward", run_dir, host, reading)
    return members[0] if len(members) == 1 else EnsembleScorer(members)


def open_runs(runs: Sequence[str], manifests: Sequence[Manifest], roles: SharedBase, size: PassSize) -> EnsembleScorer:
    """The raw scores of several reward runs' members, and their mean.

    Args:
        roles: on the first run's base; a run on another one has a model of its own.
    """
    host, reading = Host(roles.base, roles, size), Reading(raw=True)
    members = [
        member
        for index, (run, manifest) in enumerate(zip(runs, manifests, strict=True))
        for member in _members(run, f"runs/{index}", manifest, host, reading)
    ]
    return EnsembleScorer(members)


def heads(runs: Sequence[str]) -> list[Path]:
    """Where the heads of all members of several runs stand."""
    return [member / artifacts.HEAD for run in runs for member in artifacts.members_of(run)]


def member_names(runs: Sequence[str]) -> list[str]:
    """What the members of several runs are called in reports: their run, of an ensemble with their number."""
    counts = [len(artifacts.members_of(run)) for run in runs]
    return [name for run, count in zip(runs, counts, strict=True) for name in slot_names(run, count)]


def slot_names(slot: str, count: int) -> list[str]:
    """What the roles of a reward run's members are called."""
    return [slot] if count == 1 else [f"{slot}/{index}" for index in range(count)]


def _members(run: str, slot: str, manifest: Manifest, host: Host, reading: Reading) -> list[Scorer]:
    """The members of a run, on the policy's base where they were made on it. The same for length is taken off each, in
    tokens of the run's base: what an aggregate of them gives changes by just that."""
    if host.shared is not None and is_on(manifest, host.base):
        return _add_members(host.shared, slot, run, host, reading)
    own = open_base.reopen_base(manifest, host.base.device)
    log.info("%s is on a base of its own (%s), which is loaded as well.", run, own.source)
    return [Rerendered(one, own.chat, run) for one in _add_members(SharedBase(own), slot, run, host, reading)]


def _add_members(roles: SharedBase, slot: str, run_dir: str, host: Host, reading: Reading) -> list[Scorer]:
    members = artifacts.members_of(run_dir)
    names = slot_names(slot, len(members))
    for name, member in zip(names, members, strict=True):
        add_reward(roles, name, member)
    scorers = [SharedScorer(roles, name, host.size, reading.raw, reading.head) for name in names]
    known = reading.calibration
    return [LengthCorrected(scorer, known) for scorer in scorers] if known else [*scorers]


def open_classifier(section: ClassifierSection, device: torch.device, micro_batch_size: int) -> ClassifierScorer:
    """A model from elsewhere."""
    with waiting(f"Loading the model {section.path}"):
        loaded = sequence_classifier.load(section, device)
    return ClassifierScorer(loaded, micro_batch_size, section.too_long, section.path)


def add_reward(roles: SharedBase, slot: str, run_dir: Path) -> None:
    """Adapter and head of a reward run, or of one member of an ensemble, as a frozen role."""
    head = ScalarHead.load(artifacts.head_of(run_dir))
    roles.add(slot, adapter=artifacts.adapter_of(run_dir), head=head, trained=False)


def is_on(manifest: Manifest, base: Base) -> bool:
    """Whether a run was made on this very base, with the same template, variables and date, and quantised as here. A
    run of an older version has recorded no date."""
    made, own = manifest.base, (base.digest, base.chat.template_name, base.quantize)
    if made is None or made.template_date not in (None, base.chat.date):
        return False
    return (made.digest, made.chat_template, made.quantize) == own and base.chat.is_rendered_as(
        made.thinking, made.template_kwargs
    )
