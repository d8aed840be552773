"""Several sources as one data set: how many rows each gives, which ones, and what they have in common."""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

from rlhf.config.sections import MixtureSource
from rlhf.errors import Problem, RlhfError
from rlhf.records import Record, count_shared_prompts, prompt_key


@dataclass(frozen=True)
class Drawn:
    """What one source gives: ``num_drawn`` rows out of ``num_records``; ``share`` is None where all are taken once."""

    path: str
    num_records: int
    num_drawn: int
    share: float | None

    def sentence(self) -> str:
        """Up- and down-sampling in words."""
        if self.share is None:
            return f"{self.path}: {self.num_drawn} rows, each once"
        passes, more = divmod(self.num_drawn, self.num_records)
        if not passes:
            how = f"{self.num_records - more} left out"
        elif not more:
            how = "each once" if passes == 1 else f"each {passes} times"
        else:
            how = f"{more} of them {passes + 1} times, the others {'once' if passes == 1 else f'{passes} times'}"
        return f"{self.path}: {self.num_drawn} rows drawn from {self.num_records} (share {self.share:.3f}), {how}"


def draw(
    records: Sequence[Sequence[Record]], sources: Sequence[MixtureSource], total: int | None, seed: int
) -> tuple[list[Record], list[Drawn]]:
    """The rows of a mixture, source after source in the order of their rows, and what each source gave.

    Without weights every row is taken once. With weights a source gives the share weight / sum of weights of
    ``total`` rows (as many as there are, if None): too many rows are thinned out, too few are repeated in whole passes
    and a part of one. Which ones depends on the seed and each prompt's text, not on the order of the rows.

    Raises:
        RlhfError: DAT031 where a source would give no row.
    """
    sizes = [len(part) for part in records]
    weights = [source.weight for source in sources if source.weight]
    wanted = quotas(weights, total or sum(sizes)) if weights else sizes
    mixed: list[Record] = []
    drawn: list[Drawn] = []
    problems: list[Problem] = []
    for index, (part, source, count) in enumerate(zip(records, sources, wanted, strict=True)):
        share = weights[index] / math.fsum(weights) if weights else None
        drawn.append(Drawn(source.path, len(part), count, share))
        mixed += take(part, count, seed)
        if not count:
            what = f"a share of {share:.2g} in {total or sum(sizes)} rows is no row at all."
            problems.append(Problem("DAT031", source.path, what, "a larger weight, more rows, or leave it out"))
    if problems:
        raise RlhfError(*problems)
    return mixed, drawn


def quotas(weights: Sequence[float], total: int) -> list[int]:
    """Whole numbers in proportion to ``weights`` that add up to ``total``, by the method of largest remainders."""
    exact = [weight / math.fsum(weights) * total for weight in weights]
    counts = [math.floor(number) for number in exact]
    by_rest = sorted(range(len(exact)), key=lambda index: (counts[index] - exact[index], index))
    for index in by_rest[: total - sum(counts)]:
        counts[index] += 1
    return counts


def take(records: Sequence[Record], count: int, seed: int) -> list[Record]:
    """``count`` of the records in their order, each as often as the others or once more.

    A larger count takes the same ones and more.
    """
    passes, more = divmod(count, len(records))
    seen: Counter[str] = Counter()
    ranks = []
    for record in records:
        key = prompt_key(record.prompt)
        ranks.append(hashlib.sha256(f"{seed}/{seen[key]}/{key}".encode()).digest())
        seen[key] += 1
    extra = sorted(sorted(range(len(records)), key=ranks.__getitem__)[:more])
    taken: list[Record] = list(records) * passes
    return taken + [records[index] for index in extra]


def shared_prompts(sources: Sequence[tuple[str, Sequence[Record]]]) -> list[str]:
    """For each two sources with prompts in common, how many."""
    return [
        f"{count} prompts are in both {first} and {second}"
        for (first, ours), (second, theirs) in combinations(sources, 2)
        if (count := count_shared_prompts(ours, theirs))
    ]
