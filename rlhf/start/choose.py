"""Figures that follow from other figures: lengths from quantiles, batches and rates from sizes. Pure functions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from rlhf.start.facts import ModelFacts

QUANTILE, SLACK, MULTIPLE, LEAST_NEW = 0.99, 1.5, 8, 16
MOST_TOKENS = 2048
STEPS_AN_EPOCH = 20
LEAST_DROPPED = 0.05


@dataclass(frozen=True)
class Size:
    """What goes with a model of fewer than ``below`` parameters.

    Args:
        steps: the least that SFT takes, in ``passes`` at most, to learn an end token from few rows.
        tokens: in a forward pass; with checkpointing, and without the logits of a whole vocabulary at once, this is
            1 GiB of activations at most (2 * hidden * layers bytes a token, and one layer's own).
    """

    below: float
    sft: float
    reward: float
    policy: float
    batch: int
    tokens: int
    steps: int
    passes: int
    source: str

    @property
    def is_large(self) -> bool:
        """Large enough for bfloat16 and for recomputing activations."""
        return self.below > 1e8


LORA = "LoRA wants ten times the rate of full fine-tuning (Schulman et al. 2025, LoRA Without Regret)"
SIZES = (
    Size(1e7, 3e-3, 2e-3, 1.5e-3, 64, 8192, 300, 30, "measured on the embedded world's base of 1.4 M parameters"),
    Size(1e8, 1e-3, 5e-4, 2e-4, 64, 8192, 100, 10, "between the embedded world's and those for 0.1 B and more"),
    Size(3e9, 2e-4, 1e-4, 3e-5, 128, 8192, 60, 10, ""),
    Size(13.5e9, 2e-4, 1e-4, 3e-5, 128, 4096, 60, 10, ""),
    Size(math.inf, 1e-4, 5e-5, 1e-5, 128, 2048, 60, 10, ""),
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


@dataclass(frozen=True)
class Limit:
    """A length in tokens, and the rows that are longer."""

    tokens: int
    longest: int
    quantile: int
    num_longer: int
    num_rows: int

    def why(self, of: str) -> str:
        longer = f"{self.num_longer} of {self.num_rows} rows are longer"
        return f"{of}: the {QUANTILE} quantile is {self.quantile} tokens, the longest {self.longest}; {longer}"


def quantile(lengths: Sequence[int], share: float) -> int:
    """The least length that ``share`` of the rows do not exceed."""
    return sorted(lengths)[math.ceil(share * len(lengths)) - 1]


def limit(lengths: Sequence[int], most: int | None) -> Limit:
    """The longest row where it is no longer than 1.5 times the 0.99 quantile, else that quantile; then a multiple of 8.

    Args:
        most: no more than this, whatever the rows are: the context, or what memory allows. None: no bound.
    """
    longest, usual = max(lengths), quantile(lengths, QUANTILE)
    wanted = up(longest if longest <= SLACK * usual else usual)
    tokens = max(MULTIPLE, wanted if most is None else min(wanted, most))
    return Limit(tokens, longest, usual, sum(length > tokens for length in lengths), len(lengths))


def up(tokens: float) -> int:
    return MULTIPLE * math.ceil(tokens / MULTIPLE)


def new_tokens(lengths: Sequence[int], context: int | None) -> int:
    """1.5 times the 0.99 quantile of the answers, 16 at least: a policy's are longer than those that it learnt from."""
    most = min(1024, context // 2) if context else 1024
    return min(max(LEAST_NEW, up(SLACK * quantile(lengths, QUANTILE))), most)


def dropped_fraction(sets: Sequence[Sequence[int]], tokens: int) -> float:
    """The largest share of a set's rows that are longer than ``tokens``, rounded up to a hundredth; at least 0.05."""
    shares = [sum(length > tokens for length in lengths) / len(lengths) for lengths in sets if lengths]
    return max(LEAST_DROPPED, math.ceil(100 * max(shares)) / 100)


def holdout_fraction(num_prompts: int, usual: float, least: int) -> float:
    """The usual share, or what makes ``least`` prompts, but never more than a quarter."""
    return max(usual, min(0.25, math.ceil(100 * least / num_prompts) / 100))


def batch_size(num_rows: int, most: int) -> int:
    """The largest power of two, at most ``most``, that makes twenty steps an epoch; at least 4 where there are rows."""
    wanted = max(min(4, num_rows), min(most, num_rows // STEPS_AN_EPOCH))
    return 1 << (wanted.bit_length() - 1)


def micro_batch_size(tokens_a_row: int, budget: int, batch: int) -> int:
    """The largest power of two whose rows have at most ``budget`` tokens together."""
    return min(batch, 1 << (max(1, budget // tokens_a_row).bit_length() - 1), 16)


def epochs(num_rows: int, batch: int, least_steps: int, most: int) -> int:
    """As few as make ``least_steps`` optimizer steps, at most ``most``."""
    return max(1, min(most, math.ceil(least_steps * batch / num_rows)))


def least_end_rate(model: ModelFacts, as_it_is: bool = False) -> tuple[float, str]:
    """The share of sampled answers that must end by themselves, and why."""
    if model.is_initialised:
        return 0.2, "the base was never pretrained and learns little in so few steps; 0.9 for any other"
    if as_it_is:
        return 0.5, "the model's own answers may be longer than these; PPO shortens those that are cut off"
    return 0.9, "fewer sampled answers that end by themselves is an error: PPO learns nothing from answers without end"


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
