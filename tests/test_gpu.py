"""On a GPU: the numbers that a float64 CPU gives, and gradients that a switch of roles leaves right."""

from __future__ import annotations

import pytest
import torch
from tiny import build, lora, shake

from rlhf.data.batches import collate
from rlhf.models import forward
from rlhf.models.base import Loading, load_base
from rlhf.models.roles import SeparateModels, SharedBase
from rlhf.rollouts.engine import Sampling, draw, uniforms
from rlhf.rollouts.hf import HfEngine

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")]
GPU, CPU = torch.device("cuda"), torch.device("cpu")
PROMPTS, RESPONSES = [[5, 6, 7], [8], [9, 10, 11, 12]], [[13, 14, 15], [16, 17, 18, 19, 2], [20]]


def two_roles(directory, device, double=True):
    base = load_base(str(directory), Loading(device=device))
    if double:
        base.model.double()
    roles = SharedBase(base)
    for seed, name in enumerate(("policy", "reference")):
        roles.add(name, adapter=lora(base), trained=name == "policy")
        shake(roles, name, seed)
    return roles


def logprobs_and_gradients(roles, device):
    for parameter in roles.trained_parameters("policy"):
        parameter.grad = None
    with roles.acting_as("policy") as (model, _):
        found = forward.response_logprobs(model, collate(PROMPTS, RESPONSES, 0, device), 0.8)
        found.sum().backward()
    gradients = [parameter.grad for parameter in roles.trained_parameters("policy")]
    return [tensor.detach().double().cpu() for tensor in (found, *gradients)]


def test_logprobs_in_chunks_are_those_of_a_float64_cpu(tmp_path, monkeypatch):
    build(tmp_path)
    wanted = logprobs_and_gradients(two_roles(tmp_path, CPU), CPU)
    monkeypatch.setattr(forward, "CHUNK_VALUES", 2 * 260)
    for double, tolerance in ((True, 1e-10), (False, 2e-3)):
        found = logprobs_and_gradients(two_roles(tmp_path, GPU, double), GPU)
        for a, b in zip(found, wanted, strict=True):
            assert torch.allclose(a, b, rtol=tolerance, atol=tolerance * float(b.abs().max()))


def test_roles_that_take_turns_under_checkpointing_have_the_gradients_of_separate_models(tmp_path):
    build(tmp_path)
    shared, separate = two_roles(tmp_path, GPU), SeparateModels(GPU)
    for seed, name in enumerate(("policy", "reference")):
        own = load_base(str(tmp_path), Loading(device=GPU))
        own.model.double()
        separate.add(name, own, adapter=lora(own), trained=name == "policy")
        shake(separate, name, seed)
    shared.enable_gradient_checkpointing()
    sequences = collate(PROMPTS, RESPONSES, 0, GPU)
    for _ in range(2):
        ours, theirs = (forward.policy_and_reference(roles, sequences, 0.8) for roles in (shared, separate))
        assert torch.allclose(ours.exact_kl, theirs.exact_kl, atol=1e-10) and float(ours.exact_kl.sum()) > 0.1
        pairs = zip(logprobs_and_gradients(shared, GPU), logprobs_and_gradients(separate, GPU), strict=True)
        assert all(torch.allclose(a, b, atol=1e-10) for a, b in pairs)


def test_what_a_rollout_chose_is_what_whole_forward_passes_choose(tmp_path):
    build(tmp_path)
    roles = two_roles(tmp_path, GPU)
    how = Sampling(12, 0.7, 3)
    engine = HfEngine(roles, "policy", roles.base.chat, 2)
    found = engine.generate(PROMPTS, how, range(3)).tokens
    noise = uniforms(3, range(3), 12).to(GPU)
    for row, (prompt, tokens) in enumerate(zip(PROMPTS, found, strict=True)):
        with torch.no_grad(), roles.acting_as("policy") as (model, _):
            logits = model(input_ids=torch.tensor([[*prompt, *tokens]], device=GPU)).logits[0]
        for step, token in enumerate(tokens):
            assert int(draw(logits[len(prompt) + step - 1][None] / 0.7, noise[row, step][None])) == token
