"""The support desk's language: customers' tickets and the words that replies are made of."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from dataclasses import dataclass

ITEMS = (
    "kettle", "lamp", "chair", "desk", "clock", "radio", "heater", "fan", "mixer", "toaster", "phone", "tablet",
    "camera", "printer", "scanner", "router", "speaker", "keyboard", "monitor", "mouse", "blender", "oven", "fridge",
    "washer", "dryer", "vacuum", "drill", "saw", "ladder", "tent", "stove", "bike", "helmet", "jacket", "boots",
    "gloves", "watch", "scale", "pump", "mirror",
)  # fmt: skip
ADJECTIVES = ("red", "blue", "green", "white", "black", "small", "large", "old", "new", "silver")
NAMES = (
    "anna", "ben", "carla", "david", "emma", "felix", "grace", "hugo", "iris", "jonas", "kira", "leo", "maria",
    "noah", "olga", "paul", "rosa", "simon", "tara", "victor",
)  # fmt: skip
CODES = tuple(str(code) for code in range(10, 100))
ISSUES: dict[str, tuple[str, ...]] = {
    "replace": ("my {adj} {item} arrived broken .", "the {adj} {item} came with a crack ."),
    "trace": ("my {adj} {item} has not come yet .", "i still wait for the {adj} {item} ."),
    "exchange": ("the {adj} {item} does not fit .", "my {adj} {item} has the wrong size ."),
    "refund": ("i paid twice for my {adj} {item} .", "you charged me too much for the {adj} {item} ."),
    "cancel": ("i no longer want the {adj} {item} .", "please stop my {adj} {item} before it leaves ."),
    "ship": ("a part of my {adj} {item} is missing .", "the {adj} {item} came without its cable ."),
    "guide": ("i can not set up my {adj} {item} .", "how do i start the {adj} {item} ?"),
    "inspect": ("my {adj} {item} gets hot and smells .", "there is smoke from the {adj} {item} ."),
    "invoice": ("i need a bill for my {adj} {item} .", "my office wants a receipt for the {adj} {item} ."),
    "redirect": ("please bring the {adj} {item} to a new address .", "i moved before my {adj} {item} came ."),
}
ACTIONS = tuple(ISSUES)
WRAPPERS = (
    "hi , {name} here . {issue} it is order #{code} .",
    "hello , this is {name} with order #{code} . {issue}",
    "order #{code} : {issue} thanks , {name}",
    "good day . {issue} my order is #{code} and i am {name} .",
    "{issue} order #{code} . regards , {name}",
)
SPLITS = {"train": (0, 80), "validation": (80, 90), "test": (90, 100)}


@dataclass(frozen=True)
class Ticket:
    """What a customer's message is about; ``text`` is all that anyone else sees."""

    action: str
    item: str
    code: str
    name: str
    text: str


def draw_ticket(rng: random.Random) -> Ticket:
    """One ticket; a choice of wording and of each fact."""
    action = rng.choice(ACTIONS)
    item, code, name = rng.choice(ITEMS), rng.choice(CODES), rng.choice(NAMES)
    issue = rng.choice(ISSUES[action]).format(adj=rng.choice(ADJECTIVES), item=item)
    text = rng.choice(WRAPPERS).format(issue=issue, name=name, code=code)
    return Ticket(action, item, code, name, text)


def split_of(prompt: str) -> str:
    """The one split that a prompt belongs to, by its text alone."""
    bucket = int.from_bytes(hashlib.sha256(prompt.encode()).digest()[:4], "big") % 100
    return next(name for name, (low, high) in SPLITS.items() if low <= bucket < high)


def tickets(split: str, seed: int, purpose: str) -> Iterator[tuple[Ticket, random.Random]]:
    """Endless distinct tickets of a split, each with the generator that goes on for it."""
    rng = random.Random(f"rlhf-demo/{purpose}/{seed}")
    seen: set[str] = set()
    while True:
        ticket = draw_ticket(rng)
        if ticket.text not in seen and split_of(ticket.text) == split:
            seen.add(ticket.text)
            yield ticket, random.Random(f"rlhf-demo/{purpose}/{seed}/{ticket.text}")
