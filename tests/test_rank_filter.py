"""Best of n by counting every draw; which rows a filter keeps, by hand."""

from __future__ import annotations

import json
import logging
import math
from itertools import combinations

import numpy
import pytest
import torch

from rlhf.commands import rank
from rlhf.commands.filter import Rules, select
from rlhf.data.duplicates import near_duplicates, overlap, shingles
from rlhf.data.selection import best_share, length_outliers
from rlhf.errors import RlhfError
from rlhf.metrics import best_of_n
from rlhf.records import Message
from rlhf.scoring.scorer import Sample, Scores


def sample(response, finished=True, prompt="p"):
    return Sample((Message("user", prompt),), response, [1], [2], finished, [2])


def by_every_draw(keys, values, n):
    """Mean over all draws of n of the value of the highest; equal keys by lot."""
    found = []
    for drawn in combinations(range(len(keys)), n):
        top = max(keys[index] for index in drawn)
        found.append(numpy.mean([values[index] for index in drawn if keys[index] == top]))
    return float(numpy.mean(found))


@pytest.mark.parametrize("n", range(1, 7))
def test_the_best_of_n_is_the_mean_over_every_draw(n):
    keys, values = [0.3, -1.0, 2.5, 0.3, 0.9, 0.3], [5.0, 1.0, -2.0, 7.0, 0.5, -9.0]
    assert best_of_n.best_of_n(keys, values, n) == pytest.approx(by_every_draw(keys, values, n), abs=1e-12)
    assert best_of_n.best_of_n(keys, keys, n) == pytest.approx(by_every_draw(keys, keys, n), abs=1e-12)


def test_the_weights_by_hand_and_at_the_ends():
    assert best_of_n.order_weights(4, 2).tolist() == [0, 1 / 6, 2 / 6, 3 / 6]
    assert best_of_n.order_weights(5, 1).tolist() == [0.2] * 5
    assert best_of_n.order_weights(300, 17).sum() == pytest.approx(1.0)
    assert best_of_n.best_of_n([1, 3, 2], [10.0, 30.0, 20.0], 3) == 30.0
    for n in (0, 4):
        with pytest.raises(ValueError, match="1 <= n <= 3"):
            best_of_n.order_weights(3, n)


def test_the_bound_is_the_divergence_where_no_two_samples_are_equal():
    """Over M equally likely, differently scored answers: KL = sum p log(p M), p_i = (i^n - (i-1)^n) / M^n."""
    m, n = 20_000, 4
    chances = [((i / m) ** n - ((i - 1) / m) ** n) for i in range(1, m + 1)]
    exact = sum(p * math.log(p * m) for p in chances)
    assert best_of_n.kl_bound(n) == pytest.approx(exact, abs=1e-3)
    few = [((i / 3) ** n - ((i - 1) / 3) ** n) for i in range(1, 4)]
    assert sum(p * math.log(p * 3) for p in few) < best_of_n.kl_bound(n)
    assert best_of_n.kl_bound(1) == 0.0 and best_of_n.sizes(6) == [1, 2, 4, 6] and best_of_n.sizes(8) == [1, 2, 4, 8]


def test_a_response_that_was_cut_off_ranks_behind_those_that_ended():
    responses = [sample("a"), sample("b", finished=False), sample("c"), sample("d")]
    scores = Scores(torch.tensor([1.0, 9.0, 3.0, 1.0]))
    rows = rank._rows(responses, scores, [0.1, 0.2, 0.3, 0.4], 4, None)
    assert [(row["response"], row["rank"], row["judge"]) for row in rows] == [
        ("c", 1, 0.3),
        ("a", 2, 0.1),
        ("d", 2, 0.4),
        ("b", 4, 0.2),
    ]
    assert [row["response"] for row in rank._rows(responses, scores, None, 2, 1)] == ["a", "c"]
    found = rank.worth(responses, scores, [0.1, 0.2, 0.3, 0.4], 4, 0)
    assert [entry["n"] for entry in found] == [1, 2, 4]
    assert found[0]["reward"]["estimate"] == pytest.approx(3.5) and found[2]["reward"]["estimate"] == 3.0
    assert found[2]["judge"]["estimate"] == pytest.approx(0.3, abs=1e-7)
    keys = [2.0, 0.0, 3.0, 2.0]
    assert found[1]["judge"]["estimate"] == pytest.approx(by_every_draw(keys, [0.1, 0.2, 0.3, 0.4], 2), abs=1e-7)


