"""Scalar heads: what turns a hidden state into scores or values."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save
from torch import Tensor, nn

from rlhf.errors import Problem, RlhfError
from rlhf.storage import staged_directory, write_bytes, write_text

CONFIG, WEIGHTS = "head.json", "head.safetensors"


class ScalarHead(nn.Module):
    """k numbers from a hidden state, in float32: ((W h + b) - shift) / scale.

    ``shift`` and ``scale`` [k] standardise the scores and are no parameters. W starts normal with standard deviation
    1 / sqrt(hidden_size + 1), b at 0 (Huang et al. 2024, https://arxiv.org/abs/2403.17031, detail 10).
    """

    shift: Tensor
    scale: Tensor

    def __init__(self, hidden_size: int, names: Sequence[str] = ("score",)) -> None:
        super().__init__()
        self.names = tuple(names)
        self.linear = nn.Linear(hidden_size, len(self.names))
        nn.init.normal_(self.linear.weight, std=(hidden_size + 1) ** -0.5)
        nn.init.zeros_(self.linear.bias)
        self.register_buffer("shift", torch.zeros(len(self.names)))
        self.register_buffer("scale", torch.ones(len(self.names)))

    def raw(self, hidden: Tensor) -> Tensor:
        """[..., k] from ``hidden`` [..., d], before standardising."""
        return self.linear(hidden.to(self.linear.weight.dtype))  # type: ignore[no-any-return]

    def forward(self, hidden: Tensor) -> Tensor:
        """[..., k] from ``hidden`` [..., d], standardised."""
        return (self.raw(hidden) - self.shift) / self.scale

    def zero_(self) -> ScalarHead:
        """Make every output 0."""
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)
        return self

    @torch.no_grad()
    def set_(self, weight: Tensor, bias: Tensor) -> ScalarHead:
        """Make the standardised output w x + b, of ``weight`` [k, d] or [d] and ``bias`` [k] or of no dimension."""
        self.linear.weight.copy_(weight * self.scale[:, None])
        self.linear.bias.copy_(bias * self.scale + self.shift)
        return self

    def folded(self) -> ScalarHead:
        """The same function with the standardisation inside weight and bias: what a value role can start from."""
        copy = ScalarHead(self.linear.in_features, self.names).to(self.linear.weight)
        with torch.no_grad():
            copy.linear.weight.copy_(self.linear.weight / self.scale[:, None])
            copy.linear.bias.copy_((self.linear.bias - self.shift) / self.scale)
        return copy

    def save(self, directory: Path) -> None:
        """Write ``head.json`` and ``head.safetensors``."""
        with staged_directory(directory) as staging:
            state = {name: tensor.detach().cpu().contiguous() for name, tensor in self.state_dict().items()}
            write_bytes(staging / WEIGHTS, save(state))
            description = {"kind": "scalar", "names": list(self.names), "hidden_size": self.linear.in_features}
            write_text(staging / CONFIG, json.dumps(description, indent=2) + "\n")

    @staticmethod
    def load(directory: Path) -> ScalarHead:
        """Read what ``save`` wrote.

        Raises:
            RlhfError: CKP010 if a file is missing.
        """
        for name in (CONFIG, WEIGHTS):
            if not (directory / name).is_file():
                raise RlhfError(Problem("CKP010", str(directory / name), "missing.", "make the run again"))
        description = json.loads((directory / CONFIG).read_text("utf-8"))
        head = ScalarHead(description["hidden_size"], description["names"])
        head.load_state_dict(load_file(directory / WEIGHTS))
        return head
