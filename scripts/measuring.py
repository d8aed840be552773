"""What the scripts that measure memory and speed share: the peak of a block, models of random weights, PPO's phases."""

from __future__ import annotations

import dataclasses
import gc
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.autograd import _disable_profiler, _enable_profiler, _prepare_profiler
from torch.autograd.profiler import profile
from torch.profiler import ProfilerActivity
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, AutoModelForCausalLM

from rlhf.config.sections import LoraSection
from rlhf.data.batches import Sequences, collate
from rlhf.data.chat_format import ChatFormat
from rlhf.models import adapters, forward, quantised
from rlhf.models.base import Base, load_tokenizer, settle
from rlhf.models.heads import ScalarHead
from rlhf.models.roles import Roles, SeparateModels, SharedBase
from rlhf.planning.memory import Numbers
from rlhf.planning.phases import Spec
from rlhf.planning.shape import Shape
from rlhf.rollouts.engine import Sampling
from rlhf.rollouts.hf import HfEngine
from rlhf.training.optimizer import Optimizer

ROLES = ("policy", "reference", "reward/0", "value")
SHORT = 4  # tokens of a prompt and of a response that only make gradients and moments stand


class Peak:
    """Bytes above what was live when the block was entered: ``high`` at the worst moment, ``left`` at the end.

    On a CPU every allocation and release that torch reports, added up; on CUDA torch's own account.
    """

    def __enter__(self) -> Peak:
        gc.collect()
        self.left = self.high = 0
        if torch.cuda.is_available():
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            self.before = torch.cuda.memory_allocated()
        else:
            self._record()
        return self

    def __exit__(self, *error: Any) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
            self.high = torch.cuda.max_memory_allocated() - self.before
            self.left = torch.cuda.memory_allocated() - self.before
        else:
            self._add_up()

    def so_far(self) -> None:
        """Add up what was recorded and go on: a long block on a CPU has more events than memory for them."""
        if not torch.cuda.is_available():
            self._add_up()
            self._record()

    def _record(self) -> None:
        settings = profile(profile_memory=True).config()  # its own end would make Python objects of every event
        _prepare_profiler(settings, {ProfilerActivity.CPU})
        _enable_profiler(settings, {ProfilerActivity.CPU})

    def _add_up(self) -> None:
        found = [e for e in _disable_profiler().events() if e.name() == "[memory]"]
        for event in sorted(found, key=lambda e: e.start_ns()):
            self.left += event.nbytes()
            self.high = max(self.high, self.left)


class WithoutProducts(TorchDispatchMode):
    """Matrix products give zeros of the right size: what is allocated stays as it is, and arithmetic costs no time.

    Above autograd nothing changes, so that the same tensors are saved for the backward pass. Zeros rather than what
    was in memory keep losses and gradients finite, and write every page.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func._schema.name in ("aten::addmm_", "aten::baddbmm_"):
            return args[0]
        if func._schema.name not in ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm"):
            return func(*args, **kwargs)
        if "out" in kwargs:
            return kwargs["out"].zero_()
        left, right = args[-2:]
        dtype = kwargs.get("out_dtype", left.dtype)
        return torch.zeros(*left.shape[:-1], right.shape[-1], dtype=dtype, device=left.device)


@dataclasses.dataclass(frozen=True)
class Case:
    """One model and its settings; ``shape`` is hidden, layers, heads, key heads, inner, vocabulary."""

    name: str
    shape: tuple[int, int, int, int, int, int]
    dtype: str = "float32"
    micro: int = 4
    prompt: int = 128
    response: int = 64
    rows: int = 16
    checkpointing: bool = False
    family: str = "llama"
    quantize: str | None = None
    tied: bool = True

    @property
    def config(self) -> Any:
        hidden, layers, heads, kv, inner, vocab = self.shape
        if self.family == "gpt2":
            return AutoConfig.for_model(
                "gpt2", n_embd=hidden, n_layer=layers, n_head=heads, n_inner=inner, vocab_size=vocab, n_positions=1024
            )
        return AutoConfig.for_model(
            self.family,
            hidden_size=hidden,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=kv,
            intermediate_size=inner,
            vocab_size=vocab,
            max_position_embeddings=4096,
            tie_word_embeddings=self.tied,
        )

    @property
    def held(self) -> Numbers:
        return Numbers(4 if self.dtype == "float32" else 2, self.quantize)

    def spec(self, stage: str, shape: Shape, device: str) -> Spec:
        """What the planner is told of it."""
        return Spec(
            stage,
            shape,
            dataclasses.replace(self.held, on_gpu=device == "cuda"),
            micro=self.micro,
            batch=self.rows,
            minibatch=2 * self.micro,
            prompt=self.prompt,
            response=self.response,
            length=self.prompt + self.response,
            concurrency=self.rows,
            checkpointing=self.checkpointing,
            device=device,
        )


def random_base(config: Any, dtype: str, device: torch.device, quantize: str | None = None) -> Base:
    """A frozen model with random weights, made on its device in its dtype; quantised a layer at a time."""
    torch.manual_seed(0)
    with device:
        model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))
    if quantize:
        _quantise(model, quantize, getattr(torch, dtype), device)
        quantised.settle(model)
    settle(model)
    tokenizer = load_tokenizer("demo:base")
    return Base(model, tokenizer, ChatFormat(tokenizer, None, 4096), "random", "", device, quantize)


def _quantise(model: Any, kind: str, dtype: torch.dtype, device: torch.device) -> None:
    """Every linear layer but the head, as ``load_base`` has bitsandbytes do it."""
    import bitsandbytes

    head = model.get_output_embeddings()
    for parent in list(model.modules()):
        for name, old in list(parent.named_children()):
            if not isinstance(old, nn.Linear) or old is head:
                continue
            size = (old.in_features, old.out_features, old.bias is not None)
            if kind == "nf4":
                four = {"quant_type": "nf4", "compress_statistics": True}
                new = bitsandbytes.nn.Linear4bit(*size, compute_dtype=dtype, device="meta", **four)
                weight = bitsandbytes.nn.Params4bit(old.weight.data, requires_grad=False, module=new, **four)
            else:
                new = bitsandbytes.nn.Linear8bitLt(*size, has_fp16_weights=False, device="meta")
                weight = bitsandbytes.nn.Int8Params(old.weight.data.cpu(), requires_grad=False, has_fp16_weights=False)
            new.weight, new.bias = weight.to(device), old.bias
            setattr(parent, name, new.requires_grad_(False).eval())
    model.is_loaded_in_4bit, model.is_loaded_in_8bit = kind == "nf4", kind == "int8"


def token_rows(prompt: int, response: int, vocabulary: int, count: int) -> tuple[list[list[int]], list[list[int]]]:
    """Prompts, one of them shorter so that a mask is needed, and responses; all at random."""
    generator = torch.Generator().manual_seed(0)
    prompts = torch.randint(10, vocabulary, (count, prompt), generator=generator).tolist()
    responses = torch.randint(10, vocabulary, (count, response), generator=generator).tolist()
    prompts[0] = prompts[0][: max(1, prompt - 3)]
    return prompts, responses


def four_roles(bases: list[Base]) -> Roles:
    """PPO's roles with fresh adapters, all on one base or each on its own."""
    shared, separate = SharedBase(bases[0]), SeparateModels(bases[0].device)
    lora = adapters.fresh_lora(LoraSection(), bases[0].model, bases[0].tokenizer)
    for name, base in zip(ROLES, bases if len(bases) > 1 else bases * len(ROLES), strict=True):
        head = ScalarHead(base.hidden_size) if name in ("reward/0", "value") else None
        role = {"adapter": lora, "head": head, "trained": name in ("policy", "value")}
        if len(bases) > 1:
            separate.add(name, base, **role)
        else:
            shared.add(name, **role)
    return separate if len(bases) > 1 else shared


