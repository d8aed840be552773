"""The reward objective and the statistics of its examination, each by another road."""

from __future__ import annotations

import itertools
import math
from types import SimpleNamespace

import numpy
import pytest
import torch

from rlhf.data import labels
from rlhf.losses.preference import bradley_terry, centering, distilled, outcome, plackett_luce
from rlhf.metrics import calibration, intervals, pairs
from rlhf.records import Judgement


def group(*judgements):
    return SimpleNamespace(judgements=tuple(judgements))


def test_bradley_terry_equals_a_loop_with_ties_margins_and_rankings():
    groups = [
        group(Judgement(0, 1, margin=0.5)),
        group(Judgement(2, 0), Judgement(0, 1, probability=0.5), Judgement(2, 1, probability=0.8)),
    ]
    scores = [torch.tensor([1.0, -0.3], dtype=torch.float64), torch.tensor([0.2, 1.4, -0.7], dtype=torch.float64)]
    for use_margins in (False, True):
        found = bradley_terry(groups, scores, use_margins)
        for index, (one, values) in enumerate(zip(groups, scores, strict=True)):
            losses, right = [], []
            for judgement in one.judgements:
                raw = float(values[judgement.first] - values[judgement.second])
                d = raw - (judgement.margin or 0.0) * use_margins
                p = judgement.probability
                losses.append(p * math.log1p(math.exp(-d)) + (1 - p) * math.log1p(math.exp(d)))
                right.append(0.5 if p == 0.5 or raw == 0 else float((raw > 0) == (p > 0.5)))
            assert float(found.loss[index]) == pytest.approx(numpy.mean(losses), abs=1e-12)
            assert float(found.accuracy[index]) == pytest.approx(numpy.mean(right))


def test_smoothing_margins_and_strength_enter_the_loss_as_the_formula_says():
    judged = group(Judgement(0, 1, 0.9, margin=2.0), Judgement(2, 1, margin=0.5))
    values = torch.tensor([0.4, -1.1, 0.3], dtype=torch.float64)
    losses = []
    for p, margin, d in ((0.9, 2.0, 1.5 - 0.25 * 2.0), (1.0, 0.5, 1.4 - 0.25 * 0.5)):
        q = p * 0.9 + (1 - p) * 0.1
        losses.append(margin * (q * math.log1p(math.exp(-d)) + (1 - q) * math.log1p(math.exp(d))))
    found = bradley_terry([judged], [values], 0.25, 0.1, 1.0)
    assert float(found.loss[0]) == pytest.approx(numpy.mean(losses), abs=1e-12)
    free = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    for _ in range(400):  # a label that is wrong with probability e is fitted by log-odds log((1 - e) / e)
        loss = bradley_terry([group(Judgement(0, 1))], [free], label_smoothing=0.1).loss.sum()
        (gradient,) = torch.autograd.grad(loss, free)
        free.data -= gradient
    assert float((free[0] - free[1]).detach()) == pytest.approx(math.log(9), abs=1e-6)


def ranking_of(order):
    pairs_of = itertools.combinations(order, 2)
    return group(*(Judgement(better, worse) for better, worse in pairs_of))


def test_plackett_luce_is_a_distribution_over_rankings_and_bradley_terry_of_two():
    values = torch.tensor([0.3, -1.2, 2.0, 0.9], dtype=torch.float64)
    total = 0.0
    for order in itertools.permutations(range(4)):
        one = ranking_of(order)
        loss = float(plackett_luce([one], [values], [labels.levels(one.judgements, 4)]).loss[0])
        by_choice = math.prod(
            math.exp(values[best]) / sum(math.exp(values[i]) for i in order[place:]) for place, best in enumerate(order)
        )
        assert 3 * loss == pytest.approx(-math.log(by_choice))
        total += by_choice
    assert total == pytest.approx(1)
    pair = group(Judgement(1, 0))
    two = values[:2]
    found, wanted = plackett_luce([pair], [two], [[1, 0]]), bradley_terry([pair], [two])
    assert float(found.loss[0]) == pytest.approx(float(wanted.loss[0])) and found.accuracy == wanted.accuracy


def test_equal_ranks_are_chosen_with_all_of_their_level_left():
    tied = group(Judgement(0, 1, 0.5), Judgement(0, 2), Judgement(1, 2))
    values = torch.tensor([0.5, -0.2, 1.0], dtype=torch.float64)
    everything = math.log(sum(math.exp(value) for value in values))
    found = plackett_luce([tied], [values], [labels.levels(tied.judgements, 3)])
    assert float(found.loss[0]) == pytest.approx(everything - (0.5 - 0.2) / 2)
    assert float(found.accuracy[0]) == pytest.approx((0.5 + 0 + 0) / 3)


def test_a_student_fits_differences_and_keeps_its_own_level():
    values, target = torch.tensor([0.3, -1.0, 2.0]), torch.tensor([1.0, 0.0, 0.5])
    pairs_of = list(itertools.combinations(range(3), 2))
    wanted = sum(float((values[i] - values[j]) - (target[i] - target[j])) ** 2 for i, j in pairs_of) / 3
    assert float(distilled(values, target)) == pytest.approx(wanted)
    assert float(distilled(target + 7, target)) == pytest.approx(0, abs=1e-10)
    assert float(distilled(values[:1], target[:1])) == 0


