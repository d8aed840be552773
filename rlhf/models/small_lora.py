"""LoRA as one product, W + s B A, for models so small that PEFT's three products cost more than their arithmetic."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from peft.tuners.lora.layer import Linear as LoraLinear
from torch import Tensor, nn
from torch.nn.functional import linear

LARGEST_WIDTH = 512


Cache = dict[int, tuple[tuple[int, int], Tensor]]


def install(model: nn.Module, cache: Cache | None = None) -> int:
    """Give every plain LoRA layer of a small model the one-product forward; returns how many took it.

    The function is the same, up to rounding. A layer wider than ``LARGEST_WIDTH``, with dropout, or of another kind
    keeps PEFT's form. Without gradient the summed weight is kept in ``cache`` (where one is given) until its owner,
    who clears it when the active adapter changes, or an optimizer step changes the weights.
    """
    count = 0
    for module in model.modules():
        if isinstance(module, LoraLinear) and isinstance(module.base_layer, nn.Linear) and _is_plain(module):
            module.forward = partial(_forward, module, cache)  # type: ignore[method-assign]
            count += 1
    return count


def _is_plain(layer: Any) -> bool:
    narrow = max(layer.in_features, layer.out_features) <= LARGEST_WIDTH
    undropped = all(isinstance(dropout, nn.Identity) for dropout in layer.lora_dropout.values())
    return narrow and undropped and not any(layer.use_dora.values()) and not layer.fan_in_fan_out


def _forward(layer: Any, cache: Cache | None, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    base = layer.base_layer
    names = [name for name in layer._active_adapter if name in layer.lora_A]
    if layer._disable_adapters or not names:
        return base(x)  # type: ignore[no-any-return]
    a, b = layer.lora_A[names[0]].weight, layer.lora_B[names[0]].weight
    keep = cache is not None and not torch.is_grad_enabled()
    version = (a._version, b._version)
    if cache is not None and keep and cache.get(id(layer), (None,))[0] == version:
        return linear(x, cache[id(layer)][1], base.bias)
    weight = base.weight + (layer.scaling[names[0]] * (b @ a)).to(base.weight.dtype)
    if cache is not None and keep:
        cache[id(layer)] = (version, weight)
    return linear(x, weight, base.bias)
