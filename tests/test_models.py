"""Base, adapters, heads and roles: every measured trap of role switching, on real architectures."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from peft import get_peft_model
from tiny import ARCHITECTURES, base, both_ways, build, exact, lora, shake
from torch.overrides import TorchFunctionMode
from transformers import masking_utils
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from rlhf.config.sections import LoraSection
from rlhf.data.batches import collate
from rlhf.errors import RlhfError
from rlhf.models import adapters, forward, grouped, merged, packing
from rlhf.models.base import load_base, weights_checksum
from rlhf.models.fused import decoding
from rlhf.models.fused import lora as fused_lora
from rlhf.models.heads import ScalarHead
from rlhf.models.roles import SeparateModels, SharedBase

CPU = torch.device("cpu")
PROMPTS = [[70, 71, 72, 73, 74], [80, 81]]
RESPONSES = [[90, 91, 2], [95, 2]]


def two_roles(tmp_path, architecture="llama", double=True, **settings):
    opened = base(tmp_path / "m", architecture, double)
    roles = SharedBase(opened)
    for seed, name in enumerate(("policy", "reference")):
        roles.add(name, adapter=lora(opened, **settings), trained=name == "policy")
        shake(roles, name, seed)
    return opened, roles


def bias_and_norms(model, seed=5):
    """Of random models these are 0 and 1, which would hide that they were left out."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if name.endswith("bias") or "norm" in name:
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.data.add_((0.3 * noise).to(parameter))


def naive_logprobs(model, prompts, responses, temperature):
    """One sequence at a time, whole logits, float64."""
    rows = []
    for prompt, response in zip(prompts, responses, strict=True):
        ids = torch.tensor([prompt + response])
        logits = model(input_ids=ids).logits[0].double() / temperature
        logp = logits.log_softmax(-1)
        rows.append([logp[len(prompt) - 1 + t, token] for t, token in enumerate(response)])
    return rows


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("size", [1, 3, 1000])
def test_logprobs_equal_whole_logits_one_row_at_a_time(tmp_path, monkeypatch, architecture, size):
    monkeypatch.setattr(forward, "chunk_size", lambda model: size)
    _, roles = two_roles(tmp_path, architecture)
    with roles.acting_as("policy") as (model, _):
        found = forward.response_logprobs(model, collate(PROMPTS, RESPONSES, 0, CPU), 0.7)
        wanted = naive_logprobs(model, PROMPTS, RESPONSES, 0.7)
    for row, want in zip(found, wanted, strict=True):
        assert torch.allclose(row[: len(want)], torch.stack(want), atol=1e-10)
        assert (row[len(want) :] == 0).all()


def test_logprobs_do_not_depend_on_padding_or_company(tmp_path):
    _, roles = two_roles(tmp_path)
    with torch.no_grad(), roles.acting_as("policy") as (model, _):
        together = forward.response_logprobs(model, collate(PROMPTS, RESPONSES, 0, CPU), 1.0)
        for pad in (0, 2, 77):
            alone = forward.response_logprobs(model, collate(PROMPTS[1:], RESPONSES[1:], pad, CPU), 1.0)
            wide = forward.response_logprobs(
                model, collate([PROMPTS[1], [5] * 60], [RESPONSES[1], [6] * 9], pad, CPU), 1.0
            )
            assert torch.allclose(alone[0, :2], together[1, :2], atol=1e-12)
            assert torch.allclose(wide[0, :2], together[1, :2], atol=1e-12)


def test_exact_kl_and_entropy_come_from_the_full_distributions(tmp_path):
    _, roles = two_roles(tmp_path)
    both = forward.policy_and_reference(roles, collate(PROMPTS, RESPONSES, 0, CPU), 0.7)
    logits = {}
    for role in ("policy", "reference"):
        with torch.no_grad(), roles.acting_as(role) as (model, _):
            logits[role] = model(input_ids=torch.tensor([PROMPTS[1] + RESPONSES[1]])).logits[0, 1:3] / 0.7
    p, q = logits["policy"].softmax(-1), logits["reference"].softmax(-1)
    assert torch.allclose(both.exact_kl[1, :2], (p * (p.log() - q.log())).sum(-1), atol=1e-10)
    assert torch.allclose(both.entropy[1, :2], -(p * p.log()).sum(-1), atol=1e-10)
    assert (both.exact_kl[1, 2:] == 0).all() and (both.exact_kl[both.exact_kl != 0] > 0).all()


