"""Bytes, as pure functions of shape and settings: what the code allocates, derived from what each pass keeps.

Letters: see ``planning.shape``; e bytes a number of the base's dtype, n tokens of a micro-batch (B sequences of S).
Adapters, heads, gradients and moments are float32. What PyTorch keeps for the backward pass was read off its saved
tensors, and ``scripts/measure_memory.py`` compares every phase with what torch's allocator gave out on a CPU (torch
2.13, transformers 5.23, peft 0.21, SDPA, LoRA r 16 on all linear layers). Error of the prediction in per cent, measured
2026-11-21 and 22:

    model, dtype, checkpointing     SFT     reward  policy  value  rescoring  rollout
    28 M   float32                  -0.9    -1.3    +1.1    +1.3   +1.0       +0.7
    28 M   float32, on              -2.4    -0.5    +1.2    +0.8   +1.0       +0.7
    71 M   float32                  -2.4    -0.3    +0.7    +0.8   +0.4       +0.7
    71 M   float32, on              -1.3    -0.1    +0.2    +0.1   +0.1       +0.3
    71 M   bfloat16                 -2.4    -0.7    +0.5    +0.1   +0.3       -0.6
    71 M   bfloat16, on             -1.6    -0.4    +0.1    -0.2   +0.1       -0.6
    111 M  gpt2, float32            +2.8    +4.2    +4.2    +4.3   +0.4       +0.7
    111 M  gpt2, bfloat16           +1.7    +5.2    +4.8    +5.1   +0.3       +3.1
    111 M  gpt2, bfloat16, on       -1.4    +1.7    +0.6    +1.7   +0.3       +3.1
    138 M  float32                   0.0     0.0    +0.4    +0.3   +0.1       +0.3
    138 M  bfloat16, on             -1.2    -0.3    +0.1    -0.1   +0.1       -1.3
    300 M  float32                  -1.0     0.0    +0.3    +0.2   +0.1       +0.2
    300 M  bfloat16                 -1.1    -0.1    +0.3    +0.1   +0.1       -1.3
    71 M   qwen3, float32           -4.0    -0.6    +0.5    +0.3   +0.1        0.0
    71 M   qwen3, bfloat16, on      -1.5    -0.4    +0.1    -0.2   +0.1       -1.0
    71 M   nf4                      -1.9    +1.0    +0.9    +1.3   +0.3       +2.3
    71 M   nf4, on                  -1.9    +0.8    +0.2    +0.9   +0.3       +2.3
    71 M   int8                     +2.5    +7.2    +8.2    +6.6   +0.3       -0.2
    71 M   int8, on                 -1.7    -1.9    +0.4    -1.3   +0.3       -0.2

Measured with zeros for matrix products (``--without-products``), which changes no allocation. Not measured: GPUs, eager
attention, padded rows, TRL's packing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rlhf.limits import CAST_VALUES, CHUNK_VALUES, DRAWN_VALUES, FEATURE_ROWS, FEATURES, SUMMED_BYTES
from rlhf.planning.shape import Shape

FLOAT32 = 4
NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)  # a code, a scale every 64, the scale of the scales every 256 of these
SFT_TILE = (4096, 32768)  # tokens and vocabulary of TRL's fused head
FUSED = ("llama", "mistral", "qwen2", "qwen3")  # rlhf.models.fused.blocks


@dataclass(frozen=True)
class Numbers:
    """The base as it is held: bytes a number that it computes in, how its linear layers are stored, and whether that
    is on a GPU."""

    e: int = FLOAT32
    quantize: str | None = None
    on_gpu: bool = False

    @property
    def mixed(self) -> bool:
        """Whether float32 adapters meet activations of another dtype, and copies are made."""
        return self.e != FLOAT32

    def attended(self, shape: Shape) -> int:
        """Width of the keys that attention reads: in float32 on a GPU one for each query head (models.grouped)."""
        return shape.q if self.on_gpu and not self.mixed else shape.k


def weights(shape: Shape, held: Numbers) -> int:
    """The frozen base: linear layers as they are stored, embeddings, head and norms in its dtype."""
    linear = held.e * shape.linear_parameters
    if held.quantize == "nf4":
        linear = round(NF4_BYTES * shape.linear_parameters)
    elif held.quantize == "int8":
        rows = shape.L * sum(outputs for _, outputs in shape.linears.values())
        linear = shape.linear_parameters + FLOAT32 * rows
    return linear + held.e * shape.other_parameters


def adapter(shape: Shape, rank: int, targets: str | Sequence[str], num_tokens: int, heads: int) -> int:
    """One role: a float32 adapter and its head, of so many numbers."""
    return FLOAT32 * (shape.lora_parameters(rank, targets, num_tokens) + heads * (shape.d + 1))


def saved_per_token(shape: Shape, held: Numbers, rank: int) -> float:
    """Bytes a token that one block keeps for the backward pass (SDPA, packed rows, LoRA on all linear layers).

        float32:    4 (4 d + 3 q + 2 k + 4 f + 7 r + heads)
        bfloat16:   12 d + 2 (3 q + 2 k + 4 f + 7 r) + 4 heads

    Both norms' inputs and outputs (4 d, of which bfloat16 keeps the inputs as float32 copies), query, key, value, the
    attention's output of each row and of all in one, four MLP activations and LoRA's inner ones.
    """
    d, f, q, k = shape.d, shape.f, shape.q, held.attended(shape)
    inner, logsumexp = rank * len(shape.linears), FLOAT32 * shape.heads
    if shape.family == "gpt2":
        own = FLOAT32 * (4 * d + 2 * q + 2 * k + 6 * f)
        mixed = 2 * (2 * d + 2 * q + 2 * k + 5 * f) + FLOAT32 * (3 * d + f)
        return (mixed if held.mixed else own) + FLOAT32 * inner + logsumexp
    norms = (12 if held.mixed else 16) * d
    return norms + held.e * (3 * q + 2 * k + 4 * f + inner) + logsumexp


def saved_by_fused(shape: Shape, held: Numbers, rank: int) -> tuple[float, float]:
    """The same of a block of ``rlhf.models.fused.blocks``: bytes a token up to attention, and behind it.

        up to attention: e (d + 2 q + 2 k + 3 r) + 4 heads + 4        behind it: e (d + q + 2 f + 4 r) + 4

    What comes in and query, key, value, attention's output of each row; that in one, what the MLP comes to, gate and
    up; LoRA's inner ones, and each norm's factor. Qwen3's norms of queries and keys keep what they read in float32.
    """
    d, f, q, k, e = shape.d, shape.f, shape.q, held.attended(shape), held.e
    normed = FLOAT32 * (q + shape.k) if shape.family == "qwen3" else 0
    up_to = e * (d + 2 * q + 2 * k + 3 * rank) + FLOAT32 * (shape.heads + 1) + normed
    return up_to, e * (d + q + 2 * f + 4 * rank) + FLOAT32


def fuses(shape: Shape, held: Numbers) -> bool:
    """Whether ``rlhf.models.fused.blocks`` runs in the model's place."""
    return shape.family in FUSED and held.quantize is None


