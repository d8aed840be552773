"""Scalar heads: what turns a hidden state into scores or values."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save
from torch import Tensor, nn

from rlhf.errors import Problem, RlhfError
from rlhf.runs.storage import staged_directory, write_bytes, write_text

CONFIG, WEIGHTS = "head.json", "head.safetensors"


class ScalarHead(nn.Module):
    """k numbers from a hidden state, in float32: ((W h + b) - shift) / scale.

    ``shift`` and ``scale`` [k] standardise the scores and are no parameters. W starts normal with standard deviation
    1 / sqrt(hidden_size + 1), b at 0 (Huang et al. 2024, https://arxiv.org/abs/2403.17031, detail 10).

    Of several heads the first number is what they are combined to: a weighted sum, or where there is a ``gate`` their
    sum with weights that it reads from the prompt's last hidden state.
    """

    shift: Tensor
    scale: Tensor
    gate_scale: Tensor
    gate: nn.Linear | None

    def __init__(self, hidden_size: int, names: Sequence[str] = ("score",)) -> None:
        super().__init__()
        self.names = tuple(names)
        self.linear = nn.Linear(hidden_size, len(self.names))
        nn.init.normal_(self.linear.weight, std=(hidden_size + 1) ** -0.5)
        nn.init.zeros_(self.linear.bias)
        self.register_buffer("shift", torch.zeros(len(self.names)))
        self.register_buffer("scale", torch.ones(len(self.names)))
        self.gate = None

    def raw(self, hidden: Tensor, prompt: Tensor | None = None) -> Tensor:
        """[..., k] from ``hidden`` [..., d], before standardising; ``prompt`` [..., d] is the hidden state at the end
        of the prompt, which a gate reads."""
        found: Tensor = self.linear(hidden.to(self.linear.weight.dtype))
        if self.gate is None:
            return found
        assert prompt is not None, "a gate reads the prompt"
        shares = self.gate(prompt.to(self.gate.weight.dtype)).softmax(-1)
        score = self.gate_scale * (shares * found[..., 1:]).sum(-1, keepdim=True)
        return torch.cat([score, found[..., 1:]], -1)

    def forward(self, hidden: Tensor, prompt: Tensor | None = None) -> Tensor:
        """[..., k] from ``hidden`` [..., d], standardised; as ``raw``."""
        return (self.raw(hidden, prompt) - self.shift) / self.scale

    def combined(self, name: str, weights: Sequence[float]) -> ScalarHead:
        """These k numbers as they are behind their weighted sum, which is called ``name``; nothing is standardised."""
        copy = ScalarHead(self.linear.in_features, (name, *self.names)).to(self.linear.weight)
        factors = torch.tensor(weights, dtype=torch.float64, device=self.linear.weight.device)
        with torch.no_grad():
            weight, bias = self.linear.weight, self.linear.bias
            copy.linear.weight.copy_(torch.cat([(factors @ weight.double())[None].to(weight), weight]))
            copy.linear.bias.copy_(torch.cat([(factors @ bias.double())[None].to(bias), bias]))
        return copy

    def set_gate(self, weight: Tensor, bias: Tensor, scale: float) -> None:
        """Let the first number be ``scale`` times the others under softmax(weight x + bias); weight [k - 1, d]."""
        self.gate = _gate(self.linear.in_features, len(self.names)).to(self.linear.weight)
        with torch.no_grad():
            self.gate.weight.copy_(weight)
            self.gate.bias.copy_(bias)
        self.register_buffer("gate_scale", torch.tensor(scale).to(self.linear.weight))

    def only(self, names: Sequence[str]) -> ScalarHead:
        """Some of the numbers as a head of their own; a gate is left out, and its sum that of its mean weights."""
        if tuple(names) == self.names and self.gate is None:
            return self
        copy = ScalarHead(self.linear.in_features, names).to(self.linear.weight)
        columns = [self.names.index(name) for name in names]
        with torch.no_grad():
            copy.linear.weight.copy_(self.linear.weight[columns])
            copy.linear.bias.copy_(self.linear.bias[columns])
            copy.shift.copy_(self.shift[columns])
            copy.scale.copy_(self.scale[columns])
        return copy

    def zero_(self) -> ScalarHead:
        """Make every output 0."""
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)
        return self

    @torch.no_grad()
    def set_(self, weight: Tensor, bias: Tensor) -> ScalarHead:
        """Make the standardised output w x + b, of ``weight`` [k, d] or [d] and ``bias`` [k] or of no dimension."""
        weight, bias = (given.to(self.scale.device) for given in (weight, bias))
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
            kind = "gated" if self.gate else "scalar"
            description = {"kind": kind, "names": list(self.names), "hidden_size": self.linear.in_features}
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
        if description["kind"] == "gated":
            head.gate = _gate(description["hidden_size"], len(head.names))
            head.register_buffer("gate_scale", torch.ones(()))
        head.load_state_dict(load_file(directory / WEIGHTS))
        return head


def _gate(hidden_size: int, count: int) -> nn.Linear:
    """Logits of the weights of all numbers but the first, which is their sum."""
    return nn.Linear(hidden_size, count - 1)
