"""``rlhf generate``: sample from any finished policy run, or from a causal language model from elsewhere."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from rlhf.config.sections import ModelSection, RuntimeSection, SamplingSection
from rlhf.data import lines, sources, tokenised
from rlhf.data.dropped import DroppedRows
from rlhf.data.fitting import Limit
from rlhf.errors import Problem, RlhfError
from rlhf.evaluation import policy_samples as measure
from rlhf.hub import names
from rlhf.models import open_base
from rlhf.models.base import Base
from rlhf.models.roles import SharedBase
from rlhf.preflight import examined
from rlhf.records import Prompt
from rlhf.rollouts.engine import Sampling
from rlhf.rollouts.hf import HfEngine
from rlhf.runs import artifacts, policy_sampling, runtime
from rlhf.runs.policy_sampling import Asked, Own
from rlhf.scoring.scorer import Sample

log = logging.getLogger("rlhf")


def generate(source: str, prompts: str, out: str, samples: int, template: str | None, asked: Asked) -> None:
    """Read prompts (JSONL, ``-`` for stdin, or any data set), write prompt, response and whether it ended."""
    refuse_other_kinds(source, template)
    how = settle(source, asked)
    records = lines.load(sources.load_prompts, prompts)
    responses = sample(source, template, records, samples, how, prompts)
    num_cut, num_empty = sum(not one.finished for one in responses), sum(one.is_empty for one in responses)
    if num_cut or num_empty:
        log.warning("Of %d responses %d were cut off and %d have no text.", len(responses), num_cut, num_empty)
    lines.write(out, measure.sample_rows(responses))


def own_sampling(source: str) -> Own:
    """How the policy's run samples; the defaults for a model from elsewhere."""
    return policy_sampling.own(artifacts.read(source, "policy") if is_run(source) else None)


def settle(source: str, asked: Asked, own: Own | None = None) -> Sampling:
    """How the policy is sampled: as its run does (or as ``own`` says), but for what is asked for. It is said."""
    own = own or own_sampling(source)
    log.info("%s", policy_sampling.sentence(source, own, asked.settings, asked.top_p))
    how = measure.sampling_of(own.section.model_copy(update=asked.settings), asked.seed)
    return replace(how, top_p=asked.top_p)


def sample(
    source: str, template: str | None, records: Sequence[Prompt], samples: int, how: Sampling, where: str
) -> list[Sample]:
    """``samples`` responses to each prompt, those of one prompt together; the model is gone when this returns.

    Raises:
        RlhfError: DAT051 or DAT020 where a prompt leaves no room for the new tokens: none is dropped.
    """
    base, roles = open_policy(source, template, runtime.set_up(RuntimeSection(), how.seed))
    open_base.require_context(base.chat, 1, how.max_new_tokens, "--max-new-tokens")
    dropped = DroppedRows(where, 0.0, False, len(records))
    limit = Limit(base.context_length - how.max_new_tokens, key="")
    rows, _ = tokenised.prompt_rows(records, base.chat, limit, dropped)
    if dropped.total:
        what = f"{dropped.sentence()}: no room for {how.max_new_tokens} new ones in the model's context."
        raise RlhfError(Problem("DAT020", where, what, "shorter prompts, or fewer --max-new-tokens"))
    repeated = [row for row in rows for _ in range(samples)]
    engine = HfEngine(roles, "policy", base.chat, SamplingSection().concurrency)
    return measure.respond(engine, base.chat, repeated, how)


def is_run(source: str) -> bool:
    """Whether it is a run directory, finished or not, and no model.

    Raises:
        RlhfError: CKP001 for a path below a directory that is here, which is not: no hub is asked for it.
    """
    path = Path(source)
    if not names.exists(source) and str(path.parent) != "." and path.parent.is_dir():
        fix = f"a run or model directory; a hub id works where no directory {path.parent} stands"
        raise RlhfError(Problem("CKP001", source, "no such directory.", fix))
    return artifacts.is_finished(Path(source)) or (Path(source) / artifacts.STARTED).is_file()


def refuse_other_kinds(source: str, template: str | None) -> None:
    """Raise CKP004 for a run that is not a policy, CFG040 for a template with a run, which has its own.

    A policy that was optimised against a reward that failed its examination is named.
    """
    if not is_run(source):
        return
    manifest = artifacts.read(source, "policy")
    artifacts.verify(Path(source), manifest)
    for mark in examined.marks(manifest):
        log.warning("%s.", mark)
    if template is not None:
        what = f"{source} is a run, which says how it was trained."
        raise RlhfError(Problem("CFG040", "--chat-template", what, "leave it out"))


def open_policy(source: str, template: str | None, device: torch.device) -> tuple[Base, SharedBase]:
    """The role "policy": a finished run's, or a model directory or hub id as it is."""
    if is_run(source):
        base = open_base.reopen_base(artifacts.read(source, "policy"), device)
    else:
        base = open_base.open_base(ModelSection.model_validate({"path": source, "chat_template": template}), device)
    runtime.set_threads(RuntimeSection(), base.model, device)
    roles = SharedBase(base)
    roles.add("policy", adapter=artifacts.adapter_of(source) if is_run(source) else None, trained=False)
    return base, roles
