"""What all tests share: one thread, no network, tiny real models."""

from __future__ import annotations

import logging
import os
import sys

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import pytest
import torch

from rlhf import errors

torch.set_num_threads(1)
_make = errors.Problem.__init__


def _make_with_fix(self, *args, **values):
    """Every problem of data that a test comes across says what to do."""
    _make(self, *args, **values)
    assert self.fix or not self.code.startswith("DAT"), f"{self.code} has no fix: {self.where}: {self.what}"


errors.Problem.__init__ = _make_with_fix


@pytest.fixture(autouse=True)
def _same_noise_for_every_test():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _processor_as_it_was():
    """A stage that ran in this process flushed denormals and asked for deterministic kernels."""
    yield
    torch.set_flush_denormal(False)
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def here(monkeypatch, capsys):
    """Run a command in this process and working directory: its exit code and all that it printed."""
    from rlhf import cli

    monkeypatch.setattr(cli.interrupts, "install", lambda: None)
    logger = logging.getLogger("rlhf")
    before = logger.handlers[:], logger.level, logger.propagate

    def run(*args):
        monkeypatch.setattr(sys, "argv", ["rlhf", *map(str, args)])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        shown = capsys.readouterr()
        return stop.value.code, shown.err + shown.out

    yield run
    logger.handlers[:], logger.level, logger.propagate = before
