"""What a run's first step took beside what was predicted: memory, and time at this machine's speed."""

from __future__ import annotations

import logging

from rlhf import runtime
from rlhf.models import speed
from rlhf.planning import clock, phases
from rlhf.planning.phases import Spec

log = logging.getLogger("rlhf")
MEASURED_FOR, READ_BYTES = 0.1, 1 << 26  # seconds for each figure that makes a speed; little memory


class FirstStep:
    """Says both once. The predictions are of the longest rows that the config allows.

    Memory is on a GPU what torch allocated; on a CPU how far the resident set has grown since this was made, before
    the base was loaded. Time is what ``rlhf plan --measure`` predicts, a floor.
    """

    def __init__(self, spec: Spec | None) -> None:
        self.spec, self.before, self.said = spec, runtime.peak_rss_mb(), False

    def say(self, seconds: float, steps: int) -> None:
        """Of a first step that took ``seconds``, of ``steps`` in all."""
        if self.said:
            return
        self.said = True
        on_gpu = runtime.peak_memory().get("memory/peak_cuda_mb")
        what = "Memory on the GPU" if on_gpu is not None else "Memory (with the pages of libraries)"
        measured = on_gpu if on_gpu is not None else runtime.peak_rss_mb() - self.before
        memory = time = "none for this base"
        if self.spec:
            memory = f"{phases.peak(self.spec).total / (1 << 20):.0f} MB"
            shape = self.spec.shape
            here = speed.measured(
                shape.d, shape.f, self.spec.held.e, clock.sums(self.spec), read_bytes=READ_BYTES, seconds=MEASURED_FOR
            )
            time = f"at least {sum(work.seconds for work in clock.step(self.spec, here)):.3g} s"
        log.info("%s after the first step: %.0f MB; predicted, for longest rows: %s.", what, measured, memory)
        log.info(
            "The first step took %.3g s; predicted, if all rows were as long as the config allows and this machine as "
            "fast as just measured: %s. All %d steps: about %s.", seconds, time, steps, clock.duration(steps * seconds),
        )  # fmt: skip
