"""The comparisons that a trained reward model contradicts most surely: what people should look at again."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from rlhf.data.tokenised import Group
from rlhf.reward.quality import RewardRoles
from rlhf.runs import artifacts, storage
from rlhf.runs.run_directory import Run
from rlhf.scoring.scorer import Sample

log = logging.getLogger("rlhf")


def write(
    rewards: RewardRoles, most: int, groups: Sequence[Group], rows: Sequence[Sequence[int]], run: Run
) -> dict[str, float]:
    """Write the ``most`` judgements with the lowest difference, one a line; returns what was found.

    A judgement is held against the members that were not trained on its prompt; where there is none, against all, and
    ``seen`` says so.

    Args:
        rows: of each member the places of the groups that it was trained on.
    """
    seen = [set(own) for own in rows]
    samples = _samples(groups)
    scores = [rewards.scores(slot, samples, raw=True) for slot in rewards.slots]
    found, start, num_judged = [], 0, 0
    for index, group in enumerate(groups):
        rows_here = slice(start, start + len(group.responses))
        start += len(group.responses)
        unseen = [member for member, own in enumerate(seen) if index not in own]
        judged = []
        for attribute in dict.fromkeys(judgement.attribute for judgement in group.judgements):
            columns = [one.mean if attribute is None else one.heads[attribute] for one in scores]
            own = torch.stack([column.double()[rows_here] for column in columns], 1)
            values = own[:, unseen].mean(1) if unseen else own.mean(1)
            judged += contradictions(group, values, attribute)
        num_judged += sum(judgement.probability != 0.5 for judgement in group.judgements)
        found += [{**row, "seen": not unseen, "members": len(unseen or rewards.slots)} for row in judged]
    found.sort(key=lambda row: row["difference"])
    kept = found[:most]
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in kept)
    storage.write_text(run.path / artifacts.CONTRADICTED, text)
    log.info(
        "%d of %d comparisons are contradicted; the %d surest are in %s.",
        len(found),
        num_judged,
        len(kept),
        artifacts.CONTRADICTED,
    )
    return {"eval/contradicted": len(found), "eval/judged": num_judged}


def contradictions(group: Group, values: Tensor, attribute: str | None = None) -> list[dict[str, Any]]:
    """The decided judgements of a group (in an attribute, or overall) that its raw scores [K] order the other way, with
    the difference (log-odds of the preferred response, below 0) and the probability that the model gives the label."""
    found = []
    named = {} if attribute is None else {"attribute": attribute}
    for judgement in group.judgements:
        if judgement.attribute != attribute or judgement.probability == 0.5:
            continue
        ahead = judgement.probability > 0.5
        better, worse = (judgement.first, judgement.second) if ahead else (judgement.second, judgement.first)
        difference = float(values[better] - values[worse])
        if difference < 0:
            record = group.record
            found.append(
                {
                    "where": record.where,
                    "difference": difference,
                    "probability": 1 / (1 + math.exp(-difference)),
                    "prompt": [{"role": message.role, "content": message.content} for message in record.prompt],
                    "preferred": record.responses[better],
                    "other": record.responses[worse],
                    **named,
                }
            )
    return found


def _samples(groups: Sequence[Group]) -> list[Sample]:
    """All responses of all groups, one after the other."""
    return [
        Sample(group.record.prompt, text, group.prompt_ids, ids, True, ids)
        for group in groups
        for text, ids in zip(group.record.responses, group.responses, strict=True)
    ]
