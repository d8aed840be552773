"""Supervised fine-tuning with TRL's SFTTrainer, an adapter on the frozen base or every weight; loss on responses."""

from __future__ import annotations

import gc
import importlib
import logging
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from datasets import Dataset, disable_progress_bars
from peft import get_peft_model
from peft.utils.other import TrainableTokensWrapper
from transformers import TrainerCallback
from trl import SFTConfig

from rlhf.config.stages import SftConfig
from rlhf.data import fitting, tokenised
from rlhf.data.fitting import Limit
from rlhf.data.tokenised import Dialogue, LengthReport, Turn
from rlhf.errors import Problem, RlhfError
from rlhf.evaluation import stopping
from rlhf.evaluation.stopping import Answers
from rlhf.models import adapters, full_weights, open_base
from rlhf.models.base import Base
from rlhf.models.first_step import FirstStep
from rlhf.models.fused import lora
from rlhf.preflight import missing_ends
from rlhf.preflight.prepare import Plan
from rlhf.records import Demonstration, split_by_prompt
from rlhf.runs import artifacts, interrupts, runtime
from rlhf.runs.artifacts import Manifest
from rlhf.runs.bars import Bar, Recent
from rlhf.runs.checkpoints import BEST, Checkpoints
from rlhf.runs.progress import bar, waiting
from rlhf.runs.run_directory import Run
from rlhf.runs.tracking import Tracker
from rlhf.stages.registry import STAGES
from rlhf.stages.sft import outcome as sft_outcome
from rlhf.stages.sft.outcome import HeldOutRows
from rlhf.stages.sft.trainer import ResumableTrainer, Weights, micro_batch_size
from rlhf.training.held_out import METRIC, HeldOut, curves_of, state_of

log = logging.getLogger("rlhf")


def run(config: SftConfig, plan: Plan, run: Run) -> Manifest:
    """Train, measure what was written, finish, and judge: a run that fails a gate is finished all the same."""
    first = FirstStep(plan.spec)
    device = runtime.set_up(config.runtime, config.seed)
    base = open_base.open_base(config.model, device)
    runtime.set_threads(config.runtime, base.model, device)
    stopping.warn_of_untrained_end(base, sft_outcome.trained_tokens(config, base))
    held_out, rows, report = _rows(config, plan, base.chat)
    answers = stopping.answers_of(rows, base.chat.end_id)
    measured_on = sft_outcome.held_out_rows(config, held_out, base.chat)
    for line in (report.sentence("Training data"), *plan.dropped_lines()):
        log.info(line)
    said, is_warning = _what_fits(config, answers, measured_on)
    log.log(logging.WARNING if is_warning else logging.INFO, said)

    trained = _train(config, base, rows, measured_on.turns, run, first)
    train_seconds = trained.saved.seconds()
    del base
    gc.collect()  # trainer and model refer to one another, and two bases would stand at once
    outcome = sft_outcome.measure(config, device, measured_on, answers, run)
    if label := trained.details.get("held_out_figures"):
        log.info("These held-out figures are %s.", label)
    metrics = {**outcome.metrics, "time/train_s": train_seconds, **runtime.peak_memory()}
    run.write_metrics(trained.steps, metrics)
    return run.finish(
        Manifest(
            kind="policy",
            stage="sft",
            seed=config.seed,
            identity=plan.identity,
            metrics=metrics,
            seconds=trained.saved.seconds(),
            base=outcome.base,
            parents=plan.parents_table(STAGES["sft"].needs(config)),
            details={
                "rows": vars(report),
                "prompts_held_out": len(held_out),
                "steps": trained.steps,
                "dropped": plan.dropped(),
                **trained.details,
                "ending": outcome.ending,
            },
        )
    )


@dataclass(frozen=True)
class Trained:
    """What is known once the artifact is written: the steps that were done, and what the curve's details say."""

    steps: int
    saved: Checkpoints
    details: dict[str, Any]


def _train(
    config: SftConfig, base: Base, rows: list[Dialogue], turns: list[Turn], run: Run, first: FirstStep
) -> Trained:
    """From the start, or from where a resumed run goes on, to the artifact on the disk."""
    micro = micro_batch_size(config, base)
    model = _model(config, base)
    steps = _num_steps(config, len(rows))
    trainer = _trainer(config, model, base, rows, run, micro) if steps else None
    curves = curves_of(config.evaluation, [steps] if trainer else [])
    state = {**(trainer.parts() if trainer else {}), **state_of(curves)}
    saved = Checkpoints(run, state, config.save_every, config.keep_checkpoints)
    saved.resume(steps)
    details: dict[str, Any] = {}
    if trainer:
        recorder = _Record(run, Tracker(run.path, config.report_to))
        weights = [Weights(trainer)] if config.use == BEST else None
        measure = partial(sft_outcome.loss_of, config, base, base.model, turns)
        held_out = HeldOut(curves, lambda _: measure(), weights, saved, recorder.write)
        _steps(trainer, held_out, saved, recorder, first)
        recorder.tracker.close()
        held_out.restore()
        if curves:
            with waiting("Drawing the held-out loss"):
                importlib.import_module("rlhf.report.plots").held_out(run.path, METRIC, held_out.best_points())
        details = held_out.details()
    else:
        what = "an adapter that adds nothing" if config.lora else "its weights as they are"
        log.info("No steps: the model is taken as it is, with %s.", what)
    if config.lora:
        adapters.save(model, "default", run.path / artifacts.ADAPTER)
    else:
        full_weights.save(model, base.tokenizer, run.path / artifacts.MODEL)
    base.tokenizer.save_pretrained(run.path / artifacts.TOKENIZER)
    saved.state = {}
    return Trained(trainer.steps_done if trainer else 0, saved, details)


