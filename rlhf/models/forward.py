"""The forward passes of training and scoring: the backbone once, the LM head over response tokens alone.

Letters: B sequences, T response tokens of the longest, N response tokens in all, V vocabulary, d hidden size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from rlhf.data.batches import Sequences
from rlhf.limits import CHUNK_VALUES
from rlhf.losses import tensors
from rlhf.models import packing
from rlhf.models.fused import logits as head_logits
from rlhf.models.roles import Roles


@dataclass(frozen=True)
class PolicyAndReference:
    """Without gradient; [B, T] of the tempered policies, 0 where there is no token.

    Args:
        ref_hidden: [N, d] last hidden states of the reference before each response token is written.
    """

    logprobs: Tensor
    ref_logprobs: Tensor
    entropy: Tensor
    exact_kl: Tensor
    ref_hidden: Tensor


def response_logprobs(model: Any, sequences: Sequences, temperature: float) -> Tensor:
    """[B, T] log-probability of every response token, in nats, with gradient; 0 where there is no token.

    The head runs over N rows in chunks that are computed again in the backward pass, so that N x V logits never exist
    at once. Float32 from the logits on.
    """
    return response_logprobs_of(model, sequences, temperature, _chunk_logprobs)[0]


def response_logprobs_and_entropy(model: Any, sequences: Sequences, temperature: float) -> tuple[Tensor, Tensor]:
    """As ``response_logprobs``, and the entropy [B, T] of each token's distribution, with gradient too."""
    found = response_logprobs_of(model, sequences, temperature, _chunk_logprobs_and_entropy)
    return found[0], found[1]


def response_logprobs_of(model: Any, sequences: Sequences, temperature: float, per_chunk: Any) -> list[Tensor]:
    """What ``per_chunk`` gives for each token, as [B, T] each."""
    hidden = states_before(model, sequences)
    targets = sequences.ids[sequences.targets]
    head, size = model.get_output_embeddings(), chunk_size(model)
    parts = []
    for part, ids in zip(hidden.split(size), targets.split(size), strict=True):
        if torch.is_grad_enabled() and len(hidden) > size:
            parts.append(checkpoint(per_chunk, head, part, ids, temperature, use_reentrant=False))
        else:
            parts.append(per_chunk(head, part, ids, temperature))
    return [scatter(torch.cat(column), sequences) for column in zip(*parts, strict=True)]


@torch.no_grad()
def policy_and_reference(roles: Roles, sequences: Sequences, temperature: float) -> PolicyAndReference:
    """Logprobs under both roles and, from the same pass over the vocabulary, entropy and exact KL of the policy.

    Each role's logits come from the head as that role has it: a trained token row belongs to one of them only.
    """
    targets = sequences.ids[sequences.targets]
    hidden: dict[str, Tensor] = {}
    for role in ("policy", "reference"):
        with roles.acting_as(role) as (model, _):
            hidden[role] = states_before(model, sequences)
            size = max(1, chunk_size(model) // 2)  # four such tensors stand at once, two in a policy update
    columns: list[list[Tensor]] = [[], [], [], []]
    for start in range(0, len(targets), size):
        part = slice(start, start + size)
        logits = {}
        for role in ("policy", "reference"):
            with roles.acting_as(role) as (model, _):
                logits[role] = head_logits.of(model.get_output_embeddings(), hidden[role][part]).div_(temperature)
        policy, reference = (logits.pop(role).log_softmax(-1) for role in ("policy", "reference"))
        ids = targets[part][:, None]
        chosen, ref_chosen = policy.gather(1, ids)[:, 0], reference.gather(1, ids)[:, 0]
        p, less = policy.exp(), reference.sub_(policy)
        found = chosen, ref_chosen, -p.mul(policy).sum(-1), -p.mul_(less).sum(-1)
        for column, values in zip(columns, found, strict=True):
            column.append(values)
    logprobs, ref_logprobs, entropy, kl = (scatter(torch.cat(column), sequences) for column in columns)
    return PolicyAndReference(logprobs, ref_logprobs, entropy, kl, hidden["reference"])


@torch.no_grad()
def policy_alone(roles: Roles, sequences: Sequences, temperature: float) -> tuple[Tensor, Tensor]:
    """Logprobs and entropy [B, T] of the tempered policy, without gradient; bit for bit those of both roles' pass."""
    with roles.acting_as("policy") as (model, _):
        logprobs, entropy = response_logprobs_of(model, sequences, temperature, _chunk_rescored)
    return logprobs, entropy


def state_values(model: Any, head: Any, sequences: Sequences) -> Tensor:
    """[B, T] value of the state before each response token is written; 0 where there is no token."""
    return scatter(head(states_before(model, sequences))[:, 0], sequences)


def end_scores(model: Any, head: Any, sequences: Sequences) -> Tensor:
    """[B, k] what the head reads at the last token of each sequence."""
    if head.gate is not None:
        return head(*end_states(model, sequences))  # type: ignore[no-any-return]
    last = sequences.starts + sequences.prompt_lengths + sequences.response_lengths - 1
    ids, mask = sequences.ids, sequences.attention_mask
    return head(packing.backbone(model, ids, mask, sequences.lengths, last))  # type: ignore[no-any-return]


def end_states(model: Any, sequences: Sequences) -> tuple[Tensor, Tensor]:
    """[B, d] last hidden states at the last token of each sequence, and at the last of its prompt."""
    prompt = sequences.starts + sequences.prompt_lengths - 1
    wanted = torch.cat([prompt + sequences.response_lengths, prompt])
    hidden = packing.backbone(model, sequences.ids, sequences.attention_mask, sequences.lengths, wanted)
    return hidden[: len(prompt)], hidden[len(prompt) :]


def states_before(model: Any, sequences: Sequences) -> Tensor:
    """[N, d] last hidden states before each response token is written; the LM head does not run.

    The last token of a sequence comes before none, and is left out.
    """
    rows, positions = sequences.targets
    lengths = [length - 1 for length in sequences.lengths]
    mask = sequences.attention_mask.scatter(1, sequences.attention_mask.sum(1, keepdim=True) - 1, 0)
    wanted = sequences.starts[rows] - rows + positions - 1
    return packing.backbone(model, sequences.ids, mask, lengths, wanted)


def scatter(values: Tensor, sequences: Sequences) -> Tensor:
    """[N] values of the response tokens as [B, T], 0 elsewhere."""
    whole = torch.zeros(sequences.mask.shape, dtype=values.dtype, device=values.device)
    return whole.masked_scatter(sequences.mask, values)


def chunk_size(model: Any) -> int:
    """Tokens whose logits may exist at once."""
    return max(1, CHUNK_VALUES // int(model.config.get_text_config().vocab_size))


def _chunk_logprobs(head: Any, hidden: Tensor, ids: Tensor, temperature: float) -> tuple[Tensor]:
    return (tensors.TemperedLogprobs.apply(head_logits.of(head, hidden), ids, temperature),)  # type: ignore[no-untyped-call]


def _chunk_rescored(head: Any, hidden: Tensor, ids: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    policy = head_logits.of(head, hidden).div_(temperature).log_softmax(-1)
    return policy.gather(1, ids[:, None])[:, 0], -policy.exp().mul_(policy).sum(-1)


def _chunk_logprobs_and_entropy(head: Any, hidden: Tensor, ids: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    logits = head_logits.of(head, hidden) / temperature
    return tensors.token_logprobs(logits, ids), tensors.entropy(logits)
