"""RL: its roles on one frozen base, a per-token KL penalty, and the best step kept next to the last."""

from __future__ import annotations

import logging
from typing import Any

from rlhf.algorithms.algorithm import algorithm_of
from rlhf.config.stages import PpoConfig
from rlhf.data import fitting, tokenised
from rlhf.data.batches import PassSize
from rlhf.data.fitting import Limit
from rlhf.data.tokenised import PromptRow
from rlhf.evaluation import policy_samples as measure
from rlhf.models import open_base
from rlhf.models.base import Base
from rlhf.models.first_step import FirstStep
from rlhf.models.roles import Roles
from rlhf.preflight import missing_ends
from rlhf.preflight.prepare import Plan
from rlhf.records import split_by_prompt
from rlhf.rollouts.open_engine import open_engine
from rlhf.runs import artifacts, interrupts, runtime, storage
from rlhf.runs.artifacts import Manifest
from rlhf.runs.checkpoints import BEST
from rlhf.runs.progress import bar, waiting
from rlhf.runs.run_directory import Run
from rlhf.runs.tracking import Tracker
from rlhf.scoring.scorer import Scorer
from rlhf.stages.ppo import roles as ppo_roles
from rlhf.stages.registry import STAGES
from rlhf.training.collector import Collector, CollectorSettings
from rlhf.training.critics import Critic
from rlhf.training.experience import Passes
from rlhf.training.loop import Prompts, Training, TrainingSettings, save_roles
from rlhf.training.policy_update import PolicySettings, PolicyUpdate

log = logging.getLogger("rlhf")


def run(config: PpoConfig, plan: Plan, run: Run) -> Manifest:
    """Measure the start, teach the critic, then roll out and update; write the chosen step.

    A checkpoint may follow each of these; a resumed run goes on with the first one that is missing.
    """
    first = FirstStep(plan.spec)
    training = _set_up(config, plan, run)
    progress, saved = training.progress, training.saved
    if saved.resume(config.steps) and config.kl.target is None:
        progress.kl_coef = config.kl.coef
    training.tracker = Tracker(run.path, config.report_to)
    with interrupts.deferred(), bar("PPO", config.steps) as shown:
        if not progress.first:
            training.standardise()
            progress.first = training.evaluate()
            saved.end_of_step(0, training.needed())
        with waiting("Teaching the critic before the policy moves"):
            while progress.pretraining is None:
                training.pretrain_value()
                saved.end_of_step(0, training.needed())
        shown.begin(progress.step)
        while progress.step < config.steps:
            first.say(training.step(), config.steps)
            saved.end_of_step(progress.step, training.needed(), last=progress.step == config.steps)
            shown.advance(_watched(training.newest))
    training.tracker.close()
    return _finish(config, plan, run, training)


def _watched(figures: dict[str, float]) -> str:
    """What the bar shows of the newest step; at ``kl.coef: 0`` there may be no KL."""
    kl = f" KL {figures['rollout/exact_kl_nats']:.2f}" if "rollout/exact_kl_nats" in figures else ""
    return f"score {figures['rollout/score']:.2f}{kl}"


