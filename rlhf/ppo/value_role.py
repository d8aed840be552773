"""The critic as a role: an adapter, or a model, of its own with a head, trained by the clipped value loss."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rlhf.config.stages import PpoConfig
from rlhf.data.batches import Sequences
from rlhf.models import forward
from rlhf.models.base import Base
from rlhf.models.roles import Roles
from rlhf.optimizer import Optimizer
from rlhf.ppo import objective
from rlhf.ppo.experience import Experience
from rlhf.ppo.least_squares import ridge
from rlhf.ppo.update import Totals, cutter, micro_batches_of, minibatches, place

RIDGE = 0.1


class ValueRole:
    """The role "value" and its optimizer."""

    def __init__(self, config: PpoConfig, roles: Roles, base: Base, optimizer: Optimizer) -> None:
        self.config, self.roles, self.base, self.optimizer = config, roles, base, optimizer

    @torch.no_grad()
    def read(self, sequences: Sequences, reference: Tensor | None) -> tuple[Tensor, Tensor]:
        """[N] values, and the hidden states [N, d] that they were read from."""
        with self.roles.acting_as("value") as (model, head):
            hidden = forward.states_before(model, sequences)
            return head(hidden)[:, 0], hidden

    @torch.no_grad()
    def start(self, batch: Experience) -> None:
        """Set the head to the ridge regression of the returns on the hidden states; the adapter stays.

        One batch gives at once what gradients need many batches for.
        """
        size = self.base.hidden_size + 2
        moments = torch.zeros(size, size, dtype=torch.float64)
        for rows, hidden in batch.states:
            returns = batch.returns[rows][batch.mask[rows]].double()[:, None]
            columns = torch.cat([hidden.double(), returns, torch.ones_like(returns)], 1)
            moments += columns.t() @ columns
        self.roles.head("value").set_(*ridge(moments, RIDGE))

    def learn(self, batch: Experience, seed: int, step: int) -> dict[str, float]:
        """``update.epochs`` passes of minibatches; returns the means of their figures."""
        config, totals = self.config, Totals()
        for epoch in range(config.update.epochs):
            for rows in minibatches(len(batch.samples), config.batch.minibatch_size, seed, epoch):
                totals.add(self._step(batch, [int(row) for row in rows], step))
        return totals.means("update/value_")

    def _step(self, batch: Experience, rows: list[int], step: int) -> dict[str, float]:
        """One optimizer step on the minibatch ``rows``."""
        num_tokens = int(batch.mask[rows].sum())
        totals: dict[str, float] = {"loss": 0.0, "clip_fraction": 0.0}
        for part, sequences, mask in micro_batches_of(self.config, self.base, batch, rows):
            cut = cutter(part, mask)
            with self.roles.acting_as("value") as (model, head):
                values = forward.state_values(model, head, sequences)
                outcome = objective.value_loss(
                    values, cut(batch.old_values), cut(batch.returns), mask, self.config.update.value_clip_range,
                    num_tokens,
                )  # fmt: skip
                outcome.loss.backward()
            totals["loss"] += float(outcome.loss.detach())
            totals["clip_fraction"] += float(outcome.clip_fraction)
        totals["grad_norm"] = self.optimizer.step(place("value", step, rows))
        return totals

    def state(self) -> dict[str, Any]:
        """What a checkpoint holds of the critic."""
        return {"value": self.roles.state("value"), "value_optimizer": self.optimizer}

    def save(self, directory: Path) -> None:
        """Write adapter (or model) and head."""
        self.roles.save("value", directory)
