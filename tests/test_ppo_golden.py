"""One recorded batch through TRL 1.12's own code (scripts/trl_golden.py) and through ours.

TRL puts the score one place behind the end token (or on the last place of a full row) and lets the value role see
that place: aligned by letting our mask reach one place further for rewards and values. Its whitening divides by the
unbiased variance.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from rlhf.losses import policy, tensors

GOLDEN = json.loads((Path(__file__).parent / "golden" / "trl_ppo.json").read_text())
ARGS = GOLDEN["args"]


@pytest.fixture
def batch():
    found = {k: torch.tensor(v, dtype=torch.float64) for k, v in {**GOLDEN["inputs"], **GOLDEN["outputs"]}.items()}
    lengths = torch.tensor(GOLDEN["lengths"])
    width = found["logprobs"].shape[1]
    found["mask"] = tensors.response_mask(lengths, width)
    found["longer"] = tensors.response_mask((lengths + 1).clamp(max=width), width)
    return found


def aligned(batch):
    kl = policy.k1(batch["logprobs"], batch["ref_logprobs"])
    rewards = policy.token_rewards(kl, batch["scores"], batch["longer"], ARGS["kl_coef"])
    advantages = policy.gae_advantages(rewards, batch["values"], batch["longer"], ARGS["gamma"], ARGS["lam"])
    return rewards, advantages


def test_rewards_advantages_and_returns_agree(batch):
    rewards, advantages = aligned(batch)
    assert torch.allclose(rewards, batch["rewards"], atol=1e-6)
    returns = policy.returns_from(advantages, batch["values"], batch["longer"])
    assert torch.allclose(returns, batch["returns"].masked_fill(~batch["longer"], 0), atol=1e-6)
    n = batch["mask"].sum()
    normalised = tensors.normalize(advantages, batch["mask"]) * torch.sqrt((n - 1) / n)
    assert torch.allclose(normalised, batch["advantages"], atol=1e-6)


def test_policy_loss_and_gradient_agree(batch):
    logprobs = batch["new_logprobs"].requires_grad_()
    outcome = policy.policy_loss(
        logprobs, batch["logprobs"], batch["advantages"], batch["mask"], ARGS["cliprange"], int(batch["mask"].sum())
    )
    outcome.loss.backward()
    assert float(outcome.loss) == pytest.approx(float(batch["pg_loss"]), abs=1e-6)
    assert torch.allclose(logprobs.grad, batch["policy_gradient"], atol=1e-6)


def test_value_loss_and_gradient_agree(batch):
    values, seen = batch["new_values"].requires_grad_(), batch["longer"]
    outcome = policy.value_loss(
        values, batch["values"], batch["returns"], seen, ARGS["cliprange_value"], int(seen.sum())
    )
    outcome.loss.backward()
    assert float(outcome.loss) == pytest.approx(float(batch["vf_loss"]), abs=1e-6)
    assert float(outcome.clip_fraction) == pytest.approx(float(batch["vf_clipfrac"]), abs=1e-6)
    assert torch.allclose(values.grad, batch["value_gradient"], atol=1e-6)
