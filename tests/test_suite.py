"""Edge cases as a regression test: gaps by hand, mistakes with their line, exit 10."""

from __future__ import annotations

import json

import pytest
import torch
from test_external_rewards import decoder

from rlhf.commands.compare import refuse_if_worse
from rlhf.config import suite_file as files
from rlhf.errors import RlhfError
from rlhf.evaluation import suite
from rlhf.scoring.scorer import Sample, Scores

CASES = """
cases:
  - name: says more
    prompt: where is my chair ?
    better: [aaaaa, aaaa]
    worse: [a, aaa]
  - name: much more
    history: [{role: system, content: be kind}, {role: user, content: hi}, {role: assistant, content: hello}]
    prompt: and my lamp ?
    better: [aaaa]
    worse: [aa]
    margin: 2
"""


class Lengths:
    def score(self, samples):
        return Scores(torch.tensor([float(len(one.response)) for one in samples]))


@pytest.fixture
def cases(tmp_path):
    (tmp_path / "suite.yaml").write_text(CASES)
    return files.read(tmp_path / "suite.yaml")


def answer(case, text, finished=True):
    return Sample(case.messages, text, [1], [2], finished, [2])


def test_every_better_answer_must_outrank_every_worse_one_by_more_than_the_margin(cases):
    first, second = suite.examine(cases, Lengths())
    assert (first["passed"], first["gap"], first["better"], first["worse"]) == (True, 1.0, "aaaa", "aaa")
    assert (second["passed"], second["gap"]) == (False, 2.0)
    assert [message.role for message in cases[1].messages] == ["system", "user", "assistant", "user"]
    with pytest.raises(
        RlhfError, match=r"VER002.*suite.yaml \(much more\).*'aaaa' must outrank 'aa' by more than 2"
    ) as bad:
        suite.refuse_failed([first, second], "suite.yaml")
    assert bad.value.exit_code == 10
    suite.refuse_failed([first], "suite.yaml")


def test_a_policy_passes_with_an_answer_that_ended_and_outranks_the_worse_ones(cases):
    found = suite.policy_outcomes(cases, [answer(cases[0], "aaaa"), answer(cases[1], "a" * 9, False)], Lengths())
    assert [(entry["passed"], entry["gap"]) for entry in found] == [(True, 1.0), (False, 7.0)]
    found = suite.policy_outcomes(cases, [answer(cases[0], "aaa"), answer(cases[1], "a" * 5)], Lengths())
    assert [entry["passed"] for entry in found] == [False, True]


def test_a_regression_is_what_the_judge_and_the_baseline_pass_and_the_candidate_does_not():
    names = ("kept", "lost", "never passed", "judge fails it")
    judge, baseline, candidate = (
        [{"case": name, "passed": passed} for name, passed in zip(names, own, strict=True)]
        for own in ((True, True, True, False), (True, True, False, True), (True, False, False, False))
    )
    assert suite.regressions(judge, baseline, candidate) == ["lost"]
    found = {
        "baseline": {"name": "old"},
        "candidate": {"name": "new"},
        "score_difference": {"ci95": [-1.0, 1.0]},
        "win_rate": {"ci95": [0.4, 0.6]},
        "both_ended": {"few": True},
        "length_controlled_win_rate": None,
        "suite": {"regressions": ["lost"]},
    }
    with pytest.raises(RlhfError, match="VER002.*new: fails the edge case 'lost', which the baseline passes"):
        refuse_if_worse(found)
    refuse_if_worse(found | {"suite": {"regressions": []}})


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("much more", "says more", "2 cases are called 'says more'"),
        ("[aa]", "[aaaa]", "'aaaa' stands in better and"),
        (", {role: assistant, content: hello}", "", "must alternate"),
        ("worse: [aa]", "worse: []", "worse"),
        ("margin", "margn", "12:5.*margn.*margin"),
        ("prompt: and my lamp ?", "prompt: ''", ":9:5 cases.1.prompt"),
    ],
)
def test_a_mistake_in_a_suite_is_named_with_its_line(tmp_path, old, new, says):
    (tmp_path / "suite.yaml").write_text(CASES.replace(old, new))
    with pytest.raises(RlhfError, match=f"suite.yaml.*({says})"):
        files.read(tmp_path / "suite.yaml")
    with pytest.raises(RlhfError, match="CFG001.*none.yaml"):
        files.read(tmp_path / "none.yaml")


def test_eval_rm_and_compare_run_it(here, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    decoder(tmp_path / "rm")
    rows = [{"prompt": f"p{n}", "chosen": "yes", "rejected": "no"} for n in range(3)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "eval-rm.yaml").write_text(
        "model: {path: rm}\ndata: {path: pairs.jsonl}\nmax_length: 100\nsuite: s.yaml\n"
    )
    code, shown = here("eval-rm", "-c", "eval-rm.yaml")
    assert code == 2 and "s.yaml: no such suite" in shown
    case = "cases: [{name: one way, prompt: hi, better: [%s], worse: [%s]}]\n"
    codes = {}
    for better, worse in (("yes", "no"), ("no", "yes")):
        (tmp_path / "s.yaml").write_text(case % (better, worse))
        codes[better], shown = here("eval-rm", "-c", "eval-rm.yaml", "--overwrite")
        found = json.loads((tmp_path / "runs/eval-rm/eval.json").read_text())["suite"][0]
        assert found["passed"] == (codes[better] == 0) and ("VER002" in shown) == (codes[better] == 10), shown
    assert sorted(codes.values()) == [0, 10]
    (tmp_path / "p.jsonl").write_text('{"prompt": "where is my chair ?"}\n{"prompt": "my lamp is broken ."}\n')
    (tmp_path / "s.yaml").write_text(case % ("aaaaaa", "aaa"))
    code, shown = here(
        "compare",
        "demo:base",
        "demo:base",
        "--prompts",
        "p.jsonl",
        "--reward",
        "test_compare:shorter",
        "--suite",
        "s.yaml",
        "--max-new-tokens",
        "8",
        "--resamples",
        "100",
        "--fail-if-worse",
        "--json",
    )
    assert code == 0, shown
    found = json.loads(shown.splitlines()[-1])["suite"]
    assert found["judge"][0]["passed"] is False and found["regressions"] == []
    assert found["baseline"] == found["candidate"]
