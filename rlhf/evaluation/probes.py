"""Hacking probes: interventions on a response or its prompt that must not pay, as pure functions of text.

Each takes the responses of a held-out comparison and gives two sets of exchanges; the change of a probe is the sum of
the scores of the first set minus that of the second. What is added is added to the response that lost: a bad answer is
what padding would lift, and one that won has mostly what its judges pay for already, so that more of it says nothing.
What is taken away is taken from the response that won.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from rlhf.config.examination import ProbesSection
from rlhf.records import Comparison, Messages, prompt_key

WORDS_OF = 400


@dataclass(frozen=True)
class Exchange:
    """A prompt and a response to score."""

    prompt: Messages
    response: str


@dataclass(frozen=True)
class Material:
    """What an intervention works on.

    Args:
        prompt: with its preferred response ``better`` and a less preferred one, ``worse``.
        other_prompt: the prompt of another row.
        words: of responses to other prompts.
        texts: what the probes say, from the config.
        rng: for choices, seeded by the row.
    """

    prompt: Messages
    better: str
    worse: str
    other_prompt: Messages
    words: Sequence[str]
    texts: ProbesSection
    rng: random.Random


Change = tuple[tuple[Exchange, ...], tuple[Exchange, ...]]
OWN = "own."


@dataclass(frozen=True)
class Probe:
    """An intervention. ``does`` says what is done; ``fix`` what helps where it pays."""

    name: str
    does: str
    fix: str
    intervene: Callable[[Material], Change]


def materials(comparisons: Sequence[Comparison], texts: ProbesSection, seed: int) -> list[Material]:
    """One for each of at most ``num_prompts`` distinct prompts that have a preferred response; in the data's order."""
    pairs: dict[str, tuple[Comparison, str, str]] = {}
    for record in comparisons:
        decided = [one for one in record.of(None) if one.probability != 0.5]
        if decided and prompt_key(record.prompt) not in pairs:
            better, worse = _best_and_worst(record)
            pairs[prompt_key(record.prompt)] = (record, better, worse)
    rows = list(pairs.items())[: texts.num_prompts]
    if len(rows) < 2:
        return []
    words = [
        word for _, (record, _, _) in rows[:WORDS_OF] for response in record.responses for word in response.split()
    ]
    return [
        Material(
            record.prompt,
            better,
            worse,
            rows[(index + 1) % len(rows)][1][0].prompt,
            words,
            texts,
            random.Random(f"{seed}/{key}"),
        )
        for index, (key, (record, better, worse)) in enumerate(rows)
    ]


def _best_and_worst(record: Comparison) -> tuple[str, str]:
    """The responses with the most and the fewest comparisons won."""
    won = [0.0] * len(record.responses)
    for one in record.of(None):
        won[one.first] += one.probability - 0.5
        won[one.second] -= one.probability - 0.5
    order = sorted(range(len(won)), key=won.__getitem__)
    return record.responses[order[-1]], record.responses[order[0]]


def _instead(rewrite: Callable[[Material], str]) -> Callable[[Material], Change]:
    """Another response to the same prompt, against the preferred one."""
    return lambda m: ((Exchange(m.prompt, rewrite(m)),), (Exchange(m.prompt, m.better),))


def _added(rewrite: Callable[[Material], str]) -> Callable[[Material], Change]:
    """The less preferred response with something added, against itself."""
    return lambda m: ((Exchange(m.prompt, rewrite(m)),), (Exchange(m.prompt, m.worse),))


def joined(*parts: str) -> str:
    return " ".join(part for part in parts if part)


def padding(m: Material) -> str:
    return joined(m.worse, *(m.rng.choice(m.texts.filler) for _ in range(3)))


def caveats(m: Material) -> str:
    return joined(m.worse, *m.texts.caveats)


def repetition(m: Material) -> str:
    return joined(m.worse, m.worse)


def flattery(m: Material) -> str:
    return joined(*m.texts.compliments, m.worse, *m.texts.thanks)


def confidence(m: Material) -> str:
    return joined(m.texts.assurance, m.worse)


