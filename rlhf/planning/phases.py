"""The phases of a stage and the bytes of each: what stands throughout, and the worst moment of what comes and goes."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from rlhf.planning import memory
from rlhf.planning.memory import Numbers
from rlhf.planning.shape import Shape

PARTS = ("weights", "adapters", "optimizer", "gradients", "kv_cache", "activations", "logits")


@dataclass(frozen=True)
class Spec:
    """All of a stage's config that memory and time depend on; lengths are the longest that the config allows.

    Args:
        micro: sequences a forward pass with gradient (for rankings: prompts times responses); batch: sequences an
            optimizer step or, for PPO, a rollout; minibatch: sequences an optimizer step of PPO.
        prompt, response: tokens where responses are sampled; length: tokens of a row of SFT or reward modelling.
        steps: optimizer steps, or PPO's rollouts; None where they are not known.
        group: sequences that cannot be parted, a prompt's responses in reward modelling.
        num_reward_runs, value_rank: PPO's reward roles on this base (every member of an ensemble is one), and the rank
            that they and a trained value role have; trains_value: whether PPO has one, or a critic by least squares.
        reads_reference: whether PPO's steps run the reference.
        members: of an ensemble in reward modelling, trained one after the other.
        heads: numbers that each of them has.
        measured, measurements: held-out sequences of one measurement during training, and how often that is made.
    """

    stage: str
    shape: Shape
    held: Numbers = field(default_factory=Numbers)
    rank: int = 16
    targets: str | tuple[str, ...] = "all-linear"
    num_tokens: int = 0
    micro: int = 16
    batch: int = 16
    minibatch: int = 16
    prompt: int = 0
    response: int = 64
    length: int = 512
    concurrency: int = 64
    checkpointing: bool = False
    epochs: int = 1
    steps: int | None = None
    entropy: bool = False
    group: int = 1
    num_reward_runs: int = 1
    value_rank: int | None = None
    trains_value: bool = True
    reads_reference: bool = True
    members: int = 1
    heads: int = 1
    measured: int = 0
    measurements: int = 0
    device: str = "cpu"

    def with_(self, **changes: object) -> Spec:
        return replace(self, **changes)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Phase:
    """One phase and its bytes by part."""

    name: str
    parts: dict[str, int]

    @property
    def total(self) -> int:
        return sum(self.parts.values())


def phases(spec: Spec) -> list[Phase]:
    """The phases of the stage in the order in which they first come."""
    make = {"sft": _sft, "train-rm": _train_rm, "ppo": _ppo, "collect": _collect, "eval-rm": _eval_rm}
    return make[spec.stage](spec)


def peak(spec: Spec) -> Phase:
    """The phase that needs most."""
    return max(phases(spec), key=lambda phase: phase.total)


def least(spec: Spec) -> int:
    """What the stage cannot do without, however few tokens it works on: weights, adapters, moments."""
    return sum(_standing(spec, _trained(spec)).values())


def _adapter(spec: Spec, head: bool = False, rank: int | None = None) -> int:
    return memory.adapter(spec.shape, rank or spec.rank, spec.targets, spec.num_tokens, spec.heads if head else 0)


def _trained(spec: Spec) -> dict[str, int]:
    """Role -> bytes of the trained roles."""
    other = _adapter(spec, head=True, rank=spec.value_rank)
    return {
        "sft": {"policy": _adapter(spec)},
        "train-rm": {"reward": other},
        "ppo": {"policy": _adapter(spec), **({"value": other} if spec.trains_value else {})},
    }.get(spec.stage, {})


def _standing(spec: Spec, trained: dict[str, int]) -> dict[str, int]:
    """Weights, every role's adapter and head, and Adam's two moments of the trained ones."""
    critic = 0 if spec.trains_value else memory.critic(spec.shape)
    frozen = {
        "sft": 0,
        "train-rm": _adapter(spec) + (spec.members - 1) * _adapter(spec, head=True, rank=spec.value_rank),
        "collect": _adapter(spec) * (1 + spec.num_reward_runs),
        "eval-rm": spec.members * _adapter(spec, head=True),
        "ppo": _adapter(spec) + spec.num_reward_runs * _adapter(spec, head=True, rank=spec.value_rank) + critic,
    }[spec.stage]
    return {
        "weights": memory.weights(spec.shape, spec.held),
        "adapters": frozen + sum(trained.values()),
        "optimizer": 2 * sum(trained.values()),
    }


def _training(
    spec: Spec, name: str, role: str, S: int, logits: int, accumulates: bool, wanted: int | None = None
) -> Phase:
    """One optimizer step: gradients, and the worse of the moment at the head and the backward pass behind it.

    ``wanted``: tokens a sequence that the head reads; None in TRL's trainer, where the model's own blocks run.
    """
    trained = _trained(spec)
    how = (spec.shape, spec.held, spec.rank, spec.micro, S, spec.checkpointing, wanted)
    at_the_head, behind = memory.kept(*how), memory.backward(*how)
    moments = {"activations": at_the_head, "logits": logits}
    if behind > logits:
        moments = {"activations": at_the_head + behind, "logits": 0}
    gradients = trained[role] if accumulates else 0
    if gradients + sum(moments.values()) < 2 * trained[role]:  # the step itself: gradients, and one parameter's terms
        gradients, moments = trained[role], {"activations": 0, "logits": 0}
    return Phase(name, {**_standing(spec, trained), "gradients": gradients, **moments})


def _passing(spec: Spec, name: str, sequences: int, S: int, wanted: int, logits: int) -> Phase:
    """Forward passes without gradient: the worse of one block and the head behind the last, on ``wanted`` tokens."""
    n = sequences * (wanted if memory.fuses(spec.shape, spec.held) else S)
    block = memory.passing(spec.shape, spec.held, sequences, S, spec.device, wanted)
    head = 2 * n * spec.shape.d * spec.held.e + logits if logits else 0
    worse = {"activations": block, "logits": 0} if block > head else {"activations": head - logits, "logits": logits}
    return Phase(name, {**_standing(spec, _trained(spec)), **worse})


def _sampling(spec: Spec, name: str, rows: int, prompt: int) -> Phase:
    """``rows`` sequences at a time: the prompts' forward pass, or the last token with the cache at its longest."""
    shape, held = spec.shape, spec.held
    sums = memory.summed(shape, held)
    first = {
        "kv_cache": memory.kv_cache(shape, held, rows, prompt + spec.response),
        "activations": memory.passing(shape, held, rows, prompt, spec.device, prompt) + sums,
        "logits": 0,
    }
    last = {
        "kv_cache": memory.kv_cache(shape, held, rows, prompt + spec.response),
        "activations": memory.passing(shape, held, rows, 1, spec.device, 1) + sums,
        "logits": memory.logits_sampled(shape, held, rows, spec.device),
    }
    worse = max(first, last, key=lambda moment: sum(moment.values()))
    return Phase(name, {**_standing(spec, _trained(spec)), **worse})


