"""Models that end their responses with more tokens than the one that their template writes."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from tiny import build, finished_sft
from transformers import GenerationConfig

from rlhf.commands.export import export
from rlhf.config.sections import ModelSection
from rlhf.data.tokenised import PromptRow
from rlhf.errors import RlhfError
from rlhf.evaluation import stopping
from rlhf.evaluation.policy_samples import respond
from rlhf.models import open_base
from rlhf.models.base import load_base
from rlhf.models.roles import SharedBase
from rlhf.preflight import origins
from rlhf.records import Message
from rlhf.rollouts.engine import Sampling
from rlhf.rollouts.hf import HfEngine
from rlhf.runs import artifacts
from rlhf.start import look

CPU = torch.device("cpu")
VOWELS = tuple("aeiouAEIOU0123456789")


def with_ends(directory, ends):
    """A model whose generation config has these ids; 2 is <|im_end|>, 3 is <|endoftext|>, 1 is <|im_start|>."""
    build(directory)
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": ends}), encoding="utf-8")
    return str(directory)


@pytest.mark.parametrize(
    ("ends", "others"),
    [
        ([3, 2], ["<|endoftext|>"]),
        ([2, 1, 3], ["<|im_start|>", "<|endoftext|>"]),
        (3, ["<|endoftext|>"]),
        ([2, 70, 5000], []),  # an ordinary token, and an id that no token has
        (None, []),
    ],
)
def test_the_ends_of_the_generation_config_are_those_that_are_special_tokens(tmp_path, ends, others):
    path = with_ends(tmp_path / "m", ends)
    base = load_base(path)
    assert base.chat.end_tokens == ("<|im_end|>", *others) and base.chat.end_ids[0] == 2
    assert open_base.open_chat(ModelSection(path=path)).end_ids == base.chat.end_ids
    assert set(look.model(path)[0].ends) == {"<|endoftext|>", *others, *(["<|im_end|>"] if ends and ends != 3 else [])}
    assert base.model.generation_config.eos_token_id is None, "nothing else of the model's settings is kept"


def test_a_model_without_generation_config_has_one_end_and_a_broken_one_is_refused(tmp_path):
    path = with_ends(tmp_path / "m", 3)
    for text in ('{"eos_token_id": "x"}', "[1]", "{"):
        (tmp_path / "m/generation_config.json").write_text(text, encoding="utf-8")
        with pytest.raises(RlhfError, match="MOD001.*generation_config.json"):
            load_base(path)
    (tmp_path / "m/generation_config.json").unlink()
    assert load_base(path).chat.end_tokens == ("<|im_end|>",)


def test_a_response_ends_at_any_end_is_rescored_as_sampled_and_read_with_the_templates_end(tmp_path):
    """Against the same noise without further ends: cut at the first of them, the rest alike."""
    section = ModelSection(path=with_ends(tmp_path / "m", 3), end_tokens=list(VOWELS))
    one = SharedBase(open_base.open_base(section.model_copy(update={"end_tokens": []}), CPU))
    many = SharedBase(open_base.open_base(section, CPU))
    prompts = [[70, 71, 72, 73], [80, 81], [90], [100, 101, 102]]
    for roles in (one, many):
        roles.add("policy")
    how = Sampling(24, 1.0, seed=4)
    plain = HfEngine(one, "policy", one.base.chat, 8).generate(prompts, how, range(4))
    assert one.base.chat.end_ids == (2,)
    vowels = set(many.base.tokenizer.convert_tokens_to_ids(list(VOWELS)))
    cuts = [next((i for i, token in enumerate(row) if token in {*vowels, 2}), None) for row in plain.tokens]
    rows = [PromptRow((Message("user", "hi"),), ids) for ids in prompts]
    samples = respond(HfEngine(many, "policy", many.base.chat, 8), many.base.chat, rows, how)
    assert any(cut is not None and plain.tokens[row][cut] in vowels for row, cut in enumerate(cuts))
    for sample, row, cut in zip(samples, plain.tokens, cuts, strict=True):
        sampled = row if cut is None else row[: cut + 1]
        assert (sample.response_ids, sample.finished) == (sampled, cut is not None)
        assert sample.scored_ids == ([*sampled[:-1], 2] if cut is not None else sampled)
    counted = stopping.figures(many.base, [], samples, stopping.Answers([3], 0), 24)["num_ended_by"]
    assert sum(counted.values()) == sum(sample.finished for sample in samples) > counted["<|im_end|>"]


def test_ends_are_inherited_and_exported_and_an_old_run_keeps_its_one_end(tmp_path):
    finished_sft(tmp_path)
    old = artifacts.read(tmp_path / "runs/sft")
    (tmp_path / "m/generation_config.json").write_text('{"eos_token_id": [2, 3]}', encoding="utf-8")
    assert old.base.end_tokens is None and origins.model_of(old).end_tokens == []
    assert open_base.reopen_base(old, CPU).chat.end_ids == (2,), "as it was made"
    section = ModelSection(path=str(tmp_path / "m"))
    identity = open_base.identity_of(open_base.open_base(section, CPU), section)
    assert identity.end_tokens == ["<|endoftext|>"]
    (tmp_path / "m/generation_config.json").unlink()  # what is recorded holds
    artifacts.rewrite(tmp_path / "runs/sft", replace(old, base=identity))
    read = artifacts.read(tmp_path / "runs/sft")
    assert read.base == identity and open_base.reopen_base(read, CPU).chat.end_ids == (2, 3)


def test_the_export_of_a_policy_ends_at_all_of_them(tmp_path):
    finished_sft(tmp_path)
    manifest = artifacts.read(tmp_path / "runs/sft")
    base = replace(manifest.base, end_tokens=["<|im_start|>"])
    artifacts.rewrite(tmp_path / "runs/sft", replace(manifest, base=base))
    export(str(tmp_path / "runs/sft"), tmp_path / "out", False)
    assert GenerationConfig.from_pretrained(tmp_path / "out").eos_token_id == [2, 1, 3]


def test_an_end_that_the_tokenizer_does_not_have_is_refused(tmp_path):
    with pytest.raises(RlhfError, match=r"MOD031.*model.end_tokens.*'<eot>'"):
        open_base.open_base(ModelSection(path=with_ends(tmp_path / "m", 3), end_tokens=["<eot>"]), CPU)
