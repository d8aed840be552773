"""Reward training without torch: what it needs, and what it takes of disk and memory."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial

from rlhf.config import rubric
from rlhf.config.train_rm import COMBINED, RewardConfig
from rlhf.data import labels
from rlhf.hub.model_files import StoredTensor
from rlhf.planning import specs
from rlhf.planning.phases import Spec
from rlhf.planning.specs import Ground, Length
from rlhf.preflight import resources
from rlhf.preflight.needs import Input, Needs, Parent, Rows
from rlhf.preflight.origins import START
from rlhf.preflight.resources import FLOAT32, Written
from rlhf.runs import artifacts
from rlhf.runs.artifacts import Manifest
from rlhf.stages.contract import Stage


def needs(config: RewardConfig) -> Needs:
    start = (Parent(START, config.init_from, ("reward",)),) if config.init_from else ()
    teachers = [Parent(f"teachers.{index}", run, ("reward",)) for index, run in enumerate(config.teachers)]
    rows = Rows(config.max_length, config.too_long == "truncate")
    heads = rubric.heads_of(config)
    return Needs(
        parents=(Parent("policy", config.policy, ("policy",)), *start, *teachers),
        inputs=(Input("data", config.data, _reader(config, heads), rows, is_trained_on=True),),
        members=config.members,
        directories=(("rubric", config.rubric),) if config.rubric else (),
        trains_whole=config.lora is None,
        heads=tuple(heads) or (COMBINED,),
        report_to=config.report_to,
        disk=partial(disk, config),
        memory=partial(memory, config),
    )


def _reader(config: RewardConfig, heads: Mapping[str, float]) -> labels.ForReward:
    annotators = config.hold_out_annotators or ()
    return labels.ForReward(config.objective, config.combination, heads, config.consensus, annotators)


def parent(config: RewardConfig) -> str:
    return config.policy


def memory(config: RewardConfig, ground: Ground) -> Spec:
    specs.require_adapter(config.lora)
    common, rows, batch = ground.spec(STAGE.id, config.runtime), ground.data.get("data"), config.batch
    group = max((len(record.responses) for record in rows), default=2) if rows else 2
    most = min(batch.micro_batch_size, batch.batch_size)
    length = Length(config.steps, config.epochs, batch.batch_size, config.members)
    return common.with_(
        micro=group * specs.rows_a_pass(most, batch.micro_batch_tokens, group * config.max_length),
        group=group,
        batch=group * batch.batch_size,
        length=config.max_length,
        response=config.sampling.max_new_tokens,
        concurrency=config.sampling.concurrency,
        members=config.members,
        steps=length.num_steps(rows),
        heads=len(rubric.heads_of(config)) or 1,
        value_rank=max((rank for rank in config.ranks if rank), default=specs.rank_of(config.init_from)),
        **specs.measurements(length, config.evaluation, config.holdout_fraction, rows, group),
    )


def assumed(config: RewardConfig, spec: Spec, read: Sequence[str]) -> list[str]:
    said = [] if "data" in read else ["two responses a prompt"]
    if config.teachers:
        said.append("teachers are no larger than the base: each is loaded alone, before it")
    return said


def disk(
    config: RewardConfig, tensors: Mapping[str, StoredTensor], parents: Mapping[str, Manifest], num_rows: int
) -> Written:
    """Every member, its checkpoints, and the best weights of each where these are kept."""
    head = FLOAT32 * (resources.hidden_size(tensors) + 1)
    start = config.init_from or config.policy
    slot = resources.slot(tensors, parents[START if config.init_from else "policy"], config.lora is None) + head
    own = (specs.rank_of(start) or 0) if config.lora and artifacts.adapter_of(start) else 0
    members = [math.ceil(slot * rank / own) if rank and own else slot for rank in config.ranks]
    num_steps = config.steps or math.ceil(num_rows * (config.epochs or 0) / config.batch.batch_size)
    num_saved = resources.num_checkpoints(num_steps, config.save_every, config.keep_checkpoints)
    largest = sum(members) + 2 * max(members)
    # of members that are trained already the best weights stay the same, from one checkpoint to the next
    keeps_best = resources.keeps_best(config.evaluation, config.use, config.steps)
    best = sum(members) + (num_saved - 1) * max(members) if keeps_best else 0
    return Written(largest, sum(members) + best + num_saved * largest)


STAGE = Stage(
    "train-rm",
    RewardConfig,
    "reward",
    needs,
    "Train a reward model on comparisons.",
    parent=parent,
    assumed=assumed,
)
