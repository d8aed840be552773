"""Reward model: an adapter and a scalar head on the frozen base, trained by Bradley-Terry on groups of responses."""

from __future__ import annotations

import importlib
import logging
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from rlhf.config import rubric
from rlhf.config.train_rm import RewardConfig
from rlhf.data import fitting, tokenised
from rlhf.data.fitting import Limit
from rlhf.data.tokenised import Group, PromptRow
from rlhf.losses.attribute_heads import Heads
from rlhf.models import open_base
from rlhf.models.base import Base
from rlhf.models.first_step import FirstStep
from rlhf.preflight.prepare import Plan
from rlhf.records import Prompt, first_share, prompt_key, split_by_prompt
from rlhf.reward import (
    annotators,
    contradicted,
    group_objective,
    head_combiner,
    member_start,
    member_turns,
    quality,
    teacher,
)
from rlhf.reward.member_step import Learner
from rlhf.reward.member_turns import Turns
from rlhf.reward.quality import RewardRoles
from rlhf.reward.teacher import Teacher
from rlhf.runs import artifacts, interrupts, runtime, storage
from rlhf.runs.artifacts import Manifest
from rlhf.runs.bars import Recent
from rlhf.runs.checkpoints import BEST, Checkpoints
from rlhf.runs.progress import bar, waiting
from rlhf.runs.run_directory import Run
from rlhf.runs.tracking import Tracker
from rlhf.scoring.open_scorer import slot_names
from rlhf.stages.registry import STAGES
from rlhf.training.held_out import METRIC, HeldOut, curves_of, state_of

log = logging.getLogger("rlhf")


def run(config: RewardConfig, plan: Plan, run: Run) -> Manifest:
    """Train on groups, measure on held-out prompts, standardise on samples of the SFT policy, write."""
    first = FirstStep(plan.spec)
    if config.rubric:
        storage.write_text(run.path / artifacts.RUBRIC, Path(config.rubric).read_text("utf-8"))
    device = runtime.set_up(config.runtime, config.seed)
    taught = teacher.learn(config.teachers, plan, plan.data["data"].records, device, config.batch.micro_batch_size)
    base = open_base.reopen_base(plan.parents["policy"], device)
    runtime.set_threads(config.runtime, base.model, device)
    rows = _rows(config, plan, base.chat)
    train, held_out, heads = rows.train, rows.held_out, rows.heads
    for line in (rows.report.sentence("Training data"), *plan.dropped_lines()):
        log.info(line)

    slots = slot_names("reward", config.members)
    roles = member_start.roles(config, plan, base, slots, heads.names if heads else None)
    learner = Learner(config, base, roles, taught, heads)
    turns = member_turns.turns(config, roles, slots, train, partial(_num_steps, config))
    curves = curves_of(config.evaluation, [member.steps for member in turns.members])
    saved = Checkpoints(run, {**turns.state(roles), **state_of(curves)}, config.save_every, config.keep_checkpoints)
    saved.resume(turns.steps)
    tracker = Tracker(run.path, config.report_to)

    def record(step: int, figures: Mapping[str, float]) -> None:
        run.write_metrics(step, figures)
        tracker.write(step, figures)

    measured = learner.measured(held_out) if curves else []
    weights = [roles.state(slot) for slot in slots] if config.use == BEST else None
    watch = HeldOut(curves, lambda index: learner.loss(slots[index], measured), weights, saved, record)
    _train(learner, turns, train, watch, saved, first)
    tracker.close()
    watch.restore()
    if curves:
        with waiting("Drawing the held-out loss"):
            importlib.import_module("rlhf.report.plots").held_out(run.path, METRIC, watch.best_points())

    rewards = RewardRoles(roles, slots, config.batch)
    combined = head_combiner.combine(config.combination, heads, rewards, base, rows.fitted) if heads else {}
    metrics, of_members = _measured(config, plan, base, rewards, rows, taught, run)
    if label := watch.label():
        log.info("These held-out figures are %s.", label)
    run.write_metrics(watch.last_step(turns.steps), metrics)
    for index, slot in enumerate(slots):
        roles.save(slot, artifacts.member_directory(run.path, index, len(slots)))
    base.tokenizer.save_pretrained(run.path / artifacts.TOKENIZER)
    return run.finish(
        Manifest(
            kind="reward",
            stage="train-rm",
            seed=config.seed,
            identity=plan.identity,
            metrics={**metrics, **runtime.peak_memory()},
            seconds=saved.seconds(),
            base=open_base.identity_of_result(run.path, plan.parents["policy"]),
            parents=plan.parents_table(STAGES["train-rm"].needs(config)),
            details={
                "rows": vars(rows.report),
                "heads": list(roles.head(slots[0]).names),
                "steps": sum(curve.last_step for curve in curves) or turns.steps,
                "prompts_held_out": len(held_out),
                "dropped": plan.dropped(),
                **watch.details(),
                **combined,
                **of_members,
                **_trained_on(config, train),
            },
        )
    )