def _steps(
    trainer: ResumableTrainer, held_out: HeldOut, saved: Checkpoints, recorder: _Record, first: FirstStep
) -> None:
    """The steps that are left, each with what follows it: a measurement where one is due, and a checkpoint."""

    def end_of_step(step: int) -> bool:
        held_out.after(0, step)
        is_over = held_out.stopped(0)
        saved.end_of_step(step, held_out.needed(), last=is_over or step == trainer.args.max_steps)
        return is_over

    trainer.end_of_step = end_of_step
    trainer.add_callback(recorder)
    with interrupts.deferred(), bar("SFT", trainer.args.max_steps) as shown:
        shown.begin(trainer.restored_step)
        trainer.add_callback(_Advance(shown, first))
        if not trainer.restored:
            held_out.after(0, 0)
        trainer.train_from_here(held_out.stopped(0))


def dry_run(config: SftConfig, plan: Plan) -> list[str]:
    """Token counts and the number of steps, with the tokenizer but without weights."""
    chat = open_base.open_chat(config.model)
    held_out, rows, report = _rows(config, plan, chat)
    measured_on = sft_outcome.held_out_rows(config, held_out, chat)
    steps = _num_steps(config, len(rows))
    return [
        report.sentence("data"),
        f"held out: {len(held_out)} rows.",
        f"{steps} steps of {config.batch.batch_size}.",
        _what_fits(config, stopping.answers_of(rows, chat.end_id), measured_on)[0],
    ]


def _what_fits(config: SftConfig, answers: Answers, measured_on: HeldOutRows) -> tuple[str, bool]:
    figures = answers.figures(config.sampling.max_new_tokens)
    return missing_ends.what_fits(config, figures, len(measured_on.prompts))


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
    lora.install(base.model)
    return model


@waiting("Preparing the trainer")
def _trainer(config: SftConfig, model: Any, base: Base, rows: list[Dialogue], run: Run, micro: int) -> ResumableTrainer:
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
    arguments = SFTConfig(
        output_dir=str(run.path / artifacts.CHECKPOINTS),
        max_length=config.max_length,
        packing=config.packing,
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=config.batch.batch_size // micro,
        max_steps=_num_steps(config, len(rows)),
        learning_rate=config.optim.learning_rate,
        weight_decay=config.optim.weight_decay,
        warmup_steps=config.optim.warmup_ratio,
        lr_scheduler_type=config.optim.schedule,
        max_grad_norm=config.optim.max_grad_norm,
        seed=config.seed,
        data_seed=config.seed,
        bf16=False,
        fp16=False,
        use_cpu=base.device.type == "cpu",
        activation_checkpointing=config.runtime.gradient_checkpointing,
        activation_checkpointing_kwargs={"use_reentrant": False},
        logging_steps=1,
        logging_nan_inf_filter=False,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        train_sampling_strategy="group_by_length" if config.group_by_length else "random",
        dataloader_pin_memory=False,
        remove_unused_columns=True,
        shuffle_dataset=False,
        loss_type="nll",
    )
    trainer = ResumableTrainer(model=model, args=arguments, train_dataset=dataset, processing_class=base.tokenizer)
    for parameter in model.parameters():
        if parameter.requires_grad:  # TRL has cast them to bfloat16 on a quantised base, where small steps are lost
            parameter.data = parameter.data.float()
    for shown in list(trainer.callback_handler.callbacks):
        if type(shown).__name__ in ("PrinterCallback", "ProgressCallback"):
            trainer.remove_callback(shown)
    return trainer


class _Record(TrainerCallback):
    """Metrics, the guard against a gradient that is not finite, and the end of each step."""

    def __init__(self, run: Run, tracker: Tracker) -> None:
        self.run, self.tracker = run, tracker

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any) -> None:
        known = {"loss": "train/loss", "grad_norm": "train/grad_norm", "learning_rate": "train/learning_rate"}
        values = {ours: float(logs[theirs]) for theirs, ours in known.items() if logs and theirs in logs}
        if not values:
            return
        self.write(state.global_step, values)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """One row of metrics.jsonl, and of the trackers."""
        self.run.write_metrics(step, values)
        self.tracker.write(step, values)

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
    """The bar with the loss, and what is said of the first steps."""

    def __init__(self, shown: Bar, first: FirstStep) -> None:
        self.shown, self.first, self.started, self.losses = shown, first, 0.0, Recent()

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self.started = time.perf_counter()

    def on_step_end(self, _: Any, state: Any, *__: Any, **___: Any) -> None:
        self.shown.advance()
        self.first.say(time.perf_counter() - self.started, state.max_steps)

    def on_log(self, *_: Any, logs: dict[str, float] | None = None, **__: Any) -> None:
        """Comes after the end of each step."""
        if logs and "loss" in logs:
            self.shown.figures = f"mean loss {self.losses.mean(float(logs['loss'])):.3f}"
