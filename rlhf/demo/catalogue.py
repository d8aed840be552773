"""The names of the embedded world: ``demo:base`` and its data sets, with size, seed and split."""

from __future__ import annotations

import random
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

from rlhf.demo.gold import AXES, judge, noisy_utility, ranks_of
from rlhf.demo.replies import GOOD, Manner, draw_demonstration, draw_edit, draw_manner, write
from rlhf.demo.world import SPLITS, Ticket, tickets
from rlhf.errors import Problem, RlhfError

PREFIX = "demo:"
DATASETS = ("demonstrations", "preferences", "prompts")
DEFAULT_SIZE = {"demonstrations": 2600, "preferences": 1100, "prompts": 1800}
OPTIONS = {
    "size": int, "seed": int, "split": str, "sharpness": float, "swap": float, "length_bias": float, "attribute": str,
    "ratings": str, "annotators": int, "careless": float, "careless_annotators": int,
}  # fmt: skip
LABEL_OPTIONS = tuple(key for key in OPTIONS if key not in ("size", "seed", "split"))
RATING_NOISE, BEST_RATING = 0.6, 4
MOST_ANNOTATORS = 100
BASE = Path(__file__).parent / "base"


def is_demo(name: str) -> bool:
    return name.startswith(PREFIX)


def resolve_model(name: str) -> Path:
    """The directory of ``demo:base``.

    Raises:
        RlhfError: MOD002 for any other name.
    """
    if name != "demo:base":
        raise RlhfError(Problem("MOD002", name, "no model of this name in the embedded world.", "demo:base"))
    return BASE


def rows(name: str) -> Iterator[dict[str, Any]]:
    """The rows of a data set such as ``demo:preferences?size=800&seed=3&split=test``, the same ones for the same name.

    Splits never share a prompt, whatever the seed. Preferences also take ``sharpness`` (of the noisy judge), ``swap``
    (share of rankings in which two replies changed places), ``length_bias`` and ``annotators``: so many judges, each
    with noise of his own, rank every set of replies, a row each; the last ``careless_annotators`` of them (1) give the
    share ``careless`` of their rankings at random. ``attribute=safe`` ranks by that axis of gold alone, replies that
    are equal there as ties, and ``ratings=helpful,safe`` adds ratings from 0 to 4. ``size`` counts prompts.

    Raises:
        RlhfError: DAT002 for an unknown data set or option, or a value that does not fit.
    """
    kind, options = _parse(name)
    split, seed, size = options["split"], options["seed"], options["size"]
    if kind == "preferences":
        ranked = ((ticket, _ranking(ticket, rng, options)) for ticket, rng in tickets(split, seed, kind))
        for ticket, row in islice((found for found in ranked if len(set(found[1]["ranks"])) > 1), size):
            yield from _of_annotators(ticket, row, options) if options["annotators"] else (row,)
        return
    for ticket, rng in islice(tickets(split, seed, kind), size):
        if kind == "demonstrations":
            yield {"prompt": ticket.text, "completion": draw_demonstration(ticket, rng)}
        else:
            yield {"prompt": ticket.text}


def _ranking(ticket: Ticket, rng: random.Random, options: dict[str, Any]) -> dict[str, Any]:
    """Four replies, two of which are edits of the others in one thing, ranked by the noisy judge."""
    responses: list[str] = []
    manners: list[Manner] = []
    while len(responses) < 4:
        if len(responses) % 2:
            manner = draw_edit(manners[-1], rng)
        else:
            manner = GOOD if rng.random() < 0.25 else draw_manner(rng, right=0.75, fine=rng.uniform(0.5, 1.0))
        reply = write(ticket, manner, rng)
        if reply not in responses:
            responses.append(reply)
            manners.append(manner)
    return _judged(ticket, responses, rng, options)


