"""The blocks of a Llama over packed rows: the same function in fewer passes, less memory, and no row unwanted."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention, silu

from rlhf.models import grouped
from rlhf.models.fused import lora
from rlhf.models.fused.lora import Adapted

KINDS = ("Llama", "Mistral", "Qwen2", "Qwen3")
READ_INPUT, MLP = ("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj", "down_proj")

Layers = tuple[list[Adapted], list[Adapted]]


def read(inner: Any) -> list[Layers] | None:
    """The linear layers of every block with the adapters that are active now: those that read the block's input, and
    those behind attention; None where this module does not know the model."""
    found = []
    for block in getattr(inner, "layers", ()):
        if not _is_known(block):
            return None
        first = [lora.adapted(getattr(block.self_attn, name)) for name in READ_INPUT]
        after = [block.self_attn.o_proj, *(getattr(block.mlp, name) for name in MLP)]
        second = [lora.adapted(layer) for layer in after]
        if None in first or None in second:
            return None
        found.append((first, second))
    return found or None  # type: ignore[return-value]


def _is_known(block: Any) -> bool:
    """Whether it is a block of transformers' own, with norms that nothing wraps."""
    kind = type(block).__name__.removesuffix("DecoderLayer")
    if kind not in KINDS or type(block).__module__ != f"transformers.models.{kind.lower()}.modeling_{kind.lower()}":
        return False
    norms = {type(norm).__name__ for norm in (block.input_layernorm, block.post_attention_layernorm)}
    return norms == {f"{kind}RMSNorm"} and block.self_attn.config.hidden_act in ("silu", "swish")


def hidden_states(
    inner: Any,
    blocks: Sequence[Layers],
    lengths: Sequence[int],
    ids: Tensor,
    positions: Tensor,
    wanted: Tensor | None,
) -> Tensor:
    """[n, d] last hidden states of the packed tokens ``ids`` [n], or of those at ``wanted`` alone.

    Of the last block, output projection and MLP run on the wanted tokens: nobody attends to what they make of others.

    Args:
        blocks: what ``read`` gave.
        lengths: of the sequences, each of which attends to itself alone.
        positions: [n] of each token in its sequence.
    """
    x = inner.embed_tokens(ids[None])  # [1, n, d]
    # [1, n, D] -> [n, 1, D], which is the same for every head
    cos, sin = (part[0, :, None] for part in inner.rotary_emb(x, position_ids=positions[None]))
    x = x[0]  # [n, d]
    for number, (block, layers) in enumerate(zip(inner.layers, blocks, strict=True)):
        rows = wanted if number == len(blocks) - 1 else None
        run = partial(_block, block, layers, lengths, cos, sin, rows)
        checkpointed = block.gradient_checkpointing and block.training
        x = block._gradient_checkpointing_func(run, x) if checkpointed else run(x)
    return inner.norm(x)  # type: ignore[no-any-return]


def _block(
    block: Any, layers: Layers, lengths: Sequence[int], cos: Tensor, sin: Tensor, wanted: Tensor | None, x: Tensor
) -> Tensor:
    mixed = _attended(block, layers[0], lengths, cos, sin, x)
    if wanted is not None:
        # [n, q], [n, d] -> the wanted rows alone: what follows looks at no other token
        mixed, x = mixed[wanted], x[wanted]
    norm = block.post_attention_layernorm
    return _apply(OutputAndMlp, (mixed, x, norm.weight, norm.variance_epsilon), layers[1])  # type: ignore[no-any-return]


def _attended(
    block: Any, layers: Sequence[Adapted], lengths: Sequence[int], cos: Tensor, sin: Tensor, x: Tensor
) -> Tensor:
    """[n, q] what attention makes of x [n, d]."""
    own, norm = block.self_attn, block.input_layernorm
    projected = _apply(NormedProducts, (x, norm.weight, norm.variance_epsilon), layers)
    q, k, v = heads(own, projected, cos, sin)
    dropout = own.attention_dropout if block.training else 0.0
    settings = {"is_causal": True, "dropout_p": dropout, "scale": own.scaling}
    parts = zip(*(part.split(lengths) for part in (q, k, v)), strict=True)
    return torch.cat([_attention(*part, **settings) for part in parts]).flatten(1)


