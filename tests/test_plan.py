"""The planner: parameters counted from a config are the model's own, bytes are those that torch allocates, and advice
fits."""

from __future__ import annotations

import gc
import importlib
import importlib.util
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from peft import get_peft_model
from tiny import ARCHITECTURES, base, build, lora
from torch.profiler import ProfilerActivity, profile
from transformers import AutoConfig, AutoModelForCausalLM

from rlhf.commands import plan
from rlhf.data.batches import collate
from rlhf.errors import RlhfError
from rlhf.models import first_step, forward, grouped, speed
from rlhf.models.base import Loading, load_base
from rlhf.models.roles import SharedBase
from rlhf.planning import advice, clock, memory, phases, shape, specs
from rlhf.planning.clock import Speed
from rlhf.planning.memory import Numbers
from rlhf.planning.phases import Spec
from rlhf.preflight import resources
from rlhf.training import solved_critic

ROOT = Path(__file__).parents[1]
QWEN = {
    "model_type": "qwen2", "hidden_size": 896, "num_hidden_layers": 24, "num_attention_heads": 14,
    "num_key_value_heads": 2, "intermediate_size": 4864, "vocab_size": 151936, "tie_word_embeddings": True,
}  # fmt: skip
LLAMA = {
    "model_type": "llama", "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32,
    "num_key_value_heads": 8, "intermediate_size": 14336, "vocab_size": 128256, "tie_word_embeddings": False,
}  # fmt: skip


def spec(stage="ppo", config=LLAMA, **changes):
    return Spec(stage, shape.of_config(config, ""), **changes)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("tie", [True, False])
def test_parameters_counted_from_the_config_are_those_of_the_model(tmp_path, architecture, tie):
    opened = base(tmp_path / "m", architecture, tie=tie)
    found = shape.read(str(tmp_path / "m"), "model.path")
    assert found.parameters == sum(p.numel() for p in opened.model.parameters())
    adapted = get_peft_model(opened.model, lora(opened, train_tokens=["<|im_end|>"]))
    trained = [(name, p.numel()) for name, p in adapted.named_parameters() if "lora_" in name or "tokens_delta" in name]
    assert found.lora_parameters(4, "all-linear", 1) == sum(size for _, size in trained)


