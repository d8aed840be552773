"""What would go wrong in silence: half a download, rows that are not trained, dropout in eval, stale weights."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import ARCHITECTURES, base, build, lora, shake, tokenizer
from transformers import BertConfig, BertLMHeadModel, Llama4ForCausalLM, Llama4TextConfig, LlamaForCausalLM

from rlhf.data.batches import collate
from rlhf.data.chat_format import ChatFormat
from rlhf.errors import RlhfError
from rlhf.models import forward
from rlhf.models.base import load_base
from rlhf.models.heads import ScalarHead
from rlhf.models.roles import SharedBase
from rlhf.records import Message
from rlhf.rollouts.engine import Sampling
from rlhf.rollouts.hf import HfEngine

SEQUENCES = collate([[70, 71, 72, 73, 74], [80, 81]], [[90, 91, 2], [95, 2]], 0, torch.device("cpu"))
USER = (Message("user", "hi"),)


def logprobs(roles, name):
    with torch.no_grad(), roles.acting_as(name) as (model, _):
        return forward.response_logprobs(model, SEQUENCES, 1.0)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_model_that_lacks_a_weight_is_refused_not_filled_with_random_numbers(tmp_path, architecture):
    directory = build(tmp_path / "m", architecture)
    weights = load_file(directory / "model.safetensors")
    lost = next(name for name in weights if ".1." in name and "mlp" in name)
    del weights[lost]
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(RlhfError, match=f"MOD005.*{lost}"):
        load_base(str(directory))


def cut_short(directory):
    path = directory / "model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])


def another_shape(directory):
    config = json.loads((directory / "config.json").read_text("utf-8"))
    (directory / "config.json").write_text(json.dumps(config | {"intermediate_size": 64}), "utf-8")


@pytest.mark.parametrize(("damage", "code"), [(cut_short, "MOD006"), (another_shape, "MOD001")])
def test_damaged_models_are_a_message_and_no_traceback(tmp_path, damage, code):
    directory = build(tmp_path / "m")
    damage(directory)
    with pytest.raises(RlhfError, match=code):
        load_base(str(directory))


def test_a_model_that_scales_its_logits_behind_the_head_is_refused(tmp_path, monkeypatch):
    plain = LlamaForCausalLM.forward

    def scaled(self, *args, **kwargs):
        found = plain(self, *args, **kwargs)
        found.logits = found.logits * 0.5
        return found

    directory = str(build(tmp_path / "m"))
    load_base(directory)
    monkeypatch.setattr(LlamaForCausalLM, "forward", scaled)
    with pytest.raises(RlhfError, match="MOD004"):
        load_base(directory)


@pytest.mark.parametrize("tie", [True, False])
def test_a_trained_token_can_be_written_more_often_also_where_the_head_is_not_tied(tmp_path, tie):
    opened = base(tmp_path / "m", tie=tie, double=True)
    roles = SharedBase(opened)
    roles.add("plain", adapter=lora(opened))
    roles.add("policy", adapter=lora(opened, train_tokens=["<|im_end|>"]), trained=True)
    before = logprobs(roles, "plain")
    rows = [parameter for parameter in roles.trained_parameters("policy") if parameter.shape[0] == 1]
    assert len(rows) == (1 if tie else 2)
    with roles.acting_as("policy") as (model, _):
        (-forward.response_logprobs(model, SEQUENCES, 1.0)[0, 2]).backward()
    assert all(float(row.grad.abs().max()) > 0 for row in rows[-1:])
    for row in rows[-1:]:
        row.data -= 0.1 * row.grad
    assert logprobs(roles, "policy")[0, 2] > before[0, 2]
    assert torch.equal(logprobs(roles, "plain"), before)
    roles.save("policy", tmp_path / "run")
    roles.add("again", adapter=tmp_path / "run" / "adapter")
    assert torch.allclose(logprobs(roles, "again"), logprobs(roles, "policy"), atol=1e-6)


def test_lora_dropout_is_silent_outside_of_training(tmp_path):
    opened = base(tmp_path / "m", double=True)
    roles = SharedBase(opened)
    roles.add("policy", adapter=lora(opened, dropout=0.5), trained=True)
    shake(roles, "policy")
    assert torch.equal(logprobs(roles, "policy"), logprobs(roles, "policy"))


def test_an_inner_role_gives_the_outer_one_its_checkpointing_back(tmp_path):
    opened = base(tmp_path / "m")
    roles = SharedBase(opened)
    for name in ("policy", "reference"):
        roles.add(name, adapter=lora(opened), trained=name == "policy")
    roles.enable_gradient_checkpointing()
    with roles.acting_as("policy") as (model, _):
        with torch.no_grad(), roles.acting_as("reference"):
            assert not model.training
        assert model.training
    assert not opened.model.training


def test_a_step_inside_the_block_is_seen_by_the_next_pass(tmp_path):
    opened = base(tmp_path / "m", double=True)
    roles = SharedBase(opened)
    roles.add("policy", adapter=lora(opened), trained=True)
    shake(roles, "policy")
    optimizer = torch.optim.AdamW(roles.trained_parameters("policy"), lr=0.1)
    with roles.acting_as("policy") as (model, _):
        with torch.no_grad():
            before = forward.response_logprobs(model, SEQUENCES, 1.0)
        forward.response_logprobs(model, SEQUENCES, 1.0).sum().backward()
        optimizer.step()
        with torch.no_grad():
            after = forward.response_logprobs(model, SEQUENCES, 1.0)
    assert not torch.allclose(before, after)
    assert torch.equal(after, logprobs(roles, "policy"))


def test_a_role_does_not_train_a_layer_that_has_its_name(tmp_path):
    """Models call layers "mlp" or "value"; the role of that name must not take the policy's adapter of it along."""
    opened = base(tmp_path / "m")
    roles = SharedBase(opened)
    for name in ("policy", "mlp"):
        roles.add(name, adapter=lora(opened), head=ScalarHead(32), trained=True)
    policy, other = ({id(p) for p in roles.trained_parameters(name)} for name in ("policy", "mlp"))
    assert not policy & other and len(policy) == len(other)


