"""The stages: what each is called, reads, makes, and where its recipe lives. CLI, pipeline and check derive from it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

from rlhf import artifacts, policy_sampling
from rlhf.artifacts import Manifest
from rlhf.config import load, recognition, rubric, suite
from rlhf.config import stages as configs
from rlhf.config.rewards import ClassifierSection, RewardSource
from rlhf.config.sections import PolicySamplingSection, Section
from rlhf.config.stages import StageConfig
from rlhf.config.train_rm import COMBINED, RewardConfig
from rlhf.data import labels, sources
from rlhf.errors import Problem, RlhfError
from rlhf.findings import Findings
from rlhf.neighbours import Nearby, Neighbour
from rlhf.origins import START
from rlhf.preflight import Input, Needs, Parent

log = logging.getLogger("rlhf")


@dataclass(frozen=True)
class Stage:
    """One stage. ``id`` is its command, its config file's name and its default run directory's name.

    The module ``rlhf.stages.<module>`` has ``run(config, plan, run) -> Manifest`` and
    ``dry_run(config, plan) -> list[str]`` and is imported only when the stage starts.
    """

    id: str
    config_class: type[StageConfig]
    makes: str
    needs: Callable[[Any], Needs]
    summary: str

    @property
    def module(self) -> str:
        return f"rlhf.stages.{self.id.replace('-', '_')}"

    @property
    def default_config(self) -> str:
        return f"configs/{self.id}.yaml"


def _sft(config: configs.SftConfig) -> Needs:
    inputs = (Input("data", config.data, sources.load_demonstrations),)
    if config.adapter is None:
        return Needs(inputs=inputs, model=config.model)
    if artifacts.is_plain_adapter(config.adapter):
        return Needs(inputs=inputs, model=config.model, directories=(("adapter", config.adapter),))
    return Needs(parents=(Parent("adapter", config.adapter, ("policy",)),), inputs=inputs, model=config.model)


def _train_rm(config: RewardConfig) -> Needs:
    start = (Parent(START, config.init_from, ("reward",)),) if config.init_from else ()
    teachers = [Parent(f"teachers.{index}", run, ("reward",)) for index, run in enumerate(config.teachers)]
    return Needs(
        parents=(Parent("policy", config.policy, ("policy",)), *start, *teachers),
        inputs=(Input("data", config.data, labels.ForReward(config)),), members=config.members,
        directories=(("rubric", config.rubric),) if config.rubric else (), trains_whole=config.lora is None,
        heads=tuple(rubric.heads_of(config)) or (COMBINED,),
    )  # fmt: skip


def _collect(config: configs.CollectConfig) -> Needs:
    return Needs(
        parents=(
            Parent("policy", config.policy, ("policy",)), *_reward_runs("labeller", config.labeller),
            *_calibrations("labeller", config.labeller),
        ),
        inputs=(Input("prompts", config.prompts, sources.load_prompts),),
        scorers=_models("labeller.model", config.labeller),
        rewards={"labeller": config.labeller},
        settled=partial(_settled_sampling, config.sampling),
    )  # fmt: skip


def _settled_sampling(section: PolicySamplingSection, parents: Mapping[str, Manifest]) -> dict[str, Any]:
    """Two policies with equal weights may sample differently, so what they say is named, and not only whose it is."""
    own = policy_sampling.own(parents.get("policy"))
    return {f"sampling.{key}": value for key, value in load.flatten(section.of(own.section)).items()}


def _ppo(config: configs.PpoConfig) -> Needs:
    rewards = [
        parent for index, source in enumerate(config.rewards) for parent in _reward_runs(f"rewards.{index}", source)
    ]
    inputs = [Input("prompts", config.prompts, sources.load_prompts)]
    if config.evaluation.data:
        inputs.append(Input("evaluation.data", config.evaluation.data, sources.load_prompts))
    scorers = [found for i, source in enumerate(config.rewards) for found in _models(f"rewards.{i}.model", source)]
    rewards += [
        Parent(f"rewards.{index}.examination", source.examination, ("examination",))
        for index, source in enumerate(config.rewards) if source.examination
    ]  # fmt: skip
    rewards += [one for i, source in enumerate(config.rewards) for one in _calibrations(f"rewards.{i}", source)]
    parents = (Parent("policy", config.policy, ("policy",)), *rewards)
    sources_of = {f"rewards.{index}": source for index, source in enumerate(config.rewards)}
    return Needs(parents=parents, inputs=tuple(inputs), scorers=tuple(scorers), rewards=sources_of)


def _eval_rm(config: configs.EvalRmConfig) -> Needs:
    if config.suite:
        suite.read(config.suite)  # its mistakes are said before any model is opened
    read = sources.load_benchmark(config.benchmark) if config.benchmark else labels.noted(sources.load_comparisons)
    inputs = [Input("data", config.data, read)]
    if config.drift:
        inputs.append(Input("drift", config.drift, labels.noted(sources.load_responses)))
    several = [(f"runs.{index}", run) for index, run in enumerate(config.runs or ())]
    named = [("reward", config.reward)] if config.reward else several
    return Needs(
        parents=tuple(Parent(key, run, ("reward",)) for key, run in named),
        inputs=tuple(inputs),
        scorers=(("model", config.model),) if config.model else (),
        directories=(("suite", config.suite),) if config.suite else (),
        heads=(config.head,) if config.head else (),
    )


def neighbours(paths: Iterable[Path]) -> list[Neighbour]:
    """What the configs among some files make; a file that is none of ours, or not sound, makes nothing."""
    found = []
    for path in dict.fromkeys(paths):
        named = [stage for stage in STAGES.values() if path.stem == stage.id]
        for stage in [*named, *(one for one in STAGES.values() if one not in named)]:
            try:
                config = load.load(stage.config_class, path)
            except (RlhfError, OSError):
                continue
            found.append(Neighbour(stage.id, stage.makes, str(path), config.run_dir))
            break
    return found


def around(path: Path, others: Iterable[Path] = ()) -> Nearby:
    """The same for ``others`` and the config files next to ``path``, once somebody asks."""
    return cache(lambda: neighbours([*others, *sorted(path.parent.glob("*.yaml"))]))


def _reward_runs(key: str, source: RewardSource) -> tuple[Parent, ...]:
    several = [(f"{key}.runs.{index}", run) for index, run in enumerate(source.runs or ())]
    named = [(key, source.run)] if source.run else several
    return tuple(Parent(place, run, ("reward",)) for place, run in named)


def _calibrations(key: str, source: RewardSource) -> tuple[Parent, ...]:
    own = source.length_calibration
    return (Parent(f"{key}.length_calibration", own, ("examination",)),) if own else ()


def _models(key: str, source: RewardSource) -> tuple[tuple[str, ClassifierSection], ...]:
    return ((key, source.model),) if source.model else ()


STAGES: dict[str, Stage] = {
    stage.id: stage
    for stage in (
        Stage("sft", configs.SftConfig, "policy", _sft, "Supervised fine-tuning on demonstrations."),
        Stage("collect", configs.CollectConfig, "preferences", _collect, "Rank a policy's own samples."),
        Stage("train-rm", RewardConfig, "reward", _train_rm, "Train a reward model on comparisons."),
        Stage("ppo", configs.PpoConfig, "policy", _ppo, "PPO with a KL penalty against the SFT reference."),
        Stage("eval-rm", configs.EvalRmConfig, "examination", _eval_rm, "Examine a reward model."),
    )
}

KINDS: dict[str, type[Section]] = {
    **{name: stage.config_class for name, stage in STAGES.items()},
    "pipeline": configs.PipelineConfig,
    "rubric": rubric.RubricConfig,
}
"""Every kind of config file."""

DID_YOU_MEAN = "did you mean rlhf {kind} -c {path}?"


def open_config(kind: str, path: Path, overrides: Sequence[str] = (), fix: str = DID_YOU_MEAN) -> Any:
    """The config of a stage, or another kind, from its file. Raises as ``recognition.load_as``."""
    return recognition.load_as(kind, path, overrides, KINDS, fix)


def kinds_of(files: Sequence[Path], stage: str | None, findings: Findings) -> list[tuple[Path, str]]:
    """Each file with the kind of config that it is; without files, all of configs/.

    Args:
        stage: whose configs they are; None: what their names or else their keys say.
        findings: get what is wrong with a file's kind.

    Raises:
        RlhfError: CFG001 where no file is named and configs/ has none.
    """
    paths = list(files) or sorted(Path("configs").glob("*.yaml"))
    if not paths:
        raise RlhfError(Problem("CFG001", "configs/", "no config here.", "name a file"))
    found: list[tuple[Path, str]] = []
    for path in paths:
        try:
            if stage is not None:
                refuse_unknown(stage, str(path), "--stage with one of")
            found.append((path, stage or recognition.kind_of(path, KINDS, "--stage")))
        except RlhfError as error:
            if files:
                findings.extend(error.problems)
            else:
                log.warning("Left out: %s: %s", path, error.problems[0].what)
    if not found and not findings.problems:
        raise RlhfError(Problem("CFG001", "configs/", "no config here that is known.", "name a file"))
    return found


def refuse_unknown(stage_id: str, where: str, fix: str) -> None:
    """Raise CFG008 for a kind of config that there is not; ``fix`` is followed by the known ones."""
    if stage_id not in KINDS:
        raise RlhfError(Problem("CFG008", where, f"no stage is called '{stage_id}'.", f"{fix} {', '.join(KINDS)}"))
