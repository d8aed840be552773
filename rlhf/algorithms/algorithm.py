"""The contract of an algorithm, and how the loop finds the one that a config asks for.

To add one: a module here with ``advantages`` and ``loss``, its settings (a subclass of ``UpdateSection`` that names the
module and says whether it needs a critic and groups), and a file in configs/. It knows no model, device or file.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from typing import Any, Protocol, cast

from torch import Tensor

from rlhf.config.ppo_sections import UpdateSection
from rlhf.losses.policy import PolicyLoss


@dataclass(frozen=True)
class Rewarded:
    """A batch of B responses of at most T tokens, fixed while the update runs.

    Args:
        rewards: [B, T] of every token, the KL penalty included; 0 outside ``mask``.
        scores: [B] of whole responses, without the penalty.
        mask: [B, T] bool, True on response tokens up to and including the end token.
        group_size: G; the responses to one prompt are G rows that follow one another.
        values: [B, T] of the critic before it learns from this batch; None without a critic.
    """

    rewards: Tensor
    scores: Tensor
    mask: Tensor
    group_size: int
    values: Tensor | None


@dataclass(frozen=True)
class PolicyTerms:
    """What a policy's loss is made of: some rows of a minibatch, whose loss is a share of the minibatch's.

    Args:
        logprobs: [b, T] with gradient; old_logprobs, advantages: [b, T] without.
        mask: [b, T] bool.
        num_tokens, num_responses: of the whole minibatch, so that its micro-batches add up exactly.
    """

    logprobs: Tensor
    old_logprobs: Tensor
    advantages: Tensor
    mask: Tensor
    num_tokens: int
    num_responses: int


class Algorithm(Protocol):
    """A module of this package. Its settings are the config's ``update`` section.

    Whether it needs a critic, and how large a group, its settings say: plans and checks ask that without torch.
    """

    def advantages(self, batch: Rewarded, settings: Any) -> Tensor:
        """[B, T] not yet normalised; 0 outside the mask."""
        ...

    def loss(self, terms: PolicyTerms, settings: Any) -> PolicyLoss:
        """To be minimised; the loop adds the entropy bonus, and the KL where that stands in the loss."""
        ...


def algorithm_of(settings: UpdateSection) -> Algorithm:
    """The algorithm whose settings these are."""
    return cast(Algorithm, import_module(f"rlhf.algorithms.{settings.algorithm}"))