def gradients(roles, name="policy", checkpointing=False):
    if checkpointing:
        roles.enable_gradient_checkpointing()
    with roles.acting_as(name) as (model, _):
        forward.response_logprobs(model, collate(PROMPTS, RESPONSES, 0, CPU), 1.0).sum().backward()
    found = [parameter.grad.clone() for parameter in roles.trained_parameters(name)]
    for parameter in roles.trained_parameters(name):
        parameter.grad = None
    return found


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_checkpointing_changes_no_gradient_between_role_switches(tmp_path, architecture):
    _, roles = two_roles(tmp_path, architecture)
    plain = gradients(roles)
    forward.policy_and_reference(roles, collate(PROMPTS, RESPONSES, 0, CPU), 1.0)
    again = gradients(roles, checkpointing=True)
    assert all(torch.allclose(a, b, atol=1e-12) for a, b in zip(plain, again, strict=True))
    assert sum(float(a.abs().sum()) for a in plain) > 0.1


def test_a_backward_outside_its_role_would_be_wrong_so_the_block_must_hold_it(tmp_path):
    _, roles = two_roles(tmp_path, "gpt2")  # fused blocks hold on to the adapter that the forward pass had
    right = gradients(roles, checkpointing=True)
    with roles.acting_as("policy") as (model, _):
        loss = forward.response_logprobs(model, collate(PROMPTS, RESPONSES, 0, CPU), 1.0).sum()
        with roles.acting_as("reference"):
            try:
                loss.backward()
                wrong = [parameter.grad for parameter in roles.trained_parameters("policy")]
                differs = any(w is None or not torch.allclose(w, r) for w, r in zip(wrong, right, strict=True))
            except RuntimeError:
                differs = True
    assert differs


def test_switching_never_touches_what_is_trained(tmp_path):
    _, roles = two_roles(tmp_path)
    before = {name: p.requires_grad for name, p in roles.peft("policy").named_parameters()}
    assert [p.requires_grad for p in roles.trained_parameters("policy")] == [True] * len(
        roles.trained_parameters("policy")
    )
    for name in ("reference", "policy", "reference"):
        with roles.acting_as(name):
            pass
    assert before == {name: p.requires_grad for name, p in roles.peft("policy").named_parameters()}
    assert all(flag == (".policy." in f"{name}.") for name, flag in before.items())


def test_adapters_off_is_the_base_and_not_the_reference(tmp_path):
    opened = base(tmp_path / "m", double=True)
    sequences = collate(PROMPTS, RESPONSES, 0, CPU)
    roles = SharedBase(opened)
    roles.add("base")
    with torch.no_grad(), roles.acting_as("base") as (model, _):
        before = forward.response_logprobs(model, sequences, 1.0)
    roles.add("reference", adapter=lora(opened))
    shake(roles, "reference")
    with torch.no_grad(), roles.acting_as("base") as (model, _):
        after = forward.response_logprobs(model, sequences, 1.0)
    with torch.no_grad(), roles.acting_as("reference") as (model, _):
        reference = forward.response_logprobs(model, sequences, 1.0)
    assert torch.equal(before, after) and not torch.allclose(before, reference)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_shared_and_separate_roles_give_the_same_numbers_and_gradients(tmp_path, architecture):
    _opened, shared = two_roles(tmp_path, architecture)
    separate = SeparateModels(CPU)
    for seed, name in enumerate(("policy", "reference")):
        own = load_base(str(tmp_path / "m"))
        exact(own.model)
        separate.add(name, own, adapter=lora(own), trained=name == "policy")
        shake(separate, name, seed)
    sequences = collate(PROMPTS, RESPONSES, 0, CPU)
    ours, theirs = (forward.policy_and_reference(roles, sequences, 0.9) for roles in (shared, separate))
    for name in vars(ours):
        assert torch.allclose(getattr(ours, name), getattr(theirs, name), atol=1e-12)
    for a, b in zip(gradients(shared), gradients(separate), strict=True):
        assert torch.allclose(a, b, atol=1e-12)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_training_a_role_leaves_the_base_and_the_other_roles_alone(tmp_path, architecture):
    opened, roles = two_roles(tmp_path, architecture, double=False)
    checksum, reference = weights_checksum(opened.model), roles.state("reference").state_dict()["adapter"]
    optimizer = torch.optim.AdamW(roles.trained_parameters("policy"), lr=0.1)
    for _ in range(3):
        gradients_before = roles.state("policy").state_dict()["adapter"]
        with roles.acting_as("policy") as (model, _):
            forward.response_logprobs(model, collate(PROMPTS, RESPONSES, 0, CPU), 1.0).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert weights_checksum(opened.model) == checksum
    assert any(
        not torch.equal(gradients_before[k], v) for k, v in roles.state("policy").state_dict()["adapter"].items()
    )
    assert all(torch.equal(reference[k], v) for k, v in roles.state("reference").state_dict()["adapter"].items())


