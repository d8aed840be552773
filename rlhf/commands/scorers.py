"""What ``--reward`` names on the command line, as one scorer of texts."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import torch

from rlhf import secrets
from rlhf.commands.generate import is_run
from rlhf.config.rewards import ClassifierSection, RunReward, wrong_url
from rlhf.config.sections import RuntimeSection
from rlhf.data.batches import PassSize
from rlhf.errors import Problem, RlhfError
from rlhf.models import open_base
from rlhf.models.roles import SharedBase
from rlhf.preflight import examined
from rlhf.preflight.origins import missing_heads
from rlhf.runs import artifacts, runtime
from rlhf.scoring.function import FunctionScorer
from rlhf.scoring.open_scorer import Host, open_classifier, open_source
from rlhf.scoring.rerendered import Rerendered
from rlhf.scoring.scorer import Scorer, WeightedScorer
from rlhf.scoring.service import ServiceScorer

FUNCTION = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*", re.ASCII)


def check_names(names: Sequence[str]) -> None:
    """Refuse, before any model is opened, what is no address, no reward run, damaged, or a path that is not there."""
    for name in names:
        if _is_url(name):
            if wrong := wrong_url(name):
                raise RlhfError(Problem("CFG003", "--reward", f"{secrets.mask(name)} {wrong}."))
        elif not FUNCTION.fullmatch(name) and is_run(_run_and_head(name)[0]):
            run, head = _run_and_head(name)
            source = examined.source_of(run)
            if head and (unknown := missing_heads("--reward", artifacts.read(source.run, "reward"), (head,))):
                raise RlhfError(*unknown)
            _with_head(source, head)


def open_scorer(names: Sequence[str], device: torch.device, micro_batch_size: int) -> Scorer:
    """One reward, or the mean of several with each as a member.

    Each is a reward run (standardised scores; RUN#HEAD for one of its heads), an examination of one (the same with its
    length calibration), ``module:function``, the address of a service, or directory or hub id of a sequence classifier.
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
    source = _with_head(examined.source_of(run), head)
    manifest = artifacts.read(source.run, "reward")
    base = open_base.reopen_base(manifest, device)
    runtime.set_threads(RuntimeSection(), base.model, device)
    inner = open_source(source, "reward", manifest, Host(base, SharedBase(base), PassSize(micro_batch_size)))
    return Rerendered(inner, base.chat, name)


def _with_head(source: RunReward, head: str | None) -> RunReward:
    """The same for one head; an examination has its own already.

    Raises:
        RlhfError: CFG003 for a head of what was examined whole, or by another head.
    """
    if head is None or head == source.head:
        return source
    if source.length_calibration:
        what = f"was examined by {source.head or 'the score'}, and its length calibration is not of {head}."
        raise RlhfError(Problem("CFG003", f"--reward {source.length_calibration}#{head}", what, "leave #HEAD out"))
    return RunReward(run=source.run, head=head)


def _run_and_head(name: str) -> tuple[str, str | None]:
    """A run's directory, and behind the last # the head of it that scores, where the whole is no directory itself."""
    run, mark, head = name.rpartition("#")
    return (run, head) if mark and not Path(name).exists() else (name, None)


def _is_url(name: str) -> bool:
    return name.startswith(("http://", "https://"))
