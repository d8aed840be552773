"""Sequences one behind the other in one row, so that no forward pass of training or scoring computes padding."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from rlhf.models import grouped, quantised
from rlhf.models.fused import blocks, decoding, self_checks
from rlhf.runs.progress import waiting

log = logging.getLogger("rlhf")
ATTENTION = "rlhf_sdpa"
TOLERANCE, WIDE_TOLERANCE = 0.02, 0.002  # shares of a state's norm: in a quantised base's numbers, in float32


def attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    packed: Sequence[int] | None = None,
    **settings: Any,
) -> tuple[Tensor, None]:
    """transformers' SDPA; where ``packed`` names the lengths of the sequences in the row, each attends to itself alone.

    query [1, heads, N, D], key and value [1, key heads, N, D]; returns [1, N, heads, D].
    """
    if packed is None:
        return grouped.sdpa(module, query, key, value, attention_mask, **settings)  # type: ignore[no-any-return]
    lengths, settings = list(packed), {**settings, "is_causal": True}
    parts = zip(query.split(lengths, 2), key.split(lengths, 2), value.split(lengths, 2), strict=True)
    return torch.cat([grouped.sdpa(module, *part, None, **settings)[0] for part in parts], 1), None


ALL_ATTENTION_FUNCTIONS.register(ATTENTION, attention)
ALL_MASK_ATTENTION_FUNCTIONS.register(ATTENTION, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])


def enable(model: Any, text_ids: Sequence[int] | None = None) -> None:
    """Let ``model`` take packed rows if it attends by SDPA over all that went before; see ``packs``.

    Everything else runs on padded rows: sliding windows, eager and flash attention, models with a state of their own.

    Args:
        text_ids: ordinary text in the model's tokens, which it is tried on.
    """
    model.text_ids, model.knows_blocks = text_ids, {}
    config = model.config.get_text_config()
    windows = getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True)
    partial = any(kind != "full_attention" for kind in getattr(config, "layer_types", None) or [])
    model.packs_rows = False
    if config._attn_implementation == "sdpa" and not windows and not partial:
        model.set_attn_implementation(ATTENTION)
        model.packs_rows = None if config._attn_implementation == ATTENTION else False
    if model.packs_rows is False:
        _warn_of_all_scores(model)


def _warn_of_all_scores(model: Any) -> None:
    """Attention that is not ours may take a kernel whose memory grows with the square of the tokens."""
    config, weight = model.config.get_text_config(), model.get_input_embeddings().weight
    heads = getattr(config, "num_attention_heads", None)
    shares = heads != (getattr(config, "num_key_value_heads", None) or heads)
    if shares and weight.is_cuda and weight.dtype == torch.float32:
        log.warning(
            "%s in float32 on CUDA: query heads share keys, and attention may hold S x S scores a head. model.dtype: "
            "bfloat16 avoids it.",
            type(model).__name__,
        )


def take_flattened(model: Any) -> None:
    """Let micro-batches that TRL has flattened into one row [1, N] go the way of packed rows: each document attends to
    itself alone. transformers would make a mask [N, N] of them: 4.3 GB at 8 rows of 8,192 tokens."""
    getattr(model, model.base_model_prefix).register_forward_pre_hook(_as_packed, with_kwargs=True)


def _as_packed(inner: Any, args: tuple[Any, ...], settings: dict[str, Any]) -> Any:
    bounds = settings.get("cu_seq_lens_q")
    if bounds is None or settings.get("attention_mask") is not None:
        return None
    return args, {**settings, "attention_mask": _no_mask(bounds), "packed": tuple(bounds.diff().tolist())}


def _no_mask(like: Tensor) -> Tensor:
    """What stops transformers from making a mask: it has four dimensions, as one that is ready."""
    return like.new_zeros((1, 1, 1, 1), dtype=torch.bool)


def packs(model: Any) -> bool:
    """Whether rows are packed for this model: when first asked, it is seen whether it keeps them apart."""
    if getattr(model, "packs_rows", False) is None:
        model.packs_rows = _keeps_apart(model)
        if not model.packs_rows:
            model.set_attn_implementation("sdpa")
            _warn_of_all_scores(model)
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
    outcome = inner(
        input_ids=ids[None],
        position_ids=positions[None],
        use_cache=False,
        attention_mask=_no_mask(ids),
        packed=tuple(lengths),
    )
    return outcome.last_hidden_state[0]  # type: ignore[no-any-return]


def known_blocks(model: Any) -> list[blocks.Layers] | None:
    """What runs in the place of the model's own blocks, with the adapters that are active now; None: they run.

    When first asked of the bare base, and when first asked of an adapter, it is seen whether it computes the same.
    """
    if not packs(model) or not (found := blocks.read(getattr(model, model.base_model_prefix))):
        return None
    adapts = any(layer.a is not None for block in found for part in block for layer in part)
    if adapts not in model.knows_blocks:
        model.knows_blocks[adapts] = _same(model, found)
    return found if model.knows_blocks[adapts] else None


@waiting("Comparing the fused blocks with the model's own")
@torch.no_grad()
def _same(model: Any, found: list[blocks.Layers]) -> bool:
    """Whether fused blocks, packed and as sampling runs them, are no further from a wider arithmetic than the model's
    own. Seen on ordinary text in three blocks; see ``self_checks``."""
    inner, given = getattr(model, model.base_model_prefix), self_checks.rows(model)
    with self_checks.few_blocks(inner) as chosen, self_checks.drawn_factors(inner):
        decoder = decoding.Decoder(model, found)
        own = _packed(inner, given.ids, given.positions, given.lengths)
        with self_checks.Wide(self_checks.wider(own.dtype)):
            truth = _packed(inner, given.ids, given.positions, given.lengths)
        few, every = [found[number] for number in chosen], torch.arange(len(given.ids), device=given.ids.device)
        packed = blocks.hidden_states(inner, few, given.lengths, given.ids, given.positions, every)
        sampled = self_checks.as_sampled(decoder.of(chosen), given)
    limit, *errors = (self_checks.error(states, truth) for states in (own, packed, sampled))
    log.debug("Errors of blocks: own %.3g, packed %.3g, sampled %.3g.", limit, *errors)
    if all(self_checks.no_worse(error, limit) for error in errors):
        return True
    log.info(
        "%s computes its blocks in a way of its own: they are not fused. Its states differ from exact ones by %.2g of "
        "their size; fused, by %.2g packed and %.2g sampled.",
        type(model).__name__,
        limit,
        *errors,
    )
    return False


@waiting("Trying whether the model keeps packed rows apart")
@torch.no_grad()
def _keeps_apart(model: Any) -> bool:
    """Whether sequences of ordinary text give the same hidden states in one row as each alone.

    Computed in float32 at least, where rounding hides nothing; a quantised base computes in its own numbers.
    """
    inner, given = getattr(model, model.base_model_prefix), self_checks.rows(model)
    own_numbers = quantised.is_quantised(model)
    arithmetic = nullcontext() if own_numbers else self_checks.Wide(torch.float32)
    with arithmetic, self_checks.drawn_factors(inner):
        parts = given.ids.split(list(given.lengths))
        alone = torch.cat([inner(input_ids=row[None], use_cache=False).last_hidden_state[0] for row in parts])
        try:
            found = _packed(inner, given.ids, given.positions, given.lengths)
        except TypeError:  # its forward takes no arguments for its attention
            return False
    return self_checks.error(found, alone) <= (TOLERANCE if own_numbers else WIDE_TOLERANCE)
