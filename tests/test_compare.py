"""Two policies on the same prompts: win rates by hand and by brute force, slices, regressions, the exit code."""

from __future__ import annotations

import json
import math

import numpy
import pytest
import torch

from rlhf.commands.compare import _figures as figure_rows
from rlhf.commands.compare import refuse_if_worse
from rlhf.commands.score import scored_rows
from rlhf.errors import RlhfError
from rlhf.evaluation import comparison, contradictions
from rlhf.evaluation.comparison import Side
from rlhf.metrics import intervals, winrate
from rlhf.records import Message
from rlhf.scoring.scorer import Sample, Scores

GAPS = [-30.0, -4.0, 2.0, 9.0, 25.0, 40.0, 11.0, -8.0]
WINS = [0.0, 1.0, 0.5, 1.0, 1.0, 1.0, 0.0, 0.0]


def sample(prompt, response, finished=True):
    return Sample((Message("user", prompt),), response, [1], [2], finished, [2])


def negative_log_posterior(preference, effect, wins, covariate):
    """Term by term, as the docstring's model says."""
    total = 0.5 * (effect / 10) ** 2
    for win, x in zip(wins, covariate, strict=True):
        chance = 1 / (1 + math.exp(-(preference + effect * x)))
        total -= win * math.log(chance) + (1 - win) * math.log(1 - chance)
    return total


def by_search(wins, gaps):
    """The minimum on ever finer grids."""
    deviation = math.sqrt(sum((gap - sum(gaps) / len(gaps)) ** 2 for gap in gaps) / len(gaps))
    covariate = [math.tanh(gap / deviation) for gap in gaps]
    centre, width = (0.0, 0.0), 8.0
    while width > 1e-5:
        grid = [
            (centre[0] + i * width / 10, centre[1] + j * width / 10) for i in range(-10, 11) for j in range(-10, 11)
        ]
        centre, width = min(grid, key=lambda at: negative_log_posterior(*at, wins, covariate)), width / 4
    return centre


def test_the_length_model_is_the_most_likely_one():
    preference, effect = by_search(WINS, GAPS)
    found = winrate.length_model(WINS, GAPS)
    assert found.preference == pytest.approx(preference, abs=1e-4)
    assert found.length_effect == pytest.approx(effect, abs=1e-4)
    assert found.win_rate == pytest.approx(1 / (1 + math.exp(-preference)), abs=1e-4)


def test_a_candidate_that_wins_by_length_alone_has_a_win_rate_of_one_half_at_equal_length():
    rng = numpy.random.default_rng(3)
    gaps = rng.normal(20, 20, 4000)
    wins = (rng.random(4000) < 1 / (1 + numpy.exp(-3 * numpy.tanh(gaps / gaps.std())))).astype(float)
    assert wins.mean() > 0.75
    assert winrate.length_model(wins, gaps).win_rate == pytest.approx(0.5, abs=0.04)


def test_the_length_model_at_its_edges():
    assert winrate.length_model(WINS, [0.0] * 8).win_rate == pytest.approx(sum(WINS) / 8)
    assert winrate.length_model(WINS, [5.0] * 8) is None
    assert winrate.length_controlled(WINS, [5.0] * 8, range(8)) is None
    assert winrate.length_model([1.0, 1.0, 1.0], [1.0, -2.0, 9.0]).win_rate == 1.0
    assert winrate.length_model([0.0, 0.0], [1.0, -2.0]).win_rate == 0.0
    told_by_length = winrate.length_model([0.0, 0.0, 1.0, 1.0], [-9.0, -9.0, 9.0, 9.0])
    assert told_by_length.win_rate == pytest.approx(0.5) and 5 < told_by_length.length_effect < 20
    for wins, gaps in (([], []), ([1.0], [1.0, 2.0])):
        with pytest.raises(ValueError, match="need outcomes"):
            winrate.length_model(wins, gaps)


