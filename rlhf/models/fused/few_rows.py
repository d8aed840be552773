"""Products of few rows, as sampling makes them, with weights whose numbers are put in the order for it once."""

from __future__ import annotations

import platform

import torch
from torch import Tensor
from torch.nn.functional import linear

NUMBERS = 1 << 17  # of a smaller weight torch's own product is done before oneDNN has begun
_known = torch.backends.mkldnn.is_available() and platform.machine() in ("x86_64", "AMD64")
ONEDNN = getattr(torch.ops.mkldnn, "_linear_pointwise", None) if _known else None  # what torch's compiler calls


def in_order(weight: Tensor) -> Tensor:
    """A copy of W [o, i] for ``product`` alone.

    In float32 on an x86 CPU it is in oneDNN's order, with which 4 to 24 rows take .4 to .7 of the time that MKL does,
    to which torch gives such products (AMD Zen 4, one thread). Training's many rows would gain a few percent, but
    oneDNN compiles a kernel for every number of rows, and keeps a thousand of them: 250 MB.
    """
    if weight.dtype == torch.float32 and weight.device.type == "cpu" and weight.numel() >= NUMBERS and ONEDNN:
        return torch.ops.mkldnn._reorder_linear_weight(weight)  # type: ignore[no-any-return]
    return weight.t().contiguous().t()


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x W' + bias [n, o] of x [n, i], without a gradient; ``weight`` is W, or what ``in_order`` gave."""
    if weight.is_mkldnn:
        assert ONEDNN is not None
        return ONEDNN(x, weight, bias, "none", [], "")  # type: ignore[no-any-return]
    return linear(x, weight, bias)