def test_a_label_of_its_own_is_fitted_by_its_log_odds():
    values = torch.tensor([0.7, -0.4, 0.0], dtype=torch.float64)
    loss, right = outcome((1.0, 0.0, 1.0), values)
    by_hand = (math.log1p(math.exp(-0.7)) + math.log1p(math.exp(-0.4)) + math.log(2)) / 3
    assert float(loss) == pytest.approx(by_hand) and float(right) == pytest.approx(2.5 / 3)


def test_only_a_whole_consistent_ranking_has_levels():
    assert labels.levels((Judgement(1, 0), Judgement(2, 0, 0.0), Judgement(1, 2)), 3) == [1, 0, 2]
    for judgements in (
        (Judgement(0, 1),),
        (Judgement(0, 1), Judgement(1, 2), Judgement(2, 0)),
        (Judgement(0, 1, 0.7), Judgement(0, 2), Judgement(1, 2)),
        (Judgement(0, 1, 0.5), Judgement(0, 2), Judgement(2, 1)),
        (Judgement(0, 1), Judgement(0, 1), Judgement(1, 2)),
    ):
        assert labels.levels(judgements, 3) is None


def test_the_loss_falls_as_the_preferred_response_gains():
    values = torch.zeros(2, requires_grad=True)
    bradley_terry([group(Judgement(1, 0))], [values], False).loss.sum().backward()
    assert values.grad.tolist() == [0.5, -0.5]
    assert centering([torch.tensor([1.0, 3.0])]).tolist() == [5.0]


def test_calibration_error_by_hand_and_its_null():
    p = numpy.array([0.6, 0.6, 0.9, 0.9])
    outcomes = numpy.array([1.0, 0.0, 1.0, 1.0])
    bins = calibration.reliability_bins(p, outcomes, 2)
    assert [(entry.confidence, entry.accuracy, entry.count) for entry in bins] == [(0.6, 0.5, 2), (0.9, 1.0, 2)]
    assert calibration.expected_calibration_error(p, outcomes, 2) == pytest.approx(0.1)
    assert calibration.brier_score(p, outcomes) == pytest.approx((0.16 + 0.36 + 0.01 + 0.01) / 4)
    nll = -(math.log(0.6) + math.log(0.4) + 2 * math.log(0.9)) / 4
    assert calibration.negative_log_likelihood(p, outcomes) == pytest.approx(nll)
    generator = numpy.random.default_rng(0)
    confidences = generator.uniform(0.5, 1, 500)
    drawn = (generator.random(500) < confidences).astype(float)
    null = calibration.null_calibration_error(confidences, 10, generator)
    assert 0.02 < null < 0.07
    assert calibration.expected_calibration_error(confidences, drawn, 10) < 2 * null
    overconfident = (generator.random(500) < 0.5 + (confidences - 0.5) / 3).astype(float)
    assert calibration.expected_calibration_error(confidences, overconfident, 10) > 2 * null


def test_equal_confidences_are_binned_alike_in_any_order():
    generator = numpy.random.default_rng(0)
    p = numpy.repeat([0.5, 0.6, 0.8, 0.9], 25)
    outcomes = (generator.random(100) < p).astype(float)
    orders = [generator.permutation(100) for _ in range(5)]
    for num_bins in (4, 7):
        first, *others = [calibration.reliability_bins(p[o], outcomes[o], num_bins) for o in orders]
        for bins in others:
            assert [entry.accuracy for entry in bins] == pytest.approx([entry.accuracy for entry in first])
    by_hand = sum(25 * abs(value - outcomes[p == value].mean()) for value in (0.5, 0.6, 0.8, 0.9)) / 100
    assert calibration.expected_calibration_error(p, outcomes, 4) == pytest.approx(by_hand)


def test_grouped_intervals_are_wider_than_rows_suggest_and_cover_the_truth():
    generator = numpy.random.default_rng(1)
    covered = 0
    for trial in range(150):
        effects = generator.normal(0.3, 1.0, 40)
        values = numpy.repeat(effects, 5) + generator.normal(0, 0.1, 200)
        groups = [str(i // 5) for i in range(200)]
        found = intervals.grouped_bootstrap(values, groups, num_resamples=300, seed=trial)
        covered += found.low <= 0.3 <= found.high
        naive = intervals.grouped_bootstrap(values, list(range(200)), num_resamples=300, seed=trial)
        assert found.high - found.low > 1.5 * (naive.high - naive.low)
    assert 0.87 < covered / 150 <= 1


def test_paired_intervals_use_the_difference():
    first, second = numpy.arange(10.0), numpy.arange(10.0) - 1
    found = intervals.paired_bootstrap(first, second, list(range(10)))
    assert (found.estimate, found.low, found.high) == (1, 1, 1)
    with pytest.raises(ValueError, match="same rows"):
        intervals.paired_bootstrap(first, [1.0], list(range(10)))


def test_pair_accuracy_counts_ties_as_half_and_bins_hold_everything():
    differences = numpy.array([1.0, -1.0, 0.0, 2.0])
    assert pairs.pair_accuracy(differences) == 0.625
    assert pairs.bins_of(numpy.array([1.0, 1.0, 5.0, 9.0]), 2).tolist() == [0, 0, 1, 1]
    assert pairs.length_baseline_accuracy(numpy.array([3, -1, 0, 0])) == 0.5


@pytest.mark.parametrize(
    "empty",
    [
        lambda: pairs.pair_accuracy(numpy.array([])),
        lambda: intervals.grouped_bootstrap([], []),
        lambda: calibration.brier_score(numpy.array([]), numpy.array([])),
    ],
)
def test_no_data_is_an_error_and_never_a_zero(empty):
    with pytest.raises(ValueError):
        empty()
