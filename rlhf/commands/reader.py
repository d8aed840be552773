"""Whose tokenizer reads the rows of a stage, worked out without loading one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rlhf.config.rewards import ClassifierSection
from rlhf.config.sections import ModelSection
from rlhf.errors import RlhfError
from rlhf.planning.specs import Origin
from rlhf.preflight import origins
from rlhf.preflight.prepare import Checked
from rlhf.runs import artifacts
from rlhf.stages import ancestry


@dataclass(frozen=True)
class Reading:
    """The model whose tokenizer it is, and a sentence about it; no model where nothing says whose, or it cannot be had.

    Args:
        classifier: a model from elsewhere, which has a reader of its own.
        note: why there is no model, or what names it if neither the config nor a finished parent does; else empty.
    """

    model: ModelSection | None = None
    classifier: ClassifierSection | None = None
    note: str = ""

    @property
    def is_known(self) -> bool:
        return self.model is not None or self.classifier is not None


def of(checked: Checked) -> Reading:
    """What a stage reads its rows with.

    A parent that has not been run yet gives it too, where a config next to this one makes that parent.
    """
    try:
        found = _named(checked)
    except RlhfError as error:
        problem = error.problems[0]
        return Reading(note=f"{problem.where}: {problem.what.rstrip('.')}")
    named = found.model or found.classifier
    if named and (away := origins.not_reached([("tokenizer", named)], {})):
        return Reading(note=f"{away[0].where}: {away[0].what.rstrip('.')}")
    return found


def _named(checked: Checked) -> Reading:
    """As ``of``, without asking the hub.

    Raises:
        RlhfError: CKP001 where no config makes a parent that is missing; as ``origins.model_of``.
    """
    needs = checked.needs
    if needs.model:
        return Reading(needs.model)
    if not needs.parents:
        return Reading(classifier=needs.scorers[0][1])
    parent = needs.parents[0]
    if parent.key in checked.plan.parents:
        return Reading(origins.model_of(checked.plan.parents[parent.key]))
    root = _root(parent.run_dir, checked.folders)
    missing = f"{parent.run_dir} has not been run yet"
    if isinstance(root, str):
        model = origins.model_of(artifacts.read(root))
        return Reading(model, note=f"the tokenizer of {model.path}, on which {root} was made; {missing}")
    return Reading(root.model, note=f"the tokenizer of {root.source}, which {root.said_by} names; {missing}")


def _root(run_dir: str, folders: Sequence[Path]) -> str | Origin:
    """As ``ancestry.root_of``, in the first folder that tells."""
    refused: list[RlhfError] = []
    for folder in folders:
        try:
            return ancestry.root_of(run_dir, folder)
        except RlhfError as error:
            refused.append(error)
    raise refused[0]
