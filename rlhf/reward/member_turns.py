"""The members of an ensemble as they are trained, one after the other: whose turn it is, and with what."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate

from rlhf.config.train_rm import RewardConfig
from rlhf.data.batches import DataOrder, micro_batches
from rlhf.data.tokenised import Group
from rlhf.models.roles import Roles
from rlhf.records import prompt_key
from rlhf.reward import member_data
from rlhf.reward.length_penalty import LengthPenalty
from rlhf.runs import runtime
from rlhf.runs.checkpoints import Position
from rlhf.runs.snapshots import Stateful
from rlhf.training.optimizer import Optimizer


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


def turns(
    config: RewardConfig, roles: Roles, slots: Sequence[str], groups: Sequence[Group], num_steps: Callable[[int], int]
) -> Turns:
    """Each slot as a member.

    Args:
        num_steps: of a member that is trained on so many rows.
    """
    rows = rows_of(config, groups)
    seeds = member_seeds(config)
    return Turns(
        [
            _member(config, roles, slot, own, num_steps(len(own)), seed, LengthPenalty(config.length_coef, groups))
            for slot, own, seed in zip(slots, rows, seeds, strict=True)
        ]
    )


def member_seeds(config: RewardConfig) -> list[int]:
    """A seed a member; of a single one the run's own."""
    if config.members == 1:
        return [config.seed]
    return [runtime.derived_seed(config.seed, "train-rm", "member", index) for index in range(config.members)]


def rows_of(config: RewardConfig, groups: Sequence[Group]) -> list[list[int]]:
    """The rows that each member is trained on."""
    if config.members == 1 or config.ensemble.data == "all":
        return [list(range(len(groups)))] * config.members
    prompts = [prompt_key(group.record.prompt) for group in groups]
    if config.ensemble.data == "bootstrap":
        return [member_data.bootstrapped(prompts, seed) for seed in member_seeds(config)]
    shared = runtime.derived_seed(config.seed, "train-rm", "folds")
    return [member_data.all_but_fold(prompts, index, config.members, shared) for index in range(config.members)]


def _member(
    config: RewardConfig, roles: Roles, slot: str, rows: list[int], steps: int, seed: int, length: LengthPenalty
) -> Member:
    optim = config.optim
    optimizer = Optimizer(
        roles.trained_parameters(slot),
        optim.learning_rate,
        steps,
        weight_decay=optim.weight_decay,
        warmup_ratio=optim.warmup_ratio,
        schedule=optim.schedule,
        max_grad_norm=optim.max_grad_norm,
    )
    return Member(slot, rows, steps, optimizer, DataOrder(len(rows), config.batch.batch_size, seed), length)


def parts(config: RewardConfig, groups: Sequence[Group]) -> list[list[Group]]:
    """The groups in micro-batches, as the config limits them."""
    return micro_batches_of_groups(groups, config.batch.micro_batch_size, config.batch.micro_batch_tokens)


def micro_batches_of_groups(
    groups: Sequence[Group], max_groups: int, max_tokens: int | None = None
) -> list[list[Group]]:
    """Groups sorted by their tokens, at most ``max_groups`` and ``max_tokens`` at a time; a group is never split."""
    tokens = [len(group.responses) * len(group.prompt_ids) + sum(map(len, group.responses)) for group in groups]
    return [[groups[index] for index in part] for part in micro_batches(tokens, max_groups, max_tokens)]
