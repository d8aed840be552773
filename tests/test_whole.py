"""Roles whose every weight is trained, adapters to start from, and the variants of LoRA: the same rules hold."""

from __future__ import annotations

import copy
import json
import shutil
import subprocess
import sys

import pytest
import torch
import yaml
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from tiny import ARCHITECTURES, base, build, lora, shake

from rlhf.config.sections import LoraSection, ModelSection, RoleLoraSection
from rlhf.config.stages import SftConfig
from rlhf.data.batches import collate
from rlhf.models import adapters, forward, full_weights, merged, open_base
from rlhf.models.base import load_base, weights_checksum
from rlhf.models.heads import ScalarHead
from rlhf.models.roles import SeparateModels, SharedBase
from rlhf.runs import artifacts, storage
from rlhf.runs.artifacts import Manifest
from rlhf.training.optimizer import Optimizer

CPU = torch.device("cpu")
SEQUENCES = collate([[70, 71, 72, 73], [80, 81]], [[90, 91, 2], [95, 2]], 0, CPU)


def logprobs(roles, name):
    with torch.no_grad(), roles.acting_as(name) as (model, _):
        return forward.response_logprobs(model, SEQUENCES, 0.7)


def train(roles, name, steps=3, learning_rate=1e-2):
    optimizer = Optimizer(roles.trained_parameters(name), learning_rate, steps)
    for _ in range(steps):
        with roles.acting_as(name) as (model, head):
            loss = -forward.response_logprobs(model, SEQUENCES, 1.0).sum()
            if head is not None:
                loss = loss + forward.end_scores(model, head, SEQUENCES).square().sum()
            loss.backward()
        optimizer.step("test")
    return optimizer


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("tie", [True, False])
def test_a_role_that_trains_every_weight_moves_alone_and_comes_back_from_disk_and_checkpoint(
    tmp_path, architecture, tie
):
    frozen = SharedBase(base(tmp_path / "m", architecture, tie=tie))
    frozen.add("reference")
    roles = SeparateModels(CPU)
    roles.adopt(frozen)
    roles.add("policy", load_base(str(tmp_path / "m")), trained=True)
    roles.add("value", load_base(str(tmp_path / "m")), head=ScalarHead(32), trained=True)
    assert torch.equal(logprobs(roles, "policy"), logprobs(roles, "reference"))
    before, value_before = weights_checksum(frozen.base.model), weights_checksum(roles.host("value").base.model)
    state = copy.deepcopy(roles.state("policy").state_dict())
    moved = weights_checksum(roles.host("policy").base.model)
    train(roles, "policy")
    assert weights_checksum(roles.host("policy").base.model) != moved
    assert weights_checksum(frozen.base.model) == before
    assert weights_checksum(roles.host("value").base.model) == value_before
    assert not any(parameter.requires_grad for parameter in frozen.base.model.parameters())
    after = logprobs(roles, "policy")
    assert (after - logprobs(roles, "reference")).abs().max() > 0.01

    roles.save("policy", tmp_path / "run")
    again = SharedBase(load_base(str(tmp_path / "run/model")))
    again.add("policy")
    torch.testing.assert_close(logprobs(again, "policy"), after, rtol=0, atol=0)
    roles.state("policy").load_state_dict(state)
    assert torch.equal(logprobs(roles, "policy"), logprobs(roles, "reference"))


def test_the_value_role_trains_whole_with_its_head(tmp_path):
    roles = SeparateModels(CPU)
    roles.add("value", base(tmp_path / "m"), head=ScalarHead(32), trained=True)
    parameters = {id(parameter) for parameter in roles.trained_parameters("value")}
    assert {id(parameter) for parameter in roles.head("value").parameters()} <= parameters
    assert len(parameters) == len(list(roles.host("value").base.model.parameters())) + 2
    weight = roles.head("value").linear.weight.clone()
    train(roles, "value")
    assert not torch.equal(weight, roles.head("value").linear.weight)


