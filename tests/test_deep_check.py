"""Every defect that a data set can have although its rows are sound, put there by hand and found at its line."""

from __future__ import annotations

import json

from rlhf.data import deep
from rlhf.records import Comparison, Demonstration, Judgement, Message, Prompt


def comparison(prompt, responses, order, where):
    """``order``: (better, worse) places, or (a, b, probability)."""
    return Comparison((Message("user", prompt),), tuple(responses), tuple(Judgement(*one) for one in order), where)


def demonstration(where, *texts):
    roles = ("user", "assistant")
    return Demonstration(tuple(Message(roles[n % 2], text) for n, text in enumerate(texts)), where)


def seen(found):
    return [(one.kind, one.where, one.level) for one in found]


def test_duplicates_are_told_but_for_case_and_space():
    rows = [
        demonstration("f:1", "Hi", "Yes  sir"),
        demonstration("f:2", "hi", "yes sir"),
        demonstration("f:3", "hi", "no"),
    ]
    (one,) = deep.duplicates(rows)
    assert (one.where, one.what, one.level) == ("f:2", "the same as f:1.", "warning")
    pairs = [comparison("p", ["a", "b"], [(0, 1)], "f:1"), comparison("p", ["a", "b"], [(1, 0)], "f:2")]
    assert list(deep.duplicates(pairs)) == []


def test_contradictions_are_found_through_rankings_and_soft_labels():
    rows = [
        comparison("p", ["a", "b", "c"], [(0, 1), (0, 2), (1, 2)], "f:1"),
        comparison("p", ["c", "a"], [(0, 1, 0.9)], "f:2"),
        comparison("p", ["c", "a"], [(0, 1, 0.2)], "f:3"),
        comparison("p", ["b", "a"], [(0, 1, 0.5)], "f:4"),
        comparison("q", ["b", "a"], [(0, 1)], "f:5"),
    ]
    found = list(deep.contradictions(rows))
    assert seen(found) == [("contradiction", "f:2", "error"), ("contradiction", "f:3", "error")]
    assert found[0].what == "prefers the response that f:1 rejects: 'c' over 'a'."
    assert found[1].what == "prefers the response that f:2 rejects: 'a' over 'c'." and found[0].code == "DAT070"


def test_ties_and_length_are_counted():
    rows = [
        comparison("p", ["aaa", "b"], [(0, 1)], "f:1"),
        comparison("p", ["aa", "bb"], [(0, 1)], "f:2"),
        comparison("p", ["a", "bb"], [(0, 1, 0.1)], "f:3"),
        comparison("p", ["a", "bb"], [(0, 1, 0.5)], "f:4"),
    ]
    assert [one.what for one in deep.ties(rows)] == ["1 of 1 pairs are ties."]
    (one,) = deep.length_wins(rows, "f")
    assert one.what.startswith("the longer response is preferred in 83.3% of 3 pairs") and one.level == "warning"
    (one,) = deep.length_wins([rows[1]], "f")
    assert "50.0% of 1 pairs" in one.what and one.level == "note"
    assert list(deep.length_wins([rows[3]], "f")) == []


def test_scripts_and_marks_in_the_text():
    latin = [demonstration(f"f:{n}", "where is my chair", "on its way to you") for n in range(3)]
    rows = [*latin, demonstration("f:9", "where is my chair", "ваш стул уже в пути"), demonstration("f:10", "??", "да")]
    (one,) = deep.scripts(rows)
    assert (one.where, one.what) == ("f:9", "CYRILLIC (assistant); most of the data is LATIN.")
    assert deep.script_of("私はその椅子を待っています、まだです") == "JAPANESE"
    rows = [demonstration("f:1", "hi", "fine\nHuman: and you?"), demonstration("f:2", "the user: is", "ok")]
    assert [(one.where, "'Human:'" in one.what) for one in deep.turn_marks(rows)] == [("f:1", True)]
    rows = [demonstration("f:1", "hi", "fine</s>"), demonstration("f:2", "a < b |> c", "[INST] x"), latin[0]]
    assert [one.where for one in deep.control_marks(rows)] == ["f:1", "f:2"]


