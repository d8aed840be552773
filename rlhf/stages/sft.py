"""Supervised fine-tuning with TRL's SFTTrainer, an adapter on the frozen base or every weight; loss on responses."""

from __future__ import annotations

import gc
import logging
import math
import time
from typing import Any

import torch
from datasets import Dataset, disable_progress_bars
from peft import get_peft_model
from peft.utils.other import TrainableTokensWrapper
from transformers import TrainerCallback
from trl import SFTConfig

from rlhf import artifacts, interrupts, runtime
from rlhf.artifacts import Manifest
from rlhf.checkpoints import Checkpoints
from rlhf.config.stages import SftConfig
from rlhf.data import fitting, tokenised
from rlhf.data.fitting import Limit
from rlhf.data.records import Demonstration, Prompt, split_by_prompt
from rlhf.data.tokenised import Dialogue, LengthReport, PromptRow
from rlhf.errors import Problem, RlhfError
from rlhf.evaluation import policy as measure
from rlhf.evaluation import stopping
from rlhf.models import adapters, fused_lora, opening, whole
from rlhf.models.base import Base
from rlhf.models.first_step import FirstStep
from rlhf.models.roles import SharedBase
from rlhf.preflight import Plan
from rlhf.progress import bar
from rlhf.rollouts.opening import open_engine
from rlhf.runs import Run
from rlhf.stages.registry import STAGES
from rlhf.stages.sft_trainer import ResumableTrainer
from rlhf.tracking import Tracker

log = logging.getLogger("rlhf")


def run(config: SftConfig, plan: Plan, run: Run) -> Manifest:
    """Train the adapter, measure what was written, and refuse a model that does not learn to stop."""
    first = FirstStep(plan.spec)
    device = runtime.set_up(config.runtime, config.seed)
    base = opening.open_base(config.model, device)
    runtime.set_threads(config.runtime, base.model, device)
    stopping.warn_of_untrained_end(base, _trained_tokens(config, base))
    held_out, rows, report = _rows(config, plan, base.chat)
    sampled = _prompts_to_sample(config, held_out, base.chat)
    for line in (report.sentence("Training data"), *plan.dropped_lines()):
        log.info(line)

    model = _model(config, base)
    steps = _num_steps(config, len(rows))
    trainer = _trainer(config, model, base, rows, run) if steps else None
    saved = Checkpoints(run, trainer.parts() if trainer else {}, config.save_every, config.keep_checkpoints)
    saved.resume(steps)
    if trainer:
        _train(config, trainer, saved, run, first)
    else:
        log.info(
            "No steps: the model is taken as it is, with an adapter that adds nothing."
            if config.lora
            else "No steps: the model is taken as it is."
        )
    if config.lora:
        adapters.save(model, "default", run.path / artifacts.ADAPTER)
    else:
        whole.save(model, base.tokenizer, run.path / artifacts.MODEL)
    base.tokenizer.save_pretrained(run.path / artifacts.TOKENIZER)
    train_seconds = saved.seconds()
    del trainer, model, saved.state, base
    gc.collect()  # trainer and model refer to one another, and two bases would stand at once

    # The rest measures the artifact as every later stage will load it, on a base that TRL has not touched.
    base = opening.open_base(config.model, device)
    before = _held_out_loss(config, SharedBase(base), "base", base, held_out)
    trained_on = config.model
    if not config.lora:
        trained_on = config.model.model_copy(update={"path": str(run.path / artifacts.MODEL), "revision": None})
        base = opening.open_base(trained_on, device)
    metrics = _measure(config, base, before, held_out, sampled, report.num_truncated, run)
    metrics |= {"time/train_s": train_seconds, **runtime.peak_memory()}
    run.write_metrics(config.steps or 0, metrics)
    return run.finish(
        Manifest(
            kind="policy", stage="sft", seed=config.seed, identity=plan.identity, metrics=metrics,
            seconds=saved.seconds(), base=opening.identity_of(base, trained_on),
            parents=plan.parents_table(STAGES["sft"].needs(config)),
            details={"rows": vars(report), "prompts_held_out": len(held_out), "dropped": plan.dropped()},
        )
    )  # fmt: skip


def _train(config: SftConfig, trainer: ResumableTrainer, saved: Checkpoints, run: Run, first: FirstStep) -> None:
    """To the end, from the step that a resumed run goes on with."""
    trainer.save_step = saved.end_of_step
    tracker = Tracker(run.path, config.report_to)
    trainer.add_callback(_Record(run, tracker))
    with interrupts.deferred(), bar("SFT", trainer.args.max_steps) as progress:
        progress.advance(progress.task_ids[0], trainer.restored_step)
        trainer.add_callback(_Advance(progress, first))
        trainer.train_from_here()
    tracker.close()