def test_a_model_whose_head_is_more_than_one_layer_is_refused(tmp_path):
    size = len(tokenizer())
    config = BertConfig(
        vocab_size=size,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        max_position_embeddings=128,
        is_decoder=True,
    )
    BertLMHeadModel(config).save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    with pytest.raises(RlhfError, match="MOD004"):
        load_base(str(tmp_path))


def test_a_model_whose_backbone_stands_elsewhere_is_refused_by_name(tmp_path):
    own = tokenizer()
    config = Llama4TextConfig(
        vocab_size=len(own),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        intermediate_size=48,
        intermediate_size_mlp=48,
        num_local_experts=2,
        max_position_embeddings=128,
    )
    Llama4ForCausalLM(config).save_pretrained(tmp_path)
    own.save_pretrained(tmp_path)
    with pytest.raises(RlhfError, match=r"MOD009.*Llama4ForCausalLM \(llama4_text\).*another architecture"):
        load_base(str(tmp_path))


@pytest.mark.parametrize("end", ["\n", "\n<|im_end|>"])
def test_an_end_that_text_may_contain_is_refused(end):
    template = (
        "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}" + end + "{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    with pytest.raises(RlhfError, match="MOD014"):
        ChatFormat(tokenizer(template))


def test_an_end_token_that_is_not_marked_special_is_refused_in_the_text_all_the_same():
    template = "{% for m in messages %}{{ m['content'] }}<end>{% endfor %}"
    own = tokenizer(template)
    own.add_tokens(["<end>"])
    chat = ChatFormat(own)
    assert chat.end_token == "<end>"
    with pytest.raises(RlhfError, match="DAT060.*<end>"):
        chat.response_ids(USER, "a<end>b")


def test_a_prompt_without_tokens_is_a_bug():
    with pytest.raises(AssertionError, match="first token"):
        collate([[]], [[5, 2]], 0, torch.device("cpu"))


def test_padding_with_the_end_token_changes_no_sample_and_no_logprob(tmp_path):
    """Where a tokenizer has no pad, rows are padded with the end token: masks come from lengths, so nothing moves."""
    opened = base(tmp_path / "m", double=True)
    roles = SharedBase(opened)
    roles.add("policy", adapter=lora(opened))
    shake(roles, "policy", size=0.1)
    prompts, how, found = [[70, 71, 72, 73], [80, 81], [90]], Sampling(12, 1.0, seed=5), []
    for pad in (opened.chat.pad_id, opened.chat.end_id):
        opened.chat.pad_id = pad
        tokens = HfEngine(roles, "policy", opened.chat, 8).generate(prompts, how, range(3)).tokens
        with torch.no_grad(), roles.acting_as("policy") as (model, _):
            batch = collate(prompts, tokens, pad, opened.device)
            found.append((tokens, forward.response_logprobs(model, batch, 1.0)))
    assert found[0][0] == found[1][0] and torch.allclose(found[0][1], found[1][1], atol=1e-12)
