"""TensorBoard beside metrics.jsonl, where the config asks for it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch.utils.tensorboard.writer import SummaryWriter


class Tracker:
    """Writes the metrics of a step to RUN/tensorboard, or nowhere."""

    def __init__(self, run_dir: Path, report_to: str, first_step: int = 0) -> None:
        """``first_step``: where a resumed run goes on; what was shown from there on is replaced."""
        purge = first_step or None
        self.writer = (
            SummaryWriter(str(run_dir / "tensorboard"), purge_step=purge) if report_to == "tensorboard" else None
        )

    def write(self, step: int, values: Mapping[str, float]) -> None:
        if self.writer:
            for name, value in values.items():
                self.writer.add_scalar(name, value, step)

    def close(self) -> None:
        if self.writer:
            self.writer.close()
