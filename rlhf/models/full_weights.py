"""Models whose every weight is trained: read, written and restored as Hugging Face directories."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from rlhf.runs import storage
from rlhf.runs.progress import waiting
from rlhf.runs.snapshots import require_finite


def weights(model: Any) -> dict[str, Tensor]:
    """Every tensor of the model once, on the CPU; of tied ones, the first."""
    seen: set[int] = set()
    found = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in seen:
            seen.add(id(tensor))
            found[name] = tensor.detach().cpu().clone().contiguous()
    return found


def load(model: Any, state: dict[str, Tensor]) -> None:
    """Give the model its tensors, all of them and no others."""
    missing, unexpected = model.load_state_dict(state, strict=False)
    tied = set(model.state_dict()) - set(weights(model))
    assert not unexpected and set(missing) <= tied, f"{missing} {unexpected}"


@waiting("Writing the model")
def save(model: Any, tokenizer: Any, directory: Path) -> None:
    """Write model and tokenizer, whole or not at all.

    Raises:
        RlhfError: GRD005 if a weight is not finite; nothing is written then.
    """
    require_finite(dict(model.named_parameters()), directory)
    with storage.staged_directory(directory) as staging:
        model.save_pretrained(staging)
        tokenizer.save_pretrained(staging)
