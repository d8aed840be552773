"""Rows of the embedding and of the output head that an adapter trains (``lora.train_tokens``), without PEFT's copies of
the whole weight for every forward pass."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from peft.utils.other import TrainableTokensWrapper
from torch import Tensor


class Rows(NamedTuple):
    """The rows at ``places`` [k] are ``values`` [k, d]; both None where the weight has its own."""

    places: Tensor | None
    values: Tensor | None


def wraps(module: Any) -> bool:
    """Whether an adapter trains rows of the module."""
    return isinstance(module, TrainableTokensWrapper)


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
