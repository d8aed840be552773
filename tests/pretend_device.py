"""A pretend accelerator: tensors that claim another device, compute on the CPU, and are counted.

Its tensors refuse to mix with those of the CPU, as a GPU's do. It counts, by file and line, what a GPU's speed depends
on: kernel launches, synchronisations (the host waits for a number), and uploads (a copy from the host). ``record`` acts
as a CUDA graph: it returns a function that repeats the launches that it saw, on the memory that they used, and reads no
variable of the host.

It cannot show what real kernels compute, whether one exists for every operation, how long they take, or how much memory
they need. It cannot run bitsandbytes, whose layers call CUDA themselves. Launches are those of plain torch: attention
counts as the operations of its plain form, and a head in bfloat16 as the CPU's casts and products.
"""

from __future__ import annotations

import importlib
import sys
import types
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

DEVICE = torch.device("lazy", 0)  # a type that torch knows and nobody has
ROOT = Path(__file__).parents[1]
WAITS = {
    "aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::unique_dim", "aten::_unique2",
    "aten::equal", "aten::bincount", "aten::_linalg_check_errors",
}  # fmt: skip
INDEXING = {"aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_", "aten::_unsafe_index"}
COPIES = {"aten::_to_copy", "aten::copy_"}
NO_KERNEL = {"aten::empty", "aten::new_empty", "aten::empty_like", "aten::empty_strided", "aten::_local_scalar_dense"}


@dataclass
class Counts:
    """By file and line: kernels launched, times the host waited, and copies to the device."""

    launches: Counter[str] = field(default_factory=Counter)
    waits: Counter[str] = field(default_factory=Counter)
    uploads: Counter[str] = field(default_factory=Counter)

    def __str__(self) -> str:
        parts = (f"{name} {counts.total()}: {counts.most_common(8)}" for name, counts in vars(self).items())
        return "\n".join(parts)


class PretendTensor(torch.Tensor):
    """Claims ``DEVICE``; ``held`` is the tensor on the CPU that it computes with."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, held):
        claimed = {"strides": held.stride(), "storage_offset": held.storage_offset(), "dtype": held.dtype}
        found = torch.Tensor._make_wrapper_subclass(cls, held.size(), device=DEVICE, **claimed)
        found.held = held
        return found

    @classmethod
    def __torch_dispatch__(cls, op, kinds, args=(), kwargs=None):
        return _run(op, args, kwargs or {})

    @property
    def data(self):
        return self.detach()

    @data.setter
    def data(self, value):
        assert (value.shape, value.stride(), value.dtype) == (self.shape, self.stride(), self.dtype)
        self.held = value.held

    def __getitem__(self, index):
        return super().__getitem__(_uploaded(index))

    def __setitem__(self, index, value):
        super().__setitem__(_uploaded(index), value)

    def tolist(self):
        _counts.waits[f"{_place()} tolist"] += 1
        return self.held.tolist()

    def __repr__(self):
        return f"PretendTensor({self.held})"


def _uploaded(index):
    """Lists among indices as tensors; torch makes them without the dispatcher."""
    if isinstance(index, tuple):
        return tuple(map(_uploaded, index))
    return torch.tensor(index).to(DEVICE) if isinstance(index, list) else index


_counts = Counts()
_graph: list | None = None  # what is being recorded


class _Mode(TorchDispatchMode):
    """For operations that make a tensor from none."""

    def __torch_dispatch__(self, op, kinds, args=(), kwargs=None):
        return _run(op, args, kwargs or {})


def _run(op, args, kwargs):
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
    there = [tensor for tensor in tensors if isinstance(tensor, PretendTensor)]
    name, asked = op.name().split(".")[0], kwargs.get("device")
    onto = bool(there) if asked is None else torch.device(asked).type == DEVICE.type
    if onto and asked is not None:
        kwargs = {**kwargs, "device": torch.device("cpu")}
    if name == "aten::copy_":
        onto = isinstance(args[0], PretendTensor)
    elif there and name not in COPIES:
        _refuse_mixed(name, args, tensors)
    if not (there or onto):
        return op(*args, **kwargs)
    _count(op, name, args, there, onto)
    if _graph is not None:
        _keep_for_undo(op, args, kwargs)
    found = op(*_held(args), **_held(kwargs))
    if not onto:
        return found
    own = {id(tensor.held): tensor for tensor in there}  # in place: the very same tensor comes back
    result = tree_map(
        lambda x: (own[id(x)] if id(x) in own else PretendTensor(x)) if isinstance(x, torch.Tensor) else x, found
    )
    if _graph is not None and not op.is_view:
        _graph.append((op, args, kwargs, result))
    return result


def _held(arguments):
    return tree_map(lambda x: x.held if isinstance(x, PretendTensor) else x, arguments)


def _refuse_mixed(name, args, tensors):
    """Numbers without a dimension may come from the CPU, and so may indices, which are uploaded."""
    near = [tensor for tensor in tensors if not isinstance(tensor, PretendTensor) and tensor.dim()]
    if near and name in INDEXING and isinstance(args[0], PretendTensor):
        indices = [id(index) for index in args[1] if index is not None]
        _counts.uploads[f"{_place()} index"] += any(id(tensor) in indices for tensor in near)
        near = [tensor for tensor in near if id(tensor) not in indices]
    if near:
        raise RuntimeError(f"{_place()}: {name} of tensors on the CPU and on {DEVICE}")


def _count(op, name, args, there, onto):
    if name in COPIES:
        source = args[1] if name == "aten::copy_" else args[0]
        if onto and not isinstance(source, PretendTensor):
            _counts.uploads[_place()] += 1
        if not onto:
            _counts.waits[f"{_place()} copied to the host"] += 1
    of_bools = name in INDEXING and any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in args[1])
    if there and (name in WAITS or of_bools):
        _counts.waits[f"{_place()} {name}"] += 1
    if not op.is_view and name not in NO_KERNEL and name != "aten::detach":
        _counts.launches[_place()] += 1


def _place() -> str:
    """The innermost line of the project that is running; of autograd's own threads there is none."""
    frame = sys._getframe(2)
    while frame:
        if name := _in_project(frame.f_code.co_filename):
            return f"{name}:{frame.f_lineno}"
        frame = frame.f_back
    return "autograd"