Work = Callable[[Sequences], Any]


class Ppo:
    """The phases of PPO on given roles, each as a function of a micro-batch."""

    def __init__(
        self, roles: Roles, chat: ChatFormat, case: Case, trained: tuple[str, ...] = ("policy", "value")
    ) -> None:
        self.roles, self.chat, self.case, self.vocabulary = roles, chat, case, case.shape[-1]
        self.optimizers = {name: Optimizer(roles.trained_parameters(name), 1e-5, 99) for name in trained}
        if case.checkpointing:
            roles.enable_gradient_checkpointing()

    @property
    def moments(self) -> int:
        return 2 * sum(p.nbytes for name in self.optimizers for p in self.roles.trained_parameters(name))

    def sequences(self, prompt: int, response: int) -> Sequences:
        rows = token_rows(prompt, response, self.vocabulary, self.case.micro)
        return collate(*rows, 0, self.roles.device)

    def policy(self, sequences: Sequences) -> None:
        with self.roles.acting_as("policy") as (model, _):
            forward.response_logprobs(model, sequences, 1.0).sum().backward()

    def value(self, sequences: Sequences) -> None:
        with self.roles.acting_as("value") as (model, head):
            forward.state_values(model, head, sequences).sum().backward()

    def rescoring(self, sequences: Sequences) -> Any:
        return forward.policy_and_reference(self.roles, sequences, 1.0)

    @torch.no_grad()
    def scoring(self, sequences: Sequences) -> Any:
        """What value and reward role say of the rollouts."""
        with self.roles.acting_as("value") as (model, head):
            values = forward.state_values(model, head, sequences)
        with self.roles.acting_as("reward/0") as (model, head):
            return values, forward.end_scores(model, head, sequences)

    def rollout(self) -> tuple[list[list[int]], list[list[int]]]:
        """Prompts, and what the policy writes."""
        case = self.case
        engine = HfEngine(self.roles, "policy", self.chat, case.rows)
        prompts, _ = token_rows(case.prompt, 1, self.vocabulary, case.rows)
        return prompts, engine.generate(prompts, Sampling(case.response, 1.0, 0), range(case.rows)).tokens


def peak_of_update(optimizer: Optimizer, work: Work, short: Sequences, sequences: Sequences) -> int:
    """Bytes above what stands in an optimizer step whose moments, and the gradients of a micro-batch before, stand."""
    work(short)
    optimizer.step("")
    with Peak() as peak:
        work(short)
        work(sequences)
        optimizer.step("")
    return peak.high


def ppo_peaks(ppo: Ppo, standing: int) -> dict[str, int]:
    """Phase -> bytes at its worst moment, on top of roles of ``standing`` bytes."""
    short, sequences = ppo.sequences(SHORT, SHORT), ppo.sequences(ppo.case.prompt, ppo.case.response)
    found = {}
    for name in ("policy", "value"):
        found[f"{name} update"] = peak_of_update(ppo.optimizers[name], getattr(ppo, name), short, sequences)
    for name in ("rescoring", "scoring"):
        with Peak() as peak:
            getattr(ppo, name)(sequences)
        found[name] = peak.high
    with Peak() as peak, ppo.roles.acting_as("policy") as (model, _):
        hook = model.register_forward_pre_hook(lambda *_: peak.so_far())
        ppo.rollout()
        hook.remove()
    found["rollout"] = peak.high
    return {name: standing + ppo.moments + high for name, high in found.items()}
