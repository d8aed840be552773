"""Roles: named slots of adapter and head, on one frozen base or on models of their own, used in the same way."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from rlhf import artifacts
from rlhf.models import adapters, small_lora
from rlhf.models.base import Base
from rlhf.models.heads import ScalarHead

# transformers announces a new name for a method that peft still calls by its old one.
warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning)

Acting = tuple[Any, ScalarHead | None]


@dataclass(frozen=True)
class Slot:
    """A role: its adapter (None: the bare base), its head, and whether it is trained."""

    adapter: str | None
    head: ScalarHead | None
    trained: bool


class Roles(Protocol):
    """What rollout, scoring and update know of roles."""

    slots: dict[str, Slot]
    device: torch.device

    def acting_as(self, name: str) -> Any: ...
    def trained_parameters(self, name: str) -> list[nn.Parameter]: ...
    def head(self, name: str) -> ScalarHead: ...
    def state(self, name: str) -> SlotState: ...
    def save(self, name: str, directory: Path) -> None: ...


class _Slots:
    """What both kinds of roles share: heads, parameters, saving."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.slots: dict[str, Slot] = {}

    def peft(self, name: str) -> PeftModel:
        raise NotImplementedError("each kind of roles says where an adapter lives")

    def head(self, name: str) -> ScalarHead:
        head = self.slots[name].head
        assert head is not None, f"the role {name} has no head"
        return head

    def trained_parameters(self, name: str) -> list[nn.Parameter]:
        """Adapter and head of a trained slot: what its optimizer is built from."""
        slot = self.slots[name]
        assert slot.trained and slot.adapter, f"{name} is not trained"
        head = [parameter for parameter in slot.head.parameters() if parameter.requires_grad] if slot.head else []
        return [*_adapter_parameters(self.peft(name), slot.adapter), *head]

    def state(self, name: str) -> SlotState:
        """The slot as a part of a checkpoint. Stateful."""
        return SlotState(self, name)

    def save(self, name: str, directory: Path) -> None:
        """Write ``directory/adapter`` in PEFT's layout and, where there is one, ``directory/head``."""
        slot = self.slots[name]
        assert slot.adapter
        adapters.save(self.peft(name), slot.adapter, directory / artifacts.ADAPTER)
        if slot.head:
            slot.head.save(directory / artifacts.HEAD)

    def _head_of(self, head: ScalarHead | None, trained: bool) -> ScalarHead | None:
        if head is None:
            return None
        own = deepcopy(head).to(self.device)
        return own.requires_grad_(trained)


