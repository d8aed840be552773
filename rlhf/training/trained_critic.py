"""The critic as a role: an adapter, or a model, of its own with a head, trained by the clipped value loss."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rlhf.data.batches import Sequences
from rlhf.losses import policy
from rlhf.models import forward
from rlhf.models.roles import Roles
from rlhf.training.experience import Experience, Passes
from rlhf.training.optimizer import Optimizer
from rlhf.training.policy_update import Totals, minibatches, place
from rlhf.training.solved_critic import ridge

RIDGE = 0.1


@dataclass(frozen=True)
class ValueSettings:
    """What the value role's update reads of the config; a ``clip_range`` of None leaves the values unclipped."""

    epochs: int
    minibatch_size: int
    clip_range: float | None


@dataclass(frozen=True)
class ValueRole:
    """The role "value" and its optimizer."""

    roles: Roles
    optimizer: Optimizer
    passes: Passes
    settings: ValueSettings

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
        size = batch.states[0][1].shape[1] + 2
        moments = torch.zeros(size, size, dtype=torch.float64)
        for rows, hidden in batch.states:
            returns = batch.returns[rows][batch.mask[rows]].double()[:, None]
            columns = torch.cat([hidden.double(), returns, torch.ones_like(returns)], 1)
            moments += columns.t() @ columns
        self.roles.head("value").set_(*ridge(moments, RIDGE))

    def learn(self, batch: Experience, seed: int, step: int) -> dict[str, float]:
        """``update.epochs`` passes of minibatches; returns the means of their figures."""
        settings, totals = self.settings, Totals()
        for epoch in range(settings.epochs):
            for rows in minibatches(len(batch.samples), settings.minibatch_size, seed, epoch):
                totals.add(self._step(batch, rows, step))
        return totals.means("update/value_")

    def _step(self, batch: Experience, rows: list[int], step: int) -> dict[str, float]:
        """One optimizer step on the minibatch ``rows``."""
        num_tokens = int(batch.mask[rows].sum())
        totals: dict[str, float] = {"loss": 0.0, "clip_fraction": 0.0}
        for part in batch.micro_batches(rows, self.passes):
            old, returns = part.of(batch.old_values), part.of(batch.returns)
            with self.roles.acting_as("value") as (model, head):
                values = forward.state_values(model, head, part.sequences)
                figures = policy.value_loss(values, old, returns, part.mask, self.settings.clip_range, num_tokens)
                figures.loss.backward()
            totals["loss"] += float(figures.loss.detach())
            totals["clip_fraction"] += float(figures.clip_fraction)
        totals["grad_norm"] = self.optimizer.step(place("value", step, rows))
        return totals

    def state(self) -> dict[str, Any]:
        """What a checkpoint holds of the critic."""
        return {"value": self.roles.state("value"), "value_optimizer": self.optimizer}

    def save(self, directory: Path) -> None:
        """Write adapter (or model) and head."""
        self.roles.save("value", directory)
