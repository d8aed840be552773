"""Hostile and half-broken data: each ends in one clean refusal that says where, never in a traceback or a hang."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf.config.sections import DataSection
from rlhf.data import sources
from rlhf.errors import RlhfError
from rlhf.records import Message

LOADERS = {
    "demonstrations": sources.load_demonstrations,
    "comparisons": sources.load_comparisons,
    "prompts": sources.load_prompts,
}
PAIR = {"prompt": "p", "chosen": "a", "rejected": "b"}


def load(tmp_path, kind, rows, **options):
    path = tmp_path / "d.jsonl"
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return LOADERS[kind](DataSection(path=str(path), **options))


def refusal(tmp_path, kind, rows, on_bad_row="error", **options):
    with pytest.raises(RlhfError) as caught:
        load(tmp_path, kind, rows, on_bad_row=on_bad_row, **options)
    assert caught.value.exit_code == 3
    return str(caught.value)


def spoken(*turns):
    return "".join(f"\n\n{'Human' if i % 2 == 0 else 'Assistant'}: {turn}" for i, turn in enumerate(turns))


@pytest.mark.parametrize(
    ("kind", "row", "wanted"),
    [
        ("prompts", f'{{"prompt": "a", "id": {"9" * 5000}}}', "too many digits"),
        (
            "comparisons",
            f'{{"prompt":"p","chosen":"a","rejected":"b","margin":{"9" * 400}}}',
            "'margin': need a finite number",
        ),
        ("comparisons", '{"prompt":"p","chosen":"a","rejected":"b","margin":-1e999}', "'margin': need a finite number"),
        ("prompts", "[" * 100_000, "nested too deeply"),
        ("prompts", '{"prompt": 1, "prompt": 1}', "key 'prompt' stands twice"),
    ],
    ids=["long number", "number beyond floats", "infinite", "deep", "twice"],
)
def test_numbers_and_nesting_beyond_the_interpreter_are_refused_by_line(tmp_path, kind, row, wanted):
    good = PAIR if kind == "comparisons" else {"prompt": "ok"}
    message = refusal(tmp_path, kind, [good, row])
    assert "d.jsonl:2: " in message and wanted in message and len(message) < 300


@pytest.mark.parametrize("twice", [False, True])
def test_a_line_of_many_keys_takes_linear_time(tmp_path, twice):
    keys = [f'"k{number}":0' for number in range(100_000)] + ['"k0":1'] * twice
    row = '{"prompt":"a",' + ",".join(keys) + "}"
    before = time.monotonic()
    if twice:
        assert "key 'k0' stands twice" in refusal(tmp_path, "prompts", [row])
    else:
        (warning,) = load(tmp_path, "prompts", [row]).warnings
        assert warning.endswith("and 99980 more")
    assert time.monotonic() - before < 5


def test_messages_hold_no_control_characters_of_the_data(tmp_path):
    rows = [
        '{"prompt": "\x1b[31mred',
        '{"a": "b", "\\u001b]0;x": 1}',
        '{"prompt": [{"role": "\\u001b", "content": "a"}]}',
    ]
    for row in rows:
        assert refusal(tmp_path, "prompts", [row]).isprintable()
    (warning,) = load(tmp_path, "prompts", ['{"prompt": "a", "\\ud800": 1}']).warnings
    assert warning.encode("utf-8")


def test_a_long_value_is_cut_in_the_message(tmp_path):
    rows = [{"prompt": [{"role": "x" * 100_000, "content": "a"}]}]
    assert len(refusal(tmp_path, "prompts", rows)) < 300


def test_a_line_too_long_is_named_together_with_what_was_wrong_before_it(tmp_path):
    message = refusal(tmp_path, "prompts", [{"prompt": 3}, json.dumps({"prompt": "x" * (17 << 20)})])
    assert "d.jsonl:1: 'prompt': need text, got int" in message and "d.jsonl:2: line longer than 16 MiB" in message


@pytest.mark.parametrize(
    ("chosen", "rejected", "wanted"),
    [
        (spoken("q", "a", "more"), spoken("q", "b"), "'chosen': must end with a turn of the assistant"),
        (spoken("q", "a"), spoken("q", "b", "more"), "'rejected': must end with a turn of the assistant"),
        (spoken("", "a"), spoken("", "b"), "'chosen[0].content': empty"),
        (spoken("q", "", "r", "a"), spoken("q", "", "r", "b"), "'chosen[1].content': empty"),
        (spoken("q", "a"), spoken("z", "b"), "one conversation with 'chosen' up to"),
        (spoken("q", "a", "r", "c"), spoken("q", "x", "r", "d"), "one conversation with 'chosen'"),
    ],
)
def test_transcripts_that_are_no_pair_of_answers_are_refused(tmp_path, chosen, rejected, wanted):
    assert wanted in refusal(tmp_path, "comparisons", [{"chosen": chosen, "rejected": rejected}])


def test_a_transcript_of_several_turns_keeps_them(tmp_path):
    row = {"chosen": spoken("q", "a", "r", "good"), "rejected": spoken("q", "a", "r", "bad")}
    record = load(tmp_path, "comparisons", [row]).records[0]
    assert record.prompt == (Message("user", "q"), Message("assistant", "a"), Message("user", "r"))
    assert record.responses == ("good", "bad")


def test_a_field_that_no_row_has_is_one_problem_whatever_else_the_rows_hold(tmp_path):
    rows = [{"prompt": "a", "chosen": "b"}, {"prompt": "a", "chosen": "b", "id": 3}, "{"]
    message = refusal(tmp_path, "comparisons", rows)
    assert "all 2 rows: no field 'rejected'; found chosen, id, prompt. Fix: columns" in message
    assert message.count("rejected") == 1 and "d.jsonl:3: invalid JSON" in message


def test_columns_are_fields_of_ours_and_a_row_without_one_is_told_in_the_names_of_the_data(tmp_path):
    message = refusal(tmp_path, "prompts", [{"prompt": "a", "q": "b"}], columns={"promt": "q"})
    assert "columns.promt: prompts have no such field" in message and "one of prompt, messages" in message
    rows, columns = [{"q": "a", "r": "b"}, {"q": "a"}], {"prompt": "q", "completion": "r"}
    message = refusal(tmp_path, "demonstrations", rows, columns=columns)
    assert "d.jsonl:2: 'completion': missing" in message and "columns.completion names 'r'" in message


def test_a_file_of_which_every_row_is_dropped_is_refused(tmp_path):
    rows = [{**PAIR, "rejected": "a"}] * 3
    assert "all 3 rows: 'chosen' equals 'rejected'" in refusal(
        tmp_path, "comparisons", rows, on_bad_row="drop", max_dropped_fraction=1.0
    )
    rows = [{**PAIR, "rejected": "a"}, {**PAIR, "chosen": ""}]
    message = refusal(tmp_path, "comparisons", rows, on_bad_row="drop", max_dropped_fraction=1.0)
    assert "d.jsonl:1: 'chosen' equals 'rejected'. No row can be used: 2 of 2 rows dropped" in message


@pytest.mark.parametrize("kind", LOADERS)
def test_a_name_no_file_can_have_is_refused(kind):
    with pytest.raises(RlhfError, match="DAT010"):
        LOADERS[kind](DataSection(path="a" * 5000 + ".jsonl"))


def test_a_hub_id_may_contain_a_dot_and_a_missing_file_is_no_hub_id(monkeypatch):
    datasets = pytest.importorskip("datasets")
    asked = []

    def load_dataset(path, name, revision):
        asked.append((path, name, revision))
        return datasets.DatasetDict(train=datasets.Dataset.from_list([{"prompt": "q"}]))

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    for path in ("org/data-v1.1", "squad", "org/data"):
        assert sources.load_prompts(DataSection(path=path, revision="abc")).records[0].where == f"{path}[0]"
    assert asked == [(path, None, "abc") for path in ("org/data-v1.1", "squad", "org/data")]
    for path in ("data/no.parquet", "no/such/place", "../up", "data/no/"):
        with pytest.raises(RlhfError, match="no such file"):
            sources.load_prompts(DataSection(path=path))


def test_reading_jsonl_imports_neither_torch_nor_datasets(tmp_path):
    (tmp_path / "d.jsonl").write_text('{"prompt": "q"}\n')
    code = (
        "import sys; from rlhf.data import sources; from rlhf.config.sections import DataSection\n"
        f"sources.load_prompts(DataSection(path={str(tmp_path / 'd.jsonl')!r}))\n"
        "assert not {'torch', 'datasets', 'pandas'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.just("q")
TURNS = st.lists(
    st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant", "system", 1, None]), "content": SCALARS}),
    max_size=3,
)
TRANSCRIPTS = st.lists(st.sampled_from(["\n\nHuman:", "\n\nAssistant:", " a", " b", ""]), max_size=6).map("".join)
VALUES = SCALARS | TURNS | TRANSCRIPTS | st.lists(st.integers(0, 3) | st.sampled_from(["a", "b"]), max_size=3)
FIELDS = ("prompt", "messages", "completion", "response", "chosen", "rejected", "margin", "responses", "ranks")


@given(st.sampled_from(sorted(LOADERS)), st.lists(st.dictionaries(st.sampled_from(FIELDS), VALUES), max_size=3))
@settings(max_examples=120, deadline=None)
def test_any_json_in_any_field_is_a_record_or_one_clean_refusal(tmp_path_factory, kind, rows):
    path = tmp_path_factory.getbasetemp() / "fuzz.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with contextlib.suppress(RlhfError):
        records = LOADERS[kind](DataSection(path=str(path))).records
        assert records
        for record in records:
            texts = [message.content for message in getattr(record, "messages", ()) or record.prompt]
            assert all(text.strip() for text in (*texts, *getattr(record, "responses", ())))


@pytest.mark.parametrize("setting", ["name", "split", "revision"])
def test_a_setting_that_means_nothing_for_the_data_is_refused(tmp_path, setting):
    datasets = pytest.importorskip("datasets")
    saved, table = str(tmp_path / "saved"), str(tmp_path / "d.parquet")
    data = datasets.Dataset.from_list([{"prompt": "q"}])
    data.save_to_disk(saved)
    data.to_parquet(table)
    assert setting in refusal(tmp_path, "prompts", [{"prompt": "q"}], **{setting: "train"})
    for path in ("demo:prompts?size=2", saved, table):
        with pytest.raises(RlhfError, match=f"DAT001.*{setting}"):
            sources.load_prompts(DataSection(path=path, **{setting: "train"}))
        assert sources.load_prompts(DataSection(path=path)).records


def test_a_split_of_a_saved_dictionary_is_read(tmp_path):
    datasets = pytest.importorskip("datasets")
    splits = {name: datasets.Dataset.from_list([{"prompt": name}]) for name in ("train", "test")}
    datasets.DatasetDict(splits).save_to_disk(str(tmp_path / "d"))
    (record,) = sources.load_prompts(DataSection(path=str(tmp_path / "d"), split="test")).records
    assert record.prompt[0].content == "test"
    with pytest.raises(RlhfError, match="splits are train, test; none is named"):
        sources.load_prompts(DataSection(path=str(tmp_path / "d")))


def test_blank_lines_are_counted(tmp_path):
    loaded = load(tmp_path, "prompts", ["", {"prompt": "q"}, "  ", {"prompt": "r"}])
    assert loaded.num_rows == 2 and loaded.notes() == ["blank lines skipped: 2"]


@pytest.mark.parametrize("field", ["chosen", "rejected", "margin"])
def test_a_ranking_with_a_part_of_a_pair_is_refused(tmp_path, field):
    row = {"prompt": "p", "responses": ["a", "b"], "ranks": [1, 2], field: "c"}
    assert f"'{field}': belongs to a pair" in refusal(tmp_path, "comparisons", [row])


def test_a_bad_turn_is_named_by_the_field_that_it_stands_in(tmp_path):
    head = [{"role": "assistant", "content": "x"}]
    assert "'prompt[0].role'" in refusal(tmp_path, "demonstrations", [{"prompt": head, "completion": "y"}])
    row = {"prompt": "q", "completion": [{"role": "user", "content": "x"}]}
    assert "'completion" in refusal(tmp_path, "demonstrations", [row])


def test_the_digest_of_rows_is_of_their_content_not_of_the_spelling_of_their_path(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.chdir(tmp_path)
    datasets.Dataset.from_list([{"prompt": "q", "other": "r"}]).save_to_disk("d")
    one, two = (sources.load_prompts(DataSection(path=path)).digest for path in ("d", "./d"))
    other = sources.load_prompts(DataSection(path="d", columns={"prompt": "other"})).digest
    assert one == two != other