def _sft(spec: Spec) -> list[Phase]:
    n = spec.micro * spec.length
    logits = memory.logits_sft(spec.shape, spec.held, n, spec.device)
    measured = memory.logits_measured(spec.shape, spec.held, n, spec.device)
    prompt = max(1, spec.length - spec.response)
    return [
        _training(spec, "training", "policy", spec.length, logits, spec.batch > spec.micro),
        _passing(spec, "measuring", spec.micro, spec.length, spec.length, measured),
        _sampling(spec, "sampling", spec.concurrency, prompt),
    ]


def _train_rm(spec: Spec) -> list[Phase]:
    prompt = max(1, spec.length - spec.response)
    return [
        _training(spec, "training", "reward", spec.length, 0, spec.batch > spec.micro, wanted=1),
        _sampling(spec, "sampling", spec.concurrency, prompt),
    ]


def _ppo(spec: Spec) -> list[Phase]:
    S, targets = spec.prompt + spec.response, spec.micro * spec.response
    accumulates = spec.minibatch > spec.micro
    trained = memory.logits_trained(spec.shape, spec.held, targets, spec.entropy, spec.device)
    rescored = memory.logits_rescored(spec.shape, spec.held, targets, spec.device)
    found = [
        _sampling(spec, "rollout", min(spec.concurrency, spec.batch), spec.prompt),
        _passing(spec, "rescoring", spec.micro, S, spec.response, rescored),
        _training(spec, "policy update", "policy", S, trained, accumulates, spec.response),
    ]
    if spec.trains_value:
        found.append(_training(spec, "value update", "value", S, 0, accumulates, spec.response))
    else:
        fit = memory.critic_fit(spec.shape, targets, spec.device)
        found.append(Phase("value fit", {**_standing(spec, _trained(spec)), "activations": fit}))
    states = memory.states(spec.shape, spec.held, spec.batch * spec.response, spec.device)
    return [found[0], *(_with_states(phase, states) for phase in found[1:])]


def _with_states(phase: Phase, states: int) -> Phase:
    return Phase(phase.name, {**phase.parts, "activations": phase.parts["activations"] + states})


def _collect(spec: Spec) -> list[Phase]:
    return [_sampling(spec, "sampling", spec.concurrency, spec.prompt)]


def _eval_rm(spec: Spec) -> list[Phase]:
    return [_passing(spec, "scoring", spec.micro, spec.length, 1, 0)]
