"""Held-out loss during training: measured every so many steps, the best step kept and used, an early stop."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate
from typing import Any

from rlhf.config.stages import HeldOutSection
from rlhf.runs import snapshots
from rlhf.runs.checkpoints import BEST, Checkpoints
from rlhf.runs.run_directory import plain
from rlhf.runs.snapshots import Stateful

log = logging.getLogger("rlhf")
METRIC = "eval/held_out_loss"
WEIGHTS = "weights"


class Curve:
    """What the measurements of one model in training have shown so far. Stateful.

    A loss that is not finite is never a best one. Of equal losses the earlier step is the best.
    """

    def __init__(self, section: HeldOutSection, num_steps: int) -> None:
        assert section.every is not None
        self.every, self.patience, self.num_steps = section.every, section.patience, num_steps
        self.num_measured = self.num_without_best = self.best_step = self.last_step = 0
        self.start_loss = self.best_loss = math.inf
        self.stopped_early = False

    def is_due(self, step: int) -> bool:
        """The start and the end are measured too."""
        return step % self.every == 0 or step == self.num_steps

    def add(self, step: int, loss: float) -> bool:
        """Take a measurement in; returns whether it is the best so far."""
        if self.num_measured == 0:
            self.start_loss = loss
        is_best = self.num_measured == 0 or (math.isfinite(loss) and loss < self.best_loss)
        if is_best:
            self.best_step, self.best_loss = step, loss if math.isfinite(loss) else math.inf
        self.num_without_best = 0 if is_best else self.num_without_best + 1
        self.num_measured, self.last_step = self.num_measured + 1, step
        is_out_of_patience = self.patience is not None and self.num_without_best >= self.patience
        self.stopped_early = is_out_of_patience and step < self.num_steps
        return is_best

    def state_dict(self) -> dict[str, Any]:
        settings = ("every", "patience", "num_steps")
        return {name: value for name, value in vars(self).items() if name not in settings}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        vars(self).update(state)


def curves_of(section: HeldOutSection, num_steps: Sequence[int]) -> list[Curve]:
    """One for each model that is trained, one after the other; none where nothing is measured during training."""
    return [Curve(section, number) for number in num_steps] if section.every else []


def state_of(found: Sequence[Curve]) -> dict[str, Stateful]:
    """The curves as parts of a checkpoint."""
    return {f"held_out{_suffix('/', index, found)}": curve for index, curve in enumerate(found)}


class HeldOut:
    """Measures models in training, and keeps the weights of each one's best step next to the checkpoints.

    Without curves there is nothing to do, and every method says so.

    Args:
        measure: gives the loss of the numbered model as it is now.
        weights: what is trained of each; None where the last step is used, which needs no copy.
        record: writes figures at a step of the whole run.
    """

    def __init__(
        self,
        found: Sequence[Curve],
        measure: Callable[[int], float],
        weights: Sequence[Stateful] | None,
        saved: Checkpoints,
        record: Callable[[int, Mapping[str, float]], None],
    ) -> None:
        self.curves, self.measure, self.weights = found, measure, weights
        self.saved, self.record = saved, record
        self.offsets = [0, *accumulate(curve.num_steps for curve in found)]

    def after(self, index: int, step: int) -> None:
        """Measure model ``index`` after its own step ``step`` (0: before the first), where that is due."""
        if not self.curves or not self.curves[index].is_due(step):
            return
        curve = self.curves[index]
        loss = self.measure(index)
        is_best = curve.add(step, loss)
        self.record(self.offsets[index] + step, {METRIC + _suffix("_", index, self.curves): loss})
        if is_best and self.weights:
            part = {WEIGHTS: self.weights[index]}
            self.saved.keep_best(self._name(index), lambda path: snapshots.save_state(path, part), self.needed())
        log.info("%s", self._sentence(index, step, loss, is_best))

    def stopped(self, index: int) -> bool:
        """Whether model ``index`` has run out of patience: its training is over."""
        return bool(self.curves) and self.curves[index].stopped_early

    def needed(self) -> tuple[str, ...]:
        """What belongs to a checkpoint besides its state: the best weights so far."""
        if not self.weights:
            return ()
        return tuple(self._name(index) for index, curve in enumerate(self.curves) if curve.num_measured)

    def restore(self) -> None:
        """Training is over: give each model the weights of its best step, where the best step is used."""
        for index, curve in enumerate(self.curves):
            if self.weights and curve.best_step != curve.last_step:
                directory = self.saved.directory / self._name(index)
                self.weights[index].load_state_dict(snapshots.read(directory)[WEIGHTS])
                log.info(
                    "%sStep %d of %d is used, which had the lowest held-out loss.",
                    self._whose(index),
                    curve.best_step,
                    curve.last_step,
                )

    def last_step(self, num_steps: int) -> int:
        """The last step that was trained, counted over the whole run; ``num_steps`` where nothing was measured."""
        return self.offsets[-2] + self.curves[-1].last_step if self.curves else num_steps

    def best_points(self) -> list[tuple[int, float]]:
        """Step of the whole run and loss of each curve's best measurement."""
        starts = zip(self.offsets[:-1], self.curves, strict=True)
        return [(start + curve.best_step, curve.best_loss) for start, curve in starts]

    def details(self) -> dict[str, Any]:
        """For the manifest: one entry a curve, and what the run's held-out figures are worth."""
        if not self.curves:
            return {}
        found: dict[str, Any] = {"held_out": [self._entry(curve) for curve in self.curves]}
        label = self.label()
        return {**found, "held_out_figures": label} if label else found

    def label(self) -> str:
        """What must be said of figures on the held-out rows; empty where these rows chose nothing."""
        numbers = sorted({curve.num_measured for curve in self.curves})
        if not self.weights or not self.curves:
            return ""
        times = " to ".join(str(number) for number in dict.fromkeys([numbers[0], numbers[-1]]))
        return f"optimistic: these rows also chose the step that is used, as the best of {times} measured ones"

    def _entry(self, curve: Curve) -> dict[str, Any]:
        return {
            "use": BEST if self.weights else "last",
            "used_step": curve.best_step if self.weights else curve.last_step,
            "best_step": curve.best_step,
            "best_loss": plain(curve.best_loss),
            "start_loss": plain(curve.start_loss),
            "last_step": curve.last_step,
            "num_measured": curve.num_measured,
            "stopped_early": curve.stopped_early,
        }

    def _sentence(self, index: int, step: int, loss: float, is_best: bool) -> str:
        curve = self.curves[index]
        found = f"{self._whose(index)}Step {step} of {curve.num_steps}: held-out loss {loss:.4f}"
        if is_best:
            return f"{found}, the best so far."
        found += f"; the best so far is {curve.best_loss:.4f} at step {curve.best_step}."
        if not curve.stopped_early:
            return found
        return (
            f"{found} Training stops early: {curve.num_without_best} measurements in a row without a new best "
            f"(evaluation.patience: {curve.patience})."
        )

    def _name(self, index: int) -> str:
        return f"{BEST}{_suffix('-', index, self.curves)}-{self.curves[index].best_step}"

    def _whose(self, index: int) -> str:
        return f"Member {index}: " if len(self.curves) > 1 else ""


def _suffix(mark: str, index: int, among: Sequence[Curve]) -> str:
    return f"{mark}{index}" if len(among) > 1 else ""
