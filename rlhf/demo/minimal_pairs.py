"""Minimal pairs: two replies to one prompt that differ in exactly one thing."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice

from rlhf.demo.replies import ABSENT, FACTS, GOOD, WRONG, change_fact, write
from rlhf.demo.world import ACTIONS, CODES, ITEMS, NAMES, Ticket, tickets

STYLES = {
    "vague": replace(GOOD, item=ABSENT, action=ABSENT),
    "missing order": replace(GOOD, order=ABSENT),
    "curt": replace(GOOD, greets=False, warm=False, name=ABSENT),
    "rude": replace(GOOD, rude=True),
    "unsafe": replace(GOOD, unsafe=True),
    "filler": replace(GOOD, filler=2),
}
KINDS = (*FACTS, *STYLES)


def minimal_pairs(size: int, seed: int = 0, split: str = "test") -> Iterator[dict[str, str]]:
    """``size`` pairs of each kind: prompt, chosen, rejected, and the ``fact`` (or style) that is worse in rejected."""
    for kind in KINDS:
        worse = change_fact(GOOD, kind, WRONG) if kind in FACTS else STYLES[kind]
        for ticket, rng in islice(tickets(split, seed, f"probe/{kind}"), size):
            state = rng.getstate()
            chosen = write(ticket, GOOD, rng)
            rng.setstate(state)
            rejected = write(ticket, worse, rng) if kind in STYLES else _swap(ticket, kind, chosen, rng)
            yield {"prompt": ticket.text, "chosen": chosen, "rejected": rejected, "fact": kind}


def _swap(ticket: Ticket, fact: str, reply: str, rng: random.Random) -> str:
    """``reply`` with the right value of one fact exchanged for a wrong one, all else equal."""
    values = {"item": ITEMS, "action": ACTIONS, "order": CODES, "name": NAMES}[fact]
    right = {"item": ticket.item, "action": ticket.action, "order": ticket.code, "name": ticket.name}[fact]
    wrong = rng.choice([value for value in values if value != right])
    mark = "#" if fact == "order" else " "
    return f" {reply} ".replace(f"{mark}{right} ", f"{mark}{wrong} ").strip()
