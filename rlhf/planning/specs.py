"""From a stage's config, the runs that it is made from and its data to what memory and time depend on."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from rlhf import artifacts, policy_sampling
from rlhf.artifacts import Manifest
from rlhf.config import recognition, rubric
from rlhf.config.rewards import RewardSource
from rlhf.config.sections import LoraSection, SamplingSection, Section
from rlhf.config.stages import CollectConfig, EvalRmConfig, PpoConfig, SftConfig, StageConfig
from rlhf.config.train_rm import RewardConfig
from rlhf.errors import Problem, RlhfError
from rlhf.planning import shape as shapes
from rlhf.planning.memory import Numbers
from rlhf.planning.phases import Spec

NO_LIMIT = 2048  # what a prompt of rlhf collect is taken to be at most where the base sets no limit
MAKERS: dict[str, type[Section]] = {"sft": SftConfig, "train-rm": RewardConfig, "ppo": PpoConfig}
WIDTH = {"float32": 4, "bfloat16": 2}
ADAPTER_CONFIG = f"{artifacts.ADAPTER}/adapter_config.json"


@dataclass(frozen=True)
class Origin:
    """The base and the adapter that a stage starts from, how that policy is sampled, and who says so."""

    source: str
    dtype: str
    quantize: str | None
    rank: int
    targets: str | tuple[str, ...]
    num_tokens: int
    said_by: str
    sampling: SamplingSection = field(default_factory=SamplingSection)


def of_sft(config: SftConfig, said_by: str) -> Origin:
    """What an SFT config makes."""
    model, lora = config.model, config.lora or LoraSection()
    targets = "all-linear" if lora.target_modules == "all-linear" else tuple(lora.target_modules)
    num_tokens = len(lora.train_tokens)
    return Origin(model.path, model.dtype, model.quantize, lora.r, targets, num_tokens, said_by, config.sampling)


def of_run(run_dir: str, manifest: Manifest) -> Origin:
    """What a finished run was made on, and the adapter that it holds.

    Raises:
        RlhfError: CKP010 where its adapter is missing or not readable.
    """
    assert manifest.base is not None, "policies and rewards have a base"
    base = manifest.base
    sampling = policy_sampling.own(manifest).section
    if artifacts.adapter_of(run_dir) is None:  # a model of its own: roles that start from it get a fresh adapter
        return Origin(base.source, base.dtype, base.quantize, LoraSection().r, "all-linear", 0, run_dir, sampling)
    path = artifacts.members_of(run_dir)[0] / ADAPTER_CONFIG
    try:
        adapter = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError):
        raise RlhfError(Problem("CKP010", str(path), "missing or not readable.", "make the run again")) from None
    tokens = adapter.get("trainable_token_indices") or []
    rows = next(iter(tokens.values()), []) if isinstance(tokens, dict) else tokens
    targets = tuple(adapter["target_modules"])
    return Origin(base.source, base.dtype, base.quantize, adapter["r"], targets, len(rows), run_dir, sampling)


def find(run_dir: str, folder: Path) -> Origin:
    """What the run ``run_dir`` is or will be made on: from its manifest, else from its config in ``folder``.

    Raises:
        RlhfError: CKP001 where neither is there.
    """
    root = root_of(run_dir, folder)
    origin = of_run(root, artifacts.read(root)) if isinstance(root, str) else of_sft(root[1], str(root[0]))
    made_by = None if root == run_dir else recognition.maker_of(run_dir, folder, MAKERS)
    return replace(origin, sampling=made_by[1].sampling) if made_by else origin


def root_of(run_dir: str, folder: Path) -> str | tuple[Path, SftConfig]:
    """What ``run_dir`` goes back to: the nearest finished run, or the SFT config in ``folder`` that will make one.

    Raises:
        RlhfError: CKP001 where a run on the way is not there, and no config in ``folder`` makes it.
    """
    seen: list[str] = []
    here: str | None = run_dir
    while here is not None and here not in seen:
        if artifacts.is_finished(Path(here)):
            return here
        seen.append(here)
        if (made_by := recognition.maker_of(here, folder, MAKERS)) is None:
            break
        path, config = made_by
        if isinstance(config, SftConfig):
            return path, config
        here = parent_of(config)
    what = f"no such run, and no config in {folder} makes it."
    raise RlhfError(Problem("CKP001", seen[-1], what, "run its stage first, or put its config next to this one"))


def started_from(config: StageConfig, parents: Mapping[str, Manifest]) -> Origin:
    """The same where every parent stands: SFT's own config, else the run that gives the base."""
    if isinstance(config, SftConfig):
        return of_sft(config, "model")
    run_dir = parent_of(config)
    assert run_dir
    if isinstance(config, EvalRmConfig):
        return of_run(run_dir, parents["reward" if config.reward else "runs.0"])
    return of_run(run_dir, parents["policy"])


