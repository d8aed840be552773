"""What the RL loop does in one step, and what it carries from step to step."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from rlhf.config.ppo_sections import EvaluationSection, GuardSection, KlSection, ValueSection
from rlhf.data.batches import DataOrder
from rlhf.data.tokenised import PromptRow
from rlhf.evaluation import policy_samples as measure
from rlhf.losses import policy as objective
from rlhf.models.roles import Roles
from rlhf.rollouts.engine import Sampling
from rlhf.runs import runtime, storage
from rlhf.runs.checkpoints import BEST, Checkpoints
from rlhf.runs.progress import waiting
from rlhf.runs.run_directory import Run, plain
from rlhf.runs.snapshots import Stateful
from rlhf.runs.tracking import Tracker
from rlhf.scoring.ensemble import references_of
from rlhf.training.collector import Collector, settle
from rlhf.training.critics import Critic
from rlhf.training.experience import Experience
from rlhf.training.guards import Guard
from rlhf.training.policy_update import PolicyUpdate
from rlhf.training.standards import Standard

log = logging.getLogger("rlhf")


@dataclass
class Progress:
    """What a run carries from step to step besides roles and optimizers. Stateful.

    Args:
        num_pretrained: batches that the critic learnt from before step 1; ``pretraining`` is the outcome.
        first, last, best_figures: the evaluations at the start, at the latest and at the best step.
    """

    kl_coef: float
    step: int = 0
    num_responses: int = 0
    num_pretrained: int = 0
    pretraining: dict[str, Any] | None = None
    best_step: int = 0
    best_objective: float = float("-inf")
    first: dict[str, float] = field(default_factory=dict)
    last: dict[str, float] = field(default_factory=dict)
    best_figures: dict[str, float] = field(default_factory=dict)

    def state_dict(self) -> dict[str, Any]:
        return dict(vars(self))

    def load_state_dict(self, state: dict[str, Any]) -> None:
        vars(self).update(state)


@dataclass(frozen=True)
class TrainingSettings:
    """What the loop reads of the config.

    Args:
        prompts_per_step: of one batch.
        pretraining: of the critic, before the policy moves; None without a critic.
    """

    seed: int
    steps: int
    prompts_per_step: int
    kl: KlSection
    pretraining: ValueSection | None
    evaluation: EvaluationSection
    guards: GuardSection
    save_every: int | None
    keep_checkpoints: int


@dataclass(frozen=True)
class Prompts:
    """The prompts that are answered, and those that the policy is measured on."""

    train: Sequence[PromptRow]
    held_out: Sequence[PromptRow]


class Training:
    """What collects, what learns and what is learned from, and what is done with them in one step."""

    tracker: Tracker

    def __init__(
        self,
        run: Run,
        collector: Collector,
        policy: PolicyUpdate,
        standards: Sequence[Standard],
        prompts: Prompts,
        settings: TrainingSettings,
    ) -> None:
        self.run, self.collector, self.policy = run, collector, policy
        self.standards, self.prompts, self.settings = standards, prompts, settings
        self.order = DataOrder(len(prompts.train), settings.prompts_per_step, settings.seed)
        self.progress = Progress(settings.kl.coef)
        self.ready: tuple[Experience, dict[str, Any]] | None = None
        self.newest: dict[str, float] = {}  # figures of the newest step
        self.guard = Guard(settings.guards)
        self.saved = Checkpoints(run, self.state(), settings.save_every, settings.keep_checkpoints)

    @property
    def critic(self) -> Critic:
        return self.collector.critic

    @property
    def roles(self) -> Roles:
        return self.policy.roles

    def state(self) -> dict[str, Stateful]:
        """Everything that changes during the run."""
        return {
            "policy": self.roles.state("policy"),
            "policy_optimizer": self.policy.optimizer,
            **self.critic.state(),
            "order": self.order,
            "progress": self.progress,
            "guard": self.guard,
            "generators": runtime.Generators(),
            **{f"standards.{index}": standard.scorer for index, standard in enumerate(self.standards)},
            **{f"references.{index}": known for index, known in enumerate(references_of(self.collector.scorer))},
        }

    def record(self, step: int, values: dict[str, float]) -> None:
        self.run.write_metrics(step, values)
        self.tracker.write(step, values)

    def standardise(self) -> None:
        """Set shift and scale of the reward terms that ask for it, on answers of the policy before it moves."""
        for index, standard in enumerate(self.standards):
            standard.fit(self.collector.policy, self.prompts.train, self._sampling("standardise", index))

    def _sampling(self, *names: str | int) -> Sampling:
        """As the rollouts are sampled, with the noise of another seed."""
        return replace(self.collector.settings.sampling, seed=runtime.derived_seed(self.settings.seed, "ppo", *names))

    def roll_out(self) -> Experience:
        """Answer the next prompts with the policy as it is."""
        progress = self.progress
        rows = [self.prompts.train[index] for index in self.order.next()]
        if self.ready:
            (batch, generators), self.ready = self.ready, None
            runtime.Generators().load_state_dict(generators)
        else:
            batch = self.collector.collect(rows, progress.num_responses, progress.kl_coef)
        progress.num_responses += len(batch.samples)
        return batch

    def look_ahead(self) -> Experience:
        """What ``roll_out`` will give next; only a run that is killed in between makes it again.

        Until then all is as before, also the random numbers, which a reward may draw.
        """
        order, responses = self.order.state_dict(), self.progress.num_responses
        generators = runtime.Generators()
        before = generators.state_dict()
        batch = self.roll_out()
        self.ready = batch, generators.state_dict()
        self.order.load_state_dict(order)
        self.progress.num_responses = responses
        generators.load_state_dict(before)
        return batch

    def evaluate(self) -> dict[str, float]:
        """Measure the policy on the held-out prompts; the best one so far is written beside the checkpoints."""
        collector, progress, held_out = self.collector, self.progress, self.prompts.held_out
        rule = settle(collector.settings.missing_eos)
        with waiting(f"Measuring the policy on {len(held_out)} held-out prompts"):
            how = self._sampling("evaluation")
            outcome = measure.evaluate(collector.policy, collector.scorer, rule, held_out, how)
        self.run.write_samples(f"step-{progress.step}", outcome.rows)
        figures = outcome.metrics
        figures["eval/objective"] = figures["eval/score"] - self.settings.kl.coef * figures["eval/exact_kl_nats"]
        self.record(progress.step, figures)
        _say(progress.step, figures)
        if figures["eval/objective"] > progress.best_objective:
            progress.best_step, progress.best_objective = progress.step, figures["eval/objective"]
            progress.best_figures = dict(figures)
            save = partial(save_roles, self.roles, self.critic)
            self.saved.keep_best(f"{BEST}-{progress.best_step}", save, self.needed())
        progress.last = figures
        return figures

    def needed(self) -> tuple[str, ...]:
        """What belongs to a checkpoint beside the state: the best roles so far."""
        return (f"{BEST}-{self.progress.best_step}",) if self.progress.best_figures else ()

    def pretrain_value(self) -> None:
        """Fit the critic to one batch of the unmoved policy, or find that it explains enough of the outcomes.

        The explained variance is of a fresh batch, before the critic learns from it. The batch that ends the
        pretraining is the first that the policy learns from.
        """
        section, progress = self.settings.pretraining, self.progress
        if section is None or not section.pretrain_steps:
            progress.pretraining = {"batches": 0, "reached": False, "explained_variance": None}
            return
        limit, number = section.pretrain_steps, progress.num_pretrained
        batch = self.look_ahead()
        explained = batch.metrics["rollout/explained_variance"]
        figures = {
            name.replace("rollout/", "pretrain/"): value
            for name, value in batch.metrics.items()
            if name.startswith("rollout/explained_variance")
        }
        self.record(0, {"pretrain/batch": number, **figures})
        reached = explained >= section.min_explained_variance
        if reached or number == limit:
            progress.pretraining = {"batches": number, "reached": reached, "explained_variance": plain(explained)}
            if reached:
                log.info("Value pretraining: explained variance %.2f after %d batches.", explained, number)
            else:
                log.warning(
                    "Value pretraining ended at its limit of %d batches with explained variance %.2f, below %.2f.",
                    limit,
                    explained,
                    section.min_explained_variance,
                )
            return
        self.roll_out()
        progress.num_pretrained += 1
        if number == 0:
            self.critic.start(batch)
        else:
            self.critic.learn(batch, runtime.derived_seed(self.settings.seed, "value", number), 0)

    def step(self) -> float:
        """One rollout, its update, and where it is time to an evaluation; the seconds of the first two."""
        settings, progress, kl = self.settings, self.progress, self.settings.kl
        clock, step = time.perf_counter(), progress.step + 1
        batch = self.roll_out()
        rolled_out = time.perf_counter()
        self.guard.check(step, batch.metrics)
        seed = runtime.derived_seed(settings.seed, "ppo", "minibatches", step)
        figures = self.policy.learn(batch, seed, step, progress.kl_coef)
        figures |= self.critic.learn(batch, seed, step)
        progress.step = step
        if kl.target is not None:
            nats = batch.metrics["rollout/kl_nats"]
            progress.kl_coef = objective.adapted_coef(progress.kl_coef, nats, kl.target, kl.horizon, len(batch.samples))
        updated = time.perf_counter()
        times = {"time/rollout_s": rolled_out - clock, "time/update_s": updated - rolled_out}
        self.newest = {**batch.metrics, **figures, **times}
        self.record(step, self.newest)
        self.guard.check(step, figures)
        if step % settings.evaluation.every == 0 or step == settings.steps:
            self.evaluate()
        return updated - clock


def save_roles(roles: Roles, critic: Critic, directory: Path) -> None:
    """Policy and critic under ``directory``, whole or not at all."""
    with storage.staged_directory(directory) as staging:
        roles.save("policy", staging / "policy")
        critic.save(staging / "value")


def _say(step: int, figures: dict[str, float]) -> None:
    log.info(
        "Step %d: held-out score %.3f, exact KL %.2f nats, %.1f tokens, %.0f %% ended.",
        step,
        figures["eval/score"],
        figures["eval/exact_kl_nats"],
        figures["eval/response_tokens"],
        100 * figures["eval/end_token_rate"],
    )