def test_an_empty_response_is_never_the_best_and_a_prompt_without_text_is_left_out(caplog):
    logging.getLogger("rlhf").propagate = True
    texts = [["", "b", " ", "d"], ["", "\n", "", ""], ["e", "", "f", "\0"]]
    ended = [[True, False, True, True], [True, False, True, True], [False, True, False, True]]
    responses = [
        sample(text, finished, prompt=f"p{n}")
        for n, group in enumerate(zip(texts, ended, strict=True))
        for text, finished in zip(*group, strict=True)
    ]
    kept = rank._with_text("policy", responses, 4)
    assert [one.prompt[0].content for one in kept] == ["p0"] * 4 + ["p2"] * 4
    assert "8 of 12 responses have no text" in caplog.text and "1 of 3 prompts are left out" in caplog.text
    assert "4 of 12 responses were cut off" in caplog.text
    scores = Scores(torch.tensor([9.0, 5.0, 8.0, 1.0, 2.0, 9.0, 3.0, 9.5]))
    rows = rank._rows(kept, scores, None, 4, None)
    assert [(row["response"], row["rank"], row["finished"]) for row in rows] == [
        ("d", 1, True),
        ("b", 2, False),
        ("f", 1, False),
        ("e", 2, False),
    ]
    keys = [(False, True, 9.0), (True, False, 5.0), (False, True, 8.0), (True, True, 1.0)]
    others = [(True, False, 2.0), (False, True, 9.0), (True, False, 3.0), (False, True, 9.5)]
    for entry in rank.worth(kept, scores, None, 4, 0):
        wanted = [by_every_draw(own, [key[2] for key in own], entry["n"]) for own in (keys, others)]
        assert entry["reward"]["estimate"] == pytest.approx(sum(wanted) / 2, abs=1e-6)
    with pytest.raises(RlhfError, match="DAT013.*policy: none of 4 responses has text"):
        rank._with_text("policy", responses[4:8], 4)


def test_rank_writes_rows_that_sft_reads_and_says_what_n_is_worth(here, tmp_path):
    (tmp_path / "p.jsonl").write_text('{"prompt": "where is my chair ?"}\n{"prompt": "the lamp is broken ."}\n')
    command = [
        "rank",
        "demo:base",
        "--prompts",
        tmp_path / "p.jsonl",
        "--reward",
        "test_compare:shorter",
        "--judge",
        "test_compare:words",
        "-n",
        "4",
        "--max-new-tokens",
        "40",
    ]
    code, shown = here(*command, "--out", tmp_path / "ranked.jsonl", "--json")
    assert code == 0, shown
    rows = [json.loads(line) for line in (tmp_path / "ranked.jsonl").read_text().splitlines()]
    assert len(rows) == 8 and all(row["score"] == -len(row["response"]) for row in rows)
    report = json.loads(shown.splitlines()[-1])
    found, num_cut = report["best_of"], sum(not row["finished"] for row in rows)
    assert (report["cut_off"], report["empty"], report["prompts_without_text"]) == (num_cut, 0, 0)
    ended = [[row for row in rows[start : start + 4] if row["finished"]] or rows[start : start + 4] for start in (0, 4)]
    best = [max(row["score"] for row in group) for group in ended]
    assert found[-1]["reward"]["estimate"] == pytest.approx(sum(best) / 2)
    assert found[0]["judge"]["estimate"] == pytest.approx(sum(row["judge"] for row in rows) / 8)
    code, shown = here(*command, "--json")
    assert code == 2 and "CFG040" in shown


def test_near_duplicates_are_those_that_comparing_every_pair_finds():
    rng = numpy.random.default_rng(5)
    texts = [" ".join(rng.choice(list("abcde"), rng.integers(1, 12))) for _ in range(300)]
    order = rng.permutation(300).tolist()
    for threshold in (0.3, 0.5, 0.8, 1.0):
        kept: list[int] = []
        wanted = {}
        for row in order:
            alike = [one for one in kept if overlap(shingles(texts[row]), shingles(texts[one])) >= threshold]
            if alike:
                wanted[row] = min(alike)
            else:
                kept.append(row)
        assert near_duplicates(texts, threshold, order) == wanted and wanted


