"""Kendall's tau-b and NDCG, held to scipy's and scikit-learn's, and what the examination says of ranked lists."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import numpy
import pytest
import torch
from scipy.stats import kendalltau
from sklearn.metrics import ndcg_score

from rlhf.data.tokenised import Group
from rlhf.evaluation import exam_tables, figures, ranking_figures
from rlhf.metrics import ranking
from rlhf.records import Comparison, Judgement, Message
from rlhf.scoring.scorer import Scores

HOW = figures.FigureSettings(num_bins=4, num_resamples=200, seed=0, fit_fraction=0.5)


def test_both_figures_equal_those_of_other_libraries_ties_included():
    generator = numpy.random.default_rng(0)
    for _ in range(200):
        size = int(generator.integers(3, 9))
        grades, scores = generator.integers(0, 4, size).astype(float), generator.integers(0, 5, size) / 2
        assert ranking.kendall_tau_b(grades, scores) == pytest.approx(kendalltau(grades, scores)[0], nan_ok=True)
        if grades.any():
            assert ranking.ndcg(grades, scores) == pytest.approx(ndcg_score([grades], [scores]))


def test_both_figures_by_hand():
    # pairs: 3 > 2 alike, 3 > 1 opposite, 2 > 1 opposite
    assert ranking.kendall_tau_b([3, 2, 1], [0.5, 0.1, 0.9]) == pytest.approx((1 - 2) / 3)
    assert math.isnan(ranking.kendall_tau_b([1, 1, 1], [1, 2, 3])) and math.isnan(ranking.ndcg([0, 0, 0], [1, 2, 3]))
    order = 0 + 2 / math.log2(3) + 1 / 2
    assert ranking.ndcg([2, 1, 0], [0.5, 0.1, 0.9]) == pytest.approx(order / (2 + 1 / math.log2(3)))
    with pytest.raises(ValueError, match="at least 0"):
        ranking.ndcg([1, -1], [0, 1])


def group(prompt, ranks, ratings=None, pairs=None):
    pairs = pairs if pairs is not None else list(itertools.combinations(range(len(ranks)), 2))
    judged = []
    for i, j in pairs:
        better, worse = (i, j) if ranks[i] <= ranks[j] else (j, i)
        judged.append(Judgement(better, worse, 0.5 if ranks[i] == ranks[j] else 1.0))
    texts = tuple(f"r {n}" for n in range(len(ranks)))
    record = Comparison((Message("user", prompt),), texts, tuple(judged), "f:1", ratings)
    return Group([1], [[2]] * len(ranks), tuple(judged), record)


def test_lists_are_graded_by_ratings_or_levels_and_what_has_no_value_is_left_out_and_counted():
    groups = [
        group("a", [1, 2]),
        group("b", [2, 1, 2, 4]),
        group("c", [1, 2, 3], pairs=[(0, 1)]),
        group("d", [1, 2, 3], ratings=(5.0, 3.0, 4.5)),
        group("e", [1, 2, 3]),
    ]
    values = [[0.0, 1.0], [1.0, 2.0, 0.0, 0.5], [1.0, 2.0, 3.0], [0.1, 0.3, 0.2], [1.0, 1.0, 1.0]]
    found = ranking_figures.report(groups, Scores(torch.tensor([v for own in values for v in own])), HOW)
    assert (found["lists"], found["without_whole_ranking"], found["by_ratings"]) == (4, 1, 1)
    taus = [kendalltau([2, 3, 2, 0], values[1])[0], kendalltau([5, 3, 4.5], values[3])[0]]
    assert (
        found["kendall_tau_b"]["estimate"] == pytest.approx(numpy.mean(taus)) and found["kendall_tau_b"]["lists"] == 2
    )
    gains = [([2, 3, 2, 0], values[1]), ([2, 0, 1.5], values[3]), ([2, 1, 0], values[4])]
    wanted = [ndcg_score([g], [s]) for g, s in gains]
    assert found["ndcg"]["estimate"] == pytest.approx(numpy.mean(wanted)) and found["ndcg"]["lists"] == 3
    low, high = found["ndcg"]["ci95"]
    assert min(wanted) <= low < found["ndcg"]["estimate"] < high <= max(wanted)


def test_a_ranking_in_an_attribute_is_no_overall_ranking():
    both = group("a", [1, 2, 3])
    other = tuple(replace(one, first=one.second, second=one.first, attribute="safe") for one in both.judgements)
    mixed = replace(both, record=replace(both.record, judgements=(*both.judgements, *other)))
    assert ranking_figures.grades_of(mixed).tolist() == ranking_figures.grades_of(both).tolist() == [2, 1, 0]
    assert ranking_figures.grades_of(replace(both, record=replace(both.record, judgements=other))) is None


def test_pairs_alone_have_no_figure_and_it_is_said():
    assert ranking_figures.report([group("a", [1, 2])], Scores(torch.tensor([1.0, 0.0])), HOW) is None
    assert exam_tables.ranking_rows({"ranking": None}) == [("Kendall's tau-b and NDCG", "- (pairs alone)")]
    figure = {"estimate": 0.5, "ci95": [0.4, 0.6], "lists": 7}
    rows = dict(exam_tables.ranking_rows({"ranking": {"kendall_tau_b": figure, "ndcg": None}}))
    assert rows == {
        "Kendall's tau-b, lists of three or more": "0.500 [0.400, 0.600] on 7",
        "NDCG, lists of three or more": "-",
    }
