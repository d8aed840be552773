"""The texts of the sentiment study: openings of reviews, the gold judge, and what is cut out of the model's own texts.

Gold is the compound score of vaderSentiment, a lexicon with rules, from -1 to 1. It trains nothing: the reward model
learns from labels that are noisy (``label``), and no stage reads gold itself.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import math
import random
import re
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from rlhf.runs import storage

Row = dict[str, Any]
INSTRUCTION = "Continue this review: "
SHARPNESS = 4.0
SIZES = {"demonstrations": 208, "comparisons": 480, "examination": 128, "ppo": 288, "validation": 32, "test": 64}
MIN_WORDS = 8
SENTENCE_END = re.compile(r"[.!?](?=\s|$)")
THINGS = (
    "hotel", "restaurant", "phone", "film", "novel", "kettle", "jacket", "laptop", "museum", "concert", "bakery",
    "camera", "bicycle", "tent", "sofa", "headset", "printer", "ferry", "campsite", "podcast", "board game", "gym",
    "backpack", "toaster", "guided tour", "dentist", "keyboard", "mattress", "coffee shop", "language course", "garden",
    "sequel", "train ride", "vacuum cleaner", "art class", "barber", "lamp", "theme park", "cookbook", "umbrella",
)  # fmt: skip
OPENINGS = (
    "I had read a lot about this {}, and", "My wife and I tried the {} because", "First impressions of this {}:",
    "After a week with the {}, I", "A friend told me about the {}, so", "As for the price of the {},",
    "I was not sure what to expect of the {}, but", "We chose this {} at the last minute and",
    "This was my second time with the {}, and", "To be honest, the {}", "What I remember of the {} is",
    "Before you pay for this {}, know that", "The first thing that I noticed about the {} was",
    "My brother gave me the {} for my birthday, and", "I have seen better and worse, but this {}",
    "The people behind this {}", "Three months later, the {}", "If you are looking for a {}, this one",
    "On a rainy Sunday we gave the {} a chance, and", "Everybody in town talks about the {}, and",
    "The {} took us by surprise:", "In one word, the {} was", "I paid full price for the {} and",
    "Compared with the last {} that I tried, this one", "The description of the {} said one thing, but",
    "Here is what nobody tells you about the {}:", "My daughter wanted the {}, and in the end",
    "It took me a while to make up my mind about the {}, but", "The best and the worst of this {}:",
    "By the time we were done with the {}, we", "I came to the {} with an open mind, and",
    "Some notes on the {} after a long day:", "Whoever designed this {}", "I would describe the {} as",
)  # fmt: skip


@cache
def analyser() -> Any:
    """The lexicon, loaded once."""
    try:
        library = importlib.import_module("vaderSentiment.vaderSentiment")
    except ImportError:
        raise SystemExit("the sentiment study needs vaderSentiment: pip install 'rlhf-pipeline[studies]'") from None
    return library.SentimentIntensityAnalyzer()


def gold(prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
    """The sentiment of each continuation, -1 to 1."""
    return [analyser().polarity_scores(response)["compound"] for response in responses]


def label(prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
    """A noisy judge for ``rlhf collect``: the order of two of its numbers is Bradley-Terry in ``SHARPNESS`` x gold.

    The noise is Gumbel's and belongs to the text, so that it depends on no batch and no order.
    """
    return [
        utility(value, f"{prompt}\n{response}")
        for prompt, response, value in zip(prompts, responses, gold(prompts, responses), strict=True)
    ]


def utility(value: float, text: str) -> float:
    """``SHARPNESS`` x ``value`` plus the Gumbel noise of ``text``."""
    number = random.Random(hashlib.sha256(text.encode()).hexdigest()).random() or 1e-300
    return SHARPNESS * value - math.log(-math.log(number))


def openings() -> list[str]:
    """Every opening that the word lists give, each once."""
    return [opening.format(thing) for thing in THINGS for opening in OPENINGS]


def openings_of(reviews: Path, words: int = 8) -> list[str]:
    """The first ``words`` words of each review of a file, one a line; shorter and repeated ones are left out."""
    split = (line.split() for line in reviews.read_text("utf-8").splitlines())
    return list(dict.fromkeys(" ".join(one[:words]) for one in split if len(one) > words))


def parts(texts: Sequence[str], seed: int, sizes: dict[str, int]) -> dict[str, list[Row]]:
    """Prompts for every use, none in two of them.

    Raises:
        SystemExit: if there are too few.
    """
    if len(texts) < (wanted := sum(sizes.values())):
        raise SystemExit(f"{len(texts)} distinct openings, and the study needs {wanted}: give more --reviews")
    shuffled = random.Random(seed).sample(list(texts), wanted)
    found, start = {}, 0
    for name, size in sizes.items():
        found[name] = [{"prompt": INSTRUCTION + text} for text in shuffled[start : start + size]]
        start += size
    return found


def cut(text: str) -> str | None:
    """``text`` up to the first sentence that ends after ``MIN_WORDS`` words; None: none does."""
    for end in SENTENCE_END.finditer(text):
        if len(text[: end.end()].split()) >= MIN_WORDS:
            return text[: end.end()]
    return None


def demonstrations(rows: Iterable[Row]) -> list[Row]:
    """The model's own texts, each cut at a sentence's end; one that ends nowhere is left out."""
    found = ((row["prompt"], cut(row["response"])) for row in rows)
    return [{"prompt": prompt, "completion": text} for prompt, text in found if text]


def agreement(rows: Iterable[Row]) -> tuple[float, int]:
    """Share of the ranked pairs that gold orders as the labels do (equal gold 1/2), and the number of pairs."""
    hits: list[float] = []
    for row in rows:
        values = gold([], row["responses"])
        for one, rank in enumerate(row["ranks"]):
            for other in range(one):
                if rank != row["ranks"][other]:
                    difference = (values[one] - values[other]) * (row["ranks"][other] - rank)
                    hits.append(0.5 + 0.5 * ((difference > 0) - (difference < 0)))
    return (sum(hits) / len(hits) if hits else math.nan), len(hits)


def read(path: Path) -> list[Row]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def write(path: Path, rows: Iterable[Row]) -> None:
    storage.write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
