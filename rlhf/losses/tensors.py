"""Masked statistics and token distributions, as pure functions.

Letters: B responses, T response tokens, V vocabulary. Masks are bool, True means keep; what is masked may be NaN.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def masked_sum(x: Tensor, mask: Tensor) -> Tensor:
    """Sum of ``x`` [B, T] where ``mask`` [B, T] is True; 0-d."""
    return x.masked_fill(~mask, 0.0).sum()


def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    """Mean of ``x`` [B, T] where ``mask`` [B, T] is True; 0-d."""
    return masked_sum(x, mask) / mask.sum()


def masked_var(x: Tensor, mask: Tensor) -> Tensor:
    """Biased variance of ``x`` [B, T] where ``mask`` [B, T] is True; 0-d."""
    return masked_mean((x - masked_mean(x, mask)).square(), mask)


def center(x: Tensor, mask: Tensor) -> Tensor:
    """``x`` [B, T] with mean 0 over ``mask``; exactly 0 elsewhere."""
    return (x - masked_mean(x, mask)).masked_fill(~mask, 0.0)


def rescale(x: Tensor, mask: Tensor, eps: float = 1e-8) -> Tensor:
    """``x`` [B, T] divided by its standard deviation over ``mask``, mean kept in proportion; exactly 0 elsewhere."""
    return (x * torch.rsqrt(masked_var(x, mask) + eps)).masked_fill(~mask, 0.0)


def normalize(x: Tensor, mask: Tensor, eps: float = 1e-8) -> Tensor:
    """``x`` [B, T] with mean 0 and variance 1 over ``mask``; exactly 0 elsewhere.

    Reference: Huang et al. 2024, https://arxiv.org/abs/2403.17031, detail 25 (masked, with mean shift).
    """
    return rescale(center(x, mask), mask, eps)


def response_mask(lengths: Tensor, width: int) -> Tensor:
    """[B, width] bool, True on the first ``lengths`` [B] positions of each row."""
    return torch.arange(width, device=lengths.device)[None] < lengths[:, None]


def token_logprobs(logits: Tensor, ids: Tensor) -> Tensor:
    """log softmax of ``logits`` [..., V] at ``ids`` [...], in nats; [...]."""
    return logits.gather(-1, ids[..., None]).squeeze(-1) - logits.logsumexp(-1)


class TemperedLogprobs(torch.autograd.Function):
    """log softmax(``logits`` / temperature) [N, V] at ``ids`` [N], in nats and at least float32; [N].

    The logits are tempered in place, and the backward pass makes the gradient, (1[id] - softmax) / temperature, of what
    was kept. Autograd needs twice the memory and passes over the vocabulary for the same.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, ids: Tensor, temperature: float) -> Any:
        tempered = logits if logits.dtype == torch.float64 else logits.float()
        if temperature != 1.0:
            tempered.div_(temperature)
        logprobs = tempered.log_softmax(-1)
        ctx.save_for_backward(logprobs, ids)
        ctx.temperature, ctx.dtype = temperature, logits.dtype
        return logprobs.gather(-1, ids[:, None]).squeeze(-1)

    @staticmethod
    def backward(ctx: Any, grad: Any) -> Any:
        logprobs, ids = ctx.saved_tensors
        share = (grad / ctx.temperature)[:, None]
        gradient = logprobs.exp_().mul_(-share).scatter_add_(1, ids[:, None], share)
        return gradient.to(ctx.dtype), None, None


def entropy(logits: Tensor) -> Tensor:
    """Shannon entropy of softmax(``logits`` [..., V]) in nats; [...]."""
    logp = logits.log_softmax(-1)
    return -(logp.exp() * logp).sum(-1)


def full_kl(logits_p: Tensor, logits_q: Tensor) -> Tensor:
    """KL(p || q) over the vocabulary, in nats, of two softmax distributions given as logits [..., V]; [...]."""
    logp, logq = logits_p.log_softmax(-1), logits_q.log_softmax(-1)
    return (logp.exp() * (logp - logq)).sum(-1)


def thirds(mask: Tensor) -> dict[str, Tensor]:
    """Three masks [B, T] that divide every row's tokens; ``mask`` [B, T] is True on the first n positions of a row.

    Position t of n belongs to the third that holds t / n, the share of the response before it. A row of one token is
    all first third.
    """
    shares = torch.arange(mask.shape[1], device=mask.device)[None] * 3 // mask.sum(1, keepdim=True).clamp_min(1)
    return {name: mask & (shares == index) for index, name in enumerate(("first", "middle", "last"))}


def explained_variance(values: Tensor, outcomes: Tensor, mask: Tensor) -> Tensor:
    """1 - Var(outcomes - values) / Var(outcomes) over ``mask``, every token alike; 0-d.

    NaN where the outcomes do not vary, or ``mask`` is True nowhere. A critic that knows nothing has 0; one that says
    something unrelated has less.
    """
    spread = masked_var(outcomes, mask)
    share = 1.0 - masked_var(outcomes - values, mask) / spread
    return share.masked_fill(spread == 0, float("nan"))