def parent_of(config: StageConfig) -> str | None:
    """The run that gives a stage its base; None for SFT."""
    if isinstance(config, EvalRmConfig):
        return config.reward or (config.runs[0] if config.runs else None)
    return config.policy if isinstance(config, RewardConfig | PpoConfig | CollectConfig) else None


def spec(config: StageConfig, origin: Origin, data: Mapping[str, Sequence[Any]], device: str, where: str) -> Spec:
    """What the planner works on.

    Args:
        data: key -> rows, as far as they are known: the number of steps and the size of rankings follow from them.

    Raises:
        RlhfError: as ``planning.shape.read``; MOD051 where every weight is trained or several runs are examined, which
            is not predicted.
    """
    if isinstance(config, SftConfig | RewardConfig | PpoConfig) and config.lora is None:
        what = "null trains every weight, whose memory is not predicted."
        fix = "count 16 bytes a weight for each trained model, 4 for each frozen one, and activations"
        raise RlhfError(Problem("MOD051", "lora", what, fix))
    if isinstance(config, EvalRmConfig) and config.runs:
        what = "may be on several bases, whose memory together is not predicted."
        raise RlhfError(Problem("MOD051", "runs", what, "plan with reward: one of them, and add the weights"))
    shape = shapes.read(origin.source, where)
    held = Numbers(WIDTH[origin.dtype], origin.quantize, device == "cuda")
    common = Spec(
        _stage(config), shape, held, origin.rank, origin.targets, origin.num_tokens, device=device,
        checkpointing=config.runtime.gradient_checkpointing,
    )  # fmt: skip
    rows = data.get("data")
    if isinstance(config, SftConfig):
        return common.with_(
            micro=min(config.batch.micro_batch_size, config.batch.batch_size), batch=config.batch.batch_size,
            length=config.max_length, response=config.sampling.max_new_tokens, concurrency=config.sampling.concurrency,
            steps=_num_steps(config, rows), **_measurements(config, rows, 1),
        )  # fmt: skip
    if isinstance(config, RewardConfig):
        return _of_reward(config, common, rows)
    if isinstance(config, PpoConfig):
        return _of_ppo(config, common)
    if isinstance(config, CollectConfig):
        sampling = config.sampling.of(origin.sampling)
        return common.with_(
            prompt=max(1, (shape.context or NO_LIMIT) - sampling.max_new_tokens),
            response=sampling.max_new_tokens, concurrency=sampling.concurrency,
            num_reward_runs=_num_roles(config.labeller),
        )  # fmt: skip
    assert isinstance(config, EvalRmConfig), config
    members = len(artifacts.members_of(config.reward)) if config.reward else 1
    return common.with_(micro=config.micro_batch_size, length=config.max_length, members=members)


