"""An exported run, read by transformers alone, is the same function as the run."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from huggingface_hub.errors import HfHubHTTPError
from peft import AutoPeftModelForCausalLM
from tiny import ARCHITECTURES, base, build, lora, shake
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, GenerationConfig

from rlhf.commands.export import export
from rlhf.commands.score import score
from rlhf.config.sections import ModelSection
from rlhf.data.batches import collate
from rlhf.errors import RlhfError
from rlhf.hub import upload
from rlhf.models import forward, open_base
from rlhf.models.heads import ScalarHead
from rlhf.models.roles import SharedBase
from rlhf.runs import artifacts
from rlhf.runs.artifacts import Manifest

PROMPTS, RESPONSES = [[70, 71, 72, 73, 74], [80, 81]], [[90, 91, 2], [95, 2]]


def make_run(home, kind, architecture="llama", tie=True, names=("score",), train_tokens=("<|im_end|>",)):
    """A finished run of a shaken adapter, with the logits or scores that it gives."""
    opened = base(home / "model", architecture, tie=tie)
    roles = SharedBase(opened)
    head = ScalarHead(32, names) if kind == "reward" else None
    if head:
        head.linear.bias.data.fill_(0.7)
        head.shift.fill_(1.5)
        head.scale.fill_(0.25)
    roles.add("role", adapter=lora(opened, train_tokens=list(train_tokens)), head=head)
    shake(roles, "role", size=0.2)
    run = home / "run"
    roles.save("role", run)
    opened.tokenizer.save_pretrained(run / artifacts.TOKENIZER)
    identity = open_base.identity_of(opened, ModelSection(path=str(home / "model")))
    artifacts.write(run, Manifest(kind, "sft", 0, {}, {"eval/loss": 1.0}, 1.0, base=identity))
    sequences = collate(PROMPTS, RESPONSES, 0, opened.device)
    with torch.no_grad(), roles.acting_as("role") as (model, own):
        if own:
            return run, forward.end_scores(model, own, sequences)[:, 0]
        return run, model(input_ids=sequences.ids, attention_mask=sequences.attention_mask).logits


def modes_in(directory):
    """Of the files in it, and of the directories with its own."""
    paths = [directory, *directory.rglob("*")]
    found = [{path.stat().st_mode & 0o777 for path in paths if path.is_dir() == is_dir} for is_dir in (False, True)]
    return tuple(found)


@pytest.fixture(autouse=True)
def umask():
    """The usual one; a test may set another."""
    before = os.umask(0o022)
    yield os.umask
    os.umask(before)


def batch():
    sequences = collate(PROMPTS, RESPONSES, 0, torch.device("cpu"))
    return {"input_ids": sequences.ids, "attention_mask": sequences.attention_mask}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("tie", [True, False])
def test_a_merged_policy_gives_the_logits_of_the_run(tmp_path, architecture, tie):
    run, wanted = make_run(tmp_path, "policy", architecture, tie)
    before = artifacts.model_digest(tmp_path / "model")
    outcome = export(str(run), tmp_path / "out", adapter_only=False)
    assert modes_in(tmp_path / "out") == ({0o644}, {0o755})
    with torch.no_grad():
        found = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()(**batch()).logits
    kept = batch()["attention_mask"].bool()
    assert (found - wanted)[kept].abs().max() < 1e-4 and outcome["max_difference"] < 1e-4
    assert (AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()(**batch()).logits - wanted)[
        kept
    ].abs().max() > 0.1
    assert artifacts.model_digest(tmp_path / "model") == before
    settings = GenerationConfig.from_pretrained(tmp_path / "out")
    assert settings.eos_token_id[0] == 2 and settings.repetition_penalty in (None, 1.0)
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_an_exported_reward_model_gives_the_scores_of_the_run_but_for_its_constant(tmp_path, architecture):
    run, wanted = make_run(tmp_path, "reward", architecture)
    outcome = export(str(run), tmp_path / "out", adapter_only=False)
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out").eval()
    with torch.no_grad():
        found = model(**batch()).logits
    assert found.shape == (2, 1) and outcome["constant"] == pytest.approx((0.7 - 1.5) / 0.25)
    assert torch.allclose(found[:, 0] + outcome["constant"], wanted, atol=1e-4) and outcome["max_difference"] < 1e-4
    assert model.config.num_labels == 1 and model.config.pad_token_id != 2


def test_the_constant_that_is_printed_turns_the_logit_into_rlhf_scores_number(tmp_path, caplog):
    caplog.set_level("INFO", "rlhf")
    run, _ = make_run(tmp_path, "reward")
    export(str(run), tmp_path / "out", adapter_only=False)
    said = "rlhf score's number is the logit plus -3.2: the class has no bias"
    card = (tmp_path / "out/README.md").read_text()
    assert f"{said}." in caplog.messages and f"- {said}\n" in card and "rlhf score EXAMINATION takes it off" in card
    given = [{"prompt": f"hi {number}", "response": "ok" * number} for number in (1, 2, 9)]
    (tmp_path / "given.jsonl").write_text("".join(json.dumps(row) + "\n" for row in given))
    score(str(run), str(tmp_path / "given.jsonl"), str(tmp_path / "scored.jsonl"), 2, None)
    wanted = [json.loads(line)["score"] for line in (tmp_path / "scored.jsonl").read_text().splitlines()]
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out").eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    constant = float(re.search(r"logit plus (\S+):", card)[1])
    for row, number in zip(given, wanted, strict=True):
        text = f"<|im_start|>user\n{row['prompt']}<|im_end|>\n<|im_start|>assistant\n{row['response']}<|im_end|>"
        logit = float(model(**tokenizer(text, return_tensors="pt")).logits.detach())
        assert logit + constant == pytest.approx(number, abs=1e-4) and abs(constant) > 1


def test_an_adapter_alone_is_read_by_peft(tmp_path, umask):
    run, wanted = make_run(tmp_path, "policy", train_tokens=())
    umask(0o027)
    export(str(run), tmp_path / "out", adapter_only=True)
    assert modes_in(tmp_path / "out") == ({0o640}, {0o750})
    assert json.loads((tmp_path / "out/adapter_config.json").read_text())["base_model_name_or_path"] == str(
        tmp_path / "model"
    )
    with torch.no_grad():
        found = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "out").eval()(**batch()).logits
    assert (found - wanted)[batch()["attention_mask"].bool()].abs().max() < 1e-4


def test_a_new_process_without_this_package_gives_the_same_logits(tmp_path):
    run, wanted = make_run(tmp_path, "policy")
    export(str(run), tmp_path / "out", adapter_only=False)
    code = (
        "import json, sys, torch; from transformers import AutoModelForCausalLM\n"
        "model = AutoModelForCausalLM.from_pretrained(sys.argv[1]).eval()\n"
        f"print(json.dumps(model(input_ids=torch.tensor([{[*PROMPTS[1], *RESPONSES[1]]}])).logits[0].tolist()))\n"
        "assert 'rlhf' not in sys.modules"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "out")], capture_output=True, text=True, check=True
    )
    assert torch.allclose(torch.tensor(json.loads(done.stdout)), wanted[1, :4], atol=1e-4)


def test_what_cannot_be_exported_is_refused_with_the_reason(tmp_path):
    run, _ = make_run(tmp_path / "two", "reward", names=("helpful", "safe"))
    with pytest.raises(RlhfError, match=r"CFG040.*--head.*no head 'kind'"):
        export(str(run), tmp_path / "out", adapter_only=False, head="kind")
    assert not (tmp_path / "out").exists()
    run, _ = make_run(tmp_path / "one", "reward")
    with pytest.raises(RlhfError, match=r"CKP004.*head would be lost"):
        export(str(run), tmp_path / "out", adapter_only=True)
    build(tmp_path / "out")
    with pytest.raises(RlhfError, match=r"CKP009.*exists"):
        export(str(run), tmp_path / "out", adapter_only=False)
    assert Path(tmp_path / "out" / "config.json").is_file()


class Hub:
    """Stands in for the hub's client, and keeps what it was told."""

    calls: list[tuple] = []  # noqa: RUF012

    def whoami(self):
        self.calls.append(("whoami",))

    def create_repo(self, repository, private, exist_ok):
        self.calls.append(("create", repository, private, exist_ok))
        return f"https://hub/{repository}"

    def upload_folder(self, repo_id, folder_path, commit_message):
        self.calls.append(("upload", repo_id, sorted(path.name for path in folder_path.iterdir())))


