"""PPO without torch: what it needs, what it takes of disk and memory, and how its guards judge a finished run."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

from rlhf.config.ppo_sections import GuardSection, Limit
from rlhf.config.stages import PpoConfig
from rlhf.data import sources
from rlhf.errors import Problem, RlhfError
from rlhf.hub.model_files import StoredTensor
from rlhf.limits import FEATURES
from rlhf.planning import specs
from rlhf.planning.phases import Spec
from rlhf.planning.specs import Ground
from rlhf.preflight import resources
from rlhf.preflight.needs import Input, Needs, Parent, Rows
from rlhf.preflight.resources import FLOAT32, WITH_MOMENTS, Written
from rlhf.runs import artifacts, run_directory
from rlhf.runs.artifacts import Manifest
from rlhf.stages.contract import Stage
from rlhf.stages.reward_terms import calibrations, classifiers, examinations, reward_runs
from rlhf.training.guards import Guard

log = logging.getLogger("rlhf")


def needs(config: PpoConfig) -> Needs:
    rewards = {f"rewards.{index}": source for index, source in enumerate(config.rewards)}
    read, rows = sources.load_prompts, Rows(config.prompts.max_tokens)
    inputs = [Input("prompts", config.prompts, read, rows, is_trained_on=True)]
    if config.evaluation.data:
        inputs.append(Input("evaluation.data", config.evaluation.data, read, held_out_from=("ppo", "prompts")))
    policy = Parent("policy", config.policy, ("policy",))
    return Needs(
        parents=(policy, *reward_runs(rewards), *examinations(rewards), *calibrations(rewards)),
        inputs=tuple(inputs),
        scorers=classifiers(rewards),
        rewards=rewards,
        report_to=config.report_to,
        disk=partial(disk, config),
        memory=partial(memory, config),
    )


def parent(config: PpoConfig) -> str:
    return config.policy


def memory(config: PpoConfig, ground: Ground) -> Spec:
    specs.require_adapter(config.lora)
    batch, update, sampling = config.batch, config.update, config.sampling
    most = min(batch.micro_batch_size, batch.minibatch_size)
    longest = config.prompts.max_tokens + sampling.max_new_tokens
    named = _named_runs(config)
    return ground.spec(STAGE.id, config.runtime).with_(
        micro=specs.rows_a_pass(most, batch.micro_batch_tokens, longest),
        batch=batch.batch_size,
        epochs=update.epochs,
        minibatch=batch.minibatch_size,
        prompt=config.prompts.max_tokens,
        response=sampling.max_new_tokens,
        concurrency=sampling.concurrency,
        entropy=update.entropy_coef > 0,
        steps=config.steps,
        num_reward_runs=specs.num_roles(named),
        value_rank=specs.rank_of(next(iter(named), None)),  # that of the first reward run, where it stands already
        trains_value=config.value.fit == "gradient",
        reads_reference=config.reads_reference(),
    )


def assumed(config: PpoConfig, spec: Spec, read: Sequence[str]) -> list[str]:
    said = specs.unmade(_named_runs(config))
    if spec.value_rank is None:
        who = "reward and value roles" if spec.trains_value else "reward roles"
        said.append(f"{who} of the policy's rank, {spec.rank}")
    return said


def _named_runs(config: PpoConfig) -> list[str]:
    return [run for source in config.rewards for run in source.named_runs]


def disk(
    config: PpoConfig, tensors: Mapping[str, StoredTensor], parents: Mapping[str, Manifest], num_rows: int
) -> Written:
    """The policy, the critic or value role, their best and last step, and the checkpoints."""
    hidden, trains_whole = resources.hidden_size(tensors), config.lora is None
    policy = resources.slot(tensors, parents["policy"], trains_whole)
    critic, role = FLOAT32 * FEATURES * hidden, 0
    if config.value.fit == "gradient":
        rewards = [run for key, run in parents.items() if key.startswith("rewards.") and run.kind == "reward"]
        start = rewards[0] if rewards and config.value.start == "reward" else parents["policy"]
        critic, role = 0, resources.slot(tensors, start, trains_whole) + FLOAT32 * (hidden + 1)
    num_saved = resources.num_checkpoints(config.steps, config.save_every, config.keep_checkpoints)
    largest, saved = WITH_MOMENTS * (policy + role) + critic, policy + role + critic
    # the result, best and last, and the best roles so far that belong to each checkpoint
    return Written(largest, policy + (2 + num_saved) * saved + num_saved * largest)


def gates(config: PpoConfig, manifest: Manifest) -> list[Problem]:
    """GRD020 where a guard would have stopped the run, by the figures of its steps in metrics.jsonl."""
    stops = _only_stops(config.guards)
    guard, rows = Guard(stops), run_directory.read_metrics(Path(config.run_dir))
    if not rows and stops != _only_stops(GuardSection()):
        log.warning("%s has no %s: its guards are not judged.", config.run_dir, artifacts.METRICS)
    try:
        for row in rows:
            guard.check(row["step"], {name: float(value) for name, value in row.items() if name != "step"})
    except RlhfError as error:
        fix = "a larger limit; or train again with a larger kl.coef or a lower learning rate"
        return [Problem(problem.code, problem.where, problem.what, fix) for problem in error.problems]
    return []


def _only_stops(section: GuardSection) -> GuardSection:
    """The same without warnings, which were given when the steps were made."""
    return section.model_copy(update={name: Limit(stop=limit.stop) for name, limit in section.limits.items()})


STAGE = Stage(
    "ppo",
    PpoConfig,
    "policy",
    needs,
    "PPO with a KL penalty against the SFT reference.",
    parent=parent,
    assumed=assumed,
    gates=gates,
    optimises=True,
)
