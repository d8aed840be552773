"""Decode steps of fixed shapes: the tokens of a growing cache, graphs that equal their step, and what stays out."""

from __future__ import annotations

import logging
from functools import partial

import pretend_device
import pytest
import torch
from test_models import bias_and_norms, two_roles
from tiny import base, build, exact, lora, shake

from rlhf.models import packing
from rlhf.models.base import Loading, load_base
from rlhf.models.fused import decoding
from rlhf.models.roles import SharedBase
from rlhf.rollouts import fixed_shapes, hf
from rlhf.rollouts.engine import Sampling
from rlhf.rollouts.hf import HfEngine

PROMPTS = [[70, 71, 72, 73, 74], [80, 81], [75, 76, 77], [90], [80, 81, 82, 83]]
VOWELS = tuple("aeiouAEIOU0123456789")
ENDING, LONG = Sampling(37, 0.8, 3, stop_tokens=VOWELS), Sampling(37, 1.0, 4)


def both_ways(monkeypatch, engine, *ways):
    """The samples of a cache that grows, and of steps of fixed shapes."""
    grown = [engine.generate(PROMPTS, how, range(len(PROMPTS))) for how in ways]
    with monkeypatch.context() as patch:
        patch.setattr(hf, "GROWING", ())
        patch.setattr(HfEngine, "_grown", None)
        return grown, [engine.generate(PROMPTS, how, range(len(PROMPTS))) for how in ways]


WAYS = [
    ENDING, LONG, Sampling(20, 0.0, 3), Sampling(20, 1.3, 3, top_p=0.8),
    *(Sampling(length, 0.8, 5, stop_tokens=VOWELS) for length in (1, 16, 17)),
]  # fmt: skip


@pytest.mark.parametrize(
    ("architecture", "limit", "ways"),
    [
        ("llama", 0, WAYS),
        ("qwen3", 1 << 28, WAYS[:2]),
        pytest.param("llama with biases", 1 << 28, WAYS, marks=pytest.mark.slow),
        pytest.param("mistral", 1 << 28, WAYS, marks=pytest.mark.slow),
    ],
)
def test_fixed_shapes_give_the_tokens_of_a_growing_cache(tmp_path, monkeypatch, architecture, limit, ways):
    """Prompts of several lengths, several ends, rows that end early and late, lengths around 16, two roles by turns,
    and several waves of which the last has one row."""
    monkeypatch.setattr(decoding, "SUMMED_BYTES", limit)
    monkeypatch.setattr(fixed_shapes, "STRIDE", 16)
    opened, roles = two_roles(tmp_path, architecture)
    bias_and_norms(opened.model)
    found = {}
    for slot, concurrency in (("policy", 8), ("reference", 2)):
        grown, found[slot] = both_ways(monkeypatch, HfEngine(roles, slot, opened.chat, concurrency), *ways)
        assert found[slot] == grown
    lengths = [len(row) for row in found["policy"][0].tokens]
    assert min(lengths) < 16 < max(lengths)
    assert max(map(len, found["policy"][1].tokens)) == 37 and found["policy"] != found["reference"]


