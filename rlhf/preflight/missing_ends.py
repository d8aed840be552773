"""How many answers end in time: what SFT asks, and what a cut-off answer costs in PPO. From figures alone, no model."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from rlhf.config.ppo_sections import MissingEosSection
from rlhf.config.stages import SftConfig
from rlhf.runs.artifacts import Manifest

ENOUGH, UNTAUGHT = 0.9, 0.5  # of the share that fits; of all, where a model answers at its own length
MOST_GAIN = 0.05  # standard deviations of the score that ending every answer in time may be worth


def enough(share: float, num_samples: int) -> float:
    """The share of sampled responses that must end where ``share`` of the answers in the data fit.

    A model that has learnt their lengths ends as many. One that ends 0.9 of that is good enough, and passes in 39 of 40
    samples: two standard deviations are taken off.
    """
    wanted = ENOUGH * share
    return max(0.0, math.floor(100 * (wanted - 2 * math.sqrt(wanted * (1 - wanted) / num_samples))) / 100)


def least_end_rate(config: SftConfig, ending: Mapping[str, Any]) -> float:
    """The share of sampled responses that must end: the config's, or what follows from the figures of the data."""
    if config.min_end_token_rate is not None:
        return config.min_end_token_rate
    if config.steps == 0:
        return UNTAUGHT
    answers = ending.get("answers", {"num": 1, "num_longer": 0})
    share = 1 - answers["num_longer"] / answers["num"]
    return enough(share, ending.get("num_samples", config.end_token_samples))


def what_fits(config: SftConfig, answers: Mapping[str, Any], num_samples: int) -> tuple[str, bool]:
    """The share of the training answers that a sampled one can be as long as, and how many of those must end; and
    whether that is more than the data teaches.

    Args:
        answers: figures of ``rlhf.evaluation.stopping``.
    """
    most, held = config.sampling.max_new_tokens, answers["tokens_95_percent"]
    share = 1 - answers["num_longer"] / answers["num"]
    least = least_end_rate(config, {"answers": answers, "num_samples": num_samples})
    said = (
        f"{share:.1%} of the {answers['num']} training answers fit sampling.max_new_tokens ({most}), 95% have at most "
        f"{held} tokens; {least:.0%} of {num_samples} samples must end."
    )
    if config.steps == 0 or least <= share:
        return said, False
    more = (
        f"{said} That is more than the data teaches: sampling.max_new_tokens: {held}, or min_end_token_rate: null, "
        f"which asks {enough(share, num_samples):.0%}."
    )
    return more, True


def penalty(share_cut: float) -> float:
    """What a cut-off answer may lose, in standard deviations of the score, so that ending all in time is worth at most
    ``MOST_GAIN`` of them."""
    return math.floor(100 * MOST_GAIN / max(share_cut, MOST_GAIN) + 1e-9) / 100


def what_is_cut(manifest: Manifest, run_dir: str, section: MissingEosSection, most: int) -> tuple[str, bool]:
    """How many answers PPO will cut off at ``most`` tokens, as far as the SFT run knows, and whether ``missing_eos``
    makes that a reason to answer shorter; "" where nothing is known."""
    ending = manifest.details.get("ending")
    if not ending:
        return "", False
    answers, same = ending["answers"], ending["max_new_tokens"] == most
    cut = answers["num_longer"] / answers["num"] if same else None
    held = answers["tokens_95_percent"]
    said = f"95% of the {answers['num']} answers that {run_dir} learnt from have at most {held} tokens"
    if manifest.details.get("steps") == 0:
        cut = 1 - float(manifest.metrics["eval/end_token_rate"]) if same else None
        said = f"{run_dir} trained nothing and answers at its own length"
        if not same:
            return f"{said}: how many of its answers {most} tokens cut off, was not measured.", False
    said += f"; sampling.max_new_tokens: {most} cuts off"
    many = cut > MOST_GAIN if cut is not None else most < held
    said += f" {cut:.1%} of such answers." if cut is not None else f" {'more than' if many else 'at most'} 5%."
    costs = section.penalty if section.mode == "subtract" else -section.score
    allowed = penalty(cut) if cut is not None else penalty(2 * MOST_GAIN)
    if not many or (section.mode == "subtract" and costs <= allowed) or costs <= 0:
        return said, False
    rule = f"subtracts {costs:g}" if section.mode == "subtract" else f"gives each {section.score:g}, whatever it says"
    fix = f"a larger sampling.max_new_tokens, or missing_eos: {{mode: subtract, penalty: {allowed:g}}}"
    return f"{said} missing_eos {rule}: shorter answers pay, whatever they say. Fix: {fix} (docs/missing-end.md).", True