@cache
def _in_project(file: str) -> str | None:
    path = Path(file)
    inside = path.is_relative_to(ROOT) and path != Path(__file__) and "site-packages" not in path.parts
    return str(path.relative_to(ROOT)) if inside else None


_undo: list[tuple[torch.Tensor, torch.Tensor]] = []


def _keep_for_undo(op, args, kwargs):
    """What the operation is about to write over."""
    for index, argument in enumerate(op._schema.arguments):
        if argument.is_write:
            given = args[index] if index < len(args) else kwargs.get(argument.name)
            _undo.extend((tensor.held, tensor.held.clone()) for tensor in tree_leaves(given) if tensor is not None)


def record(step: Callable[[], None]) -> Callable[[], None]:
    """As a CUDA graph holds ``step``: the call repeats its launches, on the same memory. Recording changes nothing.

    Raises:
        RuntimeError: for a step that waits for the device or copies to it.
    """
    global _graph
    launches: list = []
    before = _counts.waits.total() + _counts.uploads.total()
    _graph = launches
    try:
        step()
    finally:
        _graph = None
        for tensor, value in reversed(_undo):
            tensor.copy_(value)
        _undo.clear()
    if _counts.waits.total() + _counts.uploads.total() > before:
        raise RuntimeError("operation not permitted when stream is capturing")

    def replay():
        for op, args, kwargs, result in launches:
            found = op(*_held(args), **_held(kwargs))
            for new, old in zip(tree_leaves(found), tree_leaves(result), strict=True):
                if isinstance(old, PretendTensor) and new is not old.held:
                    old.held.copy_(new)

    return replay


@contextmanager
def counted() -> Iterator[Counts]:
    """What happens on the device inside."""
    global _counts
    outer, _counts = _counts, Counts()
    try:
        yield _counts
    finally:
        _counts = outer


@contextmanager
def installed() -> Iterator[torch.device]:
    """The device is there inside."""
    with pytest.MonkeyPatch.context() as patch, _Mode():
        _teach_torch(patch)
        yield DEVICE


def _teach_torch(patch: pytest.MonkeyPatch) -> None:
    """What torch asks of a device's module, and what makes tensors of Python's numbers without the dispatcher."""
    new, new_like = torch.tensor, torch.Tensor.new_tensor

    def tensor(data, *, device=None, **settings):
        found = new(data, **settings)
        return found if device is None else found.to(device)

    def new_tensor(self, data, **settings):
        if isinstance(self, PretendTensor):
            return new(data, dtype=settings.get("dtype", self.dtype)).to(DEVICE)
        return new_like(self, data, **settings)

    patch.setattr(torch, "tensor", tensor)
    patch.setattr(torch.Tensor, "new_tensor", new_tensor)
    patch.setattr(torch.__future__, "_overwrite_module_params_on_conversion", True)  # a wrapper keeps its dtype
    optimizers = importlib.import_module("torch.optim.optimizer")
    patch.setattr(optimizers, "_get_fused_kernels_supported_devices", lambda: [DEVICE.type, "cpu"])
    module = types.ModuleType("torch.lazy")
    module.device = lambda *_: nullcontext()
    module.get_rng_state = lambda *_: torch.get_rng_state()
    module.set_rng_state = lambda state, *_: torch.set_rng_state(state)
    module._initialized, module._is_in_bad_fork = True, lambda: False
    module.is_initialized = module.is_available = lambda: True
    module.current_device, module.device_count = lambda: 0, lambda: 1
    module.is_autocast_enabled, module.get_device_states = lambda: False, None
    patch.setattr(torch, "lazy", module, raising=False)
