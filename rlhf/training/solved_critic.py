"""The critic without a gradient: least squares on features of the reference's hidden states, which PPO has anyway."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from rlhf.data.batches import Sequences
from rlhf.limits import FEATURE_ROWS, FEATURES
from rlhf.runs import storage
from rlhf.training.experience import Experience

WEIGHTS = "critic.safetensors"
PULL = 0.5
PROJECTION_SEED = 0


class LeastSquares:
    """V(s) = w f(s) + b on features f(s) = (z, relu(A z)) of the frozen reference's hidden state. Stateful.

    z [d] is the hidden state before the token, with mean 0 and variance 1 in every dimension on the first batch; A
    [k, d] is drawn once from a normal distribution of variance 1 / d. As k grows, relu(A z) spans the arc-cosine kernel
    (Cho and Saul 2009, Kernel methods for deep learning; Rahimi and Recht 2007, Random features for large-scale kernel
    machines); z itself keeps what k directions of a wide model would miss. After every batch w and b go to the minimum
    of |y - w f - b|^2 + penalty |w - w_before|^2 over its N states: a ridge regression of what the critic got wrong. It
    has no learning rate, and forgets what no batch repeats.

    Args:
        hidden_size: d.
        device: where the reference computes. Products are in float32, and their sums over the batch in float64.
    """

    def __init__(self, hidden_size: int, device: torch.device) -> None:
        generator = torch.Generator().manual_seed(PROJECTION_SEED)
        projection = torch.randn(hidden_size, FEATURES, generator=generator) / hidden_size**0.5
        self.device, self.exact = device, device if device.type == "cuda" else torch.device("cpu")
        self.size = hidden_size + FEATURES
        self.fits = 0
        self.projection = projection.to(device)
        self.mean, self.scale = torch.zeros(hidden_size, device=device), torch.ones(hidden_size, device=device)
        self.weight = torch.zeros(self.size, dtype=torch.float64, device=self.exact)
        self.bias = torch.zeros((), dtype=torch.float64, device=self.exact)

    @torch.no_grad()
    def read(self, sequences: Sequences, reference: Tensor | None) -> tuple[Tensor, Tensor]:
        """[N] values, and the states that they are of: ``reference`` [N, d]; 0 before the first fit."""
        assert reference is not None
        return torch.cat([self._of(features) for features in self._features(reference)]), reference

    def start(self, batch: Experience) -> None:
        """Learn from the first batch; as ``learn``."""
        self.learn(batch, 0, 0)

    @torch.no_grad()
    def learn(self, batch: Experience, seed: int, step: int) -> dict[str, float]:
        """Move to the minimum on the batch, for which nothing is drawn; returns half the mean squared error there."""
        if not self.fits:
            self._standardise([hidden for _, hidden in batch.states])
        moments = self._moments(batch).cpu()
        weight, bias = ridge(moments, PULL)
        self.weight = self.weight + weight.to(self.exact)
        self.bias = self.bias + bias.to(self.exact)
        self.fits += 1
        change = torch.cat([-weight, torch.ones(1).double(), -bias[None]])
        return {"update/value_loss": 0.5 * float(change @ moments @ change / moments[-1, -1])}

    def _moments(self, batch: Experience) -> Tensor:
        """[d + k + 2, d + k + 2] float64, Z'Z of the rows Z = (features, what the returns are above the values, 1)."""
        moments = torch.zeros(self.size + 2, self.size + 2, dtype=torch.float64, device=self.exact)
        for rows, hidden in batch.states:
            returns = batch.returns[rows][batch.mask[rows]].float().to(self.device)
            for features, wanted in zip(self._features(hidden), returns.split(FEATURE_ROWS), strict=True):
                wrong = wanted - self._of(features)
                columns = torch.cat([features, wrong[:, None], torch.ones_like(wrong)[:, None]], 1)
                moments += (columns.t() @ columns).to(self.exact)
        return moments

    def _standardise(self, states: Sequence[Tensor]) -> None:
        """Mean and scale of the first states; a dimension that hardly varies there stays small, it is not blown up."""
        moments = torch.zeros(3, len(self.mean), dtype=torch.float64, device=self.exact)
        for rows in (rows.to(self.exact).double() for hidden in states for rows in hidden.split(FEATURE_ROWS)):
            moments += torch.stack([torch.ones_like(rows).sum(0), rows.sum(0), rows.square().sum(0)])
        count, total, squares = moments
        mean = total / count
        spread = (squares / count - mean.square()).clamp_min(0).sqrt()
        self.mean = mean.float().to(self.device)
        self.scale = (spread + 1e-3 * spread.mean()).clamp_min(1e-12).float().to(self.device)

    def _features(self, hidden: Tensor) -> Iterator[Tensor]:
        """[n, d + k] of some rows after the other."""
        for rows in hidden.split(FEATURE_ROWS):
            standard = (rows.to(self.device).float() - self.mean) / self.scale
            yield torch.cat([standard, (standard @ self.projection).relu_()], 1)

    def _of(self, features: Tensor) -> Tensor:
        return features @ self.weight.float().to(self.device) + self.bias.float().to(self.device)

    def state(self) -> dict[str, Any]:
        """What a checkpoint holds of the critic."""
        return {"value": self}

    def save(self, directory: Path) -> None:
        """Write ``directory/critic.safetensors``."""
        with storage.staged_directory(directory) as staging:
            storage.write_bytes(staging / WEIGHTS, save(self._tensors()))

    def state_dict(self) -> dict[str, Any]:
        return {"fits": self.fits, **self._tensors()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.fits = state["fits"]
        for name, own in self._tensors().items():
            setattr(self, name, state[name].to(getattr(self, name).device, own.dtype))

    def _tensors(self) -> dict[str, Tensor]:
        names = ("projection", "mean", "scale", "weight", "bias")
        return {name: getattr(self, name).cpu().contiguous() for name in names}


def ridge(moments: Tensor, share: float) -> tuple[Tensor, Tensor]:
    """w [d] and b of the least sum of (y - w x - b)^2 + penalty |w|^2; the penalty is ``share`` of x's mean scatter.

    The scatter of a column is its sum of squares about its mean (Hoerl and Kennard 1970,
    https://doi.org/10.1080/00401706.1970.10488634). Where no column varies, w is 0 and b the mean of y.

    Args:
        moments: [d + 2, d + 2] float64, Z'Z of the rows Z = (x, y, 1).
    """
    count, sums = moments[-1, -1], moments[-1, :-1]
    scatter = torch.addr(moments[:-1, :-1], sums, sums, alpha=-1 / float(count))
    own, shared = scatter[:-1, :-1], scatter[:-1, -1:]
    penalty = share * own.diagonal().mean()
    mean_x, mean_y = sums[:-1] / count, sums[-1] / count
    if not penalty > 0:
        return torch.zeros_like(mean_x), mean_y
    own.diagonal().add_(penalty)
    weight = torch.cholesky_solve(shared, torch.linalg.cholesky(own))[:, 0]
    return weight, mean_y - weight @ mean_x
