"""Sampling through fused blocks: the logits of whole passes, the tokens of the model's own blocks, and nothing left."""

from __future__ import annotations

import pytest
import torch
from test_blocks import KNOWN
from test_models import bias_and_norms, two_roles
from tiny import both_ways
from torch.utils._python_dispatch import TorchDispatchMode

from rlhf.models import packing
from rlhf.models.fused import blocks, decoding, few_rows, lora
from rlhf.planning import clock, memory
from rlhf.rollouts.cache import roomy
from rlhf.rollouts.engine import Sampling
from rlhf.rollouts.hf import HfEngine

PROMPTS = [[70, 71, 72, 73, 74], [80, 81], [75, 76, 77]]


@pytest.mark.parametrize("architecture", KNOWN)
@pytest.mark.parametrize("limit", [1 << 28, 0])
def test_every_sampled_token_has_the_logits_of_a_whole_pass(tmp_path, monkeypatch, architecture, limit):
    monkeypatch.setattr(decoding, "SUMMED_BYTES", limit)
    opened, roles = two_roles(tmp_path, architecture)
    bias_and_norms(opened.model)
    assert packing.known_blocks(opened.model)
    ids = torch.tensor([[0, 0, 0, 80, 81, 5, 6, 7], [70, 71, 72, 73, 74, 8, 9, 10]])
    mask = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1], [1] * 8])
    with torch.no_grad(), roles.acting_as("policy") as (model, _):
        cache, found = roomy(model, 8), []
        with decoding.in_place_of(model, packing.known_blocks(model)):
            for part in (slice(0, 5), slice(5, 6), slice(6, 7), slice(7, 8)):
                positions = (mask.cumsum(1) - 1).clamp(min=0)[:, part]
                seen = {"attention_mask": mask[:, : part.stop], "position_ids": positions, "past_key_values": cache}
                found.append(model(input_ids=ids[:, part], **seen).logits[:, -1])
        alone = [model(input_ids=row[keep.bool()][None]).logits[0] for row, keep in zip(ids, mask, strict=True)]
    wanted = torch.stack([logits[-4:] for logits in alone])
    assert torch.allclose(torch.stack(found, 1), wanted, rtol=1e-9, atol=1e-10)
    assert not any("forward" in module.__dict__ for module in (model.model, model.lm_head)), "they have their own again"


@pytest.mark.parametrize(("slot", "double"), [("policy", True), ("reference", True), ("policy", False)])
def test_samples_are_those_of_the_models_own_blocks(tmp_path, monkeypatch, slot, double):
    monkeypatch.setattr(few_rows, "NUMBERS", 1)  # weights are put in order, where they are in float32
    opened, roles = two_roles(tmp_path, double=double)
    engine, how = HfEngine(roles, slot, opened.chat, 2), Sampling(9, 0.8, 3)
    assert packing.known_blocks(opened.model)
    found = []
    for fused in (True, False):
        opened.model.knows_blocks = both_ways(fused)
        found.append(engine.generate(PROMPTS, how, range(3)))
    assert found[0] == found[1] and len({tuple(row) for row in found[0].tokens}) == 3


def test_prompts_are_read_without_their_padding(tmp_path, monkeypatch):
    opened, roles = two_roles(tmp_path)
    with roles.acting_as("policy"):
        assert packing.known_blocks(opened.model)
    rows, run = [], lora.products
    monkeypatch.setattr(lora, "products", lambda x, layers: rows.append(len(x)) or run(x, layers))
    HfEngine(roles, "policy", opened.chat, 3).generate(PROMPTS, Sampling(9, 0.8, 3), range(3))
    assert rows == [sum(map(len, PROMPTS))] * 4 * len(opened.model.model.layers)


def test_a_step_of_the_optimizer_is_seen_by_the_next_sample(tmp_path):
    opened, roles = two_roles(tmp_path)
    engine, found = HfEngine(roles, "policy", opened.chat, 3), []
    for _ in range(2):
        found.append(engine.generate(PROMPTS, Sampling(9, 1.0, 3), range(3)).tokens)
        for parameter in roles.trained_parameters("policy"):
            parameter.data.mul_(1.5)
    assert found[0] != found[1]


def test_an_error_while_sampling_gives_the_backbone_its_forward_back(tmp_path):
    opened, roles = two_roles(tmp_path)
    with roles.acting_as("policy") as (model, _):
        known = packing.known_blocks(model)
        with pytest.raises(KeyError), decoding.in_place_of(model, known):
            assert isinstance(model.model.forward, decoding.Decoder) and "forward" in model.lm_head.__dict__
            raise KeyError
    assert not any("forward" in module.__dict__ for module in (opened.model.model, opened.model.lm_head))


class Recorded(TorchDispatchMode):
    """The shapes and bytes of what operations give, views left out."""

    def __init__(self):
        super().__init__()
        self.shapes, self.bytes = [], []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        if not func.is_view:
            first = found[0] if isinstance(found, tuple | list) else found
            self.shapes.append(tuple(getattr(first, "shape", ())))
            self.bytes.append(getattr(first, "nbytes", 0))
        return found


@pytest.mark.parametrize(("limit", "wanted"), [(1 << 28, clock.LAUNCHES_SUMMED), (0, clock.LAUNCHES_FUSED)])
def test_a_block_takes_the_operations_that_the_plan_counts(tmp_path, monkeypatch, limit, wanted):
    assert tuple(kind.lower() for kind in blocks.KINDS) == memory.FUSED
    monkeypatch.setattr(decoding, "SUMMED_BYTES", limit)
    counts, run = [], decoding._block

    def counted(*arguments):
        with Recorded() as launches:
            found = run(*arguments)
        counts.append(len(launches.shapes))
        return found

    monkeypatch.setattr(decoding, "_block", counted)
    opened, roles = two_roles(tmp_path, double=False)
    HfEngine(roles, "policy", opened.chat, 3).generate(PROMPTS, Sampling(3, 1.0, 3), range(3))
    assert counts[-2:] == [wanted] * 2
