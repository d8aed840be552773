"""Measuring a policy: its samples, their scores, its distance from the reference, its loss on given answers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rlhf.config.sections import SamplingSection
from rlhf.data.batches import PassSize, Sequences, collate
from rlhf.data.chat_format import ChatFormat
from rlhf.data.tokenised import PromptRow, Turn
from rlhf.models import forward
from rlhf.models.roles import Roles
from rlhf.rollouts.engine import RolloutEngine, Sampling
from rlhf.runs.progress import track
from rlhf.scoring.ensemble import Answer
from rlhf.scoring.scorer import Sample, Scorer

ScoreRule = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class SampledPolicy:
    """A policy next to its reference.

    Args:
        roles: at least "policy" and "reference"; engine: samples the policy.
        size: of the forward passes that read its responses.
    """

    roles: Roles
    engine: RolloutEngine
    chat: ChatFormat
    size: PassSize

    def respond(self, prompts: Sequence[PromptRow], how: Sampling, rows: Sequence[int] | None = None) -> list[Sample]:
        """As the function ``respond``."""
        return respond(self.engine, self.chat, prompts, how, rows)

    def batched(self, samples: Sequence[Sample]) -> Iterator[tuple[list[int], Sequences]]:
        """As the function ``batched``."""
        return batched(samples, self.chat.pad_id, self.roles.device, self.size)


@dataclass(frozen=True)
class Evaluation:
    """Figures on held-out prompts, and the samples that they were measured on."""

    metrics: dict[str, float]
    rows: list[dict[str, Any]]


def sampling_of(section: SamplingSection, seed: int) -> Sampling:
    """How a config says to sample, with the noise of ``seed``."""
    return Sampling(section.max_new_tokens, section.temperature, seed, stop_tokens=tuple(section.stop_tokens))


def respond(
    engine: RolloutEngine,
    chat: ChatFormat,
    prompts: Sequence[PromptRow],
    how: Sampling,
    rows: Sequence[int] | None = None,
) -> list[Sample]:
    """One response to each prompt; the noise of a row depends on the seed and its number in ``rows`` alone."""
    rollout = engine.generate([prompt.ids for prompt in prompts], how, rows or range(len(prompts)))
    logprobs: Sequence[list[float] | None] = rollout.logprobs or [None] * len(prompts)
    return [
        _sample(chat, prompt, tokens, finished, said)
        for prompt, tokens, finished, said in zip(prompts, rollout.tokens, rollout.finished, logprobs, strict=True)
    ]


def _sample(chat: ChatFormat, prompt: PromptRow, tokens: list[int], finished: bool, said: list[float] | None) -> Sample:
    """A sampled response as it is rescored (its ids), read as text, and read by a reward role (the scored ids: the
    template's end in place of another, and no thinking unless that is kept)."""
    kept, end = (tokens[:-1], [chat.end_id]) if finished else (tokens, [])
    thought, answer = chat.thought_and_answer(kept)
    scored = [*kept, *end]
    if thought and chat.thinking != "keep":
        # Thinking that was cut off leaves no answer; what there is then is read, and the missing-EOS rule decides.
        scored = [*chat.response_ids(prompt.messages, chat.without_special(answer)), *end] or scored
    return Sample(prompt.messages, chat.decode(kept), prompt.ids, tokens, finished, scored, said, thought)


def answering(engine: RolloutEngine, chat: ChatFormat, how: Sampling) -> Answer:
    """Samples an answer to the prompt of each sample, with the noise of the number beside it."""

    def answer(samples: Sequence[Sample], numbers: Sequence[int]) -> list[Sample]:
        rows = [PromptRow(sample.prompt, sample.prompt_ids) for sample in samples]
        return respond(engine, chat, rows, how, numbers)

    return answer


def evaluate(
    policy: SampledPolicy, scorer: Scorer, rule: ScoreRule, prompts: Sequence[PromptRow], how: Sampling
) -> Evaluation:
    """Mean score (after the missing-EOS rule), exact KL to the reference in nats a response, length, end-token rate."""
    samples = policy.respond(prompts, how)
    scores = score_by_rule(scorer, rule, samples)
    kl = exact_kl(policy.roles, samples, policy.chat.pad_id, how.temperature, policy.size)
    lengths = torch.tensor([len(sample.response_ids) for sample in samples], dtype=torch.float64)
    finished = torch.tensor([sample.finished for sample in samples], dtype=torch.float64)
    metrics = {
        "eval/score": float(scores.double().mean()),
        "eval/exact_kl_nats": float(kl.mean()),
        "eval/response_tokens": float(lengths.mean()),
        "eval/end_token_rate": float(finished.mean()),
    }
    return Evaluation(metrics, sample_rows(samples, score=scores.tolist(), exact_kl=kl.tolist()))


def score_by_rule(scorer: Scorer, rule: ScoreRule, samples: Sequence[Sample]) -> Tensor:
    """[B] scores after the rule for responses that were cut off."""
    finished = torch.tensor([sample.finished for sample in samples])
    return rule(scorer.score(samples).mean.cpu(), finished)


def exact_kl(roles: Roles, samples: Sequence[Sample], pad_id: int, temperature: float, size: PassSize) -> Tensor:
    """[B] float64: KL(policy || reference) of the tempered policies, over the vocabulary, summed over the response."""
    kl = torch.zeros(len(samples), dtype=torch.float64)
    for rows, sequences in batched(samples, pad_id, roles.device, size):
        both = forward.policy_and_reference(roles, sequences, temperature)
        kl[rows] = both.exact_kl.double().sum(1).cpu()
    return kl


@torch.no_grad()
def response_loss(model: Any, turns: Sequence[Turn], pad_id: int, device: torch.device, size: PassSize) -> float:
    """Mean negative log-likelihood a response token (end token included), in nats, at temperature 1.

    A model in training is measured without its dropout and given back in the mode that it was in.
    """
    total, num_tokens = 0.0, 0
    with in_eval_mode(model):
        for _, sequences in batched(turns, pad_id, device, size):
            total -= float(forward.response_logprobs(model, sequences, 1.0).double().sum())
            num_tokens += int(sequences.mask.sum())
    return total / num_tokens


@contextmanager
def in_eval_mode(model: nn.Module) -> Iterator[None]:
    """Every module in eval mode inside, and afterwards each in its own mode again."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def batched(
    items: Sequence[Sample] | Sequence[Turn], pad_id: int, device: torch.device, size: PassSize
) -> Iterator[tuple[list[int], Sequences]]:
    """Length-sorted micro-batches: the rows' indices and their padded sequences."""
    parts = size.split([len(item.prompt_ids) + len(item.response_ids) for item in items])
    for rows in track(parts, "Measuring", len(parts)):
        prompts, responses = [items[i].prompt_ids for i in rows], [items[i].response_ids for i in rows]
        yield rows, collate(prompts, responses, pad_id, device)


def sample_rows(samples: Sequence[Sample], **columns: Sequence[float]) -> list[dict[str, Any]]:
    """Samples as JSON rows: the prompt's messages, the response, whether it ended by itself, and more columns."""
    return [
        {
            "prompt": [{"role": message.role, "content": message.content} for message in sample.prompt],
            "response": sample.response,
            "finished": sample.finished,
            **({"thinking": sample.thinking} if sample.thinking else {}),
            **{name: values[index] for name, values in columns.items()},
        }
        for index, sample in enumerate(samples)
    ]
