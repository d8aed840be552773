"""Attention with query heads that share keys and values, kept off the one kernel that holds every score."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward


def holds_all_scores(query: Tensor, key: Tensor) -> bool:
    """Whether SDPA would make all S x S scores of every head: on CUDA only its flash kernel lets heads share keys, and
    that one takes half precision alone. For one query token the scores are few, and copies of the cache are not.

    query [B, heads, S, D], key [B, key heads, S, D].
    """
    shares = query.shape[1] != key.shape[1] and query.shape[2] > 1
    return shares and query.is_cuda and query.dtype not in (torch.bfloat16, torch.float16)


def every_head(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values, a copy for each query head where a kernel needs them for its scores to stay small."""
    if not holds_all_scores(query, key):
        return key, value
    times = query.shape[1] // key.shape[1]
    return repeat_kv(key, times), repeat_kv(value, times)


def sdpa(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **settings: Any) -> Any:
    """transformers' SDPA [B, S, heads, D]. With a mask it copies keys and values by itself."""
    if mask is None and holds_all_scores(query, key):
        key, value = every_head(query, key, value)
        module = SimpleNamespace(is_causal=getattr(module, "is_causal", True))
    return sdpa_attention_forward(module, query, key, value, mask, **settings)