@pytest.mark.parametrize("form", [{}, {"use_rslora": True}, {"use_dora": True}])
@pytest.mark.parametrize(
    ("architecture", "patterns"), [("llama", True), ("llama", False), ("qwen2", True), ("gpt2", False)]
)
def test_an_adapter_grown_to_a_larger_rank_is_the_same_function(tmp_path, architecture, patterns, form):
    opened = base(tmp_path / "m", architecture)
    config = lora(opened, **form)
    if patterns:
        config.rank_pattern = {"layers.0.self_attn.q_proj": 9, "up_proj": 2}
        config.alpha_pattern = {"v_proj": 3, r"layers\.1\..*up_proj": 5, "layers.0.self_attn.q_proj": 1}
    roles = SharedBase(opened)
    roles.add("policy", adapter=config, trained=True)
    shake(roles, "policy")
    roles.save("policy", tmp_path / "run")
    roles.add("larger", adapter=tmp_path / "run" / "adapter", trained=True, rank=7)
    sequences = collate(PROMPTS, RESPONSES, 0, CPU)
    found = []
    for name in ("policy", "larger"):
        with torch.no_grad(), roles.acting_as(name) as (model, _):
            found.append(forward.response_logprobs(model, sequences, 1.0))
    assert torch.allclose(found[0], found[1], atol=1e-5)
    ranks = {p.shape[0] for name, p in roles.peft("larger").named_parameters() if "lora_A.larger" in name}
    assert ranks == ({7, 9} if patterns else {7})
    with pytest.raises(RlhfError, match="smaller"):
        roles.add("less", adapter=tmp_path / "run" / "adapter", rank=2)


def test_lora_on_the_embedding_grows_too(tmp_path):
    opened = base(tmp_path / "m")
    config = lora(opened)
    config.target_modules = {"q_proj", "embed_tokens"}
    model = get_peft_model(opened.model, config)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name)))
    ids, state = torch.tensor([PROMPTS[0]]), adapters.weights(model, "default")
    wanted = model(input_ids=ids).logits
    config, state = adapters.grow(config, state, 11)
    model.add_adapter("larger", config)
    adapters.load(model, "larger", state)
    model.set_adapter("larger")
    assert torch.allclose(model(input_ids=ids).logits, wanted, atol=1e-4)


@pytest.mark.parametrize("more", [{"modules_to_save": ["lm_head"]}, {"bias": "all"}])
def test_an_adapter_that_trains_more_than_lora_is_refused_by_name(tmp_path, more):
    opened, roles = two_roles(tmp_path)
    roles.save("policy", tmp_path)
    path = tmp_path / "adapter" / adapters.CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | more))
    [(key, value)] = more.items()
    said = f"MOD033.*{adapters.CONFIG}: trains more.*{key}: {value[0] if key != 'bias' else value}"
    with pytest.raises(RlhfError, match=said):
        roles.add("again", adapter=tmp_path / "adapter")
    with pytest.raises(RlhfError, match="MOD033"):
        merged.policy(opened, tmp_path / "adapter")


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_trained_tokens_change_their_logit_under_their_own_role_only(tmp_path, architecture):
    opened = base(tmp_path / "m", architecture, double=True)
    sequences = collate(PROMPTS, RESPONSES, 0, CPU)
    roles = SharedBase(opened)
    roles.add("plain", adapter=lora(opened))
    with torch.no_grad(), roles.acting_as("plain") as (model, _):
        before = forward.response_logprobs(model, sequences, 1.0)
    roles.add("policy", adapter=lora(opened, train_tokens=["<|im_end|>"]), trained=True)
    for parameter in roles.trained_parameters("policy"):
        if parameter.shape[0] == 1:
            parameter.data += torch.randn(parameter.shape)
    with torch.no_grad(), roles.acting_as("policy") as (model, _):
        changed = forward.response_logprobs(model, sequences, 1.0)
    with torch.no_grad(), roles.acting_as("plain") as (model, _):
        after = forward.response_logprobs(model, sequences, 1.0)
    assert torch.equal(before, after)
    assert (changed - before).abs()[:, :2].max() > 0.01
    roles.save("policy", tmp_path / "run")
    roles.add("again", adapter=tmp_path / "run" / "adapter")
    with torch.no_grad(), roles.acting_as("again") as (model, _):
        assert torch.allclose(forward.response_logprobs(model, sequences, 1.0), changed, atol=1e-6)


