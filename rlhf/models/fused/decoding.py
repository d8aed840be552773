"""Sampling through the blocks of a Llama with few operations a token: what LoRA adds is summed up, or cast, once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from copy import copy
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import silu
from transformers.masking_utils import create_causal_mask
from transformers.modeling_outputs import BaseModelOutputWithPast

from rlhf.limits import SUMMED_BYTES
from rlhf.models import grouped
from rlhf.models.fused import few_rows, logits, lora, token_rows
from rlhf.models.fused.blocks import Layers, heads, rms_norm
from rlhf.models.fused.lora import Adapted

Attend = Callable[[Any, Tensor, Tensor, Tensor], Tensor]


class Decoder:
    """Stands for the backbone of ``model`` while tokens are sampled, on padded rows and with transformers' cache.

    Of prompts no padding is computed, but in attention.

    Args:
        blocks: as ``blocks.read`` gave them: the adapters of that moment. Where all weights and the head's take at most
            ``SUMMED_BYTES``, sums W + s B A are made for what comes after the prompts, token by token, and
            layers that read the same become one.
    """

    def __init__(self, model: Any, blocks: Sequence[Layers]) -> None:
        parts = [(first, second[:1], second[1:3], second[3:]) for first, second in blocks]
        weights = [layer.weight for block in blocks for part in block for layer in part]
        self.inner, head = getattr(model, model.base_model_prefix), token_rows.weight(model.get_output_embeddings())
        self.sums = sum(weight.nbytes for weight in (head, *weights)) <= SUMMED_BYTES
        self.prompts: list[list[Any]] = [[_cast(part) for part in block] for block in parts]
        self.tokens = [[_summed(part) for part in block] for block in parts] if self.sums else self.prompts

    def of(self, chosen: Sequence[int]) -> Decoder:
        """The same of some blocks alone, by their numbers."""
        few = copy(self)
        few.prompts, few.tokens = ([parts[number] for number in chosen] for parts in (self.prompts, self.tokens))
        return few

    def __call__(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        **unused: Any,
    ) -> BaseModelOutputWithPast:
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
            config=inner.config,
            inputs_embeds=x,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            position_ids=position_ids,
        )
        rows = Rows(len(x), x.shape[1], _real_places(attention_mask, x.shape[1]))
        states = self.states(x, self.turns(x, position_ids), rows, partial(_attend, mask, past_key_values))
        return BaseModelOutputWithPast(states, past_key_values=past_key_values)

    def turns(self, x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin [B n, 1, D] of ``positions`` [B or 1, n], in the dtype of x [B, n, d]."""
        cos, sin = self.inner.rotary_emb(x, positions)
        return cos.expand(len(x), -1, -1).flatten(0, 1)[:, None], sin.expand(len(x), -1, -1).flatten(0, 1)[:, None]

    def states(self, x: Tensor, turns: Sequence[Tensor], rows: Rows, attend: Attend) -> Tensor:
        """[B, n, d] last hidden states of the embedded tokens x [B, n, d]; 0 where no token is.

        Args:
            turns: cos and sin [B n, 1, D] of their positions.
            attend: what attention makes of q, k and v [B, heads, n, D]: [B, n, heads, D]; its first argument is the
                block's own attention.
        """
        x, cos, sin = (rows.real(part) for part in (x.flatten(0, 1), *turns))
        for block, layers in zip(self.inner.layers, self.tokens if rows.width == 1 else self.prompts, strict=True):
            x = _block(block, layers, rows, x, (cos, sin), attend)
        return rows.padded(self.inner.norm(x))


class Rows:
    """Which tokens of padded rows [count, width] are real: those at ``places`` [n] of the flattened rows; None: all."""

    def __init__(self, count: int, width: int, places: Tensor | None) -> None:
        self.count, self.width, self.places = count, width, places

    def real(self, x: Tensor) -> Tensor:
        """[n, ...] of x [count width, ...]."""
        return x if self.places is None else x[self.places]

    def padded(self, x: Tensor) -> Tensor:
        """[count, width, ...] of x [n, ...], 0 where no token is."""
        if self.places is not None:
            x = x.new_zeros(self.count * self.width, *x.shape[1:]).index_copy_(0, self.places, x)
        return x.view(self.count, self.width, *x.shape[1:])


