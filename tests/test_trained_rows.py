"""Trained token rows: PEFT's numbers and gradients, without a copy of the weight that they stand in."""

from __future__ import annotations

import pytest
import torch
from peft.utils.other import TrainableTokensWrapper
from test_decoding import Recorded
from tiny import base, both_ways, lora, shake

from rlhf.data.batches import collate
from rlhf.models import forward, packing
from rlhf.models.fused import logits
from rlhf.models.roles import SharedBase
from rlhf.rollouts.engine import Sampling
from rlhf.rollouts.hf import HfEngine

TOKENS = {"policy": ["<|im_end|>", "<|im_start|>"], "reference": ["<|im_end|>"], "plain": []}
PROMPTS = [[1, 70, 2, 72, 73], [80, 81], [2, 2, 77]]
SEQUENCES = collate(PROMPTS, [[90, 2], [91, 1, 2], [2]], 0, torch.device("cpu"))


def rows_trained(tmp_path, dtype, tie=True):
    opened = base(tmp_path / "m", tie=tie)
    opened.model.to(dtype)
    roles = SharedBase(opened)
    for seed, (name, tokens) in enumerate(TOKENS.items()):
        roles.add(name, adapter=lora(opened, train_tokens=tokens), trained=name == "policy")
        shake(roles, name, seed)
    assert packing.packs(opened.model)
    return opened, roles


def update(roles):
    with roles.acting_as("policy") as (model, _):
        forward.response_logprobs(model, SEQUENCES, 0.7).sum().backward()


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tie", [True, False])
def test_no_pass_copies_the_embedding_or_the_head(tmp_path, monkeypatch, dtype, tie, fused):
    monkeypatch.setattr(logits, "CAST_VALUES", 1024)  # of the head at a time
    opened, roles = rows_trained(tmp_path, dtype, tie)
    opened.model.knows_blocks = {} if fused else both_ways(False)
    engine = HfEngine(roles, "policy", opened.chat, 3)
    engine.generate(PROMPTS, Sampling(2, 1.0, 3), range(3))
    with Recorded() as seen:
        engine.generate(PROMPTS, Sampling(9, 1.0, 3), range(3))
        forward.policy_alone(roles, SEQUENCES, 0.7)
        update(roles)
    assert max(seen.bytes) < opened.model.get_input_embeddings().token_adapter.base_layer.weight.nbytes


@pytest.mark.parametrize("tie", [True, False])
def test_samples_logprobs_and_gradients_are_those_of_pefts_form(tmp_path, monkeypatch, tie):
    opened, roles = rows_trained(tmp_path, torch.float64, tie)
    found = []
    for form in ("own", "PEFT's"):
        if form == "PEFT's":
            monkeypatch.setattr(logits, "of", lambda head, x: head(x))
            monkeypatch.setattr(logits, "forward_of", lambda head: None)
            for module in opened.model.modules():
                if isinstance(module, TrainableTokensWrapper):
                    module.__dict__.pop("forward", None)
        engines = [HfEngine(roles, name, opened.chat, 3) for name in TOKENS]
        tokens = [engine.generate(PROMPTS, Sampling(9, 1.0, 3), range(3)).tokens for engine in engines]
        update(roles)
        parameters = roles.trained_parameters("policy")
        found.append((tokens, [parameter.grad.clone() for parameter in parameters]))
        for parameter in parameters:
            parameter.grad = None
    assert found[0][0] == found[1][0] and len({str(tokens) for tokens in found[0][0]}) == 3
    assert all(torch.allclose(a, b, rtol=1e-9, atol=1e-11) for a, b in zip(found[0][1], found[1][1], strict=True))
    assert min(float(gradient.abs().max()) for gradient in found[0][1]) > 1e-3
