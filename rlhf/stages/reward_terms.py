"""What the rewards of a stage, each under its key, need from outside: runs, examinations and models."""

from __future__ import annotations

from collections.abc import Mapping

from rlhf.config.rewards import ClassifierSection, RewardSource
from rlhf.preflight.needs import Parent

Rewards = Mapping[str, RewardSource]


def reward_runs(rewards: Rewards) -> tuple[Parent, ...]:
    return tuple(
        Parent(at, run, ("reward",)) for key, one in rewards.items() for at, run in one.runs_below(key).items()
    )


def examinations(rewards: Rewards) -> tuple[Parent, ...]:
    return tuple(
        Parent(f"{key}.examination", one.examination, ("examination",))
        for key, one in rewards.items()
        if one.examination
    )


def calibrations(rewards: Rewards) -> tuple[Parent, ...]:
    return tuple(
        Parent(f"{key}.length_calibration", one.length_calibration, ("examination",))
        for key, one in rewards.items()
        if one.length_calibration
    )


def classifiers(rewards: Rewards) -> tuple[tuple[str, ClassifierSection], ...]:
    return tuple((f"{key}.model", one.model) for key, one in rewards.items() if one.model)
