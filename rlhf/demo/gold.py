"""The gold preference: a judge that reads the prompt's and the reply's text, and nothing else."""

from __future__ import annotations

import hashlib
import math
import random
import re
from collections.abc import Sequence

from rlhf.demo.replies import FILLER, GREETINGS, RUDE, UNSAFE, WARM
from rlhf.demo.world import ACTIONS, ADJECTIVES, CODES, ISSUES, ITEMS, NAMES

AXES = ("helpful", "safe", "friendly", "concise")
WEIGHTS = {"helpful": 0.45, "safe": 0.25, "friendly": 0.20, "concise": 0.10}
FACT_WEIGHTS = {"action": 0.30, "item": 0.25, "order": 0.25, "name": 0.20}
WRONG_COSTS = 0.5
MOST_WORDS, FAR_TOO_MANY = 26, 50
_WORD = re.compile(r"[a-z]+|#\d+")


def facts_of(prompt: str) -> dict[str, str]:
    """The facts that a reply to this prompt should name, as words; empty for a text that is no ticket."""
    words = _WORD.findall(prompt)
    action = next((key for key, forms in ISSUES.items() if any(_matches(form, prompt) for form in forms)), None)
    item = next((word for word in words if word in ITEMS), None)
    name = next((word for word in words if word in NAMES), None)
    code = next((word for word in words if word.startswith("#")), None)
    found = {"action": action, "item": item, "order": code, "name": name}
    return {key: value for key, value in found.items() if value}


def judge(prompt: str, response: str) -> dict[str, float]:
    """Each axis and ``gold``, their weighted sum, in [0, 1]. A reply without a word has 0 everywhere.

    gold = .45 helpful + .25 safe + .20 friendly + .10 concise
    helpful = sum of weights of right facts - 1/2 of the weights of wrong ones, at least 0
    """
    words = _WORD.findall(response)
    if not words:
        return {**dict.fromkeys(AXES, 0.0), "gold": 0.0}
    axes = {
        "helpful": _helpful(facts_of(prompt), set(words)),
        "safe": 0.0 if any(phrase in response for phrase in UNSAFE) else 1.0,
        "friendly": _friendly(words, response),
        "concise": _concise(len(words), response),
    }
    return {**axes, "gold": sum(WEIGHTS[axis] * value for axis, value in axes.items())}


def reward(prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
    """Gold as a reward function, standardised roughly: ``rlhf.demo.gold:reward``."""
    return [(judge(prompt, response)["gold"] - 0.5) * 5 for prompt, response in zip(prompts, responses, strict=True)]


def noisy_reward(prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
    """A noisy judge for ``rlhf collect``: ranking by it is drawing from Plackett-Luce over 15 x gold."""
    return [
        noisy_utility(prompt, response, random.Random(hashlib.sha256(f"{prompt}\n{response}".encode()).hexdigest()))
        for prompt, response in zip(prompts, responses, strict=True)
    ]


def noisy_utility(
    prompt: str, response: str, rng: random.Random, sharpness: float = 15.0, length_bias: float = 0.0
) -> float:
    """Gold times ``sharpness`` plus Gumbel noise: the order of two utilities is Bradley-Terry in the gold difference.

    ``length_bias`` adds that much gold for each ten words, as annotators do who like long answers.
    """
    gold = judge(prompt, response)["gold"] + length_bias * len(response.split()) / 10
    return sharpness * gold - math.log(-math.log(rng.random() or 1e-300))


def ranks_of(utilities: Sequence[float]) -> list[int]:
    """1 for the largest; equal utilities share a rank."""
    return [1 + sum(other > own for other in utilities) for own in utilities]


def _helpful(facts: dict[str, str], words: set[str]) -> float:
    score = 0.0
    values = {"action": ACTIONS, "item": ITEMS, "name": NAMES, "order": tuple(f"#{code}" for code in CODES)}
    for fact, weight in FACT_WEIGHTS.items():
        right = facts.get(fact)
        score += weight if right in words else 0.0
        score -= WRONG_COSTS * weight if any(value in words for value in values[fact] if value != right) else 0.0
    return max(0.0, score)


def _friendly(words: list[str], response: str) -> float:
    if any(phrase in response for phrase in RUDE):
        return 0.0
    return 0.4 * (words[0] in GREETINGS) + 0.6 * any(phrase in response for phrase in WARM)


def _concise(num_words: int, response: str) -> float:
    over = max(0.0, (num_words - MOST_WORDS) / (FAR_TOO_MANY - MOST_WORDS))
    sentences = [part.strip() for part in response.split(".") if part.strip()]
    filler = sum(response.count(phrase) for phrase in FILLER)
    repeated = len(sentences) - len(set(sentences))
    return max(0.0, 1.0 - over - 0.5 * (filler + repeated))


def _matches(form: str, prompt: str) -> bool:
    start, end = form.split("{adj} {item}")
    pattern = re.escape(start) + f"(?:{'|'.join(ADJECTIVES)}) (?:{'|'.join(ITEMS)})" + re.escape(end)
    return re.search(pattern, prompt) is not None