def test_a_model_whose_every_weight_is_trained_has_no_second_role(tmp_path):
    roles = SharedBase(base(tmp_path / "m"))
    roles.add("policy", trained=True)
    with pytest.raises(AssertionError, match="has one role"):
        roles.add("reference")


def test_weights_hold_tied_tensors_once_and_all_of_them(tmp_path):
    model = base(tmp_path / "m", "qwen2", tie=True).model
    held = full_weights.weights(model)
    assert "lm_head.weight" not in held and "model.embed_tokens.weight" in held
    other = base(tmp_path / "n", "qwen2", tie=True).model
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(1.0)
    full_weights.load(other, held)
    assert weights_checksum(other) == weights_checksum(model)
    assert other.lm_head.weight is other.model.embed_tokens.weight
    with pytest.raises(AssertionError):
        full_weights.load(other, {name: tensor for name, tensor in held.items() if "layers.0" not in name})


def adapter_run(home, architecture="llama", **settings):
    """A finished policy run of a shaken adapter, and its logprobs."""
    opened = base(home / "m", architecture)
    roles = SharedBase(opened)
    roles.add("policy", adapter=lora(opened, **settings))
    shake(roles, "policy", size=0.2)
    roles.save("policy", home / "run")
    identity = open_base.identity_of(opened, ModelSection(path=str(home / "m")))
    return artifacts.write(home / "run", Manifest("policy", "sft", 0, {}, {}, 1.0, base=identity)), roles


@pytest.mark.parametrize("settings", [{}, {"use_dora": True, "train_tokens": ["<|im_end|>"]}, {"use_rslora": True}])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_whole_copy_of_a_run_is_the_same_function(tmp_path, architecture, settings):
    manifest, roles = adapter_run(tmp_path, architecture, **settings)
    copy_of = merged.copy_of(tmp_path / "run", manifest, CPU)
    alone = SharedBase(copy_of)
    alone.add("policy", trained=True)
    torch.testing.assert_close(logprobs(alone, "policy"), logprobs(roles, "policy"), rtol=1e-4, atol=1e-4)
    assert copy_of.model.dtype == torch.float32 and copy_of.model.generation_config.eos_token_id is None


@pytest.mark.parametrize("settings", [{"use_dora": True}, {"use_rslora": True}, {"use_dora": True, "use_rslora": True}])
def test_dora_and_rslora_keep_every_rule_of_an_adapter(tmp_path, settings):
    _, roles = adapter_run(tmp_path, **settings)
    own = logprobs(roles, "policy")
    roles.add("reference", adapter=tmp_path / "run/adapter")
    roles.add("base")
    torch.testing.assert_close(logprobs(roles, "reference"), own, rtol=0, atol=0)
    assert torch.equal(logprobs(roles, "policy"), own)  # another adapter beside it, and switching, change nothing
    plain = SharedBase(load_base(str(tmp_path / "m")))
    plain.add("base")
    assert torch.equal(logprobs(roles, "base"), logprobs(plain, "base"))

    grown = SharedBase(load_base(str(tmp_path / "m")))
    grown.add("wider", adapter=tmp_path / "run/adapter", trained=True, rank=9)
    torch.testing.assert_close(logprobs(grown, "wider"), own, rtol=1e-4, atol=1e-5)
    names = {name for name, parameter in grown.peft("wider").named_parameters() if parameter.requires_grad}
    assert any("lora_magnitude_vector" in name for name in names) == settings.get("use_dora", False)
    state = copy.deepcopy(grown.state("wider").state_dict())
    train(grown, "wider")
    assert (logprobs(grown, "wider") - own).abs().max() > 0.01
    grown.state("wider").load_state_dict(state)
    torch.testing.assert_close(logprobs(grown, "wider"), own, rtol=1e-4, atol=1e-5)
    assert weights_checksum(grown.base.model) == weights_checksum(plain.base.model)