def test_an_export_is_uploaded_privately_with_its_card(tmp_path, monkeypatch):
    run, _ = make_run(tmp_path, "policy")
    monkeypatch.setattr(upload, "HfApi", Hub)
    monkeypatch.setattr(Hub, "calls", [])
    outcome = export(str(run), tmp_path / "out", False, "me/policy")
    assert outcome["url"] == "https://hub/me/policy"
    who, made, sent = Hub.calls
    assert who == ("whoami",) and made == ("create", "me/policy", True, True) and sent[1] == "me/policy"
    assert {"README.md", "model.safetensors", "tokenizer.json", "rlhf_export.json"} <= set(sent[2])
    export(str(run), tmp_path / "open", True, "me/adapter", public=True)
    assert Hub.calls[4] == ("create", "me/adapter", False, True)


class ConnectError(HfHubHTTPError.__mro__[1]):
    """As the library below the hub's client raises it, which is none of the hub's own errors."""


def test_without_a_login_nothing_is_computed_and_a_failed_upload_keeps_the_export(tmp_path, monkeypatch):
    run, _ = make_run(tmp_path, "policy")

    def offline(*_, **__):
        raise ConnectError("no route to host")

    monkeypatch.setattr(upload, "HfApi", Hub)
    monkeypatch.setattr(Hub, "upload_folder", offline)
    with pytest.raises(RlhfError, match=r"RES012.*me/policy.*no route to host.*hf upload me/policy"):
        export(str(run), tmp_path / "out", False, "me/policy")
    assert (tmp_path / "out/model.safetensors").is_file()
    monkeypatch.setattr(Hub, "whoami", offline)
    with pytest.raises(RlhfError, match=r"RES012.*hf auth login"):
        export(str(run), tmp_path / "none", False, "me/policy")
    assert not (tmp_path / "none").exists()


def test_the_card_names_base_parents_data_figures_and_limits(tmp_path):
    run, _ = make_run(tmp_path, "policy")
    found = json.loads((run / "manifest.json").read_text())
    found["identity"] = {"data.path": "mine.jsonl", "data.rows": "abc" * 10}
    found["parents"] = {"policy": {"run_dir": "runs/gone", "digest": "d" * 64}}
    found["details"] = {"held_out_figures": "optimistic: these rows also chose the step"}
    (run / "manifest.json").write_text(json.dumps(found))
    outcome = export(str(run), tmp_path / "out", False)
    card = (tmp_path / "out/README.md").read_text()
    header, _, text = card.removeprefix("---\n").partition("\n---\n")
    assert yaml.safe_load(header) == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["rlhf", "sft"],
    }
    data = "data: mine.jsonl (rows' digest abcabcabcabcabca)"
    for words in (
        data,
        "are optimistic: these rows also chose",
        "made from policy: runs/gone",
        "| eval/loss | 1.0 |",
        "in bfloat16:",
        "## Limits",
        "digest",
    ):
        assert words in text, words
    assert outcome["max_difference"] < 1e-4 < outcome["max_difference_bfloat16"] < 1.0
