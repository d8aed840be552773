"""Whose tokenizer reads the rows of a stage, worked out without loading one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rlhf import artifacts, origins
from rlhf.config.rewards import ClassifierSection
from rlhf.config.sections import ModelSection
from rlhf.config.stages import EvalRmConfig, SftConfig
from rlhf.errors import RlhfError
from rlhf.planning import specs
from rlhf.preflight import Checked


@dataclass(frozen=True)
class Reading:
    """The model whose tokenizer it is, and a sentence about it.

    Args:
        model: None where nothing says whose, or it cannot be had.
        note: why it is None, or who names the model where the config and its finished parents do not; else empty.
    """

    model: ModelSection | ClassifierSection | None
    note: str = ""


def of(checked: Checked) -> Reading:
    """What a stage reads its rows with.

    A parent that has not been run yet gives it too, where a config next to this one makes that parent.
    """
    try:
        found = _named(checked)
    except RlhfError as error:
        problem = error.problems[0]
        return Reading(None, f"{problem.where}: {problem.what.rstrip('.')}")
    if found.model and (away := origins.not_reached([("tokenizer", found.model)], {})):
        return Reading(None, f"{away[0].where}: {away[0].what.rstrip('.')}")
    return found


def _named(checked: Checked) -> Reading:
    """As ``of``, without asking the hub.

    Raises:
        RlhfError: CKP001 where no config makes a parent that is missing; as ``origins.model_of``.
    """
    config, parents = checked.config, checked.needs.parents
    if isinstance(config, EvalRmConfig) and config.model:
        return Reading(config.model)
    if checked.needs.model:
        return Reading(checked.needs.model)
    parent = parents[0]
    if parent.key in checked.plan.parents:
        return Reading(origins.model_of(checked.plan.parents[parent.key]))
    root = _root(parent.run_dir, checked.folders)
    missing = f"{parent.run_dir} has not been run yet"
    if isinstance(root, str):
        model = origins.model_of(artifacts.read(root))
        return Reading(model, f"the tokenizer of {model.path}, on which {root} was made; {missing}")
    path, sft = root
    return Reading(sft.model, f"the tokenizer of {sft.model.path}, which {path} names; {missing}")


def _root(run_dir: str, folders: Sequence[Path]) -> str | tuple[Path, SftConfig]:
    """As ``specs.root_of``, in the first folder that tells."""
    refused: list[RlhfError] = []
    for folder in folders:
        try:
            return specs.root_of(run_dir, folder)
        except RlhfError as error:
            refused.append(error)
    raise refused[0]