def test_without_differences_in_length_the_interval_is_that_of_the_plain_win_rate():
    groups = ["a", "a", "b", "c", "c", "d", "e", "f"]
    found = winrate.length_controlled(WINS, [0.0] * 8, groups, 200, seed=7)
    plain = intervals.grouped_bootstrap(WINS, groups, 200, seed=7)
    assert (found.estimate, found.low, found.high) == pytest.approx((plain.estimate, plain.low, plain.high), abs=1e-9)


def sides():
    """Five prompts: a win, a loss, a tie, a win by ending, a loss by not ending."""
    baseline = [sample("p", "aa"), sample("p", "bb"), sample("qq", "c"), sample("rrr", "d", False), sample("rrr", "e")]
    candidate = [sample("p", "aaa"), sample("p", "b"), sample("qq", "c"), sample("rrr", "d"), sample("rrr", "e", False)]
    return (
        Side("old", baseline, numpy.array([1.0, 2.0, 3.0, 9.0, 1.0])),
        Side("new", candidate, numpy.array([2.0, 1.5, 3.0, 0.0, 4.0])),
    )


def test_a_report_by_hand():
    found = comparison.report(*sides(), {"kind": ["x", "x", "y", "y", "y"]}, 0, 100, 5)
    assert comparison.wins(*sides()).tolist() == [1.0, 0.0, 0.5, 1.0, 0.0]
    assert comparison.length_gaps(*sides()).tolist() == [1.0, -1.0, 0.0, 0.0, 0.0]
    assert (found["prompts"], found["comparisons"], found["ties"]) == (3, 5, 1)
    assert found["win_rate"]["estimate"] == 0.5
    assert found["score_difference"]["estimate"] == pytest.approx((1 - 0.5 + 0 - 9 + 3) / 5)
    assert found["baseline"] == {
        "name": "old",
        "sampling": {},
        "score": 3.2,
        "characters": 7 / 5,
        "cut_off": 1,
        "cut_off_share": 1 / 5,
        "empty": 0,
    }
    ended = found["both_ended"]  # the first three rows, of two prompts
    assert (ended["comparisons"], ended["prompts"], ended["few"]) == (3, 2, True)
    assert ended["win_rate"]["estimate"] == 0.5 and ended["score_difference"]["estimate"] == pytest.approx(0.5 / 3)
    x, y = found["slices"]["kind"]
    assert [one["cut_off"] for one in (x, y)] == [
        {"baseline": 0, "candidate": 0},
        {"baseline": 1, "candidate": 1},
    ]
    assert (x["slice"], x["prompts"], x["win_rate"]["estimate"], x["few"]) == ("x", 1, 0.5, True)
    assert y["score_difference"] == pytest.approx(-2.0)
    assert [entry["candidate"]["response"] for entry in found["worst"]] == ["e", "b"]
    json.dumps(found, allow_nan=False)


def test_thirds_keep_equal_prompts_together():
    prompts = [(Message("user", "x" * n),) for n in (1, 1, 1, 5, 5, 9, 12)]
    found = comparison.thirds_by_length(prompts)
    assert len(set(found[:3])) == 1 and found[3] == found[4] and len(set(found)) == 3


def figures(score, rate, ended_score=None, ended_rate=None, equal=None, cut_off=(0, 0), few=False):
    """A report of 40 prompts with these intervals, each figure in the middle of its own."""

    def figure(bounds):
        return bounds and {"estimate": sum(bounds) / 2, "ci95": list(bounds)}

    sides = [{"cut_off": count, "sampling": {"max_new_tokens": 64}} for count in cut_off]
    return {
        "baseline": sides[0],
        "candidate": sides[1],
        "comparisons": 40,
        "prompts": 40,
        "few": False,
        "score_difference": figure(score),
        "win_rate": figure(rate),
        "length_controlled_win_rate": figure(equal),
        "both_ended": {
            "comparisons": 40 - sum(cut_off),
            "few": few,
            "win_rate": figure(ended_rate or rate),
            "score_difference": figure(ended_score or score),
        },
    }


