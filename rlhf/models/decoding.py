"""Sampling through the blocks of a Llama with few operations a token: what LoRA adds is summed up, or cast, once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear, silu
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import create_causal_mask
from transformers.modeling_outputs import BaseModelOutputWithPast

from rlhf.models import fused_lora
from rlhf.models.blocks import Layers, heads, rms_norm
from rlhf.models.fused_lora import Adapted

SUMMED_BYTES = 1 << 28


class Decoder:
    """Stands for the backbone ``inner`` while tokens are sampled, on padded rows and with transformers' cache.

    Args:
        blocks: as ``rlhf.models.blocks.read`` gave them: the adapters of that moment. Where all sums W + s B A together
            take at most ``SUMMED_BYTES`` they are made, and layers that read the same become one.
    """

    def __init__(self, inner: Any, blocks: Sequence[Layers]) -> None:
        self.inner = inner
        sums = sum(layer.weight.nbytes for block in blocks for part in block for layer in part) <= SUMMED_BYTES
        self.blocks = [
            [_prepared(part, sums) for part in (first, second[:1], second[1:3], second[3:])] for first, second in blocks
        ]

    def __call__(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, position_ids: Tensor | None = None,
        past_key_values: Any = None, **unused: Any,
    ) -> BaseModelOutputWithPast:  # fmt: skip
        """As the backbone's own forward, of ids [B, n] behind what the cache holds.

        Args:
            unused: what else transformers passes on.
        """
        assert unused.get("inputs_embeds") is None, "sampling gives ids"
        inner = self.inner
        x = inner.embed_tokens(input_ids)
        if position_ids is None:
            seen = past_key_values.get_seq_length() if past_key_values is not None else 0
            position_ids = torch.arange(seen, seen + x.shape[1], device=x.device)[None]
        mask = create_causal_mask(
            config=inner.config, inputs_embeds=x, attention_mask=attention_mask, past_key_values=past_key_values,
            position_ids=position_ids,
        )  # fmt: skip
        cos, sin = (part.expand(len(x), -1, -1).flatten(0, 1)[:, None] for part in inner.rotary_emb(x, position_ids))
        rows, x = x.shape[:2], x.flatten(0, 1)
        for block, prepared in zip(inner.layers, self.blocks, strict=True):
            x = _block(block, prepared, rows, x, cos, sin, mask, past_key_values)
        return BaseModelOutputWithPast(inner.norm(x.view(*rows, -1)), past_key_values=past_key_values)


@contextmanager
def in_place_of(inner: Any, blocks: Sequence[Layers] | None) -> Iterator[None]:
    """Sample through ``blocks`` until the end of the block; None leaves the backbone alone."""
    if blocks is None:
        yield
        return
    inner.forward = Decoder(inner, blocks)
    try:
        yield
    finally:
        del inner.forward


Prepared = tuple[Tensor, Tensor | None, list[int]] | list[Adapted]


def _prepared(layers: Sequence[Adapted], sums: bool) -> Prepared:
    """The sum of base and adapter of all layers, one below the other; or the layers, with LoRA in the base's dtype."""
    if not sums:
        dtype = layers[0].weight.dtype
        return [
            layer._replace(
                a=None if layer.a is None else layer.a.to(dtype), b=None if layer.b is None else layer.b.to(dtype)
            )
            for layer in layers
        ]
    biases = [layer.bias for layer in layers if layer.bias is not None]
    assert len(biases) in (0, len(layers)), "of layers that read the same all have a bias, or none"
    whole = torch.cat([_sum(layer) for layer in layers]).t().contiguous().t()  # few rows are faster in this order
    return whole, torch.cat(biases) if biases else None, [len(layer.weight) for layer in layers]


def _sum(layer: Adapted) -> Tensor:
    if layer.a is None or layer.b is None:
        return layer.weight
    return layer.weight + (layer.scaling * (layer.b @ layer.a)).to(layer.weight.dtype)


def _of(x: Tensor, layers: Prepared) -> Sequence[Tensor]:
    """[n, o] what each layer makes of x [n, i]."""
    if isinstance(layers, list):
        return fused_lora.products(x, layers)[0]
    weight, bias, sizes = layers
    return linear(x, weight, bias).split(sizes, 1)  # type: ignore[no-any-return]


def _block(
    block: Any, prepared: Sequence[Prepared], rows: Sequence[int], x: Tensor, cos: Tensor, sin: Tensor,
    mask: Tensor | None, cache: Any,
) -> Tensor:  # fmt: skip
    """[B n, d] of x [B n, d]."""
    first, output, both, down = prepared
    norm = block.input_layernorm
    (mixed,) = _of(_attended(block.self_attn, _of(_normed(x, norm), first), rows, cos, sin, mask, cache), output)
    x = mixed.add_(x)
    gate, up = _of(_normed(x, block.post_attention_layernorm), both)
    (y,) = _of(silu(gate).mul_(up), down)
    return y.add_(x)


def _attended(
    own: Any, projected: Sequence[Tensor], rows: Sequence[int], cos: Tensor, sin: Tensor, mask: Tensor | None,
    cache: Any,
) -> Tensor:  # fmt: skip
    q, k, v = (part.unflatten(0, rows).transpose(1, 2) for part in heads(own, projected, cos, sin))
    if cache is not None:
        k, v = cache.update(k, v, own.layer_idx)
    return sdpa_attention_forward(own, q, k, v, mask, scaling=own.scaling)[0].flatten(2).flatten(0, 1)  # type: ignore[no-any-return]


def _normed(x: Tensor, norm: Any) -> Tensor:
    return rms_norm(x, norm.weight, norm.variance_epsilon)[0]
