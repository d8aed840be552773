"""One optimizer step for every role: AdamW, a schedule, clipping, and a guard before anything is applied."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from rlhf.errors import Problem, RlhfError

# In PPO and reward modelling (Huang et al. 2024, details 9 and 10), as the original Adam of TensorFlow effectively had.
EPSILON = 1e-5


def schedule_factor(step: int, total: int, warmup_ratio: float, kind: str) -> float:
    """Share of the peak learning rate at optimizer step ``step`` (from 0) of ``total``.

    Rises linearly over the first ``warmup_ratio * total`` steps, then stays, falls linearly to 0, or follows half a
    cosine to 0.
    """
    warmup = round(warmup_ratio * total)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    done = (step - warmup) / max(1, total - warmup)
    if kind == "constant":
        return 1.0
    if kind == "linear":
        return max(0.0, 1.0 - done)
    assert kind == "cosine", kind
    return 0.5 * (1.0 + math.cos(math.pi * min(1.0, done)))


class Optimizer:
    """AdamW for one role's parameters. Stateful: a checkpoint holds the moments and the step count.

    Args:
        total_steps: optimizer steps the schedule spans.
    """

    def __init__(
        self,
        parameters: Sequence[nn.Parameter],
        learning_rate: float,
        total_steps: int,
        *,
        weight_decay: float = 0.0,
        warmup_ratio: float = 0.0,
        schedule: str = "constant",
        max_grad_norm: float = 1.0,
    ) -> None:
        assert parameters, "a trained role has parameters"
        self.parameters = list(parameters)
        self.peak, self.total_steps, self.max_grad_norm = learning_rate, total_steps, max_grad_norm
        self.warmup_ratio, self.schedule = warmup_ratio, schedule
        self.step_count = 0
        self.adamw = torch.optim.AdamW(
            self.parameters, lr=learning_rate, eps=EPSILON, weight_decay=weight_decay, fused=True
        )

    @property
    def learning_rate(self) -> float:
        return self.peak * schedule_factor(self.step_count, self.total_steps, self.warmup_ratio, self.schedule)

    def step(self, where: str) -> float:
        """Clip, step, clear the gradients; returns the gradient norm before clipping.

        Raises:
            RlhfError: GRD001 naming ``where`` if the norm is not finite; nothing has been applied then.
        """
        norm = float(nn.utils.clip_grad_norm_(self.parameters, self.max_grad_norm))
        if not math.isfinite(norm):
            self.clear()
            what = f"gradient norm is {norm}; the step was not applied."
            raise RlhfError(Problem("GRD001", where, what, "a lower learning rate, or look at the rows of this step"))
        for group in self.adamw.param_groups:
            group["lr"] = self.learning_rate
        self.adamw.step()
        self.clear()
        self.step_count += 1
        return norm

    def clear(self) -> None:
        """Drop the gradients that have been accumulated; nothing is applied."""
        self.adamw.zero_grad(set_to_none=True)

    def release(self) -> None:
        """Forget the moments: nothing more is learnt with them, and they take twice the memory of the weights."""
        self.adamw.state.clear()

    def state_dict(self) -> dict[str, Any]:
        return {"adamw": self.adamw.state_dict(), "step_count": self.step_count}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        settings = [
            {key: value for key, value in group.items() if key != "params"} for group in self.adamw.param_groups
        ]
        self.adamw.load_state_dict(state["adamw"])
        for group, own in zip(self.adamw.param_groups, settings, strict=True):
            group.update(own)  # weight decay and epsilon are the config's, also where a resumed run may change them
        self.step_count = state["step_count"]
