"""Rows and files: every accepted form, every refused one with its line and field."""

from __future__ import annotations

import contextlib
import gzip
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf.config.sections import DataSection
from rlhf.data import sources
from rlhf.data.rows import EQUAL
from rlhf.errors import RlhfError
from rlhf.records import Message, Prompt, prompt_key, split_by_prompt

LOADERS = {
    "demonstrations": sources.load_demonstrations,
    "comparisons": sources.load_comparisons,
    "prompts": sources.load_prompts,
}
PAIR = {"prompt": "p", "chosen": "a", "rejected": "b"}
U, A = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}


def write(tmp_path, rows, name="d.jsonl"):
    path = tmp_path / name
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("\n".join(lines) + "\n")
    return path


def load(tmp_path, kind, rows, **settings):
    return LOADERS[kind](DataSection(path=str(write(tmp_path, rows)), **settings))


def refusal(tmp_path, kind, rows, on_bad_row="error", **settings):
    with pytest.raises(RlhfError) as caught:
        load(tmp_path, kind, rows, on_bad_row=on_bad_row, **settings)
    assert caught.value.exit_code == 3
    return str(caught.value)


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "q", "completion": "a"},
        {"prompt": "q", "response": "a"},
        {"messages": [U, A]},
        {"prompt": [U], "completion": [A]},
    ],
)
def test_demonstrations_in_every_form_are_one_conversation(tmp_path, row):
    record = load(tmp_path, "demonstrations", [row]).records[0]
    assert record.messages == (Message("user", "q"), Message("assistant", "a"))
    assert record.where.endswith("d.jsonl:1")


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "q", "chosen": "a", "rejected": "b"},
        {"prompt": [U], "chosen": [A], "rejected": [{**A, "content": "b"}]},
        {"chosen": [U, A], "rejected": [U, {**A, "content": "b"}]},
        {"prompt": [U], "chosen": [U, A], "rejected": [U, {**A, "content": "b"}]},
        {"chosen": "\n\nHuman: q\n\nAssistant: a", "rejected": "\n\nHuman: q\n\nAssistant: b"},
        {"prompt": "q", "responses": ["b", "a"], "ranks": [2, 1]},
    ],
    ids=["text", "conversational", "shared head", "repeated head", "transcript", "ranking"],
)
def test_comparisons_in_every_form_prefer_a_to_b(tmp_path, row):
    record = load(tmp_path, "comparisons", [row]).records[0]
    (judgement,) = record.judgements
    assert record.prompt == (Message("user", "q"),) and judgement.probability == 1
    assert (record.responses[judgement.first], record.responses[judgement.second]) == ("a", "b")


def test_a_ranking_gives_all_pairs_and_ties_are_even(tmp_path):
    row = {"prompt": "q", "responses": ["x", "y", "z"], "ranks": [2, 1, 2]}
    judgements = load(tmp_path, "comparisons", [row]).records[0].judgements
    assert {(j.first, j.second, j.probability) for j in judgements} == {(1, 0, 1.0), (0, 2, 0.5), (1, 2, 1.0)}


def test_margins_are_kept_and_must_be_finite(tmp_path):
    assert load(tmp_path, "comparisons", [{**PAIR, "margin": 2}]).records[0].judgements[0].margin == 2.0
    assert "'margin': need a finite number" in refusal(tmp_path, "comparisons", [{**PAIR, "margin": "big"}])


def test_prompts_come_from_text_or_from_a_conversation_without_its_answer(tmp_path):
    rows = [{"prompt": "q"}, {"messages": [U, A]}, {"messages": [U]}, {"prompt": [U]}]
    assert {record.messages for record in load(tmp_path, "prompts", rows).records} == {(Message("user", "q"),)}


@pytest.mark.parametrize(
    ("kind", "rows", "wanted"),
    [
        ("comparisons", [PAIR, '{"prompt": "a b'], "d.jsonl:2: invalid JSON at column"),
        ("comparisons", [PAIR, '{"prompt": "a", "prompt": "b"}'], "d.jsonl:2: key 'prompt' stands twice"),
        ("comparisons", [PAIR, "[1]"], "d.jsonl:2: need an object, got list"),
        ("comparisons", [PAIR, '{"prompt": NaN}'], "NaN is not JSON"),
        (
            "comparisons",
            [PAIR, {"prompt": "a", "chosen": "b"}],
            "d.jsonl:2: 'rejected': missing (this row has: prompt, chosen)",
        ),
        ("comparisons", [PAIR, {**PAIR, "chosen": None}], "'chosen': need text, got null"),
        ("demonstrations", [{"prompt": "a", "completion": 3}], "'completion': need text, got int"),
        ("demonstrations", [{"prompt": "a", "completion": " "}], "'completion': empty"),
        ("comparisons", [PAIR, {**PAIR, "rejected": "a"}], "'chosen' equals 'rejected'"),
        ("comparisons", [{"chosen": "x", "rejected": "y"}], "share no head"),
        ("comparisons", [{"chosen": [U, A], "rejected": [{**U, "content": "z"}, A]}], "must be one conversation with"),
        ("comparisons", [{"prompt": "q", "responses": ["a", "b"], "ranks": [1, 1]}], "all equal"),
        ("comparisons", [{"prompt": "q", "responses": ["a", "b"], "ranks": [1]}], "need 2 whole numbers"),
        ("comparisons", [{"prompt": "q", "responses": ["a", "a"], "ranks": [1, 2]}], "equal but ranked differently"),
        (
            "demonstrations",
            [{"messages": [{**U, "role": "bot"}, A]}],
            "'messages[0].role': need system, user or assistant",
        ),
        ("demonstrations", [{"messages": [A, U, A]}], "must alternate"),
        ("demonstrations", [{"messages": [U]}], "must end with a turn of the assistant"),
        ("prompts", [{"prompt": "a\u0000b"}], "NUL"),
        ("prompts", ['{"prompt": "\\ud800"}'], "surrogate"),
        ("prompts", [""], "no rows"),
        ("comparisons", [{"question": "a"}] * 3, "all 3 rows: 'chosen': missing (this row has: question)"),
    ],
)
def test_broken_rows_are_named_by_file_line_and_field(tmp_path, kind, rows, wanted):
    assert wanted in refusal(tmp_path, kind, rows)


