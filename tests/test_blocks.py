"""Fused blocks: the values and gradients of the model's own blocks, fewer rows in the last, and where they stay out."""

from __future__ import annotations

import logging

import pytest
import torch
from test_models import CPU, PROMPTS, RESPONSES, bias_and_norms, gradients, two_roles
from tiny import base, both_ways, exact, lora, shake

from rlhf.data.batches import collate
from rlhf.models import forward, packing
from rlhf.models.fused import blocks, decoding
from rlhf.models.fused.lora import Adapted
from rlhf.models.heads import ScalarHead
from rlhf.models.roles import SharedBase

KNOWN = ("llama", "llama with biases", "qwen2", "qwen3", "mistral")
SEQUENCES = collate(PROMPTS, RESPONSES, 0, CPU)


@pytest.mark.parametrize("architecture", KNOWN)
@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "up_proj", "down_proj"]])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_values_and_gradients_are_those_of_the_models_own_blocks(tmp_path, architecture, targets, checkpointing):
    opened, roles = two_roles(tmp_path, architecture, target_modules=targets)
    bias_and_norms(opened.model)
    if checkpointing:
        roles.enable_gradient_checkpointing()
    assert packing.known_blocks(opened.model) and opened.model.knows_blocks
    found = []
    for fused in (True, False):
        opened.model.knows_blocks = both_ways(fused)
        both = forward.policy_and_reference(roles, SEQUENCES, 0.7)
        found.append([*vars(both).values(), *gradients(roles)])
    assert len(found[0]) == 5 + 2 * 2 * (7 if targets == "all-linear" else 3)
    assert all(torch.allclose(a, b, rtol=1e-9, atol=1e-11) for a, b in zip(*found, strict=True))
    assert min(float(gradient.abs().max()) for gradient in found[0][5:]) > 1e-3


def layer(draw, inputs, outputs, bias=True, adapter=True, trained=False):
    """A layer whose adapter is trained, or the layer itself."""
    weight, own_bias = draw(outputs, inputs), draw(outputs) if bias else None
    a, b = (draw(2, inputs), draw(outputs, 2)) if adapter else (None, None)
    for tensor in (a, b, *((weight, own_bias) if trained else ())):
        if tensor is not None:
            tensor.requires_grad_()
    return Adapted(weight, own_bias, a, b, 1.7)


@pytest.mark.parametrize("trained", [False, True])
def test_every_node_is_checked_by_finite_differences(trained):
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    def check(node, inputs, layers):
        given = [tensor for each in layers for tensor in each[:4]]
        free = [tensor for tensor in given if tensor is not None and tensor.requires_grad]

        def run(*tensors):
            own = iter(tensors[len(inputs) + 1 :])
            changed = iter([next(own) if any(tensor is f for f in free) else tensor for tensor in given])
            new = [Adapted(*(next(changed) for _ in range(4)), each.scaling) for each in layers]
            return blocks._apply(node, (*tensors[: len(inputs) + 1], 1e-3), new)

        assert len(free) == len(layers) * (4 if trained else 2) - (trained and node is blocks.NormedProducts) * 3
        assert torch.autograd.gradcheck(run, (*inputs, draw(4).requires_grad_(trained), *free))

    x, mixed = draw(3, 4).requires_grad_(), draw(3, 4).requires_grad_()
    kinds = [(6, True, True), (2, False, True), (2, True, not trained)]
    several = [layer(draw, 4, n, bias, adapter, trained) for n, bias, adapter in kinds]
    check(blocks.NormedProducts, [x], several)
    shapes = ((4, 4), (4, 5), (4, 5), (5, 4))
    check(blocks.OutputAndMlp, [mixed, x], [layer(draw, *shape, trained=trained) for shape in shapes])
    cos, sin, heads = draw(3, 1, 4), draw(3, 1, 4), draw(3, 2, 4).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: blocks.Rotated.apply(x, cos, sin), (heads,))


def test_rms_norm_is_its_formula_and_half_precision_is_scaled_in_float32():
    x, weight = torch.randn(5, 8, dtype=torch.float64), torch.randn(8, dtype=torch.float64)
    wanted = [weight * row / (float((row**2).sum()) / 8 + 1e-2) ** 0.5 for row in x]
    assert torch.allclose(blocks.rms_norm(x, weight, 1e-2)[0], torch.stack(wanted), rtol=1e-12)
    half, scale = blocks.rms_norm(300 * x.bfloat16(), weight.bfloat16(), 1e-2)
    assert half.dtype == torch.bfloat16 and scale.dtype == torch.float32
    assert torch.allclose(half.double(), blocks.rms_norm(300 * x, weight, 1e-2)[0], rtol=0.02, atol=0.01)


def test_the_last_block_runs_its_mlp_on_wanted_tokens_alone(tmp_path, monkeypatch):
    opened, roles = two_roles(tmp_path)
    rows, run = [], blocks.OutputAndMlp.forward
    with torch.no_grad(), roles.acting_as("policy") as (model, _):
        every = packing.backbone(model, SEQUENCES.ids, SEQUENCES.attention_mask, SEQUENCES.lengths)
        monkeypatch.setattr(
            blocks.OutputAndMlp, "forward", lambda ctx, mixed, *rest: rows.append(len(mixed)) or run(ctx, mixed, *rest)
        )
        some = packing.backbone(
            model, SEQUENCES.ids, SEQUENCES.attention_mask, SEQUENCES.lengths, torch.tensor([11, 2, 2])
        )
        forward.response_logprobs(model, SEQUENCES, 1.0)
        forward.end_scores(model, ScalarHead(32).double(), SEQUENCES)
        opened.model.knows_blocks = both_ways(False)
        own = packing.backbone(
            model, SEQUENCES.ids, SEQUENCES.attention_mask, SEQUENCES.lengths, torch.tensor([11, 2, 2])
        )
    assert rows == [12, 3, 10, 5, 12, 2]
    assert torch.allclose(some, every[[11, 2, 2]], atol=1e-12) and torch.allclose(some, own, atol=1e-12)


