"""Tensors and objective against slow float64 loops; NaN stands in all padding."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf.losses import policy as objective
from rlhf.losses import tensors

NAN = float("nan")


@st.composite
def ragged_batches(draw):
    """Lengths (one row of a single token, always) and five [B, T] float64 tensors with NaN in the padding."""
    lengths = [1, *draw(st.lists(st.integers(1, 7), min_size=1, max_size=4))]
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    mask = tensors.response_mask(torch.tensor(lengths), max(lengths) + 1)
    values = [torch.randn(mask.shape, dtype=torch.float64, generator=generator) for _ in range(5)]
    return mask, [value.masked_fill(~mask, NAN) for value in values]


def rows_of(x, mask):
    return [[float(v) for v, keep in zip(row, kept, strict=True) if keep] for row, kept in zip(x, mask, strict=True)]


def loop_gae(rewards, values, gamma, lam):
    out = []
    for r, v in zip(rewards, values, strict=True):
        row = []
        for t in range(len(r)):
            total, weight = 0.0, 1.0
            for k in range(t, len(r)):
                following = v[k + 1] if k + 1 < len(v) else 0.0
                total += weight * (r[k] + gamma * following - v[k])
                weight *= gamma * lam
            row.append(total)
        out.append(row)
    return out


@given(ragged_batches(), st.floats(0, 1), st.floats(0, 1))
@settings(max_examples=60, deadline=None)
def test_gae_equals_the_sum_of_discounted_errors(batch, gamma, lam):
    mask, (rewards, values, *_) = batch
    found = objective.gae_advantages(rewards, values, mask, gamma, lam)
    wanted = loop_gae(rows_of(rewards, mask), rows_of(values, mask), gamma, lam)
    for row, want in zip(rows_of(found, mask), wanted, strict=True):
        assert row == pytest.approx(want, abs=1e-12)
    assert (found[~mask] == 0).all()


@given(ragged_batches(), st.floats(0, 1))
@settings(max_examples=30, deadline=None)
def test_lambda_one_gives_the_discounted_outcome_whatever_the_values(batch, gamma):
    mask, (rewards, values, *_) = batch
    advantages = objective.gae_advantages(rewards, values, mask, gamma, 1.0)
    outcomes = objective.outcomes(rewards, mask, gamma)
    for returns in (outcomes, objective.returns_from(advantages, values, mask)):
        assert (returns[~mask] == 0).all()
        for row, r in zip(rows_of(returns, mask), rows_of(rewards, mask), strict=True):
            assert row == pytest.approx([sum(gamma ** (k - t) * r[k] for k in range(t, len(r))) for t in range(len(r))])


@given(ragged_batches())
@settings(max_examples=40, deadline=None)
def test_policy_loss_and_gradient_equal_a_loop(batch):
    mask, (new, old, advantages, *_) = batch
    num_tokens, eps = int(mask.sum()), 0.2
    logprobs = new.clone().requires_grad_()
    outcome = objective.policy_loss(logprobs, old, advantages, mask, eps, num_tokens)
    outcome.loss.backward()
    total, clipped, kl = 0.0, 0, 0.0
    for n, o, a in zip(*(rows_of(x, mask) for x in (new, old, advantages)), strict=True):
        for ln, lo, adv in zip(n, o, a, strict=True):
            ratio = math.exp(ln - lo)
            bounded = min(max(ratio, 1 - eps), 1 + eps)
            total -= min(ratio * adv, bounded * adv)
            clipped += bounded * adv < ratio * adv
            kl += ratio - 1 - (ln - lo)
    assert float(outcome.loss) == pytest.approx(total / num_tokens, abs=1e-12)
    assert float(outcome.clip_fraction) == pytest.approx(clipped / num_tokens)
    assert float(outcome.approx_kl) == pytest.approx(kl / num_tokens, abs=1e-12)
    for i, j in mask.nonzero().tolist():
        ratio, adv = math.exp(new[i, j] - old[i, j]), float(advantages[i, j])
        active = min(max(ratio, 1 - eps), 1 + eps) * adv >= ratio * adv
        assert float(logprobs.grad[i, j]) == pytest.approx(-ratio * adv / num_tokens if active else 0.0, abs=1e-12)
    assert (logprobs.grad[~mask] == 0).all()


@given(ragged_batches(), st.sampled_from([None, 0.1, 1.0]))
@settings(max_examples=40, deadline=None)
def test_value_loss_equals_a_loop(batch, clip_range):
    mask, (new, old, returns, *_) = batch
    num_tokens = int(mask.sum())
    values = new.clone().requires_grad_()
    outcome = objective.value_loss(values, old, returns, mask, clip_range, num_tokens)
    outcome.loss.backward()
    total = 0.0
    for v, o, r in zip(*(rows_of(x, mask) for x in (new, old, returns)), strict=True):
        for a, b, c in zip(v, o, r, strict=True):
            bounded = a if clip_range is None else b + min(max(a - b, -clip_range), clip_range)
            total += 0.5 * max((a - c) ** 2, (bounded - c) ** 2)
    assert float(outcome.loss) == pytest.approx(total / num_tokens, abs=1e-12)
    assert torch.isfinite(values.grad).all() and (values.grad[~mask] == 0).all()


@given(ragged_batches())
@settings(max_examples=20, deadline=None)
def test_micro_batches_add_up_to_the_minibatch(batch):
    mask, (new, old, advantages, returns, ref) = batch
    num_tokens = int(mask.sum())
    new, old = new.nan_to_num(), old.nan_to_num()

    def all_of(rows):
        part = [x[rows] for x in (new, old, advantages, mask)]
        policy = objective.policy_loss(*part, 0.2, num_tokens)
        value = objective.value_loss(new[rows], old[rows], returns[rows], mask[rows], 0.2, num_tokens)
        kl = objective.k2_kl_loss(new[rows], old[rows], ref[rows], mask[rows], num_tokens)
        return torch.stack([policy.loss, policy.ratio, policy.clip_fraction, policy.approx_kl, value.loss, kl])

    whole = all_of(list(range(len(mask))))
    assert torch.allclose(all_of([0]) + all_of(list(range(1, len(mask)))), whole, atol=1e-12)


def test_an_unmoved_policy_has_ratio_one_and_nothing_clipped():
    mask = tensors.response_mask(torch.tensor([3, 1]), 3)
    logprobs = torch.randn(2, 3)
    outcome = objective.policy_loss(logprobs, logprobs, torch.randn(2, 3), mask, 0.2, 4)
    assert (outcome.ratio, outcome.clip_fraction, outcome.approx_kl) == (1, 0, 0)


def test_a_token_with_positive_advantage_is_made_likelier():
    logprobs = torch.zeros(1, 2, requires_grad=True)
    mask = torch.ones(1, 2, dtype=torch.bool)
    objective.policy_loss(logprobs, torch.zeros(1, 2), torch.tensor([[1.0, -1.0]]), mask, 0.2, 2).loss.backward()
    assert logprobs.grad[0, 0] < 0 < logprobs.grad[0, 1]


def test_the_kl_lowers_the_reward_and_the_score_stands_on_the_last_token():
    mask = tensors.response_mask(torch.tensor([3, 1]), 4)
    kl = torch.tensor([[0.5, -0.25, 1.0, NAN], [2.0, NAN, NAN, NAN]])
    found = objective.token_rewards(kl, torch.tensor([7.0, -1.0]), mask, 0.1)
    assert torch.allclose(found, torch.tensor([[-0.05, 0.025, 6.9, 0.0], [-1.2, 0.0, 0.0, 0.0]]))


def test_missing_end_tokens_replace_or_lower_the_score():
    scores, finished = torch.tensor([2.0, 5.0]), torch.tensor([True, False])
    assert objective.replace_missing_eos(scores, finished, -3.0).tolist() == [2.0, -3.0]
    assert objective.subtract_missing_eos(scores, finished, 1.5).tolist() == [2.0, 3.5]


def test_estimators_agree_with_the_exact_kl_in_expectation():
    p, q = (torch.randn(6, dtype=torch.float64).log_softmax(0) for _ in range(2))
    exact = float((p.exp() * (p - q)).sum())
    assert float((p.exp() * objective.k1(p, q)).sum()) == pytest.approx(exact)
    assert float((p.exp() * objective.k3(p, q)).sum()) == pytest.approx(exact)
    assert (objective.k3(p, q) >= 0).all()
    assert torch.allclose(objective.k2(p, q), (p - q) ** 2 / 2)
    assert float(tensors.full_kl(p, q)) == pytest.approx(exact)


def test_k2_in_the_loss_has_the_gradient_of_the_kl():
    logits = torch.randn(5, dtype=torch.float64, requires_grad=True)
    ref = torch.randn(5, dtype=torch.float64).log_softmax(0)
    p = logits.log_softmax(0)
    exact = torch.autograd.grad((p.exp() * (p - ref)).sum(), logits, retain_graph=True)[0]
    found = torch.zeros(5, dtype=torch.float64)
    for token in range(5):
        one = torch.ones(1, 1, dtype=torch.bool)
        loss = objective.k2_kl_loss(p[token].view(1, 1), p[token].detach().view(1, 1), ref[token].view(1, 1), one, 1)
        found += p[token].exp().detach() * torch.autograd.grad(loss, logits, retain_graph=True)[0]
    assert torch.allclose(found, exact, atol=1e-12)


def test_the_weight_of_a_response_in_the_k2_loss_is_its_ratio_cut_at_two():
    mask = tensors.response_mask(torch.tensor([2, 2, 1]), 2)
    old = torch.zeros(3, 2, dtype=torch.float64).masked_fill(~mask, NAN)
    moved = torch.tensor([[-0.1, 0.3], [4.0, 1.0], [-0.5, NAN]], dtype=torch.float64)
    ref = moved - torch.tensor([[1.0, 2.0], [0.5, 0.5], [3.0, NAN]], dtype=torch.float64)
    wanted = (math.exp(0.2) * 3**2 + 2.0 * 1**2 + math.exp(-0.5) * 3**2) / 2 / 5
    assert float(objective.k2_kl_loss(moved, old, ref, mask, 5)) == pytest.approx(wanted)


def test_normalise_centre_and_rescale_see_only_the_mask():
    mask = tensors.response_mask(torch.tensor([2, 1]), 3)
    x = torch.tensor([[1.0, 3.0, NAN], [8.0, NAN, NAN]], dtype=torch.float64)
    std = math.sqrt((9 + 1 + 16) / 3)
    assert tensors.center(x, mask)[mask].tolist() == pytest.approx([-3, -1, 4])
    assert tensors.normalize(x, mask)[mask].tolist() == pytest.approx([-3 / std, -1 / std, 4 / std])
    assert tensors.rescale(x, mask)[mask].tolist() == pytest.approx([1 / std, 3 / std, 8 / std])
    assert (tensors.normalize(x, mask)[~mask] == 0).all()


def test_explained_variance_is_one_for_the_truth_and_zero_for_a_constant():
    mask = tensors.response_mask(torch.tensor([3, 2]), 3)
    outcomes = torch.randn(2, 3).masked_fill(~mask, NAN)
    assert float(tensors.explained_variance(outcomes, outcomes, mask)) == pytest.approx(1)
    assert float(tensors.explained_variance(torch.full((2, 3), 4.0), outcomes, mask)) == pytest.approx(0, abs=1e-6)
    assert math.isnan(float(tensors.explained_variance(outcomes, torch.full((2, 3), 4.0), mask)))
    assert math.isnan(float(tensors.explained_variance(outcomes, outcomes, torch.zeros_like(mask))))


def test_thirds_divide_the_tokens_of_every_row_by_the_share_that_stands_before_them():
    mask = tensors.response_mask(torch.tensor([1, 2, 3, 4, 7]), 8)
    thirds = tensors.thirds(mask)
    letters = ["".join(n[0] for t in range(8) for n, third in thirds.items() if third[row, t]) for row in range(5)]
    assert letters == ["f", "fm", "fml", "ffml", "fffmmll"]
    assert not torch.stack(list(thirds.values())).any(0)[~mask].any()


@pytest.mark.parametrize("length", [53, 512])
def test_a_critic_is_credited_with_what_it_knows_of_the_outcome_at_any_length(length):
    """The outcome is sqrt(.5) times a walk of ``length`` steps, and sqrt(.5) times chance; lambda-returns are made of
    the critic's values, which is why they flatter a critic that knows nothing."""
    num, mask = 2000, torch.ones(2000, length, dtype=torch.bool)
    generator = torch.Generator().manual_seed(length)
    moves = torch.randn(num, length, generator=generator) * (0.5 / length) ** 0.5
    chance = torch.randn(num, generator=generator) * 0.5**0.5
    rewards = objective.token_rewards(torch.zeros(num, length), moves.sum(1) + chance, mask, 0.0)
    outcomes, right = objective.outcomes(rewards, mask, 1.0), moves.cumsum(1) - moves
    share = 0.5 * (length - 1) / (2 * length)  # the mean over t < T of .5 t / T, of a variance of 1
    assert float(tensors.explained_variance(right, outcomes, mask)) == pytest.approx(share, abs=0.03)
    parts = [float(tensors.explained_variance(right, outcomes, part)) for part in tensors.thirds(mask).values()]
    assert parts == pytest.approx([0.5 / 6, 0.5 / 2, 0.5 * 5 / 6], abs=0.04)
    unrelated = torch.randn(num, 1, generator=generator).expand(num, length)
    assert float(tensors.explained_variance(unrelated, outcomes, mask)) == pytest.approx(-1, abs=0.15)
    raw = objective.gae_advantages(rewards, unrelated, mask, 1.0, 0.95)
    flattered = float(tensors.explained_variance(unrelated, objective.returns_from(raw, unrelated, mask), mask))
    assert flattered > (0.9 if length == 512 else 0.3)


