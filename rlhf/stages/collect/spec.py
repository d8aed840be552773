"""Collecting preferences without torch: what it needs, and what it takes of memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from rlhf.config import keys
from rlhf.config.sections import PolicySamplingSection
from rlhf.config.stages import CollectConfig
from rlhf.data import sources
from rlhf.planning import specs
from rlhf.planning.phases import Spec
from rlhf.planning.specs import Ground
from rlhf.preflight.needs import Input, Needs, Parent
from rlhf.runs import policy_sampling
from rlhf.runs.artifacts import Manifest
from rlhf.stages.contract import Stage
from rlhf.stages.reward_terms import calibrations, classifiers, reward_runs

NO_LIMIT = 2048  # what a prompt is taken to be at most where the base sets no limit


def needs(config: CollectConfig) -> Needs:
    labeller = {"labeller": config.labeller}
    return Needs(
        parents=(Parent("policy", config.policy, ("policy",)), *reward_runs(labeller), *calibrations(labeller)),
        inputs=(Input("prompts", config.prompts, sources.load_prompts),),
        scorers=classifiers(labeller),
        rewards=labeller,
        settled=partial(_settled_sampling, config.sampling),
        memory=partial(memory, config),
    )


def _settled_sampling(section: PolicySamplingSection, parents: Mapping[str, Manifest]) -> dict[str, Any]:
    """Two policies with equal weights may sample differently, so what they say is named, and not only whose it is."""
    own = policy_sampling.own(parents.get("policy"))
    return {f"sampling.{key}": value for key, value in keys.flatten(section.of(own.section)).items()}


def parent(config: CollectConfig) -> str:
    return config.policy


def memory(config: CollectConfig, ground: Ground) -> Spec:
    common, sampling = ground.spec(STAGE.id, config.runtime), config.sampling.of(ground.origin.sampling)
    return common.with_(
        prompt=max(1, (common.shape.context or NO_LIMIT) - sampling.max_new_tokens),
        response=sampling.max_new_tokens,
        concurrency=sampling.concurrency,
        num_reward_runs=specs.num_roles(config.labeller.named_runs),
    )


def assumed(config: CollectConfig, spec: Spec, read: Sequence[str]) -> list[str]:
    return specs.unmade(config.labeller.named_runs)


STAGE = Stage(
    "collect",
    CollectConfig,
    "preferences",
    needs,
    "Rank a policy's own samples.",
    parent=parent,
    assumed=assumed,
)
