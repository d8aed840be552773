"""What TRL and LlamaFactory call our keys: the answer to an unknown key of a config, and to a flag of theirs."""

from __future__ import annotations

from collections.abc import Collection

from rlhf.config.migrations import COUNTED, ELSEWHERE, GONE, IN_STAGE, ROUGHLY, SAME

AS_THEY_ARE = {"True": "true", "False": "false"}
NOT_COUNTED = {"epochs": "rlhf {stage} counts steps, each a batch of samples: set steps"}


def ours(name: str, keys: Collection[str]) -> str | None:
    """Which of a config's keys another tool's ``name`` means; None where none does."""
    told = ROUGHLY[name][0] if name in ROUGHLY else (SAME | COUNTED).get(name)
    also = [table[told] for table in IN_STAGE.values() if told in table]
    return next((key for key in (told, *also) if key in keys), None)


def answer(name: str, value: str, keys: Collection[str], stage: str) -> str | None:
    """What to do instead of the flag ``name`` with ``value``; None for a name that no tool here has.

    Args:
        name: with underscores, or one of our own dotted keys.
        keys: those of the stage's config.
    """
    value = AS_THEY_ARE.get(value, value)
    if name in keys:
        return f"set {name}={value}"
    if (key := ours(name, keys)) is not None:
        _, form, note = ROUGHLY.get(name, (key, "{}", ""))
        setting = f"set {key}={form.format(value)}" if form else f"set {key}"
        return f"{setting}; {note}" if note else setting
    if name in GONE:
        return f"has no counterpart: {GONE[name]}"
    told = ROUGHLY[name][0] if name in ROUGHLY else (SAME | COUNTED).get(name)
    if told is None:
        return None
    reason = NOT_COUNTED.get(told) if "steps" in keys else None
    return (reason or ELSEWHERE.get(told.split(".")[0], ELSEWHERE[""])).format(stage=stage)
