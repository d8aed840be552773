"""PPO: four roles on one frozen base, a per-token KL penalty, and the best step kept beside the last."""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rlhf import artifacts, checkpoints, runtime
from rlhf.artifacts import Manifest
from rlhf.config.stages import PpoConfig
from rlhf.data import tokenised
from rlhf.data.batches import DataOrder
from rlhf.data.records import split_by_prompt
from rlhf.data.tokenised import PromptRow
from rlhf.evaluation import policy as measure
from rlhf.models import opening
from rlhf.models.base import Base
from rlhf.models.heads import ScalarHead
from rlhf.models.roles import Roles, SharedBase
from rlhf.optimizer import Optimizer
from rlhf.ppo import experience as experiences
from rlhf.ppo import objective
from rlhf.ppo.update import fit_value, update
from rlhf.preflight import Plan
from rlhf.progress import bar
from rlhf.rollouts.hf import HfEngine
from rlhf.runs import Run, plain
from rlhf.scoring.function import FunctionScorer
from rlhf.scoring.scorer import Scorer, WeightedScorer
from rlhf.scoring.shared import SharedScorer
from rlhf.stages.registry import STAGES
from rlhf.tracking import Tracker

log = logging.getLogger("rlhf")


@dataclass
class Progress:
    """What a run carries from step to step beside roles and optimizers. Stateful."""

    kl_coef: float
    step: int = 0
    num_responses: int = 0
    best_step: int = 0
    best_objective: float = float("-inf")
    best_figures: dict[str, float] = field(default_factory=dict)

    def state_dict(self) -> dict[str, Any]:
        return dict(vars(self))

    def load_state_dict(self, state: dict[str, Any]) -> None:
        vars(self).update(state)


