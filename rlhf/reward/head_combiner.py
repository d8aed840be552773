"""After training of several heads: what they are combined to, for each member, as one more number of its head."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import numpy
import torch
from torch import Tensor

from rlhf.config.train_rm import COMBINED, Combination
from rlhf.data.batches import collate
from rlhf.data.tokenised import Group
from rlhf.errors import Problem, RlhfError
from rlhf.losses.attribute_heads import Heads
from rlhf.models import forward
from rlhf.models.base import Base
from rlhf.records import Comparison, split_by_prompt
from rlhf.reward.head_weights import Array, fit_gate, fit_weights
from rlhf.reward.member_turns import micro_batches_of_groups
from rlhf.reward.quality import RewardRoles

log = logging.getLogger("rlhf")


def split(
    combine: str, seed: int, held_out: Sequence[Comparison], train: Sequence[Comparison]
) -> tuple[Sequence[Comparison], Sequence[Comparison]]:
    """The held-out records to measure on, and the records that a combination is fitted to: for weights half of the
    held-out prompts, for a gate the training records.

    Raises:
        RlhfError: DAT058 where there is no overall comparison to fit to.
    """
    if combine == "weights":
        return held_out, ()
    measured, fitted = held_out, train
    if combine == "fitted":
        measured, fitted = split_by_prompt(held_out, 0.5, seed)
    fitted = [record for record in fitted if record.of(None)]
    if not fitted:
        what = f"none of the prompts that combine: {combine} is fitted on has an overall comparison."
        raise RlhfError(Problem("DAT058", "data", what, "a larger holdout_fraction, or more overall comparisons"))
    return measured, fitted


def combine(
    how: Combination, heads: Heads, rewards: RewardRoles, base: Base, groups: Sequence[Group]
) -> dict[str, Any]:
    """Give the head of every slot its combined number; returns what is to be told of it.

    Args:
        groups: with overall comparisons, which weights or a gate are fitted to.
    """
    if len(heads.names) == 1:
        return {}
    roles = rewards.roles
    told: dict[str, Any] = {"combine": how.combine, "weights": []}
    for slot in rewards.slots:
        weights, gate = numpy.array(heads.weights), None
        if how.combine != "weights":
            found = _states(rewards, slot, base, groups)
            probabilities, shares, places, owners = _comparisons(groups)
            differences = found[0][places[:, 0]] - found[0][places[:, 1]]
            if how.combine == "fitted":
                weights = fit_weights(differences, probabilities, shares)
            else:
                gate = fit_gate(differences, found[1][owners], probabilities, shares, how.gate_penalty)
                weights = gate.scale * gate.shares(torch.from_numpy(found[1])).mean(0).numpy()
            told["comparisons"] = len(probabilities)
        head = roles.head(slot).combined(COMBINED, weights.tolist())
        if gate:
            head.set_gate(gate.weight, gate.bias, gate.scale)
        roles.set_head(slot, head)
        told["weights"].append(dict(zip(heads.names, weights.tolist(), strict=True)))
        said = ", ".join(f"{weight:.3f} {name}" for name, weight in told["weights"][-1].items())
        log.info("%s combines its heads: %s%s.", slot, said, " on average" if gate else "")
    return told


@torch.no_grad()
def _states(rewards: RewardRoles, slot: str, base: Base, groups: Sequence[Group]) -> tuple[Array, Array]:
    """[R, k] raw scores of all responses in the order of the groups, and [G, d] the hidden state at the end of each
    group's prompt, in float64."""
    scores: dict[int, Tensor] = {}
    prompts: dict[int, Tensor] = {}
    places = {id(group): index for index, group in enumerate(groups)}
    batch = rewards.batch
    for part in micro_batches_of_groups(groups, batch.micro_batch_size, batch.micro_batch_tokens):
        ids = [group.prompt_ids for group in part for _ in group.responses]
        responses = [response for group in part for response in group.responses]
        with rewards.roles.acting_as(slot) as (model, head):
            last, prompt = forward.end_states(model, collate(ids, responses, base.chat.pad_id, base.device))
            sizes = [len(group.responses) for group in part]
            for group, own, states in zip(part, head.raw(last).split(sizes), prompt.split(sizes), strict=True):
                scores[places[id(group)]], prompts[places[id(group)]] = own.double().cpu(), states[0].double().cpu()
    order = range(len(groups))
    return torch.cat([scores[index] for index in order]).numpy(), torch.stack([prompts[i] for i in order]).numpy()


def _comparisons(groups: Sequence[Group]) -> tuple[Array, Array, Any, list[int]]:
    """[N] probabilities, [N] shares that give every group the same weight, [N, 2] responses in the order of all, [N]
    groups."""
    probabilities, shares, places, owners, start = [], [], [], [], 0
    for index, group in enumerate(groups):
        judgements = group.record.of(None)
        for judgement in judgements:
            probabilities.append(judgement.probability)
            shares.append(1 / len(judgements))
            places.append((start + judgement.first, start + judgement.second))
            owners.append(index)
        start += len(group.responses)
    return numpy.array(probabilities), numpy.array(shares), numpy.array(places), owners
