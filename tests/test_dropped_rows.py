"""Data as people have them: what is read, joined, dropped, counted and refused, in every form and stage."""

from __future__ import annotations

import ast
import csv
import gzip
import hashlib
import importlib
import json
from collections import Counter
from pathlib import Path

import pytest
import tiny

from rlhf.config.sections import DataSection
from rlhf.data import dropped, lines, reading, sources
from rlhf.errors import Problem, RlhfError
from rlhf.models.base import load_base
from rlhf.models.heads import ScalarHead
from rlhf.models.roles import SharedBase
from rlhf.preflight import prepare
from rlhf.records import Message
from rlhf.runs import artifacts
from rlhf.runs.artifacts import Manifest
from rlhf.stages.registry import STAGES

ROOT = Path(__file__).parents[1]
LONG = "x" * 120
U, A, B = ({"role": role, "content": text} for role, text in (("user", "q"), ("assistant", "a"), ("assistant", "b")))


def spoken(*turns):
    """("H", text), ("A", text) ... as a transcript."""
    names = {"H": "Human", "A": "Assistant"}
    return "".join(f"\n\n{names[speaker]}: {text}" for speaker, text in turns)


def pair(number, chosen=None, rejected="no", head=()):
    head = (("H", f"q{number}"), *head)
    return {
        "chosen": spoken(*head, ("A", f"a{number}" if chosen is None else chosen)),
        "rejected": spoken(*head, ("A", rejected)),
    }


def dirty():
    """100 lines with the faults of published files: 80 sound ones, and 5 with a speaker who goes on, 2 of them long."""
    strangers = [
        {"chosen": spoken(("H", f"s{n}"), ("A", "a")), "rejected": spoken(("H", f"t{n}"), ("A", "b"))} for n in range(2)
    ]
    rows = [
        *(pair(n) for n in range(80)),
        pair(80, head=(("H", "more"),)),
        pair(81, head=(("A", "one"), ("A", "two"), ("H", "more"))),
        pair(82, head=(("A", "and then"),)),
        *(pair(n, chosen="") for n in range(83, 87)),
        *strangers,
        *(pair(n, chosen="no") for n in range(89, 94)),
        *(pair(n, chosen=LONG) for n in range(94, 97)),
        *(pair(n, head=(("H", LONG),)) for n in range(97, 99)),
    ]
    return [*(json.dumps(row) for row in rows), '{"chosen": "\\n\\nHuman: cut off']