@pytest.mark.parametrize(
    ("found", "worse"),
    [
        (figures((-1, 1), (0.3, 0.49)), ["win rate 0.395", "win rate where both ended 0.395"]),
        (figures((-1, 1), (0.6, 0.9), equal=(0.1, 0.4)), ["win rate at equal length 0.250"]),
        (figures((-1, 1), (0.3, 0.5)), []),
        (figures((-1.0, -0.2), (0.8, 0.9)), ["score difference -0.600"]),
        (figures((-1, 1), (0.8, 0.9), ended_rate=(0.2, 0.4)), ["win rate where both ended 0.300"]),
        (figures((-1, 1), (0.8, 0.9), ended_rate=(0.2, 0.4), few=True), []),
    ],
)
def test_worse_is_the_whole_interval_of_the_score_or_of_a_win_rate(found, worse):
    shown = comparison.is_worse(found)
    assert [one.split(" [")[0] for one in shown] == worse


@pytest.mark.parametrize(
    ("found", "says"),
    [
        (figures((-1, 1), (0.4, 0.6)), None),
        (figures((0.1, 1), (0.6, 0.8), equal=(0.55, 0.8), cut_off=(3, 1)), None),
        (figures((-1, -0.1), (0.4, 0.6)), None),
        (
            figures((-1.0, -0.2), (0.6, 0.8)),
            "The figures contradict each other: the candidate is better by the win rate, 0.700 [0.600, 0.800], and "
            "worse by the score, -0.600 [-1.000, -0.200].",
        ),
        (
            figures((0.1, 1), (0.6, 0.8), ended_rate=(0.4, 0.7), cut_off=(0, 20)),
            "The figures contradict each other: 0 of 40 responses of the baseline and 20 of 40 responses of the "
            "candidate (max_new_tokens 64) were cut off, and each counts as lost to one that ended; in the 20 "
            "comparisons in which both ended the win rate is 0.550 [0.400, 0.700] and the score difference +0.550 "
            "[+0.100, +1.000].",
        ),
        (figures((0.1, 1), (0.6, 0.8), cut_off=(33, 0), few=True), "in the only 7 comparisons in which both ended"),
        (figures((0.1, 1), (0.6, 0.8), ended_score=(-1, 1), cut_off=(9, 0)), None),
        (figures((0.1, 1), (0.6, 0.8), ended_score=(-1, -0.5), cut_off=(9, 0)), "the score difference -0.750"),
        (figures((0.1, 1), (0.6, 0.8), cut_off=(40, 0)), "there is no comparison in which both ended."),
        (
            figures((0.1, 1), (0.6, 0.8), equal=(0.4, 0.7)),
            "Length explains the win rate: it is 0.700 [0.600, 0.800], but 0.550 [0.400, 0.700] at equal length, which "
            "says that the candidate is not shown to be different.",
        ),
    ],
)
def test_figures_that_contradict_each_other_are_said_in_one_sentence(found, says):
    shown = contradictions.sentence(found)
    assert (shown is None) == (says is None)
    if says:
        assert says in shown and "\n" not in shown and ". " not in shown.rstrip(".")


