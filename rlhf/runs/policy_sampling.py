"""How a finished policy is sampled: as its own run samples it, unless something else is asked for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from rlhf.config.sections import SamplingSection
from rlhf.errors import Problem, RlhfError
from rlhf.runs.artifacts import Manifest

PREFIX = "sampling."
SETTINGS = ("max_new_tokens", "temperature", "stop_tokens")


@dataclass(frozen=True)
class Own:
    """How a policy is sampled where nothing else is asked for, and who says so."""

    section: SamplingSection
    reason: str
    is_of_run: bool = False


@dataclass(frozen=True)
class Asked:
    """What a command line asks for; None: the policy's own. No run has a ``top_p``."""

    seed: int
    max_new_tokens: int | None = None
    temperature: float | None = None
    stop_tokens: list[str] | None = None
    top_p: float = 1.0

    @property
    def settings(self) -> dict[str, Any]:
        """Those that are given. Temperature 0 is greedy, which no config may ask for."""
        given = {
            "max_new_tokens": self.max_new_tokens,
            "temperature": self.temperature,
            "stop_tokens": self.stop_tokens,
        }
        return {name: value for name, value in given.items() if value is not None}


def of_run(manifest: Manifest) -> SamplingSection | None:
    """The sampling section that a run was made with; None where its manifest does not say.

    Raises:
        RlhfError: CKP003 where it is not readable.
    """
    keys = {key.removeprefix(PREFIX): value for key, value in manifest.identity.items() if key.startswith(PREFIX)}
    known = {key: value for key, value in keys.items() if key in SamplingSection.model_fields}
    if not known:
        return None
    try:
        return SamplingSection.model_validate(known)
    except ValidationError as error:
        what = f"the manifest's sampling settings are not readable: {error.errors()[0]['msg']}."
        raise RlhfError(Problem("CKP003", f"{manifest.stage} run", what, "make the run again")) from None


def own(manifest: Manifest | None) -> Own:
    """What the policy's run says; the defaults for a model that is not a run (None), or a run that does not say."""
    section = of_run(manifest) if manifest else None
    if section:
        return Own(section, "as its own run does", True)
    why = "its run does not say" if manifest else "it is not a run, and its generation_config gives only its end tokens"
    return Own(SamplingSection(), f"by rlhf's defaults: {why}")


def sentence(policy: str, own: Own, given: Mapping[str, Any], top_p: float = 1.0) -> str:
    """What is used, and where it comes from."""
    parts = []
    settings = dict(own.section)
    for name in SETTINGS:
        theirs = settings[name]
        value = given.get(name, theirs)
        if value != theirs:
            parts.append(f"{name} {value} (asked for, instead of {theirs})")
        elif value:
            parts.append(f"{name} {value}")
    parts += [f"top_p {top_p:g}"] if top_p < 1.0 else []
    return f"Sampling {policy} with {', '.join(parts)}, {own.reason}."
