"""What the own ways of computing a model are judged by before they are used: ordinary text, and a wider arithmetic."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.lora.layer import LoraLayer
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map
from transformers.cache_utils import DynamicCache

TEXT = """The ferry leaves the harbour twice a day, at eight in the morning and again at five. On calm days the crossing
takes about forty minutes, and most people stand outside to watch the coast grow smaller. When the wind is from the
north the captain waits, because the entrance to the bay is narrow and the waves there are short and steep. My
grandmother used to sell bread on the quay. She knew every sailor by name, remembered who owed her money, and never
wrote anything down. "A good memory," she said, "costs nothing and weighs nothing." Today there is a small museum in
the house where she lived, and the price of a ticket is 12 euros."""
LENGTHS, LAST = (96, 41, 7), 3  # tokens of three rows; of each, those that are sampled one by one
FACTOR, FLOOR = 1.5, 1e-5
CHANGED = 0.1


@dataclass(frozen=True)
class Rows:
    """Rows of ordinary text: packed ids [n] with their positions and lengths, and padded on the left [B, W]."""

    ids: Tensor
    positions: Tensor
    lengths: tuple[int, ...]
    padded: Tensor
    mask: Tensor


def text_ids(tokenizer: Any) -> list[int]:
    """Token ids of ordinary text, without special ones."""
    special = set(tokenizer.all_special_ids)
    return [token for token in tokenizer(TEXT, add_special_tokens=False)["input_ids"] if token not in special]


def rows(model: Any) -> Rows:
    """Of ``model.text_ids``; where there are none, of ids spread over the vocabulary. Its first and last tenth, where
    special tokens are, are left out: nobody trained those that no text has, and their states are like no other."""
    config, device = model.config.get_text_config(), model.get_input_embeddings().weight.device
    known = getattr(model, "text_ids", None)
    if not known:
        first, size = config.vocab_size // 10, max(1, config.vocab_size * 8 // 10)
        known = [first + 7919 * place % size for place in range(sum(LENGTHS))]
    context = getattr(config, "max_position_embeddings", None) or max(LENGTHS)
    lengths = tuple(min(length, context) for length in LENGTHS)
    ids = torch.tensor([known[place % len(known)] for place in range(sum(lengths))], device=device)
    mask = torch.tensor([[0] * (max(lengths) - n) + [1] * n for n in lengths], device=device)
    padded = torch.zeros_like(mask).masked_scatter(mask.bool(), ids)
    return Rows(ids, (mask.cumsum(1) - 1)[mask.bool()], lengths, padded, mask)


class Wide(TorchFunctionMode):
    """Computes whatever runs inside in ``dtype``. Weights stay as they are: each is cast where it is used, alone."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        seen: list[torch.dtype] = []
        tree_map(lambda x: seen.append(x.dtype) if isinstance(x, Tensor) else None, (args, kwargs))
        if self.dtype in seen:
            args, kwargs = tree_map(self._cast, (args, kwargs or {}))
        return tree_map(self._cast, func(*args, **(kwargs or {})))

    def _cast(self, x: Any) -> Any:
        narrow = isinstance(x, Tensor) and x.is_floating_point() and x.dtype.itemsize < self.dtype.itemsize
        return x.to(self.dtype) if narrow else x


def wider(dtype: torch.dtype) -> torch.dtype:
    """The arithmetic that one in ``dtype`` is judged by."""
    return torch.float32 if dtype.itemsize < 4 else torch.float64


def error(found: Tensor, truth: Tensor) -> float:
    """Of hidden states [n, d]: each token's distance as a share of its norm, root mean square over the tokens.

    A share, because some tokens' states are a thousand times those of others; a square, so that one wrong token shows.
    """
    shares = (found.to(truth.dtype) - truth).norm(dim=-1) / truth.norm(dim=-1)
    return float(shares.square().mean().sqrt())


def no_worse(found: float, own: float) -> bool:
    """Whether an error is at most FACTOR times that of the model's own arithmetic, or too small for a logprob to show.

    Two ways that round equally often differ by a few percent over 144 tokens. What the factor leaves room for is base
    and adapter summed up in the base's dtype: one more rounding of every weight, at most sqrt(2).
    """
    return found <= max(FACTOR * own, FLOOR)


@contextmanager
def few_blocks(inner: Any) -> Iterator[list[int]]:
    """``inner`` with its first, middle and last block alone, one behind the other; yields their numbers.

    All blocks are of one class, and what a model varies, it varies with depth. So judging an 8B model takes seconds.
    """
    own = inner.layers
    chosen = sorted({0, len(own) // 2, len(own) - 1})
    inner.layers = nn.ModuleList([own[number] for number in chosen])
    try:
        yield chosen
    finally:
        inner.layers = own


@contextmanager
def drawn_factors(inner: Any) -> Iterator[None]:
    """The active adapter's A and B stand aside for drawn ones, which change a weight by a tenth of its size.

    A verdict is of the code. Of a trained adapter's weights it would hang on when it is asked: a fresh B is zero and
    shows nothing, a large one rounds as no other, and a resumed run would compute in another way than the run it goes
    on with.
    """
    generator, own = torch.Generator().manual_seed(0), []
    layers = [module for module in inner.modules() if isinstance(module, LoraLayer) and not module.disable_adapters]
    for layer in layers:
        for name in set(layer.active_adapters) & set(layer.lora_A):
            a, b = layer.lora_A[name].weight, layer.lora_B[name].weight
            size = CHANGED * _deviation(layer.get_base_layer()) / layer.scaling[name]
            own += [(factor, factor.data) for factor in (a, b)]
            for factor, deviation in ((a, len(a) ** -0.5), (b, size)):
                drawn = torch.empty(factor.shape).normal_(0, deviation, generator=generator)
                factor.data = drawn.to(factor.device, factor.dtype)
    try:
        yield
    finally:
        for factor, data in own:
            factor.data = data


def _deviation(layer: Any) -> float:
    """Of a layer's weights; of packed ones, as a quantised layer has them, what is usual."""
    weight = layer.weight
    return float(weight.detach().float().std()) if weight.is_floating_point() else 0.02


def as_sampled(decoder: Callable[..., Any], given: Rows) -> Tensor:
    """[n, d] states of the rows as sampling computes them: prompts at once, then LAST tokens one by one."""
    width, cache, found = given.mask.shape[1], DynamicCache(), []
    positions = (given.mask.cumsum(1) - 1).clamp(min=0)
    for start in (0, *range(width - LAST, width)):
        part = slice(start, start + 1 if start else width - LAST)
        outcome = decoder(given.padded[:, part], given.mask[:, : part.stop], positions[:, part], cache)
        found.append(outcome.last_hidden_state)
    return torch.cat(found, 1)[given.mask.bool()]
