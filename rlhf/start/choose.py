"""Figures that follow from other figures: lengths from quantiles, batches and rates from sizes. Pure functions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from rlhf.preflight import missing_ends
from rlhf.start.facts import ModelFacts

QUANTILE, SLACK, MULTIPLE = 0.99, 1.5, 8
LEAST_NEW, LEAST_OWN, MOST_NEW = 16, 512, 1024
MOST_TOKENS = 2048


@dataclass(frozen=True)
class Size:
    """What goes with a model of fewer than ``below`` parameters.

    Args:
        tokens: in a forward pass; with checkpointing, and without the logits of a whole vocabulary at once, this is
            1 GiB of activations at most (2 * hidden * layers bytes a token, and one layer's own).
    """

    below: float
    sft: float
    reward: float
    policy: float
    batch: int
    tokens: int
    source: str

    @property
    def is_large(self) -> bool:
        """Large enough for bfloat16 and for recomputing activations."""
        return self.below > 1e8


LORA = "LoRA wants ten times the rate of full fine-tuning (Schulman et al. 2025, LoRA Without Regret)"
SIZES = (
    Size(1e7, 3e-3, 2e-3, 1.5e-3, 64, 8192, "measured on the embedded world's base of 1.4 M parameters"),
    Size(1e8, 1e-3, 5e-4, 2e-4, 64, 8192, "between the embedded world's and those for 0.1 B and more"),
    Size(3e9, 2e-4, 1e-4, 3e-5, 128, 8192, ""),
    Size(13.5e9, 2e-4, 1e-4, 3e-5, 128, 4096, ""),
    Size(math.inf, 1e-4, 5e-5, 1e-5, 128, 2048, ""),
)  # fmt: skip
SOURCES = {
    "sft": "QLoRA's: 2e-4 up to 13 B, 1e-4 above (Dettmers et al. 2023, table 9)",
    "reward": f"1e-5 in full is TRL's default for reward models; {LORA}",
    "policy": f"3e-6 in full (Huang et al. 2024, N+ details); {LORA}",
}


def size_of(num_parameters: int) -> Size:
    return next(size for size in SIZES if num_parameters < size.below)


def rate_source(size: Size, role: str) -> str:
    """Where a learning rate comes from."""
    return size.source or SOURCES[role]


def quantile(lengths: Sequence[int], share: float) -> int:
    """The least length that ``share`` of the rows do not exceed."""
    return sorted(lengths)[math.ceil(share * len(lengths)) - 1]


def limits(lengths: Sequence[int], context: int | None, is_large: bool) -> list[int]:
    """Limits to try, the first that keeps enough rows being taken: 2,048 tokens where memory counts, the 0.99 quantile
    where the longest row is more than 1.5 times that, the longest row. None is beyond the context.
    """
    longest, usual = max(lengths), quantile(lengths, QUANTILE)
    found = [longest if longest <= SLACK * usual else usual, longest]
    if is_large and longest > MOST_TOKENS:
        found.append(MOST_TOKENS)
    return sorted({min(up(length), context or up(length)) for length in found})


def up(tokens: float) -> int:
    return MULTIPLE * math.ceil(tokens / MULTIPLE)


def new_tokens(answers: Sequence[int], prompt: int, context: int | None, own_length: bool = False) -> int:
    """1.5 times the 0.99 quantile of the answers, 16 at least: a policy's are longer than those that it learnt from.

    No more than 1,024, half of the context, and what fits behind a long prompt; but nine answers of ten always fit,
    where half of the context holds them.

    Args:
        prompt: tokens of a long prompt.
        own_length: the model answers at a length of its own, which the answers do not show.
    """
    wanted = max(LEAST_NEW, LEAST_OWN if own_length else 0, up(SLACK * quantile(answers, QUANTILE)))
    if context is None:
        return min(MOST_NEW, wanted)
    behind = max(context - prompt, up(quantile(answers, 0.9)))
    return min(MOST_NEW, wanted, behind, context // 2)


def share_that_fits(answers: Sequence[int], tokens: int) -> float:
    return sum(answer <= tokens for answer in answers) / len(answers)


def holdout_fraction(num_prompts: int, usual: float, least: int) -> float:
    """The usual share, or what makes ``least`` prompts, but never more than a quarter."""
    return max(usual, min(0.25, math.ceil(100 * least / num_prompts) / 100))


def batch_size(num_rows: int, most: int, steps_an_epoch: int) -> int:
    """The largest power of two, at most ``most``, that makes so many steps an epoch; at least 2."""
    wanted = max(min(2, num_rows), min(most, num_rows // steps_an_epoch))
    return 1 << (wanted.bit_length() - 1)


def micro_batch_size(tokens_a_row: int, budget: int, batch: int) -> int:
    """The largest power of two whose rows have at most ``budget`` tokens together."""
    return min(batch, 1 << (max(1, budget // tokens_a_row).bit_length() - 1), 16)


def least_steps(model: ModelFacts) -> tuple[int, int]:
    """Optimizer steps that SFT takes at least, and the passes over few rows that it makes for them at most.

    On 95 answers a pretrained base of 0.26 M parameters had its lowest held-out loss in the second pass, and it ended
    its answers after about 50 steps, however many rows a step took.
    """
    return (300, 30) if model.is_initialised else (120, 10)


def epochs(num_rows: int, batch: int, least_steps: int, most: int) -> int:
    """As few as make ``least_steps`` optimizer steps, at most ``most``."""
    return max(1, min(most, math.ceil(least_steps * batch / num_rows)))


def least_end_rate(model: ModelFacts, share: float, num_samples: int, as_it_is: bool = False) -> tuple[float, str]:
    """The share of sampled answers that must end by themselves, and why: see ``missing_ends.enough``.

    Args:
        share: of the answers in the data, those that fit into ``max_new_tokens``.
    """
    if as_it_is:
        why = "the model answers at its own length; below a half, PPO would mostly see answers that were cut off"
        return missing_ends.UNTAUGHT, why
    fits = f"{share:.1%} of the answers in the data fit max_new_tokens"
    if model.is_initialised:
        return math.floor(20 * share) / 100, f"{fits}; a base that was never pretrained learns a fifth of that to end"
    why = f"{fits}, and 0.9 of that is enough; less two standard deviations of {num_samples} samples"
    return missing_ends.enough(share, num_samples), why


def missing_end(share: float, as_it_is: bool) -> tuple[float, str]:
    """What an answer that was cut off loses, and why: little where many are, or shorter answers would pay."""
    cut = 1 - missing_ends.UNTAUGHT if as_it_is else 1 - share
    whose = "of the model's own answers may be" if as_it_is else "of the answers in the data are"
    return missing_ends.penalty(cut), f"{cut:.1%} {whose} longer than max_new_tokens (docs/missing-end.md)"


def train_tokens(model: ModelFacts) -> tuple[list[str], str]:
    """The rows that the adapter must train, and why: a frozen row that was never trained is never written."""
    end = model.end_token
    if model.is_initialised:
        return list(model.marks), "the embeddings are as they were initialised: no token was ever trained"
    if model.untrained:
        shown = ", ".join(map(repr, model.untrained))
        return list(model.untrained), f"untrained: the row of {shown} is like those of tokens never seen in pretraining"
    looked = "" if model.untrained is None else "; its row differs from every other, as trained ones do"
    if model.is_instruct:
        return [], f"the model ends its own turns with {end!r}{looked}"
    if end in model.ends:
        return [], f"{end!r} ended documents in pretraining{looked}; if SFT says that it does not stop, name it here"
    tokens = [token for token in model.marks if token not in model.ends]
    own = " and ".join(map(repr, model.ends)) or "no token"
    return tokens, f"the base ends with {own}, the template with {end!r}: what it marks turns with is trained too"
