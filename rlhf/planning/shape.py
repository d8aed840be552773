"""The shape of a causal language model, from its ``config.json`` alone, and the numbers of parameters that follow.

Letters: d hidden size, f inner size of the MLP, L layers, V vocabulary, q and k widths of all query and key heads.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf.demo import catalogue as demo
from rlhf.errors import Problem, RlhfError
from rlhf.hub import model_files, names

GATED = ("llama", "mistral", "qwen2", "qwen3", "smollm3", "gemma")
KNOWN = (*GATED, "gpt2")
QKV_BIAS = ("qwen2",)


@dataclass(frozen=True)
class Shape:
    """What decides memory and arithmetic.

    Args:
        linears: name -> (inputs, outputs) of the linear layers of one block, the ones that LoRA adapts.
        block_extras, extras: parameters beside them in a block (norms, biases) and outside of the blocks (final norm,
            positions).
    """

    family: str
    d: int
    f: int
    L: int
    V: int
    heads: int
    q: int
    k: int
    tied: bool
    linears: dict[str, tuple[int, int]]
    block_extras: int
    extras: int
    context: int | None = None

    @property
    def linear_parameters(self) -> int:
        """Of all blocks: L * sum of inputs * outputs."""
        return self.L * sum(inputs * outputs for inputs, outputs in self.linears.values())

    @property
    def other_parameters(self) -> int:
        """Embeddings, an output head of its own, norms and biases."""
        return self.V * self.d * (1 if self.tied else 2) + self.L * self.block_extras + self.extras

    @property
    def parameters(self) -> int:
        return self.linear_parameters + self.other_parameters

    @property
    def widest(self) -> int:
        """The widest input or output of a linear layer."""
        return max(size for pair in self.linears.values() for size in pair)

    def lora_parameters(self, rank: int, targets: str | Sequence[str] = "all-linear", num_tokens: int = 0) -> int:
        """r * L * sum of (inputs + outputs) over the adapted layers, and the trained rows of embedding and head."""
        chosen = [pair for name, pair in self.linears.items() if targets == "all-linear" or name in targets]
        rows = num_tokens * self.d * (1 if self.tied else 2)
        return rank * self.L * sum(inputs + outputs for inputs, outputs in chosen) + rows


def read(source: str, where: str) -> Shape:
    """The shape of a model directory or demo:base.

    Raises:
        RlhfError: MOD001 where there is no such directory or no config, MOD006 where the config lacks
            what is needed, MOD050 for an architecture that is not known here.
    """
    directory = demo.resolve_model(source) if demo.is_demo(source) else Path(source)
    if not names.exists(str(directory)):
        what = "is not a directory here, and a plan reads no hub."
        raise RlhfError(Problem("MOD001", f"{where}: {source}", what, "download it, and name the directory"))
    path = directory / model_files.CONFIG
    try:
        return of_config(json.loads(path.read_text("utf-8")), f"{where}: {source}")
    except OSError:
        raise RlhfError(Problem("MOD001", f"{where}: {source}", f"has no {model_files.CONFIG}.")) from None
    except (ValueError, KeyError, TypeError, ZeroDivisionError) as error:
        what = f"{model_files.CONFIG} is not readable: {error!r}."
        raise RlhfError(Problem("MOD006", f"{where}: {source}", what, "download the model again")) from None


def of_config(config: dict[str, Any], where: str) -> Shape:
    """The shape that a decoded ``config.json`` describes.

    Raises:
        RlhfError: MOD050.
    """
    family = str(config.get("model_type"))
    if family == "gpt2":
        return _gpt2(config)
    if family not in GATED:
        what = f"model_type {family}: the layers of this architecture are not known to the plan."
        raise RlhfError(Problem("MOD050", where, what, f"known are {', '.join(KNOWN)}"))
    d, f, heads = config["hidden_size"], config["intermediate_size"], config["num_attention_heads"]
    head_dim = config.get("head_dim") or d // heads
    q, k = heads * head_dim, (config.get("num_key_value_heads") or heads) * head_dim
    qkv_bias = q + 2 * k if family in QKV_BIAS or config.get("attention_bias") else 0
    linears = {
        "q_proj": (d, q),
        "k_proj": (d, k),
        "v_proj": (d, k),
        "o_proj": (q, d),
        "gate_proj": (d, f),
        "up_proj": (d, f),
        "down_proj": (f, d),
    }
    extras = 2 * d + qkv_bias + (2 * head_dim if family == "qwen3" else 0)
    extras += d if config.get("attention_bias") and family == "llama" else 0
    extras += 2 * f + d if config.get("mlp_bias") else 0
    tied = bool(config.get("tie_word_embeddings", family == "gemma"))
    return Shape(
        family,
        d,
        f,
        config["num_hidden_layers"],
        config["vocab_size"],
        heads,
        q,
        k,
        tied,
        linears,
        extras,
        d,
        config.get("max_position_embeddings"),
    )


def _gpt2(config: dict[str, Any]) -> Shape:
    d, heads = config["n_embd"], config["n_head"]
    f = config.get("n_inner") or 4 * d
    linears = {"c_attn": (d, 3 * d), "attn.c_proj": (d, d), "c_fc": (d, f), "mlp.c_proj": (f, d)}
    extras = 4 * d + 3 * d + d + f + d
    tied = bool(config.get("tie_word_embeddings", True))
    return Shape(
        "gpt2",
        d,
        f,
        config["n_layer"],
        config["vocab_size"],
        heads,
        d,
        d,
        tied,
        linears,
        extras,
        2 * d + config["n_positions"] * d,
        config["n_positions"],
    )
