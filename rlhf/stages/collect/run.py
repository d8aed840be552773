"""Preferences on a policy's own samples: sample, let a labeller rank, write with provenance."""

from __future__ import annotations

import json
import logging
import time
from typing import Any

from rlhf.config.sections import SamplingSection
from rlhf.config.stages import CollectConfig
from rlhf.data import fitting, tokenised
from rlhf.data.batches import PassSize
from rlhf.data.fitting import Limit
from rlhf.data.tokenised import LengthReport, PromptRow
from rlhf.evaluation import policy_samples as measure
from rlhf.models import open_base
from rlhf.models.roles import SharedBase
from rlhf.preflight.prepare import Plan
from rlhf.rollouts.open_engine import open_engine
from rlhf.runs import artifacts, policy_sampling, runtime, storage
from rlhf.runs.artifacts import Manifest
from rlhf.runs.run_directory import Run
from rlhf.scoring.open_scorer import Host, open_source
from rlhf.scoring.scorer import Sample
from rlhf.stages.registry import STAGES

log = logging.getLogger("rlhf")


def run(config: CollectConfig, plan: Plan, run: Run) -> Manifest:
    """n responses a prompt, ranked; groups whose responses are all alike carry no preference and are counted."""
    started = time.perf_counter()
    device = runtime.set_up(config.runtime, config.seed)
    policy = plan.parents["policy"]
    base = open_base.reopen_base(policy, device)
    runtime.set_threads(config.runtime, base.model, device)
    sampling = _sampling(config, plan)
    prompts, report = _prompts(config, plan, base.chat, sampling)
    for line in plan.dropped_lines():
        log.info(line)
    roles = SharedBase(base)
    roles.add("policy", adapter=artifacts.adapter_of(config.policy), trained=False)
    parent = plan.parents.get("labeller")
    engine = open_engine(roles, "policy", base.chat, sampling)
    compared = measure.sampling_of(sampling, runtime.derived_seed(config.seed, "collect", "references"))
    answer = measure.answering(engine, base.chat, compared)
    host = Host(base, roles, PassSize(sampling.concurrency), answer)
    labeller = open_source(config.labeller, "labeller", parent, host)
    repeated = [prompt for prompt in prompts for _ in range(config.samples_per_prompt)]
    seed = runtime.derived_seed(config.seed, "collect")
    samples = measure.respond(engine, base.chat, repeated, measure.sampling_of(sampling, seed))
    scores = labeller.score(samples).mean.tolist()

    provenance = {
        "policy": config.policy,
        "policy_digest": policy.digest,
        "temperature": sampling.temperature,
        "max_new_tokens": sampling.max_new_tokens,
        "labeller": config.labeller.name,
        "seed": config.seed,
    }
    rows, num_short, num_alike = [], 0, 0
    num_unfinished = sum(not sample.finished for sample in samples)
    num_empty = sum(sample.finished and sample.is_empty for sample in samples)
    for start in range(0, len(samples), config.samples_per_prompt):
        group = slice(start, start + config.samples_per_prompt)
        distinct = _distinct(samples[group], scores[group])
        if len(distinct) < 2:
            num_short += 1
            continue
        if len({score for _, score in distinct}) < 2:
            num_alike += 1
            continue
        rows.append(_row(distinct, provenance))
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    storage.write_text(run.path / artifacts.PREFERENCES, text)
    log.info(
        "%d prompts ranked; %d dropped because fewer than two different responses to them were left, %d because all "
        "that were left scored the same; of the responses %d were left out as cut off and %d as without text.",
        len(rows),
        num_short,
        num_alike,
        num_unfinished,
        num_empty,
    )
    metrics = {
        "collect/prompts": len(rows),
        "collect/groups_short": num_short,
        "collect/groups_alike": num_alike,
        "collect/unfinished": num_unfinished,
        "collect/empty": num_empty,
    }
    return run.finish(
        Manifest(
            kind="preferences",
            stage="collect",
            seed=config.seed,
            identity=plan.identity,
            metrics=metrics,
            seconds=time.perf_counter() - started,
            base=policy.base,
            parents=plan.parents_table(STAGES["collect"].needs(config)),
            details={"rows": vars(report), "dropped": plan.dropped()},
        )
    )


def dry_run(config: CollectConfig, plan: Plan) -> list[str]:
    """Token counts, with the tokenizer but without weights."""
    chat = open_base.open_chat(open_base.model_of(plan.parents["policy"]))
    rows, report = _prompts(config, plan, chat, _sampling(config, plan))
    return [report.sentence("prompts"), f"{len(rows) * config.samples_per_prompt} responses to sample and rank."]


def _sampling(config: CollectConfig, plan: Plan) -> SamplingSection:
    """What the config leaves open is as the policy's run has it; all of it is said."""
    own = policy_sampling.own(plan.parents["policy"])
    log.info("%s", policy_sampling.sentence(config.policy, own, config.sampling.given))
    return config.sampling.of(own.section)


def _prompts(
    config: CollectConfig, plan: Plan, chat: Any, sampling: SamplingSection
) -> tuple[list[PromptRow], LengthReport]:
    loaded, limit = fitting.usable(plan.data["prompts"], chat), Limit(chat.context_length or 10**9, key="")
    rows, report = tokenised.prompt_rows(loaded.records, chat, limit, loaded.dropped, loaded.left_out)
    plan.check_dropped()
    open_base.require_context(chat, report.longest, sampling.max_new_tokens, "sampling.max_new_tokens")
    return rows, report


def _distinct(samples: list[Sample], scores: list[float]) -> list[tuple[Sample, float]]:
    """Finished responses, each text once: equal texts must not be ranked against each other."""
    found: dict[str, tuple[Sample, float]] = {}
    for sample, score in zip(samples, scores, strict=True):
        if sample.finished and not sample.is_empty:
            found.setdefault(sample.response, (sample, score))
    return list(found.values())


def _row(group: list[tuple[Sample, float]], provenance: dict[str, Any]) -> dict[str, Any]:
    """A ranking row: 1 is best, equal scores share a rank."""
    scores = [score for _, score in group]
    return {
        "prompt": [{"role": message.role, "content": message.content} for message in group[0][0].prompt],
        "responses": [sample.response for sample, _ in group],
        "ranks": [1 + sum(other > score for other in scores) for score in scores],
        "scores": scores,
        "provenance": provenance,
    }
