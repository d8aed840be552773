"""PPO: its roles on one frozen base, a per-token KL penalty, and the best step kept beside the last."""

from __future__ import annotations

import logging
from typing import Any

from rlhf import artifacts, interrupts, runtime, storage
from rlhf.artifacts import Manifest
from rlhf.checkpoints import BEST
from rlhf.config.stages import PpoConfig
from rlhf.data import fitting, tokenised
from rlhf.data.fitting import Limit
from rlhf.data.records import split_by_prompt
from rlhf.data.tokenised import PromptRow
from rlhf.evaluation import policy as measure
from rlhf.models import adapters, merged, opening
from rlhf.models.base import Base
from rlhf.models.first_step import FirstStep
from rlhf.models.heads import ScalarHead
from rlhf.models.roles import Roles, SeparateModels, SharedBase
from rlhf.optimizer import Optimizer
from rlhf.ppo.experience import Critic
from rlhf.ppo.least_squares import LeastSquares
from rlhf.ppo.training import Training, save_roles
from rlhf.ppo.value_role import ValueRole
from rlhf.preflight import Plan
from rlhf.progress import bar, waiting
from rlhf.rollouts.hf import HfEngine
from rlhf.rollouts.opening import open_engine
from rlhf.runs import Run
from rlhf.scoring.scorer import Scorer, StandardisedScorer, WeightedScorer
from rlhf.scoring.sources import Host, is_on, open_source
from rlhf.stages.registry import STAGES
from rlhf.tracking import Tracker

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
    for line in (report.sentence("Prompts"), *plan.dropped_lines()):
        log.info(line)
    roles, scorer, standardised = _roles(config, plan, base)
    engine = open_engine(roles, "policy", base.chat, config.sampling)
    optimizer = _optimizer(config, roles, "policy", config.optim.learning_rate, config.steps)
    critic = _critic(config, roles, base)
    return Training(config, run, base, roles, critic, engine, scorer, standardised, optimizer, train, held_out)


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
    opening.require_context(chat, longest, config.sampling.max_new_tokens, "sampling.max_new_tokens")
    return train, kept[: config.evaluation.num_prompts], report


def _roles(config: PpoConfig, plan: Plan, base: Base) -> tuple[Roles, Scorer, list[StandardisedScorer]]:
    """policy, reference, one slot for each reward run on this base, a value role if one is trained; and what scores.

    With adapters all of them share the base. With ``lora: null`` what is trained are models of their own, and the
    frozen roles share the base.
    """
    shared = SharedBase(base)
    if config.lora:
        start = adapters.start_of(config.policy, config.lora, base)
        shared.add("policy", adapter=start, trained=True, rank=config.lora.r)
    shared.add("reference", adapter=artifacts.adapter_of(config.policy), trained=False)
    how = measure.sampling_of(config.sampling, runtime.derived_seed(config.seed, "ppo", "references"))
    answer = measure.answering(HfEngine(shared, "reference", base.chat, config.sampling.concurrency), base.chat, how)
    terms: list[tuple[Scorer, float]] = []
    standardised: list[StandardisedScorer] = []
    for index, source in enumerate(config.rewards):
        parent, batch = plan.parents.get(f"rewards.{index}"), config.batch
        host = Host(base, shared, batch.micro_batch_size, batch.micro_batch_tokens, answer)
        scorer = open_source(source, f"reward/{index}", parent, host)
        if source.standardise_samples:
            scorer = StandardisedScorer(scorer)
            standardised.append(scorer)
        terms.append((scorer, source.weight))
    roles = _with_value(config, plan, base, shared) if config.lora else _whole(config, plan, base, shared)
    if config.runtime.gradient_checkpointing:
        roles.enable_gradient_checkpointing()
    return roles, WeightedScorer(terms), standardised


