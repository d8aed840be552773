"""Fused blocks: the values and gradients of the model's own blocks, fewer rows in the last, and where they stay out."""

from __future__ import annotations

import logging
from types import SimpleNamespace

import pytest
import torch
from test_models import CPU, PROMPTS, RESPONSES, bias_and_norms, gradients, two_roles
from tiny import base, exact, lora, shake

from rlhf.data.batches import collate
from rlhf.models import blocks, decoding, forward, packing
from rlhf.models.fused_lora import Adapted
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
        opened.model.knows_blocks = fused
        both = forward.policy_and_reference(roles, SEQUENCES, 0.7)
        found.append([*vars(both).values(), *gradients(roles)])
    assert len(found[0]) == 5 + 2 * 2 * (7 if targets == "all-linear" else 3)
    assert all(torch.allclose(a, b, rtol=1e-9, atol=1e-11) for a, b in zip(*found, strict=True))
    assert min(float(gradient.abs().max()) for gradient in found[0][5:]) > 1e-3


def layer(generator, inputs, outputs, rank=2, bias=True):
    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    return Adapted(
        draw(outputs, inputs), draw(outputs) if bias else None, draw(rank, inputs).requires_grad_(),
        draw(outputs, rank).requires_grad_(), 1.7,
    )  # fmt: skip


def test_every_node_is_checked_by_finite_differences():
    generator = torch.Generator().manual_seed(0)
    x, mixed = (torch.randn(3, 4, generator=generator, dtype=torch.float64, requires_grad=True) for _ in range(2))
    norm = torch.randn(4, generator=generator, dtype=torch.float64)

    def check(node, inputs, layers):
        factors = [factor for given in layers for factor in (given.a, given.b)]

        def run(*tensors):
            changed = zip(layers, zip(*[iter(tensors[len(inputs) :])] * 2, strict=True), strict=True)
            return blocks._apply(
                node, (*tensors[: len(inputs)], norm, 1e-3), [given._replace(a=a, b=b) for given, (a, b) in changed]
            )

        assert torch.autograd.gradcheck(run, (*inputs, *factors))

    check(blocks.NormedProducts, [x], [layer(generator, 4, n, bias=n == 6) for n in (6, 2, 2)])
    check(blocks.OutputAndMlp, [mixed, x], [layer(generator, *shape) for shape in ((4, 4), (4, 5), (4, 5), (5, 4))])
    cos, sin = (torch.randn(3, 1, 4, generator=generator, dtype=torch.float64) for _ in range(2))
    heads = torch.randn(3, 2, 4, generator=generator, dtype=torch.float64, requires_grad=True)
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
        opened.model.knows_blocks = False
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
        opened.model.knows_blocks = name == "fused"
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
    assert getattr(opened.model, "knows_blocks", None) is None
    assert blocks.read(opened.model.base_model) is None


def test_layers_of_another_kind_and_weights_that_are_trained_are_left_to_the_model(tmp_path):
    opened, _ = two_roles(tmp_path)
    inner = opened.model.model
    assert len(blocks.read(inner)) == 2
    inner.layers[1].self_attn.v_proj.lora_dropout["policy"] = torch.nn.Dropout(0.1)
    assert blocks.read(inner) is None
    inner.layers[1].self_attn.v_proj.lora_dropout["policy"] = torch.nn.Identity()
    inner.layers[0].mlp.up_proj.base_layer.weight.requires_grad_(True)
    assert blocks.read(inner) is None
    inner.layers[0].mlp.up_proj.base_layer.weight.requires_grad_(False)
    inner.layers[1].input_layernorm.weight.requires_grad_(True)
    assert blocks.read(inner) is None


def test_a_model_that_computes_otherwise_is_found_out_and_said(tmp_path, caplog):
    opened, roles = two_roles(tmp_path)
    before = gradients(roles)
    block = opened.model.model.layers[1]
    own = type(block.mlp).forward
    block.mlp.forward = lambda x: 0.22 * own(block.mlp, x)
    opened.model.knows_blocks = None
    with caplog.at_level(logging.INFO):
        changed = gradients(roles)
    assert opened.model.knows_blocks is False and "not fused" in caplog.text
    assert not any(torch.allclose(a, b) for a, b in zip(before, changed, strict=True))


@pytest.mark.parametrize("module", [blocks, decoding])
def test_packed_and_sampled_rows_are_both_looked_at(tmp_path, monkeypatch, module):
    opened, _ = two_roles(tmp_path)
    assert packing.packs(opened.model)
    monkeypatch.setattr(module, "Rotated", SimpleNamespace(apply=lambda x, cos, sin: x))
    assert packing.known_blocks(opened.model) is None and opened.model.knows_blocks is False


def test_an_embedding_row_that_is_trained_gets_its_gradient(tmp_path):
    opened, roles = two_roles(tmp_path, train_tokens=["<|im_end|>"])
    found = []
    for fused in (True, False):
        opened.model.knows_blocks = fused
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
    opened.model.knows_blocks = False
    own = forward.policy_and_reference(roles, SEQUENCES, 1.0)
    assert torch.allclose(both.ref_logprobs, own.ref_logprobs, rtol=1e-10)
