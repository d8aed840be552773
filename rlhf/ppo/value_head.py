"""The value head by least squares: one batch gives at once what gradients need many batches for."""

from __future__ import annotations

import torch
from torch import Tensor

from rlhf.config.stages import PpoConfig
from rlhf.evaluation import policy as measure
from rlhf.models import forward
from rlhf.models.base import Base
from rlhf.models.roles import Roles
from rlhf.ppo.experience import Experience

RIDGE = 0.1


@torch.no_grad()
def fit(config: PpoConfig, roles: Roles, base: Base, experience: Experience) -> None:
    """Set the value head to the ridge regression of the returns on the role's hidden states; its adapter stays."""
    batch, size = config.batch, base.hidden_size + 2
    moments = torch.zeros(size, size, dtype=torch.float64)
    parts = measure.batched(
        experience.samples, base.chat.pad_id, base.device, batch.micro_batch_size, batch.micro_batch_tokens
    )
    for rows, sequences in parts:
        with roles.acting_as("value") as (model, head):
            places, positions = sequences.targets
            hidden = forward.hidden_at(model, sequences, places, positions - 1).double().cpu()
        mask = sequences.mask.cpu()
        returns = experience.returns[rows, : mask.shape[1]][mask].double()[:, None]
        columns = torch.cat([hidden, returns, torch.ones_like(returns)], 1)
        moments += columns.t() @ columns
    weight, bias = ridge(moments, RIDGE)
    with roles.acting_as("value") as (_, head):
        head.set_(weight, bias)


def ridge(moments: Tensor, share: float) -> tuple[Tensor, Tensor]:
    """w [d] and b of the least sum of (y - w x - b)^2 + penalty |w|^2; the penalty is ``share`` of x's mean scatter.

    The scatter of a column is its sum of squares about its mean (Hoerl and Kennard 1970,
    https://doi.org/10.1080/00401706.1970.10488634). Where no column varies, w is 0 and b the mean of y.

    Args:
        moments: [d + 2, d + 2] float64, Z'Z of the rows Z = (x, y, 1).
    """
    count, sums = moments[-1, -1], moments[-1, :-1]
    scatter = moments[:-1, :-1] - torch.outer(sums, sums) / count
    penalty = share * scatter[:-1, :-1].diagonal().mean()
    mean_x, mean_y = sums[:-1] / count, sums[-1] / count
    if not penalty > 0:
        return torch.zeros_like(mean_x), mean_y
    weight = torch.linalg.solve(scatter[:-1, :-1] + penalty * torch.eye(len(mean_x)).to(scatter), scatter[:-1, -1])
    return weight, mean_y - weight @ mean_x
