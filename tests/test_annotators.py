"""Several annotators: agreement, consensus, who is reliable, and what a reward model is measured by."""

from __future__ import annotations

import itertools
import json
import math
import random
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy
import pytest
import tiny

from rlhf.config.sections import DataSection
from rlhf.config.train_rm import RewardConfig
from rlhf.data import agreement, consensus, deep, sources
from rlhf.demo.gold import judge
from rlhf.errors import RlhfError
from rlhf.hub import installed
from rlhf.records import Comparison, Judgement, Message
from rlhf.stages.train_rm import spec

SHARED = {"policy": "runs/sft", "data": {"path": "rows.jsonl"}, "epochs": 1}


def drawn(truth, accuracies, seed=0, ties=0.0):
    """Votes of annotators who are right with a known chance, on all items."""
    rng = random.Random(seed)
    return {
        (item, name): 0.5 if rng.random() < ties else float(true == (rng.random() < right))
        for item, true in enumerate(truth)
        for name, right in accuracies.items()
    }


def turned(votes, items):
    return {(item, name): 1 - value if item in items else value for (item, name), value in votes.items()}


def test_alpha_is_one_minus_observed_over_expected_disagreement():
    votes = {(0, "a"): 1.0, (0, "b"): 1.0, (1, "a"): 1.0, (1, "b"): 0.0, (2, "a"): 0.5, (2, "b"): 1.0, (3, "c"): 1.0}
    values = [[1, 1], [0, 0], [1, 0], [0, 1], [0.5, 1], [0.5, 0]]  # both orders of each item that has two votes
    observed = numpy.mean([(x - y) ** 2 for unit in values for x, y in itertools.permutations(unit, 2)])
    pooled = [value for unit in values for value in unit]
    expected = numpy.mean([(x - y) ** 2 for x, y in itertools.permutations(pooled, 2)])
    assert agreement.alpha(votes) == pytest.approx(1 - observed / expected)
    assert agreement.alpha(turned(votes, {0, 2})) == agreement.alpha(votes)
    assert agreement.alpha({(0, "a"): 1.0, (0, "b"): 1.0, (1, "a"): 1.0, (1, "b"): 1.0}) == 1
    assert agreement.alpha({(0, "a"): 1.0, (1, "b"): 0.0}) is None
    assert agreement.alpha({(0, "a"): 0.5, (0, "b"): 0.5}) is None


def test_a_majority_counts_ties_as_halves():
    votes = {(0, "a"): 1.0, (0, "b"): 0.5, (1, "a"): 1.0, (1, "b"): 0.0, (2, "a"): 0.0, (2, "b"): 0.0, (2, "c"): 1.0}
    assert agreement.majority(votes) == {0: 1.0, 1: 0.5, 2: 0.0}
    own = agreement.agreement(votes, {0: 0.9, 1: 0.5, 2: 0.1})
    assert own == {"a": pytest.approx(2.5 / 3), "b": pytest.approx(2 / 3), "c": 0.0}
    # a: with b's tie 1/2, against b 0, with b and c (a tie) 1/2
    assert agreement.agreement_with_others(votes)["a"] == pytest.approx(1 / 3)


def posterior(values, accuracies):
    """By Bayes' rule from a prior of 1/2, for annotators with one error rate each."""
    odds = sum((1 if value else -1) * math.log(accuracies[name] / (1 - accuracies[name])) for name, value in values)
    return 1 / (1 + math.exp(-odds))


def test_dawid_and_skene_weigh_annotators_by_reliability_and_find_it():
    rng = random.Random(1)
    truth = [rng.random() < 0.5 for _ in range(1500)]
    accuracies = {"a": 0.9, "b": 0.85, "c": 0.55, "d": 0.5, "e": 0.7}
    votes = drawn(truth, accuracies)
    chances, found = agreement.dawid_skene(votes)
    for name, right in accuracies.items():
        assert found[name].right == pytest.approx(right, abs=0.05) and found[name].tied_at_ties is None
        assert found[name].right + found[name].wrong == pytest.approx(1)
    own = {name: one.right for name, one in found.items()}
    for item in range(50):
        values = [(name, votes[item, name]) for name in accuracies]
        assert chances[item] == pytest.approx(posterior(values, own), abs=0.02)
    simple = agreement.majority(votes)
    right = [numpy.mean([(one[item] > 0.5) == true for item, true in enumerate(truth)]) for one in (chances, simple)]
    assert right[0] > right[1] + 0.02


