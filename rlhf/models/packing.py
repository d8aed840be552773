"""Sequences one behind the other in one row, so that no forward pass of training or scoring computes padding."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from rlhf.models import blocks, decoding
from rlhf.progress import waiting

log = logging.getLogger("rlhf")
ATTENTION = "rlhf_sdpa"
TOLERANCE = 0.02


def attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, *,
    packed: Sequence[int] | None = None, **settings: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """transformers' SDPA; where ``packed`` names the lengths of the sequences in the row, each attends to itself alone.

    query [1, heads, N, D], key and value [1, key heads, N, D]; returns [1, N, heads, D].
    """
    if packed is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **settings)  # type: ignore[no-any-return]
    lengths, settings = list(packed), {**settings, "is_causal": True}
    parts = zip(query.split(lengths, 2), key.split(lengths, 2), value.split(lengths, 2), strict=True)
    return torch.cat([sdpa_attention_forward(module, *part, None, **settings)[0] for part in parts], 1), None


ALL_ATTENTION_FUNCTIONS.register(ATTENTION, attention)
ALL_MASK_ATTENTION_FUNCTIONS.register(ATTENTION, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])


def enable(model: Any) -> None:
    """Let ``model`` take packed rows if it attends by SDPA over all that went before; see ``packs``.

    Everything else runs on padded rows: sliding windows, eager and flash attention, models with a state of their own.
    """
    config = model.config.get_text_config()
    windows = getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True)
    partial = any(kind != "full_attention" for kind in getattr(config, "layer_types", None) or [])
    model.packs_rows = False
    if config._attn_implementation == "sdpa" and not windows and not partial:
        model.set_attn_implementation(ATTENTION)
        model.packs_rows = None if config._attn_implementation == ATTENTION else False


def packs(model: Any) -> bool:
    """Whether rows are packed for this model: when first asked, it is seen whether it keeps them apart."""
    if getattr(model, "packs_rows", False) is None:
        model.packs_rows = _keeps_apart(model)
        if not model.packs_rows:
            model.set_attn_implementation("sdpa")
            log.info("%s does not take packed rows: its forward passes are padded.", type(model).__name__)
    return bool(getattr(model, "packs_rows", False))


def backbone(
    model: Any, ids: Tensor, attention_mask: Tensor, lengths: Sequence[int], wanted: Tensor | None = None
) -> Tensor:
    """[N, d] last hidden states of the real tokens of ``ids`` [B, L], one sequence behind the other; or of some.

    Rows are padded on the right, so that a causal model never sees padding from a real token: no mask is needed.

    Args:
        wanted: numbers of the tokens whose states are returned, in their order; None: of all.
    """
    inner, real = getattr(model, model.base_model_prefix), attention_mask.bool()
    if not packs(model):
        found = inner(input_ids=ids, use_cache=False).last_hidden_state[real]
        return found if wanted is None else found[wanted]  # type: ignore[no-any-return]
    packed, positions = ids[real], (attention_mask.cumsum(1) - 1)[real]
    known = known_blocks(model)
    if known:
        return blocks.hidden_states(inner, known, lengths, packed, positions, wanted)
    found = _packed(inner, packed, positions, lengths)
    return found if wanted is None else found[wanted]


def _packed(inner: Any, ids: Tensor, positions: Tensor, lengths: Sequence[int]) -> Tensor:
    """As the model itself computes them."""
    no_mask = ids.new_zeros((1, 1, 1, 1), dtype=torch.bool)  # four dimensions: no mask is made of it
    outcome = inner(
        input_ids=ids[None], position_ids=positions[None], use_cache=False, attention_mask=no_mask,
        packed=tuple(lengths),
    )  # fmt: skip
    return outcome.last_hidden_state[0]  # type: ignore[no-any-return]


def known_blocks(model: Any) -> list[blocks.Layers] | None:
    """What runs in the place of the model's own blocks, with the adapters that are active now; None: they run.

    When first asked, it is seen whether it computes the same.
    """
    inner = getattr(model, model.base_model_prefix)
    if not packs(model) or getattr(model, "knows_blocks", None) is False:
        return None
    found = blocks.read(inner)
    if found and getattr(model, "knows_blocks", None) is None:
        model.knows_blocks = _same(model, found)
        if not model.knows_blocks:
            log.info("%s computes its blocks in a way of its own: they are not fused.", type(model).__name__)
            return None
    return found


@waiting("Comparing the fused blocks with the model's own")
@torch.no_grad()
def _same(model: Any, found: list[blocks.Layers]) -> bool:
    """Whether fused blocks give two short sequences, packed and padded, the hidden states that the model's own give."""
    inner = getattr(model, model.base_model_prefix)
    device = inner.get_input_embeddings().weight.device
    ids = torch.tensor([1, 2, 3, 4, 5, 3, 1, 2], device=device) % inner.config.vocab_size
    positions = torch.tensor([0, 1, 2, 3, 4, 0, 1, 2], device=device)
    own = _packed(inner, ids, positions, (5, 3))
    left = torch.tensor([[0, 1, 2, 3, 4], [0, 0, 5, 6, 7]], device=device)  # of the padded rows, as sampling has them
    mask = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1]], device=device)
    sampled = decoding.Decoder(model, found)(ids[left], mask, positions[left]).last_hidden_state[mask.bool()]
    packed = blocks.hidden_states(inner, found, (5, 3), ids, positions, torch.arange(8, device=device))
    limit = TOLERANCE * own.abs().max()
    return all(bool((fused - own).abs().max() <= limit) for fused in (packed, sampled))


@waiting("Trying whether the model keeps packed rows apart")
@torch.no_grad()
def _keeps_apart(model: Any) -> bool:
    """Whether two short sequences give the same hidden states in one row as each alone."""
    device = model.get_input_embeddings().weight.device
    ids = torch.tensor([[1, 2, 3, 4, 5], [3, 1, 2, 0, 0]], device=device) % model.config.get_text_config().vocab_size
    real = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]], device=device)
    inner = getattr(model, model.base_model_prefix)
    alone = [inner(input_ids=row[:n][None], use_cache=False).last_hidden_state[0] for row, n in zip(ids, (5, 3))]  # noqa: B905
    wanted = torch.cat(alone)
    positions = (real.cumsum(1) - 1)[real.bool()]
    try:
        found = _packed(inner, ids[real.bool()], positions, (5, 3))
    except TypeError:  # its forward takes no arguments for its attention
        return False
    return bool((found - wanted).abs().max() <= TOLERANCE * wanted.abs().max())
