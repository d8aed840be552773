"""LoRA as one node of the graph a layer, or of several layers that read the same."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from peft.tuners.lora.layer import LoraLayer
from torch import Tensor, nn
from torch.nn.functional import linear


class Adapted(NamedTuple):
    """A linear layer with the active adapter: y = x W' + bias + s (x A') B' (Hu et al. 2021,
    https://arxiv.org/abs/2106.09685, eq. 3).

    W [o, i], bias [o] or None; A [r, i] and B [o, r], both None for the bare layer. Products are in the dtype of x, as
    under autocast; A and B keep theirs.
    """

    weight: Tensor
    bias: Tensor | None
    a: Tensor | None
    b: Tensor | None
    scaling: float


def install(model: nn.Module) -> int:
    """Give every plain LoRA layer a forward of its own; returns how many took it.

    The function is PEFT's, up to rounding. A layer with dropout or of another kind keeps PEFT's form.
    """
    layers: list[Any] = [module for module in model.modules() if isinstance(module, LoraLayer) and _is_plain(module)]
    for layer in layers:
        layer.forward = partial(_forward if type(layer.base_layer) is nn.Linear else _beside, layer)
    return len(layers)


def adapted(layer: Any) -> Adapted | None:
    """A layer as ``products`` takes it; None where it is of another kind."""
    own = layer.base_layer if isinstance(layer, LoraLayer) else layer
    if type(own) is not nn.Linear:
        return None
    if own is layer or not (name := _active(layer)):
        return Adapted(own.weight, own.bias, None, None, 0.0)
    return Adapted(own.weight, own.bias, *_factors(layer, name)) if _is_plain(layer, [name]) else None


def products(x: Tensor, layers: Sequence[Adapted]) -> tuple[list[Tensor], Tensor | None]:
    """What layers make of the same ``x`` [n, i]: [n, o] of each, and x A' of all adapted ones, one beside the other."""
    factors = [layer.a for layer in layers if layer.a is not None]
    # One product for all adapters that read the same x, instead of one a layer.
    # [n, i] @ [i, all ranks] -> [n, all ranks]
    inner = x @ _together(factors).to(x.dtype).t() if factors else None
    parts = iter(inner.split([len(a) for a in factors], 1)) if inner is not None else iter(())
    found = []
    for layer in layers:
        y = linear(x, layer.weight, layer.bias)  # [n, i] -> [n, o]
        if layer.b is not None:
            # [n, r] @ [r, o], added into y by the product itself: nothing of the size of y is written a second time
            y.addmm_(next(parts), layer.b.to(x.dtype).t(), alpha=layer.scaling)
        found.append(y)
    return found, inner


def through(grads: Sequence[Tensor], layers: Sequence[Adapted]) -> Tensor | None:
    """[n, all ranks] gradients of x A' from those of the layers' outputs."""
    found = [
        g @ layer.b.to(g.dtype) * layer.scaling  # [n, o] @ [o, r] -> [n, r]
        for g, layer in zip(grads, layers, strict=True)
        if layer.b is not None
    ]
    return _together(found, 1) if found else None


def grad_of_x(grads: Sequence[Tensor], inner: Tensor | None, layers: Sequence[Adapted]) -> Tensor:
    """[n, i] from the gradients of the outputs [n, o] and ``inner`` of x A'."""
    grad = grads[0] @ layers[0].weight  # [n, o] @ [o, i] -> [n, i]
    for g, layer in zip(grads[1:], layers[1:], strict=True):
        grad.addmm_(g, layer.weight)  # [n, o] @ [o, i], summed in place over the layers
    if inner is not None:
        # [n, all ranks] @ [all ranks, i]
        grad.addmm_(inner, _together([layer.a for layer in layers if layer.a is not None]).to(grad.dtype))
    return grad


def grads_of_layers(
    grads: Sequence[Tensor],
    of_a: Tensor | None,
    inner: Tensor | None,
    layers: Sequence[Adapted],
    read: Callable[[], Tensor],
) -> list[Tensor | None]:
    """Gradients of weight, bias, A and B of every layer in turn.

    Args:
        of_a: [all ranks, i] of all A's; inner: [n, all ranks] as ``products`` gave it.
        read: gives x [n, i]; called where a weight is trained.
    """
    found: list[Tensor | None] = []
    x = read() if any(layer.weight.requires_grad for layer in layers) else None
    at = 0
    for g, layer in zip(grads, layers, strict=True):
        found.append(g.t() @ x if x is not None and layer.weight.requires_grad else None)  # [o, n] @ [n, i]
        found.append(g.sum(0) if layer.bias is not None and layer.bias.requires_grad else None)  # [o]
        if layer.a is None or layer.b is None:
            found += [None, None]
            continue
        assert of_a is not None and inner is not None
        part = slice(at, at + len(layer.a))
        at = part.stop
        of_b = (g.t() @ inner[:, part]).mul_(layer.scaling)  # [o, n] @ [n, r] -> [o, r]
        found += [of_a[part].to(layer.a.dtype), of_b.to(layer.b.dtype)]  # [r, i], [o, r]
    return found


