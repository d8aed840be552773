"""Whether what a finished SFT run measured is within the bounds of its config. From the manifest alone, no model."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from rlhf.config.stages import SftConfig
from rlhf.errors import Problem
from rlhf.preflight import missing_ends
from rlhf.runs.artifacts import Manifest


def judge(config: SftConfig, manifest: Manifest) -> list[Problem]:
    """Every gate that the run's figures do not pass. A failed gate leaves the run standing."""
    problems = []
    rate = float(manifest.metrics["eval/end_token_rate"])
    if not rate >= missing_ends.least_end_rate(config, manifest.details.get("ending", {})):
        problems.append(_ends_too_rarely(config, manifest, rate))
    if config.require_improvement and config.steps != 0:
        problems += _no_better_than_its_start(config, manifest)
    return problems


def _no_better_than_its_start(config: SftConfig, manifest: Manifest) -> list[Problem]:
    """A run that goes on from an adapter was once measured against the base alone: it is not judged."""
    metrics = manifest.metrics
    key = "eval/start_loss" if config.adapter or "eval/start_loss" in metrics else "eval/base_loss"
    if key not in metrics:
        return []
    start, end = float(metrics[key]), float(metrics["eval/loss"])
    used = [entry["used_step"] for entry in manifest.details.get("held_out", [])]
    if end < start and 0 not in used:
        return []
    started_from = f"the adapter {config.adapter}" if config.adapter else config.model.path
    what = (
        f"held-out loss {end:.4f} nats a token, not below the {start:.4f} of {started_from}, which training started "
        "from. The run is finished; its weights and figures stand."
    )
    fix = "fewer epochs, or a lower optim.learning_rate"
    if not config.evaluation.patience:
        fix += ", or evaluation.every with evaluation.patience, which stops early and uses the best step"
    fix += "; require_improvement: false accepts it"
    return [Problem("GRD004", f"{config.run_dir}: eval/loss", what, fix)]


def _ends_too_rarely(config: SftConfig, manifest: Manifest, rate: float) -> Problem:
    """GRD002 with the causes that the figures support; where they support none, training has not taught the end."""
    ending = manifest.details.get("ending", {})
    least = missing_ends.least_end_rate(config, ending)
    causes = _causes(least, ending, rate) or ([_little_training(config, ending)] if ending else [])
    end = f" with {ending['end_token']!r}" if ending else ""
    whys = "".join(f"; {why}" for why, _ in causes)
    what = (
        f"only {rate:.1%} of the sampled responses end{end} within sampling.max_new_tokens "
        f"({config.sampling.max_new_tokens}), and min_end_token_rate is {least:.1%}{whys}. "
        "The run is finished; its weights and figures stand."
    )
    passing = math.floor(1000 * rate) / 1000
    accept = (
        f"min_end_token_rate: {passing:g} accepts it, and PPO then scores every cut-off response by missing_eos "
        "(docs/missing-end.md)"
    )
    where = f"{config.run_dir}: eval/end_token_rate"
    return Problem("GRD002", where, what, "; ".join([*(fix for _, fix in causes), accept]))


def _causes(least: float, ending: Mapping[str, Any], rate: float) -> list[tuple[str, str]]:
    """Each cause that is seen, with its fix."""
    found: list[tuple[str, str]] = []
    if not ending:
        return found

    def explains(part: int, num: int) -> bool:
        """Whether a share of answers fails the gate by itself, or makes up half of what is cut off."""
        return bool(part) and part / num > min(1 - least, (1 - rate) / 2)

    answers, end = ending["answers"], ending["end_token"]
    num = answers["num"]
    if explains(answers["num_longer"], num):
        share = f"{answers['num_longer']} of {num} answers in the training data ({answers['num_longer'] / num:.0%})"
        fix = f"sampling.max_new_tokens: {answers['tokens_95_percent']}, which holds 95% of them"
        found.append((f"{share} are longer than that", fix))
    if explains(answers["num_without_end"], num):
        why = f"{answers['num_without_end']} of {num} answers in the training data lost {end!r} to max_length"
        found.append((why, "too_long: drop, or a larger max_length"))
    if ending["end_row_untrained"]:
        why = f"the row of {end!r} in the embeddings is untrained, and stays frozen"
        found.append((why, f"lora.train_tokens: [{end!r}]"))
    if explains(ending["num_base_end"], ending["num_samples"]):
        other = ending["base_end_token"]
        why = f"{ending['num_base_end']} of {ending['num_samples']} responses write {other!r}, the base's own end"
        fix = f"sampling.stop_tokens: [{other!r}] in every stage, or lora.train_tokens: [{end!r}]"
        found.append((why, fix))
    return found


def _little_training(config: SftConfig, ending: Mapping[str, Any]) -> tuple[str, str]:
    """What is left where the figures name no other cause."""
    longer = "a larger sampling.max_new_tokens"
    if config.steps == 0:
        return "no step was trained: the model answers at its own length", f"{longer}, or steps or epochs to train it"
    base_rate = ending.get("base_end_token_rate")
    more = "more epochs or a higher optim.learning_rate"
    if base_rate is None:
        why = "nothing measured here names a cause, which leaves too little training, or an instruct model's own length"
        return why, f"{more}; for an instruct model {longer}"
    if base_rate >= missing_ends.least_end_rate(config, ending):
        why = f"{base_rate:.1%} of the responses of {config.model.path} itself end: training has unlearnt it"
        return why, "fewer epochs, a lower optim.learning_rate, or data whose answers end"
    why = f"{config.model.path} itself ends {base_rate:.1%} of its responses, and training has not taught it enough"
    return why, f"{more}; for an instruct model, which answers at its own length, {longer}"
