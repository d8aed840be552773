"""What each reward role starts from: the policy and a fresh head, or another reward run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from rlhf.config.train_rm import COMBINED, RewardConfig
from rlhf.errors import Problem, RlhfError
from rlhf.models import adapters, merged
from rlhf.models.adapter_part import AdapterPart, of_member
from rlhf.models.base import Base
from rlhf.models.heads import ScalarHead
from rlhf.models.roles import Roles, SeparateModels, SharedBase
from rlhf.preflight.origins import START
from rlhf.preflight.prepare import Plan
from rlhf.reward.member_turns import member_seeds
from rlhf.runs import artifacts


def roles(
    config: RewardConfig, plan: Plan, base: Base, slots: Sequence[str], names: Sequence[str] | None = None
) -> Roles:
    """The policy as it is, and each reward role: an adapter once more, or a copy of the model to train whole.

    Args:
        names: of the heads; None: one score.
    """
    shared = SharedBase(base)
    shared.add("policy", adapter=artifacts.adapter_of(config.policy), trained=False)
    found: SharedBase | SeparateModels = shared
    if config.lora:
        members = zip(slots, _runs(config), config.ranks, _parts(config, base), member_seeds(config), strict=True)
        for slot, run, rank, part, seed in members:
            if config.members > 1:
                torch.manual_seed(seed)
            head = ScalarHead(base.hidden_size, names or (COMBINED,)) if run is None else raw_head(run, names)
            start = artifacts.adapter_of(run) if run else None
            start_of = start or adapters.start_of(config.policy, config.lora, base)
            shared.add(slot, adapter=start_of, head=head, trained=True, rank=rank, part=part)
            _require_adapted(shared, slot, part)
    else:
        (run,) = _runs(config)
        head = ScalarHead(base.hidden_size, names or (COMBINED,)) if run is None else raw_head(run, names)
        found = SeparateModels(base.device)
        found.adopt(shared)
        found.add("reward", _copy(config, plan, base), head=head, trained=True)
    if config.runtime.gradient_checkpointing:
        found.enable_gradient_checkpointing()
    return found


def raw_head(run_dir: Path, names: Sequence[str] | None = None) -> ScalarHead:
    """A reward run's head as it was trained, before its scores were standardised and combined."""
    head = ScalarHead.load(artifacts.head_of(run_dir)).only(names or (COMBINED,))
    head.shift.zero_()
    head.scale.fill_(1.0)
    return head


def _runs(config: RewardConfig) -> list[Path | None]:
    """For each member the directory of adapter and head that it goes on from."""
    if config.init_from is None:
        return [None] * config.members
    found = artifacts.members_of(config.init_from)
    return [*found] if len(found) > 1 else [found[0]] * config.members


def _parts(config: RewardConfig, base: Base) -> list[AdapterPart | None]:
    """What each member trains of its adapter."""
    whole: list[None] = [None] * config.members
    both = zip(config.ensemble.layers or whole, config.ensemble.target_modules or whole, strict=True)
    return [of_member(layers, modules, index, base.model) for index, (layers, modules) in enumerate(both)]


def _require_adapted(roles: SharedBase, slot: str, part: AdapterPart | None) -> None:
    """Raise MOD030 for a part of which the adapter, which is the policy's, has nothing: its head alone would learn."""
    names = [name for name, _ in roles.peft(slot).named_parameters() if adapters.belongs(name, slot)]
    if part and (missing := part.without(names)):
        what = f"{slot}: the policy's adapter has nothing in {', '.join(missing)}."
        raise RlhfError(Problem("MOD030", "ensemble", what, "blocks and linear layers that SFT adapted"))


def _copy(config: RewardConfig, plan: Plan, base: Base) -> Base:
    start = config.init_from or config.policy
    copy = merged.copy_of(start, plan.parents[START if config.init_from else "policy"], base.device)
    if not copy.chat.same_tokens(base.chat):
        what = f"{start} does not have the tokens of {config.policy}."
        raise RlhfError(Problem("MOD021", START, what, "a reward run on the same base"))
    return copy