def dry_run(config: PpoConfig, plan: Plan) -> list[str]:
    """Token counts and the work of a run, with the tokenizer but without weights."""
    chat = open_base.open_chat(open_base.model_of(plan.parents["policy"]))
    train, held_out, report = _prompts(config, plan, chat)
    batch, updates = config.batch, config.update.epochs * (config.batch.batch_size // config.batch.minibatch_size)
    return [
        report.sentence("prompts"),
        f"{len(train)} prompts to train on, {len(held_out)} to evaluate on.",
        f"{config.steps} steps of {batch.batch_size} responses, {updates} optimizer steps each.",
        f"at most {config.steps * batch.batch_size * config.sampling.max_new_tokens:,} tokens to sample.",
        *filter(None, [_what_is_cut(config, plan)[0]]),
    ]


def _what_is_cut(config: PpoConfig, plan: Plan) -> tuple[str, bool]:
    return missing_ends.what_is_cut(
        plan.parents["policy"], config.policy, config.missing_eos, config.sampling.max_new_tokens
    )


def _set_up(config: PpoConfig, plan: Plan, run: Run) -> Training:
    device = runtime.set_up(config.runtime, config.seed)
    base = open_base.reopen_base(plan.parents["policy"], device)
    runtime.set_threads(config.runtime, base.model, device)
    train, held_out, report = _prompts(config, plan, base.chat)
    for line in (report.sentence("Prompts"), *plan.dropped_lines()):
        log.info(line)
    said, is_warning = _what_is_cut(config, plan)
    if said:
        log.log(logging.WARNING if is_warning else logging.INFO, said)
    roles, rewards = ppo_roles.open_roles(config, plan, base)
    critic = ppo_roles.open_critic(config, plan, base, roles)
    if config.runtime.gradient_checkpointing:
        roles.enable_gradient_checkpointing()
    collector = _collector(config, base, roles, rewards.scorer, critic)
    update = PolicyUpdate(
        roles,
        ppo_roles.optimizer(config, roles, "policy", config.optim.learning_rate, config.steps),
        collector.algorithm,
        Passes(collector.policy.size, base.chat.pad_id, base.device),
        PolicySettings(
            config.update, config.batch.minibatch_size, config.sampling.temperature, config.kl.place == "loss"
        ),
    )
    settings = TrainingSettings(
        seed=config.seed,
        steps=config.steps,
        prompts_per_step=config.batch.batch_size // config.samples_per_prompt,
        kl=config.kl,
        pretraining=config.value if config.update.needs_critic else None,
        evaluation=config.evaluation,
        guards=config.guards,
        save_every=config.save_every,
        keep_checkpoints=config.keep_checkpoints,
    )
    return Training(run, collector, update, rewards.standards, Prompts(train, held_out), settings)


def _collector(config: PpoConfig, base: Base, roles: Roles, scorer: Scorer, critic: Critic) -> Collector:
    engine = open_engine(roles, "policy", base.chat, config.sampling)
    size = PassSize(config.batch.micro_batch_size, config.batch.micro_batch_tokens)
    how = measure.sampling_of(config.sampling, runtime.derived_seed(config.seed, "ppo", "rollouts"))
    return Collector(
        measure.SampledPolicy(roles, engine, base.chat, size),
        scorer,
        critic,
        algorithm_of(config.update),
        CollectorSettings(
            sampling=how,
            missing_eos=config.missing_eos,
            kl=config.kl,
            update=config.update,
            samples_per_prompt=config.samples_per_prompt,
            reads_reference=config.reads_reference(),
        ),
    )


def _prompts(config: PpoConfig, plan: Plan, chat: Any) -> tuple[list[PromptRow], list[PromptRow], Any]:
    section = config.prompts
    loaded = of_held_out = fitting.usable(plan.data["prompts"], chat)
    if config.evaluation.data:
        of_held_out = fitting.usable(plan.data["evaluation.data"], chat)
        records, held_out = list(loaded.records), list(of_held_out.records)
    else:
        records, held_out = split_by_prompt(loaded.records, config.evaluation.holdout_fraction, config.seed)
    limit = Limit(section.max_tokens, "prompts.max_tokens")
    train, report = tokenised.prompt_rows(records, chat, limit, loaded.dropped, loaded.left_out)
    kept, measured = tokenised.prompt_rows(held_out, chat, limit, of_held_out.dropped, of_held_out.left_out)
    plan.check_dropped()
    tokenised.require_batch(len(train), config.batch.batch_size // config.samples_per_prompt, "prompts")
    longest = max(report.longest, measured.longest)
    open_base.require_context(chat, longest, config.sampling.max_new_tokens, "sampling.max_new_tokens")
    return train, kept[: config.evaluation.num_prompts], report


def _finish(config: PpoConfig, plan: Plan, run: Run, training: Training) -> Manifest:
    """Write best and last, the chosen one as the run's adapter, and the manifest; the same files if done twice."""
    progress, saved = training.progress, training.saved
    best, last = saved.directory / BEST, saved.directory / "last"
    with waiting("Writing the best and the last step"):
        storage.copy_directory(saved.directory / f"{BEST}-{progress.best_step}", best)
        save_roles(training.roles, training.critic, last)
        chosen = progress.best_step if config.use == BEST else progress.step
        result = artifacts.ADAPTER if config.lora else artifacts.MODEL
        storage.copy_directory((best if config.use == BEST else last) / "policy" / result, run.path / result)
        training.collector.policy.chat.tokenizer.save_pretrained(run.path / artifacts.TOKENIZER)
    log.info("The %s step, %d of %d, is what downstream commands use.", config.use, chosen, progress.step)
    start = {name.replace("eval/", "start/"): value for name, value in progress.first.items()}
    end = {name.replace("eval/", "last/"): value for name, value in progress.last.items()}
    used = progress.best_figures if config.use == BEST else progress.last
    details = {
        "use": config.use,
        "used_step": chosen,
        "best_step": progress.best_step,
        "last_step": progress.step,
        "value_pretraining": progress.pretraining,
        "kl_coef_at_the_end": progress.kl_coef,
        "standards": [standard.scorer.state_dict() for standard in training.standards],
        "dropped": plan.dropped(),
    }
    return run.finish(
        Manifest(
            kind="policy",
            stage="ppo",
            seed=config.seed,
            identity=plan.identity,
            metrics={**start, **end, **used, **runtime.peak_memory()},
            seconds=saved.seconds(),
            base=open_base.identity_of_result(run.path, plan.parents["policy"]),
            parents=plan.parents_table(STAGES["ppo"].needs(config)),
            details=details,
        )
    )
