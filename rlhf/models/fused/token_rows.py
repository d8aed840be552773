"""Rows of the embedding and of the output head that an adapter trains (``lora.train_tokens``), without PEFT's copies of
the whole weight for every forward pass."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import torch
from peft.utils.other import TrainableTokensWrapper
from torch import Tensor, nn
from torch.nn.functional import embedding


class Rows(NamedTuple):
    """The rows at ``places`` [k] are ``values`` [k, d]; both None where the weight has its own."""

    places: Tensor | None
    values: Tensor | None


def wraps(module: Any) -> bool:
    """Whether an adapter trains rows of the module."""
    return isinstance(module, TrainableTokensWrapper)


def weight(module: Any) -> Tensor:
    """The module's own weight; PEFT's wrapper gives a copy with the trained rows in it."""
    return (module.token_adapter.base_layer if wraps(module) else module).weight  # type: ignore[no-any-return]


def active(module: Any) -> Rows | None:
    """The rows of the adapter that is active now; None where it trains none."""
    own = module.token_adapter
    names = [] if own.disable_adapters else [name for name in own.active_adapters if name in own.trainable_tokens_delta]
    if not names:
        return None
    values, known = own.trainable_tokens_delta[names[0]], own.__dict__.setdefault("known_places", {})
    places = known.get(names[0])
    if places is None or places.device != values.device:
        places = known[names[0]] = torch.tensor(own.token_indices[names[0]], device=values.device)
    return Rows(places, values)


def install(model: nn.Module) -> None:
    """Give every embedding whose rows are trained a forward of its own; for the head, see ``fused.logits``."""
    modules: list[Any] = list(model.modules())
    for module in modules:
        if wraps(module) and isinstance(module.token_adapter.base_layer, nn.Embedding):
            module.forward = partial(_embedded, module)


def _embedded(module: Any, ids: Tensor) -> Tensor:
    """[..., d] of token ids [...]: the weight's own rows, and the trained ones where a token has one."""
    found, rows = module.token_adapter.base_layer(ids), active(module)
    if rows is None or rows.places is None or rows.values is None:
        return found  # type: ignore[no-any-return]
    hits = torch.eq(ids[..., None], rows.places)
    trained = embedding(hits.to(torch.uint8).argmax(-1), rows.values.to(found.dtype))
    scale = module.token_adapter._get_embed_scale()
    return torch.where(hits.any(-1, keepdim=True), trained if scale is None else trained * scale.to(found.dtype), found)
