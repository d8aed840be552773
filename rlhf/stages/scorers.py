"""What ``--reward`` names on the command line, as one scorer of texts."""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch

from rlhf import artifacts, examined, masking, runtime
from rlhf.config.rewards import ClassifierSection, wrong_url
from rlhf.config.sections import RuntimeSection
from rlhf.errors import Problem, RlhfError
from rlhf.models import opening
from rlhf.models.roles import SharedBase
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
        elif not FUNCTION.fullmatch(name) and is_run(name):
            examined.source_of(name)


def open_scorer(names: Sequence[str], device: torch.device, micro_batch_size: int) -> Scorer:
    """One reward, or the mean of several with each as a member.

    Each is a reward run (standardised scores), an examination of one (the same with its length calibration),
    ``module:function``, the address of a service, or directory or hub id of a sequence classifier.
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
    if not is_run(name):
        return open_classifier(ClassifierSection(path=name), device, micro_batch_size)
    source = examined.source_of(name)
    assert source.run
    manifest = artifacts.read(source.run, "reward")
    base = opening.reopen_base(manifest, device)
    runtime.set_threads(RuntimeSection(), base.model, device)
    inner = open_source(source, "reward", manifest, base, SharedBase(base), micro_batch_size)
    return Rerendered(inner, base.chat, name)


def _is_url(name: str) -> bool:
    return name.startswith(("http://", "https://"))