def test_gradients_of_dora_are_the_same_with_checkpointing(tmp_path):
    found = []
    for checkpointing in (False, True):
        adapter_run(tmp_path, use_dora=True)
        roles = SharedBase(load_base(str(tmp_path / "m")))
        roles.add("policy", adapter=tmp_path / "run/adapter", trained=True)
        if checkpointing:
            roles.enable_gradient_checkpointing()
        with roles.acting_as("policy") as (model, _):
            forward.response_logprobs(model, SEQUENCES, 1.0).sum().backward()
        found.append([parameter.grad.clone() for parameter in roles.trained_parameters("policy")])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_a_role_on_a_policy_without_adapter_gets_a_fresh_one(tmp_path):
    opened = base(tmp_path / "m")
    (tmp_path / "run/model").mkdir(parents=True)
    found = adapters.start_of(str(tmp_path / "run"), RoleLoraSection(r=3), opened)
    assert isinstance(found, LoraConfig) and (found.r, found.lora_alpha) == (3, 6.0)
    adapter_run(tmp_path / "other")
    assert adapters.start_of(str(tmp_path / "other/run"), RoleLoraSection(), opened) == tmp_path / "other/run/adapter"


@pytest.mark.parametrize(
    ("settings", "wanted"),
    [
        ({"lora": None, "adapter": "runs/sft"}, "has no place there"),
        ({"lora": None, "model": {"path": "m", "dtype": "bfloat16"}}, "needs model.dtype float32"),
        ({"lora": None, "model": {"path": "m", "quantize": "nf4"}}, "cannot be trained"),
        ({"lora": {"use_dora": True}, "model": {"path": "m", "quantize": "nf4"}}, "leave model.quantize out"),
        ({"lora": {"alpha": 3.0}, "adapter": "runs/sft"}, "leave lora.alpha out"),
    ],
)
def test_settings_that_would_be_ignored_are_refused(settings, wanted):
    with pytest.raises(ValueError, match=wanted):
        SftConfig.model_validate({"data": {"path": "x.jsonl"}, "epochs": 1, **settings})


def test_rank_stabilised_lora_scales_by_the_root_of_the_rank(tmp_path):
    opened = base(tmp_path / "m")
    settings = adapters.fresh_lora(LoraSection(r=4, alpha=8.0, use_rslora=True), opened.model, opened.tokenizer)
    roles = SharedBase(opened)
    roles.add("policy", adapter=settings)
    layers = [module for module in opened.model.modules() if isinstance(module, LoraLayer)]
    assert layers and all(layer.scaling["policy"] == 8.0 / 4**0.5 for layer in layers)


CONFIGS = {
    "sft": {
        "model": {"path": "m"},
        "data": {"path": "rows.jsonl"},
        "max_length": 64,
        "steps": 30,
        "lora": None,
        "holdout_fraction": 0.2,
        "min_end_token_rate": 0.0,
        "end_token_samples": 4,
        "save_every": 15,
        "batch": {"batch_size": 4, "micro_batch_size": 2},
        "sampling": {"max_new_tokens": 8},
        "optim": {"learning_rate": 5e-3, "weight_decay": 0.1},
    },
    "train-rm": {
        "policy": "runs/sft",
        "data": {"path": "pairs.jsonl"},
        "max_length": 64,
        "steps": 4,
        "lora": None,
        "holdout_fraction": 0.2,
        "standardise_samples": 8,
        "save_every": 2,
        "optim": {"learning_rate": 1e-3},
        "batch": {"batch_size": 4, "micro_batch_size": 2},
        "sampling": {"max_new_tokens": 32, "temperature": 1.3},
    },
    "ppo": {
        "policy": "runs/sft",
        "rewards": [{"run": "runs/train-rm"}],
        "lora": None,
        "prompts": {"path": "rows.jsonl", "max_tokens": 32},
        "steps": 4,
        "save_every": 2,
        "report_to": "none",
        "value": {"fit": "gradient", "pretrain_steps": 1},
        "batch": {"batch_size": 8, "minibatch_size": 4, "micro_batch_size": 4},
        "sampling": {"max_new_tokens": 8},
        "optim": {"learning_rate": 1e-3, "value_learning_rate": 1e-3},
        "evaluation": {"every": 2, "num_prompts": 4, "holdout_fraction": 0.3},
    },
}


