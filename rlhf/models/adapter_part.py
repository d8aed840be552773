"""The part of an adapter that a role trains, where members of an ensemble are to differ in it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rlhf.errors import Problem, RlhfError
from rlhf.models import adapters

LAYER, MODULE = re.compile(r"\.(\d+)\."), re.compile(r"(\w+)\.lora_\w+\.")


@dataclass(frozen=True)
class AdapterPart:
    """What is trained of an adapter; the rest stays as the role started.

    Args:
        layers: numbers of the model's blocks; None: all, and what is in no block.
        modules: last names of its linear layers; None: all, and what is no linear layer.
    """

    layers: frozenset[int] | None = None
    modules: frozenset[str] | None = None

    def has(self, parameter: str) -> bool:
        """Whether a parameter of an adapter, by PEFT's name, is in it."""
        layer, module = LAYER.search(parameter), MODULE.search(parameter)
        in_layers = self.layers is None or (layer is not None and int(layer[1]) in self.layers)
        return in_layers and (self.modules is None or (module is not None and module[1] in self.modules))

    def without(self, parameters: Sequence[str]) -> list[str]:
        """The blocks and linear layers of which none of an adapter's parameters is."""
        own = [name for name in parameters if self.has(name)]
        layers = {int(found[1]) for name in own if (found := LAYER.search(name))}
        modules = {found[1] for name in own if (found := MODULE.search(name))}
        return [f"block {layer}" for layer in sorted((self.layers or frozenset()) - layers)] + sorted(
            (self.modules or frozenset()) - modules
        )


def of_member(
    layers: Sequence[int] | None, modules: Sequence[str] | None, index: int, model: Any
) -> AdapterPart | None:
    """What a config says of member ``index``; None for the whole adapter.

    Args:
        layers: first and last block, both included; below 0 they count from the end.

    Raises:
        RlhfError: MOD030 for blocks or linear layers that the model does not have.
    """
    if layers is None and modules is None:
        return None
    count, present = model.config.get_text_config().num_hidden_layers, adapters.linear_names(model)
    chosen = None
    if layers is not None:
        first, last = (place + count if place < 0 else place for place in layers)
        if not 0 <= first <= last < count:
            what = f"{list(layers)} are no blocks from first to last; there are {count}, 0 to {count - 1}."
            raise RlhfError(Problem("MOD030", f"ensemble.layers.{index}", what))
        chosen = frozenset(range(first, last + 1))
    if missing := [name for name in modules or () if name not in present]:
        what = f"{', '.join(missing)} match no linear layer; there are {', '.join(present)}."
        raise RlhfError(Problem("MOD030", f"ensemble.target_modules.{index}", what))
    return AdapterPart(chosen, None if modules is None else frozenset(modules))