def _real_places(mask: Tensor | None, width: int) -> Tensor | None:
    """What ``Rows`` needs of a mask [count, width and all before]."""
    if mask is None or width == 1 or bool((own := mask[:, -width:].bool()).all()):
        return None
    return own.flatten().nonzero()[:, 0]


@contextmanager
def in_place_of(model: Any, blocks: Sequence[Layers] | None) -> Iterator[Decoder | None]:
    """Sample through ``blocks`` (None: the model's own), with a head that gives float32 logits, and in float32 with a
    small model's head in order, until the end of the block. Yields what stands for the backbone."""
    head, decoder = model.get_output_embeddings(), None
    changed: dict[Any, Any] = {}
    if forward := logits.forward_of(head):
        changed[head] = forward
    if blocks is not None:
        decoder = Decoder(model, blocks)
        changed[decoder.inner] = decoder
        if decoder.sums and type(head) is nn.Linear and head not in changed:
            changed[head] = partial(few_rows.product, weight=few_rows.in_order(head.weight), bias=head.bias)
    own = {module: module.__dict__.get("forward") for module in changed}
    for module, forward in changed.items():
        module.forward = forward
    try:
        yield decoder
    finally:
        for module, forward in own.items():
            del module.forward
            if forward is not None:
                module.forward = forward


class Summed(NamedTuple):
    """Layers that read the same as one: weights [all o, i] as ``few_rows`` orders them, biases, and each layer's o."""

    weight: Tensor
    bias: Tensor | None
    sizes: list[int]


def _cast(layers: Sequence[Adapted]) -> list[Adapted]:
    """With LoRA in the base's dtype."""
    dtype = layers[0].weight.dtype
    return [
        layer._replace(
            a=None if layer.a is None else layer.a.to(dtype), b=None if layer.b is None else layer.b.to(dtype)
        )
        for layer in layers
    ]


@torch.no_grad()
def _summed(layers: Sequence[Adapted]) -> Summed:
    """Base and adapter added up."""
    biases = [layer.bias for layer in layers if layer.bias is not None]
    assert len(biases) in (0, len(layers)), "of layers that read the same all have a bias, or none"
    whole = few_rows.in_order(torch.cat([_sum(layer) for layer in layers]))
    return Summed(whole, torch.cat(biases) if biases else None, [len(layer.weight) for layer in layers])


def _sum(layer: Adapted) -> Tensor:
    """In the adapter's dtype, and rounded to the base's once."""
    if layer.a is None or layer.b is None:
        return layer.weight
    whole = torch.addmm(layer.weight.to(layer.a.dtype), layer.b, layer.a, alpha=layer.scaling)
    return whole.to(layer.weight.dtype)


def _of(x: Tensor, layers: Summed | Sequence[Adapted]) -> Sequence[Tensor]:
    """[n, o] what each layer makes of x [n, i]."""
    if isinstance(layers, Summed):
        return few_rows.product(x, layers.weight, layers.bias).split(layers.sizes, 1)  # type: ignore[no-any-return]
    return lora.products(x, layers)[0]


def _block(block: Any, layers: Sequence[Any], rows: Rows, x: Tensor, turns: Sequence[Tensor], attend: Attend) -> Tensor:
    """[n, d] of x [n, d]."""
    first, output, both, down = layers
    norm = block.input_layernorm
    (mixed,) = _of(_attended(block.self_attn, _of(_normed(x, norm), first), rows, turns, attend), output)
    x = mixed.add_(x)
    gate, up = _of(_normed(x, block.post_attention_layernorm), both)
    (y,) = _of(silu(gate).mul_(up), down)
    return y.add_(x)


def _attended(own: Any, projected: Sequence[Tensor], rows: Rows, turns: Sequence[Tensor], attend: Attend) -> Tensor:
    q, k, v = (rows.padded(part).transpose(1, 2) for part in heads(own, projected, *turns))
    return rows.real(attend(own, q, k, v).flatten(2).flatten(0, 1))


def _attend(mask: Tensor | None, cache: Any, own: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """With what transformers' cache holds; see ``Decoder.states``."""
    if cache is not None:
        k, v = cache.update(k, v, own.layer_idx)
    return grouped.sdpa(own, q, k, v, mask, scaling=own.scaling)[0]  # type: ignore[no-any-return]


def _normed(x: Tensor, norm: Any) -> Tensor:
    return rms_norm(x, norm.weight, norm.variance_epsilon)[0]
