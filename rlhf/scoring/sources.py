"""From what a config names as a reward to what scores: the one place where reward runs and models are opened for it."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from rlhf import artifacts
from rlhf.artifacts import Manifest
from rlhf.config.rewards import ClassifierSection, RewardSource
from rlhf.data.batches import PassSize
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


@dataclass(frozen=True)
class _RunReader:
    """How the members of reward runs are read.

    Args:
        base: the policy's; shared: its roles, where a run may be one more of them.
        raw, head: as ``SharedScorer``.
        calibration: what is taken off for length, from scores that are not raw.
    """

    base: Base
    shared: SharedBase | None
    size: PassSize
    raw: bool = False
    head: str | None = None
    calibration: LengthCalibration | None = None

    def members(self, run: str, slot: str, manifest: Manifest) -> list[Scorer]:
        """The members of a run, on the policy's base where they were made on it. The same for length is taken off each,
        in tokens of the run's base: what an aggregate of them gives changes by just that."""
        if self.shared is not None and is_on(manifest, self.base):
            return self.on(self.shared, run, slot)
        own = opening.reopen_base(manifest, self.base.device)
        log.info("%s is on a base of its own (%s), which is loaded as well.", run, own.source)
        return [Rerendered(member, own.chat, run) for member in self.on(SharedBase(own), run, slot)]

    def on(self, roles: SharedBase, run: str, slot: str) -> list[Scorer]:
        """The members of a run as roles on the base that they were made on."""
        members = artifacts.members_of(run)
        names = slot_names(slot, len(members))
        for name, member in zip(names, members, strict=True):
            add_reward(roles, name, member)
        scorers = [SharedScorer(roles, name, self.size, self.raw, self.head) for name in names]
        return [LengthCorrected(scorer, self.calibration) if self.calibration else scorer for scorer in scorers]


def open_source(
    source: RewardSource,
    slot: str,
    manifest: Manifest | None,
    base: Base,
    shared: SharedBase | None,
    size: PassSize,
    answer: Answer | None = None,
) -> Scorer:
    """What scores for one term of a reward.

    Args:
        slot: name of the role that a reward run becomes; of an ensemble's members its beginning.
        manifest: of the reward run, where the source is one.
        base: the policy's; shared: its roles, where the run may be one more of them. A run on another base, a model
            from elsewhere and a run next to roles that share nothing are loaded as models of their own.
        size: of the forward passes; a model from elsewhere has no limit on tokens.
        answer: samples the reference policy, for an ensemble whose members are compared in differences.
    """
    if source.function:
        return FunctionScorer(source.function)
    if source.url:
        return ServiceScorer(source.url)
    known = length_calibration(source.length_calibration) if source.length_calibration else None
    if source.model:
        scorer = open_classifier(source.model, base.device, size.rows)
        return LengthCorrected(scorer, known, scorer.tokens_read) if known else scorer
    reader = _RunReader(base, shared, size, head=source.head, calibration=known)
    if source.run:
        assert manifest
        members = reader.members(source.run, slot, manifest)
    else:
        members = [
            member
            for index, run in enumerate(source.runs or ())
            for member in reader.members(run, f"{slot}/{index}", artifacts.read(run, "reward"))
        ]
    if len(members) == 1:
        assert source.aggregate == "mean", "checked before any weight is loaded"
        return members[0]
    references = References(answer, source.reference_samples) if answer and source.compares else None
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
    members = _RunReader(roles.base, roles, size, raw, head, calibration).on(roles, run_dir, "reward")
    return members[0] if len(members) == 1 else EnsembleScorer(members)


def open_runs(runs: Sequence[str], manifests: Sequence[Manifest], roles: SharedBase, size: PassSize) -> EnsembleScorer:
    """The raw scores of several reward runs' members, and their mean.

    Args:
        roles: on the first run's base; a run on another one has a model of its own.
    """
    reader = _RunReader(roles.base, roles, size, raw=True)
    named = enumerate(zip(runs, manifests, strict=True))
    return EnsembleScorer(
        [member for index, (run, manifest) in named for member in reader.members(run, f"runs/{index}", manifest)]
    )


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
