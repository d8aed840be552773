"""One batch of rollouts: everything that policy and critic learn from, and the figures that a person watches."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from rlhf.data.batches import PassSize, Sequences, collate
from rlhf.losses import tensors
from rlhf.scoring.scorer import Sample


@dataclass(frozen=True)
class Passes:
    """How rows of a batch become forward passes: their size, what pads them, and where they are computed."""

    size: PassSize
    pad_id: int
    device: torch.device


@dataclass(frozen=True)
class MicroBatch:
    """Some rows of a batch, and their sequences on the device."""

    rows: list[int]
    sequences: Sequences

    @property
    def mask(self) -> Tensor:
        """[b, T] bool."""
        return self.sequences.mask

    def of(self, whole: Tensor) -> Tensor:
        """These rows of a [B, T] tensor, as narrow as ``mask``, on its device."""
        return whole[self.rows, : self.mask.shape[1]].to(self.mask.device)


@dataclass(frozen=True)
class Experience:
    """One batch of rollouts, B responses of at most T tokens, all fixed while the update runs.

    Args:
        scores: [B] after the missing-EOS rule.
        mask: [B, T] bool, True on response tokens up to and including the end token.
        old_logprobs, entropy: [B, T] of the tempered policy; ref_logprobs, exact_kl: None where no step reads the
            reference.
        old_values: [B, T] before the critic learns from this batch, 0 without a critic; rewards: [B, T].
        advantages: [B, T] not yet normalised; returns: [B, T] what a critic learns.
        outcomes: [B, T] the rewards from each token to the end, which ``old_values`` are judged by.
        states: what the critic read: rows of a micro-batch, and the hidden states [n, d] before their response tokens;
            empty without a critic.
        disagreement: [B] of an ensemble's members that are compared in differences.
        terms: name -> [B] of each term of the score as it enters the sum, before the missing-EOS rule.
    """

    samples: list[Sample]
    scores: Tensor
    mask: Tensor
    old_logprobs: Tensor
    entropy: Tensor
    old_values: Tensor
    rewards: Tensor
    advantages: Tensor
    returns: Tensor
    outcomes: Tensor
    ref_logprobs: Tensor | None = None
    exact_kl: Tensor | None = None
    states: Sequence[tuple[list[int], Tensor]] = ()
    disagreement: Tensor | None = None
    terms: Mapping[str, Tensor] = field(default_factory=dict)

    def sequences(self, rows: Sequence[int], pad_id: int, device: torch.device) -> Sequences:
        """The token ids of some rows, padded only as far as these need."""
        chosen = [self.samples[row] for row in rows]
        return collate([s.prompt_ids for s in chosen], [s.response_ids for s in chosen], pad_id, device)

    def micro_batches(self, rows: Sequence[int], passes: Passes) -> Iterator[MicroBatch]:
        """The micro-batches of some rows."""
        lengths = [len(self.samples[row].prompt_ids) + len(self.samples[row].response_ids) for row in rows]
        for indices in passes.size.split(lengths):
            chosen = [rows[index] for index in indices]
            yield MicroBatch(chosen, self.sequences(chosen, passes.pad_id, passes.device))

    @property
    def metrics(self) -> dict[str, float]:
        """What a person watches of a batch."""
        finished = [sample.finished for sample in self.samples]
        gaps = [
            (torch.tensor(sample.logprobs) - own[: len(sample.logprobs)]).abs()
            for sample, own in zip(self.samples, self.old_logprobs, strict=True)
            if sample.logprobs is not None
        ]
        lengths = self.mask.sum(1).double()
        others = {} if self.disagreement is None else {"rollout/disagreement": float(self.disagreement.mean())}
        if self.ref_logprobs is not None and self.exact_kl is not None:
            kl = tensors.masked_sum(self.old_logprobs - self.ref_logprobs, self.mask) / len(finished)
            others["rollout/kl_nats"] = float(kl)
            others["rollout/exact_kl_nats"] = float(self.exact_kl.double().sum(1).mean())
        return {
            "rollout/score": float(self.scores.double().mean()),
            "rollout/score_std": float(self.scores.double().std(correction=0)),
            **{f"rollout/score/{name}": float(term.double().mean()) for name, term in self.terms.items()},
            "rollout/entropy_nats": float(tensors.masked_mean(self.entropy, self.mask)),
            "rollout/response_tokens": float(lengths.mean()),
            "rollout/end_token_rate": sum(finished) / len(finished),
            **self._explained(),
            **({"rollout/engine_gap_nats": float(torch.cat(gaps).mean())} if gaps else {}),
            **others,
        }

    def _explained(self) -> dict[str, float]:
        """How much of the real outcomes the critic foretold, over all tokens and by thirds of each response."""
        if not self.states:
            return {}
        name, masks = "rollout/explained_variance", tensors.thirds(self.mask)
        parts = {name: self.mask, **{f"{name}_{third}_third": mask for third, mask in masks.items()}}
        return {
            key: float(tensors.explained_variance(self.old_values, self.outcomes, mask)) for key, mask in parts.items()
        }
