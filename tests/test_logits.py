"""Logits in float32 on a base in bfloat16: their error, their gradients, and every place that reads them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from test_blocks import SEQUENCES
from test_decoding import PROMPTS
from test_models import two_roles
from tiny import base, exact, lora, shake

from rlhf.config.sections import SamplingSection
from rlhf.errors import RlhfError
from rlhf.losses.tensors import TemperedLogprobs
from rlhf.models import forward, packing
from rlhf.models.fused import decoding, logits
from rlhf.models.roles import SharedBase
from rlhf.rollouts.continuous import ContinuousEngine
from rlhf.rollouts.engine import Sampling
from rlhf.rollouts.open_engine import open_engine

V, D = 32768, 64
SETTINGS = {"targets": {"q_proj", "lm_head"}}, {"train_tokens": ["<|im_end|>"]}, {}


def head_and_states(dtype=torch.bfloat16):
    """Of logits with a standard deviation of 6."""
    generator = torch.Generator().manual_seed(0)
    head = torch.nn.Linear(D, V).requires_grad_(False)
    head.weight.data = (6 / D**0.5 * torch.randn(V, D, generator=generator)).to(dtype)
    head.bias.data = torch.randn(V, generator=generator).to(dtype)
    return head, torch.randn(40, D, generator=generator).to(dtype), torch.randint(V, (40,), generator=generator)


def logprobs_of(wide, ids):
    return wide.log_softmax(-1).gather(1, ids[:, None])[:, 0]


def test_a_wide_vocabulary_costs_no_bit_of_a_logprob(monkeypatch):
    head, x, ids = head_and_states()
    wide = x.double() @ head.weight.double().t() + head.bias.double()
    assert wide.std() == pytest.approx(6, rel=0.1)
    wanted, errors = logprobs_of(wide, ids), []
    for values in (logits.CAST_VALUES, 1 << 30, 1000):  # four parts, one, and parts that do not divide the vocabulary
        monkeypatch.setattr(logits, "CAST_VALUES", values)
        found = TemperedLogprobs.apply(logits.of(head, x), ids, 1.0)
        errors.append(float((found - wanted).abs().max()))
    assert max(errors) < 1e-5
    rounded = (logprobs_of(head(x).float(), ids) - wanted).abs()
    assert rounded.mean() > 0.01, "what the head's own product loses"


def test_gradients_of_states_and_rows_are_those_of_whole_logits():
    head, x, ids = head_and_states(torch.float64)
    generator = torch.Generator().manual_seed(1)
    weight, bias, x = head.weight[:30], head.bias[:30], x[:5].requires_grad_()
    places, values = torch.tensor([3, 29]), torch.randn(2, D, generator=generator, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda x, v: logits.Logits.apply(x, weight, bias, places, v), (x, values))
    found = []
    for dtype in (torch.float64, torch.bfloat16):
        own, rows = (t.detach().to(dtype).requires_grad_() for t in (x, values))
        y = logits.Logits.apply(own, weight.to(dtype), bias.to(dtype), places, rows)
        TemperedLogprobs.apply(y, ids[:5] % 30, 0.7).sum().backward()
        assert own.grad.dtype == rows.grad.dtype == dtype
        found.append((own.grad.double(), rows.grad.double()))
    for exact_, narrow in zip(*found, strict=True):
        assert (narrow - exact_).norm() < 0.02 * exact_.norm()


def narrow_roles(tmp_path, targets=None, seed=0, **settings):
    """Policy and reference on a base in bfloat16 whose logits have a standard deviation of about 6."""
    torch.manual_seed(seed)
    opened = base(tmp_path / "m", tie=False)
    opened.model.bfloat16().model.norm.weight.data.mul_(6)
    roles = SharedBase(opened)
    for number, name in enumerate(("policy", "reference")):
        config = lora(opened, **settings)
        config.target_modules = targets or config.target_modules
        roles.add(name, adapter=config, trained=name == "policy")
        shake(roles, name, seed + number, size=0.1)
    return opened, roles


def float32_head(roles, name, hidden):
    """By a copy of the head under the role, every number of it in float64."""
    with roles.acting_as(name) as (model, _):
        head = model.get_output_embeddings()
        weight = head.weight.double()  # a trained row is in it
        if hasattr(head, "lora_A"):
            a, b = head.lora_A[name].weight, head.lora_B[name].weight
            weight = weight + head.scaling[name] * b.double() @ a.double()
        return hidden.double() @ weight.t()


@pytest.mark.parametrize("settings", SETTINGS)
def test_every_pass_reads_logits_as_a_float32_head_makes_them(tmp_path, settings):
    _, roles = narrow_roles(tmp_path, **settings)
    ids, wanted = SEQUENCES.ids[SEQUENCES.targets], {}
    with torch.no_grad():
        for name in ("policy", "reference"):
            with roles.acting_as(name) as (model, _):
                hidden = forward.states_before(model, SEQUENCES)
                assert hidden.dtype == torch.bfloat16
                wanted[name] = (float32_head(roles, name, hidden) / 0.7).log_softmax(-1)
        both = forward.policy_and_reference(roles, SEQUENCES, 0.7)
        logprobs, entropy = forward.policy_alone(roles, SEQUENCES, 0.7)
    with roles.acting_as("policy") as (model, _):
        trained = forward.response_logprobs(model, SEQUENCES, 0.7)
        again, bonus = forward.response_logprobs_and_entropy(model, SEQUENCES, 0.7)
    policy, reference = wanted["policy"], wanted["reference"]
    chosen, ref_chosen = (each.gather(1, ids[:, None])[:, 0] for each in (policy, reference))
    kl, own_entropy = (policy.exp() * (policy - reference)).sum(-1), -(policy.exp() * policy).sum(-1)
    assert kl.min() > 1e-3 and float((policy * 0.7).std(-1).mean()) > 4
    for found, exact_ in (
        (both.logprobs, chosen),
        (both.ref_logprobs, ref_chosen),
        (both.exact_kl, kl),
        (both.entropy, own_entropy),
        (again, chosen),
        (bonus, own_entropy),
    ):
        assert (found[SEQUENCES.mask] - exact_).abs().max() < 1e-5
    assert torch.equal(trained, both.logprobs) and torch.equal(trained, logprobs), "the first ratio is exactly 1"
    assert torch.equal(entropy, both.entropy)


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("fused", [True, False])
def test_every_sampler_reads_them_too_and_gives_the_head_back(tmp_path, monkeypatch, settings, fused):
    opened, roles = narrow_roles(tmp_path, **settings)
    ids, seen = torch.tensor([[70, 71, 72]]), []
    head = opened.model.get_output_embeddings()
    before = head.__dict__.get("forward")

    def read(model):
        hidden = model.model(input_ids=ids).last_hidden_state[0]
        assert (model(input_ids=ids).logits[0] - float32_head(roles, "policy", hidden)).abs().max() < 1e-4
        seen.append(model)

    with torch.no_grad(), roles.acting_as("policy") as (model, _):
        with decoding.in_place_of(model, packing.known_blocks(model) if fused else None):
            read(model)
        monkeypatch.setattr(type(model), "generate_batch", lambda model, *_, **__: read(model) or {})
        with pytest.raises(Exception, match="RES007"):
            ContinuousEngine(roles, "policy", opened.chat, 3).generate(PROMPTS, Sampling(3, 1.0, 0), range(3))
        assert len(seen) == 2 and head.__dict__.get("forward") is before


@pytest.mark.parametrize(("seed", "norm"), [(1, 1.0), (2, 3.0)])
def test_continuous_batching_in_bfloat16_is_taken_at_any_size_of_logits_and_another_policy_is_not(
    tmp_path, monkeypatch, seed, norm
):
    opened, roles = narrow_roles(tmp_path, seed=seed)
    opened.model.model.norm.weight.data.mul_(norm)  # logit deviations of 7 and 20
    section = SamplingSection(engine="continuous", temperature=0.7)
    assert isinstance(open_engine(roles, "policy", opened.chat, section), ContinuousEngine)
    own = ContinuousEngine.generate

    def from_the_reference(self, *given):
        self.slot = "reference"
        found = own(self, *given)
        self.slot = "policy"
        return found

    monkeypatch.setattr(ContinuousEngine, "generate", from_the_reference)
    with pytest.raises(RlhfError, match=r"MOD044.* nats from .*, and up to .*; allowed: .* and "):
        open_engine(roles, "policy", opened.chat, section)
    if norm <= 1:  # of larger logits a temperature changes little: one token has nearly all
        hotter = lambda self, prompts, how, rows: own(self, prompts, replace(how, temperature=1.0), rows)  # noqa: E731
        monkeypatch.setattr(ContinuousEngine, "generate", hotter)
        with pytest.raises(RlhfError, match="MOD044"):
            open_engine(roles, "policy", opened.chat, section)


def test_a_head_of_another_kind_is_said_to_be_rounded(tmp_path, caplog):
    opened, roles = narrow_roles(tmp_path, **SETTINGS[0])
    head = opened.model.get_output_embeddings()
    head.use_dora["policy"] = True
    with roles.acting_as("policy"):
        found = logits.of(head, torch.ones(2, 32, dtype=torch.bfloat16))
    assert found.dtype == torch.float32 and "rounded to bfloat16" in caplog.text


def test_in_float32_and_float64_the_head_is_the_models_own(tmp_path):
    opened, _ = two_roles(tmp_path, double=False)
    for _ in range(2):
        head, dtype = opened.model.get_output_embeddings(), opened.model.dtype
        x = torch.randn(5, 32).to(dtype)
        assert torch.equal(logits.of(head, x), head(x)) and logits.forward_of(head) is None
        exact(opened.model)