COUNTS = {
    "an empty answer": 4, "no shared prompt": 2, "equal responses": 5, "a broken line": 1, "too many tokens": 5,
}  # fmt: skip
OF_CHOSEN = {name: count for name, count in COUNTS.items() if name != "equal responses"}
OF_PROMPTS = OF_CHOSEN | {"too many tokens": 2}  # an answer's length is nothing to a prompt
BATCH = {"batch_size": 8, "micro_batch_size": 8}
STAGE_OF = {
    "sft": ("data", {"model": {"path": "m"}, "data": {"path": "d.jsonl", "form": "chosen"}, "max_length": 96,
                     "epochs": 1.0, "holdout_fraction": 0.3, "batch": BATCH, "sampling": {"max_new_tokens": 8}},
            OF_CHOSEN),
    "train-rm": ("data", {"policy": "runs/sft", "data": {"path": "d.jsonl"}, "max_length": 96, "epochs": 1.0,
                          "holdout_fraction": 0.3, "batch": BATCH, "sampling": {"max_new_tokens": 8}}, COUNTS),
    "eval-rm": ("data", {"reward": "runs/train-rm", "data": {"path": "d.jsonl"}, "max_length": 96}, COUNTS),
    "ppo": ("prompts", {"policy": "runs/sft", "rewards": [{"run": "runs/train-rm"}], "steps": 1,
                        "prompts": {"path": "d.jsonl", "max_tokens": 96}, "sampling": {"max_new_tokens": 8},
                        "batch": {**BATCH, "minibatch_size": 8}, "evaluation": {"holdout_fraction": 0.3}}, OF_PROMPTS),
    "collect": ("prompts", {"policy": "runs/sft", "labeller": {"run": "runs/train-rm"}, "prompts": {"path": "d.jsonl"},
                            "sampling": {"max_new_tokens": 8}}, OF_PROMPTS),
}  # fmt: skip


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A tiny model with its untrained SFT and reward runs, and the dirty file."""
    where = tmp_path_factory.mktemp("dropped")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(where)
        opened = load_base(str(tiny.build(Path("m"))))
        roles = SharedBase(opened)
        roles.add("policy", adapter=tiny.lora(opened))
        roles.add("reward", adapter=tiny.lora(opened), head=ScalarHead(opened.hidden_size))
        identity = artifacts.BaseIdentity("m", opened.digest, "float32")
        for slot, stage, kind in (("policy", "sft", "policy"), ("reward", "train-rm", "reward")):
            roles.save(slot, Path("runs") / stage)
            artifacts.write(Path("runs") / stage, Manifest(kind, stage, 0, {"a": 1}, {}, 1.0, base=identity))
        Path("d.jsonl").write_text("\n".join(dirty()) + "\n")
        yield where


def dry_run(stage, settings, key="data", **of_data):
    """The plan after a dry run, which tokenises."""
    settings = {"run_dir": "out", **settings, key: {**settings[key], **of_data}}
    config = STAGES[stage].config_class.model_validate(settings)
    plan = prepare.prepare(config, STAGES[stage].needs(config))
    importlib.import_module(STAGES[stage].module).dry_run(config, plan)
    return plan


@pytest.mark.parametrize("stage", STAGE_OF)
def test_every_stage_drops_the_same_dirt_counts_it_over_all_rows_and_bounds_it_as_one(home, stage):
    key, settings, counts = STAGE_OF[stage]
    total = sum(counts.values())
    plan = dry_run(stage, settings, key, max_dropped_fraction=total / 100)
    assert plan.dropped() == {key: {"rows": 100, "dropped": counts}}
    (sentence,) = plan.dropped_lines()
    assert sentence.startswith(f"{key}: {total} of 100 rows dropped: 4 with an empty answer (first: d.jsonl:84), ")
    assert any("5 rows (first: d.jsonl:81): turns of one speaker in a row were joined" in note for note in plan.notes())
    with pytest.raises(RlhfError) as caught:
        dry_run(stage, settings, key, max_dropped_fraction=total / 100 - 0.001)
    (problem,) = caught.value.problems
    assert problem.code == "DAT020" and f"{total} of 100 rows ({total:.1f}%) would be dropped" in problem.what
    assert all(f"{count} with {reason} (first: d.jsonl:" in problem.what for reason, count in counts.items())
    assert ("a larger max_length (now 96, " in problem.fix) == (stage in ("sft", "train-rm", "eval-rm"))
    assert ("too_long: truncate" in problem.fix) == (stage in ("sft", "train-rm"))
    assert f"max_dropped_fraction: {total / 100:g} (now " in problem.fix
    again = dropped.excess(plan.dropped()[key], total / 100 - 0.001, "data")
    assert again and again.what.startswith(problem.what.split(":")[0])
    assert dropped.excess(plan.dropped()[key], total / 100, "data") is None


def test_with_error_every_bad_row_is_named_and_too_long_ones_are_still_counted(home):
    with pytest.raises(RlhfError) as caught:
        dry_run("train-rm", STAGE_OF["train-rm"][1], on_bad_row="error")
    assert Counter(problem.code for problem in caught.value.problems) == {"DAT004": 6, "DAT012": 5, "DAT011": 1}
    kept = [line for line, text in enumerate(dirty()) if line < 83 or "x" * 120 in text]
    Path("long.jsonl").write_text("\n".join(dirty()[line] for line in kept) + "\n")
    plan = dry_run(
        "train-rm", STAGE_OF["train-rm"][1], path="long.jsonl", on_bad_row="error", max_dropped_fraction=0.06
    )
    assert plan.dropped()["data"] == {"rows": 88, "dropped": {"too many tokens": 5}}


def test_rows_that_differ_only_in_special_tokens_or_behind_the_cut_are_bad_rows_too(home):
    rows = [*(pair(n) for n in range(40)), pair(40, "a<|im_end|>b"), pair(41, LONG + "y", LONG + "z")]
    Path("odd.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = STAGE_OF["train-rm"][1] | {"too_long": "truncate"}
    plan = dry_run("train-rm", settings, path="odd.jsonl")
    assert plan.dropped()["data"]["dropped"] == {"a special token in the text": 1, "equal responses": 1}
    for text, code in (("a<|im_end|>b", "DAT060"), (None, "DAT050")):
        kept = [row for row in rows if (text or "x" * 120) in row["chosen"] or len(row["chosen"]) < 40]
        Path("one.jsonl").write_text("".join(json.dumps(row) + "\n" for row in kept if text or "<|" not in str(row)))
        with pytest.raises(RlhfError, match=code):
            dry_run("train-rm", settings, path="one.jsonl", on_bad_row="error")


def test_rows_that_a_mixture_leaves_out_are_bounded_with_the_others(home):
    rows = [*(pair(n) for n in range(60)), *(pair(n, chosen=LONG) for n in range(60, 70))]
    Path("b.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    Path("a.jsonl").write_text("".join(json.dumps(pair(n)) + "\n" for n in range(100, 130)))
    mixture = [{"path": "a.jsonl", "weight": 3.0}, {"path": "b.jsonl", "weight": 1.0}]
    settings = STAGE_OF["train-rm"][1] | {"data": {"mixture": mixture, "mixture_rows": 80}}
    plan = dry_run("train-rm", settings, max_dropped_fraction=0.1)
    assert plan.dropped()["data"] == {"rows": 100, "dropped": {"too many tokens": 10}}


SAID = (Message("user", "q\n\nr"), Message("assistant", "s\n\nt"), Message("user", "u"))
TURNS = [("user", "q"), ("user", "r"), ("assistant", "s"), ("assistant", "t"), ("user", "u")]
LISTED = [{"role": role, "content": text} for role, text in TURNS]
SHARED = [{"from": {"user": "human", "assistant": "gpt"}[role], "value": text} for role, text in TURNS]
TOLD = spoken(*(({"user": "H", "assistant": "A"}[role], text) for role, text in TURNS))
JOINED = {
    "demonstrations": [
        {"messages": [*LISTED, A]},
        {"prompt": LISTED, "completion": "a"},
        {"prompt": LISTED, "response": [A]},
        {"conversations": [*SHARED, {"from": "gpt", "value": "a"}]},
        {"text": TOLD + "\n\nAssistant: a"},
    ],
    "comparisons": [
        {"prompt": LISTED, "chosen": "a", "rejected": "b"},
        {"prompt": LISTED, "chosen": [A], "rejected": [B]},
        {"chosen": [*LISTED, A], "rejected": [*LISTED, B]},
        {"prompt": LISTED, "chosen": [*LISTED, A], "rejected": [*LISTED, B]},
        {"chosen": TOLD + "\n\nAssistant: a", "rejected": TOLD + "\n\nAssistant: b"},
        {"conversations": SHARED, "chosen": "a", "rejected": {"from": "gpt", "value": "b"}},
        {"prompt": LISTED, "responses": ["a", "b"], "ranks": [1, 2]},
        {"text": [TOLD + "\n\nAssistant: a", TOLD + "\n\nAssistant: b"], "score": [1.0, 0.0]},
    ],
    "prompts": [
        {"prompt": LISTED},
        {"messages": [*LISTED, A]},
        {"conversations": SHARED},
        {"text": TOLD},
        {"chosen": TOLD + "\n\nAssistant: a", "rejected": TOLD + "\n\nAssistant: b"},
        {"text": [TOLD + "\n\nAssistant: a", TOLD + "\n\nAssistant: b"], "score": [1.0, 0.0]},
    ],
}


def load(tmp_path, kind, rows, **settings):
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return getattr(sources, f"load_{kind}")(DataSection(path=str(tmp_path / "d.jsonl"), **settings))


@pytest.mark.parametrize("kind", JOINED)
def test_turns_of_one_speaker_in_a_row_are_one_turn_in_every_form(tmp_path, kind):
    loaded = load(tmp_path, kind, JOINED[kind])
    for record in loaded.records:
        assert record.prompt == SAID
        answers = getattr(record, "responses", ()) or [message.content for message in record.messages[len(SAID) :]]
        assert list(answers) == {"demonstrations": ["a"], "comparisons": ["a", "b"], "prompts": []}[kind]
    count = len(JOINED[kind])
    assert any(note.startswith(f"{count} rows (first: {tmp_path / 'd.jsonl'}:1): turns of") for note in loaded.notes())


def test_an_answer_after_a_turn_of_the_assistant_is_joined_with_it_for_both_alike_or_the_pair_is_bad(tmp_path):
    row = {
        "chosen": spoken(("H", "q"), ("A", "well"), ("A", "a")),
        "rejected": spoken(("H", "q"), ("A", "well"), ("A", "b")),
    }
    (record,) = load(tmp_path, "comparisons", [row]).records
    assert record.prompt == (Message("user", "q"),) and record.responses == ("well\n\na", "well\n\nb")
    uneven = [
        {"chosen": row["chosen"], "rejected": spoken(("H", "q"), ("A", "b"))},
        {"chosen": [U, A, A], "rejected": [U, B]},
    ]
    loaded = load(tmp_path, "comparisons", [row, *uneven], max_dropped_fraction=1.0)
    assert loaded.num_dropped == {"no shared prompt": 2} and len(loaded.records) == 1


def test_transcripts_with_scores_are_rankings_also_as_one_array(tmp_path):
    texts = [spoken(("H", "q"), ("A", text)) for text in ("x", "y", "z")]
    rows = [
        {"text": texts, "score": [0.2, 1, 0.2]},
        {"text": texts[:2], "score": [1, 1]},
        {"text": texts[:2], "score": [1, None]},
        {"text": texts[:1], "score": [1]},
        {"text": [texts[0], spoken(("H", "r"), ("A", "y"))], "score": [1, 0]},
        {"text": ["x", "y"], "score": [1, 0]},
        7,
    ]
    (tmp_path / "d.json").write_text(json.dumps(rows, indent=1))
    loaded = sources.load_comparisons(DataSection(path=str(tmp_path / "d.json"), max_dropped_fraction=1.0))
    (record,) = loaded.records
    assert record.where == f"{tmp_path / 'd.json'}[0]" and record.responses == ("x", "y", "z")
    order = {(j.first, j.second, j.probability) for j in record.judgements}
    assert order == {(1, 0, 1.0), (0, 2, 0.5), (1, 2, 1.0)}
    assert loaded.num_rows == 7 and loaded.num_dropped == {
        "no preference": 1,
        "a value that does not fit its field": 2,
        "no shared prompt": 1,
        "a form that no stage trains on": 1,
        "a broken line": 1,
    }
    prompts = sources.load_prompts(DataSection(path=str(tmp_path / "d.json"), max_dropped_fraction=1.0))
    assert {record.prompt for record in prompts.records} == {(Message("user", "q"),)}


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ('[{"prompt": "q"}, {"prompt": "r"', "d.json:1: invalid JSON at column"),
        ('[{"prompt": "q"}\n {"prompt": "r"}]', "d.json:2: invalid JSON at column 2: ',' or ']' expected"),
        ('[{"prompt": "q"}] x', "something follows the array"),
        ("[" * 100_000, "nested too deeply"),
        ("[]", "no rows"),
    ],
)
def test_an_array_whose_elements_cannot_be_told_apart_is_refused(tmp_path, text, wanted):
    (tmp_path / "d.json").write_text(text)
    with pytest.raises(RlhfError, match="DAT01") as caught:
        sources.load_prompts(DataSection(path=str(tmp_path / "d.json")))
    assert wanted in str(caught.value) and "Fix: " in str(caught.value)


def test_elements_of_an_array_and_lines_of_a_json_file_are_as_strict_as_jsonl(tmp_path):
    data = b'\xef\xbb\xbf [{"prompt": "q"}, {"prompt": "caf\xe9"}, {"prompt": "a", "prompt": "b"}, {"n": NaN}]'
    (tmp_path / "d.json").write_bytes(data)
    loaded = sources.load_prompts(DataSection(path=str(tmp_path / "d.json"), max_dropped_fraction=1.0))
    assert loaded.num_dropped == {"bytes that are not UTF-8": 1, "a broken line": 2} and loaded.num_rows == 4
    (tmp_path / "d.json.gz").write_bytes(gzip.compress(b'{"prompt": "q"}\n{"prompt": "r"}\n'))
    assert len(sources.load_prompts(DataSection(path=str(tmp_path / "d.json.gz"))).records) == 2


def table(path, rows, names, separator=","):
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, delimiter=separator)
        writer.writerows([names, *rows])


ROWS = [
    ("q1", 'a "quoted",\nanswer', "b", "0.5"),
    ("q2", "18", "None", ""),
    ("q3", "", "b", "1"),
    ("q4", "NA", "NA", "1"),
]
COLUMNS = {"prompt": "question", "chosen": "good", "rejected": "bad", "margin": "gap"}


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".parquet"])
def test_tables_are_read_under_foreign_names_and_empty_cells_are_bad_rows(tmp_path, suffix):
    path, names = tmp_path / f"d{suffix}", list(COLUMNS.values())
    if suffix == ".parquet":
        datasets = pytest.importorskip("datasets")
        cells = [(q, good or None, bad, float(gap) if gap else None) for q, good, bad, gap in ROWS]
        columns = {name: [row[place] for row in cells] for place, name in enumerate(names)}
        datasets.Dataset.from_dict(columns).to_parquet(str(path))
    else:
        table(path, ROWS, names, "\t" if suffix == ".tsv" else ",")
    loaded = sources.load_comparisons(DataSection(path=str(path), columns=COLUMNS, max_dropped_fraction=0.5))
    assert [record.responses for record in loaded.records] == [('a "quoted",\nanswer', "b"), ("18", "None")]
    assert [record.judgements[0].margin for record in loaded.records] == [0.5, None]
    assert loaded.num_dropped == {"a missing field": 1, "equal responses": 1}
    shown = sources.load_demonstrations(
        DataSection(path=str(path), columns={"prompt": "question", "completion": "good"}, max_dropped_fraction=0.25)
    )
    assert [record.messages[1].content for record in shown.records][1:] == ["18", "NA"]
    with pytest.raises(RlhfError, match=r"DAT003.*no field 'worse' \(columns.rejected\) in any row; found bad, gap"):
        sources.load_comparisons(DataSection(path=str(path), columns={**COLUMNS, "rejected": "worse"}))


def test_what_a_table_cannot_hold_is_named_by_its_line(tmp_path):
    path = tmp_path / "d.csv"
    path.write_bytes(b'prompt,completion,label\n"q\nr",a,TRUE\n\nq,a\nq,caf\xe9,false\nq,a,maybe\n"q\nr",b,false\n')
    loaded = sources.load_comparisons(DataSection(path=str(path), max_dropped_fraction=1.0, on_bad_row="drop"))
    assert loaded.num_rows == 5 and "blank lines skipped: 1" in loaded.notes()
    assert loaded.num_dropped == {
        "a broken line": 1,
        "bytes that are not UTF-8": 1,
        "a value that does not fit its field": 1,
    }
    assert loaded.records[0].prompt[0].content == "q\nr" and loaded.records[0].responses == ("a", "b")
    with pytest.raises(RlhfError) as caught:
        sources.load_comparisons(DataSection(path=str(path), on_bad_row="error"))
    places = [problem.where.rpartition(":")[2] for problem in caught.value.problems]
    assert places == ["5", "6", "7"] and "need true or false, got 'maybe'" in str(caught.value)
    for text, wanted in (
        ('prompt,completion\nq,"a\nq,b\n', "d.csv:2: broken quotes or cells"),
        ("prompt,prompt\nq,b\n", "d.csv:1: the header has twice: prompt"),
        ("prompt,completion\n", "no rows"),
    ):
        path.write_text(text)
        with pytest.raises(RlhfError) as caught:
            sources.load_demonstrations(DataSection(path=str(path)))
        assert wanted in str(caught.value) and "Fix: " in str(caught.value)


def test_commands_that_write_a_line_for_each_line_refuse_a_bad_row_and_name_no_setting(tmp_path):
    path = tmp_path / "d.jsonl"
    path.write_text('{"prompt": "q", "response": "a"}\n{"prompt": "q", "response": ""}\n')
    for read in (lines.load, lambda *args: lines.load_with(*args, (), ("finished",))):
        with pytest.raises(RlhfError) as caught:
            read(sources.load_demonstrations, str(path))
        (problem,) = caught.value.problems
        assert problem.where == f"{path}:2" and problem.fix == reading.FIX


def test_nothing_changes_for_a_data_set_without_bad_rows(tmp_path):
    """Digest and drawn rows as they were when bad rows were still refused."""
    loaded = sources.load_comparisons(DataSection(path="demo:preferences?size=300"))
    assert loaded.digest.startswith("b3364799da202d35") and loaded.num_dropped == {} and loaded.num_rows == 300
    mixture = [{"path": "demo:prompts?size=50", "weight": 1.0}, {"path": "demo:prompts?size=9&seed=1", "weight": 3.0}]
    drawn = sources.load_prompts(DataSection.model_validate({"mixture": mixture, "mixture_rows": 30}), 3)
    places = hashlib.sha256(repr([record.where for record in drawn.records]).encode()).hexdigest()
    assert drawn.digest.startswith("f484788c9e3d099b") and places.startswith("caa00d074f6be02c")


def data_problems():
    """(place, arguments) of every ``Problem("DAT..."`` in the package, also where the code stands behind a name."""
    for path in sorted((ROOT / "rlhf").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "Problem":
                code = node.args[0] if node.args else None
                is_other = isinstance(code, ast.Constant) and not str(code.value).startswith("DAT")
                if code is not None and not is_other and not isinstance(code, ast.JoinedStr):
                    yield f"{path.relative_to(ROOT)}:{node.lineno}", node


def test_every_data_problem_in_the_code_has_a_fix():
    found = list(data_problems())
    assert len(found) > 50
    for place, node in found:
        fix = node.args[3] if len(node.args) > 3 else next((k.value for k in node.keywords if k.arg == "fix"), None)
        assert fix is not None and not (isinstance(fix, ast.Constant) and not fix.value), place
        branches = [fix.body, fix.orelse] if isinstance(fix, ast.IfExp) else []
        assert not any(isinstance(part, ast.Constant) and not part.value for part in branches), place


def test_a_data_problem_without_a_fix_fails_the_test_that_makes_it():
    with pytest.raises(AssertionError, match="DAT999 has no fix"):
        Problem("DAT999", "d.jsonl:1", "is wrong.")