def test_the_adaptive_coefficient_moves_towards_the_target_by_a_bounded_step():
    assert objective.adapted_coef(0.1, kl=6.6, target=6.0, horizon=1000, num_responses=100) == pytest.approx(0.101)
    assert objective.adapted_coef(0.1, kl=60.0, target=6.0, horizon=1000, num_responses=100) == pytest.approx(0.102)
    assert objective.adapted_coef(0.1, kl=0.0, target=6.0, horizon=1000, num_responses=100) == pytest.approx(0.098)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_tempered_logprobs_and_their_gradient_are_those_of_the_definition(temperature):
    """By autograd through log of softmax. What is used up is not used twice: a second pass back is refused."""
    logits = torch.randn(5, 9, dtype=torch.float64, requires_grad=True)
    ids, weight = torch.tensor([0, 8, 3, 3, 7]), torch.tensor([1.0, -2.0, 0.0, 0.5, 3.0]).double()
    wanted = ((logits / temperature).softmax(-1).log()[torch.arange(5), ids] * weight).sum()
    (gradient,) = torch.autograd.grad(wanted, logits)
    found = tensors.TemperedLogprobs.apply(logits * 1.0, ids, temperature)
    assert torch.allclose(found @ weight, wanted)
    assert torch.allclose(torch.autograd.grad(found @ weight, logits, retain_graph=True)[0], gradient, atol=1e-12)
    assert not gradient[2].any() and gradient[4].any()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(found @ weight, logits)


def test_tempered_logprobs_of_half_precision_are_float32_and_bitwise_those_of_the_rescoring():
    logits, ids = (10 * torch.randn(6, 300)).bfloat16(), torch.arange(6)
    whole = logits.float().div_(0.7)
    wanted = whole.log_softmax(-1).gather(1, ids[:, None])[:, 0]
    leaf = logits.clone().requires_grad_()
    found = tensors.TemperedLogprobs.apply(leaf * 1.0, ids, 0.7)
    assert found.dtype == torch.float32 and torch.equal(found, wanted)
    found.sum().backward()
    assert leaf.grad.dtype == torch.bfloat16 and float(leaf.grad.float().sum(1).abs().max()) < 0.02
    assert torch.equal(logits, leaf), "a leaf is not used up"


def test_entropy_and_logprobs_equal_their_definitions():
    logits = torch.randn(4, 7, dtype=torch.float64)
    p = logits.exp() / logits.exp().sum(-1, keepdim=True)
    ids = torch.tensor([0, 6, 3, 3])
    assert torch.allclose(tensors.token_logprobs(logits, ids), p[torch.arange(4), ids].log())
    assert torch.allclose(tensors.entropy(logits), -(p * p.log()).sum(-1))
