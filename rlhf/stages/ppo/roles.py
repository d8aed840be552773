"""The roles of an RL run: policy, reference, what scores, and the critic that the config asks for."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass

from rlhf.config.rewards import term_names
from rlhf.config.stages import PpoConfig
from rlhf.data.batches import PassSize
from rlhf.evaluation import policy_samples as measure
from rlhf.models import adapters, merged
from rlhf.models.base import Base
from rlhf.models.heads import ScalarHead
from rlhf.models.roles import Roles, SeparateModels, SharedBase
from rlhf.preflight.prepare import Plan
from rlhf.rollouts.hf import HfEngine
from rlhf.runs import artifacts, runtime
from rlhf.runs.artifacts import Manifest
from rlhf.scoring.open_scorer import Host, is_on, open_source
from rlhf.scoring.scorer import Scorer, StandardisedScorer, WeightedScorer
from rlhf.stages.registry import STAGES
from rlhf.training.critics import Critic, NoCritic
from rlhf.training.experience import Passes
from rlhf.training.optimizer import Optimizer
from rlhf.training.solved_critic import LeastSquares
from rlhf.training.standards import Standard
from rlhf.training.trained_critic import ValueRole, ValueSettings

log = logging.getLogger("rlhf")


@dataclass(frozen=True)
class Rewards:
    """What scores: the weighted sum of the terms, and those of them whose scale is set before step 1."""

    scorer: Scorer
    standards: list[Standard]


def open_roles(config: PpoConfig, plan: Plan, base: Base) -> tuple[Roles, Rewards]:
    """policy, reference, and one slot for each reward run on this base.

    With adapters all of them share the base. With ``lora: null`` the policy is a model of its own, and the frozen roles
    share the base.
    """
    shared = SharedBase(base)
    if config.lora:
        start = adapters.start_of(config.policy, config.lora, base)
        shared.add("policy", adapter=start, trained=True, rank=config.lora.r)
    shared.add("reference", adapter=artifacts.adapter_of(config.policy), trained=False)
    rewards = _open_rewards(config, plan, shared)
    if config.lora:
        return shared, rewards
    roles = SeparateModels(base.device)
    roles.adopt(shared)
    roles.add("policy", merged.copy_of(config.policy, plan.parents["policy"], base.device), trained=True)
    return roles, rewards


def _open_rewards(config: PpoConfig, plan: Plan, shared: SharedBase) -> Rewards:
    base = shared.base
    size = PassSize(config.batch.micro_batch_size, config.batch.micro_batch_tokens)
    how = measure.sampling_of(config.sampling, runtime.derived_seed(config.seed, "ppo", "references"))
    answer = measure.answering(HfEngine(shared, "reference", base.chat, config.sampling.concurrency), base.chat, how)
    terms: list[tuple[Scorer, float]] = []
    standards: list[Standard] = []
    host = Host(base, shared, size, answer)
    for index, source in enumerate(config.rewards):
        scorer = open_source(source, f"reward/{index}", plan.parents.get(f"rewards.{index}"), host)
        if source.standardise_samples:
            scorer = StandardisedScorer(scorer)
            standards.append(Standard(source.name, source.standardise_samples, scorer))
        terms.append((scorer, source.weight))
    return Rewards(WeightedScorer(terms, term_names(config.rewards)), standards)


def open_critic(config: PpoConfig, plan: Plan, base: Base, roles: Roles) -> Critic:
    """The critic of ``value``, or none where the algorithm needs none."""
    return CRITICS[config.critic](config, plan, base, roles)


def _no_critic(config: PpoConfig, plan: Plan, base: Base, roles: Roles) -> Critic:
    return NoCritic()


def _solved(config: PpoConfig, plan: Plan, base: Base, roles: Roles) -> Critic:
    unused = config.set_for_gradients()
    if unused:
        log.info("value.fit: least_squares has no use for %s.", " and ".join(unused))
    return LeastSquares(base.hidden_size, base.device)


def _trained(config: PpoConfig, plan: Plan, base: Base, roles: Roles) -> Critic:
    """The role "value", with its optimizer."""
    if isinstance(roles, SharedBase):
        _add_value_adapter(config, plan, roles)
    else:
        assert isinstance(roles, SeparateModels)
        _add_value_model(config, plan, base, roles)
    if not config.reads_reference():
        log.info("kl.coef is 0: no step runs the reference; evaluations measure the KL, guards.kl_nats sees none.")
    batch, update = config.batch, config.update
    size = PassSize(batch.micro_batch_size, batch.micro_batch_tokens)
    return ValueRole(
        roles,
        optimizer(config, roles, "value", config.optim.value_learning_rate, config.steps + config.value.pretrain_steps),
        Passes(size, base.chat.pad_id, base.device),
        ValueSettings(update.epochs, batch.minibatch_size, update.value_clip_range),
    )


CRITICS: dict[str, Callable[[PpoConfig, Plan, Base, Roles], Critic]] = {
    "none": _no_critic,
    "least_squares": _solved,
    "gradient": _trained,
}


def _add_value_adapter(config: PpoConfig, plan: Plan, shared: SharedBase) -> None:
    """One more adapter: a copy of a reward role's (of an ensemble's first), or the policy's with a head of zeros."""
    base = shared.base
    assert config.lora
    here = [(run, head) for run, manifest, head in _reward_runs(config, plan) if is_on(manifest, base)]
    run, name = here[0] if here and config.value.start == "reward" else (None, None)
    start = adapters.start_of(run or config.policy, config.lora, base)
    head = _value_head(run, name) if run else ScalarHead(base.hidden_size).zero_()
    if run is None and config.value.start == "reward":
        log.info("No reward run on this base: the value role starts from the SFT adapter with a head of zeros.")
    shared.add("value", adapter=start, head=head, trained=True)