def _together(parts: Sequence[Tensor], dim: int = 0) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), dim)


def _is_plain(layer: Any, names: Sequence[str] | None = None) -> bool:
    """Whether adapters (None: all) are what ``Adapted`` says, without dropout, bias or a magnitude."""
    for name in layer.lora_A if names is None else names:
        if not isinstance(layer.lora_dropout[name], nn.Identity) or layer.use_dora[name]:
            return False
        if layer.lora_B[name].bias is not None:
            return False
    return isinstance(layer.base_layer, nn.Linear)


def _active(layer: Any) -> str | None:
    """The adapter that the layer computes with."""
    return next((name for name in layer._active_adapter if name in layer.lora_A and not layer._disable_adapters), None)


def _factors(layer: Any, name: str) -> tuple[Tensor, Tensor, float]:
    """A, B and scaling."""
    return layer.lora_A[name].weight, layer.lora_B[name].weight, layer.scaling[name]


def _forward(layer: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    base, name = layer.base_layer, _active(layer)
    if name is None:
        return base(x)  # type: ignore[no-any-return]
    return LoraProduct.apply(x, base.weight, base.bias, *_factors(layer, name))  # type: ignore[no-any-return, no-untyped-call]


def _beside(layer: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """The same where the base layer computes by itself, as a quantised one does."""
    y, name = layer.base_layer(x), _active(layer)
    if name is None:
        return y  # type: ignore[no-any-return]
    return LoraSum.apply(y, x, *_factors(layer, name))  # type: ignore[no-any-return, no-untyped-call]


class LoraProduct(torch.autograd.Function):
    """One ``Adapted`` layer of x [..., i], and its gradients for x, A and B.

    Kept for the backward pass are x and x A' alone, and nothing as large as x or y is written twice: what PEFT's form
    adds in passes of its own, the products here add as they go.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scaling: float) -> Any:
        rows = x.reshape(-1, x.shape[-1])  # [..., i] -> [n, i]
        (y,), inner = products(rows, [Adapted(weight, bias, a, b, scaling)])  # [n, o], [n, r]
        ctx.save_for_backward(rows, inner, weight, a, b)
        ctx.scaling = scaling
        return y.view(*x.shape[:-1], weight.shape[0])  # [n, o] -> [..., o]

    @staticmethod
    def backward(ctx: Any, grad: Any) -> Any:
        rows, inner, weight, a, b = ctx.saved_tensors
        layers, grads = [Adapted(weight, None, a, b, ctx.scaling)], [grad.reshape(-1, grad.shape[-1])]  # [n, o]
        of_inner = through(grads, layers)  # [n, r]
        assert of_inner is not None
        # of_inner.t() @ rows is the gradient of A: [r, n] @ [n, i] -> [r, i]. The base weight is frozen: it takes none.
        _, _, *of_factors = grads_of_layers(grads, of_inner.t() @ rows, inner, layers, lambda: rows)
        of_x = None
        if ctx.needs_input_grad[0]:
            of_x = grad_of_x(grads, of_inner, layers).view(*grad.shape[:-1], weight.shape[1])
        return (of_x, None, None, *of_factors, None)


class LoraSum(torch.autograd.Function):
    """y + s (x A') B' and its gradients for y, x, A and B; y [..., o] is what the base layer makes of x [..., i]."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, x: Tensor, a: Tensor, b: Tensor, scaling: float) -> Any:
        rows, own_a, own_b = x.reshape(-1, x.shape[-1]), a.to(x.dtype), b.to(x.dtype)  # [..., i] -> [n, i]
        inner = rows @ own_a.t()  # [n, i] @ [i, r] -> [n, r]
        ctx.save_for_backward(rows, inner, a, b)
        ctx.scaling = scaling
        # [n, r] @ [r, o] + [n, o] -> [..., o]
        return torch.addmm(y.reshape(-1, y.shape[-1]), inner, own_b.t(), alpha=scaling).view_as(y)

    @staticmethod
    def backward(ctx: Any, grad: Any) -> Any:
        rows, inner, a, b = ctx.saved_tensors
        g = grad.reshape(-1, grad.shape[-1])  # [..., o] -> [n, o]
        of_inner = (g @ b.to(g.dtype)).mul_(ctx.scaling)  # [n, o] @ [o, r] -> [n, r]
        # [n, r] @ [r, i] -> [..., i]; [r, n] @ [n, i]; [o, n] @ [n, r]
        grad_x = (of_inner @ a.to(g.dtype)).view(*grad.shape[:-1], a.shape[1]) if ctx.needs_input_grad[1] else None
        grad_a = (of_inner.t() @ rows).to(a.dtype) if ctx.needs_input_grad[2] else None
        grad_b = (g.t() @ inner).mul_(ctx.scaling).to(b.dtype) if ctx.needs_input_grad[3] else None
        return grad, grad_x, grad_a, grad_b, None
