"""Whether a token was ever seen in pretraining, as far as its embedding row tells."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from rlhf.hub import model_files

NEAR = 0.05
ROWS = 8192


def looks_untrained(weight: Tensor, token: int) -> bool:
    """Zero, or so close to another row that the two tokens are one to the model.

        min over j != i of |w_i - w_j|  <  0.05 * |w_i|

    Rows of tokens that no text held were all moved alike (by weight decay, and by the softmax where the head is
    tied), and stay next to each other; a row that was used lies far from every other. Rows that are still as they were
    initialised, each at random, cannot be told from trained ones. See Land and Bartolo 2024,
    https://arxiv.org/abs/2405.05417, section 3.

    Args:
        weight: [V, H] embeddings.
    """
    row = weight[token].float()
    size = float(row.norm())
    if size == 0:
        return True
    distances = _norms(weight, row)
    distances[token] = torch.inf
    return float(distances.min()) < NEAR * size


def looks_initialised(weight: Tensor) -> bool:
    """Every row as it was drawn, by the spread of their norms: no pretraining at all.

    Norms of H independent Gaussians vary by 1 / sqrt(2 H) of their mean; training drives them several times as far
    apart, because frequent and rare tokens are moved differently.

    Args:
        weight: [V, H] embeddings.
    """
    norms = _norms(weight, torch.zeros_like(weight[0]).float())
    norms = norms[norms > 0]  # a padding row is initialised with zeros
    spread = norms.std() / norms.mean()
    return bool(spread < 1.5 * (2 * weight.shape[1]) ** -0.5)


@torch.no_grad()
def _norms(weight: Tensor, origin: Tensor) -> Tensor:
    """[V] lengths of weight [V, H] - origin [H] in float32, some rows at a time: a vocabulary's float32 takes GiBs."""
    return torch.cat([(rows.float() - origin).norm(dim=1) for rows in weight.split(ROWS)])


def untrained(weight: Tensor, tokens: Sequence[int]) -> set[int]:
    """Those of ``tokens`` whose row of ``weight`` [V, H] looks untrained."""
    return {token for token in tokens if looks_untrained(weight, token)}


def stored_embeddings(directory: Path, name: str) -> Tensor | None:
    """[V, H] input embeddings of a model directory; None where no tensor of this name is stored.

    Args:
        name: of the parameter in the model, such as ``model.embed_tokens.weight``.

    Raises:
        RlhfError: as ``model_files.read``.
    """
    stored = model_files.read(directory, str(directory))
    # A directory may hold the inner model's names or the whole model's.
    found = next((key for key in stored if key == name or name.endswith(f".{key}")), None)
    if found is None:
        return None
    file = directory / model_files.SINGLE
    if not file.is_file():
        index = json.loads((directory / model_files.INDEX).read_text("utf-8"))
        file = directory / index["weight_map"][found]
    with safe_open(file, "pt") as tensors:  # type: ignore[no-untyped-call]
        return tensors.get_tensor(found)  # type: ignore[no-any-return]