def kept(
    shape: Shape, held: Numbers, rank: int, sequences: int, S: int, checkpointing: bool, wanted: int | None = None
) -> int:
    """What stands when the forward pass has reached the head: all blocks' saved tensors, or only their inputs.

    bitsandbytes' 8-bit product on a CPU keeps its input where checkpointing does not see it; counted on a GPU too.

    Args:
        wanted: tokens a sequence that the head reads, where fused blocks may run; None: the model's own blocks do.
    """
    n, d = sequences * S, shape.d
    if wanted is not None and fuses(shape, held):
        block = held.e * d if checkpointing else sum(saved_by_fused(shape, held, rank))
        last = n * held.e * d if checkpointing else _last_fused(shape, held, rank, sequences, S, wanted)
        return round(n * block * (shape.L - 1) + last + sequences * wanted * _final_norm(shape, held))
    block = held.e * d if checkpointing else saved_per_token(shape, held, rank)
    block += _unseen(shape, held)
    ends = (6 if held.mixed else 2) * d
    return round(n * (block * shape.L + ends))


def backward(
    shape: Shape, held: Numbers, rank: int, sequences: int, S: int, checkpointing: bool, wanted: int | None = None
) -> int:
    """What comes on top in the backward pass: the MLP's two gradients, of the last block or of the one before it, when
    what the last had kept is gone; under checkpointing with one block's saved tensors, made again. As ``kept``."""
    n, d = sequences * S, shape.d
    if wanted is not None and fuses(shape, held):
        each = held.e * (2 * shape.f + d) + (2 if held.mixed else 1) * FLOAT32 * d
        last = _last_fused(shape, held, rank, sequences, S, wanted)
        gone, again, here = last, 0.0, 0.0
        if checkpointing:
            gone, again, here = n * held.e * d, n * sum(saved_by_fused(shape, held, rank)), last
        before = n * each + again - gone - sequences * wanted * _final_norm(shape, held)
        return round(max(sequences * wanted * each + here, before if shape.L > 1 else 0))
    own: float = (8 if shape.family == "gpt2" else 2 * held.e) * shape.f
    if checkpointing:
        own += saved_per_token(shape, held, rank) + _unseen(shape, held)
    return round(n * own) + dequantised(shape, held)