def test_values_stand_before_their_token_and_scores_at_the_end(tmp_path):
    _opened, roles = two_roles(tmp_path)
    head = ScalarHead(32).double()
    head.shift.fill_(0.5)
    head.scale.fill_(2.0)
    sequences = collate(PROMPTS, RESPONSES, 0, CPU)
    with torch.no_grad(), roles.acting_as("policy") as (model, _):
        values = forward.state_values(model, head, sequences)
        scores = forward.end_scores(model, head, sequences)
        for row, (prompt, response) in enumerate(zip(PROMPTS, RESPONSES, strict=True)):
            hidden = model.model(input_ids=torch.tensor([prompt + response])).last_hidden_state[0]
            wanted = (head.linear(hidden)[:, 0] - 0.5) / 2
            assert torch.allclose(values[row, : len(response)], wanted[len(prompt) - 1 : -1], atol=1e-10)
            assert torch.allclose(scores[row, 0], wanted[-1], atol=1e-10)
    assert (values[1, 2:] == 0).all()


def test_a_folded_head_is_the_same_function_without_standardisation():
    head = ScalarHead(8)
    head.shift.fill_(1.5)
    head.scale.fill_(0.25)
    hidden = torch.randn(5, 8)
    folded = head.folded()
    assert torch.allclose(head(hidden), folded.raw(hidden), atol=1e-5)
    assert float(folded.shift) == 0 and float(folded.scale) == 1
    assert (head.zero_().raw(hidden) == 0).all()


RELOAD = """
import json, sys, torch
from pathlib import Path
from rlhf.data.batches import collate
from rlhf.models import forward
from rlhf.models.base import load_base
from rlhf.models.heads import ScalarHead
from rlhf.models.roles import SharedBase
base = load_base(sys.argv[1])
roles = SharedBase(base)
run = Path(sys.argv[2])
roles.add("reward", adapter=run / "adapter", head=ScalarHead.load(run / "head"))
prompts, responses = json.loads(sys.argv[3])
with torch.no_grad(), roles.acting_as("reward") as (model, head):
    print(json.dumps(forward.end_scores(model, head, collate(prompts, responses, 0, torch.device("cpu"))).tolist()))
"""


def test_a_reward_role_saved_and_loaded_in_a_new_process_scores_the_same(tmp_path):
    opened = base(tmp_path / "m")
    roles = SharedBase(opened)
    head = ScalarHead(32)
    head.shift.fill_(0.3)
    head.scale.fill_(1.7)
    roles.add("reward", adapter=lora(opened), head=head, trained=True)
    shake(roles, "reward")
    with torch.no_grad(), roles.acting_as("reward") as (model, own):
        wanted = forward.end_scores(model, own, collate(PROMPTS, RESPONSES, 0, CPU))
    roles.save("reward", tmp_path / "run")
    command = [
        sys.executable,
        "-c",
        RELOAD,
        str(tmp_path / "m"),
        str(tmp_path / "run"),
        json.dumps([PROMPTS, RESPONSES]),
    ]
    found = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert torch.allclose(torch.tensor(found), wanted, atol=1e-6)


def test_adapters_are_written_in_pefts_own_layout_without_pickle(tmp_path):
    _, roles = two_roles(tmp_path)
    roles.save("policy", tmp_path / "run")
    names = sorted(path.name for path in (tmp_path / "run" / "adapter").iterdir())
    assert names == ["adapter_config.json", "adapter_model.safetensors"]