def _with_value(config: PpoConfig, plan: Plan, base: Base, shared: SharedBase) -> Roles:
    """The value role as one more adapter: a copy of a reward role's (of an ensemble's first), or a start of zeros."""
    if config.value.fit == "least_squares":
        return shared
    assert config.lora
    here = [(run, head) for run, manifest, head in _reward_runs(config, plan) if is_on(manifest, base)]
    run, name = here[0] if here and config.value.start == "reward" else (None, None)
    start = adapters.start_of(run or config.policy, config.lora, base)
    head = _value_head(run, name) if run else ScalarHead(base.hidden_size).zero_()
    if run is None and config.value.start == "reward":
        log.info("No reward run on this base: the value role starts from the SFT adapter with a head of zeros.")
    shared.add("value", adapter=start, head=head, trained=True)
    return shared


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


def _whole(config: PpoConfig, plan: Plan, base: Base, shared: SharedBase) -> Roles:
    """What is trained as models of their own, each starting as a copy of its run's model."""
    roles = SeparateModels(base.device)
    roles.adopt(shared)
    roles.add("policy", merged.copy_of(config.policy, plan.parents["policy"], base.device), trained=True)
    if config.value.fit == "least_squares":
        return roles
    for run, manifest, name in _reward_runs(config, plan) if config.value.start == "reward" else []:
        copy = merged.copy_of(run, manifest, base.device)
        if copy.chat.same_tokens(base.chat):
            roles.add("value", copy, head=_value_head(run, name), trained=True)
            return roles
    if config.value.start == "reward":
        log.info("No reward run with the policy's tokens: the value role starts from the policy with a head of zeros.")
    copy = merged.copy_of(config.policy, plan.parents["policy"], base.device)
    roles.add("value", copy, head=ScalarHead(copy.hidden_size).zero_(), trained=True)
    return roles


def _critic(config: PpoConfig, roles: Roles, base: Base) -> Critic:
    if config.value.fit == "gradient":
        if not config.reads_reference():
            log.info("kl.coef is 0: no step runs the reference; evaluations measure the KL, guards.kl_nats sees none.")
        steps = config.steps + config.value.pretrain_steps
        optimizer = _optimizer(config, roles, "value", config.optim.value_learning_rate, steps)
        return ValueRole(config, roles, base, optimizer)
    unused = config.set_for_gradients()
    if unused:
        log.info("value.fit: least_squares has no use for %s.", " and ".join(unused))
    return LeastSquares(base.hidden_size, base.device)


def _optimizer(config: PpoConfig, roles: Roles, slot: str, learning_rate: float, steps: int) -> Optimizer:
    """For so many batches."""
    total = steps * config.update.epochs * (config.batch.batch_size // config.batch.minibatch_size)
    return Optimizer(
        roles.trained_parameters(slot), learning_rate, total, weight_decay=config.optim.weight_decay,
        warmup_ratio=config.optim.warmup_ratio, schedule=config.optim.schedule,
        max_grad_norm=config.optim.max_grad_norm,
    )  # fmt: skip


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
        training.base.tokenizer.save_pretrained(run.path / artifacts.TOKENIZER)
    log.info("The %s step, %d of %d, is what downstream commands use.", config.use, chosen, progress.step)
    start = {name.replace("eval/", "start/"): value for name, value in progress.first.items()}
    end = {name.replace("eval/", "last/"): value for name, value in progress.last.items()}
    used = progress.best_figures if config.use == BEST else progress.last
    details = {
        "use": config.use, "used_step": chosen, "best_step": progress.best_step, "last_step": progress.step,
        "value_pretraining": progress.pretraining, "kl_coef_at_the_end": progress.kl_coef,
        "standards": [scorer.state_dict() for scorer in training.standardised], "dropped": plan.dropped(),
    }  # fmt: skip
    return run.finish(
        Manifest(
            kind="policy", stage="ppo", seed=config.seed, identity=plan.identity,
            metrics={**start, **end, **used, **runtime.peak_memory()}, seconds=saved.seconds(),
            base=opening.identity_of_result(run.path, plan.parents["policy"]),
            parents=plan.parents_table(STAGES["ppo"].needs(config)), details=details,
        )
    )  # fmt: skip