def _train(
    learner: Learner, turns: Turns, groups: Sequence[Group], watch: HeldOut, saved: Checkpoints, first: FirstStep
) -> None:
    """The steps that are left, member by member; those behind an early stop are passed over."""
    position = turns.position
    losses = Recent()
    with interrupts.deferred(), bar("Reward", turns.steps) as shown:
        shown.begin(position.step)
        while position.step < turns.steps:
            position.step += 1
            index, member, step = turns.at(position.step)
            if watch.stopped(index):
                shown.begin(position.step)
                continue
            if step == 1:
                watch.after(index, 0)
            started = time.perf_counter()
            figures = learner.step(member, member.next(groups), position.step)
            figures |= member.length.end_of_step()
            figures |= {"train/member": index} if len(turns.members) > 1 else {}
            first.say(time.perf_counter() - started, turns.steps)
            watch.record(position.step, figures)
            watch.after(index, step)
            is_over = watch.stopped(index) or step == member.steps
            if is_over:
                turns.end_of(member)
            saved.end_of_step(position.step, watch.needed(), last=is_over and member is turns.members[-1])
            shown.advance(f"mean loss {losses.mean(figures['train/loss']):.3f}")


def _measured(
    config: RewardConfig, plan: Plan, base: Base, rewards: RewardRoles, rows: Rows, taught: Teacher | None, run: Run
) -> tuple[dict[str, float], dict[str, Any]]:
    """Figures on the held-out prompts, and what is told of members; the heads are standardised then."""
    metrics, of_members, pairs = quality.held_out(rewards, rows.held_out, config.seed, config.length_coef > 0)
    if config.train_fraction is not None:
        quality.write_comparisons(pairs, run)
    if taught and "eval/accuracy" in metrics:
        size = sum(parameter.numel() for parameter in base.model.parameters())
        of_members |= {"distilled": taught.report(rows.held_out, metrics["eval/accuracy"], size)}
    if config.contradicted:
        trained_on = member_turns.rows_of(config, rows.train)
        metrics |= contradicted.write(rewards, config.contradicted, [*rows.train, *rows.held_out], trained_on, run)
    if annotated := plan.data["data"].annotated:
        how = annotators.Unseen(base.chat, rows.limit, config.data.on_bad_row == "drop", config.seed)
        metrics |= annotators.write(rewards, annotated, rows.records, how, run)
    metrics |= quality.standardise(rewards, base, rows.sampled, config.sampling, config.seed, run)
    return metrics, of_members


def dry_run(config: RewardConfig, plan: Plan) -> list[str]:
    """Token counts and the number of steps, with the tokenizer but without weights."""
    chat = open_base.open_chat(open_base.model_of(plan.parents["policy"]))
    found = _rows(config, plan, chat)
    groups, held_out = found.train, found.held_out
    judgements = sum(len(group.judgements) for group in groups)
    rows = [len(own) for own in member_turns.rows_of(config, groups)]
    each = f", for each of {config.members} members on its own draw of the prompts" if config.members > 1 else ""
    return [
        found.report.sentence("data"),
        f"{len(groups)} prompts with {judgements} comparisons to train on, {len(held_out)} prompts held out.",
        f"{_num_steps(config, max(rows))} steps of {config.batch.batch_size} prompts{each}.",
    ]


@dataclass(frozen=True)
class Rows:
    """What a reward model is made from.

    Args:
        records: of all training prompts, also of those that ``train_fraction`` leaves out.
        fitted: what a combination of heads is fitted to; sampled: prompts that set the scores' scale.
    """

    records: Sequence[Any]
    train: list[Group]
    held_out: list[Group]
    fitted: list[Group]
    sampled: list[PromptRow]
    heads: Heads | None
    limit: Limit
    report: tokenised.LengthReport


def _rows(config: RewardConfig, plan: Plan, chat: Any) -> Rows:
    loaded = fitting.usable(plan.data["data"], chat)
    records, rest = split_by_prompt(loaded.records, config.holdout_fraction, config.seed)
    used = first_share(records, config.train_fraction, config.seed)
    measured, fitted = head_combiner.split(config.combine, config.seed, rest, used)
    heads = group_objective.heads_of(rubric.heads_of(config), config.combination, used)
    limit = Limit(config.max_length, truncates=config.too_long == "truncate")
    held_out, _ = tokenised.groups(measured, chat, limit, loaded.dropped)
    fitted_groups = tokenised.groups(fitted, chat, limit, loaded.dropped)[0] if fitted else []
    others = [*loaded.records, *loaded.left_out]
    train, report = tokenised.groups(group_objective.trained(heads, used), chat, limit, loaded.dropped, others)
    plan.check_dropped()
    tokenised.require_batch(len(train), config.batch.batch_size, "data")
    sampled = _prompts_to_sample(config, records, chat)
    return Rows(records, train, held_out, fitted_groups, sampled, heads, limit, report)


def _prompts_to_sample(config: RewardConfig, records: Sequence[Any], chat: Any) -> list[PromptRow]:
    prompts = [Prompt(record.prompt, record.where) for record in records]
    new_tokens = config.sampling.max_new_tokens
    rows = tokenised.prompts_with_room(prompts, chat, config.max_length, new_tokens, "sampling.max_new_tokens")
    return rows[: config.standardise_samples]


def _trained_on(config: RewardConfig, groups: Sequence[Group]) -> dict[str, Any]:
    """How much a share of the training data is."""
    if config.train_fraction is None:
        return {}
    prompts = {prompt_key(group.record.prompt) for group in groups}
    return {"trained": {"prompts": len(prompts), "comparisons": sum(len(group.judgements) for group in groups)}}


def _num_steps(config: RewardConfig, num_groups: int) -> int:
    return config.steps or max(1, math.ceil(num_groups * (config.epochs or 0) / config.batch.batch_size))
