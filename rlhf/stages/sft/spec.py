"""SFT without torch: what it needs, and what it takes of disk and memory."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial

from rlhf.config.stages import SftConfig
from rlhf.data import sources
from rlhf.hub.model_files import StoredTensor
from rlhf.planning import specs
from rlhf.planning.phases import Spec
from rlhf.planning.specs import Ground, Length, Origin
from rlhf.preflight import resources
from rlhf.preflight.needs import Input, Needs, Parent, Rows
from rlhf.preflight.resources import FLOAT32, WITH_MOMENTS, Written
from rlhf.runs import artifacts
from rlhf.runs.artifacts import Manifest
from rlhf.stages.contract import Stage
from rlhf.stages.sft import gates


def needs(config: SftConfig) -> Needs:
    rows = Rows(config.max_length, config.too_long == "truncate", config.loss_on == "last_turn")
    parents: tuple[Parent, ...] = ()
    directories: tuple[tuple[str, str], ...] = ()
    if config.adapter and artifacts.is_plain_adapter(config.adapter):
        directories = (("adapter", config.adapter),)
    elif config.adapter:
        parents = (Parent("adapter", config.adapter, ("policy",)),)
    return Needs(
        parents=parents,
        inputs=(Input("data", config.data, sources.load_demonstrations, rows, is_trained_on=True),),
        model=config.model,
        origin=origin(config),
        directories=directories,
        report_to=config.report_to,
        disk=partial(disk, config),
        memory=partial(memory, config),
    )


def origin(config: SftConfig) -> Origin:
    return specs.of_model(config.model, config.lora, config.sampling, "model")


def memory(config: SftConfig, ground: Ground) -> Spec:
    specs.require_adapter(config.lora)
    batch, rows = config.batch, ground.data.get("data")
    length = Length(config.steps, config.epochs, batch.batch_size)
    return ground.spec(STAGE.id, config.runtime).with_(
        micro=min(batch.micro_batch_size, batch.batch_size),
        batch=batch.batch_size,
        length=config.max_length,
        response=config.sampling.max_new_tokens,
        concurrency=config.sampling.concurrency,
        steps=length.num_steps(rows),
        **specs.measurements(length, config.evaluation, config.holdout_fraction, rows, 1),
    )


def disk(
    config: SftConfig, tensors: Mapping[str, StoredTensor], parents: Mapping[str, Manifest], num_rows: int
) -> Written:
    """What is trained as the result, and each checkpoint with the best weights so far, where these are kept."""
    if config.lora is None:
        trained = resources.whole(tensors)
    else:
        tokens = 2 * resources.hidden_size(tensors) * len(config.lora.train_tokens)
        trained = FLOAT32 * (resources.lora_parameters(tensors, config.lora.r, config.lora.target_modules) + tokens)
    num_steps = config.steps or math.ceil(num_rows * (config.epochs or 0) / config.batch.batch_size)
    num_saved = resources.num_checkpoints(num_steps, config.save_every, config.keep_checkpoints)
    largest = WITH_MOMENTS * trained
    best = trained if resources.keeps_best(config.evaluation, config.use, config.steps) else 0
    return Written(largest, trained + num_saved * (largest + best))


STAGE = Stage(
    "sft",
    SftConfig,
    "policy",
    needs,
    "Supervised fine-tuning on demonstrations.",
    origin=origin,
    gates=gates.judge,
)