def test_a_baseline_that_was_cut_off_cannot_be_misread_as_a_better_candidate():
    """47 of 62 answers cut off: 47 wins; of the other 15 comparisons 5 won, 1 tied, 9 lost; each loses score."""
    gaps = [-0.9] * 47 + [0.5] * 5 + [0.0] + [-0.88] * 9
    baseline = [sample(f"p{n}", "a" * 9, finished=n >= 47) for n in range(62)]
    candidate = [sample(f"p{n}", "b" * (7 + n % 5)) for n in range(62)]
    limits = [{"max_new_tokens": n, "temperature": 1.0, "stop_tokens": [], "top_p": 1.0} for n in (64, 256)]
    sides = [
        Side("sft", baseline, numpy.full(62, 2.0), limits[0]),
        Side("ppo", candidate, 2.0 + numpy.array(gaps), limits[1]),
    ]
    found = comparison.report(*sides, {}, 0, 1000, 3)
    assert (found["baseline"]["cut_off"], found["candidate"]["cut_off"]) == (47, 0)
    assert found["win_rate"]["estimate"] == pytest.approx(52.5 / 62)
    assert found["score_difference"]["estimate"] == pytest.approx(-47.72 / 62)
    ended = found["both_ended"]
    assert (ended["comparisons"], ended["prompts"], ended["few"]) == (15, 15, False)
    assert ended["win_rate"]["estimate"] == pytest.approx(5.5 / 15)
    assert ended["score_difference"]["estimate"] == pytest.approx(-5.42 / 15)
    text = found["contradiction"]
    assert text.startswith("The figures contradict each other: the candidate is better by the win rate, 0.847 [")
    for part in (
        "and worse by the score, -0.770 [",
        "47 of 62 responses of the baseline (max_new_tokens 64) and 0 of 62",
        "in the 15 comparisons in which both ended the win rate is 0.367 [",
        "and the score difference -0.361 [",
    ):
        assert part in text, text
    rows = figure_rows(found)
    assert [name.strip() for name, _ in rows[1:5]] == [
        "score, candidate - baseline",
        "where both ended, 15 of 62",
        "win rate, a cut-off response loses",
        "where both ended, 15 of 62",
    ]
    assert ("cut off", "47 (76%) at 64 tokens -> 0 (0%) at 256 tokens") in rows
    with pytest.raises(RlhfError, match=r"VER001.*ppo: is worse than sft: score difference -0.770 \[") as stop:
        refuse_if_worse(found)
    assert stop.value.exit_code == 10
    json.dumps(found, allow_nan=False)


def test_scores_come_with_the_spread_of_their_members_and_every_head():
    scores = Scores(
        torch.tensor([2.0]), torch.tensor([[1.0, 3.0]]), {"a": torch.tensor([2.0]), "b": torch.tensor([5.0])}
    )
    (row,) = scored_rows([sample("p", "r")], scores)
    assert (row["score"], row["members"], row["heads"]) == (2.0, [1.0, 3.0], {"a": 2.0, "b": 5.0})
    (row,) = scored_rows([sample("p", "r")], Scores(torch.tensor([2.0])))
    assert set(row) == {"prompt", "response", "score"}


def shorter(prompts, responses):
    return [-float(len(response)) for response in responses]


def words(prompts, responses):
    return [float(len(response.split())) for response in responses]


def test_a_policy_against_itself_is_all_ties_and_the_command_says_what_it_is_told(here, tmp_path):
    (tmp_path / "p.jsonl").write_text(
        "".join(json.dumps({"prompt": f"where is my chair {n} ?", "kind": n % 2}) + "\n" for n in range(6))
    )
    command = [
        "compare",
        "demo:base",
        "demo:base",
        "--prompts",
        tmp_path / "p.jsonl",
        "--reward",
        "test_compare:shorter",
        "--reward",
        "test_compare:words",
        "--max-new-tokens",
        "8",
        "--resamples",
        "100",
        "--fail-if-worse",
    ]
    code, shown = here(*command, "-n", "2", "--slice-by", "kind", "--out", tmp_path / "out", "--json")
    assert code == 0, shown
    found = json.loads((tmp_path / "out" / "report.json").read_text())
    assert (found["ties"], found["comparisons"], found["win_rate"]["estimate"]) == (12, 12, 0.5)
    assert [(entry["slice"], entry["prompts"]) for entry in found["slices"]["kind"]] == [("0", 3), ("1", 3)]
    rows = [json.loads(line) for line in (tmp_path / "out" / "rows.jsonl").read_text().splitlines()]
    assert [row["policy"] for row in rows[:2]] == ["baseline", "candidate"] and len(rows) == 24
    one = rows[5]
    assert one["score"] == pytest.approx((len(one["response"].split()) - len(one["response"])) / 2)
    code, shown = here(*command, "--slice-by", "colour")
    assert code == 3 and "p.jsonl:1: 'colour': missing (this row has: prompt, kind)" in shown
    code, shown = here(*command[:6], tmp_path / "nowhere")
    assert code == 5 and "CKP001" in shown