def test_known_models_have_their_published_sizes():
    assert shape.of_config(QWEN, "").parameters == 494_032_768
    assert shape.of_config(LLAMA, "").parameters == 8_030_261_248


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_a_quantised_base_takes_what_is_predicted(tmp_path, kind):
    if importlib.util.find_spec("bitsandbytes") is None:
        pytest.skip("bitsandbytes is not installed")
    torch.manual_seed(0)
    build(tmp_path)
    config = AutoConfig.for_model(
        "llama",
        hidden_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=512,
        vocab_size=300,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    model = load_base(str(tmp_path), Loading(quantize=kind, dtype="bfloat16")).model
    found = sum(p.nbytes for p in model.parameters())
    for module in model.modules():
        state = getattr(getattr(module, "weight", None), "quant_state", None)
        if state is not None:
            found += state.absmax.nbytes + state.state2.absmax.nbytes
        elif hasattr(module, "state"):
            found += module.state.SCB.nbytes
    predicted = memory.weights(shape.read(str(tmp_path), ""), Numbers(2, kind))
    assert predicted == pytest.approx(found, rel=0.005)


def allocated(work):
    """The worst sum of what torch allocated and released while ``work`` ran."""
    gc.collect()  # what other tests left is not released meanwhile
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as profiler:
        work()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = high = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        high = max(high, now)
    return high


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_predicted_peaks_are_those_that_torch_allocates(tmp_path, monkeypatch, dtype, checkpointing):
    torch.manual_seed(0)
    build(tmp_path)
    config = AutoConfig.for_model(
        "llama",
        hidden_size=576,
        num_hidden_layers=4,
        num_attention_heads=9,
        num_key_value_heads=3,
        intermediate_size=1536,
        vocab_size=4096,
        tie_word_embeddings=True,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    opened = load_base(str(tmp_path), Loading(dtype=dtype))
    roles = SharedBase(opened)
    for name in ("policy", "reference"):
        roles.add(name, adapter=lora(opened), trained=name == "policy")
    if checkpointing:
        roles.enable_gradient_checkpointing()
    sequences = collate([[5] * 96, [6] * 93], [[7] * 32, [8] * 32], 0, torch.device("cpu"))
    found, held = shape.read(str(tmp_path), ""), Numbers(specs.WIDTH[dtype])

    def update():
        with roles.acting_as("policy") as (model, _):
            forward.response_logprobs(model, sequences, 1.0).sum().backward()

    update()  # the gradients stand from here on, as in a second micro-batch
    at_the_head = memory.kept(found, held, 4, 2, 128, checkpointing, 32)
    behind = memory.backward(found, held, 4, 2, 128, checkpointing, 32)
    wanted = at_the_head + max(behind, memory.logits_trained(found, held, 64, entropy=False))
    plain = allocated(update)
    assert wanted == pytest.approx(plain, rel=0.1)
    wanted = memory.logits_rescored(found, held, 64) + 2 * 64 * 576 * held.e
    wanted = max(wanted, memory.passing(found, held, 2, 128, wanted=32))
    assert wanted == pytest.approx(allocated(lambda: forward.policy_and_reference(roles, sequences, 1.0)), rel=0.1)
    if dtype == "float32" and not checkpointing:
        before = memory.kept(found, held, 4, 2, 128, checkpointing, 32)
        monkeypatch.setattr(grouped, "holds_all_scores", lambda query, key: query.shape[1] != key.shape[1])
        more = memory.kept(found, replace(held, on_gpu=True), 4, 2, 128, checkpointing, 32) - before
        assert more == 4 * 4 * 2 * 128 * 2 * (576 - 192)  # a copy of each key and value for three query heads
        assert allocated(update) - plain == pytest.approx(more, rel=0.1)


def test_more_rows_and_less_thrift_never_need_less():
    config = spec(held=Numbers(2), micro=4, prompt=256, response=768)
    now = phases.peak(config).total
    for change in ({"micro": 8}, {"response": 900}, {"held": Numbers(4)}, {"num_reward_runs": 2}, {"rank": 64}):
        assert phases.peak(config.with_(**change)).total > now, change
    for change in ({"checkpointing": True}, {"micro": 2}):
        assert phases.peak(config.with_(**change)).total < now, change
    thrifty = config.with_(checkpointing=True)  # without it blocks that are not fused keep more than nf4 saves
    assert phases.peak(thrifty.with_(held=Numbers(2, "nf4"))).total < phases.peak(thrifty).total
    assert phases.peak(config.with_(held=Numbers(2, "nf4"))).total > now
    assert phases.least(config) < min(phase.total for phase in phases.phases(config))


def test_four_roles_on_8b_stand_in_what_the_arithmetic_by_hand_says():
    config = spec(held=Numbers(2), rank=16, num_reward_runs=1)
    lora_numbers = 16 * 32 * (2 * (4096 + 4096) + 2 * (4096 + 1024) + 3 * (4096 + 14336))
    assert lora_numbers == 41_943_040
    heads = 2 * 4 * 4097
    moments = 2 * (4 * 2 * lora_numbers + 4 * 4097)
    assert phases.least(config) == 2 * 8_030_261_248 + 4 * 4 * lora_numbers + heads + moments


def test_advice_fits_takes_the_cheapest_first_and_admits_defeat():
    config = spec(held=Numbers(2), micro=32, batch=64, minibatch=32, prompt=256, response=768, concurrency=64)
    assert phases.peak(config).total > 80 << 30
    changes = advice.together(config, 24 << 30)
    assert phases.peak(changes[-1].spec).total <= 24 << 30
    assert (
        changes[-1].spec.held.quantize is None
        or phases.peak(changes[-1].spec.with_(held=Numbers(2), micro=1, concurrency=1)).total > 24 << 30
    )
    assert "runtime.gradient_checkpointing=true" in [change.text for change in changes]
    assert advice.together(config, 2 << 30) is None and advice.together(config, 1 << 40) == []


def test_time_follows_the_arithmetic_of_training_and_the_reading_of_sampling():
    config = spec("sft", held=Numbers(2), batch=8, length=1000)
    [work] = clock.step(config, Speed(1e14, 1e12))
    weights = 8_030_261_248 - 128256 * 4096 - 65 * 4096
    by_hand = 8000 * 4 * (weights + 41_943_040 + 32 * 4096 * 1000) / 1e14
    assert work.seconds == pytest.approx(by_hand, rel=1e-6) and work.tokens == 8000
    config = spec("ppo", held=Numbers(2), batch=4, concurrency=2, prompt=1, response=100)
    rollout = clock.step(config, Speed(1e18, 1e12))[0]
    assert rollout.seconds == pytest.approx(2 * 100 * 2 * 8_030_261_248 / 1e12, rel=0.01)
    slower = clock.step(config, Speed(1e18, 1e12, thin=1e9, launch=0.01))[0]
    by_hand = 2 * 2 * (weights + 41_943_040 + 32 * 4096 * 101) / 1e9 + 32 * 50 * 0.01
    assert slower.seconds == pytest.approx(2 * 100 * by_hand, rel=1e-3)
    both, one = (
        next(work for work in clock.step(each, Speed(1e12, 1e12)) if work.name == "rescoring").seconds
        for each in (config, config.with_(reads_reference=False))
    )
    assert one == pytest.approx(both / 2, rel=1e-12)


def test_a_head_in_half_precision_is_timed_at_float32_speed_where_a_cpu_casts_it():
    config = spec("ppo", held=Numbers(2), batch=4, micro=4, concurrency=2, prompt=1, response=100)
    plain, wide = (
        {work.name: work.seconds for work in clock.step(config, Speed(1e9, 1e18, wide=each))} for each in (None, 1e8)
    )
    head = 2 * 400 * 128256 * 4096
    for name, reads in {"rollout": 1, "rescoring": 2, "policy update": 2, "values and scores": 0}.items():
        assert wide[name] - plain[name] == pytest.approx(reads * head * (1e-8 - 1e-9), rel=1e-6, abs=1e-3), name
    one_chunk = config.with_(micro=2)  # of 261 tokens: the backward pass needs no logits again
    found = next(work for work in clock.step(one_chunk, Speed(1e9, 1e18)) if work.name == "policy update")
    assert plain["policy update"] - found.seconds == pytest.approx(head / 1e9, rel=1e-6)
    alone = memory.logits_measured(config.shape, Numbers(2), 1)
    assert alone == 4 * (128256 + (1 << 19) + 4096) and memory.logits_measured(config.shape, Numbers(), 1) == 8 * 128256


def test_a_small_model_is_sampled_with_sums_and_a_quantised_one_by_its_own_blocks():
    large = spec("ppo", QWEN, held=Numbers(2))
    few_blocks, few_tokens = (large.with_(shape=replace(large.shape, **changes)) for changes in ({"L": 2}, {"V": 1000}))
    small = large.with_(shape=replace(large.shape, L=2, V=1000))
    assert not any(clock.sums(each) for each in (large, few_blocks, few_tokens)) and clock.sums(small)
    quantised = small.with_(held=Numbers(2, "nf4"))
    wanted = [clock.LAUNCHES_FUSED, clock.LAUNCHES_SUMMED, clock.LAUNCHES]
    assert [clock.launches(each) for each in (large, small, quantised)] == wanted
    on_gpu = [each.with_(device="cuda") for each in (large, small, quantised)]
    assert [clock.launches(each) for each in on_gpu] == [0, 0, clock.LAUNCHES], "a CUDA graph replays known blocks"


def run(*args, cwd=ROOT):
    return subprocess.run([sys.executable, "-m", "rlhf", "plan", *args], capture_output=True, text=True, cwd=cwd)


def test_the_command_plans_a_chain_that_has_not_run_and_says_what_would_fit():
    shown = run("-c", "configs/ppo.yaml", "--gpu", "60MB", "--flops", "20G", "--bandwidth", "5G")
    assert shown.returncode == 0, shown.stderr
    assert "named by configs/sft.yaml" in shown.stdout and "It does not fit into the 60.0 MiB" in shown.stdout
    assert "Enough: " in shown.stdout and "28 steps of " in shown.stdout and "Shorter rows take less." in shown.stdout
    assert "at least" not in shown.stdout, "rows are shorter than the config allows"
    (found,) = json.loads(run("configs/ppo.yaml", "--gpu", "60MB", "--json").stdout)
    assert found["together"]["peak"] <= 60 << 20 < found["peak"] == max(row["total"] for row in found["phases"])
    assert found["parameters"] == shape.read("demo:base", "").parameters and found["work"] is None
    assert all(row["total"] == sum(row.get(part, 0) for part in phases.PARTS) for row in found["phases"])


def test_a_plan_imports_no_torch(capsys):
    code = (
        "import sys; from pathlib import Path; from rlhf.commands import plan\n"
        "plan.lines(plan.plan(Path('configs/train-rm.yaml'), 'train-rm', [], plan.Device()))\n"
        "print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.strip() == "False", done.stderr


def test_what_a_plan_cannot_know_is_refused_by_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sft.yaml").write_text("model: {path: org/name}\ndata: {path: 'demo:demonstrations'}\nepochs: 1\n")
    (tmp_path / "ppo.yaml").write_text("policy: runs/none\nprompts: {path: 'demo:prompts'}\n")

    def refused(stage, *settings, **options):
        with pytest.raises(RlhfError) as caught:
            chosen = [options.get(key) for key in ("gpu", "flops", "bandwidth")]
            plan.plan(tmp_path / f"{stage}.yaml", stage, list(settings), plan.Device(*chosen))
        return str(caught.value)

    assert "MOD001" in refused("sft") and "is not a directory here, and a plan reads no hub" in refused("sft")
    assert "CKP001" in refused("ppo") and "no config in" in refused("ppo")
    assert "CFG040" in refused("sft", "model.path=demo:base", gpu="much")
    assert "CFG040] --bandwidth: is missing" in refused("sft", "model.path=demo:base", flops="1T")
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd" / "config.json").write_text('{"model_type": "mamba"}')
    assert "MOD050] model.path: odd: model_type mamba" in refused("sft", "model.path=odd")
    (tmp_path / "odd" / "config.json").write_text('{"model_type": "llama"}')
    assert "MOD006" in refused("sft", "model.path=odd")


def test_sizes_are_read_in_powers_of_1024_and_speeds_in_powers_of_1000():
    assert plan.number("24GB", "", plan.BINARY) == 24 << 30 == plan.number("24 GiB", "", plan.BINARY)
    assert plan.number("150T", "", plan.UNITS) == 150e12 and plan.number("9e11", "", plan.UNITS) == 9e11


def test_the_figure_of_a_start_names_the_peak_and_the_plan_where_it_is_short():
    assert "available; " not in resources.memory_figure(10, 20, 30)
    assert resources.memory_figure(10, 40, 30).endswith("rlhf plan says which settings would fit")


def test_the_second_step_says_how_long_all_take_and_the_first_is_no_measure(caplog):
    first = first_step.FirstStep(spec("sft", QWEN, batch=8, length=100))
    with caplog.at_level("INFO", "rlhf"):
        for seconds in (9.0, 2.5, 4.0):
            first.say(seconds, 40)
    assert [record.getMessage() for record in caplog.records] == ["A step takes 2.5 s; all 40 steps: about 100 s."]


def test_memory_on_a_gpu_stands_next_to_the_plan_of_the_phases_that_were_run(monkeypatch, caplog):
    monkeypatch.setattr(first_step.runtime, "peak_memory", lambda: {"memory/peak_cuda_mb": 512.0})
    for stage, which in (("sft", "training"), ("ppo", None)):
        planned = spec(stage, QWEN, batch=8, length=100, concurrency=4000)
        seen = [phase.total for phase in phases.phases(planned) if which in (phase.name, None)]
        caplog.clear()
        with caplog.at_level("INFO", "rlhf"):
            first_step.FirstStep(planned).say(1.0, 40)
            first_step.FirstStep(None).say(1.0, 40)
        with_plan, alone = (record.getMessage() for record in caplog.records)
        assert alone == "Memory on the GPU, at its peak so far: 512 MB."
        assert with_plan.endswith(f"with rows as long as the config allows: {max(seen) / 2**20:.0f} MB.")
    assert phases.peak(spec("sft", QWEN, batch=8, length=100, concurrency=4000)).name != "training"


@pytest.mark.parametrize("sums", [True, False])
def test_the_speed_of_the_machine_is_measured_without_a_random_number_of_the_run(sums):
    before = torch.get_rng_state()
    found = speed.measured(32, 64, 4, sums, tokens=8, read_bytes=1 << 16, seconds=1e-3)
    assert min(found.flops, found.bandwidth, found.thin, found.launch) > 0
    assert torch.equal(torch.get_rng_state(), before)


def test_the_fit_of_the_critic_takes_what_is_predicted(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "scripts"))
    peak_of = importlib.import_module("measuring").Peak
    for hidden, count in ((64, 3000), (1024, 200)):
        wide = replace(shape.of_config(QWEN, ""), d=hidden)
        critic = solved_critic.LeastSquares(hidden, torch.device("cpu"))
        states = [(list(range(count // 10)), torch.randn(count, hidden))]
        returns = torch.randn(count // 10, 10)
        batch = SimpleNamespace(states=states, returns=returns, mask=torch.ones_like(returns, dtype=torch.bool))
        critic.learn(batch, 0, 0)
        with peak_of() as peak:
            critic.learn(batch, 0, 1)
        assert memory.critic_fit(wide, count, "cpu") == pytest.approx(peak.high, rel=0.1)
        assert memory.critic(wide) == sum(tensor.nbytes for tensor in critic._tensors().values())
