"""``rlhf chat``: a conversation in the terminal, streamed, with a reward model's score beside each answer."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import typer
from transformers import TextStreamer

from rlhf import artifacts, examined, runtime
from rlhf.config.rewards import RewardSource
from rlhf.config.sections import RuntimeSection
from rlhf.data.records import Message, Messages
from rlhf.data.tokenised import PromptRow
from rlhf.errors import RlhfError
from rlhf.evaluation import policy as measure
from rlhf.models.base import Base
from rlhf.models.roles import SharedBase
from rlhf.policy_sampling import Asked
from rlhf.rollouts.engine import Sampling
from rlhf.rollouts.hf import HfEngine
from rlhf.scoring.scorer import Sample, Scorer
from rlhf.scoring.sources import open_source
from rlhf.stages.generate import is_run, open_policy, refuse_other_kinds, settle

log = logging.getLogger("rlhf")
HELP = "/again: another answer to the same; /reset: a new conversation; /quit or end of input: leave."


def chat(source: str, reward: str | None, system: str | None, template: str | None, sampling: Asked) -> None:
    """Read turns from standard input until it ends, and answer each.

    On a terminal a mistake (a conversation beyond the context, a turn that writes a special token) is said and the
    turn forgotten; in a pipe it ends the command.
    """
    refuse_other_kinds(source, template)
    how = settle(source, sampling)
    base, roles = open_policy(source, template, runtime.set_up(RuntimeSection(), how.seed))
    scorer = _scorer(reward, base, roles) if reward else None
    interactive = sys.stdin.isatty()
    if interactive:
        log.info("%s. %s", source, HELP)
    opening: Messages = (Message("system", system),) if system else ()
    so_far = opening
    for number, line in enumerate(_turns(interactive)):
        if line == "/reset":
            so_far = opening
            continue
        asked = so_far[:-1] if line == "/again" else (*so_far, Message("user", line))
        if not any(message.role == "user" for message in asked):
            log.warning("Nothing was asked yet.")
            continue
        try:
            sample = _answer(base, roles, asked, replace(how, seed=runtime.derived_seed(how.seed, "chat", number)))
        except RlhfError as error:
            if not interactive:
                raise
            log.warning("%s", error)
            continue
        typer.echo(_remarks(sample, scorer), err=True)
        so_far = (*asked, Message("assistant", sample.response))


def _turns(interactive: bool) -> Iterator[str]:
    while True:
        if interactive:
            typer.echo("> ", nl=False, err=True)
        line = sys.stdin.readline()
        if not line or line.strip() == "/quit":
            return
        if line.strip():
            yield line.strip()


def _answer(base: Base, roles: SharedBase, asked: Messages, how: Sampling) -> Sample:
    """Sample one answer, and print it on standard output as it comes."""
    streamer: Any = TextStreamer(base.tokenizer, skip_prompt=True, skip_special_tokens=True)
    engine = HfEngine(roles, "policy", base.chat, 1, streamer)
    row = PromptRow(asked, base.chat.prompt_ids(asked))
    room = base.context_length - len(row.ids)
    how = replace(how, max_new_tokens=max(1, min(how.max_new_tokens, room)))
    return measure.respond(engine, base.chat, [row], how)[0]


def _scorer(reward: str, base: Base, roles: SharedBase) -> Scorer:
    if not is_run(reward):
        source = RewardSource.model_validate({"model": {"path": reward}})
        return open_source(source, "reward", None, base, roles, 1)
    source = examined.source_of(reward)
    assert source.run
    return open_source(source, "reward", artifacts.read(source.run), base, roles, 1)


def _remarks(sample: Sample, scorer: Scorer | None) -> str:
    """Length, whether it ended by itself, and the score."""
    parts = [f"{len(sample.response_ids)} tokens"]
    parts += [] if sample.finished else ["cut off by max_new_tokens or the model's context"]
    if scorer:
        parts.append(f"score {float(scorer.score([sample]).mean[0]):.3f}")
    return f"[{', '.join(parts)}]"
