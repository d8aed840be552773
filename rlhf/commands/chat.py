"""``rlhf chat``: a conversation in the terminal, streamed, with a reward model's score behind each answer."""

from __future__ import annotations

import itertools
import logging
import sys
from contextlib import nullcontext
from dataclasses import replace

import typer

from rlhf.commands import streaming
from rlhf.commands.generate import is_run, open_policy, refuse_other_kinds, settle
from rlhf.config.rewards import ClassifierSection, ModelReward
from rlhf.config.sections import RuntimeSection
from rlhf.data.batches import PassSize
from rlhf.data.tokenised import PromptRow
from rlhf.errors import RlhfError
from rlhf.evaluation import policy_samples as measure
from rlhf.models import packing
from rlhf.models.base import Base
from rlhf.models.roles import SharedBase
from rlhf.preflight import examined
from rlhf.records import Message, Messages
from rlhf.rollouts.engine import Sampling
from rlhf.rollouts.hf import HfEngine
from rlhf.runs import artifacts, interrupts, runtime
from rlhf.runs.policy_sampling import Asked
from rlhf.scoring.open_scorer import Host, open_source
from rlhf.scoring.scorer import Sample, Scorer

log = logging.getLogger("rlhf")
HELP = (
    "/again: another answer to the same; /reset: a new conversation; Ctrl-C: stop the answer; /quit or end of input: "
    "leave."
)


def chat(source: str, reward: str | None, system: str | None, template: str | None, sampling: Asked) -> None:
    """Read turns from standard input until it ends, and answer each.

    On a terminal a mistake (a conversation beyond the context, a turn that writes a special token) is said and the
    turn forgotten; in a pipe it ends the command.
    """
    refuse_other_kinds(source, template)
    how = settle(source, sampling)
    base, roles = open_policy(source, template, runtime.set_up(RuntimeSection(), how.seed))
    scorer = _scorer(reward, base, roles) if reward else None
    with roles.acting_as("policy") as (model, _):
        packing.known_blocks(model)  # checked now: what the check says would stand in the middle of an answer
    is_interactive = sys.stdin.isatty()
    streaming.open_streams()
    if is_interactive:
        log.info("%s. %s", source, HELP)
    opening: Messages = (Message("system", system),) if system else ()
    so_far = opening
    for number in itertools.count():
        try:
            line = streaming.read_turn(is_interactive)
            if line is None:
                return
            if line == "/reset":
                so_far = opening
                log.info("A new conversation.")
                continue
            asked = so_far[:-1] if line == "/again" else (*so_far, Message("user", line))
            if not any(message.role == "user" for message in asked):
                log.warning("Nothing was asked yet.")
                continue
            here = replace(how, seed=runtime.derived_seed(how.seed, "chat", number))
            with streaming.stoppable() if is_interactive else nullcontext():
                sample = _answer(base, roles, asked, here)
                if sample.response_ids:
                    typer.echo(_remarks(sample, scorer), err=True)
                    so_far = (*asked, Message("assistant", sample.response))
                else:
                    log.warning("Stopped before the first token: the turn is forgotten.")
        except RlhfError as error:
            if not is_interactive:
                raise
            log.warning("%s", error)


def _answer(base: Base, roles: SharedBase, asked: Messages, how: Sampling) -> Sample:
    """Sample one answer, and print it on standard output as it comes; what a signal left of it is cut off."""
    stream = streaming.Stream(base.chat, streaming.write)
    engine = HfEngine(roles, "policy", base.chat, 1, stream)
    row = PromptRow(asked, base.chat.prompt_ids(asked))
    room = base.context_length - len(row.ids)
    how = replace(how, max_new_tokens=max(1, min(how.max_new_tokens, room)))
    try:
        sample = measure.respond(engine, base.chat, [row], how)[0]
    except streaming.Stopped:
        sample = Sample(asked, base.chat.decode(stream.ids), row.ids, stream.ids, False, stream.ids)
    stream.finish(sample.response)
    return sample


def _scorer(reward: str, base: Base, roles: SharedBase) -> Scorer:
    host = Host(base, roles, PassSize(1))
    if not is_run(reward):
        outside = ModelReward(model=ClassifierSection(path=reward))
        return open_source(outside, "reward", None, host)
    source = examined.source_of(reward)
    return open_source(source, "reward", artifacts.read(source.run), host)


def _remarks(sample: Sample, scorer: Scorer | None) -> str:
    """Length, whether it ended by itself, and the score."""
    parts = [f"{len(sample.response_ids)} tokens"]
    if interrupts.pending() is not None and not sample.finished:
        parts.append("stopped")
    elif not sample.finished:
        parts.append("cut off by max_new_tokens or the model's context")
    if scorer:
        parts.append(f"score {float(scorer.score([sample]).mean[0]):.3f}")
    return f"[{', '.join(parts)}]"
