"""PPO: four roles on one frozen base, a per-token KL penalty, and the best step kept beside the last."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rlhf import artifacts, interrupts, runtime, storage
from rlhf.artifacts import Manifest
from rlhf.checkpoints import BEST
from rlhf.config.stages import PpoConfig
from rlhf.data import tokenised
from rlhf.data.records import split_by_prompt
from rlhf.data.tokenised import PromptRow
from rlhf.models import opening
from rlhf.models.base import Base
from rlhf.models.heads import ScalarHead
from rlhf.models.roles import Roles, SharedBase
from rlhf.optimizer import Optimizer
from rlhf.ppo.training import Training, save_roles
from rlhf.preflight import Plan
from rlhf.progress import bar
from rlhf.rollouts.hf import HfEngine
from rlhf.runs import Run
from rlhf.scoring.function import FunctionScorer
from rlhf.scoring.scorer import Scorer, WeightedScorer
from rlhf.scoring.shared import SharedScorer
from rlhf.stages.registry import STAGES
from rlhf.tracking import Tracker

log = logging.getLogger("rlhf")


def run(config: PpoConfig, plan: Plan, run: Run) -> Manifest:
    """Measure the start, teach the value role, then roll out and update; write the chosen step.

    A checkpoint may follow each of these; a resumed run goes on with the first one that is missing.
    """
    watch = runtime.MemoryWatch(plan.memory)
    training = _set_up(config, plan, run)
    progress, saved = training.progress, training.saved
    if saved.resume(config.steps) and config.kl.target is None:
        progress.kl_coef = config.kl.coef
    training.tracker = Tracker(run.path, config.report_to, progress.step)
    with interrupts.deferred(), bar("PPO", config.steps) as shown:
        if not progress.first:
            progress.first = training.evaluate()
            saved.end_of_step(0, training.needed())
        while progress.pretraining is None:
            training.pretrain_value()
            saved.end_of_step(0, training.needed())
        shown.advance(shown.task_ids[0], progress.step)
        while progress.step < config.steps:
            training.step()
            watch.say()
            saved.end_of_step(progress.step, training.needed(), last=progress.step == config.steps)
            shown.advance(shown.task_ids[0])
    training.tracker.close()
    return _finish(config, plan, run, training)


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


def _set_up(config: PpoConfig, plan: Plan, run: Run) -> Training:
    device = runtime.set_up(config.runtime, config.seed)
    base = opening.reopen_base(plan.parents["policy"], device)
    runtime.set_threads(config.runtime, base.model, device)
    train, held_out, report = _prompts(config, plan, base.chat)
    log.info(report.sentence("Prompts"))
    roles = _roles(config, base)
    engine = HfEngine(roles, "policy", base.chat, config.sampling.concurrency)
    updates = config.update.epochs * (config.batch.batch_size // config.batch.minibatch_size)
    policy_steps, value_steps = config.steps * updates, (config.steps + config.value.pretrain_steps) * updates
    return Training(
        config, run, base, roles, engine, _scorer(config, roles),
        _optimizer(config, roles, "policy", config.optim.learning_rate, policy_steps),
        _optimizer(config, roles, "value", config.optim.value_learning_rate, value_steps), train, held_out,
    )  # fmt: skip


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
    kept, measured = tokenised.prompt_rows(held_out, chat, section.max_tokens, dropped, "evaluation")
    tokenised.require_batch(len(train), config.batch.batch_size // config.samples_per_prompt, "prompts")
    longest = max(report.longest, measured.longest)
    opening.require_context(chat, longest, config.sampling.max_new_tokens, "sampling.max_new_tokens")
    return train, kept[: config.evaluation.num_prompts], report


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


def _finish(config: PpoConfig, plan: Plan, run: Run, training: Training) -> Manifest:
    """Write best and last, the chosen one as the run's adapter, and the manifest; the same files if done twice."""
    progress, saved = training.progress, training.saved
    best, last = saved.directory / BEST, saved.directory / "last"
    storage.copy_directory(saved.directory / f"{BEST}-{progress.best_step}", best)
    save_roles(training.roles, last)
    chosen = progress.best_step if config.use == BEST else progress.step
    storage.copy_directory(
        (best if config.use == BEST else last) / "policy" / artifacts.ADAPTER, run.path / artifacts.ADAPTER
    )
    training.base.tokenizer.save_pretrained(run.path / artifacts.TOKENIZER)
    log.info("The %s step, %d of %d, is what downstream commands use.", config.use, chosen, progress.step)
    start = {name.replace("eval/", "start/"): value for name, value in progress.first.items()}
    end = {name.replace("eval/", "last/"): value for name, value in progress.last.items()}
    used = progress.best_figures if config.use == BEST else progress.last
    details = {
        "use": config.use, "used_step": chosen, "best_step": progress.best_step, "last_step": progress.step,
        "value_pretraining": progress.pretraining, "kl_coef_at_the_end": progress.kl_coef,
    }  # fmt: skip
    return run.finish(
        Manifest(
            kind="policy", stage="ppo", seed=config.seed, identity=plan.identity,
            metrics={**start, **end, **used, **runtime.peak_memory()}, seconds=saved.seconds(),
            base=plan.parents["policy"].base, parents=plan.parents_table(STAGES["ppo"].needs(config)), details=details,
        )
    )  # fmt: skip
