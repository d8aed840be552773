"""What ``--reward`` names on the command line, as one scorer of texts."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import torch

from rlhf import artifacts, masking, runtime
from rlhf.config.rewards import ClassifierSection, RewardSource, wrong_url
from rlhf.config.sections import RuntimeSection
from rlhf.errors import Problem, RlhfError
from rlhf.models import opening
from rlhf.models.roles import SharedBase
from rlhf.origins import missing_heads
from rlhf.scoring.function import FunctionScorer
from rlhf.scoring.rerendered import Rerendered
from rlhf.scoring.scorer import Scorer, WeightedScorer
from rlhf.scoring.service import ServiceScorer
from rlhf.scoring.sources import open_classifier, open_source
from rlhf.stages.generate import is_run

FUNCTION = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*", re.ASCII)


def check_names(names: Sequence[str]) -> None:
    """Refuse, before any model is opened, what is no address, no reward run, damaged, or a path that is not there."""
    for name in names:
        if _is_url(name):
            if wrong := wrong_url(name):
                raise RlhfError(Problem("CFG003", "--reward", f"{masking.mask(name)} {wrong}."))
        elif not FUNCTION.fullmatch(name) and is_run(run := _run_and_head(name)[0]):
            manifest = artifacts.read(run, "reward")
            artifacts.verify(Path(run), manifest)
            if (head := _run_and_head(name)[1]) and (unknown := missing_heads("--reward", manifest, (head,))):
                raise RlhfError(*unknown)


def open_scorer(names: Sequence[str], device: torch.device, micro_batch_size: int) -> Scorer:
    """One reward, or the mean of several with each as a member.

    Each is a reward run (standardised scores; RUN#HEAD for one of its heads), ``module:function``, the address of a
    service, or directory or hub id of a sequence classifier.
    """
    assert names
    scorers = [_open(name, device, micro_batch_size) for name in names]
    if len(scorers) == 1:
        return scorers[0]
    return WeightedScorer([(scorer, 1 / len(scorers)) for scorer in scorers])


def _open(name: str, device: torch.device, micro_batch_size: int) -> Scorer:
    if FUNCTION.fullmatch(name):
        return FunctionScorer(name)
    if _is_url(name):
        return ServiceScorer(name)
    run, head = _run_and_head(name)
    if not is_run(run):
        return open_classifier(ClassifierSection(path=name), device, micro_batch_size)
    manifest = artifacts.read(run, "reward")
    base = opening.reopen_base(manifest, device)
    runtime.set_threads(RuntimeSection(), base.model, device)
    source = RewardSource(run=run, head=head)
    return Rerendered(
        open_source(source, "reward", manifest, base, SharedBase(base), micro_batch_size), base.chat, name
    )


def _run_and_head(name: str) -> tuple[str, str | None]:
    """A run's directory, and behind the last # the head of it that scores, where the whole is no directory itself."""
    run, mark, head = name.rpartition("#")
    return (run, head) if mark and not Path(name).exists() else (name, None)


def _is_url(name: str) -> bool:
    return name.startswith(("http://", "https://"))
