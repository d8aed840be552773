"""The forms of TRL, ShareGPT and Alpaca: one record each; what is ambiguous or of no use is refused with the reason."""

from __future__ import annotations

import contextlib
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf.config.sections import DataSection
from rlhf.data import sources
from rlhf.data.rows import UNCOMPARED
from rlhf.errors import RlhfError
from rlhf.records import Message

LOADERS = {
    "demonstrations": sources.load_demonstrations,
    "comparisons": sources.load_comparisons,
    "prompts": sources.load_prompts,
}
U, A, B, S = (
    {"role": role, "content": text}
    for role, text in (("user", "q"), ("assistant", "a"), ("assistant", "b"), ("system", "s"))
)
HUMAN, GPT = {"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}
SAID = (Message("user", "q"), Message("assistant", "a"))
SPOKEN = "\n\nHuman: q\n\nAssistant: a"


def load(tmp_path, kind, rows, **options):
    path = tmp_path / "d.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return LOADERS[kind](DataSection(path=str(path), **options))


def refusal(tmp_path, kind, rows, on_bad_row="error", **options):
    with pytest.raises(RlhfError) as caught:
        load(tmp_path, kind, rows, on_bad_row=on_bad_row, **options)
    assert caught.value.exit_code == 3
    return str(caught.value)


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [U, A]},
        {"prompt": [U], "completion": [A]},
        {"prompt": "q", "completion": "a"},
        {"conversations": [HUMAN, GPT]},
        {"conversations": [U, A]},
        {"conversations": [HUMAN, GPT], "system": ""},
        {"conversations": [{"from": "user", "value": "q"}, {"from": "chatgpt", "value": "a"}]},
        {"instruction": "q", "input": "", "output": "a"},
        {"instruction": "q", "output": "a", "input": None},
        {"text": SPOKEN},
        {"messages": [U, A], "prompt": "q", "completion": "a"},
        {"instruction": "q", "input": "", "output": "a", "text": "### Instruction: q ### Response: a"},
    ],
)
def test_a_demonstration_in_every_form_of_the_ecosystem_is_one_record(tmp_path, row):
    assert load(tmp_path, "demonstrations", [row]).records[0].messages == SAID


@pytest.mark.parametrize(
    ("row", "wanted"),
    [
        ({"conversations": [{"from": "system", "value": "s"}, HUMAN, GPT]}, [("system", "s"), ("user", "q")]),
        ({"conversations": [HUMAN, GPT], "system": "s"}, [("system", "s"), ("user", "q")]),
        ({"instruction": "q", "input": "x", "output": "a"}, [("user", "q\nx")]),
        (
            {"instruction": "q", "output": "a", "system": "s", "history": [["o", "p"]]},
            [("system", "s"), ("user", "o"), ("assistant", "p"), ("user", "q")],
        ),
    ],
)
def test_system_history_and_input_stand_where_they_belong(tmp_path, row, wanted):
    (record,) = load(tmp_path, "demonstrations", [row]).records
    assert [(m.role, m.content) for m in record.messages] == [*wanted, ("assistant", "a")]


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "q", "chosen": "a", "rejected": "b"},
        {"prompt": [U], "chosen": [A], "rejected": [B]},
        {"chosen": [U, A], "rejected": [U, B]},
        {"instruction": "q", "chosen": "a", "rejected": "b", "input": ""},
        {"conversations": [HUMAN], "chosen": GPT, "rejected": {"from": "gpt", "value": "b"}},
        {"conversations": [U], "chosen": A, "rejected": B},
        {"instruction": "q", "prompt": "q", "chosen": "a", "rejected": "b"},
    ],
)
def test_a_preference_in_every_form_of_the_ecosystem_is_one_comparison(tmp_path, row):
    (record,) = load(tmp_path, "comparisons", [row]).records
    (judgement,) = record.judgements
    assert record.prompt == SAID[:1] and (judgement.first, judgement.second) == (0, 1)
    assert record.responses == ("a", "b")


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "q"},
        {"prompt": [U]},
        {"messages": [U, A]},
        {"conversations": [HUMAN, GPT]},
        {"instruction": "q"},
        {"conversations": [HUMAN]},
        {"chosen": [U, A], "rejected": [U, B]},
        {"text": SPOKEN},
        {"chosen": SPOKEN, "rejected": SPOKEN.replace(": a", ": b")},
        {"prompt": "q", "messages": [U, A]},
    ],
)
def test_a_prompt_in_every_form_of_the_ecosystem_is_one_record(tmp_path, row):
    assert load(tmp_path, "prompts", [row]).records[0].messages == SAID[:1]


