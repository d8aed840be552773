"""What ``gpu_check`` holds a device to before the steps of PPO: single claims, each checked by itself."""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gpu_resume
import torch
from measuring import Case, Peak, Ppo, four_roles, random_base
from torch import Tensor
from transformers import AutoConfig

from rlhf.data.batches import Sequences, collate
from rlhf.models import forward, packing
from rlhf.models.fused import logits as head_logits
from rlhf.rollouts.engine import Sampling
from rlhf.rollouts.hf import HfEngine

Check = Callable[[str, bool, str], None]
Model = tuple[int, int, int, int, int, int]  # hidden, layers, heads, key heads, inner, vocabulary
LARGE, SMALL = (2048, 8, 16, 4, 5632, 65536), (64, 2, 4, 2, 128, 1024)
STEPS = 4  # of bfloat16 at the largest logit, by which sampler and trainer may differ
LOGITS_TOLERANCE = 1e-5  # nats, of logits in float32 from the same states
UPDATE_TOLERANCE = 0.02  # of a gradient's norm, by which two equal updates may differ on CUDA


class Claims:
    """The checks, on models of a size that takes seconds."""

    def __init__(self, device: torch.device, tiny: bool, check: Check) -> None:
        self.device, self.tiny, self.check = device, tiny, check
        self.shape: Model = SMALL if tiny else LARGE
        self.length = 512 if tiny else 4096

    def run(self) -> None:
        """Every one."""
        case = Case("claims", self.shape, dtype="bfloat16", micro=4, prompt=16 if self.tiny else 256, response=8)
        base = random_base(case.config, case.dtype, self.device)
        ppo = Ppo(four_roles([base]), base.chat, case, trained=("policy",))
        self.sampler_is_the_trainer(ppo)
        self.logits_are_float32(ppo)
        self.equal_updates_agree(ppo)
        del base, ppo
        self.packed_documents_need_no_mask()
        self.shared_keys_hold_no_scores()
        self.a_resumed_run_goes_on()

    def sampler_is_the_trainer(self, ppo: Ppo) -> None:
        """Greedy answers in bfloat16: each token has the trainer's largest logit, but for rounding."""
        how = Sampling(12 if self.tiny else 64, 0.0, 0)
        prompts = [list(range(20 + n, 20 + n + ppo.case.prompt)) for n in range(8)]
        engine = HfEngine(ppo.roles, "policy", ppo.chat, len(prompts))
        answers = engine.generate(prompts, how, range(len(prompts))).tokens
        logits, tokens = self._logits(ppo, collate(prompts, answers, 0, self.device))
        best = logits.max(-1).values
        behind = float((best - logits.gather(1, tokens[:, None])[:, 0]).max())
        step = 2.0 ** (math.floor(math.log2(float(best.abs().max()))) - 7)
        same = float((logits.argmax(-1) == tokens).float().mean())
        found = f"{same:.1%} of {len(tokens)} greedy tokens are the trainer's, the others up to {behind:.3g} behind"
        self.check("sampler and trainer agree in bfloat16", behind <= STEPS * step, f"{found}; a step is {step:.3g}")

    @torch.no_grad()
    def _logits(self, ppo: Ppo, sequences: Sequences) -> tuple[Tensor, Tensor]:
        """[N, V] float32 before each response token, and the tokens [N]."""
        with ppo.roles.acting_as("policy") as (model, _):
            states = forward.states_before(model, sequences)
            return head_logits.of(model.get_output_embeddings(), states), sequences.ids[sequences.targets]

    @torch.no_grad()
    def logits_are_float32(self, ppo: Ppo) -> None:
        """Logprobs against those of the same bfloat16 states and head in float64."""
        sequences = ppo.sequences(ppo.case.prompt, ppo.case.response)
        logits, tokens = self._logits(ppo, sequences)
        with ppo.roles.acting_as("policy") as (model, _):
            states, head = forward.states_before(model, sequences), model.get_output_embeddings().weight
        exact = (states.double() @ head.double().t()).log_softmax(-1).gather(1, tokens[:, None])[:, 0]
        apart = float((logits.log_softmax(-1).gather(1, tokens[:, None])[:, 0].double() - exact).abs().max())
        holds = logits.dtype == torch.float32 and apart < LOGITS_TOLERANCE * max(1.0, float(logits.abs().max()))
        self.check("logits are float32", holds, f"{logits.dtype}, logprobs at most {apart:.2g} nats from float64")

    def equal_updates_agree(self, ppo: Ppo) -> None:
        """The gradient of one micro-batch, twice: what a resumed run repeats. On a CPU bit for bit; on CUDA as near as
        rounding is, which is all that is claimed there."""
        sequences = ppo.sequences(ppo.case.prompt, ppo.case.response)
        found = []
        for _ in range(2):
            for parameter in ppo.roles.trained_parameters("policy"):
                parameter.grad = None
            ppo.policy(sequences)
            gradients = [p.grad.flatten() for p in ppo.roles.trained_parameters("policy") if p.grad is not None]
            found.append(torch.cat(gradients).double())
        apart = float((found[0] - found[1]).norm() / found[0].norm())
        said = "bit for bit" if torch.equal(*found) else f"{apart:.2g} of the gradient's norm apart"
        allowed = UPDATE_TOLERANCE if self.device.type == "cuda" else 0.0
        workspace = os.environ.get("CUBLAS_WORKSPACE_CONFIG", "not set")
        self.check("two equal updates agree", apart <= allowed, f"{said} (CUBLAS_WORKSPACE_CONFIG {workspace})")

    @torch.no_grad()
    def packed_documents_need_no_mask(self) -> None:
        """Two rows of documents as TRL packs them, by a mask and without: the same states, and less memory."""
        case = Case("packed", self.shape, dtype="bfloat16")
        model = random_base(case.config, case.dtype, self.device).model
        packs, num = packing.packs(model), 2 * self.length
        bounds = torch.linspace(0, num, 17, device=self.device).to(torch.int32)
        positions = torch.cat([torch.arange(n, device=self.device) for n in bounds.diff().tolist()])[None]
        ids = torch.randint(10, self.shape[-1], (1, num), device=self.device)
        given: dict[str, Any] = {
            "input_ids": ids,
            "position_ids": positions,
            "use_cache": False,
            "cu_seq_lens_q": bounds,
            "cu_seq_lens_k": bounds,
        }
        masked, with_mask = self._states(model.base_model, given)
        packing.take_flattened(model)
        states, without = self._states(model.base_model, given)
        apart = float((states - masked).norm() / masked.norm())
        found = f"{with_mask / 1e6:,.1f} MB with a mask, {without / 1e6:,.1f} without; states {apart:.2g} apart"
        holds = packs and with_mask - without >= 0.9 * num**2 and apart < 0.02
        self.check("packed documents need no mask", holds, found)

    def _states(self, inner: Any, given: dict[str, Any]) -> tuple[Tensor, int]:
        """Hidden states of a second pass, and its peak in bytes."""
        inner(**given)
        with Peak() as peak:
            states = inner(**given).last_hidden_state
        return states.float(), peak.high

    def shared_keys_hold_no_scores(self) -> None:
        """Attention in float32 with heads that share keys, forward and backward: no S x S scores."""
        heads, keys, width, length = 8, 2, 64, self.length
        config = AutoConfig.for_model("llama", num_attention_heads=heads, num_key_value_heads=keys)
        module = torch.nn.Module()
        module.config, module.num_key_value_groups, module.is_causal = config, heads // keys, True
        sizes = [(1, count, length, width) for count in (heads, keys, keys)]
        q, k, v = (torch.randn(size, device=self.device, requires_grad=True) for size in sizes)

        def work() -> None:
            packing.attention(module, q, k, v, None, packed=(length,), scaling=width**-0.5)[0].sum().backward()

        work()
        with Peak() as peak:
            work()
        scores = 4 * heads * length**2
        found = f"peak {peak.high / 1e6:,.1f} MB, scores would be {scores / 1e6:,.1f}"
        self.check("float32 with shared keys holds no scores", peak.high < scores, found)

    def a_resumed_run_goes_on(self) -> None:
        """By the command line, on the embedded world: bit for bit on a CPU, on CUDA as docs/determinism.md claims."""
        with tempfile.TemporaryDirectory(prefix="rlhf-") as at:
            holds, found = gpu_resume.outcome(Path(at), same_bits=self.device.type == "cpu")
        self.check("a resumed run goes on", holds, found)