def test_leaks_name_both_rows():
    trained = {"sft data": [demonstration("a:1", "Where is it?", "there")]}
    prompts = [Prompt((Message("user", "where  is it?"),), "b:4"), Prompt((Message("user", "why"),), "b:5")]
    (one,) = deep.leaks(trained, prompts, "measures", "DAT072")
    assert (one.where, one.level) == ("b:4", "error") and "a:1 (sft data)" in one.what
    assert [one.level for one in deep.leaks(trained, prompts, "measures", "")] == ["warning"]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_a_chain_is_read_in_tokens_before_any_run_and_errors_are_exit_3(here, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    asked = [{"prompt": f"where is order #{n} ?", "completion": "we look ."} for n in (11, 12, 13)]
    write(tmp_path / "sft.jsonl", asked)
    long = "we will trace your chair from order #15 today . " * 2
    pairs = [
        {"prompt": "where is my chair ?", "chosen": f"{long}hello", "rejected": f"{long}sorry"},
        {"prompt": "where is my lamp ?", "chosen": "today .", "rejected": "<|user|>"},
        {"prompt": "where is my bed ?", "chosen": "<bot> today .", "rejected": "no </s>"},
        {"prompt": "where is my desk ?", "chosen": "today .", "rejected": "no ."},
    ]
    write(tmp_path / "pairs.jsonl", pairs)
    write(tmp_path / "test.jsonl", [pairs[3], {"prompt": "where is order #12 ?", "chosen": "a", "rejected": "b"}])
    (tmp_path / "sft.yaml").write_text("data: {path: sft.jsonl}\nsteps: 1\n")
    (tmp_path / "train-rm.yaml").write_text(
        "data: {path: pairs.jsonl, on_bad_row: error}\nsteps: 1\nmax_length: 24\ntoo_long: truncate\n"
    )
    (tmp_path / "eval-rm.yaml").write_text("data: {path: test.jsonl}\nreward: runs/train-rm\n")
    files = ("sft.yaml", "train-rm.yaml", "eval-rm.yaml")
    code, _ = here("check", *files)
    assert code == 0
    code, shown = here("check", *files, "--deep")
    assert code == 3, shown
    assert "DAT071] pairs.jsonl:1: responses 1 and 2 are ranked differently, and the same tokens" in shown
    assert "DAT072] test.jsonl:1: measures on a prompt that is trained on: pairs.jsonl:4 (train-rm data)" in shown
    assert "warning, leakage: 1" in shown and "test.jsonl:2" in shown and "sft.jsonl:2 (sft data)" in shown
    assert shown.count("not checked: model weights.") == 3 and "token lengths" not in shown
    assert "warning, too long: 1" in shown and "more than 24: the end is cut" in shown
    code, shown = here("check", *files, "--deep", "--json")
    found = json.loads(shown[shown.index("[{") :].splitlines()[0])[1]["data"]["data"]["found"]
    marks = [(one["where"], one["level"]) for one in found if one["kind"] == "special token"]
    assert marks == [("pairs.jsonl:3", "error"), ("pairs.jsonl:2", "warning")]

    drop = ("check", "train-rm.yaml", "sft.yaml", "--deep", "--set", "data.on_bad_row=drop", "--set")
    code, shown = here(*drop, "data.max_dropped_fraction=0.5")
    assert code == 0 and "data: 4 rows." in shown and "warning, alike: 1" in shown, shown
    assert "data: 2 of 4 rows dropped: 1 with equal responses (first: pairs.jsonl:1), 1 with a special token" in shown
    code, shown = here(*drop, "data.max_dropped_fraction=0.49")
    assert code == 3 and "DAT020] pairs.jsonl: 2 of 4 rows (50.0%) would be dropped" in shown and "Fix: " in shown
