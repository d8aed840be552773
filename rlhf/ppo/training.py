"""What PPO does in one step, and what it carries from step to step."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from rlhf import runtime, storage
from rlhf.checkpoints import BEST, Checkpoints
from rlhf.config.stages import PpoConfig
from rlhf.data.batches import DataOrder
from rlhf.data.tokenised import PromptRow
from rlhf.evaluation import policy as measure
from rlhf.guards import Guard
from rlhf.models.base import Base
from rlhf.models.roles import Roles
from rlhf.optimizer import Optimizer
from rlhf.ppo import experience as experiences
from rlhf.ppo import objective
from rlhf.ppo.update import update
from rlhf.progress import waiting
from rlhf.rollouts.engine import RolloutEngine
from rlhf.runs import Run, plain
from rlhf.scoring.ensemble import references_of
from rlhf.scoring.scorer import Scorer, StandardisedScorer
from rlhf.snapshots import Stateful
from rlhf.tracking import Tracker

log = logging.getLogger("rlhf")


@dataclass
class Progress:
    """What a run carries from step to step beside roles and optimizers. Stateful.

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


class Training:
    """The roles, critic, optimizer and data of a run, and what is done with them in one step.

    Args:
        train, held_out: prompts that are answered, and those that the policy is measured on.
    """

    tracker: Tracker

    def __init__(
        self, config: PpoConfig, run: Run, base: Base, roles: Roles, critic: experiences.Critic, engine: RolloutEngine,
        scorer: Scorer, standardised: Sequence[StandardisedScorer], optimizer: Optimizer, train: list[PromptRow],
        held_out: list[PromptRow],
    ) -> None:  # fmt: skip
        self.config, self.run, self.base, self.roles, self.critic = config, run, base, roles, critic
        self.engine, self.scorer, self.standardised, self.optimizer = engine, scorer, standardised, optimizer
        self.train, self.held_out = train, held_out
        self.order = DataOrder(len(train), config.batch.batch_size // config.samples_per_prompt, config.seed)
        self.progress = Progress(config.kl.coef)
        self.ready: tuple[experiences.Experience, dict[str, Any]] | None = None
        self.newest: dict[str, float] = {}  # figures of the newest step
        self.guard = Guard(config.guards)
        self.saved = Checkpoints(run, self.state(), config.save_every, config.keep_checkpoints)

    def state(self) -> dict[str, Stateful]:
        """Everything that changes during the run."""
        return {
            "policy": self.roles.state("policy"), "policy_optimizer": self.optimizer, **self.critic.state(),
            "order": self.order, "progress": self.progress, "guard": self.guard, "generators": runtime.Generators(),
            **{f"standards.{index}": scorer for index, scorer in enumerate(self.standardised)},
            **{f"references.{index}": known for index, known in enumerate(references_of(self.scorer))},
        }  # fmt: skip

    def record(self, step: int, values: dict[str, float]) -> None:
        self.run.write_metrics(step, values)
        self.tracker.write(step, values)

    def standardise(self) -> None:
        """Set shift and scale of the reward terms that ask for it, on answers of the policy before it moves."""
        sources = [source for source in self.config.rewards if source.standardise_samples]
        for index, (source, scorer) in enumerate(zip(sources, self.standardised, strict=True)):
            seed = runtime.derived_seed(self.config.seed, "ppo", "standardise", index)
            wanted = source.standardise_samples or 0
            prompts = [self.train[row % len(self.train)] for row in range(wanted)]
            with waiting(f"Setting the scale of {source.name} on {wanted} answers of the SFT policy"):
                samples = measure.respond(
                    self.engine, self.base.chat, prompts, measure.sampling_of(self.config.sampling, seed)
                )
                ended = [sample for sample in samples if sample.finished]
                scorer.fit(ended)
            log.info(
                "%s standardised on %d SFT samples (%d more were cut off): shift %.3f, scale %.3f.", source.name,
                len(ended), wanted - len(ended), scorer.shift, scorer.scale,
            )  # fmt: skip

    def roll_out(self) -> experiences.Experience:
        """Answer the next prompts with the policy as it is."""
        config, progress = self.config, self.progress
        rows = [self.train[index] for index in self.order.next()]
        seed = runtime.derived_seed(config.seed, "ppo", "rollouts")
        if self.ready:
            (batch, generators), self.ready = self.ready, None
            runtime.Generators().load_state_dict(generators)
        else:
            batch = experiences.collect(
                config, self.roles, self.critic, self.engine, self.scorer, self.base, rows, seed,
                progress.num_responses, progress.kl_coef,
            )  # fmt: skip
        progress.num_responses += len(batch.samples)
        return batch

    def look_ahead(self) -> experiences.Experience:
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
        config, progress = self.config, self.progress
        seed = runtime.derived_seed(config.seed, "ppo", "evaluation")
        with waiting(f"Measuring the policy on {len(self.held_out)} held-out prompts"):
            outcome = measure.evaluate(
                self.roles, self.engine, self.scorer, experiences.settle(config.missing_eos), self.base.chat,
                self.held_out, config.sampling, seed, config.batch.micro_batch_size, config.batch.micro_batch_tokens,
            )  # fmt: skip
        self.run.write_samples(f"step-{progress.step}", outcome.rows)
        figures = outcome.metrics
        figures["eval/objective"] = figures["eval/score"] - config.kl.coef * figures["eval/exact_kl_nats"]
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
        config, progress = self.config, self.progress
        limit, number = config.value.pretrain_steps, progress.num_pretrained
        if not limit:
            progress.pretraining = {"batches": 0, "reached": False, "explained_variance": None}
            return
        batch = self.look_ahead()
        explained = batch.metrics["rollout/explained_variance"]
        figures = {
            name.replace("rollout/", "pretrain/"): value
            for name, value in batch.metrics.items() if name.startswith("rollout/explained_variance")
        }  # fmt: skip
        self.record(0, {"pretrain/batch": number, **figures})
        reached = explained >= config.value.min_explained_variance
        if reached or number == limit:
            progress.pretraining = {"batches": number, "reached": reached, "explained_variance": plain(explained)}
            if reached:
                log.info("Value pretraining: explained variance %.2f after %d batches.", explained, number)
            else:
                log.warning(
                    "Value pretraining ended at its limit of %d batches with explained variance %.2f, below %.2f.",
                    limit, explained, config.value.min_explained_variance,
                )  # fmt: skip
            return
        self.roll_out()
        progress.num_pretrained += 1
        if number == 0:
            self.critic.start(batch)
        else:
            self.critic.learn(batch, runtime.derived_seed(config.seed, "value", number), 0)

    def step(self) -> float:
        """One rollout, its update, and where it is time to an evaluation; the seconds of the first two."""
        config, progress = self.config, self.progress
        clock, step = time.perf_counter(), progress.step + 1
        batch = self.roll_out()
        rolled_out = time.perf_counter()
        self.guard.check(step, batch.metrics)
        seed = runtime.derived_seed(config.seed, "ppo", "minibatches", step)
        figures = update(config, self.roles, self.optimizer, self.base, batch, seed, step, progress.kl_coef)
        figures |= self.critic.learn(batch, seed, step)
        progress.step = step
        if config.kl.target is not None:
            progress.kl_coef = objective.adapted_coef(
                progress.kl_coef, batch.metrics["rollout/kl_nats"], config.kl.target, config.kl.horizon,
                len(batch.samples),
            )  # fmt: skip
        updated = time.perf_counter()
        times = {"time/rollout_s": rolled_out - clock, "time/update_s": updated - rolled_out}
        self.newest = {**batch.metrics, **figures, **times}
        self.record(step, self.newest)
        self.guard.check(step, figures)
        if step % config.evaluation.every == 0 or step == config.steps:
            self.evaluate()
        return updated - clock


def save_roles(roles: Roles, critic: experiences.Critic, directory: Path) -> None:
    """Policy and critic under ``directory``, whole or not at all."""
    with storage.staged_directory(directory) as staging:
        roles.save("policy", staging / "policy")
        critic.save(staging / "value")


def _say(step: int, figures: dict[str, float]) -> None:
    log.info(
        "Step %d: held-out score %.3f, exact KL %.2f nats, %.1f tokens, %.0f %% ended.", step, figures["eval/score"],
        figures["eval/exact_kl_nats"], figures["eval/response_tokens"], 100 * figures["eval/end_token_rate"],
    )  # fmt: skip