def test_every_broken_row_is_reported_and_blank_lines_are_not(tmp_path):
    message = refusal(tmp_path, "prompts", [{"prompt": 1}, "", {"prompt": "ok"}, {"prompt": ""}])
    assert "d.jsonl:1" in message and "d.jsonl:4" in message and "d.jsonl:2" not in message


@pytest.mark.parametrize(
    ("data", "wanted"),
    [
        (b'{"prompt": "ok"}\n{"prompt": "caf\xe9"}\n', "d.jsonl:2: byte 0xe9 at byte 16 is not UTF-8"),
        (b"\x1f\x8b123", "looks like gzip"),
        (b"PAR1xxxx", "looks like parquet"),
        (b"", "no rows"),
    ],
)
def test_files_that_are_something_else_are_said_to_be(tmp_path, data, wanted):
    path = tmp_path / "d.jsonl"
    path.write_bytes(data)
    with pytest.raises(RlhfError, match="DAT") as caught:
        sources.load_prompts(DataSection(path=str(path), on_bad_row="error"))
    assert wanted in str(caught.value)


def test_missing_files_and_directories_are_named(tmp_path):
    for path, wanted in ((tmp_path / "no.jsonl", "no such file"), (tmp_path / "no.parquet", "no such file")):
        with pytest.raises(RlhfError) as caught:
            sources.load_prompts(DataSection(path=str(path)))
        assert wanted in str(caught.value)


def test_a_byte_order_mark_and_gzip_are_read(tmp_path):
    path = tmp_path / "d.jsonl.gz"
    path.write_bytes(gzip.compress(b'\xef\xbb\xbf{"prompt": "q"}\n'))
    assert len(sources.load_prompts(DataSection(path=str(path))).records) == 1
    path.write_bytes(path.read_bytes()[:20])
    with pytest.raises(RlhfError, match="gzip"):
        sources.load_prompts(DataSection(path=str(path)))


def test_parquet_and_saved_directories_come_through_the_datasets_library(tmp_path):
    datasets = pytest.importorskip("datasets")
    made = datasets.Dataset.from_list([PAIR, {**PAIR, "prompt": "q"}])
    made.to_parquet(str(tmp_path / "d.parquet"))
    made.save_to_disk(str(tmp_path / "saved"))
    for path in ("d.parquet", "saved"):
        assert len(sources.load_comparisons(DataSection(path=str(tmp_path / path))).records) == 2


def test_columns_map_other_names_and_ignored_fields_are_counted(tmp_path):
    loaded = load(
        tmp_path, "demonstrations", [{"q": "x", "a": "y", "z": 1}], columns={"prompt": "q", "completion": "a"}
    )
    assert loaded.records[0].messages[1].content == "y" and loaded.warnings == ("ignored fields: z",)
    message = refusal(tmp_path, "demonstrations", [{"q": "x"}], columns={"prompt": "question"})
    assert "no field 'question' (columns.prompt) in any row; found q" in message


def test_dropped_rows_are_counted_and_too_many_are_an_error(tmp_path):
    rows = [PAIR] * 9 + [{**PAIR, "rejected": "a"}]
    loaded = load(tmp_path, "comparisons", rows, max_dropped_fraction=0.1)
    assert len(loaded.records) == 9 and loaded.num_dropped == {EQUAL: 1} and loaded.num_rows == 10
    message = refusal(tmp_path, "comparisons", rows, on_bad_row="drop", max_dropped_fraction=0.099)
    assert "1 of 10 rows (10.0%) would be dropped: 1 with equal responses (first: " in message
    assert "d.jsonl:10)" in message and "max_dropped_fraction: 0.1 (now 0.099)" in message


@given(st.integers(0, 2**31), st.floats(0.05, 0.9), st.lists(st.integers(0, 8), min_size=5, max_size=40))
@settings(max_examples=50, deadline=None)
def test_splits_are_disjoint_in_prompts_whatever_the_order(seed, fraction, numbers):
    records = [Prompt((Message("user", str(n)),), f"row {i}") for i, n in enumerate(numbers)]
    if len(set(numbers)) < 2:
        with pytest.raises(RlhfError, match="DAT030"):
            split_by_prompt(records, fraction, seed)
        return
    rest, held_out = split_by_prompt(records, fraction, seed)
    keys = [{prompt_key(r.prompt) for r in part} for part in (rest, held_out)]
    assert rest and held_out and not keys[0] & keys[1] and len(rest) + len(held_out) == len(records)
    again = split_by_prompt(records[::-1], fraction, seed)[1]
    assert {r.where for r in again} == {r.where for r in held_out}


@given(st.binary(max_size=300))
@settings(max_examples=300, deadline=None)
def test_random_bytes_are_rows_or_one_clean_refusal(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("fuzz") / "d.jsonl"
    path.write_bytes(data)
    with contextlib.suppress(RlhfError):
        sources.load_prompts(DataSection(path=str(path)))
