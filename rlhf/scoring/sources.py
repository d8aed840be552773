"""From what a config names as a reward to what scores: the one place where reward runs and models are opened for it."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

import torch

from rlhf import artifacts
from rlhf.artifacts import Manifest
from rlhf.config.rewards import ClassifierSection, RewardSource
from rlhf.examined import LengthCalibration, length_calibration
from rlhf.models import classifier, opening
from rlhf.models.base import Base
from rlhf.models.heads import ScalarHead
from rlhf.models.roles import SharedBase
from rlhf.progress import waiting
from rlhf.scoring.classifier import ClassifierScorer
from rlhf.scoring.ensemble import Answer, EnsembleScorer, References
from rlhf.scoring.function import FunctionScorer
from rlhf.scoring.length import LengthCorrected
from rlhf.scoring.rerendered import Rerendered
from rlhf.scoring.scorer import Scorer
from rlhf.scoring.service import ServiceScorer
from rlhf.scoring.shared import SharedScorer

log = logging.getLogger("rlhf")


def open_source(
    source: RewardSource, slot: str, manifest: Manifest | None, base: Base, shared: SharedBase | None,
    micro_batch_size: int, answer: Answer | None = None, max_tokens: int | None = None,
) -> Scorer:  # fmt: skip
    """What scores for one term of a reward.

    Args:
        slot: name of the role that a reward run becomes; of an ensemble's members its beginning.
        manifest: of the reward run, where the source is one.
        base: the policy's; shared: its roles, where the run may be one more of them. A run on another base, a model
            from elsewhere and a run beside roles that share nothing are loaded as models of their own.
        answer: samples the reference policy, for an ensemble whose members are compared in differences.
        max_tokens: of a forward pass of a reward run; None: no limit beside ``micro_batch_size``.
    """
    if source.function:
        return FunctionScorer(source.function)
    if source.url:
        return ServiceScorer(source.url)
    known = length_calibration(source.length_calibration) if source.length_calibration else None
    if source.model:
        scorer = open_classifier(source.model, base.device, micro_batch_size)
        return LengthCorrected(scorer, known, scorer.tokens_read) if known else scorer
    if source.run:
        assert manifest
        members = _members(
            source.run, slot, manifest, base, shared, micro_batch_size, max_tokens, False, source.head, known
        )
    else:
        members = [
            member
            for index, run in enumerate(source.runs or ())
            for member in _members(
                run,
                f"{slot}/{index}",
                artifacts.read(run, "reward"),
                base,
                shared,
                micro_batch_size,
                max_tokens,
                head=source.head,
            )
        ]
    if len(members) == 1:
        assert source.aggregate == "mean", "checked before any weight is loaded"
        return members[0]
    references = References(answer, source.reference_samples) if answer and source.compares else None
    return EnsembleScorer(members, source.aggregate, source.disagreement_coef, references)


def open_run(
    run_dir: str, roles: SharedBase, micro_batch_size: int, raw: bool = False, head: str | None = None,
    calibration: LengthCalibration | None = None,
) -> Scorer:  # fmt: skip
    """What scores for a finished reward run, on the base of ``roles``; of an ensemble the mean of its members.

    Args:
        raw, head: as ``SharedScorer``.
        calibration: what is taken off for length, from scores that are not raw.
    """
    assert not (raw and calibration)
    members = _corrected(_add_members(roles, "reward", run_dir, micro_batch_size, raw, head=head), calibration)
    return members[0] if len(members) == 1 else EnsembleScorer(members)


def open_runs(
    runs: Sequence[str], manifests: Sequence[Manifest], roles: SharedBase, micro_batch_size: int
) -> EnsembleScorer:
    """The raw scores of several reward runs' members, and their mean.

    Args:
        roles: on the first run's base; a run on another one has a model of its own.
    """
    return EnsembleScorer([
        member
        for index, (run, manifest) in enumerate(zip(runs, manifests, strict=True))
        for member in _members(run, f"runs/{index}", manifest, roles.base, roles, micro_batch_size, None, raw=True)
    ])  # fmt: skip


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


def _members(
    run: str, slot: str, manifest: Manifest, base: Base, shared: SharedBase | None, micro_batch_size: int,
    max_tokens: int | None, raw: bool = False, head: str | None = None, calibration: LengthCalibration | None = None,
) -> list[Scorer]:  # fmt: skip
    """The members of a run, on the policy's base where they were made on it. The same for length is taken off each, in
    tokens of the run's base: what an aggregate of them gives changes by just that."""
    if shared is not None and is_on(manifest, base):
        members = _add_members(shared, slot, run, micro_batch_size, raw, max_tokens, head)
        return _corrected(members, calibration)
    own = opening.reopen_base(manifest, base.device)
    log.info("%s is on a base of its own (%s), which is loaded as well.", run, own.source)
    found = _corrected(_add_members(SharedBase(own), slot, run, micro_batch_size, raw, max_tokens, head), calibration)
    return [Rerendered(member, own.chat, run) for member in found]


def _corrected(members: Sequence[Scorer], calibration: LengthCalibration | None) -> list[Scorer]:
    return [LengthCorrected(member, calibration) for member in members] if calibration else list(members)


def _add_members(
    roles: SharedBase, slot: str, run_dir: str, micro_batch_size: int, raw: bool = False,
    max_tokens: int | None = None, head: str | None = None,
) -> list[SharedScorer]:  # fmt: skip
    members = artifacts.members_of(run_dir)
    names = slot_names(slot, len(members))
    for name, member in zip(names, members, strict=True):
        add_reward(roles, name, member)
    return [SharedScorer(roles, name, micro_batch_size, raw, max_tokens, head) for name in names]


def open_classifier(section: ClassifierSection, device: torch.device, micro_batch_size: int) -> ClassifierScorer:
    """A model from elsewhere."""
    with waiting(f"Loading the model {section.path}"):
        loaded = classifier.load(section, device)
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
