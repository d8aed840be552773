"""What decides whether fused blocks and packed rows are used: ordinary text, judged by a wider arithmetic."""

from __future__ import annotations

import logging
from copy import deepcopy

import pytest
import torch
from test_decoding import Recorded
from tiny import base, lora, shake

from rlhf.models import packing
from rlhf.models.fused import blocks, self_checks
from rlhf.models.fused import lora as fused_lora
from rlhf.models.roles import SharedBase


@pytest.fixture
def narrow(tmp_path):
    """A policy on a base in bfloat16."""
    opened = base(tmp_path / "m")
    opened.model.bfloat16()
    roles = SharedBase(opened)
    roles.add("policy", adapter=lora(opened), trained=True)
    shake(roles, "policy", size=0.1)
    return opened, roles


def test_the_text_has_no_special_token_and_without_a_tokenizer_ids_are_spread(tmp_path):
    opened = base(tmp_path / "m")
    given = self_checks.rows(opened.model)
    assert given.lengths == (96, 41, 7) and min(given.ids) > 3
    assert opened.tokenizer.decode(given.ids[:18]) == "The ferry leaves t"
    assert given.positions.tolist() == [*range(96), *range(41), *range(7)]
    assert torch.equal(given.padded[1, -41:], given.ids[96:137]) and given.mask.sum(1).tolist() == [96, 41, 7]
    opened.model.text_ids = None
    opened.model.config.max_position_embeddings, opened.model.config.vocab_size = 20, 49152
    given = self_checks.rows(opened.model)
    assert given.lengths == (20, 20, 7) and min(given.ids) >= 4915 and max(given.ids) < 44238
    assert len(set(given.ids.tolist())) == 47


def test_wide_arithmetic_is_that_of_a_float32_copy_and_casts_one_weight_at_a_time(narrow):
    opened, roles = narrow
    ids = torch.arange(70, 90)[None]
    with torch.no_grad(), roles.acting_as("policy") as (model, _):
        with self_checks.Wide(torch.float32), Recorded() as seen:
            found = model.model(input_ids=ids, use_cache=False).last_hidden_state
        narrow_states = model.model(input_ids=ids, use_cache=False).last_hidden_state
        copied = deepcopy(model.model).float()
        for layer in [module for module in copied.modules() if hasattr(module, "lora_A")]:
            del layer.forward  # it is bound to the layer that was copied
        wanted = copied(input_ids=ids, use_cache=False).last_hidden_state
    assert found.dtype == torch.float32 and narrow_states.dtype == torch.bfloat16
    assert self_checks.error(found, wanted) < 1e-5 < 1e-3 < self_checks.error(narrow_states, wanted)
    vocabulary = opened.model.get_input_embeddings().weight.shape[0]
    assert seen.shapes and not [shape for shape in seen.shapes if shape and shape[0] == vocabulary]


def test_half_precision_is_fused_unless_it_rounds_more_than_the_models_own(narrow, monkeypatch, caplog):
    opened, roles = narrow
    with roles.acting_as("policy"):
        assert packing.known_blocks(opened.model)
        before = [*opened.model.model.layers]
        run, opened.model.knows_blocks = blocks.rms_norm, {}

        def coarse(x, weight, eps):
            y, scale = run(x, weight, eps)
            return y.to(torch.float8_e4m3fn).to(y.dtype), scale

        monkeypatch.setattr(blocks, "rms_norm", coarse)
        with caplog.at_level(logging.INFO):
            assert packing.known_blocks(opened.model) is None
    assert "not fused. Its states differ from exact ones by" in caplog.text
    assert [*opened.model.model.layers] == before


@pytest.mark.parametrize("size", [0.0, 1e4])
def test_the_verdict_is_of_the_code_and_not_of_the_weights_that_an_adapter_has_come_to(tmp_path, monkeypatch, size):
    opened = base(tmp_path / "m")
    roles = SharedBase(opened)
    roles.add("policy", adapter=lora(opened), trained=True)
    shake(roles, "policy", size=size)
    before = [parameter.clone() for parameter in roles.trained_parameters("policy")]
    with roles.acting_as("policy"):
        assert packing.known_blocks(opened.model)
        assert all(map(torch.equal, before, roles.trained_parameters("policy")))
        run, opened.model.knows_blocks = fused_lora.products, {}
        monkeypatch.setattr(
            fused_lora,
            "products",
            lambda x, layers: run(x, [layer._replace(scaling=0.9 * layer.scaling) for layer in layers]),
        )
        assert packing.known_blocks(opened.model) is None, "an adapter that is scaled wrongly is seen"


def test_a_token_that_is_wrong_shows_among_many(tmp_path):
    generator = torch.Generator().manual_seed(0)
    truth = torch.randn(144, 8, generator=generator) * torch.logspace(0, 3, 144)[:, None]
    own = truth * (1 + 0.01 * torch.randn(144, 8, generator=generator))
    other = truth * (1 + 0.01 * torch.randn(144, 8, generator=generator))
    assert self_checks.no_worse(self_checks.error(other, truth), self_checks.error(own, truth))
    other[3] *= 1.2
    assert not self_checks.no_worse(self_checks.error(other, truth), self_checks.error(own, truth))
    by_hand = sum(float((own[i] - truth[i]).norm() / truth[i].norm()) ** 2 for i in range(144)) / 144
    assert self_checks.error(own, truth) == pytest.approx(by_hand**0.5)