def _last_fused(shape: Shape, held: Numbers, rank: int, sequences: int, S: int, wanted: int) -> float:
    """Saved by the last block: behind attention for the wanted tokens alone."""
    up_to, behind = saved_by_fused(shape, held, rank)
    return sequences * (S * up_to + wanted * behind)


def _final_norm(shape: Shape, held: Numbers) -> int:
    """Bytes a wanted token that the last norm keeps, with what the head reads."""
    return (8 if held.mixed else 12) * shape.d


def _unseen(shape: Shape, held: Numbers) -> int:
    return held.e * (2 * shape.d + shape.q + shape.f) if held.quantize == "int8" else 0


def passing(shape: Shape, held: Numbers, sequences: int, S: int, device: str = "cpu", wanted: int | None = None) -> int:
    """The peak of a forward pass without gradient: the MLP of one block.

    e (4 f + 4 d) in bfloat16, 4 (4 f + 2 d) in float32; fused, as ``kept``, e (3 f + 3 d + q); gpt2 has PEFT's form of
    LoRA: in float32 16 f + 16 d, in bfloat16 16 f + 12 d on a CPU, which casts its summand, and 12 f + 12 d elsewhere.
    """
    n = sequences * S
    if wanted is not None and fuses(shape, held):
        return n * held.e * (3 * shape.f + 3 * shape.d + shape.q)
    f = shape.f if shape.family != "gpt2" else round(1.25 * shape.f)
    per_token = 4 * held.e * f + 8 * shape.d
    if shape.family == "gpt2":
        per_token = (16 if device == "cpu" else 12) * f + 12 * shape.d if held.mixed else 16 * f + 16 * shape.d
    return n * per_token + dequantised(shape, held)


def summed(shape: Shape, held: Numbers) -> int:
    """The copies that sampling makes of a small model's weights: summed up with LoRA, and in float32 the head's."""
    if not sums(shape, held):
        return 0
    return held.e * (shape.linear_parameters + (0 if held.mixed else shape.V * shape.d))


def sums(shape: Shape, held: Numbers) -> bool:
    """Whether sampling adds up base and adapter."""
    return fuses(shape, held) and held.e * (shape.linear_parameters + shape.V * shape.d) <= SUMMED_BYTES


def dequantised(shape: Shape, held: Numbers) -> int:
    """The one layer of a quantised base that stands in its dtype at a time."""
    return held.e * max(i * o for i, o in shape.linears.values()) if held.quantize else 0