def test_half_precision_is_as_near_to_the_truth_as_the_models_own_blocks(tmp_path):
    opened, roles = two_roles(tmp_path, double=False)
    shake(roles, "policy", size=0.1)
    opened.model.bfloat16()
    for parameter in roles.trained_parameters("policy"):
        parameter.data = parameter.data.float()
    found = {}
    for name in ("fused", "own", "truth"):
        opened.model.knows_blocks = both_ways(name == "fused")
        if name == "truth":
            exact(opened.model)
        with torch.no_grad(), roles.acting_as("policy") as (model, _):
            hidden = packing.backbone(model, SEQUENCES.ids, SEQUENCES.attention_mask, SEQUENCES.lengths)
        found[name] = [hidden, *gradients(roles)]
    assert found["fused"][0].dtype == torch.bfloat16 and found["fused"][1].dtype == torch.float32

    def errors(name):
        pairs = zip(found[name], found["truth"], strict=True)
        return torch.tensor([float((a.double() - b).norm() / b.double().norm()) for a, b in pairs])

    assert 0 < errors("fused").mean() < 1.3 * errors("own").mean() and errors("own").max() < 0.06


@pytest.mark.parametrize("architecture", ["gpt2", "gelu"])
def test_blocks_of_another_kind_are_left_to_the_model(tmp_path, architecture):
    opened, roles = two_roles(tmp_path, architecture)
    gradients(roles)
    assert not opened.model.knows_blocks
    assert blocks.read(opened.model.base_model) is None


def test_an_adapter_of_another_kind_is_left_to_the_model_and_the_bare_base_is_not(tmp_path):
    opened, roles = two_roles(tmp_path)
    v_proj = opened.model.model.layers[1].self_attn.v_proj
    v_proj.lora_dropout["policy"] = torch.nn.Dropout(0.1)
    roles.add("base")
    for name, known in (("policy", False), ("reference", True), ("base", True)):
        with roles.acting_as(name):
            assert bool(blocks.read(opened.model.model)) == known


@pytest.mark.parametrize("architecture", KNOWN)
def test_a_model_whose_every_weight_is_trained(tmp_path, architecture):
    opened = base(tmp_path / "m", architecture, double=True)
    bias_and_norms(opened.model)
    roles = SharedBase(opened)
    roles.add("policy", trained=True)
    assert packing.known_blocks(opened.model)
    found = []
    for fused in (True, False):
        opened.model.knows_blocks = both_ways(fused)
        found.append(gradients(roles))
    for name, ours, theirs in zip(dict(opened.model.named_parameters()), *found, strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-9, atol=1e-10), name


def test_a_model_that_computes_otherwise_is_found_out_and_said(tmp_path, caplog):
    opened, roles = two_roles(tmp_path)
    before = gradients(roles)
    block = opened.model.model.layers[1]
    own = type(block.mlp).forward
    block.mlp.forward = lambda x: 0.22 * own(block.mlp, x)
    opened.model.knows_blocks = {}
    with caplog.at_level(logging.INFO):
        changed = gradients(roles)
    assert opened.model.knows_blocks == {True: False} and "not fused" in caplog.text
    assert not any(torch.allclose(a, b) for a, b in zip(before, changed, strict=True))


@pytest.mark.parametrize("module", [blocks, decoding])
def test_packed_and_sampled_rows_are_both_looked_at(tmp_path, monkeypatch, module):
    opened, _ = two_roles(tmp_path)
    assert packing.packs(opened.model)
    run = module.heads
    monkeypatch.setattr(module, "heads", lambda own, projected, cos, sin: run(own, projected, cos, -sin))
    assert packing.known_blocks(opened.model) is None and opened.model.knows_blocks == {False: False}


def test_an_embedding_row_that_is_trained_gets_its_gradient(tmp_path):
    opened, roles = two_roles(tmp_path, train_tokens=["<|im_end|>"])
    found = []
    for fused in (True, False):
        opened.model.knows_blocks = both_ways(fused)
        found.append(gradients(roles))
    assert len(found[0]) > 28, "the trained row is among them"
    assert all(torch.allclose(a, b, rtol=1e-9, atol=1e-11) for a, b in zip(*found, strict=True))


def test_the_bare_base_is_read_too(tmp_path):
    opened = base(tmp_path / "m", double=True)
    roles = SharedBase(opened)
    roles.add("reference")
    roles.add("policy", adapter=lora(opened), trained=True)
    shake(roles, "policy")
    both = forward.policy_and_reference(roles, SEQUENCES, 1.0)
    assert opened.model.knows_blocks and float(both.exact_kl.sum()) > 1e-3
    opened.model.knows_blocks = both_ways(False)
    own = forward.policy_and_reference(roles, SEQUENCES, 1.0)
    assert torch.allclose(both.ref_logprobs, own.ref_logprobs, rtol=1e-10)