def test_which_response_stands_first_changes_nothing():
    truth = [n % 3 > 0 for n in range(120)]
    votes = drawn(truth, {"a": 0.9, "b": 0.7, "c": 0.6}, ties=0.2)
    other = {item for item in range(120) if item % 2}
    chances, found = agreement.dawid_skene(votes)
    again, same = agreement.dawid_skene(turned(votes, other))
    assert sum(value == 0.5 for value in votes.values()) > 20
    for item, chance in chances.items():
        assert again[item] == pytest.approx(1 - chance if item in other else chance, abs=1e-9)
    for name, one in found.items():
        assert (same[name].right, same[name].tied_at_ties) == pytest.approx((one.right, one.tied_at_ties), abs=1e-9)
        assert one.right + one.tied + one.wrong == pytest.approx(1) and one.tied > 0.05


def row(responses, ranks, annotator=None, prompt="p", where="f:1"):
    pairs = [
        Judgement(i, j, 0.5 if ranks[i] == ranks[j] else 1.0, annotator=annotator)
        for i, j in itertools.permutations(range(len(ranks)), 2)
        if (ranks[i], i) < (ranks[j], j)
    ]
    return Comparison((Message("user", prompt),), tuple(responses), tuple(pairs), where)


def test_rows_on_the_same_responses_in_any_order_are_one_comparison():
    rows = [
        row("abc", [1, 2, 3], "x", where="f:1"),
        row("de", [1, 2], where="f:2"),
        row("cab", [3, 1, 2], "y", where="f:3"),
        row("bca", [1, 2, 3], "z", where="f:4"),
        row("ab", [1, 2], "x", prompt="q", where="f:5"),
        row("ba", [1, 2], "x", prompt="q", where="f:6"),
        row("abc", [1, 2, 2], "h", where="f:7"),
        row("gh", [1, 2], "h", where="f:8"),
    ]
    found = consensus.put_together(rows, "majority", ["h"], "f")
    assert [record.where for record in found.records] == ["f:1", "f:2", "f:5"]
    merged = {(one.first, one.second): one.probability for one in found.records[0].judgements}
    assert merged == {(0, 1): 1.0, (0, 2): 1.0, (1, 2): 1.0} and found.records[1] is rows[1]
    assert found.records[2].judgements[0].probability == 0.5  # one annotator who took both sides once
    report = found.report
    assert (report["pairs"], report["votes"], report["repeated"]) == (5, 14, 1)
    assert (report["ties"], report["pairs_of_held_out_alone"], report["rows_without_annotator"]) == (2, 1, 1)
    assert report["annotators"]["z"]["agreement"] == pytest.approx(1 / 3) and report["annotators"]["h"]["held_out"]
    # h: agrees on a over b and a over c, ties on b and c (half); nobody else judged his own pair
    assert report["annotators"]["h"]["agreement"] == pytest.approx(2.5 / 3)
    assert len(found.everyone) == 3 and found.everyone[2].where == "f:8"
    assert Counter(one.annotator for one in found.everyone[0].judgements) == {"x": 3, "y": 3, "z": 3, "h": 3}
    assert consensus.put_together(rows, None, ["h", "x"], "f").records == (rows[1], rows[2], rows[3])


def test_a_judgement_that_is_turned_round_takes_its_margin_along():
    first = Comparison((Message("user", "p"),), ("a", "b"), (Judgement(0, 1, margin=3.0, annotator="x"),), "f:1")
    second = Comparison((Message("user", "p"),), ("a", "b"), (Judgement(1, 0, margin=1.0, annotator="y"),), "f:2")
    third = replace(second, judgements=(Judgement(1, 0, margin=5.0, annotator="z"),))
    judgement = consensus.put_together([first, second, third], "majority", [], "f").records[0].judgements[0]
    assert (judgement.first, judgement.second, judgement.probability) == (1, 0, 1.0)
    assert judgement.margin == pytest.approx((-3 + 1 + 5) / 3)