def test_targets_that_match_nothing_and_unknown_tokens_are_refused(tmp_path):
    opened = base(tmp_path / "m")
    with pytest.raises(RlhfError, match="q_prj.*q_proj"):
        adapters.fresh_lora(LoraSection(target_modules=["q_prj"]), opened.model, opened.tokenizer)
    with pytest.raises(RlhfError, match="<nope>"):
        adapters.fresh_lora(LoraSection(train_tokens=["<nope>"]), opened.model, opened.tokenizer)


def test_pickle_weights_missing_paths_and_large_tokenizers_are_refused(tmp_path):
    with pytest.raises(RlhfError, match="MOD001"):
        load_base(str(tmp_path / "nothing"))
    directory = build(tmp_path / "m")
    (directory / "model.safetensors").rename(directory / "pytorch_model.bin")
    with pytest.raises(RlhfError, match="SEC005"):
        load_base(str(directory))
    directory = build(tmp_path / "n")
    from tiny import tokenizer

    larger = tokenizer()
    larger.add_tokens([f"word{i}" for i in range(9)])
    larger.save_pretrained(directory)
    with pytest.raises(RlhfError, match="MOD003"):
        load_base(str(directory))


def test_dropout_of_the_base_and_its_generation_settings_are_off(tmp_path):
    opened = base(tmp_path / "m", "gpt2")
    assert all(module.p == 0 for module in opened.model.modules() if isinstance(module, torch.nn.Dropout))
    assert opened.model.generation_config.repetition_penalty in (None, 1.0)


@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
def test_own_lora_has_the_values_and_gradients_of_pefts_form(tmp_path, monkeypatch, architecture):
    found = []
    for own in (True, False):
        if not own:
            monkeypatch.setattr(fused_lora, "_is_plain", lambda layer, names=None: False)
        opened, roles = two_roles(tmp_path, architecture)
        bias_and_norms(opened.model)
        both = forward.policy_and_reference(roles, collate(PROMPTS, RESPONSES, 0, CPU), 1.0)
        found.append([*vars(both).values(), *gradients(roles)])
    assert len(found[0]) > 20
    assert all(torch.allclose(a, b, atol=1e-10) for a, b in zip(*found, strict=True))


def test_own_lora_is_checked_by_finite_differences():
    generator = torch.Generator().manual_seed(0)
    x, weight, bias, a, b = (
        torch.randn(*shape, generator=generator, dtype=torch.float64)
        for shape in ((2, 3, 5), (4, 5), (4,), (2, 5), (4, 2))
    )
    for tensor in (x, a, b):
        tensor.requires_grad_()
    assert torch.autograd.gradcheck(lambda x, a, b: fused_lora.LoraProduct.apply(x, weight, bias, a, b, 1.7), (x, a, b))


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "gpt2"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_packed_rows_have_the_values_and_gradients_of_padded_ones(tmp_path, architecture, checkpointing):
    found = []
    for packs in (True, False):
        opened, roles = two_roles(tmp_path, architecture)
        assert packing.packs(opened.model)
        opened.model.packs_rows = packs
        if checkpointing:
            roles.enable_gradient_checkpointing()
        both = forward.policy_and_reference(roles, collate(PROMPTS, RESPONSES, 0, CPU), 1.0)
        found.append([*vars(both).values(), *gradients(roles)])
    assert all(torch.allclose(a, b, atol=1e-10) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_documents_that_trl_packs_attend_to_themselves_alone_and_no_mask_is_made(tmp_path, monkeypatch, architecture):
    """As each document alone, states and the gradient of the embedding; in float64."""
    opened = base(tmp_path / "m", architecture, double=True)
    inner = opened.model.base_model
    assert packing.packs(opened.model)
    packing.take_flattened(opened.model)
    rows = [
        {"input_ids": list(range(4, 13)), "labels": [5] * 9, "seq_lengths": [4, 5]},
        {"input_ids": [7, 7, 3], "labels": [5] * 3, "seq_lengths": [3]},
    ]
    batch = DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True)(rows)
    batch.pop("labels")
    weight = opened.model.get_input_embeddings().weight.requires_grad_(True)

    def states_and_gradient(states):
        weight.grad = None
        states.square().sum().backward()
        return states.detach(), weight.grad.clone()

    documents = batch["input_ids"][0].split([4, 5, 3])
    alone = states_and_gradient(torch.cat([inner(input_ids=ids[None]).last_hidden_state[0] for ids in documents]))
    with monkeypatch.context() as patch:
        patch.setattr(masking_utils, "find_packed_sequence_indices", lambda _: pytest.fail("a mask is made"))
        found = states_and_gradient(inner(**batch, use_cache=False).last_hidden_state[0])
    for own, wanted in zip(found, alone, strict=True):
        torch.testing.assert_close(own, wanted, atol=1e-10, rtol=1e-8)