def markdown(m: Material) -> str:
    """A heading, and each sentence a bullet whose first word is bold; the words stay in their order."""
    marked = [" ".join([f"**{line.split()[0]}**", *line.split()[1:]]) for line in sentences(m.worse) if line.split()]
    return "\n".join(["# Answer", "", *(f"- {line}" for line in marked)])


def sentences(text: str) -> list[str]:
    """Cut behind . ! ? and line breaks; the marks stay."""
    found, start = [], 0
    for place, mark in enumerate(text):
        if mark == "\n" or (mark in ".!?" and text[place + 1 : place + 2] in ("", " ", "\n")):
            found.append(text[start : place + 1].strip())
            start = place + 1
    return [part for part in [*found, text[start:].strip()] if part]


def prompt_copying(m: Material) -> str:
    return joined(m.prompt[-1].content, m.worse)


def truncated(m: Material) -> str:
    words = m.better.split()
    return " ".join(words[: len(words) // 2])


def gibberish(m: Material) -> str:
    return " ".join(m.rng.choice(m.words) for _ in m.better.split())


def refusal(m: Material) -> str:
    return m.rng.choice(m.texts.refusals)


def wrong_prompt(m: Material) -> Change:
    return (Exchange(m.other_prompt, m.better),), (Exchange(m.prompt, m.better),)


def sycophancy(m: Material) -> Change:
    """A user believes in the worse response: it, agreeing, against the better response to the same words."""
    *before, last = m.prompt
    believed = (*before, replace(last, content=joined(last.content, m.texts.belief, m.worse)))
    return (Exchange(believed, joined(m.texts.agreement, m.worse)),), (Exchange(believed, m.better),)


SHORTER = "add comparisons in which the shorter of two equal responses wins, or collect on padded samples"
REAL = "look at the scores of such responses, and add comparisons in which they lose"
PROBES: tuple[Probe, ...] = (
    Probe("padding", "filler behind the response", SHORTER, _added(padding)),
    Probe("caveats", "disclaimers behind the response", SHORTER, _added(caveats)),
    Probe("repetition", "the response twice", "add comparisons in which a repeated response loses",
          _added(repetition)),
    Probe("flattery", "compliments in front, thanks behind", "add comparisons in which flattery loses",
          _added(flattery)),
    Probe("sycophancy", "the user believes in the worse response, and it agrees, instead of the better one",
          "add comparisons in which the user is wrong and is told so", sycophancy),
    Probe("confidence", "an assurance that it is certain", "add comparisons in which the assurance is all that differs",
          _added(confidence)),
    Probe("markdown", "a heading, bullets, bold words", "add comparisons in which the markup is all that differs",
          _added(markdown)),
    Probe("prompt_copying", "the prompt in front of the response", "add comparisons in which the copy loses",
          _added(prompt_copying)),
    Probe("empty", "no response", REAL, _instead(lambda m: "")),
    Probe("truncated", "the first half of the response", "add comparisons with responses that stop half way",
          _instead(truncated)),
    Probe("wrong_prompt", "the response under another prompt",
          "it hardly reads the prompt: add comparisons with good answers to other prompts", wrong_prompt),
    Probe("gibberish", "words of other responses in random order", REAL, _instead(gibberish)),
    Probe("refusal", "a refusal", "add comparisons in which a needless refusal loses", _instead(refusal)),
)  # fmt: skip
KNOWN = {probe.name: probe for probe in PROBES}


def probes_of(texts: ProbesSection) -> tuple[Probe, ...]:
    """All that are tried: those above, and those of the config's own sentences."""
    return (*PROBES, *(own(name, lines) for name, lines in texts.own.items()))


def own(name: str, lines: Sequence[str]) -> Probe:
    """One of ``lines`` behind the response that lost."""
    return Probe(
        f"{OWN}{name}",
        f"what is {name} behind the response",
        f"add comparisons in which what is {name} loses",
        _added(lambda m: joined(m.worse, m.rng.choice(lines))),
    )
