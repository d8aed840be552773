"""Limits that a training run is watched by: beyond one it is warned, or stopped before it gets worse."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from rlhf.config.ppo_sections import GuardSection
from rlhf.errors import Problem, RlhfError

log = logging.getLogger("rlhf")


class Guard:
    """Compares the figures of each step with their limits. Stateful: it counts steps in a row.

    Warns once when a figure goes beyond its ``warn`` limit, and again only after it has been back; stops when it was
    beyond ``stop`` for ``patience`` steps in a row. A figure that is not a number is beyond every limit.
    """

    def __init__(self, section: GuardSection) -> None:
        self.section = section
        self.warned: dict[str, bool] = {}
        self.in_a_row: dict[str, int] = {}

    def check(self, step: int, figures: Mapping[str, float]) -> None:
        """Look at the figures that are there.

        Raises:
            RlhfError: GRD020 naming figure, limit and step.
        """
        for name, key, sign in (
            ("kl_nats", "rollout/exact_kl_nats", 1),
            ("entropy_nats", "rollout/entropy_nats", -1),
            ("score_std", "rollout/score_std", -1),
            ("clip_fraction", "update/policy_clip_fraction", 1),
        ):
            if key in figures:
                self._check(step, name, figures[key], sign)

    def _check(self, step: int, name: str, value: float, sign: int) -> None:
        limit = self.section.limits[name]
        side = "above" if sign > 0 else "below"
        beyond = limit.warn is not None and not sign * value <= sign * limit.warn
        if beyond and not self.warned.get(name):
            log.warning("Step %d: %s is %.4g, %s guards.%s.warn (%g).", step, name, value, side, name, limit.warn)
        self.warned[name] = beyond
        far = limit.stop is not None and not sign * value <= sign * limit.stop
        self.in_a_row[name] = self.in_a_row.get(name, 0) + 1 if far else 0
        if far and self.in_a_row[name] >= self.section.patience:
            what = f"{name} is {value:.4g}, {side} guards.{name}.stop ({limit.stop:g}) for {self.in_a_row[name]} steps."
            fix = "look at samples/ and metrics.jsonl; a larger kl.coef, or a lower learning rate; --resume goes on"
            raise RlhfError(Problem("GRD020", f"step {step}", what, fix))

    def state_dict(self) -> dict[str, Any]:
        return {"warned": self.warned, "in_a_row": self.in_a_row}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.warned, self.in_a_row = state["warned"], state["in_a_row"]