def heads(own: Any, projected: Sequence[Tensor], cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value [n, heads, D], normed where the model does and turned, from their projections [n, heads D].

    Args:
        own: the model's attention.
        cos, sin: [n, 1, D] of the tokens' positions.
    """
    q, k, v = (part.unflatten(1, (-1, own.head_dim)) for part in projected)
    if hasattr(own, "q_norm"):
        q, k = own.q_norm(q), own.k_norm(k)
    return Rotated.apply(q, cos, sin), Rotated.apply(k, cos, sin), v  # type: ignore[no-untyped-call]


def _attention(q: Tensor, k: Tensor, v: Tensor, **settings: Any) -> Tensor:
    """[S, heads, D] of one sequence."""
    q, k, v = (part.transpose(0, 1)[None] for part in (q, k, v))
    k, v = grouped.every_head(q, k, v)
    shares = q.shape[1] != k.shape[1]
    return scaled_dot_product_attention(q, k, v, enable_gqa=shares, **settings)[0].transpose(0, 1)


def _apply(node: Any, arguments: Sequence[Any], layers: Sequence[Adapted]) -> Any:
    """A node takes its tensors one by one, or autograd would not see them."""
    tensors = [tensor for layer in layers for tensor in layer[:4]]
    return node.apply(*arguments, [layer.scaling for layer in layers], *tensors)


def _layers(scalings: Sequence[float], tensors: Sequence[Any]) -> list[Adapted]:
    parts = zip(*[iter(tensors)] * 4, strict=True)
    return [Adapted(w, bias, a, b, scaling) for (w, bias, a, b), scaling in zip(parts, scalings, strict=True)]


class NormedProducts(torch.autograd.Function):
    """Linear layers of RMSNorm(x) [n, d]: their outputs, and the gradients for all that is trained.

    Kept are x, its scale [n, 1] and the inner products [n, all ranks], and not the normed x.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, norm: Tensor, eps: float, scalings: list[float], *tensors: Any) -> Any:
        normed, scale = rms_norm(x, norm, eps)  # [n, d], [n, 1]
        found, inner = lora.products(normed, _layers(scalings, tensors))  # [n, o] each, [n, all ranks]
        ctx.save_for_backward(x, norm, scale, inner, *tensors)
        ctx.scalings = scalings
        return tuple(found)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        x, norm, scale, inner, *tensors = ctx.saved_tensors
        layers = _layers(ctx.scalings, tensors)
        of_x, of_norm, of_layers = _backward_of_normed(grads, x, norm, scale, inner, layers, ctx.needs_input_grad[0])
        return (of_x, of_norm, None, None, *of_layers)


class OutputAndMlp(torch.autograd.Function):
    """The rest of a block: h = x + mixed Wo', then h + (silu(n Wg') * (n Wu')) Wd' of n = RMSNorm(h); each W adapted.

    Gradients are for ``mixed`` [n, q], x [n, d] and all that is trained. Of the MLP's numbers what gate and up give is
    kept; their product is made again.
    """

    @staticmethod
    def forward(
        ctx: Any, mixed: Tensor, x: Tensor, norm: Tensor, eps: float, scalings: list[float], *tensors: Any
    ) -> Any:
        output, *both, down = _layers(scalings, tensors)
        (h,), inner_output = lora.products(mixed, [output])  # [n, q] -> [n, d]
        h.add_(x)
        normed, scale = rms_norm(h, norm, eps)  # [n, d], [n, 1]
        (gate, up), inner = lora.products(normed, both)  # [n, d] -> [n, f] twice
        del normed  # the backward pass does without it: one [n, d] a block less is kept
        (y,), inner_down = lora.products(silu(gate).mul_(up), [down])  # [n, f] -> [n, d]
        ctx.save_for_backward(mixed, h, norm, scale, inner_output, inner, inner_down, gate, up, *tensors)
        ctx.scalings = scalings
        return y.add_(h)

    @staticmethod
    def backward(ctx: Any, grad: Any) -> Any:
        mixed, h, norm, scale, inner_output, inner, inner_down, gate, up, *tensors = ctx.saved_tensors
        output, *both, down = _layers(ctx.scalings, tensors)
        active = silu(gate)  # [n, f]
        of_inner = lora.through([grad], [down])  # [n, d] -> [n, r]
        of_down = _of_layer(grad, of_inner, active * up, inner_down, down)
        of_product = lora.grad_of_x([grad], of_inner, [down])  # [n, d] -> [n, f]: of silu(gate) * up
        # From here active and of_product are overwritten, so that no further [n, f] is made.
        of_up = active.mul_(of_product)  # [n, f]
        of_gate = torch.ops.aten.silu_backward.grad_input(of_product.mul_(up), gate, grad_input=of_product)
        of_h, of_norm, of_both = _backward_of_normed((of_gate, of_up), h, norm, scale, inner, both)  # [n, f] -> [n, d]
        assert of_h is not None
        of_h.add_(grad)  # the residual: h also goes past the MLP
        of_inner = lora.through([of_h], [output])  # [n, d] -> [n, r]
        of_output = _of_layer(of_h, of_inner, mixed, inner_output, output)
        of_mixed = lora.grad_of_x([of_h], of_inner, [output])  # [n, d] -> [n, q]
        return (of_mixed, of_h, of_norm, None, None, *of_output, *of_both, *of_down)