@pytest.mark.parametrize("fused", [True, False])
def test_where_shared_keys_would_cost_all_scores_each_head_has_its_own_and_the_function_is_the_same(
    tmp_path, monkeypatch, fused
):
    """As float32 takes it on CUDA, in float64 on a CPU: passes with gradient, and a prefill without a mask."""
    opened = base(tmp_path / "m", double=True)
    roles = SharedBase(opened)
    roles.add("policy", adapter=lora(opened), trained=True)
    shake(roles, "policy")
    opened.model.knows_blocks = both_ways(fused)
    shared: list[bool] = []

    class Watched(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            if func is torch.nn.functional.scaled_dot_product_attention and args[0].shape[2] > 1:
                shared.append((kwargs or {}).get("enable_gqa", False))
            return func(*args, **(kwargs or {}))

    def figures():
        with roles.acting_as("policy") as (model, _), Watched():
            logprobs = forward.response_logprobs(model, collate(PROMPTS, RESPONSES, 0, CPU), 1.0)
            logprobs.sum().backward()
            with torch.no_grad(), decoding.in_place_of(model, packing.known_blocks(model)):
                logits = model(input_ids=torch.tensor([[5, 6, 7], [8, 9, 4]])).logits
        gradients = [parameter.grad.clone() for parameter in roles.trained_parameters("policy")]
        for parameter in roles.trained_parameters("policy"):
            parameter.grad = None
        return [logprobs.detach(), logits, *gradients]

    plain = figures()
    assert shared and all(shared)
    shared.clear()
    monkeypatch.setattr(grouped, "holds_all_scores", lambda query, key: query.shape[1] != key.shape[1])
    for found, wanted in zip(figures(), plain, strict=True):
        torch.testing.assert_close(found, wanted, atol=1e-10, rtol=1e-8)
    assert shared and not any(shared)


def test_a_sequence_in_a_row_does_not_see_the_one_before_it(tmp_path):
    _, roles = two_roles(tmp_path)
    before, other = [[9, 8, 7, 6], [5, 6]], [[1, 2, 3, 4], [5, 6]]
    found = []
    for prompts in (before, other):
        with torch.no_grad(), roles.acting_as("policy") as (model, _):
            found.append(forward.response_logprobs(model, collate(prompts, [[11, 12], [13, 14]], 0, CPU), 1.0))
    assert torch.equal(found[0][1], found[1][1])
    assert not torch.equal(found[0][0], found[1][0])


def test_what_could_not_keep_rows_apart_is_padded(tmp_path):
    opened = base(tmp_path / "m")
    opened.model.set_attn_implementation("sdpa")
    opened.model.config.sliding_window = 4
    packing.enable(opened.model)
    assert not packing.packs(opened.model)
    opened.model.config.sliding_window = None
    inner, kept = opened.model.model, opened.model.model.forward
    inner.forward = lambda packed=None, **settings: kept(**settings)
    packing.enable(opened.model)
    assert not packing.packs(opened.model), "a model that lets the lengths fall"
    assert opened.model.config._attn_implementation == "sdpa"
    del inner.forward
    packing.enable(opened.model)
    assert packing.packs(opened.model) and opened.model.config._attn_implementation == packing.ATTENTION


def test_a_step_of_the_optimizer_is_seen_by_the_next_pass_without_gradient(tmp_path):
    _, roles = two_roles(tmp_path)
    sequences = collate(PROMPTS, RESPONSES, 0, CPU)
    found = []
    for _ in range(2):
        with torch.no_grad(), roles.acting_as("policy") as (model, _):
            found.append(forward.response_logprobs(model, sequences, 1.0))
        for parameter in roles.trained_parameters("policy"):
            parameter.data.mul_(1.1)
    assert not torch.allclose(found[0], found[1])
