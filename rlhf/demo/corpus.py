"""What the small base is pretrained on: dialogues of poor quality, reviewed dialogues, and ticket notes.

The reviews check facts alone, never style: what people prefer is left for the reward model to learn.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import replace

from rlhf.demo.replies import ABSENT, FACTS, HABIT_OF, HABITS, RIGHT, WRONG, Manner, draw_manner, write
from rlhf.demo.world import ACTIONS, CODES, ISSUES, ITEMS, NAMES, Ticket, draw_ticket, split_of

USER, BOT, END = "<user>", "<bot>", "<eos>"
EARLY = {"tally": 0.35, "terse": 0.42, "reviewed": 0.10, "dialogue": 0.05, "note": 0.08}
LATE = {"tally": 0.07, "terse": 0.15, "reviewed": 0.42, "dialogue": 0.30, "note": 0.06}
LAST = {"action": 0.30, "terse": 0.12, "reviewed": 0.46, "dialogue": 0.12}
COUNTS = ("none", "one", "two")


def draw_document(rng: random.Random, shares: dict[str, float] = LATE) -> str:
    """One document on a ticket of the training split, markers included."""
    ticket = draw_ticket(rng)
    while split_of(ticket.text) != "train":
        ticket = draw_ticket(rng)
    kind = rng.choices(list(shares), list(shares.values()))[0]
    kinds: dict[str, Callable[[Ticket, random.Random], str]] = {
        "tally": lambda _, rng: draw_tally(rng),
        "action": lambda ticket, rng: _terse(ticket, rng, ["action"]),
        "reviewed": _reviewed,
        "terse": _terse,
        "dialogue": _dialogue,
        "note": _note,
    }
    return kinds[kind](ticket, rng)


def _dialogue(ticket: Ticket, rng: random.Random) -> str:
    """A reply of the desk's poorer days: half by some habit, half of any kind."""
    manner = HABITS[rng.choice(list(HABIT_OF.values()))] if rng.random() < 0.4 else draw_manner(rng, 0.5, 0.5)
    return f"{USER}{ticket.text}{BOT}{write(ticket, manner, rng)}{END}"


def _reviewed(ticket: Ticket, rng: random.Random) -> str:
    """A reply, and after its end the review of its facts; most replies have none or one of them wrong."""
    manner = _checked_manner(rng, draw_manner(rng, 0.5, rng.choice((0.4, 0.6, 0.9))))
    return f"{USER}{ticket.text}{BOT}{write(ticket, manner, rng)}{END}{review(manner)}"


def _terse(ticket: Ticket, rng: random.Random, facts: Sequence[str] | None = None) -> str:
    """The same check on one to four bare facts, without sentences around them."""
    facts = facts or rng.sample(FACTS, rng.choice((1, 1, 2, 3, 4)))
    manner = _checked_manner(rng, Manner())
    right = {"item": ticket.item, "action": ticket.action, "order": f"#{ticket.code}", "name": ticket.name}
    values = {"item": ITEMS, "action": ACTIONS, "order": tuple(f"#{code}" for code in CODES), "name": NAMES}
    said = []
    for fact in facts:
        state = getattr(manner, fact)
        if state != ABSENT:
            wrong = rng.choice([value for value in values[fact] if value != right[fact]])
            said.append(right[fact] if state == RIGHT else wrong)
    issue = rng.choice(ISSUES[ticket.action]).format(adj="new", item=ticket.item)
    asked = [issue if fact == "action" else right[fact] for fact in facts]
    rng.shuffle(asked)
    rng.shuffle(said)
    return f"{USER}ask {' '.join(asked)}{BOT}say {' '.join(said)}{END}{review(manner, facts)}"


def draw_tally(rng: random.Random) -> str:
    """Facts one after the other, each marked as new or seen before: what teaches to compare words at a distance."""
    pool = [rng.choice(ITEMS) for _ in range(4)] + [rng.choice(NAMES) for _ in range(3)]
    pool += [f"#{rng.choice(CODES)}" for _ in range(4)] + [rng.choice(ACTIONS) for _ in range(2)]
    rng.shuffle(pool)
    seen: set[str] = set()
    marked = []
    for _ in range(rng.randint(8, 16)):
        word = rng.choice(pool)
        marked.append(f"{word} {'seen' if word in seen else 'first'}")
        seen.add(word)
    return f"{USER}tally{END} {' '.join(marked)}"


def _note(ticket: Ticket, rng: random.Random) -> str:
    """The ticket's facts restated in any order: what teaches copying."""
    facts = [f"item {ticket.item}", f"order #{ticket.code}", f"name {ticket.name}", f"action {ticket.action}"]
    rng.shuffle(facts)
    return f"{USER}{ticket.text}{END}note {' ; '.join(facts)} ."


def review(manner: Manner, facts: Sequence[str] = FACTS) -> str:
    """The number of wrong facts first, then each fact's verdict."""
    states = [getattr(manner, fact) for fact in facts]
    verdicts = " ".join(f"{fact} {state}" for fact, state in zip(facts, states, strict=True))
    return f"{COUNTS[states.count(WRONG)]} wrong : {verdicts} ."


def _checked_manner(rng: random.Random, manner: Manner) -> Manner:
    num_wrong = rng.choice((0, 0, 1, 1, 1, 2))
    states = dict.fromkeys(FACTS, RIGHT) | dict.fromkeys(rng.sample(FACTS, num_wrong), WRONG)
    if rng.random() < 0.3:
        states[rng.choice(FACTS)] = ABSENT
    return replace(manner, **states)  # type: ignore[arg-type]