class Rotated(torch.autograd.Function):
    """x [n, heads, D] turned by its position: x cos + (-x2, x1) sin of its halves x1 and x2 (Su et al. 2021,
    https://arxiv.org/abs/2104.09864, eq. 34, in the order of GPT-NeoX). cos, sin [n, 1, D] are constants."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        (low, high), (sin_low, sin_high) = x.chunk(2, -1), sin.chunk(2, -1)  # [n, heads, D / 2], [n, 1, D / 2]
        turned = x * cos  # [n, heads, D]
        first, second = turned.chunk(2, -1)  # views: the sums below go into turned, and (-x2, x1) is never made
        first.addcmul_(high, sin_low, value=-1)
        second.addcmul_(low, sin_high)
        return turned

    @staticmethod
    def backward(ctx: Any, grad: Any) -> Any:
        cos, sin = ctx.saved_tensors
        # The transpose of the rotation: the halves of sin exchange their places and their signs.
        (low, high), (sin_low, sin_high) = grad.chunk(2, -1), sin.chunk(2, -1)  # [n, heads, D / 2], [n, 1, D / 2]
        turned = grad * cos  # [n, heads, D]
        first, second = turned.chunk(2, -1)
        first.addcmul_(high, sin_high)
        second.addcmul_(low, sin_low, value=-1)
        return turned, None, None


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """weight x / sqrt(mean x^2 + eps) of x [n, d] (Zhang and Sennrich 2019, https://arxiv.org/abs/1910.07467, eq. 4),
    and the factor [n, 1], in float32 at least."""
    squares = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=_wide(x)).square_()  # [n, 1]
    scale = squares.div_(x.shape[-1]).add_(eps).rsqrt_()
    return _scaled(x, weight, scale), scale


def _scaled(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    return (x * scale).to(x.dtype).mul_(weight)


def _backward_of_normed(
    grads: Sequence[Tensor],
    x: Tensor,
    norm: Tensor,
    scale: Tensor,
    inner: Tensor | None,
    layers: Sequence[Adapted],
    of_input: bool = True,
) -> tuple[Tensor | None, Tensor | None, list[Tensor | None]]:
    """Of ``layers`` of RMSNorm(x): gradients of x, of the norm's weight, and of every weight, bias, A and B.

    With n = norm scale x, g the gradient of n and w = norm g: scale w - scale^3 x mean(w x). The gradient of A is that
    of inner' n = (inner scale)' x norm, for which n need not be made again.
    """
    of_inner = lora.through(grads, layers)  # [n, all ranks]
    # [all ranks, n] @ [n, d] -> [all ranks, d], each column times its norm
    of_a = None if of_inner is None else ((of_inner * scale).to(x.dtype).t() @ x).mul_(norm)
    of_layers = lora.grads_of_layers(grads, of_a, inner, layers, lambda: _scaled(x, norm, scale))
    if not (of_input or norm.requires_grad):
        return None, None, of_layers
    wide, own = lora.grad_of_x(grads, of_inner, layers).to(_wide(x)), x.to(_wide(x))  # [n, d]: g and x
    of_norm = (wide * own).mul_(scale).sum(0).to(norm.dtype) if norm.requires_grad else None  # [d]
    # [n, 1] scale^3 mean(w x); wide becomes w = norm g on the way, which of_norm had to come before
    share = torch.linalg.vecdot(wide.mul_(norm), own)[:, None] * scale.pow(3).div_(x.shape[-1])
    return wide.mul_(scale).addcmul_(own, share, value=-1).to(x.dtype), of_norm, of_layers


def _of_layer(
    grad: Tensor, of_inner: Tensor | None, x: Tensor, inner: Tensor | None, layer: Adapted
) -> list[Tensor | None]:
    of_a = None if of_inner is None else of_inner.t() @ x  # [r, n] @ [n, i] -> [r, i]
    return lora.grads_of_layers([grad], of_a, inner, [layer], lambda: x)


def _wide(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32
