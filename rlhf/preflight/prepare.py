"""What can be checked before any weight is loaded: config, parents, every data row, and the run's identity."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from rlhf.config.sections import ModelSection
from rlhf.config.stages import StageConfig
from rlhf.data.settings import NOT_REACHED
from rlhf.data.sources import Loaded
from rlhf.demo import catalogue as demo
from rlhf.errors import Problem, RlhfError
from rlhf.findings import Findings
from rlhf.hub import installed, names
from rlhf.planning.phases import Spec
from rlhf.preflight import examined, memory_and_disk, origins, resources
from rlhf.preflight.needs import Input, Needs
from rlhf.preflight.neighbours import Nearby, command
from rlhf.records import count_shared_prompts
from rlhf.runs import artifacts, identity, run_directory
from rlhf.runs.artifacts import Manifest
from rlhf.runs.identity import Identity
from rlhf.runs.progress import waiting

MISSING = ("CKP001", "CKP002")
TOO_MANY_DROPPED = "DAT020"
DATA_FILES = (".jsonl", ".ndjson", ".json", ".gz", ".parquet", ".csv", ".tsv", ".txt", ".arrow", ".zst", ".zip")


@dataclass(frozen=True)
class Plan:
    """A checked start: parents' manifests, data rows, identity, what could not be checked, disk and memory figures, and
    what memory and time are predicted from, where that is known.

    Args:
        beyond: that more rows are dropped than allowed, where a finished run with this identity stands.
        unnamed: for each reward whose config names no examination, the examinations of it that were found nearby.
    """

    parents: dict[str, Manifest]
    data: dict[str, Loaded]
    inputs: Identity
    unchecked: tuple[str, ...]
    figures: tuple[str, ...] = ()
    spec: Spec | None = None
    warnings: tuple[str, ...] = ()
    beyond: tuple[Problem, ...] = ()
    unnamed: Mapping[str, Mapping[str, Manifest]] = field(default_factory=dict)

    @property
    def identity(self) -> dict[str, Any]:
        """The inputs by name, for the manifest."""
        return self.inputs.values

    def notes(self) -> list[str]:
        """What is to be said of the data that was read, and of rewards that were not examined, or not with success."""
        return [*self.warnings] + [f"{key}: {note}" for key, loaded in self.data.items() for note in loaded.notes()]

    def check_dropped(self) -> None:
        """Raise DAT020 for every data set of which too many rows are dropped, too long ones included."""
        problems = [problem for loaded in self.data.values() for problem in loaded.dropped.problems()]
        if problems:
            raise RlhfError(*problems)

    def dropped(self) -> dict[str, Any]:
        """For the manifest: {data key: {"rows", "dropped": {reason: rows}}}, so that the bound can be judged again."""
        return {key: loaded.dropped.record() for key, loaded in self.data.items()}

    def dropped_lines(self) -> list[str]:
        """The same in words, for data sets of which rows are dropped."""
        return [f"{key}: {one.dropped.sentence()}." for key, one in self.data.items() if one.dropped.total]

    def parents_table(self, needs: Needs) -> dict[str, dict[str, str]]:
        """For the manifest: key -> run directory and digest of each parent."""
        return {
            parent.key: {"run_dir": parent.run_dir, "digest": self.parents[parent.key].digest}
            for parent in needs.parents
        }


@dataclass(frozen=True)
class Checked:
    """A sound config of a stage, what was read for it, and the folders whose configs belong to it, its own first."""

    stage: str
    config: StageConfig
    needs: Needs
    plan: Plan
    folders: tuple[Path, ...] = (Path(),)


@waiting("Checking the config, its data and the runs that it builds on")
def prepare(config: StageConfig, needs: Needs, parents_may_be_missing: bool = False, nearby: Nearby = tuple) -> Plan:
    """Check everything that needs no weights; all problems of a phase are raised together.

    Args:
        parents_may_be_missing: a parent that has not been run yet is only noted, as for ``rlhf check`` of a chain, and
            so is a hub that cannot be reached.
        nearby: configs around this one, by which a message can name the command that makes what is missing.
    """
    findings = Findings()
    findings.extend(installed.missing_trackers(needs.report_to))
    # Whether too many rows are dropped is judged by the manifest of a finished run, if that run is current.
    beyond = Findings() if artifacts.is_finished(Path(config.run_dir)) else findings
    data = _read_data(needs, config.seed, parents_may_be_missing, nearby, findings, beyond)
    parents = _read_parents(needs, parents_may_be_missing, nearby, findings)
    data |= _overlaps(data, parents)
    digests = _check_models(needs, parents, findings)
    unnamed = examined.check(examined.Rewards(needs.rewards, parents, digests), findings, nearby)
    findings.note(*dict.fromkeys(mark for manifest in parents.values() for mark in examined.marks(manifest)))
    more = {**_digests(data, parents, digests), **needs.settled(parents)}
    inputs = Identity({}) if findings.problems else identity.of(config, more)
    spec: Spec | None = None
    too_many_dropped = () if beyond is findings else tuple(beyond.problems)
    if findings.problems or not _is_current(config.run_dir, inputs):
        findings.extend(too_many_dropped)
        spec = _resources(config.run_dir, needs, data, parents, findings)
        if not parents_may_be_missing:
            findings.extend(origins.not_reached([*needs.scorers, *_own_model(needs)], parents))
    findings.refuse()
    findings.not_checked("token lengths and model weights (a --dry-run counts tokens)")
    return Plan(
        parents,
        data,
        inputs,
        tuple(findings.unchecked),
        tuple(findings.figures),
        spec,
        tuple(findings.notes),
        too_many_dropped,
        unnamed,
    )


def _own_model(needs: Needs) -> list[tuple[str, ModelSection]]:
    return [("model", needs.model)] if needs.model else []


def _check_models(needs: Needs, parents: Mapping[str, Manifest], findings: Findings) -> dict[str, str | None]:
    """Whether the models that a stage starts from belong together; the digests of those that are not runs."""
    findings.extend(origins.libraries(needs.model, parents))
    origins.check_other_bases(parents, findings)
    findings.extend(origins.adapter_of_another(needs.model, parents))
    findings.extend(origins.aggregates(needs.rewards, parents))
    findings.extend(origins.heads(needs.rewards, parents))
    findings.extend(origins.missing_heads("head", parents["reward"], needs.heads) if "reward" in parents else [])
    findings.extend(origins.start_of_another(parents, needs.members, needs.trains_whole, needs.heads))
    digests = {key: origins.classifier_digest(key, model, findings) for key, model in needs.scorers}
    digests |= {key: origins.base_digest(key, model, findings) for key, model in _own_model(needs)}
    return digests | {key: origins.directory_digest(key, path, findings) for key, path in needs.directories}


def _read_data(
    needs: Needs, seed: int, hub_may_be_away: bool, nearby: Nearby, findings: Findings, beyond: Findings
) -> dict[str, Loaded]:
    """The rows of every data set that can be read.

    Args:
        beyond: takes what says that more rows would be dropped than allowed; where these are not ``findings``, the
            rows are read all the same.
    """
    data: dict[str, Loaded] = {}
    for item in needs.inputs:
        try:
            if refused := _refused_data(item):
                raise RlhfError(*refused)
            data[item.key] = item.read(item.section, seed)
        except RlhfError as error:
            if hub_may_be_away and error.problems[0].code == NOT_REACHED:
                findings.not_checked(f"{item.key}: the rows of {item.section.path}, as the hub cannot be reached")
            elif beyond is not findings and {problem.code for problem in error.problems} == {TOO_MANY_DROPPED}:
                beyond.extend(error.problems)
                data[item.key] = item.read(item.section.model_copy(update={"max_dropped_fraction": 1.0}), seed)
            else:
                findings.extend(_with_command(problem, item, nearby) for problem in error.problems)
    return data


def _with_command(problem: Problem, item: Input, nearby: Nearby) -> Problem:
    """The same, with the command that makes the run which is named as data and is not there."""
    missing = [
        source.path for source in item.section.sources if source.path in problem.where and not names.exists(source.path)
    ]
    made = [one.command for one in nearby() if one.run_dir in missing] if missing else []
    return replace(problem, fix=made[0]) if made else problem


def _refused_data(item: Input) -> list[Problem]:
    found: list[Problem | None] = []
    for index, source in enumerate(item.section.sources):
        key = f"{item.key}.mixture.{index}" if item.section.mixture else item.key
        path = source.path
        if not demo.is_demo(path):
            found.append(names.refused(path, f"{key}.path", "DAT010", path.endswith(DATA_FILES)))
        found.append(names.refused_revision(source.revision, f"{key}.revision"))
    return [problem for problem in found if problem]


def _read_parents(needs: Needs, may_be_missing: bool, nearby: Nearby, findings: Findings) -> dict[str, Manifest]:
    parents: dict[str, Manifest] = {}
    for parent in needs.parents:
        if may_be_missing and not artifacts.is_finished(Path(parent.run_dir)):
            findings.not_checked(f"{parent.key}: {parent.run_dir} has not been run yet")
            continue
        try:
            manifest = artifacts.read(parent.run_dir, *parent.kinds, where=parent.key)
            artifacts.verify(Path(parent.run_dir), manifest)
            parents[parent.key] = manifest
        except RlhfError as error:
            findings.extend(
                replace(one, fix=command(parent.run_dir, parent.kinds, nearby())) if one.code in MISSING else one
                for one in error.problems
            )
            continue
        failed = artifacts.failed_gates(manifest, f"{parent.key}: {parent.run_dir}")
        if may_be_missing:
            findings.not_checked(*(f"{one.where}: has not passed its gate yet: {one.what}" for one in failed))
        else:
            findings.extend(failed)
    return parents


def _overlaps(data: Mapping[str, Loaded], parents: Mapping[str, Manifest]) -> dict[str, Loaded]:
    """Data that measures, with a warning where it holds what was trained on."""
    said: dict[str, str] = {}
    if {"prompts", "evaluation.data"} <= data.keys():
        count = count_shared_prompts(data["prompts"].records, data["evaluation.data"].records)
        if count:
            said["evaluation.data"] = f"{count} of its prompts are trained on"
    rewards = [manifest for key, manifest in parents.items() if key == "reward" or key.startswith("runs.")]
    if "data" in data and any(one.identity.get("data.rows") == data["data"].digest for one in rewards):
        said["data"] = "the very rows that the reward model was trained on"
    return {key: replace(data[key], warnings=(*data[key].warnings, text)) for key, text in said.items()}


def _resources(
    run_dir: str,
    needs: Needs,
    data: Mapping[str, Loaded],
    parents: Mapping[str, Manifest],
    findings: Findings,
) -> Spec | None:
    """Rights, disk and memory; what memory and time are predicted from."""
    unwritable = resources.run_dir_problem(run_dir)
    findings.add(unwritable)
    base = _base_of(needs, parents)
    if base is None or len(parents) < len(needs.parents):
        why = "they follow from the runs that this one is made from"
        why = "not predicted for a model from elsewhere" if needs.scorers and not needs.parents else why
        findings.not_checked(f"disk and memory: {why}")
        return None
    return memory_and_disk.check(needs, base, None if unwritable else run_dir, data, parents, findings)


def _base_of(needs: Needs, parents: Mapping[str, Manifest]) -> memory_and_disk.NamedBase | None:
    if needs.model:
        return memory_and_disk.NamedBase(needs.model.path, "model.path", is_checked=True)
    bases = [(key, manifest.base.source) for key, manifest in parents.items() if manifest.base]
    return memory_and_disk.NamedBase(bases[0][1], f"{bases[0][0]}: base", is_checked=False) if bases else None


def _is_current(run_dir: str, inputs: Identity) -> bool:
    """Whether the run stands finished already, so that nothing will be written."""
    return artifacts.is_finished(Path(run_dir)) and run_directory.status(Path(run_dir), inputs) is None


def _digests(
    data: Mapping[str, Loaded], parents: Mapping[str, Manifest], digests: Mapping[str, str | None]
) -> dict[str, Any]:
    """What the identity holds besides the config's keys."""
    keys: dict[str, Any] = {f"{key}.rows": loaded.digest for key, loaded in data.items()}
    for key, loaded in data.items():
        keys |= {f"{key}.mixture.{index}.drawn": one.num_drawn for index, one in enumerate(loaded.drawn)}
    keys |= {f"{key}.run": manifest.digest for key, manifest in parents.items()}
    return keys | {f"{key}.files": digest for key, digest in digests.items() if digest}