def dry_run(config: SftConfig, plan: Plan) -> list[str]:
    """Token counts and the number of steps, with the tokenizer but without weights."""
    chat = opening.open_chat(config.model)
    held_out, rows, report = _rows(config, plan, chat)
    _prompts_to_sample(config, held_out, chat)
    steps = _num_steps(config, len(rows))
    return [report.sentence("data"), f"held out: {len(held_out)} rows.", f"{steps} steps of {config.batch.batch_size}."]


def _rows(config: SftConfig, plan: Plan, chat: Any) -> tuple[list[Demonstration], list[Dialogue], LengthReport]:
    """Rows held out, and the others as ids."""
    loaded = fitting.usable(plan.data["data"], chat)
    train, held_out = split_by_prompt(loaded.records, config.holdout_fraction, config.seed)
    limit = Limit(config.max_length, truncates=config.too_long == "truncate")
    others = [*held_out, *loaded.left_out]
    last_only = config.loss_on == "last_turn"
    rows, report = tokenised.dialogues(train, chat, last_only, limit, loaded.dropped, others)
    plan.check_dropped()
    tokenised.require_batch(len(rows), config.batch.batch_size, "data")
    return held_out, rows, report


def _prompts_to_sample(config: SftConfig, held_out: Any, chat: Any) -> list[PromptRow]:
    prompts = [Prompt(record.messages[:-1], record.where) for record in held_out]
    new_tokens = config.sampling.max_new_tokens
    rows = tokenised.prompts_with_room(prompts, chat, config.max_length, new_tokens, "sampling.max_new_tokens")
    return rows[: config.end_token_samples]


def _num_steps(config: SftConfig, num_rows: int) -> int:
    if config.steps is not None:
        return config.steps
    return max(1, math.ceil(num_rows * (config.epochs or 0) / config.batch.batch_size))


def _model(config: SftConfig, base: Base) -> Any:
    """What is trained: a fresh adapter, one that was made before, or every weight."""
    if config.lora is None:
        return base.model.requires_grad_(True)
    if config.adapter is None:
        model = get_peft_model(base.model, adapters.fresh_lora(config.lora, base.model, base.tokenizer))
    else:
        settings, state = adapters.read(adapters.directory_of(config.adapter))
        rank = config.lora.r if "r" in config.lora.model_fields_set else settings.r
        settings, state = adapters.grow(settings, state, rank)
        settings.lora_dropout = config.lora.dropout
        try:
            model = get_peft_model(base.model, settings)
            adapters.load(model, "default", state)
        except (RuntimeError, ValueError, AssertionError) as error:
            what = f"{config.adapter} does not fit {config.model.path}: {' '.join(str(error).split())[:160]}"
            raise RlhfError(Problem("MOD032", "adapter", what, "the model that it was made on")) from None
    fused_lora.install(base.model)
    return model


def _trainer(config: SftConfig, model: Any, base: Base, rows: list[Dialogue], run: Run) -> ResumableTrainer:
    """TRL's trainer with every argument set that this stage relies upon."""
    for module in model.modules():
        if isinstance(module, TrainableTokensWrapper):
            module.bias = None  # the fused LM head asks for it
    base.tokenizer.pad_token = base.chat.pad_token
    disable_progress_bars()
    dataset = Dataset.from_dict(
        {
            "input_ids": [row.ids for row in rows],
            "labels": [[i if keep else -100 for i, keep in zip(row.ids, row.trained, strict=True)] for row in rows],
        }
    )
    micro = min(config.batch.micro_batch_size, config.batch.batch_size)
    arguments = SFTConfig(
        output_dir=str(run.path / artifacts.CHECKPOINTS), max_length=config.max_length, packing=config.packing,
        per_device_train_batch_size=micro, gradient_accumulation_steps=config.batch.batch_size // micro,
        max_steps=_num_steps(config, len(rows)), learning_rate=config.optim.learning_rate,
        weight_decay=config.optim.weight_decay, warmup_steps=config.optim.warmup_ratio,
        lr_scheduler_type=config.optim.schedule, max_grad_norm=config.optim.max_grad_norm,
        seed=config.seed, data_seed=config.seed, bf16=False, fp16=False, use_cpu=base.device.type == "cpu",
        activation_checkpointing=config.runtime.gradient_checkpointing,
        activation_checkpointing_kwargs={"use_reentrant": False},
        logging_steps=1, logging_nan_inf_filter=False, save_strategy="no", report_to=[], disable_tqdm=True,
        train_sampling_strategy="group_by_length" if config.group_by_length else "random",
        dataloader_pin_memory=False, remove_unused_columns=True, shuffle_dataset=False, loss_type="nll",
    )  # fmt: skip
    trainer = ResumableTrainer(model=model, args=arguments, train_dataset=dataset, processing_class=base.tokenizer)
    for parameter in model.parameters():
        if parameter.requires_grad:  # TRL has cast them to bfloat16 on a quantised base, where small steps are lost
            parameter.data = parameter.data.float()
    for shown in list(trainer.callback_handler.callbacks):
        if type(shown).__name__ in ("PrinterCallback", "ProgressCallback"):
            trainer.remove_callback(shown)
    return trainer