class SharedBase(_Slots):
    """Every role is an adapter on one base that is loaded once."""

    def __init__(self, base: Base) -> None:
        super().__init__(base.device)
        self.base = base
        self._peft: PeftModel | None = None
        self._layers: list[Any] = []
        self._wrappers: list[Any] = []
        self._checkpointing = False
        self._active: str | None = None
        self._summed: small_lora.Cache = {}

    def add(
        self, name: str, *, adapter: Path | LoraConfig | None = None, head: ScalarHead | None = None,
        trained: bool = False, rank: int | None = None,
    ) -> None:  # fmt: skip
        """Add a role: the bare base, an adapter read from a directory (grown to ``rank``), or a fresh one.

        The head is copied; roles never share parameters.
        """
        assert name not in self.slots, f"the role {name} is there already"
        if adapter is not None:
            self._peft = _add_adapter(self._peft or self.base.model, name, adapter, rank)
            self._find_layers()
        self.slots[name] = Slot(name if adapter is not None else None, self._head_of(head, trained), trained)
        self._mark_trained()

    def peft(self, name: str) -> PeftModel:
        assert self._peft is not None
        return self._peft

    def enable_gradient_checkpointing(self) -> None:
        """Recompute activations in the backward pass of every trained role."""
        self.base.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        self._checkpointing = True

    @contextmanager
    def acting_as(self, name: str) -> Iterator[Acting]:
        """Route forward passes through the role until the block ends; yields the model and the role's head.

        Call ``backward()`` inside the block: checkpointing runs the forward again with whichever adapter is active
        then, so a later backward computes wrong gradients in silence.
        """
        slot, before, training = self.slots[name], self._active, self.base.model.training
        self._switch(slot.adapter)
        if self._checkpointing:
            self.base.model.train(slot.trained and torch.is_grad_enabled())
        try:
            yield self.base.model, slot.head
        finally:
            self._switch(before)
            if self._checkpointing:
                self.base.model.train(training)

    def _switch(self, adapter: str | None) -> None:
        """Set the active adapter on every layer, directly: PEFT's own switch also flips ``requires_grad``."""
        if adapter == self._active:
            return
        self._summed.clear()
        for layer in self._layers:
            layer._active_adapter = [adapter] if adapter else []
            layer._disable_adapters = adapter is None
        for wrapper in self._wrappers:
            trained_tokens = wrapper.token_adapter.trainable_tokens_delta
            names = [adapter] if adapter in trained_tokens else []
            wrapper._active_adapter = wrapper.token_adapter._active_adapter = names
            wrapper._disable_adapters = wrapper.token_adapter._disable_adapters = not names
        self._active = adapter

    def _find_layers(self) -> None:
        modules = list(self.base.model.modules())
        self._wrappers = [module for module in modules if isinstance(module, AuxiliaryTrainingWrapper)]
        inside = {id(wrapper.token_adapter) for wrapper in self._wrappers}
        self._layers = [m for m in modules if isinstance(m, BaseTunerLayer) and id(m) not in inside]
        small_lora.install(self.base.model, self._summed)
        self.base.model.eval()  # PEFT makes its dropout layers in train mode
        self._active = "?"
        self._switch(None)

    def _mark_trained(self) -> None:
        if self._peft is None:
            return
        self._peft.requires_grad_(False)
        for slot in self.slots.values():
            if slot.adapter and slot.trained:
                for parameter in _adapter_parameters(self._peft, slot.adapter):
                    parameter.requires_grad_(True)


class SeparateModels(_Slots):
    """Every role is a model of its own: where models do not share a base, and to compare with those that do."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self._models: dict[str, SharedBase] = {}

    def add(self, name: str, base: Base, **role: Any) -> None:
        """Add a role on its own ``base``; the rest as ``SharedBase.add``."""
        alone = SharedBase(base)
        alone.add(name, **role)
        self._models[name] = alone
        self.slots[name] = alone.slots[name]

    def peft(self, name: str) -> PeftModel:
        return self._models[name].peft(name)

    def acting_as(self, name: str) -> Any:
        """As ``SharedBase.acting_as``."""
        return self._models[name].acting_as(name)


class SlotState:
    """Adapter and head of one slot as a checkpoint holds them."""

    def __init__(self, roles: _Slots, name: str) -> None:
        self.roles, self.name = roles, name

    def state_dict(self) -> dict[str, Any]:
        slot = self.roles.slots[self.name]
        assert slot.adapter
        head = slot.head.state_dict() if slot.head else {}
        return {"adapter": adapters.weights(self.roles.peft(self.name), slot.adapter), "head": dict(head)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        slot = self.roles.slots[self.name]
        assert slot.adapter
        adapters.load(self.roles.peft(self.name), slot.adapter, state["adapter"])
        if slot.head:
            slot.head.load_state_dict(state["head"])


def _add_adapter(model: Any, name: str, adapter: Path | LoraConfig, rank: int | None) -> PeftModel:
    state: dict[str, Tensor] | None = None
    config = adapter
    if isinstance(adapter, Path):
        config, state = adapters.read(adapter)
        config, state = adapters.grow(config, state, rank or config.r)
    if isinstance(model, PeftModel):
        model.add_adapter(name, config)
    else:
        model = get_peft_model(model, config, adapter_name=name)
    if state is not None:
        adapters.load(model, name, state)
    return model


def _adapter_parameters(model: PeftModel, adapter: str) -> list[nn.Parameter]:
    return [parameter for name, parameter in model.named_parameters() if adapters.belongs(name, adapter)]
