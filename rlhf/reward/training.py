"""The members of an ensemble as they are trained, one after the other: whose turn it is, and with what."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate

from rlhf import runtime
from rlhf.checkpoints import Position
from rlhf.config.sections import OptimSection
from rlhf.data.batches import DataOrder
from rlhf.data.records import prompt_key
from rlhf.data.tokenised import Group
from rlhf.models.roles import Roles
from rlhf.optimizer import Optimizer
from rlhf.reward import members as draws
from rlhf.reward.length import LengthPenalty
from rlhf.reward.member_roles import MemberRoles
from rlhf.snapshots import Stateful


@dataclass(frozen=True)
class Member:
    """One member: its role, its optimizer, the rows that it is trained on and their order, its number of steps."""

    slot: str
    rows: list[int]
    steps: int
    optimizer: Optimizer
    order: DataOrder
    length: LengthPenalty

    def next(self, groups: Sequence[Group]) -> list[Group]:
        """Its next batch."""
        return [groups[self.rows[index]] for index in self.order.next()]


class Turns:
    """Every member's training in one count of steps. With one member its seed and rows are the run's."""

    def __init__(self, made: Sequence[Member]) -> None:
        self.members = list(made)
        self.ends = list(accumulate(member.steps for member in made))
        self.position = Position()

    @property
    def steps(self) -> int:
        return self.ends[-1]

    def at(self, step: int) -> tuple[int, Member, int]:
        """Number and member whose turn step ``step`` is, from 1 on, and which of its own steps that is."""
        index = next(index for index, end in enumerate(self.ends) if step <= end)
        member = self.members[index]
        return index, member, step - self.ends[index] + member.steps

    def end_of(self, member: Member) -> None:
        """A member that has had its last step needs no moments any more."""
        if len(self.members) > 1:
            member.optimizer.release()

    def state(self, roles: Roles) -> dict[str, Stateful]:
        """What changes during the run, member by member."""
        found: dict[str, Stateful] = {"position": self.position}
        for index, member in enumerate(self.members):
            suffix = f"/{index}" if len(self.members) > 1 else ""
            found |= {
                member.slot: roles.state(member.slot),
                f"optimizer{suffix}": member.optimizer,
                f"order{suffix}": member.order,
            }
            if member.length.coef:
                found[f"length{suffix}"] = member.length
        return found


@dataclass(frozen=True)
class MemberSettings:
    """What every member's training reads of the config."""

    optim: OptimSection
    batch_size: int
    length_coef: float


def turns(
    members: MemberRoles,
    groups: Sequence[Group],
    rows: Sequence[list[int]],
    seeds: Sequence[int],
    num_steps: Callable[[int], int],
    settings: MemberSettings,
) -> Turns:
    """Each slot as a member.

    Args:
        rows, seeds: of each member, as ``rows_of`` and ``member_seeds`` give them.
        num_steps: of a member that is trained on so many rows.
    """
    made = []
    for slot, own, seed in zip(members.slots, rows, seeds, strict=True):
        steps, optim = num_steps(len(own)), settings.optim
        optimizer = Optimizer(
            members.roles.trained_parameters(slot),
            optim.learning_rate,
            steps,
            weight_decay=optim.weight_decay,
            warmup_ratio=optim.warmup_ratio,
            schedule=optim.schedule,
            max_grad_norm=optim.max_grad_norm,
        )
        order = DataOrder(len(own), settings.batch_size, seed)
        made.append(Member(slot, own, steps, optimizer, order, LengthPenalty(settings.length_coef, groups)))
    return Turns(made)


def member_seeds(num_members: int, seed: int) -> list[int]:
    """A seed a member; of a single one the run's own."""
    if num_members == 1:
        return [seed]
    return [runtime.derived_seed(seed, "train-rm", "member", index) for index in range(num_members)]


def rows_of(groups: Sequence[Group], data: str, num_members: int, seed: int) -> list[list[int]]:
    """The rows that each member is trained on.

    Args:
        data: bootstrap, folds or all; a single member is trained on all.
    """
    if num_members == 1 or data == "all":
        return [list(range(len(groups)))] * num_members
    prompts = [prompt_key(group.record.prompt) for group in groups]
    if data == "bootstrap":
        return [draws.bootstrapped(prompts, one) for one in member_seeds(num_members, seed)]
    shared = runtime.derived_seed(seed, "train-rm", "folds")
    return [draws.all_but_fold(prompts, index, num_members, shared) for index in range(num_members)]