class _Record(TrainerCallback):
    """Metrics, the guard against a loss that is not finite, and the end of each step."""

    def __init__(self, run: Run, tracker: Tracker) -> None:
        self.run, self.tracker = run, tracker

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any) -> None:
        known = {"loss": "train/loss", "grad_norm": "train/grad_norm", "learning_rate": "train/learning_rate"}
        values = {ours: float(logs[theirs]) for theirs, ours in known.items() if logs and theirs in logs}
        if not values:
            return
        self.run.write_metrics(state.global_step, values)
        self.tracker.write(state.global_step, values)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        """Before the step is applied."""
        gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
        if not all(bool(torch.isfinite(gradient).all()) for gradient in gradients):
            what = "the gradient is not finite; the step was not applied."
            fix = "a lower learning rate, or look at the rows of this step"
            raise RlhfError(Problem("GRD001", f"sft step {state.global_step + 1}", what, fix))

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        control.should_save = True  # whether a checkpoint is due, Checkpoints decides


class _Advance(TrainerCallback):
    def __init__(self, progress: Any, first: FirstStep) -> None:
        self.progress, self.first, self.started = progress, first, 0.0

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self.started = time.perf_counter()

    def on_step_end(self, _: Any, state: Any, *__: Any, **___: Any) -> None:
        self.progress.advance(self.progress.task_ids[0])
        self.first.say(time.perf_counter() - self.started, state.max_steps)


def _held_out_loss(config: SftConfig, roles: SharedBase, slot: str, base: Base, held_out: Any) -> float:
    """In nats a response token, end token included."""
    if slot not in roles.slots:
        roles.add(slot)
    turns = tokenised.turns(held_out, base.chat, config.loss_on == "last_turn", config.max_length)
    return measure.response_loss(roles, slot, turns, base.chat.pad_id, config.batch.micro_batch_size)


def _measure(
    config: SftConfig, base: Base, before: float, held_out: Any, sampled: list[PromptRow], num_truncated: int, run: Run
) -> dict[str, float]:
    """Held-out loss and perplexity of the policy, beside the base's ``before``, and the policy's end-token rate."""
    roles = SharedBase(base)
    roles.add("policy", adapter=artifacts.adapter_of(run.path), trained=False)
    after = _held_out_loss(config, roles, "policy", base, held_out)
    engine = open_engine(roles, "policy", base.chat, config.sampling)
    seed = runtime.derived_seed(config.seed, "sft", "end token")
    samples = measure.respond(engine, base.chat, sampled, measure.sampling_of(config.sampling, seed))
    run.write_samples("held_out", measure.sample_rows(samples))
    rate = sum(sample.finished for sample in samples) / len(samples)
    log.info(
        "Held out: loss %.3f -> %.3f a token, perplexity %.2f -> %.2f; %.0f %% of %d samples end by themselves.",
        before, after, math.exp(before), math.exp(after), 100 * rate, len(samples),
    )  # fmt: skip
    if rate < config.min_end_token_rate:
        _refuse(config, base, rate, stopping.causes(base, _trained_tokens(config, base), samples, num_truncated))
    return {
        "eval/base_loss": before, "eval/loss": after, "eval/perplexity": math.exp(after), "eval/end_token_rate": rate,
    }  # fmt: skip


def _trained_tokens(config: SftConfig, base: Base) -> list[str]:
    """Tokens whose rows are no longer the base's; an adapter that was made before had its own warning."""
    return config.lora.train_tokens if config.lora and not config.adapter else [base.chat.end_token]


def _refuse(config: SftConfig, base: Base, rate: float, causes: tuple[str, str]) -> None:
    why, fix = causes
    what = (
        f"only {rate:.0%} of the sampled responses end with {base.chat.end_token!r} within "
        f"{config.sampling.max_new_tokens} tokens, needed: {config.min_end_token_rate:.0%}{f'; {why}' if why else ''}."
    )
    raise RlhfError(Problem("GRD002", "sft", what, fix))