def run(config: PpoConfig, plan: Plan, run: Run) -> Manifest:
    """Set the roles up, teach the value role, then roll out and update; write the chosen step."""
    started = time.perf_counter()
    device = runtime.set_up(config.runtime, config.seed)
    policy = plan.parents["policy"]
    base = opening.reopen_base(policy, device)
    runtime.set_threads(config.runtime, base.model, device)
    train, held_out, report = _prompts(config, plan, base.chat)
    log.info(report.sentence("Prompts"))
    _require_room(config, base, report.longest)

    roles = _roles(config, base)
    scorer = _scorer(config, roles)
    engine = HfEngine(roles, "policy", base.chat, config.sampling.concurrency)
    updates = config.update.epochs * (config.batch.batch_size // config.batch.minibatch_size)
    policy_optimizer = _optimizer(config, roles, "policy", config.optim.learning_rate, config.steps * updates)
    value_steps = (config.steps + config.value.pretrain_steps) * updates
    value_optimizer = _optimizer(config, roles, "value", config.optim.value_learning_rate, value_steps)
    order = DataOrder(len(train), config.batch.batch_size // config.samples_per_prompt, config.seed)
    progress = Progress(config.kl.coef)
    state: dict[str, checkpoints.Stateful] = {
        "policy": roles.state("policy"), "value": roles.state("value"), "policy_optimizer": policy_optimizer,
        "value_optimizer": value_optimizer, "order": order, "progress": progress,
    }  # fmt: skip
    tracker = Tracker(run.path, config.report_to)

    def record(step: int, values: dict[str, float]) -> None:
        run.write_metrics(step, values)
        tracker.write(step, values)

    def roll_out() -> experiences.Experience:
        rows = [train[index] for index in order.next()]
        seed = runtime.derived_seed(config.seed, "ppo", "rollouts")
        batch = experiences.collect(
            config, roles, engine, scorer, base, rows, seed, progress.num_responses, progress.kl_coef
        )
        progress.num_responses += len(batch.samples)
        return batch

    def evaluate() -> dict[str, float]:
        seed = runtime.derived_seed(config.seed, "ppo", "evaluation")
        outcome = measure.evaluate(
            roles, engine, scorer, experiences.settle(config.missing_eos), base.chat, held_out, config.sampling, seed,
            config.batch.micro_batch_size,
        )  # fmt: skip
        run.write_samples(f"step-{progress.step}", outcome.rows)
        figures = outcome.metrics
        figures["eval/objective"] = figures["eval/score"] - config.kl.coef * figures["eval/exact_kl_nats"]
        record(progress.step, figures)
        _say(progress.step, figures)
        if figures["eval/objective"] > progress.best_objective:
            progress.best_step, progress.best_objective = progress.step, figures["eval/objective"]
            progress.best_figures = dict(figures)
            _save_roles(roles, run.path / artifacts.CHECKPOINTS / "best")
        return figures

    first = last = evaluate()
    value_outcome = _pretrain_value(config, roles, value_optimizer, base, roll_out, record)
    with bar("PPO", config.steps) as shown:
        for step in range(1, config.steps + 1):
            clock = time.perf_counter()
            batch = roll_out()
            rolled_out = time.perf_counter()
            seed = runtime.derived_seed(config.seed, "ppo", "minibatches", step)
            figures = update(
                config, roles, policy_optimizer, value_optimizer, base, batch, seed, step, progress.kl_coef
            )
            progress.step = step
            if config.kl.target is not None:
                progress.kl_coef = objective.adapted_coef(
                    progress.kl_coef, batch.metrics["rollout/kl_nats"], config.kl.target, config.kl.horizon,
                    len(batch.samples),
                )  # fmt: skip
            figures |= {"time/rollout_s": rolled_out - clock, "time/update_s": time.perf_counter() - rolled_out}
            record(step, {**batch.metrics, **figures})
            if step % config.evaluation.every == 0 or step == config.steps:
                last = evaluate()
            if config.save_every and step % config.save_every == 0:
                checkpoints.save(run.path / artifacts.CHECKPOINTS / f"step-{step}", state)
            shown.advance(shown.task_ids[0])
    tracker.close()
    return _finish(config, plan, run, roles, base, progress, first, last, value_outcome, started)


def dry_run(config: PpoConfig, plan: Plan) -> list[str]:
    """Token counts and the work of a run, with the tokenizer but without weights."""
    chat = opening.open_chat(opening.model_of(plan.parents["policy"]))
    train, held_out, report = _prompts(config, plan, chat)
    batch, updates = config.batch, config.update.epochs * (config.batch.batch_size // config.batch.minibatch_size)
    return [
        report.sentence("prompts"),
        f"{len(train)} prompts to train on, {len(held_out)} to evaluate on.",
        f"{config.steps} steps of {batch.batch_size} responses, {updates} optimizer steps each.",
        f"at most {config.steps * batch.batch_size * config.sampling.max_new_tokens:,} tokens to sample.",
    ]


def _prompts(config: PpoConfig, plan: Plan, chat: Any) -> tuple[list[PromptRow], list[PromptRow], Any]:
    section = config.prompts
    records: Sequence[Any] = plan.data["prompts"].records
    if config.evaluation.data:
        held_out: Sequence[Any] = plan.data["evaluation.data"].records
        dropped = config.evaluation.data.max_dropped_fraction
    else:
        records, held_out = split_by_prompt(records, config.evaluation.holdout_fraction, config.seed)
        dropped = section.max_dropped_fraction
    train, report = tokenised.prompt_rows(records, chat, section.max_tokens, section.max_dropped_fraction, "prompts")
    kept, _ = tokenised.prompt_rows(held_out, chat, section.max_tokens, dropped, "evaluation")
    return train, kept[: config.evaluation.num_prompts], report


def _require_room(config: PpoConfig, base: Base, longest: int) -> None:
    opening.require_context(base, longest, config.sampling.max_new_tokens, "sampling.max_new_tokens")


def _roles(config: PpoConfig, base: Base) -> SharedBase:
    """policy, reference, one slot for each reward run, and the value role, as the table in the README has them."""
    roles = SharedBase(base)
    adapter = Path(config.policy) / artifacts.ADAPTER
    roles.add("policy", adapter=adapter, trained=True)
    roles.add("reference", adapter=adapter, trained=False)
    first: str | None = None
    for index, source in enumerate(config.rewards):
        if source.run:
            head = ScalarHead.load(Path(source.run) / artifacts.HEAD)
            roles.add(f"reward/{index}", adapter=Path(source.run) / artifacts.ADAPTER, head=head, trained=False)
            first = first or source.run
    if config.value.start == "reward" and first:
        head = ScalarHead.load(Path(first) / artifacts.HEAD).folded()
        roles.add("value", adapter=Path(first) / artifacts.ADAPTER, head=head, trained=True)
    else:
        if config.value.start == "reward":
            log.info("No reward run on this base: the value role starts from the SFT adapter with a head of zeros.")
        roles.add("value", adapter=adapter, head=ScalarHead(base.hidden_size).zero_(), trained=True)
    if config.runtime.gradient_checkpointing:
        roles.enable_gradient_checkpointing()
    return roles


def _scorer(config: PpoConfig, roles: SharedBase) -> Scorer:
    terms: list[tuple[Scorer, float]] = []
    for index, source in enumerate(config.rewards):
        if source.run:
            terms.append((SharedScorer(roles, f"reward/{index}", config.batch.micro_batch_size), source.weight))
        else:
            assert source.function
            terms.append((FunctionScorer(source.function), source.weight))
    return WeightedScorer(terms)


def _optimizer(config: PpoConfig, roles: Roles, slot: str, learning_rate: float, total_steps: int) -> Optimizer:
    return Optimizer(
        roles.trained_parameters(slot), learning_rate, total_steps, weight_decay=config.optim.weight_decay,
        warmup_ratio=config.optim.warmup_ratio, schedule=config.optim.schedule,
        max_grad_norm=config.optim.max_grad_norm,
    )  # fmt: skip


def _pretrain_value(
    config: PpoConfig, roles: Roles, optimizer: Optimizer, base: Base, roll_out: Any, record: Any
) -> dict[str, Any]:
    """Fit the value role to rollouts of the unmoved policy until it explains enough of their returns.

    The explained variance is of a fresh batch, before it is learnt from.
    """
    explained, wanted = float("nan"), config.value.min_explained_variance
    for number in range(config.value.pretrain_steps + 1):
        if not config.value.pretrain_steps:
            return {"batches": 0, "reached": False, "explained_variance": None}
        batch = roll_out()
        explained = batch.metrics["rollout/explained_variance"]
        record(0, {"pretrain/batch": number, "pretrain/explained_variance": explained})
        if explained >= wanted:
            log.info("Value pretraining: explained variance %.2f after %d batches.", explained, number)
            return {"batches": number, "reached": True, "explained_variance": explained}
        if number < config.value.pretrain_steps:
            fit_value(config, roles, optimizer, base, batch, runtime.derived_seed(config.seed, "value", number), 0)
    log.warning(
        "Value pretraining ended at its limit of %d batches with explained variance %.2f, below %.2f.",
        config.value.pretrain_steps, explained, wanted,
    )  # fmt: skip
    return {"batches": config.value.pretrain_steps, "reached": False, "explained_variance": plain(explained)}


def _say(step: int, figures: dict[str, float]) -> None:
    log.info(
        "Step %d: held-out score %.3f, exact KL %.2f nats, %.1f tokens, %.0f %% ended.", step, figures["eval/score"],
        figures["eval/exact_kl_nats"], figures["eval/response_tokens"], 100 * figures["eval/end_token_rate"],
    )  # fmt: skip


def _save_roles(roles: Roles, directory: Path) -> None:
    shutil.rmtree(directory, ignore_errors=True)
    for slot in ("policy", "value"):
        roles.save(slot, directory / slot)


def _finish(
    config: PpoConfig, plan: Plan, run: Run, roles: Roles, base: Base, progress: Progress, first: dict[str, float],
    last: dict[str, float], value_outcome: dict[str, Any], started: float,
) -> Manifest:  # fmt: skip
    _save_roles(roles, run.path / artifacts.CHECKPOINTS / "last")
    chosen = progress.best_step if config.use == "best" else progress.step
    source = run.path / artifacts.CHECKPOINTS / config.use / "policy" / artifacts.ADAPTER
    shutil.copytree(source, run.path / artifacts.ADAPTER)
    base.tokenizer.save_pretrained(run.path / artifacts.TOKENIZER)
    log.info("The %s step, %d of %d, is what downstream commands use.", config.use, chosen, progress.step)
    start = {name.replace("eval/", "start/"): value for name, value in first.items()}
    used = progress.best_figures if config.use == "best" else last
    details = {
        "use": config.use, "used_step": chosen, "best_step": progress.best_step, "last_step": progress.step,
        "value_pretraining": value_outcome, "kl_coef_at_the_end": progress.kl_coef,
    }  # fmt: skip
    return run.finish(
        Manifest(
            kind="policy", stage="ppo", seed=config.seed, identity=plan.identity,
            metrics={**start, **used, **runtime.peak_memory()}, seconds=time.perf_counter() - started,
            base=plan.parents["policy"].base, parents=plan.parents_table(STAGES["ppo"].needs(config)), details=details,
        )
    )  # fmt: skip
