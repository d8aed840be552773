"""What a run's first two steps show: how long all will take, and on a GPU the memory next to what was planned."""

from __future__ import annotations

import logging

from rlhf.planning import clock, phases
from rlhf.planning.phases import Spec
from rlhf.runs import runtime

log = logging.getLogger("rlhf")


class FirstStep:
    """Says both once. The time is the second step's: the first one also does what is done once, as checks at first use.

    Memory is what torch has allocated at its peak, which is what ``rlhf plan`` predicts. A CPU has no such figure: the
    resident set holds the pages of libraries too.
    """

    def __init__(self, spec: Spec | None) -> None:
        self.spec, self.num_steps = spec, 0

    def say(self, seconds: float, steps: int) -> None:
        """After each step, which took ``seconds``, of ``steps`` in all."""
        self.num_steps += 1
        allocated = runtime.peak_memory().get("memory/peak_cuda_mb") if self.num_steps == 1 else None
        if allocated is not None:
            log.info("Memory on the GPU, at its peak so far: %.0f MB%s.", allocated, self._planned())
        if self.num_steps == 2:
            log.info("A step takes %.3g s; all %d steps: about %s.", seconds, steps, clock.duration(seconds * steps))

    def _planned(self) -> str:
        """The plan's peak of the phases that the first step has seen: what measures at the end is still to come."""
        if self.spec is None:
            return ""
        seen = [phase for phase in phases.phases(self.spec) if self.spec.stage == "ppo" or phase.name == "training"]
        most = max(phase.total for phase in seen) / (1 << 20)
        return f"; planned for it, with rows as long as the config allows: {most:.0f} MB"
