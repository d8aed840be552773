"""PPO's four roles on a base in 4 or 8 bits: the function, the gradients, the base untouched, and the chain to export.

Needs bitsandbytes (60 MB), which only the extra ``quantized`` installs; without it all but the refusals are skipped.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import base, build, lora, shake
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from rlhf.config.sections import ModelSection
from rlhf.data.batches import collate
from rlhf.errors import RlhfError
from rlhf.models import forward, open_base, quantised
from rlhf.models.base import Loading, load_base, weights_checksum
from rlhf.models.roles import SharedBase
from rlhf.preflight import origins, resources
from rlhf.runs import artifacts
from rlhf.runs.artifacts import BaseIdentity, Manifest
from rlhf.scoring import open_scorer

INSTALLED = importlib.util.find_spec("bitsandbytes") is not None
needs_library = pytest.mark.skipif(not INSTALLED, reason="bitsandbytes is not installed: pip install '.[quantized]'")
SEQUENCES = collate([[70, 71, 72, 73, 74], [80, 81]], [[90, 91, 2], [95, 2]], 0, torch.device("cpu"))
KINDS = ("nf4", "int8")
ROOT = Path(__file__).parents[1]


def build_wide(directory: Path, architecture: str = "llama") -> Path:
    """Wide enough (64) for bitsandbytes to repack 4-bit weights, which it does by blocks of 64."""
    build(directory, architecture)
    if architecture == "llama":
        torch.manual_seed(3)
        LlamaForCausalLM(
            LlamaConfig(
                vocab_size=260,
                hidden_size=64,
                num_hidden_layers=2,
                num_attention_heads=4,
                num_key_value_heads=2,
                intermediate_size=128,
                max_position_embeddings=512,
                initializer_range=0.2,
                tie_word_embeddings=True,
            )
        ).save_pretrained(directory)
    return directory


def with_roles(base):
    roles = SharedBase(base)
    for seed, name in enumerate(("policy", "reference", "value", "reward")):
        roles.add(name, adapter=lora(base, train_tokens=["<|im_end|>"]), trained=name in ("policy", "value"))
        shake(roles, name, seed)
    return roles


def gradients(roles, name="policy"):
    with roles.acting_as(name) as (model, _):
        forward.response_logprobs(model, SEQUENCES, 1.0).sum().backward()
    found = [parameter.grad.clone() for parameter in roles.trained_parameters(name)]
    for parameter in roles.trained_parameters(name):
        parameter.grad = None
    return found


def plain_twin(base, directory):
    """An unquantised base whose weights are the numbers that the quantised one stands for."""
    functional = importlib.import_module("bitsandbytes.functional")
    whole = load_base(str(directory))
    transposed = any(type(module).__name__ == "Conv1D" for module in whole.model.modules())
    for name, layer in quantised._layers(base.model):
        state = getattr(layer.weight, "quant_state", None)
        if state is not None:
            weight = functional.dequantize_4bit(layer.weight.data, state)
        else:
            scales = layer.weight.SCB if layer.weight.SCB is not None else layer.state.SCB
            weight = layer.weight.data.float() * scales[:, None] / 127.0
        whole.model.get_submodule(name).weight.data = (weight.T if transposed else weight).contiguous().float()
    return whole


@needs_library
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
@pytest.mark.parametrize("kind", KINDS)
def test_roles_on_a_quantised_base_are_those_on_the_numbers_it_stands_for(tmp_path, architecture, kind):
    base = load_base(str(build_wide(tmp_path / "m", architecture)), Loading(quantize=kind))
    whole = plain_twin(base, tmp_path / "m")
    found, wanted = with_roles(base), with_roles(whole)
    ours, theirs = (forward.policy_and_reference(roles, SEQUENCES, 0.7) for roles in (found, wanted))
    for name in vars(ours):
        assert torch.allclose(getattr(ours, name), getattr(theirs, name), rtol=1e-3, atol=1e-3), name
    for role in ("policy", "value"):
        for ours, theirs in zip(gradients(found, role), gradients(wanted, role), strict=True):
            assert torch.allclose(ours, theirs, rtol=1e-2, atol=1e-3 * float(theirs.abs().max() + 1)), role


@needs_library
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", KINDS)
def test_sampling_and_checkpointing_between_roles_change_no_gradient_and_no_weight(tmp_path, kind, dtype):
    base = load_base(str(build_wide(tmp_path / "m")), Loading(quantize=kind, dtype=dtype))
    roles = with_roles(base)
    assert {p.dtype for name in ("policy", "value") for p in roles.trained_parameters(name)} == {torch.float32}
    checksum, first = weights_checksum(base.model), gradients(roles)
    before = forward.policy_and_reference(roles, SEQUENCES, 1.0)
    with torch.no_grad(), roles.acting_as("policy") as (model, _):
        model.generate(input_ids=SEQUENCES.ids, max_new_tokens=4, do_sample=False)
    again = gradients(roles)
    roles.enable_gradient_checkpointing()
    recomputed = gradients(roles)
    gradients(roles, "value")
    after = forward.policy_and_reference(roles, SEQUENCES, 1.0)
    for a, b, c in zip(first, again, recomputed, strict=True):
        assert torch.equal(a, b) and torch.equal(a, c)
    assert sum(float(a.abs().sum()) for a in first) > 1.0
    assert torch.equal(before.logprobs, after.logprobs) and weights_checksum(base.model) == checksum


@needs_library
@pytest.mark.parametrize("kind", KINDS)
def test_the_checksum_sees_a_changed_code_and_a_changed_scale(tmp_path, kind):
    base = load_base(str(build_wide(tmp_path / "m")), Loading(quantize=kind))
    checksum = weights_checksum(base.model)
    layer = base.model.model.layers[1].mlp.up_proj
    layer.weight.data[0] += 1
    assert weights_checksum(base.model) != checksum
    layer.weight.data[0] -= 1
    assert weights_checksum(base.model) == checksum
    scales = layer.weight.quant_state.absmax if kind == "nf4" else layer.state.SCB
    scales[0] += 1
    assert weights_checksum(base.model) != checksum


@needs_library
@pytest.mark.parametrize("kind", KINDS)
def test_lora_beside_a_quantised_layer_has_the_values_and_gradients_of_pefts_form(tmp_path, kind):
    roles = with_roles(load_base(str(build_wide(tmp_path / "m")), Loading(quantize=kind)))
    adapted = [layer for layer in roles._layers if hasattr(layer, "lora_A")]
    found = []
    for own in (True, False):
        if not own:
            for layer in adapted:
                del layer.forward
        with roles.acting_as("policy") as (model, _):
            logprobs = forward.response_logprobs(model, SEQUENCES, 1.0)
            logprobs.sum().backward()
        parameters = roles.trained_parameters("policy")
        found.append([logprobs.detach(), *(parameter.grad.clone() for parameter in parameters)])
        for parameter in parameters:
            parameter.grad = None
    assert adapted and any(gradient.abs().max() > 1e-3 for gradient in found[0][1:])
    for mine, theirs in zip(*found, strict=True):
        assert torch.allclose(mine, theirs, atol=2e-3 * float(theirs.abs().max()) + 1e-6)


@needs_library
@pytest.mark.parametrize("kind", KINDS)
def test_a_broken_weight_is_named_though_quantising_would_hide_it(tmp_path, kind):
    weights = build_wide(tmp_path / "m") / "model.safetensors"
    tensors = load_file(weights)
    tensors["model.layers.0.mlp.up_proj.weight"][3, 3] = float("nan")
    save_file(tensors, weights, metadata={"format": "pt"})
    with pytest.raises(RlhfError, match="MOD008.*1 in model.layers.0.mlp.up_proj.weight"):
        load_base(str(tmp_path / "m"), Loading(quantize=kind))


def test_without_the_library_one_error_names_it_before_any_compute(tmp_path, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "bitsandbytes" else find(name))
    with pytest.raises(RlhfError, match=r"RES005.*nf4 needs bitsandbytes.*rlhf-pipeline\[quantized\]") as caught:
        load_base(str(build(tmp_path / "m")), Loading(quantize="nf4"))
    assert caught.value.exit_code == 6
    section = ModelSection(path=str(tmp_path / "m"), quantize="int8")
    assert [problem.code for problem in origins.libraries(section, {})] == ["RES005"]
    assert resources.library_problem(None, "x") is None


def test_a_reward_run_on_the_base_in_other_bits_is_none_of_the_policys_roles(tmp_path):
    opened = base(tmp_path / "m")

    def made_on(quantize):
        made = BaseIdentity("m", opened.digest, "float32", quantize=quantize)
        return Manifest("reward", "train-rm", 0, {}, {}, 1.0, base=made)

    assert open_scorer.is_on(made_on(None), opened) and not open_scorer.is_on(made_on("nf4"), opened)
    held = replace(opened, quantize="nf4")
    assert open_scorer.is_on(made_on("nf4"), held) and not open_scorer.is_on(made_on("int8"), held)


def rlhf(*args, cwd):
    command = [sys.executable, "-m", "rlhf", *map(str, args)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=cwd, check=False, env=dict(os.environ))
    assert done.returncode == 0, done.stderr
    return done


@needs_library
@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_the_chain_runs_on_a_quantised_base_and_is_exported_on_the_whole_one(tmp_path, monkeypatch, kind):
    monkeypatch.chdir(tmp_path)
    model = build_wide(tmp_path / "m")
    digest = artifacts.model_digest(model)
    common = "runtime: {gradient_checkpointing: true}\nbatch: {batch_size: 8, micro_batch_size: 4%s}\nreport_to: none\n"
    sampling = "sampling: {max_new_tokens: 6}\n"
    configs = {
        "sft": f"model: {{path: m, dtype: bfloat16, quantize: {kind}}}\ndata: {{path: 'demo:demonstrations?size=48'}}\n"
        + common % ""
        + sampling
        + "steps: 3\nmin_end_token_rate: 0.0\nend_token_samples: 8\nmax_length: 400\n"
        "lora: {r: 4, train_tokens: ['<|im_end|>']}\n",
        "train-rm": "data: {path: 'demo:preferences?size=120'}\nmax_length: 400\n"
        + common % ""
        + "sampling: {max_new_tokens: 24}\nsteps: 2\nstandardise_samples: 96\n",
        "ppo": "prompts: {path: 'demo:prompts?size=24'}\n"
        + common % ", minibatch_size: 4"
        + sampling
        + "steps: 2\nvalue: {pretrain_steps: 1}\nevaluation: {every: 2, num_prompts: 4}\nsave_every: 1\n",
    }
    for stage, text in configs.items():
        (tmp_path / f"{stage}.yaml").write_text(text)
        shown = rlhf(stage, "-c", f"{stage}.yaml", cwd=tmp_path)
        written = json.loads((tmp_path / f"runs/{stage}/manifest.json").read_text())
        assert written["base"]["quantize"] == kind, shown.stderr
    for tensor in load_file(tmp_path / "runs/sft/adapter/adapter_model.safetensors").values():
        assert tensor.dtype == torch.float32 and not torch.equal(tensor, tensor.bfloat16().float())
    rows = [json.loads(line) for line in (tmp_path / "runs/ppo/metrics.jsonl").read_text().splitlines()]
    first = next(row for row in rows if row["step"] == 1)
    assert abs(first["rollout/kl_nats"]) < 1e-6 and first["update/policy_grad_norm"] > 0
    outcome = json.loads(rlhf("export", "runs/ppo", "out", "--json", cwd=tmp_path).stdout)
    assert outcome["quantisation_difference"] > 2 * outcome["max_difference"]
    assert (
        f"trained on the base in {kind}, and merged into the unquantised base"
        in (tmp_path / "out/README.md").read_text()
    )
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.bfloat16).eval()
    assert not getattr(exported, "is_quantized", False) and artifacts.model_digest(model) == digest
    whole = open_base.reopen_base(artifacts.read(tmp_path / "runs/ppo"), torch.device("cpu"), whole=True)
    roles = SharedBase(whole)
    roles.add("policy", adapter=tmp_path / "runs/ppo/adapter")
    with torch.no_grad(), roles.acting_as("policy") as (beside, _):
        wanted = beside(input_ids=SEQUENCES.ids[:1]).logits
        assert torch.allclose(exported(input_ids=SEQUENCES.ids[:1]).logits, wanted, rtol=0.05, atol=0.2)