@pytest.mark.parametrize("tie", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_trained_tokens_are_those_of_their_role_and_of_the_last_update(tmp_path, monkeypatch, tie):
    opened, roles = trained_rows(tmp_path, tie)
    found = []
    for slot in ("policy", "reference", "policy"):
        grown, fixed = both_ways(monkeypatch, HfEngine(roles, slot, opened.chat, 8), LONG)
        assert fixed == grown
        found.append(fixed[0].tokens)
        for parameter in roles.trained_parameters("policy"):
            parameter.data.mul_(1.5)
    assert found[0] != found[1] and found[0] != found[2]


def trained_rows(where, tie=True, device=None):
    opened = load_base(str(build(where / "m", tie=tie)), Loading(device=device or torch.device("cpu")))
    exact(opened.model)
    opened.model.tie_weights()
    roles = SharedBase(opened)
    for seed, name in enumerate(("policy", "reference")):
        tokens = ["<|im_end|>", "<|im_start|>"][: 2 - seed]
        roles.add(name, adapter=lora(opened, train_tokens=tokens), trained=name == "policy")
        shake(roles, name, seed)
    return opened, roles


def test_a_graph_of_the_step_samples_the_same_in_both_roles_and_after_an_update(tmp_path, monkeypatch):
    monkeypatch.setattr(fixed_shapes, "STRIDE", 16)  # 21 and 37 or 42 places are reached by two graphs
    wanted = sampled_by_turns(*trained_rows(tmp_path))
    with pretend_device.installed() as device:
        monkeypatch.setitem(fixed_shapes.CAPTURES, device.type, pretend_device.record)
        opened, roles = trained_rows(tmp_path, device=device)
        own, taken = fixed_shapes.DecodeStep.advance, []
        monkeypatch.setattr(fixed_shapes.DecodeStep, "advance", lambda step: taken.append(step) or own(step))
        assert sampled_by_turns(opened, roles) == wanted
    num_graphs = sum(1 + (max(map(len, rows)) > fixed_shapes.EVERY) for rows in wanted)
    assert num_graphs >= 5 and len(taken) == num_graphs * (fixed_shapes.COMPARED + 1), "graphs took all other steps"


def sampled_by_turns(opened, roles):
    found = []
    for slot, how in (("policy", ENDING), ("reference", LONG), ("policy", LONG)):
        engine = HfEngine(roles, slot, opened.chat, 8)
        found.append(engine.generate(PROMPTS, how, range(len(PROMPTS))).tokens)
        for parameter in roles.trained_parameters("policy"):
            parameter.data.mul_(1.5)
    return found


def frozen_number(step):
    """A graph that held on to a variable of the host: every token goes where the first one went."""
    place = step.__self__.number.clone()

    def replay():
        step.__self__.number.copy_(place)
        step()

    return replay


def off(step, share):
    def replay():
        step()
        step.__self__.states.mul_(1 + share)

    return replay


def impossible(step):
    raise RuntimeError("operation not permitted\nwhen stream is capturing")


@pytest.mark.parametrize(
    ("capture", "why"),
    [
        (frozen_number, "chose other tokens than the step itself"),
        (partial(off, share=1e-3), "gave hidden states that differ by 0.001 of their size from the step's"),
        (impossible, "could not be captured (operation not permitted when stream is capturing)"),
        (partial(off, share=1e-7), None),
    ],
)
def test_a_graph_that_does_otherwise_is_refused_once_with_a_message(tmp_path, monkeypatch, caplog, capture, why):
    opened, roles = two_roles(tmp_path)
    engine, tried = HfEngine(roles, "policy", opened.chat, 3), []
    monkeypatch.setitem(fixed_shapes.CAPTURES, "cpu", lambda step: tried.append(step) or capture(step))
    with caplog.at_level(logging.WARNING, "rlhf"):
        grown, fixed = both_ways(monkeypatch, engine, Sampling(20, 1.0, 3), Sampling(fixed_shapes.EVERY, 1.0, 3))
    assert fixed == grown
    assert (len(tried), engine.graphs.refused) == ((1, True) if why else (2, False)), "two waves, and a short answer"
    said = [record.getMessage() for record in caplog.records]
    assert said == (
        [f"A CUDA graph of the decode step {why}: tokens are sampled without one, and more slowly."] * bool(why)
    )


@pytest.mark.parametrize(
    ("architecture", "rope", "why"),
    [("gpt2", None, "its blocks are not known"), ("llama", "dynamic", "its position embedding (dynamic) changes")],
)
def test_other_models_are_left_to_generate_and_it_is_said(tmp_path, monkeypatch, caplog, architecture, rope, why):
    opened = base(tmp_path / "m", architecture)
    if rope:
        opened.model.model.rotary_emb.rope_type = rope
        opened.model.model.rotary_emb.original_max_seq_len = 128
    roles = SharedBase(opened)
    roles.add("policy", adapter=lora(opened))
    assert bool(packing.known_blocks(opened.model)) == (rope is not None)
    hf._say_slow.cache_clear()
    monkeypatch.setattr(hf, "GROWING", ())
    with caplog.at_level(logging.INFO, "rlhf"):
        for _ in range(2):
            HfEngine(roles, "policy", opened.chat, 8).generate(PROMPTS, Sampling(3, 1.0, 0), range(5))
    said = [r.getMessage() for r in caplog.records if "waits for the GPU at every token" in r.getMessage()]
    assert len(said) == 1 and why in said[0]


def test_sampling_stops_at_the_first_look_after_all_rows_have_ended(tmp_path, monkeypatch):
    opened, roles = two_roles(tmp_path)
    engine, how = HfEngine(roles, "policy", opened.chat, 8), Sampling(90, 0.8, 3, stop_tokens=VOWELS)
    own, taken = fixed_shapes.DecodeStep.advance, []
    monkeypatch.setattr(fixed_shapes.DecodeStep, "advance", lambda step: taken.append(step) or own(step))
    grown, fixed = both_ways(monkeypatch, engine, how)
    longest = max(map(len, grown[0].tokens))
    assert fixed == grown and longest < 80
    assert 1 + len(taken) == -(-longest // 16) * 16, "the prompts gave the first token"


def test_the_wish_for_deterministic_kernels_is_as_it_was(tmp_path, monkeypatch):
    opened, roles = two_roles(tmp_path)
    monkeypatch.setattr(hf, "GROWING", ())
    for asked in ((True, True), (True, False), (False, False)):
        torch.use_deterministic_algorithms(asked[0], warn_only=asked[1])
        HfEngine(roles, "policy", opened.chat, 8).generate(PROMPTS, Sampling(3, 1.0, 0), range(5))
        now = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
        assert now == asked