def _of_reward(config: RewardConfig, common: Spec, rows: Sequence[Any] | None) -> Spec:
    group = max((len(record.responses) for record in rows), default=2) if rows else 2
    return common.with_(
        micro=group * _rows(
            min(config.batch.micro_batch_size, config.batch.batch_size), config.batch.micro_batch_tokens,
            group * config.max_length,
        ), group=group,
        batch=group * config.batch.batch_size, length=config.max_length, response=config.sampling.max_new_tokens,
        concurrency=config.sampling.concurrency, members=config.members, steps=_num_steps(config, rows),
        heads=len(rubric.heads_of(config)) or 1, **_measurements(config, rows, group),
        value_rank=max((rank for rank in config.ranks if rank), default=_rank_of(config.init_from)),
    )  # fmt: skip


def _of_ppo(config: PpoConfig, common: Spec) -> Spec:
    batch, update = config.batch, config.update
    longest = config.prompts.max_tokens + config.sampling.max_new_tokens
    micro = _rows(min(batch.micro_batch_size, batch.minibatch_size), batch.micro_batch_tokens, longest)
    return common.with_(
        micro=micro, batch=batch.batch_size, epochs=update.epochs,
        minibatch=batch.minibatch_size, prompt=config.prompts.max_tokens, response=config.sampling.max_new_tokens,
        concurrency=config.sampling.concurrency, entropy=update.entropy_coef > 0, steps=config.steps,
        num_reward_runs=sum(map(_num_roles, config.rewards)), value_rank=_value_rank(config),
        trains_value=config.value.fit == "gradient", reads_reference=config.reads_reference(),
    )  # fmt: skip


def _rows(most: int, tokens: int | None, longest: int) -> int:
    """Rows of ``longest`` tokens in a micro-batch."""
    return most if tokens is None else max(1, min(most, tokens // longest))


def _stage(config: StageConfig) -> str:
    names = {
        SftConfig: "sft", RewardConfig: "train-rm", PpoConfig: "ppo", CollectConfig: "collect", EvalRmConfig: "eval-rm",
    }  # fmt: skip
    return next(name for kind, name in names.items() if isinstance(config, kind))


def _num_steps(config: SftConfig | RewardConfig, rows: Sequence[Any] | None) -> int | None:
    members = config.members if isinstance(config, RewardConfig) else 1
    if config.steps is not None or rows is None:
        return config.steps and members * config.steps
    return members * max(1, math.ceil(len(rows) * (config.epochs or 0) / config.batch.batch_size))


def _measurements(config: SftConfig | RewardConfig, rows: Sequence[Any] | None, group: int) -> dict[str, int]:
    """Held-out sequences, ``group`` of them a row, and how often they are measured during training."""
    steps, every = _num_steps(config, rows), config.evaluation.every
    if not every or not steps or rows is None:
        return {}
    members = config.members if isinstance(config, RewardConfig) else 1
    times = members * (1 + math.ceil(steps / members / every))
    return {"measured": group * max(1, round(config.holdout_fraction * len(rows))), "measurements": times}


def reward_runs(config: StageConfig) -> list[str]:
    """Every reward run that a stage's rewards, or its labeller, name."""
    sources = config.rewards if isinstance(config, PpoConfig) else []
    sources = [config.labeller] if isinstance(config, CollectConfig) else sources
    return [run for source in sources for run in _runs(source)]


def _num_roles(source: RewardSource) -> int:
    """Roles that a reward term needs: one a member of each of its runs, of one that does not stand yet one."""
    return sum(len(artifacts.members_of(run)) for run in _runs(source))


def _runs(source: RewardSource) -> list[str]:
    return source.runs or ([source.run] if source.run else [])


def _value_rank(config: PpoConfig) -> int | None:
    """The rank of the first reward run, where it stands already."""
    return _rank_of(next(iter(reward_runs(config)), None))


def _rank_of(run_dir: str | None) -> int | None:
    if run_dir is None or not artifacts.is_finished(Path(run_dir)) or artifacts.adapter_of(run_dir) is None:
        return None
    return int(json.loads((artifacts.members_of(run_dir)[0] / ADAPTER_CONFIG).read_text("utf-8"))["r"])
