"""Roles: named slots of adapter and head, on one frozen base or on models of their own, used in the same way."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from rlhf.models import adapters, full_weights, packing
from rlhf.models.adapter_part import AdapterPart
from rlhf.models.base import Base
from rlhf.models.fused import lora, token_rows
from rlhf.models.heads import ScalarHead
from rlhf.runs import artifacts

# transformers announces a new name for a method that peft still calls by its old one.
warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning)

Acting = tuple[Any, ScalarHead | None]


@dataclass(frozen=True)
class Slot:
    """A role: its adapter (None: the bare base), its head, and whether it is trained.

    A trained slot without an adapter trains every weight of its model, which no other slot may share. Of an adapter
    ``part`` alone is trained; None: all of it.
    """

    adapter: str | None
    head: ScalarHead | None
    trained: bool
    part: AdapterPart | None = None


class Roles(Protocol):
    """What rollout, scoring and update know of roles."""

    slots: dict[str, Slot]
    device: torch.device

    def acting_as(self, name: str) -> Any: ...
    def trained_parameters(self, name: str) -> list[nn.Parameter]: ...
    def head(self, name: str) -> ScalarHead: ...
    def set_head(self, name: str, head: ScalarHead) -> None: ...
    def state(self, name: str) -> SlotState: ...
    def enable_gradient_checkpointing(self) -> None: ...
    def save(self, name: str, directory: Path) -> None: ...


class _Slots:
    """What both kinds of roles share: heads, parameters, saving."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.slots: dict[str, Slot] = {}

    def host(self, name: str) -> SharedBase:
        raise NotImplementedError("each kind of roles says on which base a role lives")

    def peft(self, name: str) -> PeftModel:
        peft = self.host(name)._peft
        assert peft is not None
        return peft

    def head(self, name: str) -> ScalarHead:
        head = self.slots[name].head
        assert head is not None, f"the role {name} has no head"
        return head

    def set_head(self, name: str, head: ScalarHead) -> None:
        """Put another head in the place of the role's, as frozen: training is over."""
        slot = replace(self.slots[name], head=self._head_of(head, False))
        self.slots[name] = self.host(name).slots[name] = slot

    def trained_parameters(self, name: str) -> list[nn.Parameter]:
        """Adapter (or every weight) and head of a trained slot: what its optimizer is built from."""
        slot = self.slots[name]
        assert slot.trained, f"{name} is not trained"
        head = [parameter for parameter in slot.head.parameters() if parameter.requires_grad] if slot.head else []
        if slot.adapter is None:
            return [*self.host(name).base.model.parameters(), *head]
        return [*_adapter_parameters(self.peft(name), slot.adapter, slot.part), *head]

    def state(self, name: str) -> SlotState:
        """The slot as a part of a checkpoint. Stateful."""
        return SlotState(self, name)

    def save(self, name: str, directory: Path) -> None:
        """Write ``directory/adapter`` in PEFT's layout or ``directory/model``, and the head to ``directory/head``."""
        slot = self.slots[name]
        if slot.adapter is None:
            base = self.host(name).base
            full_weights.save(base.model, base.tokenizer, directory / artifacts.MODEL)
        else:
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

    def add(
        self,
        name: str,
        *,
        adapter: Path | LoraConfig | None = None,
        head: ScalarHead | None = None,
        trained: bool = False,
        rank: int | None = None,
        part: AdapterPart | None = None,
    ) -> None:
        """Add a role: an adapter read from a directory (grown to ``rank``) or a fresh one, or the bare base; trained,
        the latter has every weight trained, and an adapter ``part`` of it or all.

        The head is copied; roles never share parameters.
        """
        assert name not in self.slots, f"the role {name} is there already"
        if adapter is not None:
            self._peft = _add_adapter(self._peft or self.base.model, name, adapter, rank)
            self._find_layers()
        self.slots[name] = Slot(name if adapter is not None else None, self._head_of(head, trained), trained, part)
        alone = all(slot.adapter or not slot.trained for slot in self.slots.values()) or len(self.slots) == 1
        assert alone, "a model whose every weight is trained has one role"
        self._mark_trained()

    def host(self, name: str) -> SharedBase:
        return self

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
        lora.install(self.base.model)
        token_rows.install(self.base.model)
        self.base.model.eval()  # PEFT makes its dropout layers in train mode
        self._active = "?"
        self._switch(None)

    def _mark_trained(self) -> None:
        if self._peft is None:
            self.base.model.requires_grad_(any(slot.trained for slot in self.slots.values()))
            return
        self._peft.requires_grad_(False)
        for slot in self.slots.values():
            if slot.adapter and slot.trained:
                for parameter in _adapter_parameters(self._peft, slot.adapter, slot.part):
                    parameter.requires_grad_(True)


class SeparateModels(_Slots):
    """Roles on several models: where every weight is trained, and to compare with roles that share all."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self._hosts: dict[str, SharedBase] = {}

    def add(
        self,
        name: str,
        base: Base,
        *,
        adapter: Path | LoraConfig | None = None,
        head: ScalarHead | None = None,
        trained: bool = False,
    ) -> None:
        """Add a role on its own ``base``; the rest as ``SharedBase.add``."""
        alone = SharedBase(base)
        alone.add(name, adapter=adapter, head=head, trained=trained)
        self.adopt(alone)

    def adopt(self, shared: SharedBase) -> None:
        """Take over the roles that share a base."""
        assert not self.slots.keys() & shared.slots.keys()
        self._hosts |= dict.fromkeys(shared.slots, shared)
        self.slots |= shared.slots

    def host(self, name: str) -> SharedBase:
        return self._hosts[name]

    def enable_gradient_checkpointing(self) -> None:
        """As ``SharedBase.enable_gradient_checkpointing``."""
        for host in set(self._hosts.values()):
            host.enable_gradient_checkpointing()

    def acting_as(self, name: str) -> Any:
        """As ``SharedBase.acting_as``."""
        return self._hosts[name].acting_as(name)


class SlotState:
    """Adapter (or every weight) and head of one slot as a checkpoint holds them."""

    def __init__(self, roles: _Slots, name: str) -> None:
        self.roles, self.name = roles, name

    def state_dict(self) -> dict[str, Any]:
        slot = self.roles.slots[self.name]
        head = dict(slot.head.state_dict()) if slot.head else {}
        if slot.adapter is None:
            return {"model": full_weights.weights(self.roles.host(self.name).base.model), "head": head}
        return {"adapter": adapters.weights(self.roles.peft(self.name), slot.adapter), "head": head}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        slot = self.roles.slots[self.name]
        if slot.adapter is None:
            model = self.roles.host(self.name).base.model
            packing.known_blocks(model)  # of the base's own weights, as in the run that this goes on with
            full_weights.load(model, state["model"])
        else:
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


def _adapter_parameters(model: PeftModel, adapter: str, part: AdapterPart | None) -> list[nn.Parameter]:
    return [
        parameter
        for name, parameter in model.named_parameters()
        if adapters.belongs(name, adapter) and (part is None or part.has(name))
    ]