@pytest.mark.parametrize(
    ("kind", "row", "wanted"),
    [
        (
            "demonstrations",
            {"messages": [U, A], "prompt": "q", "completion": "z"},
            "has the fields of two forms, prompt-completion and messages, which say different things: set form",
        ),
        ("demonstrations", {"prompt": "q", "completion": "a", "response": "z"}, "completion and prompt-response"),
        ("prompts", {"prompt": "q", "messages": [U, A, U]}, "two forms, prompt and messages"),
        ("comparisons", {"instruction": "z", "prompt": "q", "chosen": "a", "rejected": "b"}, "forms, pair and alpaca"),
        ("demonstrations", {"text": "once upon a time"}, "language modelling"),
        ("demonstrations", {"prompt": "q", "completions": ["a"], "labels": [True]}, "process rewards"),
        ("comparisons", {"prompt": "q", "completions": ["a"], "labels": [True]}, "process rewards"),
        (
            "demonstrations",
            {"conversations": [HUMAN, {"from": "function_call", "value": "{}"}]},
            "'conversations[1].from': need system, human or gpt, got 'function_call'",
        ),
        (
            "demonstrations",
            {"conversations": [{"from": "system", "value": "s"}, HUMAN, GPT], "system": "t"},
            "'system': the conversation has a system turn of its own",
        ),
        ("demonstrations", {"conversations": [GPT, HUMAN]}, "must end with a turn of the assistant"),
        ("demonstrations", {"conversations": [GPT, HUMAN, GPT]}, "must alternate"),
        ("demonstrations", {"conversations": []}, "need a list of turns"),
        ("demonstrations", {"conversations": ["q"]}, "need an object with from and value"),
        ("demonstrations", {"instruction": "q"}, "'output': missing"),
        ("demonstrations", {"instruction": "q", "output": "a", "history": [["x"]]}, "'history[0]': need"),
        ("demonstrations", {"messages": [U, {**A, "tool_calls": [{"name": "f"}]}]}, "'messages[1].tool_calls'"),
        ("comparisons", {"conversations": [HUMAN], "chosen": HUMAN, "rejected": GPT}, "need a turn of the assistant"),
        ("comparisons", {"prompt": "q", "completion": "a", "label": 1}, "'label': need true or false, got 1"),
    ],
)
def test_what_is_ambiguous_or_cannot_be_said_here_is_refused_with_the_reason(tmp_path, kind, row, wanted):
    assert wanted in refusal(tmp_path, kind, [row])


def test_the_form_that_the_config_names_settles_what_is_ambiguous(tmp_path):
    row = {"messages": [U, A], "prompt": "q", "completion": "z"}
    assert load(tmp_path, "demonstrations", [row], form="messages").records[0].messages == SAID
    (record,) = load(tmp_path, "demonstrations", [row], form="prompt-completion").records
    assert record.messages[-1].content == "z"
    assert "form ranking: demonstrations have no such form" in refusal(
        tmp_path, "demonstrations", [row], form="ranking"
    )


def test_chosen_responses_are_demonstrations_only_where_the_config_says_so(tmp_path):
    row = {"prompt": "q", "chosen": "a", "rejected": "b"}
    assert load(tmp_path, "demonstrations", [row], form="chosen").records[0].messages == SAID
    assert "'completion': missing" in refusal(tmp_path, "demonstrations", [row])


def test_labelled_responses_are_compared_within_a_prompt_good_with_bad(tmp_path):
    said = [("q", "a", True), ("r", "x", True), ("q", "b", False), ("q", "c", True), ("q", "d", False)]
    rows = [{"prompt": prompt, "completion": text, "label": label} for prompt, text, label in said]
    loaded = load(tmp_path, "comparisons", rows, max_dropped_fraction=0.2)
    (record,) = loaded.records
    found = {(record.responses[j.first], record.responses[j.second]) for j in record.judgements}
    assert found == {("a", "b"), ("a", "d"), ("c", "b"), ("c", "d")}
    assert loaded.num_dropped == {UNCOMPARED: 1} and loaded.num_rows == 5
    assert "4 labelled responses give 1 comparisons, one a prompt" in loaded.notes()
    assert "1 with nothing to compare with (first: " in refusal(tmp_path, "comparisons", rows)
    rows[2]["completion"] = "a"
    assert "labelled good and bad" in refusal(tmp_path, "comparisons", rows, max_dropped_fraction=1.0)


def test_fields_and_keys_of_turns_that_are_not_read_are_named(tmp_path):
    row = {"messages": [{**U, "id": 3}, A], "prompt": "q", "source": "x"}
    assert load(tmp_path, "demonstrations", [row]).warnings == ("ignored fields: messages[].id, prompt, source",)


def test_columns_reach_the_fields_of_every_form(tmp_path):
    row = {"dialogue": [HUMAN, GPT]}
    assert load(tmp_path, "demonstrations", [row], columns={"conversations": "dialogue"}).records[0].messages == SAID


PLAIN = st.none() | st.booleans() | st.integers(0, 2) | st.sampled_from(["", "q", "a", SPOKEN, "\0"])
TURN = st.dictionaries(st.sampled_from(["from", "value", "role", "content"]), PLAIN | st.just("human") | st.just("gpt"))
FIELDS = (
    "prompt", "completion", "response", "messages", "conversations", "system", "instruction", "input", "output", "text",
    "history", "chosen", "rejected", "label", "completions", "labels", "responses", "ranks", "margin", "votes",
    "probability",
)  # fmt: skip
ROW = st.dictionaries(st.sampled_from(FIELDS), PLAIN | TURN | st.lists(TURN | PLAIN, max_size=3), max_size=6)


@given(st.sampled_from(sorted(LOADERS)), st.lists(ROW, min_size=1, max_size=3))
@settings(max_examples=150, deadline=None)
def test_any_value_in_any_field_of_any_form_is_a_record_or_one_clean_refusal(tmp_path_factory, kind, rows):
    path = tmp_path_factory.getbasetemp() / "forms.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with contextlib.suppress(RlhfError):
        for record in LOADERS[kind](DataSection(path=str(path), max_dropped_fraction=1.0)).records:
            turns = getattr(record, "messages", ()) or record.prompt
            texts = [turn.content for turn in turns] + list(getattr(record, "responses", ()))
            assert texts and all(text.strip() for text in texts)
