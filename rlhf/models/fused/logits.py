"""Logits, which leave the output head's product in float32 where the base is in bfloat16.

Rounded to bfloat16 instead, a logit of 16 to 32 is off by up to 1/16, and the log-probability of its token with it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from rlhf.limits import CAST_VALUES
from rlhf.models.fused import lora, token_rows
from rlhf.models.fused.lora import Adapted
from rlhf.models.fused.token_rows import Rows

log = logging.getLogger("rlhf")


def of(head: Any, x: Tensor) -> Tensor:
    """[..., V] logits of hidden states x [..., d], in float32 at least, under the adapter that is active now.

    Gradients are for x, for LoRA on the head and for trained rows of it. That of x comes in the dtype of x: its terms
    are rounded to that and added up in float32.
    """
    layer, rows = _read(head)
    if layer is None or not _differs(layer, rows):
        y = head(x)
        return y if y.dtype.itemsize >= 4 else _rounded(head, y)
    rows = rows or Rows(None, None)
    y = Logits.apply(x.reshape(-1, x.shape[-1]), layer.weight, layer.bias, *rows)  # type: ignore[no-untyped-call]
    if layer.a is not None and layer.b is not None:
        wide = x.reshape(-1, x.shape[-1]).to(y.dtype)
        y = y.addmm_(wide @ layer.a.to(y.dtype).t(), layer.b.to(y.dtype).t(), alpha=layer.scaling)
    return y.view(*x.shape[:-1], -1)  # type: ignore[no-any-return]


def forward_of(head: Any) -> Callable[[Tensor], Tensor] | None:
    """What the head computes with while the model samples by its own forward; None where that is its own."""
    layer, rows = _read(head)
    return partial(of, head) if layer is not None and _differs(layer, rows) else None


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x W' + bias [n, o] of x [n, i], added up and returned in float32 at least.

    Without a gradient. Of numbers in half precision a GPU's own product does this. Elsewhere a part of W at a time is
    cast: to float32 no number is rounded, and float32 holds the product of two exactly.
    """
    if weight.dtype.itemsize >= 4:
        return linear(x, weight, bias)
    if x.is_cuda:
        y = torch.mm(x, weight.t(), out_dtype=torch.float32)
    else:
        wide, size = x.float(), min(len(weight), max(1, CAST_VALUES // weight.shape[1]))
        y, cast = (wide.new_empty(shape) for shape in ((len(x), len(weight)), (size, weight.shape[1])))
        for start in range(0, len(weight), size):
            part = weight[start : start + size]
            torch.mm(wide, cast[: len(part)].copy_(part).t(), out=y[:, start : start + size])
    return y if bias is None else y.add_(bias)


def _read(head: Any) -> tuple[Adapted | None, Rows | None]:
    if token_rows.wraps(head):
        return lora.adapted(head.token_adapter.base_layer), token_rows.active(head)
    return lora.adapted(head), None


def _differs(layer: Adapted, rows: Rows | None) -> bool:
    """Whether the logits come from here: where the head's own are rounded, or PEFT copies it for some rows."""
    return rows is not None or layer.weight.dtype.itemsize < 4


def _rounded(head: Any, y: Tensor) -> Tensor:
    _say_rounded(type(head).__name__, str(y.dtype).removeprefix("torch."))
    return y.float()


@cache
def _say_rounded(kind: str, dtype: str) -> None:
    log.warning("The output head, a %s, computes in a way of its own: its logits are rounded to %s.", kind, dtype)


class Logits(torch.autograd.Function):
    """x W' + bias [n, V] of x [n, d], with ``values`` [k, d] in the place of W's rows at ``places`` [k], or None.

    Trained rows are rounded to W's dtype, as PEFT does and as they are exported. Of W nothing is copied.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, places: Tensor | None, values: Tensor | None
    ) -> Tensor:
        assert not weight.requires_grad, "a model whose every weight is trained is in float32 and has no trained rows"
        y = product(x, weight, bias)
        if places is not None and values is not None:
            y.index_copy_(1, places, product(x, values.to(weight.dtype), None if bias is None else bias[places]))
        ctx.save_for_backward(x, weight, places, values)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Any) -> Any:
        x, weight, places, values = ctx.saved_tensors
        of_x = _grad_of_x(grad, weight)
        if places is None:
            return of_x.to(x.dtype), None, None, None, None
        own, wide = grad[:, places], _wide(weight)
        of_x = of_x.to(wide).addmm_(own, values.to(weight.dtype).to(wide) - weight[places].to(wide))
        return of_x.to(x.dtype), None, None, None, (own.t() @ x.to(wide)).to(values.dtype)


def _grad_of_x(grad: Tensor, weight: Tensor) -> Tensor:
    """grad W [n, d] of grad [n, V]; a CPU's product in half precision adds up in float32, a GPU's when it is asked."""
    if weight.dtype.itemsize < 4 and grad.is_cuda:
        return torch.mm(grad.to(weight.dtype), weight, out_dtype=torch.float32)
    return grad.to(weight.dtype) @ weight


def _wide(x: Tensor) -> torch.dtype:
    return x.dtype if x.dtype.itemsize >= 4 else torch.float32
