"""A base in 4 or 8 bits (bitsandbytes), held so that no forward pass, on any processor, changes a stored weight."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import BitsAndBytesConfig

from rlhf.errors import RlhfError
from rlhf.hub import model_files
from rlhf.preflight import resources


def settings(kind: str, dtype: torch.dtype) -> BitsAndBytesConfig:
    """NF4 with quantised scales (Dettmers et al. 2023, https://arxiv.org/abs/2305.14314), or LLM.int8().

    Raises:
        RlhfError: RES005 where bitsandbytes is not installed.
    """
    if problem := resources.library_problem(kind, "model.quantize"):
        raise RlhfError(problem)
    if kind == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
    )


def is_quantised(model: Any) -> bool:
    return bool(getattr(model, "is_quantized", False))


def settle(model: nn.Module) -> None:
    """Make the quantised layers one function of their weights, whatever mode the model is in.

    On a CPU with AVX512-BF16 a 4-bit layer repacks its weights in place at the first forward without gradient. Later
    training forwards take that packing without a gradient to their input, and merging, moving and checksums read it as
    something else. An 8-bit layer on a CPU quantises its input too, but only in eval mode: the policy that is trained
    under gradient checkpointing would not be the one that sampled. Both are switched off here.
    """
    for _, layer in _layers(model):
        if hasattr(layer, "support_avx512bf16_for_cpu"):
            setattr(layer, "support_avx512bf16_for_cpu", False)  # noqa: B010
        elif layer.weight.device.type == "cpu":
            layer.train(True)
            layer.train = partial(_stays, layer)  # type: ignore[method-assign]


def stored(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """What the quantised weights mean: scales and their own scales, by name, beside the codes that are parameters."""
    for name, layer in _layers(model):
        state = getattr(layer.weight, "quant_state", None)
        if state is None:
            scales = layer.weight.SCB if layer.weight.SCB is not None else layer.state.SCB  # type: ignore[union-attr]
            yield f"{name}.SCB", scales  # type: ignore[misc]
            continue
        for key, value in sorted(state.as_dict(packed=True).items()):
            yield f"{name}.{key}", value


def source_weights(directory: Path) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a model's safetensors files one at a time, as they were before quantisation."""
    for path in model_files.weight_files(directory, str(directory)):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - no dict
                yield name, file.get_tensor(name)


def _layers(model: nn.Module) -> list[tuple[str, nn.Module]]:
    kinds = ("Params4bit", "Int8Params")
    return [
        (name, module)
        for name, module in model.named_modules()
        if type(getattr(module, "weight", None)).__name__ in kinds and isinstance(module, nn.Linear)
    ]


def _stays(layer: nn.Module, mode: bool = True) -> nn.Module:
    return layer