def test_the_order_of_responses_in_rows_does_not_matter_and_one_vote_a_pair_has_no_alpha():
    loaded = sources.load_comparisons(DataSection(path="demo:preferences?size=25&annotators=3&careless=1"))
    flipped = [
        replace(
            record,
            responses=record.responses[::-1],
            judgements=tuple(replace(one, first=3 - one.first, second=3 - one.second) for one in record.judgements),
        )
        for record in loaded.records
    ]
    for how in ("majority", "dawid_skene"):
        one, other = (consensus.put_together(rows, how, [], "f") for rows in (loaded.records, flipped))
        assert one.report == other.report
        for a, b in zip(one.records, other.records, strict=True):
            said, again = (
                {
                    (r.responses[j.first], r.responses[j.second]): j.probability
                    for j in r.judgements
                    if j.probability > 0.5
                }
                for r in (a, b)
            )
            assert said == again
    alone = consensus.put_together(loaded.records[::3], "dawid_skene", [], "f")
    assert alone.report["alpha"] is None and "alpha undefined" in alone.notes()[0]
    assert all(j.probability == pytest.approx(1) for r in alone.records for j in r.judgements)


def test_the_consensus_of_the_embedded_world_is_nearer_to_gold_where_annotators_are_weighed():
    data = DataSection(path="demo:preferences?size=60&annotators=5&careless=0.8&careless_annotators=2")
    rows = sources.load_comparisons(data).records
    assert len(rows) == 300 and len({r.responses for r in rows[:5]}) > 1 and len({r.prompt for r in rows}) == 60
    right = {}
    for how in ("majority", "dawid_skene"):
        values = []
        for record in consensus.put_together(rows, how, [], "f").records:
            gold = [judge(record.prompt[0].content, text)["gold"] for text in record.responses]
            for one in record.judgements:
                if gold[one.first] != gold[one.second]:
                    ahead = 0.5 + 0.5 * math.copysign(1, gold[one.first] - gold[one.second])
                    values.append(0.5 if one.probability == 0.5 else ahead)
        right[how] = numpy.mean(values)
    assert right["dawid_skene"] > right["majority"] + 0.02


@pytest.mark.parametrize("options", ["annotators=-1", "annotators=x", "careless=0.5", "annotators=2&careless=2"])
def test_annotators_that_cannot_be_are_refused(options):
    with pytest.raises(RlhfError, match="DAT002"):
        sources.load_comparisons(DataSection(path=f"demo:preferences?size=2&{options}"))


@pytest.mark.parametrize(
    "rows, changes, said",
    [
        ([row("ab", [1, 2])], {"consensus": "majority"}, "DAT059.*no row names an annotator"),
        ([row("ab", [1, 2], "x")], {"hold_out_annotators": ["y"]}, "DAT062.*no annotator y.*one of x"),
        ([row("ab", [1, 2], "x")], {"hold_out_annotators": ["x"]}, "DAT062.*nobody is left"),
    ],
)
def test_annotators_who_are_not_there_are_refused(rows, changes, said):
    with pytest.raises(RlhfError, match=said):
        consensus.put_together(rows, changes.get("consensus"), changes.get("hold_out_annotators", []), "f")


