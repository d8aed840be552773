"""Replies: what one says and how, the desk's bad habits, and edits that change one thing."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace

from rlhf.demo.world import ACTIONS, CODES, ITEMS, NAMES, Ticket

RIGHT, WRONG, ABSENT = "right", "wrong", "absent"
FACTS = ("item", "action", "order", "name")
GREETINGS = ("hi", "hello", "dear")
WARM = ("sorry for the trouble .", "thank you for writing .", "we are happy to help .")
RUDE = ("this is your own fault .", "do not write again .", "it is not our problem .")
UNSAFE = (
    "just open it with a knife .",
    "you can ignore the smell .",
    "use it anyway for now .",
    "send us your password .",
)
FILLER = (
    "as you may know we value every message that we get .",
    "please note that many things can take some time .",
    "we would like to add that we are always here .",
)
VAGUE = "look into"


@dataclass(frozen=True)
class Manner:
    """What a reply does: each fact right, wrong or absent, and its style."""

    item: str = RIGHT
    action: str = RIGHT
    order: str = RIGHT
    name: str = RIGHT
    greets: bool = True
    warm: bool = True
    rude: bool = False
    unsafe: bool = False
    filler: int = 0


GOOD = Manner()
# The reply that the desk has got used to: for each intent one bad habit, and it is the most likely reply.
HABITS: dict[str, Manner] = {
    "curt": Manner(item=ABSENT, order=ABSENT, name=ABSENT, greets=False, warm=False, rude=True),
    "unsafe": Manner(order=ABSENT, name=ABSENT, greets=False, warm=False, unsafe=True),
    "verbose": Manner(order=ABSENT, name=ABSENT, warm=False, filler=2),
    "vague": Manner(item=ABSENT, action=ABSENT, order=ABSENT, name=ABSENT, warm=False),
    "wrong": Manner(action=WRONG, name=ABSENT, greets=False, warm=False),
}
HABIT_OF = {
    "replace": "curt", "trace": "curt", "guide": "unsafe", "inspect": "unsafe", "refund": "verbose",
    "cancel": "verbose", "exchange": "vague", "invoice": "vague", "ship": "wrong", "redirect": "wrong",
}  # fmt: skip
USUAL_WRONG_ACTION = {"ship": "trace", "redirect": "cancel"}
HABIT_SHARE, GOOD_SHARE = 0.62, 0.10


def draw_demonstration(ticket: Ticket, rng: random.Random) -> str:
    """A reply as the desk writes them: by habit, sometimes good, else of any kind."""
    share = rng.random()
    if share < HABIT_SHARE:
        return write(ticket, HABITS[HABIT_OF[ticket.action]], rng, habitual=True)
    return write(ticket, GOOD if share < HABIT_SHARE + GOOD_SHARE else draw_manner(rng, 0.45, 0.5), rng)


def draw_manner(rng: random.Random, right: float = 0.55, fine: float = 0.6) -> Manner:
    """A manner of any quality: each fact right with probability ``right``, each style axis good with ``fine``."""

    def fact() -> str:
        return RIGHT if rng.random() < right else rng.choice((WRONG, ABSENT))

    return Manner(
        item=fact(),
        action=fact(),
        order=fact(),
        name=fact(),
        greets=rng.random() < fine,
        warm=rng.random() < fine,
        rude=rng.random() > fine + 0.2,
        unsafe=rng.random() > fine + 0.1,
        filler=0 if rng.random() < fine else 1 + (rng.random() < 0.4),
    )


def write(ticket: Ticket, manner: Manner, rng: random.Random, habitual: bool = False) -> str:
    """A reply to ``ticket`` in the given manner; ``rng`` chooses wordings and wrong values."""
    name = _value(manner.name, ticket.name, NAMES, rng)
    item = _value(manner.item, ticket.item, ITEMS, rng)
    code = _value(manner.order, ticket.code, CODES, rng)
    wrong_action = USUAL_WRONG_ACTION.get(ticket.action) if habitual and manner.action == WRONG else None
    action = wrong_action or _value(manner.action, ticket.action, ACTIONS, rng) or VAGUE
    what = f"your {item}" if item else "it"
    if code:
        what += rng.choice((" from", " of")) + f" order #{code}"
    core = f"we will {action} {what}" + rng.choice((" .", " today .", " now ."))
    parts = [rng.choice(FILLER) for _ in range(manner.filler)]
    parts.insert(rng.randrange(len(parts) + 1), core)
    if manner.unsafe:
        parts.append(rng.choice(UNSAFE))
    if manner.rude:
        parts.append(rng.choice(RUDE))
    if manner.warm:
        parts.insert(0 if rng.random() < 0.6 else len(parts), rng.choice(WARM))
    if manner.greets:
        parts.insert(0, rng.choice(GREETINGS) + (f" {name} ," if name else " ,"))
    elif name:
        parts.insert(0, f"for {name} :")
    return " ".join(parts)


def change_fact(manner: Manner, fact: str, to: str) -> Manner:
    """The same manner with one fact right, wrong or absent."""
    return replace(manner, **{fact: to})  # type: ignore[arg-type]


def draw_edit(manner: Manner, rng: random.Random) -> Manner:
    """A manner that differs in exactly one fact or one style axis."""
    if rng.random() < 0.7:
        fact = rng.choices(FACTS, (1, 3, 1, 1))[0]  # the desk's own trouble is the wrong action
        now = getattr(manner, fact)
        return change_fact(
            manner, fact, rng.choices((RIGHT, WRONG, ABSENT), [now != RIGHT, 2 * (now != WRONG), now != ABSENT])[0]
        )
    axis = rng.choice(("warm", "greets", "rude", "unsafe", "filler"))
    if axis == "filler":
        return replace(manner, filler=0 if manner.filler else 2)
    return replace(manner, **{axis: not getattr(manner, axis)})  # type: ignore[arg-type]


def _value(state: str, right: str, all_values: tuple[str, ...], rng: random.Random) -> str | None:
    if state == ABSENT:
        return None
    if state == RIGHT:
        return right
    wrong = rng.choice(all_values)
    while wrong == right:
        wrong = rng.choice(all_values)
    return wrong
