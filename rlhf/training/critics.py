"""The contract of a critic, what every critic learns, and the critic of algorithms that need none."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from torch import Tensor

from rlhf.data.batches import Sequences
from rlhf.losses import policy
from rlhf.runs.snapshots import Stateful
from rlhf.training.experience import Experience


class Critic(Protocol):
    """What gives the values of the states that responses go through, and learns from what came of them."""

    def read(self, sequences: Sequences, reference: Tensor | None) -> tuple[Tensor, Tensor] | None:
        """[N] values of the states before the response tokens, and the hidden states [N, d] that they were read from.

        Args:
            reference: [N, d] the reference's hidden states, where the step runs the reference.
        """
        ...

    def start(self, batch: Experience) -> None:
        """Learn from the first batch of all."""
        ...

    def learn(self, batch: Experience, seed: int, step: int) -> dict[str, float]:
        """Learn from a batch; figures by their metric keys."""
        ...

    def state(self) -> dict[str, Stateful]:
        """What a checkpoint holds of it."""
        ...

    def save(self, directory: Path) -> None:
        """Write it where a run keeps its critic."""
        ...


class NoCritic:
    """The critic of algorithms that need none: no pass, no state, no file."""

    def read(self, sequences: Sequences, reference: Tensor | None) -> None:
        return None

    def start(self, batch: Experience) -> None:
        return None

    def learn(self, batch: Experience, seed: int, step: int) -> dict[str, float]:
        return {}

    def state(self) -> dict[str, Stateful]:
        return {}

    def save(self, directory: Path) -> None:
        return None


@dataclass(frozen=True)
class ValueTargets:
    """What a critic is taught and what it is judged by."""

    gamma: float
    lam: float

    def returns(self, rewards: Tensor, values: Tensor, mask: Tensor) -> Tensor:
        """[B, T] what the critic learns: raw advantages by its own lambda + values."""
        raw = policy.gae_advantages(rewards, values, mask, self.gamma, self.lam)
        return policy.returns_from(raw, values, mask)

    def outcomes(self, rewards: Tensor, mask: Tensor) -> Tensor:
        """[B, T] the rewards from each token to the end, into which no value enters."""
        return policy.outcomes(rewards, mask, self.gamma)