def _add_value_model(config: PpoConfig, plan: Plan, base: Base, roles: SeparateModels) -> None:
    """One more model: a copy of a reward run's that reads the policy's tokens, or the policy's with a head of zeros."""
    for run, manifest, name in _reward_runs(config, plan) if config.value.start == "reward" else []:
        copy = merged.copy_of(run, manifest, base.device)
        if copy.chat.same_tokens(base.chat):
            roles.add("value", copy, head=_value_head(run, name), trained=True)
            return
    if config.value.start == "reward":
        log.info("No reward run with the policy's tokens: the value role starts from the policy with a head of zeros.")
    copy = merged.copy_of(config.policy, plan.parents["policy"], base.device)
    roles.add("value", copy, head=ScalarHead(copy.hidden_size).zero_(), trained=True)


def _value_head(run: str, name: str | None) -> ScalarHead:
    """What the value role begins with: the number of a reward run that scores, on the scale of the scores."""
    head = ScalarHead.load(artifacts.head_of(run))
    return head.only((name or head.names[0],)).folded()


def _reward_runs(config: PpoConfig, plan: Plan) -> list[tuple[str, Manifest, str | None]]:
    """Every reward run, its manifest and the head that scores, in the order in which the config names them."""
    parents = [parent for parent in STAGES["ppo"].needs(config).parents if parent.kinds == ("reward",)]
    return [
        (parent.run_dir, plan.parents[parent.key], config.rewards[int(parent.key.split(".")[1])].head)
        for parent in parents
    ]


def optimizer(config: PpoConfig, roles: Roles, slot: str, learning_rate: float, num_batches: int) -> Optimizer:
    """Of a trained role that learns from so many batches."""
    section, batch = config.optim, config.batch
    return Optimizer(
        roles.trained_parameters(slot),
        learning_rate,
        num_batches * config.update.epochs * (batch.batch_size // batch.minibatch_size),
        weight_decay=section.weight_decay,
        warmup_ratio=section.warmup_ratio,
        schedule=section.schedule,
        max_grad_norm=section.max_grad_norm,
    )
