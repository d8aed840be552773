"""Time, as pure functions: what a phase takes on a device of a given arithmetic speed and memory bandwidth.

A pass over tokens is bound by arithmetic, the sampling of one more token by thin products, or by reading the weights
and the cache, and by the launching of small operations. What a pass does besides the products, and the optimizer, are
not counted. Rows are taken to be as long as the config lets them be: a run with shorter rows takes less than predicted,
so that no figure is a lower bound. What a person decides by is their order of magnitude.

Predicted over measured processor time, one thread, float32, speeds as ``rlhf.models.speed`` measures them, 2026-11-21.
A rollout at 30 M, 16 x (64 + 48), stands at 1.1 (0.9 to 1.2, beside other work; 2026-11-22).

    model, rows x (prompt + response)   rescoring  values and scores  policy update  value update
    3 M, 64 x (32 + 24)                 0.76       0.78               0.57           0.56
    28 M, 16 x (48 + 24)                0.79       0.82               0.75           0.69
    71 M, 16 x (48 + 16)                0.81       0.86               0.80           0.80
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from rlhf.limits import FEATURES
from rlhf.planning import memory
from rlhf.planning.phases import Spec

# Operations a block and sampled token, with LoRA on all linear layers, counted on Llama: by the model's own blocks; by
# rlhf.models.fused.decoding; and there with base and adapter summed up.
LAUNCHES, LAUNCHES_FUSED, LAUNCHES_SUMMED = 146, 50, 34
FORWARD, BACKWARD = 2, 2  # operations a parameter and token; a frozen base needs its inputs' gradients alone


@dataclass(frozen=True)
class Speed:
    """Arithmetic in operations a second, bandwidth in bytes a second, as reached and not as advertised.

    Args:
        thin: arithmetic in products of a few rows, as sampling makes them; None takes ``flops``.
        launch: seconds of an operation on next to nothing.
        wide: arithmetic of the head's product where numbers in half precision are cast for it; None takes ``flops``.
    """

    flops: float
    bandwidth: float
    thin: float | None = None
    launch: float = 0.0
    wide: float | None = None


@dataclass(frozen=True)
class Work:
    """What one phase does in one step: tokens, seconds."""

    name: str
    tokens: int
    seconds: float


def operations(spec: Spec, S: int, head: bool, passes: float) -> float:
    """Of one token: every weight that it meets, its share of attention (S / 2 keys on average), LoRA, and the head."""
    shape = spec.shape
    lora = shape.lora_parameters(spec.rank, spec.targets)
    block = shape.linear_parameters + lora + shape.L * shape.q * S
    return passes * (block + (shape.V * shape.d if head else 0))


def step(spec: Spec, speed: Speed) -> list[Work]:
    """The phases of one step (SFT and reward model: of the optimizer; PPO: rollout and update)."""
    train = FORWARD + BACKWARD + (FORWARD if spec.checkpointing else 0)
    if spec.stage in ("sft", "train-rm"):
        tokens = spec.batch * spec.length
        each = operations(spec, spec.length, spec.stage == "sft", train)
        return [Work("training", tokens, tokens * each / speed.flops)]
    if spec.stage != "ppo":
        return []
    S = spec.prompt + spec.response
    tokens, states = spec.batch * S, spec.batch * spec.response
    body, head = operations(spec, S, False, 1), states * spec.shape.V * spec.shape.d
    read = FORWARD * head / (speed.wide or speed.flops)
    again = train * spec.epochs
    passes, runs = spec.num_reward_runs + spec.trains_value, 1 + spec.reads_reference
    learnt = spec.epochs * (_reads(spec) * read + BACKWARD * head / speed.flops)
    critic = Work("value update", tokens * spec.epochs, tokens * again * body / speed.flops)
    if not spec.trains_value:
        d, k = spec.shape.d, FEATURES
        each = FORWARD * (d * k + (d + k) ** 2)
        critic = Work("value fit", states, states * each / speed.flops)
    return [
        _rollout(spec, speed),
        Work("rescoring", tokens, runs * (tokens * FORWARD * body / speed.flops + read)),
        Work("values and scores", tokens, tokens * FORWARD * passes * body / speed.flops),
        Work("policy update", tokens * spec.epochs, tokens * again * body / speed.flops + learnt),
        critic,
    ]


def measuring(spec: Spec, speed: Speed) -> Work | None:
    """One measurement of the held-out loss during training; None where none is made, or the rows are not known."""
    if not spec.measured:
        return None
    tokens = spec.measured * spec.length
    return Work("measuring", tokens, tokens * operations(spec, spec.length, spec.stage == "sft", FORWARD) / speed.flops)


def _reads(spec: Spec) -> int:
    """Head products of one token's forward pass: logits that do not fit into one chunk are computed again."""
    targets = spec.micro * spec.response
    return 1 + (memory.chunk_tokens(spec.shape, targets) < targets)


def _rollout(spec: Spec, speed: Speed) -> Work:
    """Waves of ``concurrency`` rows: the prompts, then one token of every row at a time."""
    rows = min(spec.concurrency, spec.batch)
    waves = math.ceil(spec.batch / rows)
    S = spec.prompt + spec.response
    prompts = rows * spec.prompt * operations(spec, spec.prompt, False, FORWARD) / speed.flops
    read = memory.weights(spec.shape, spec.held) + memory.kv_cache(spec.shape, spec.held, rows, S) / 2
    thin = speed.thin or speed.flops
    products = rows * operations(spec, S, False, FORWARD) / thin
    products += rows * FORWARD * spec.shape.V * spec.shape.d / (speed.wide or thin)
    token = max(products, read / speed.bandwidth) + spec.shape.L * launches(spec) * speed.launch
    return Work("rollout", spec.batch * spec.response, waves * (prompts + spec.response * token))


def launches(spec: Spec) -> int:
    """Operations a block and sampled token that are launched one by one: a CUDA graph replays those of known blocks."""
    if not memory.fuses(spec.shape, spec.held):
        return LAUNCHES
    if spec.device == "cuda":
        return 0
    return LAUNCHES_SUMMED if sums(spec) else LAUNCHES_FUSED


def sums(spec: Spec) -> bool:
    """Whether sampling adds up base and adapter."""
    return memory.sums(spec.shape, spec.held)


def duration(seconds: float) -> str:
    """As a person says it: 90 s, 3 min, 5 h, 4 days."""
    for limit, unit, scale in ((120, "s", 1), (7200, "min", 60), (172_800, "h", 3600)):
        if seconds < limit:
            return f"{seconds / scale:.3g} {unit}"
    return f"{seconds / 86_400:.3g} days"
