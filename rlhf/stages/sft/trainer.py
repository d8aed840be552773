"""TRL's SFTTrainer with the project's checkpoints: its loop, no pickle, and a resume that is exact."""

from __future__ import annotations

import json
import logging
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch.utils.data import Sampler
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_pt_utils import get_length_grouped_indices
from trl import SFTTrainer

from rlhf.config.stages import SftConfig
from rlhf.models import adapters, full_weights, packing
from rlhf.models.base import Base
from rlhf.runs import runtime
from rlhf.runs.snapshots import Stateful

log = logging.getLogger("rlhf")


class Part:
    """One part of a trainer's state. What is given back is kept until the trainer asks for it. Stateful."""

    def __init__(self, trainer: ResumableTrainer, name: str) -> None:
        self.trainer, self.name = trainer, name

    def state_dict(self) -> dict[str, Any]:
        return self.trainer.part(self.name)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.trainer.restored[self.name] = state


class Weights:
    """The weights that the trainer trains; what is given back is in them at once. Stateful."""

    def __init__(self, trainer: ResumableTrainer) -> None:
        self.trainer = trainer

    def state_dict(self) -> dict[str, Any]:
        return self.trainer.part("weights")

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.trainer.load_weights(state)


class LengthGrouped(Sampler[int]):
    """Rows in batches of like length, in an order made from (seed, epoch) alone; transformers' own is made of whatever
    the global generator holds, and a resumed run would see another."""

    def __init__(self, lengths: Sequence[int], batch_size: int, seed: int) -> None:
        self.lengths, self.batch_size, self.seed, self.epoch = list(lengths), batch_size, seed, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        return iter(get_length_grouped_indices(self.lengths, self.batch_size, generator=generator))


class ResumableTrainer(SFTTrainer):  # type: ignore[misc]
    """The trainer calls ``end_of_step`` with the number of each step that it has done, and stops where that says so.

    Everything below that begins with an underscore is a method of transformers' Trainer that reads or writes pickles
    there. An adapter is called "default", as PEFT does.
    """

    PARTS = ("weights", "optimizer", "scheduler", "generators", "progress")

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.generators = runtime.Generators()
        self.restored: dict[str, dict[str, Any]] = {}
        self.end_of_step: Callable[[int], bool] = lambda _: False

    def parts(self) -> dict[str, Stateful]:
        return {name: Part(self, name) for name in self.PARTS}

    def part(self, name: str) -> dict[str, Any]:
        """The present state of one part."""
        if name == "weights":
            return {
                "weights": adapters.weights(self.model, "default")
                if self.is_adapter
                else full_weights.weights(self.model)
            }
        if name == "optimizer":
            return self.optimizer.state_dict()  # type: ignore[no-any-return]
        if name == "scheduler":
            return self.lr_scheduler.state_dict()  # type: ignore[no-any-return]
        if name == "generators":
            return self.generators.state_dict()
        return {"json": json.dumps({**asdict(self.state), "log_history": []})}

    @property
    def is_adapter(self) -> bool:
        return isinstance(self.model, PeftModel)

    def get_decay_parameter_names(self, model: Any) -> list[str]:
        """All of them, as everywhere here; transformers would leave norms and biases out."""
        return [name for name, _ in model.named_parameters()]

    @property
    def restored_step(self) -> int:
        """Steps that were done before this process; 0 for a fresh start."""
        return int(json.loads(self.restored["progress"]["json"])["global_step"]) if self.restored else 0

    @property
    def steps_done(self) -> int:
        return max(self.restored_step, int(self.state.global_step))

    def train_from_here(self, is_over: bool) -> None:
        """Train to the end from the restored step, or from the beginning; not at all where that was an early stop."""
        if not self.restored:
            self.train()
        elif is_over or self.restored_step >= self.args.max_steps:
            self._load_from_checkpoint("")  # nothing is left to train, and ``train`` would take one step more
        else:
            with tempfile.TemporaryDirectory(prefix="rlhf-") as directory:
                (Path(directory) / TRAINER_STATE_NAME).write_text(self.restored["progress"]["json"], "utf-8")
                self.train(resume_from_checkpoint=directory)

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        if self.args.train_sampling_strategy != "group_by_length":
            return super()._get_train_sampler(train_dataset)
        batch_size = self.args.per_device_train_batch_size * self.args.gradient_accumulation_steps
        return LengthGrouped([len(ids) for ids in self.train_dataset["input_ids"]], batch_size, self.args.data_seed)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        if self.end_of_step(self.state.global_step):
            self.control.should_training_stop = True

    def load_weights(self, state: dict[str, Any]) -> None:
        """Give the model the weights that ``part`` told."""
        if self.is_adapter:
            adapters.load(self.model, "default", state["weights"])
        else:
            full_weights.load(self.model, state["weights"])

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        self.load_weights(self.restored["weights"])

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        settings = [{key: value for key, value in group.items() if key != "params"} for group in self._groups()]
        self.optimizer.load_state_dict(self.restored["optimizer"])
        self.lr_scheduler.load_state_dict(self.restored["scheduler"])
        # Learning rate and weight decay are the config's, also where a resumed run may change them.
        self.lr_scheduler.base_lrs = [own["initial_lr"] for own in settings]
        for group, own, factor in zip(self._groups(), settings, self.lr_scheduler.lr_lambdas, strict=True):
            group.update({**own, "lr": own["initial_lr"] * factor(self.lr_scheduler.last_epoch)})

    def _groups(self) -> list[dict[str, Any]]:
        return self.optimizer.param_groups  # type: ignore[no-any-return]

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            self.generators.load_state_dict(self.restored["generators"])


def micro_batch_size(config: SftConfig, base: Base) -> int:
    """Rows of a forward pass: one where packed rows need a mask, whose bytes are the square of a pass's tokens."""
    micro = min(config.batch.micro_batch_size, config.batch.batch_size)
    if not config.packing:
        return micro
    if packing.packs(base.model):
        packing.take_flattened(base.model)
        return micro
    log.warning(
        "packing: true needs a mask here, %d MB for a row of max_length %d: a forward pass takes one packed row.%s",
        config.max_length**2 >> 20,
        config.max_length,
        f" batch.micro_batch_size {micro} is not used." * (micro > 1),
    )
    return 1