def test_overlap_by_hand():
    assert overlap(shingles("We will trace your chair."), shingles("we will trace your lamp")) == 2 / 4
    assert overlap(shingles("yes"), shingles("Yes!")) == 1.0 and overlap(shingles("!"), shingles("?")) == 0.0
    assert near_duplicates(["a b c", "x", "A, b c"], 1.0) == {2: 0}


def test_length_outliers_by_hand():
    # logs of base e: median log 100; deviations log 10, 0, 0.0953, 0.1054, 0, ...; their median is 0.0953
    assert length_outliers([10, 100, 110, 90, 100, 130], 3.0) == {0}
    assert length_outliers([10, 100, 110, 90, 100, 130], 1.0) == {0, 5}
    assert length_outliers([5, 5, 5, 900], 1.0) == set()


def test_the_best_share_takes_the_earlier_of_equals():
    assert best_share([1.0, 3.0, 1.0, 2.0], 0.75) == {0, 1, 3}
    assert best_share([1.0, 3.0], 0.0) == {1} and best_share([1.0, 3.0], 1.0) == {0, 1}


def test_every_rule_drops_and_counts_its_rows_one_after_the_other():
    texts = ["we will trace it now", "we will trace it now", "no", "sorry for the trouble", "dear ben , thank you"]
    samples = [sample(text) for text in texts] + [sample("x" * 4000)]
    scores = Scores(torch.tensor([1.0, 2.0, 5.0, 0.5, 3.0, 9.0]), torch.tensor([[0.0, 0.1]] * 4 + [[0.0, 8.0]] * 2))
    kept, dropped = select(samples, scores, Rules(0.9, 3.0, 2.0, 0.6, 0.5))
    assert kept == [1]
    assert dropped == {
        "near-duplicates": 1,
        "length outliers": 2,
        "rewards disagree": 1,
        "score below 0.6": 1,
        "not in the best 0.5": 0,
    }
    assert select(samples, scores, Rules(near_duplicates=0.9))[0] == [1, 2, 3, 4, 5]
    assert select(samples, None, Rules(near_duplicates=0.9))[0] == [0, 2, 3, 4, 5]
    assert select(samples, scores, Rules(keep_share=0.5))[0] == [2, 4, 5]
    cut = [*samples[:5], sample("x", finished=False)]
    assert select(cut, scores, Rules(keep_share=1.0)) == ([0, 1, 2, 3, 4], {"cut off": 1, "not in the best 1": 0})
    with pytest.raises(RlhfError, match="CFG040.*cannot disagree"):
        select(samples, Scores(torch.zeros(6)), Rules(max_disagreement=1.0))


def test_filter_writes_what_sft_reads_and_refuses_what_means_nothing(here, tmp_path):
    rows = [{"prompt": "where ?", "response": text} for text in ("a b c d", "a", "a b", "A b c D !")]
    rows.append({"prompt": "where ?", "response": "a b c d e f", "finished": False})
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = ["filter", "--in", tmp_path / "in.jsonl", "--out", tmp_path / "out.jsonl"]
    code, shown = here(
        *command, "--reward", "test_compare:words", "--keep-share", "0.5", "--near-duplicates", "0.9", "--json"
    )
    assert code == 0, shown
    counts = json.loads(shown.splitlines()[-1])
    assert counts == {"rows": 5, "dropped": {"cut off": 1, "near-duplicates": 1, "not in the best 0.5": 1}, "kept": 2}
    found = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [(row["response"], row["score"]) for row in found] == [("a b", 2.0), ("A b c D !", 5.0)]
    for arguments in ([], ["--keep-share", "0.5"], ["--reward", "test_compare:words", "--length-outliers", "3"]):
        code, shown = here(*command, *arguments)
        assert code == 2 and "CFG040" in shown
    code, shown = here(*command, "--reward", "test_compare:words", "--min-score", "99")
    assert code == 3 and "no rows left of 5" in shown
