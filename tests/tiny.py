"""Tiny random models of real architectures, in Hugging Face directories."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch
from pydantic import TypeAdapter
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from rlhf.config.rewards import AnyReward
from rlhf.config.sections import LoraSection
from rlhf.models import adapters
from rlhf.models.base import Base, load_base
from rlhf.models.heads import ScalarHead
from rlhf.models.roles import SharedBase
from rlhf.runs import artifacts
from rlhf.runs.artifacts import BaseIdentity, Manifest

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
ARCHITECTURES = ("llama", "qwen2", "gpt2")
KINDS: dict[str, tuple] = {
    "llama": (LlamaConfig, LlamaForCausalLM, {}), "qwen2": (Qwen2Config, Qwen2ForCausalLM, {}),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM, {"head_dim": 16}),
    "mistral": (MistralConfig, MistralForCausalLM, {"sliding_window": None}),
    "llama with biases": (LlamaConfig, LlamaForCausalLM, {"attention_bias": True, "mlp_bias": True}),
    "gelu": (LlamaConfig, LlamaForCausalLM, {"hidden_act": "gelu"}),
}  # fmt: skip


reward = TypeAdapter(AnyReward).validate_python
"""A reward of the kind that its keys say."""


def tokenizer(template: str | None = CHATML, pad: str | None = "<|pad|>") -> PreTrainedTokenizerFast:
    """Bytes only, and the marks of ChatML."""
    specials = ["<|pad|>", "<|im_start|>", "<|im_end|>", "<|endoftext|>"]
    vocabulary = {token: i for i, token in enumerate([*specials, *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    inner = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token=pad,
        eos_token="<|endoftext|>",
        additional_special_tokens=["<|im_start|>", "<|im_end|>"],
        model_max_length=128,
    )
    fast.chat_template = template
    return fast


def build(directory: Path, architecture: str = "llama", tie: bool = True, template: str | None = CHATML) -> Path:
    """A two-layer model with random weights, and its tokenizer."""
    torch.manual_seed(11)
    own = tokenizer(template)
    size = len(own)
    if architecture == "gpt2":
        model = GPT2LMHeadModel(GPT2Config(vocab_size=size, n_embd=32, n_layer=2, n_head=4, n_positions=128))
    else:
        config_class, model_class, own_settings = KINDS[architecture]
        model = model_class(
            config_class(
                vocab_size=size,
                hidden_size=32,
                num_hidden_layers=2,
                num_attention_heads=4,
                num_key_value_heads=2,
                intermediate_size=48,
                max_position_embeddings=128,
                tie_word_embeddings=tie,
                initializer_range=0.2,
                **own_settings,
            )
        )
    model.generation_config.repetition_penalty = 1.7
    model.save_pretrained(directory)
    own.save_pretrained(directory)
    return directory


def base(directory: Path, architecture: str = "llama", double: bool = False, **settings) -> Base:
    """The same, opened; in float64 where numbers are compared closely."""
    opened = load_base(str(build(directory, architecture, **settings)))
    if double:
        exact(opened.model)
    return opened


def exact(model: torch.nn.Module) -> None:
    """In float64, RMSNorm too, which transformers computes in float32 whatever the model is in."""
    model.double()
    for module in model.modules():
        if hasattr(module, "variance_epsilon"):
            module.forward = partial(_rms_norm, module)


def _rms_norm(module, x):
    return module.weight * x * (x.square().mean(-1, keepdim=True) + module.variance_epsilon).rsqrt()


def lora(opened: Base, **settings):
    return adapters.fresh_lora(LoraSection(r=4, alpha=8.0, **settings), opened.model, opened.tokenizer)


def both_ways(fused: bool) -> dict[bool, bool]:
    """The verdict that a model's blocks are fused, or are not, with and without an adapter: ``model.knows_blocks``."""
    return dict.fromkeys((False, True), fused)


def shake(roles, name: str, seed: int = 0, size: float = 0.3) -> None:
    """Give a slot's adapter weights that do something: fresh LoRA adds nothing."""
    generator = torch.Generator().manual_seed(seed)
    slot = roles.slots[name]
    for key, parameter in roles.peft(name).named_parameters():
        if f".{slot.adapter}." in f"{key}." and ("lora_" in key or "trainable_tokens" in key):
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.data.copy_((size * noise).to(parameter))


def finished_sft(where: Path, **sampling) -> None:
    """A model in ``where/m`` that often ends its answers, and a finished SFT run on it in ``where/runs/sft`` with these
    sampling settings."""
    directory = build(where / "m", tie=False)
    weights = load_file(directory / "model.safetensors")
    weights["lm_head.weight"][2] = torch.randn(32, generator=torch.Generator().manual_seed(0))
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    opened = load_base(str(directory))
    roles = SharedBase(opened)
    roles.add("policy", adapter=lora(opened))
    roles.save("policy", where / "runs/sft")
    base = BaseIdentity(str(directory), opened.digest, "float32")
    identity = {"a": 1, **{f"sampling.{key}": value for key, value in sampling.items()}}
    artifacts.write(where / "runs/sft", Manifest("policy", "sft", 0, identity, {}, 1.0, base=base))


def finished_reward(where: Path) -> None:
    """A finished reward run on the same model in ``where/runs/train-rm``: a random adapter and a random head."""
    opened = load_base(str(where / "m"))
    roles = SharedBase(opened)
    torch.manual_seed(1)
    head = ScalarHead(32)
    roles.add("reward", adapter=lora(opened), head=head)
    shake(roles, "reward", seed=3)
    roles.save("reward", where / "runs/train-rm")
    identity = BaseIdentity(str(where / "m"), opened.digest, "float32")
    artifacts.write(where / "runs/train-rm", Manifest("reward", "train-rm", 0, {"a": 1}, {}, 1.0, base=identity))
