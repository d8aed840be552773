"""What an ensemble of reward models costs over a single one: peak memory of training, and CPU seconds of scoring.

    python scripts/benchmark_ensemble.py [--size 118M] [--members 5] [--rounds 5] [--only memory] [--json FILE]

Memory: one after the other, members are trained for two optimizer steps on one base of random weights beside the SFT
adapter, as ``train-rm`` does it: every adapter and head stands, the moments of one member at a time. What is counted is
what torch allocates (see ``measuring.py``), weights included. Batches are those of ``benchmark_memory.py``; matrix
products give zeros, which changes no allocation. Scoring: ``--rows`` prompts and responses of 64 tokens each, by one
member and by all in turn, with one thread and real products; ``ratio`` is the median
of those of neighbours. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from benchmark_memory import SIZES
from measuring import SHORT, Case, Peak, WithoutProducts, random_base, token_rows

from rlhf.config.sections import LoraSection
from rlhf.data.batches import PassSize, collate
from rlhf.models import adapters, forward
from rlhf.models.base import Base
from rlhf.models.heads import ScalarHead
from rlhf.models.roles import SharedBase
from rlhf.records import Message
from rlhf.scoring.ensemble import EnsembleScorer
from rlhf.scoring.scorer import Sample
from rlhf.scoring.shared import SharedScorer
from rlhf.training.optimizer import Optimizer

LENGTH = 64


def opened(case: Case) -> Base:
    return random_base(case.config, case.dtype, torch.device("cuda" if torch.cuda.is_available() else "cpu"))


def ensemble(base: Base, members: int) -> tuple[SharedBase, list[str]]:
    """The SFT adapter and each member's adapter and head, as train-rm has them."""
    roles = SharedBase(base)
    lora = adapters.fresh_lora(LoraSection(), base.model, base.tokenizer)
    roles.add("policy", adapter=lora)
    slots = [f"reward/{index}" for index in range(members)]
    for slot in slots:
        roles.add(slot, adapter=lora, head=ScalarHead(base.hidden_size), trained=True)
    return roles, slots


def training_peak(case: Case, members: int) -> int:
    """Bytes at the worst moment of training all members, one after the other."""
    with Peak() as peak:
        base = opened(case)
        roles, slots = ensemble(base, members)
        optimizers = [Optimizer(roles.trained_parameters(slot), 1e-5, 9) for slot in slots]
        short, whole = (
            collate(*token_rows(*size, case.shape[-1], case.micro), 0, base.device)
            for size in ((SHORT, SHORT), (case.prompt, case.response))
        )
        for slot, optimizer in zip(slots, optimizers, strict=True):
            for batches in ((short,), (short, whole)):
                for sequences in batches:
                    with roles.acting_as(slot) as (model, head):
                        forward.end_scores(model, head, sequences).sum().backward()
                optimizer.step("")
            optimizer.release()
    return peak.high


def scoring_seconds(case: Case, members: int, rows: int, rounds: int) -> dict[str, list[float]]:
    """CPU seconds for ``rows`` responses, by one member and by all, in turn."""
    base = opened(case)
    roles, slots = ensemble(base, members)
    each = [SharedScorer(roles, slot, PassSize(rows)) for slot in slots]
    scorers = {"single": each[0], "ensemble": EnsembleScorer(each)}
    prompts, responses = token_rows(LENGTH, LENGTH, case.shape[-1], rows)
    samples = [
        Sample((Message("user", ""),), "", prompt, response, True, response)
        for prompt, response in zip(prompts, responses, strict=True)
    ]
    seconds: dict[str, list[float]] = {name: [] for name in scorers}
    for index in range(rounds + 1):
        for name, scorer in scorers.items():
            started = time.process_time()
            scorer.score(samples)
            if index:
                seconds[name].append(time.process_time() - started)
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=list(SIZES), default="118M")
    parser.add_argument("--members", type=int, default=5)
    parser.add_argument("--rows", type=int, default=8, help="responses that are scored")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", choices=["memory", "scoring"], help="one of the two")
    parser.add_argument("--json", type=Path, help="write the last line there too")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    case = SIZES[chosen.size]
    found: dict[str, Any] = {"size": chosen.size, "members": chosen.members}
    if chosen.only != "scoring":
        with WithoutProducts():
            peaks = {"single": training_peak(case, 1), "ensemble": training_peak(case, chosen.members)}
        found |= {"peaks": peaks, "memory_ratio": peaks["ensemble"] / peaks["single"]}
        print(", ".join(f"{name} {peak / 2**20:.0f} MB" for name, peak in peaks.items()), flush=True)
    if chosen.only != "memory":
        seconds = scoring_seconds(case, chosen.members, chosen.rows, chosen.rounds)
        medians = {name: statistics.median(own) for name, own in seconds.items()}
        found |= {
            "seconds": seconds,
            "ratio": statistics.median(whole / one for one, whole in zip(*seconds.values(), strict=True)),
        }
        print(", ".join(f"{name} {own:.2f} CPU s" for name, own in medians.items()))
    if chosen.json:
        chosen.json.write_text(json.dumps(found), "utf-8")
    print(json.dumps(found))


if __name__ == "__main__":
    main()
