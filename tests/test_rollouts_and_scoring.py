"""Sampling whose noise belongs to the row; scorers; optimizer steps."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import pytest
import tiny
import torch
from test_decoding import Recorded
from tiny import base, exact, lora, shake

from rlhf.config.rewards import term_names
from rlhf.config.sections import SamplingSection
from rlhf.data.batches import PassSize, collate
from rlhf.data.tokenised import PromptRow
from rlhf.errors import RlhfError
from rlhf.evaluation.policy_samples import respond
from rlhf.limits import DRAWN_VALUES
from rlhf.models import forward, packing
from rlhf.models.base import load_base
from rlhf.models.heads import ScalarHead
from rlhf.models.roles import SeparateModels, SharedBase
from rlhf.records import Message
from rlhf.rollouts import continuous
from rlhf.rollouts.continuous import ContinuousEngine
from rlhf.rollouts.engine import Sampling, draw, uniforms
from rlhf.rollouts.hf import HfEngine
from rlhf.rollouts.open_engine import open_engine
from rlhf.scoring.function import FunctionScorer
from rlhf.scoring.scorer import Sample, WeightedScorer
from rlhf.scoring.shared import SharedScorer
from rlhf.training.optimizer import Optimizer, schedule_factor

LETTERS = tuple("aeiouAEIOU0123456789")
PROMPTS = [[70, 71, 72, 73], [80, 81], [90], [100, 101, 102]]


@pytest.fixture
def roles(tmp_path):
    opened = base(tmp_path / "m", double=True)
    roles = SharedBase(opened)
    roles.add("policy", adapter=lora(opened), head=ScalarHead(32).double(), trained=True)
    shake(roles, "policy", size=0.1)
    return roles


def engine(roles, concurrency=8):
    return HfEngine(roles, "policy", roles.base.chat, concurrency)


@pytest.fixture
def narrow_roles(tmp_path):
    """In float32, which continuous batching computes in."""
    opened = base(tmp_path / "m")
    roles = SharedBase(opened)
    roles.add("policy", adapter=lora(opened), trained=True)
    shake(roles, "policy", size=0.1)
    return roles


@pytest.mark.parametrize("kind", [HfEngine, ContinuousEngine])
def test_every_engine_keeps_the_contract(narrow_roles, kind):
    """Greedy rows are an argmax loop's; the end token is kept and nothing behind it; logprobs are the trainer's; the
    same call gives the same rows, another seed others; attention, adapter and mode are as they were."""
    chat, prompts = narrow_roles.base.chat, [*PROMPTS, PROMPTS[0]]
    engine = kind(narrow_roles, "policy", chat, 2)
    greedy = engine.generate(prompts, Sampling(10, 0.0, seed=0), range(5))
    chat_end, model = chat.end_id, narrow_roles.base.model
    with torch.no_grad(), narrow_roles.acting_as("policy"):
        for prompt, tokens in zip(prompts, greedy.tokens, strict=True):
            ids = list(prompt)
            while len(ids) < len(prompt) + 10 and ids[-1] != chat_end:
                ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
            assert tokens == ids[len(prompt) :]
    how = Sampling(24, 0.7, seed=3)
    found, again = (engine.generate(prompts, how, range(5)) for _ in range(2))
    other = engine.generate(prompts, Sampling(24, 0.7, seed=4), range(5))
    assert found.tokens == again.tokens != other.tokens
    for tokens, finished in zip(found.tokens, found.finished, strict=True):
        assert finished == (tokens[-1] == chat_end) and chat_end not in tokens[:-1] and 1 <= len(tokens) <= 24
    with torch.no_grad(), narrow_roles.acting_as("policy") as (_, _head):
        wanted = forward.response_logprobs(model, collate(prompts, found.tokens, 0, torch.device("cpu")), 0.7)
    for said, tokens, row in zip(found.logprobs or [], found.tokens, wanted, strict=False):
        assert len(said) == len(tokens) and torch.allclose(torch.tensor(said), row[: len(said)], atol=1e-4)
    assert (found.logprobs is None) == (kind is HfEngine)
    assert packing.packs(model) and model.config._attn_implementation == packing.ATTENTION and not model.training


def test_several_samples_of_a_prompt_share_its_prefill_and_differ(narrow_roles):
    engine = ContinuousEngine(narrow_roles, "policy", narrow_roles.base.chat, 8)
    repeated = [prompt for prompt in PROMPTS for _ in range(3)]
    found = engine.generate(repeated, Sampling(12, 1.0, seed=1), range(12))
    assert all(len({tuple(row) for row in found.tokens[i : i + 3]}) > 1 for i in range(0, 12, 3))
    with torch.no_grad(), narrow_roles.acting_as("policy") as (model, _):
        sequences = collate(repeated, found.tokens, 0, torch.device("cpu"))
        wanted = forward.response_logprobs(model, sequences, 1.0)
    for said, row in zip(found.logprobs, wanted, strict=True):
        assert torch.allclose(torch.tensor(said), row[: len(said)], atol=1e-4)


@pytest.mark.parametrize(
    ("device", "dtype", "installed", "version"),
    [
        ("cuda", torch.bfloat16, (True, True), 3),
        ("cuda", torch.bfloat16, (False, True), 2),
        ("cuda", torch.bfloat16, (False, False), None),
        ("cuda", torch.float32, (True, True), None),
        ("cpu", torch.bfloat16, (True, True), None),
    ],
)
def test_continuous_batching_takes_the_flash_attention_that_is_installed_and_runs(
    monkeypatch, device, dtype, installed, version
):
    def of(found):
        return lambda kernels_fallback_ok: pytest.fail("would fetch a kernel") if kernels_fallback_ok else found

    for number, found in zip((3, 2), installed, strict=True):
        monkeypatch.setattr(continuous, f"is_flash_attn_{number}_available", of(found))
    model = SimpleNamespace(device=torch.device(device), dtype=dtype, _supports_flash_attn=True)
    assert continuous.flash_version(model) == version
    assert continuous.flash_version(SimpleNamespace(device=torch.device(device), dtype=dtype)) is None


def test_flash_attention_that_cannot_be_used_is_said_and_sdpa_samples(narrow_roles, monkeypatch, caplog):
    monkeypatch.setattr(continuous, "flash_version", lambda model: 2)  # which is not installed here
    caplog.set_level("INFO", logger="rlhf")
    engine = ContinuousEngine(narrow_roles, "policy", narrow_roles.base.chat, 8)
    found = [engine.generate(PROMPTS, Sampling(3, 1.0, seed=1), range(4)).tokens for _ in range(2)]
    assert found[0] == found[1]
    assert "flash-attn is installed and cannot be used" in caplog.text
    assert caplog.text.count("Continuous batching attends by sdpa.") == 1
    assert narrow_roles.base.model.config._attn_implementation == packing.ATTENTION


def test_a_continuous_engine_that_samples_from_another_policy_is_refused(narrow_roles, monkeypatch):
    chat, section = narrow_roles.base.chat, SamplingSection(engine="continuous", temperature=0.7)
    assert isinstance(open_engine(narrow_roles, "policy", chat, section), ContinuousEngine)
    whole = ContinuousEngine.generate

    def at_another_temperature(self, prompts, how, rows):
        return whole(self, prompts, dataclasses.replace(how, temperature=1.0), rows)

    monkeypatch.setattr(ContinuousEngine, "generate", at_another_temperature)
    with pytest.raises(RlhfError, match=r"MOD044.*nats.*sampling.engine: hf"):
        open_engine(narrow_roles, "policy", chat, section)


def test_a_row_is_sampled_alike_alone_in_company_and_in_any_order(roles):
    how = Sampling(12, 1.0, seed=5)
    whole = engine(roles).generate(PROMPTS, how, [3, 4, 5, 6]).tokens
    alone = [engine(roles).generate([p], how, [row]).tokens[0] for p, row in zip(PROMPTS, [3, 4, 5, 6], strict=True)]
    narrow = engine(roles, concurrency=2).generate(PROMPTS[::-1], how, [6, 5, 4, 3]).tokens[::-1]
    assert whole == alone == narrow
    assert whole != engine(roles).generate(PROMPTS, how, [7, 8, 9, 10]).tokens


def test_the_models_own_generation_settings_do_not_leak(roles):
    """The saved model asks for a repetition penalty of 1.7; greedy decoding must equal a plain argmax loop."""
    found = engine(roles).generate(PROMPTS, Sampling(10, 0.0, seed=0), range(4))
    with torch.no_grad(), roles.acting_as("policy") as (model, _):
        for prompt, tokens, finished in zip(PROMPTS, found.tokens, found.finished, strict=True):
            ids = list(prompt)
            while len(ids) < len(prompt) + 10:
                ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
                if ids[-1] == roles.base.chat.end_id:
                    break
            assert tokens == ids[len(prompt) :]
            assert finished == (ids[-1] == roles.base.chat.end_id)


def test_samples_follow_the_tempered_distribution():
    logits, count = torch.tensor([0.0, 1.0, -1.0, 2.0]), 4000
    noise = uniforms(1, range(count), 1)[:, 0]
    drawn = draw((logits / 0.7).expand(count, 4), noise)
    shares = torch.bincount(drawn, minlength=4) / count
    assert torch.allclose(shares, (logits / 0.7).softmax(0), atol=0.025)


def test_a_small_nucleus_holds_the_likeliest_token_alone(roles):
    greedy, wide, narrow = (
        engine(roles).generate(PROMPTS, how, range(4)).tokens
        for how in (Sampling(10, 0.0, seed=0), Sampling(10, 1.0, seed=0), Sampling(10, 1.0, seed=0, top_p=1e-6))
    )
    assert narrow == greedy != wide


def test_noise_at_the_edges_takes_only_tokens_that_have_probability():
    logits = torch.tensor([[-torch.inf, 0.0, -torch.inf, 0.0, -torch.inf]]).expand(3, 5)
    assert draw(logits, torch.tensor([0.0, 0.5, 1.0 - 1e-16], dtype=torch.float64)).tolist() == [1, 3, 3]


@pytest.mark.parametrize("size", [5, 4096, 5000, 49152])
def test_a_token_is_where_the_whole_cumulative_distribution_passes_the_noise(size):
    generator = torch.Generator().manual_seed(size)
    logits = 4 * torch.randn(40, size, generator=generator)
    logits[:20, torch.randperm(size, generator=generator)[: size // 2]] = -torch.inf
    noise = torch.rand(40, dtype=torch.float64, generator=generator)
    noise[[3, 23]], noise[[4, 24]] = 0.0, 1 - 2**-53
    cumulative = logits.double().softmax(-1).numpy().cumsum(-1)
    wanted = [
        row.searchsorted(each * row[-1], side="right") for row, each in zip(cumulative, noise.numpy(), strict=True)
    ]
    found = draw(logits, noise)
    inner = [row for row in range(40) if row not in (4, 24)]
    assert [found[row] for row in inner] == [wanted[row] for row in inner]
    assert torch.isfinite(logits.gather(1, found[:, None])).all()
    assert all(cumulative[row, found[row]] > 1 - 1e-12 for row in (4, 24))


def test_many_rows_of_a_large_vocabulary_are_drawn_in_one_pass_where_launches_cost(monkeypatch):
    monkeypatch.setitem(DRAWN_VALUES, "cpu", DRAWN_VALUES["cuda"])
    logits, noise = torch.zeros(64, 128256), torch.full((64,), 32064.5 / 128256, dtype=torch.float64)
    with Recorded() as seen:
        assert draw(logits, noise).tolist() == [32064] * 64
    assert len(seen.shapes) < 30 and sum(each > logits.nbytes for each in seen.bytes) == 3


def test_sampling_under_checkpointing_is_the_same(roles):
    how = Sampling(8, 1.0, seed=5)
    before = engine(roles).generate(PROMPTS, how, range(4)).tokens
    roles.enable_gradient_checkpointing()
    assert engine(roles).generate(PROMPTS, how, range(4)).tokens == before


def test_prompts_without_room_are_refused(roles):
    with pytest.raises(RlhfError, match="MOD022"):
        engine(roles).generate([[70] * 100], Sampling(64, 1.0, seed=0), [0])


def samples():
    prompt = (Message("user", "hi"),)
    first, second = [90, 2], [91, 92, 93]
    return [Sample(prompt, "a", [70, 71], first, True, first), Sample(prompt, "bb", [70], second, False, second)]


def test_a_shared_scorer_reads_the_head_at_the_last_token(roles):
    found = SharedScorer(roles, "policy", PassSize(1)).score(samples()).mean
    with torch.no_grad(), roles.acting_as("policy") as (model, head):
        for score, sample in zip(found, samples(), strict=True):
            hidden = model.model(input_ids=torch.tensor([sample.prompt_ids + sample.response_ids])).last_hidden_state
            assert float(score) == pytest.approx(float(head(hidden[0, -1])), abs=1e-5)


def lengths(prompts, responses):
    return [float(len(response)) for response in responses]


def too_few(prompts, responses):
    return [1.0]


def not_numbers(prompts, responses):
    return [float("nan"), 1.0]


def test_functions_are_scorers_and_sums_are_weighted():
    scorer = FunctionScorer(f"{__name__}:lengths")
    assert scorer.score(samples()).mean.tolist() == [1.0, 2.0]
    both = WeightedScorer([(scorer, 2.0), (scorer, -0.5)], ["a", "b"]).score(samples())
    assert both.mean.tolist() == [1.5, 3.0] and both.members.tolist() == [[1, 1], [2, 2]]
    assert {name: term.tolist() for name, term in both.terms.items()} == {"a": [2.0, 4.0], "b": [-0.5, -1.0]}


@pytest.mark.parametrize(
    ("sources", "names"),
    [
        (
            [
                {"run": "runs/rm/"},
                {"function": "my.rules:brevity"},
                {"url": "http://[::1]:8300/v1/"},
                {"model": {"path": "org/a model"}},
                {"runs": ["a/x", "b/y"], "head": "safe"},
            ],
            ["rm", "my.rules.brevity", "_1_8300_v1", "a_model", "x.y.safe"],
        ),
        ([{"run": "a/rm"}, {"run": "b/rm"}, {"run": "c"}], ["rm.0", "rm.1", "c"]),
        ([{"run": "rm"}, {"run": "rm"}, {"run": "rm.0"}], ["rm.0", "rm.1", "rm.0.2"]),
        ([{"run": "rm", "head": "safe"}, {"run": "rm", "head": "helpful"}], ["rm.safe", "rm.helpful"]),
    ],
)
def test_no_two_terms_of_a_reward_share_a_name_in_the_metrics(sources, names):
    assert term_names([tiny.reward(source) for source in sources]) == names


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (f"{__name__}:too_few", "1 numbers for 2"),
        (f"{__name__}:not_numbers", "nan"),
        ("nothing", "module:function"),
        ("nowhere:f", "cannot be imported"),
        (f"{__name__}:PROMPTS", "not a function"),
    ],
)
def test_bad_reward_functions_are_named(name, message):
    with pytest.raises(RlhfError, match=message):
        FunctionScorer(name).score(samples())


@pytest.mark.parametrize("kind", ["constant", "linear", "cosine"])
def test_schedules_rise_over_the_warm_up_and_then_follow_their_kind(kind):
    factors = [schedule_factor(step, 100, 0.1, kind) for step in range(100)]
    assert factors[:10] == pytest.approx([(step + 1) / 11 for step in range(10)])
    wanted = {"constant": 1.0, "linear": 0.5, "cosine": 0.5}[kind]
    assert factors[55] == pytest.approx(wanted) and factors[10] == 1.0


def test_a_gradient_that_is_not_finite_is_never_applied():
    parameter = torch.nn.Parameter(torch.ones(3))
    optimizer = Optimizer([parameter], 0.1, 10)
    parameter.grad = torch.tensor([1.0, float("nan"), 0.0])
    with pytest.raises(RlhfError, match="GRD001.*not applied"):
        optimizer.step("here")
    assert parameter.tolist() == [1.0, 1.0, 1.0] and optimizer.step_count == 0


def test_a_response_keeps_its_end_token_and_loses_what_was_generated_behind_it(roles):
    own, end = engine(roles), roles.base.chat.end_id
    for row, kept in (([90, end, 0, 0], [90, end]), ([end, end], [end]), ([90, 91], [90, 91]), ([90, 7, end], [90, 7])):
        assert own._cut(row, [end, 7]) == kept


def test_a_stop_token_ends_a_response_and_the_reward_role_reads_an_end_token_there(roles):
    """The same noise with and without: cut at the first stop token, the rest alike."""
    plain, stopped = (
        engine(roles).generate(PROMPTS, Sampling(24, 1.0, seed=4, stop_tokens=stop), range(4)) for stop in ((), LETTERS)
    )
    chat, ids = roles.base.chat, set(roles.base.tokenizer.convert_tokens_to_ids(list(LETTERS)))
    cuts = [next((i for i, token in enumerate(row) if token in {*ids, chat.end_id}), None) for row in plain.tokens]
    assert stopped.tokens == [row if i is None else row[: i + 1] for row, i in zip(plain.tokens, cuts, strict=True)]
    assert stopped.finished == [i is not None for i in cuts] and {row[-1] for row in stopped.tokens} & ids
    rows = [PromptRow((Message("user", "hi"),), ids) for ids in PROMPTS]
    found = respond(engine(roles), chat, rows, Sampling(24, 1.0, seed=4, stop_tokens=LETTERS))
    for sample, tokens in zip(found, stopped.tokens, strict=True):
        assert sample.response_ids == tokens
        assert sample.scored_ids == ([*tokens[:-1], chat.end_id] if sample.finished else tokens)
        assert sample.response == roles.base.tokenizer.decode(
            tokens[:-1] if sample.finished else tokens, skip_special_tokens=True
        ).removeprefix(" ")


def test_a_stop_token_that_is_none_is_refused(roles):
    with pytest.raises(RlhfError, match=r"MOD031.*sampling.stop_tokens.*'nothing'"):
        engine(roles).generate(PROMPTS, Sampling(4, 1.0, seed=4, stop_tokens=("nothing",)), range(4))


def test_separate_models_sample_the_same_tokens_as_the_shared_base(tmp_path, roles):
    separate = SeparateModels(roles.device)
    own = load_base(str(tmp_path / "m"))
    exact(own.model)
    separate.add("policy", own, adapter=lora(own), head=ScalarHead(32).double(), trained=True)
    shake(separate, "policy", size=0.1)
    how = Sampling(12, 1.0, seed=5)
    found = HfEngine(separate, "policy", own.chat, 8).generate(PROMPTS, how, range(4)).tokens
    assert found == engine(roles).generate(PROMPTS, how, range(4)).tokens
