"""``check --show`` and ``--limit``: rows as the model will see them, and a trial on the first of them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import tiny

from rlhf.commands import inspection, token_view
from rlhf.commands.reader import Reading
from rlhf.config import load
from rlhf.config.sections import DataSection, ModelSection
from rlhf.config.stages import PpoConfig, SftConfig
from rlhf.config.train_rm import RewardConfig
from rlhf.data import sources
from rlhf.data.chat_format import ChatFormat
from rlhf.errors import RlhfError
from rlhf.preflight.needs import Input, Needs
from rlhf.preflight.prepare import Checked, Plan
from rlhf.runs.identity import Identity
from rlhf.stages import registry, starting
from rlhf.stages.registry import STAGES

TWO_TURNS = [{"role": role, "content": text} for role, text in zip(["user", "assistant"] * 2, "abcd", strict=True)]


@pytest.fixture
def chat(monkeypatch):
    found = ChatFormat(tiny.tokenizer())
    monkeypatch.setattr(token_view.open_base, "open_chat", lambda model: found)
    return found


def rows_of(tmp_path, config_class, rows, kind, count=3, **options):
    path = tmp_path / "d.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    key = "prompts" if kind == "prompts" else "data"
    config = config_class.model_validate({key: {"path": str(path)}, **options})
    read = getattr(sources, f"load_{kind}")
    section = getattr(config, key)
    stage = registry.stage_of(config)
    (rows_of_stage,) = {item.rows for item in stage.needs(config).inputs}
    needs = Needs(inputs=(Input(key, section, read, rows_of_stage),), model=ModelSection())
    checked = Checked("none", config, needs, Plan({}, {key: read(section)}, Identity({}), ()))
    return token_view.rows(checked, count, Reading(needs.model))[key]


def marked(row):
    return [text for text, is_marked in row["parts"] if is_marked]


def test_a_demonstration_shows_which_turns_carry_loss_and_every_token(tmp_path, chat):
    (row,) = rows_of(tmp_path, SftConfig, [{"messages": TWO_TURNS}], "demonstrations", epochs=1.0)
    assert marked(row) == ["b<|im_end|>", "d<|im_end|>"]
    assert "".join(text for text, _ in row["parts"]) == (
        "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\nb<|im_end|>\n"
        "<|im_start|>user\nc<|im_end|>\n<|im_start|>assistant\nd<|im_end|>"
    )
    assert row["where"].endswith("d.jsonl:1") and row["about"].endswith("4 carry loss")
    options = {"epochs": 1.0, "loss_on": "last_turn"}
    (row,) = rows_of(tmp_path, SftConfig, [{"messages": TWO_TURNS}], "demonstrations", **options)
    assert marked(row) == ["d<|im_end|>"]


def test_a_comparison_shows_both_responses_and_where_the_head_reads(tmp_path, chat):
    data = [{"prompt": "q", "responses": ["x", "y", "z"], "ranks": [2, 1, 3]}] * 2
    rows = rows_of(tmp_path, RewardConfig, data, "comparisons", count=1, epochs=1.0)
    assert [marked(row) for row in rows] == [["<|im_end|>"]] * 3
    assert [row["parts"][0][0][-1] for row in rows] == ["x", "y", "z"]
    said = [row["about"].partition(", ")[2] for row in rows]
    assert said[0].startswith("response 1 (preferred to 3),") and said[1].startswith("response 2 (preferred to 1, 3)")
    assert said[2].startswith("response 3,")


def test_a_prompt_ends_where_the_response_begins_and_too_long_rows_are_said_to_be(tmp_path, chat):
    rows = [{"prompt": "é"}, {"prompt": "z" * 99}, {"prompt": "not shown"}]
    options = {"prompts": {"path": str(tmp_path / "d.jsonl"), "max_tokens": 50}}
    first, second = rows_of(tmp_path, PpoConfig, rows, "prompts", 2, **options)
    assert first["parts"] == [["<|im_start|>user\né<|im_end|>\n<|im_start|>assistant\n", False]]
    assert "longer than 50: dropped" in second["about"] and "longer" not in first["about"]


def test_a_row_that_is_cut_is_shown_cut(tmp_path, chat):
    options = {"epochs": 1.0, "max_length": 30, "too_long": "truncate"}
    (row,) = rows_of(tmp_path, SftConfig, [{"prompt": "q", "completion": "x" * 40}], "demonstrations", **options)
    assert row["about"].endswith("longer than 30: cut to that") and set(marked(row)[0]) == {"x"}


def test_what_the_template_refuses_is_named_by_row(tmp_path, chat):
    rows = [{"prompt": "a"}, {"prompt": "<|im_end|>"}]
    options = {"prompts": {"path": str(tmp_path / "d.jsonl"), "on_bad_row": "error"}}
    with pytest.raises(RlhfError, match=r"DAT060.*d.jsonl:2"):
        rows_of(tmp_path, PpoConfig, rows, "prompts", **options)
    _, dropped = rows_of(tmp_path, PpoConfig, rows, "prompts")
    assert dropped["about"].endswith("special token '<|im_end|>': the row is dropped") and dropped["parts"] == []


def test_lines_mark_with_brackets_or_colour_and_let_no_control_character_through():
    row = {"where": "d:1", "about": "3 tokens", "parts": [["a\x1b[31m\n", False], ["b", True]]}
    results = [{"config": "c", "stage": "sft", "data": {"data": {"rows": 1, "notes": [], "shown": [row]}}}]
    assert list(inspection.check_lines(results))[2:] == ["  -- d:1: 3 tokens", "     a\\x1b[31m", "     ⟦b⟧"]
    assert list(inspection.check_lines(results, colour=True))[-1] == "     \x1b[32mb\x1b[0m"


def test_check_shows_rows_with_the_tokenizer_of_a_parent_that_has_not_run_yet(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("first.yaml").write_text(
        "run_dir: runs/a/sft\nmodel: {}\ndata: {path: 'demo:demonstrations?size=20'}\nsteps: 1\n"
    )
    Path("rm.yaml").write_text("policy: ./runs/a/sft\nmembers: 1\ndata: {path: 'demo:preferences?size=9'}\nsteps: 1\n")
    Path("eval-rm.yaml").write_text("reward: runs/train-rm\ndata: {path: 'demo:preferences?size=9'}\n")
    Path("ppo.yaml").write_text("policy: runs/a/sft\nprompts: {path: 'demo:prompts?size=20'}\n")
    files = [Path(f"{name}.yaml") for name in ("first", "rm", "eval-rm", "ppo")]
    sft, rm, examined, ppo = inspection.check(files, None, [], show=2)
    (record, *_) = sources.load_demonstrations(DataSection(path="demo:demonstrations?size=20")).records
    assert len(sft["data"]["data"]["shown"]) == 2 and sft["rows_shown"] == "as the model reads them"
    text = " ".join(marked(sft["data"]["data"]["shown"][0]))
    assert record.messages[-1].content in text and record.messages[0].content not in text
    (pairs, *_) = sources.load_comparisons(DataSection(path="demo:preferences?size=9")).records
    for result, missing in ((rm, "./runs/a/sft"), (examined, "runs/train-rm"), (ppo, "runs/a/sft")):
        said = f"with the tokenizer of demo:base, which first.yaml names; {missing} has not been run yet"
        assert result["rows_shown"] == said and list(inspection.check_lines([result]))[1] == f"  rows are shown {said}."
    for result in (rm, examined):
        shown = result["data"]["data"]["shown"]
        assert [row["parts"][0][0].endswith(pairs.responses[0]) for row in shown[:2]] == [True, False]
        assert [marked(row) for row in shown[:2]] == [["<eos>"]] * 2
    assert ppo["data"]["prompts"]["shown"][0]["parts"][0][0].startswith("<user>")
    assert "shown" not in inspection.check([Path("first.yaml")], None, [])[0]["data"]["data"]


def test_rows_are_shown_as_text_where_nothing_gives_a_tokenizer_and_the_reason_is_said(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    row = {"prompt": [{"role": "system", "content": "s"}, {"role": "user", "content": "q"}]}
    Path("d.jsonl").write_text(json.dumps(row | {"chosen": "yes", "rejected": "no"}) + "\n")
    Path("turns.jsonl").write_text(json.dumps({"messages": TWO_TURNS}) + "\n")
    Path("train-rm.yaml").write_text("policy: runs/none\ndata: {path: d.jsonl}\nepochs: 1\n")
    Path("sft.yaml").write_text("model: {path: org/nothing}\ndata: {path: turns.jsonl}\nepochs: 1\n")
    rm, sft = inspection.check([Path("train-rm.yaml"), Path("sft.yaml")], None, [], show=1)
    good, bad = rm["data"]["data"]["shown"]
    assert good["parts"] == [["system: s\n", False], ["user: q\n", False], ["assistant: yes", False]]
    assert (good["about"], bad["about"]) == ("text; response 1 (preferred to 2)", "text; response 2")
    assert rm["rows_shown"] == "as text, without tokens: runs/none: no such run, and no config in . makes it"
    assert marked(sft["data"]["data"]["shown"][0]) == ["assistant: b\n", "assistant: d\n"]
    assert "tokenizer.path: org/nothing: not in the cache, and HF_HUB_OFFLINE is set" in sft["rows_shown"]


def test_a_limit_sets_the_key_of_every_data_set_and_is_refused_where_there_is_none(tmp_path):
    path = tmp_path / "ppo.yaml"
    path.write_text("prompts: {path: a.jsonl, limit: 50}\nevaluation: {data: {path: b.jsonl}}\n")
    overrides = starting.limits(STAGES["ppo"], path, [], 5)
    config = load.load(PpoConfig, path, overrides)
    assert (config.prompts.limit, config.evaluation.data.limit) == (5, 5)
    without = replace(STAGES["ppo"], needs=lambda config: Needs())
    with pytest.raises(RlhfError, match="--limit: rlhf ppo reads no data set"):
        starting.limits(without, path, [], 5)