def test_without_the_libraries_one_message_says_what_to_install(monkeypatch, tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"prompt": "p", "chosen": "a", "rejected": "b", "annotator": 7}\n')
    config = RewardConfig.model_validate({**SHARED, "data": {"path": str(tmp_path / "rows.jsonl")}})
    monkeypatch.setattr(installed.importlib.util, "find_spec", lambda name: None)
    (item,) = spec.STAGE.needs(config).inputs
    assert item.read(config.data, 0).annotated is None
    with pytest.raises(RlhfError, match=r"RES024.*crowd-kit and krippendorff.*'rlhf-pipeline\[annotators\]'"):
        replace(item.read, consensus="majority")(config.data)


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"loss": "outcome", "consensus": "majority"}, "single responses"),
        ({"loss": "plackett_luce", "consensus": "dawid_skene"}, "whole rankings"),
        (
            {"data": {"mixture": [{"path": "a", "weight": 2}, {"path": "b", "weight": 1}]}, "consensus": "majority"},
            "leave weights out",
        ),
    ],
)
def test_a_consensus_that_the_loss_cannot_use_is_refused(changes, said):
    with pytest.raises(ValueError, match=said):
        RewardConfig.model_validate({**SHARED, **changes})


def test_a_deep_check_tells_annotators_who_disagree_from_rows_that_contradict():
    rows = [
        row("ab", [1, 2], "x", where="f:1"),
        row("ba", [1, 2], "y", where="f:2"),
        row("ba", [1, 2], "x", where="f:3"),
    ]
    found = [(one.kind, one.where, one.level) for one in deep.contradictions(rows)]
    assert found == [("annotators disagree", "f:2", "warning"), ("contradiction", "f:3", "error")]
    assert not list(deep.duplicates([rows[0], row("ab", [1, 2], "z", where="f:9")]))
    said = next(deep.annotators(rows, "f")).what
    assert said.startswith("2 annotators, 2 votes on 1 pairs, Krippendorff's alpha")  # x took both sides: one tie
    assert not list(deep.annotators(rows[:1], "f"))


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A working directory with an SFT run, and pairs that three annotators judged, the last one the wrong way round."""
    where = tmp_path_factory.mktemp("annotators")
    tiny.finished_sft(where)
    rows = [
        {"prompt": f"hi {n}", "chosen": f"ok {n}", "rejected": f"no {n}", "annotator": name}
        if name != "c"
        else {"prompt": f"hi {n}", "chosen": f"no {n}", "rejected": f"ok {n}", "annotator": name}
        for n in range(20)
        for name in "abc"
    ]
    (where / "rows.jsonl").write_text("".join(json.dumps(one) + "\n" for one in rows))
    return where


def test_a_run_is_measured_on_annotators_that_it_was_not_trained_on(home, here, monkeypatch):
    monkeypatch.chdir(home)
    Path("c.yaml").write_text(
        json.dumps(
            {
                **SHARED,
                "run_dir": "runs/c",
                "max_length": 64,
                "epochs": 20,
                "holdout_fraction": 0.3,
                "standardise_samples": 8,
                "optim": {"learning_rate": 1e-2},
                "batch": {"batch_size": 7, "micro_batch_size": 7},
                "sampling": {"max_new_tokens": 6},
                "consensus": "dawid_skene",
                "hold_out_annotators": ["c"],
            }
        )
    )
    code, said = here("train-rm", "-c", "c.yaml")
    assert code == 0, said
    assert "consensus dawid_skene: 60 rows became 20" in said and "held out, and not trained on: annotators c" in said
    report = json.loads(Path("runs/c/annotators.json").read_text())
    one, other = report["annotators"]["a"], report["annotators"]["c"]
    # he judges every pair the other way round, so that he is right where the model errs; six prompts are held out
    assert one["accuracy"]["comparisons"] == other["accuracy"]["comparisons"] == 6
    assert other["accuracy"]["estimate"] == pytest.approx(1 - one["accuracy"]["estimate"])
    assert other["agreement"] == 0 and other["agreement_with_others"] == 0 and one["agreement"] == 1
    assert one["reliability"]["right"] == pytest.approx(1) and other["reliability"] is None
    metrics = json.loads(Path("runs/c/manifest.json").read_text())["metrics"]
    assert metrics["eval/accuracy"] == pytest.approx(one["accuracy"]["estimate"]) and one["accuracy"]["estimate"] > 0.8
    assert metrics["eval/accuracy_held_out_annotators"] == pytest.approx(other["accuracy"]["estimate"])
    assert metrics["eval/annotators_alpha"] == report["alpha"] < 0
