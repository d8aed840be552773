"""What can be checked before any weight is loaded: config, parents, every data row, and the run's identity."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf import artifacts
from rlhf.artifacts import Manifest
from rlhf.config.load import flatten
from rlhf.config.sections import DataSection, ModelSection
from rlhf.config.stages import StageConfig
from rlhf.data.sources import Loaded
from rlhf.demo import registry as demo
from rlhf.errors import Problem, RlhfError

NOT_IDENTITY = ("run_dir", "runtime", "report_to", "save_every")


@dataclass(frozen=True)
class Parent:
    """A run that a stage is made from."""

    key: str
    run_dir: str
    kinds: tuple[str, ...]


@dataclass(frozen=True)
class Input:
    """A data set that a stage reads, and the reader of its form."""

    key: str
    section: DataSection
    read: Callable[[DataSection], Loaded]


@dataclass(frozen=True)
class Needs:
    """All that a stage reads from outside its config."""

    parents: tuple[Parent, ...] = ()
    inputs: tuple[Input, ...] = ()
    model: ModelSection | None = None


@dataclass(frozen=True)
class Plan:
    """A checked start: the parents' manifests, the data rows, the identity, and what could not be checked."""

    parents: dict[str, Manifest]
    data: dict[str, Loaded]
    identity: dict[str, Any]
    unchecked: tuple[str, ...]

    def notes(self) -> list[str]:
        """What is to be said of the data that was read."""
        return [f"{key}: {note}" for key, loaded in self.data.items() for note in loaded.notes()]

    def parents_table(self, needs: Needs) -> dict[str, dict[str, str]]:
        """For the manifest: key -> run directory and digest of each parent."""
        return {
            parent.key: {"run_dir": parent.run_dir, "digest": self.parents[parent.key].digest}
            for parent in needs.parents
        }


def prepare(config: StageConfig, needs: Needs, parents_may_be_missing: bool = False) -> Plan:
    """Check everything that needs no weights; all problems of a phase are raised together.

    Args:
        parents_may_be_missing: a parent that has not been run yet is only noted, as for ``rlhf check`` of a chain.
    """
    unchecked: list[str] = []
    problems: list[Problem] = []
    data: dict[str, Loaded] = {}
    parents: dict[str, Manifest] = {}
    for item in needs.inputs:
        try:
            data[item.key] = item.read(item.section)
        except RlhfError as error:
            problems += error.problems
    for parent in needs.parents:
        if parents_may_be_missing and not artifacts.is_finished(Path(parent.run_dir)):
            unchecked.append(f"{parent.key}: {parent.run_dir} has not been run yet")
            continue
        try:
            parents[parent.key] = artifacts.read(parent.run_dir, *parent.kinds, where=parent.key)
            artifacts.verify(Path(parent.run_dir), parents[parent.key])
        except RlhfError as error:
            problems += error.problems
    problems += _other_bases(parents)
    base_digest = _base_digest(needs.model, problems, unchecked)
    if problems:
        raise RlhfError(*problems)
    unchecked.append("token lengths and model weights (a --dry-run counts tokens)")
    return Plan(parents, data, _identity(config, data, parents, base_digest), tuple(unchecked))


def _other_bases(parents: Mapping[str, Manifest]) -> list[Problem]:
    """Roles share one base: a parent that was made on another one than the first parent is a problem."""
    bases = [(key, manifest.base) for key, manifest in parents.items() if manifest.base]
    return [
        Problem(
            "MOD021", key, f"made on another base ({base.source}) than {bases[0][0]} ({bases[0][1].source}).",
            "train the reward model from this policy's SFT run",
        )
        for key, base in bases[1:]
        if (base.digest, base.chat_template) != (bases[0][1].digest, bases[0][1].chat_template)
    ]  # fmt: skip


def _base_digest(model: ModelSection | None, problems: list[Problem], unchecked: list[str]) -> str | None:
    if model is None:
        return None
    if model.trust_remote_code and not model.revision:
        what = "remote code without a pinned revision refused."
        problems.append(Problem("SEC004", "model.trust_remote_code", what, "set model.revision to a commit"))
        return None
    if demo.is_demo(model.path):
        return artifacts.model_digest(demo.resolve_model(model.path))
    if (directory := Path(model.path)).is_dir():
        if not (directory / "config.json").is_file():
            what = "has no config.json."
            problems.append(Problem("MOD001", f"model.path: {model.path}", what, "name a Hugging Face model directory"))
        return artifacts.model_digest(directory)
    unchecked.append(f"model {model.path}: not a local directory, taken for a hub id")
    return None


def _identity(
    config: StageConfig, data: Mapping[str, Loaded], parents: Mapping[str, Manifest], base_digest: str | None
) -> dict[str, Any]:
    keys = {key: value for key, value in flatten(config).items() if key.split(".")[0] not in NOT_IDENTITY}
    keys |= {f"{key}.rows": loaded.digest for key, loaded in data.items()}
    keys |= {f"{key}.run": manifest.digest for key, manifest in parents.items()}
    return keys | ({"model.files": base_digest} if base_digest else {})