def chunk_tokens(shape: Shape, num_tokens: int) -> int:
    """Tokens of a micro-batch's responses whose logits exist at once."""
    return min(num_tokens, max(1, CHUNK_VALUES // shape.V))


def logits_trained(shape: Shape, held: Numbers, num_tokens: int, entropy: bool, device: str = "cpu") -> int:
    """Of a policy update: logits, which become their gradient, and one temporary, in float32; with an entropy bonus
    eight float32 copies."""
    chunk = chunk_tokens(shape, num_tokens)
    return 8 * FLOAT32 * shape.V * chunk if entropy else _logits(shape, held, chunk, 2, device)


def logits_rescored(shape: Shape, held: Numbers, num_tokens: int, device: str = "cpu") -> int:
    """Of rescoring: log-probabilities of policy and reference, one term, the policy's probabilities; half a chunk."""
    return _logits(shape, held, min(num_tokens, max(1, CHUNK_VALUES // shape.V // 2)), 4, device)


def logits_measured(shape: Shape, held: Numbers, num_tokens: int, device: str = "cpu") -> int:
    """Of logprobs without gradient: the same but for the gradient, which takes no memory of its own."""
    return _logits(shape, held, chunk_tokens(shape, num_tokens), 2, device)


def _logits(shape: Shape, held: Numbers, num_tokens: int, copies: int, device: str) -> int:
    """Float32 copies of logits; or, where a CPU computes them from half precision, half of them beside what it casts:
    the hidden states, and a part of the head."""
    each = FLOAT32 * shape.V * num_tokens
    cast = FLOAT32 * (min(shape.V * shape.d, CAST_VALUES) + shape.d * num_tokens) if casts(held, device) else 0
    return each * copies // 2 + max(each * copies // 2, cast)


def casts(held: Numbers, device: str) -> bool:
    """Whether the head's product is computed in float32, from numbers in half precision."""
    return held.mixed and device == "cpu"


def logits_sampled(shape: Shape, held: Numbers, rows: int, device: str = "cpu") -> int:
    """Of one sampled token a row: logits and a copy in float32 or, where a CPU casts the head, logits beside the cast;
    for the choice, of some rows, whole blocks of float32 logits and two copies in float64."""
    chosen = min(rows * shape.V, DRAWN_VALUES["cpu" if device == "cpu" else "cuda"])
    return _logits(shape, held, rows, 2, device) + (FLOAT32 + 2 * 8) * chosen


def logits_sft(shape: Shape, held: Numbers, num_tokens: int, device: str = "cpu") -> int:
    """Of SFT's fused head: its tile, and on a device without Triton seven float32 copies of the tile's real part.

    The tile is as wide as TRL makes it, also for a smaller vocabulary. What is never written of it takes address space
    and, on a CPU, no page.
    """
    tokens, width = min(num_tokens, SFT_TILE[0]), min(shape.V, SFT_TILE[1])
    copies = 7 * FLOAT32 * width if device == "cpu" else 0
    return tokens * (SFT_TILE[1] * held.e + copies)


def kv_cache(shape: Shape, held: Numbers, rows: int, S: int) -> int:
    """Keys and values of ``rows`` sequences with room for S tokens."""
    return held.e * rows * S * 2 * shape.L * shape.k


def critic(shape: Shape) -> int:
    """What the critic by least squares holds: the projection to its features, mean and scale, and a weight for each."""
    return FLOAT32 * (FEATURES + 2) * shape.d + 8 * (FEATURES + shape.d + 1)


def critic_fit(shape: Shape, num_states: int, device: str) -> int:
    """The peak of its fit: four copies of the float64 moments on the CPU, which solves for the weights; on a GPU the
    moments, and the products of some features, which then exist four times."""
    size, rows = shape.d + FEATURES + 2, min(FEATURE_ROWS, num_states)
    return 32 * size**2 if device == "cpu" else (8 + FLOAT32) * size**2 + 4 * FLOAT32 * size * rows


def states(shape: Shape, held: Numbers, num_states: int, device: str) -> int:
    """The hidden states of a batch, which are kept for the critic in the memory of the CPU."""
    return held.e * shape.d * num_states if device == "cpu" else 0