@pytest.fixture(scope="module")
def whole_chain(tmp_path_factory):
    """SFT, reward model and PPO, every weight trained, on a tiny model."""
    home = tmp_path_factory.mktemp("whole")
    build(home / "m")
    rows = [{"prompt": f"hi {n}", "completion": f"ok {n % 3}" * (1 + n % 4)} for n in range(30)]
    pairs = [{"prompt": f"hi {n}", "chosen": f"ok {n}", "rejected": f"no {n}"} for n in range(30)]
    for name, found in (("rows", rows), ("pairs", pairs)):
        (home / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in found))
    for stage, config in CONFIGS.items():
        (home / f"{stage}.yaml").write_text(yaml.safe_dump({"run_dir": f"runs/{stage}", **config}))
        run_stage(home, stage)
    return home


def run_stage(home, stage, *args):
    command = [sys.executable, "-m", "rlhf", stage, "-c", f"{stage}.yaml", *args]
    done = subprocess.run(command, cwd=home, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stderr


def fingerprint(run):
    """Digest of each file of the result, and the metrics without times."""
    files = {path.name: storage.sha256(path) for path in (run / "model").iterdir()}
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    kept = [{key: row[key] for key in row if not key.startswith(("time/", "memory/"))} for row in lines]
    return files, kept


@pytest.mark.parametrize("stage", ["sft", "train-rm", "ppo"])
def test_a_run_that_trains_every_weight_goes_on_bit_for_bit(whole_chain, stage):
    finished = whole_chain / "runs" / stage
    manifest = artifacts.read(finished)
    assert manifest.base.source == f"runs/{stage}/model" and not (finished / "adapter").exists()
    assert (
        manifest.base.digest == artifacts.model_digest(finished / "model") != artifacts.model_digest(whole_chain / "m")
    )
    assert goes_on(whole_chain, stage, stage)


def goes_on(home, stage, run, *settings):
    """Whether a copy of a finished run that lost its end makes the same one."""
    finished, cut = home / "runs" / run, home / "runs" / f"{run}-cut"
    shutil.copytree(finished, cut)
    (cut / "manifest.json").unlink()
    shutil.rmtree(cut / f"checkpoints/step-{CONFIGS[stage]['steps']}")
    shutil.rmtree(cut / "model")
    assert "Resumed from" in run_stage(home, stage, f"run_dir=runs/{run}-cut", *settings, "--resume")
    return fingerprint(cut) == fingerprint(finished)


def test_without_a_value_role_the_policy_alone_is_a_model_of_its_own(whole_chain):
    run_stage(whole_chain, "ppo", "run_dir=runs/solved", "value.fit=least_squares")
    last = whole_chain / "runs/solved/checkpoints/last"
    assert sorted(path.name for path in (last / "value").iterdir()) == ["critic.safetensors"]
    assert (last / "policy/model").is_dir()
    assert (whole_chain / "runs/ppo/checkpoints/last/value/model").is_dir()
    assert goes_on(whole_chain, "ppo", "solved", "value.fit=least_squares")


def test_batches_of_like_length_go_on_in_the_same_order(whole_chain):
    run_stage(whole_chain, "sft", "run_dir=runs/grouped", "group_by_length=true")
    assert goes_on(whole_chain, "sft", "grouped", "group_by_length=true")
    assert fingerprint(whole_chain / "runs/grouped") != fingerprint(whole_chain / "runs/sft")


def test_adapters_train_on_a_model_that_was_trained_whole_and_its_export_is_itself(whole_chain):
    run_stage(whole_chain, "train-rm", "run_dir=runs/rm-lora", "lora={}")
    log = run_stage(
        whole_chain, "ppo", "run_dir=runs/ppo-lora", "lora={}", 'rewards=[{"run": "runs/rm-lora"}]', "steps=1"
    )
    assert "of its own" not in log
    assert json.loads((whole_chain / "runs/ppo-lora/adapter/adapter_config.json").read_text())["r"] == 16
    assert artifacts.read(whole_chain / "runs/ppo-lora").base == artifacts.read(whole_chain / "runs/sft").base
    command = [sys.executable, "-m", "rlhf", "export", "runs/ppo", "out", "--json"]
    done = subprocess.run(command, cwd=whole_chain, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)["max_difference"] == 0.0
    answers = []
    for source in ("runs/ppo", "out"):
        words = [*command[:3], "generate", source, "--temperature", "0", "--max-new-tokens", "8"]
        found = subprocess.run(
            words, cwd=whole_chain, capture_output=True, text=True, input='{"prompt": "hi 3"}', check=True
        )
        answers.append(json.loads(found.stdout)["response"])
    assert answers[0] == answers[1]
    given = json.dumps({"prompt": "hi 3", "completion": "ok"})
    scoring = [*command[:3], "score", "runs/train-rm"]
    found = subprocess.run(scoring, cwd=whole_chain, capture_output=True, text=True, input=given, check=True)
    assert isinstance(json.loads(found.stdout)["score"], float)
    command[-2:] = ["other", "--adapter-only"]
    done = subprocess.run(command, cwd=whole_chain, capture_output=True, text=True, check=False)
    assert done.returncode == 5 and "trained every weight: it has no adapter" in done.stderr


def test_sft_goes_on_from_an_adapter_that_a_run_or_another_tool_has_made(whole_chain):
    config = {**CONFIGS["sft"], "lora": {"r": 4, "alpha": 8.0}}
    (whole_chain / "first.yaml").write_text(yaml.safe_dump({"run_dir": "runs/first", **config}))
    (whole_chain / "second.yaml").write_text(
        yaml.safe_dump(
            {
                "run_dir": "runs/second",
                **config,
                "lora": {"r": 6},
                "optim": {"learning_rate": 1e-12},
                "require_improvement": False,
            }
        )
    )

    def sft(name, *args):
        command = [sys.executable, "-m", "rlhf", "sft", "-c", f"{name}.yaml", *args]
        return subprocess.run(command, cwd=whole_chain, capture_output=True, text=True, check=False)

    assert sft("first").returncode == 0
    shutil.copytree(whole_chain / "runs/first/adapter", whole_chain / "plain")
    for source, key in (("runs/first", "adapter.run"), ("plain", "adapter.files")):
        done = sft("second", f"adapter={source}", "run_dir=runs/from-" + source.replace("/", "-"))
        assert done.returncode == 0, done.stderr
        made = artifacts.read(whole_chain / ("runs/from-" + source.replace("/", "-")))
        assert key in made.identity
        first = artifacts.read(whole_chain / "runs/first")
        assert made.metrics["eval/loss"] == pytest.approx(first.metrics["eval/loss"], abs=1e-4)
        assert made.metrics["eval/start_loss"] == pytest.approx(first.metrics["eval/loss"], abs=1e-5)
        assert made.metrics["eval/base_loss"] == first.metrics["eval/base_loss"] > first.metrics["eval/loss"]
    build(whole_chain / "n", "qwen2")
    done = sft("second", "adapter=runs/first", "model.path=n", "run_dir=runs/x")
    assert done.returncode == 4 and "MOD021" in done.stderr and "adapter: made on another model" in done.stderr
    done = sft("second", "adapter=runs/sft", "run_dir=runs/x", "model.path=runs/sft/model")
    assert done.returncode == 5 and "model.path: runs/sft/model, which is a base like any other" in done.stderr