def _judged(ticket: Ticket, responses: list[str], rng: random.Random, options: dict[str, Any]) -> dict[str, Any]:
    """The replies in any order, with the ranks that a noisy judge gives them, and the ratings that are asked for."""
    axes = [judge(ticket.text, reply) for reply in responses]
    utilities = [
        noisy_utility(ticket.text, reply, rng, options["sharpness"], options["length_bias"]) for reply in responses
    ]
    if options["attribute"]:
        utilities = [own[options["attribute"]] for own in axes]
    if rng.random() < options["swap"]:
        first, second = rng.sample(range(4), 2)
        utilities[first], utilities[second] = utilities[second], utilities[first]
    order = rng.sample(range(4), 4)
    ranks = ranks_of(utilities)
    row = {
        "prompt": ticket.text,
        "responses": [responses[index] for index in order],
        "ranks": [ranks[index] for index in order],
    }
    row |= {"attribute": options["attribute"]} if options["attribute"] else {}
    named = {name: [_rating(axes[index][name], rng) for index in order] for name in options["ratings"]}
    return row | ({"ratings": named} if named else {})


def _rating(value: float, rng: random.Random) -> int:
    """An axis from 0 to 1 as a whole number from 0 to BEST_RATING, as a careful person would give it."""
    return max(0, min(BEST_RATING, round(BEST_RATING * value + rng.gauss(0, RATING_NOISE))))


def _of_annotators(ticket: Ticket, row: dict[str, Any], options: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The same replies as each annotator ranks them."""
    for number in range(options["annotators"]):
        rng = random.Random(f"rlhf-demo/annotator {number}/{options['seed']}/{ticket.text}")
        found = _judged(ticket, row["responses"], rng, options)
        is_careless = number >= options["annotators"] - options["careless_annotators"]
        if is_careless and rng.random() < options["careless"]:
            rng.shuffle(found["ranks"])
        yield {**found, "annotator": f"annotator {number + 1}"}


def _parse(name: str) -> tuple[str, dict[str, Any]]:
    kind, _, query = name.removeprefix(PREFIX).partition("?")
    if kind not in DATASETS:
        known = ", ".join(PREFIX + known for known in DATASETS)
        raise RlhfError(Problem("DAT002", name, "no data set of this name in the embedded world.", f"one of {known}"))
    options: dict[str, Any] = {
        "size": DEFAULT_SIZE[kind],
        "seed": 0,
        "split": "train",
        "sharpness": 15.0,
        "swap": 0.06,
        "length_bias": 0.0,
        "attribute": "",
        "ratings": "",
        "annotators": 0,
        "careless": 0.0,
        "careless_annotators": 1,
    }
    for key, text in parse_qsl(query, keep_blank_values=True):
        if key not in OPTIONS or (key in LABEL_OPTIONS and kind != "preferences"):
            known = ", ".join(key for key in OPTIONS if kind == "preferences" or key not in LABEL_OPTIONS)
            raise RlhfError(Problem("DAT002", name, f"unknown option '{key}'.", f"one of {known}"))
        try:
            options[key] = OPTIONS[key](text)
        except ValueError:
            what = f"{key} must be a number, got '{text}'."
            raise RlhfError(Problem("DAT002", name, what, f"{key}={options[key] or 0}")) from None
    if options["split"] not in SPLITS:
        raise RlhfError(Problem("DAT002", name, f"no split '{options['split']}'.", f"one of {', '.join(SPLITS)}"))
    options["ratings"] = [name for name in options["ratings"].split(",") if name]
    for axis in sorted({options["attribute"], *options["ratings"]} - {"", *AXES}):
        raise RlhfError(Problem("DAT002", name, f"gold has no axis '{axis}'.", f"one of {', '.join(AXES)}"))
    if not 1 <= options["size"] <= 100_000 or options["seed"] < 0:
        what = "size must be 1 to 100,000 and seed at least 0."
        raise RlhfError(Problem("DAT002", name, what, "size=1000&seed=0"))
    if not 0 <= options["annotators"] <= MOST_ANNOTATORS or not 0 <= options["careless"] <= 1:
        what = f"annotators must be 0 to {MOST_ANNOTATORS}, and careless 0 to 1."
        raise RlhfError(Problem("DAT002", name, what, "annotators=5&careless=0.5"))
    if options["careless"] and not 1 <= options["careless_annotators"] <= options["annotators"]:
        what = "careless is of careless_annotators, 1 to as many as annotators."
        raise RlhfError(Problem("DAT002", name, what, "annotators=5&careless=0.5&careless_annotators=1"))
    return kind, options
