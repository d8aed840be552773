"""How near to gold the consensus of the embedded world's annotators is, by majority and by Dawid and Skene.

    python scripts/consensus_gold.py --annotators 5 --careless 0.8 --careless-annotators 2 --seeds 10

Right: share of the pairs with a gold difference that a consensus orders as gold does (a tie is half). NLL: of the gold
order under the consensus as a probability, in nats; the majority's is of the votes' shares, (wins + 1) / (votes + 2).
"""

from __future__ import annotations

import argparse
import math
from collections import defaultdict
from collections.abc import Iterator, Sequence

import numpy

from rlhf.config.sections import DataSection
from rlhf.data import agreement, consensus, sources
from rlhf.demo.gold import judge
from rlhf.records import Comparison, Judgement, plain_text


def of_seed(options: str, seed: int, size: int) -> dict[str, tuple[float, float]]:
    """name -> (share right, NLL) on one seed's training rows."""
    data = DataSection(path=f"demo:preferences?size={size}&seed={seed}&{options}")
    rows = sources.load_comparisons(data).records
    truth, votes = _truth(rows), consensus.votes_of(rows)
    chances, _ = agreement.dawid_skene(votes)
    sums: dict[int, list[float]] = defaultdict(list)
    for (item, _), value in votes.items():
        sums[item].append(value)
    shares = {item: (sum(values) + 1) / (len(values) + 2) for item, values in sums.items()}
    simple = agreement.majority(votes)
    return {
        "majority": (_right(simple, truth), _nll(shares, truth)),
        "dawid_skene": (_right({item: agreement.side(p) for item, p in chances.items()}, truth), _nll(chances, truth)),
    }


def _truth(rows: Sequence[Comparison]) -> dict[int, float]:
    """item -> 1 or 0, by gold; none where gold has no difference."""
    judged = [Comparison(row.prompt, row.responses, tuple(_by_gold(row)), row.where) for row in rows]
    votes = consensus.votes_of(judged)
    return {item: value for (item, _), value in votes.items() if value != 0.5}


def _by_gold(row: Comparison) -> Iterator[Judgement]:
    """The same pairs, judged by gold."""
    gold = [judge(plain_text(row.prompt), text)["gold"] for text in row.responses]
    for one in row.judgements:
        ahead = 0.5 + 0.5 * float(numpy.sign(round(gold[one.first] - gold[one.second], 9)))
        yield Judgement(one.first, one.second, ahead, annotator="gold")


def _right(sides: dict[int, float], truth: dict[int, float]) -> float:
    return float(numpy.mean([1 - abs(sides[item] - true) for item, true in truth.items()]))


def _nll(chances: dict[int, float], truth: dict[int, float]) -> float:
    own = [chances[item] if true else 1 - chances[item] for item, true in truth.items()]
    return float(-numpy.mean([math.log(max(p, 1e-9)) for p in own]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--annotators", type=int, default=5)
    parser.add_argument("--careless", type=float, default=0.8)
    parser.add_argument("--careless-annotators", type=int, default=2)
    parser.add_argument("--size", type=int, default=300)
    parser.add_argument("--seeds", type=int, default=10)
    chosen = parser.parse_args()
    options = f"annotators={chosen.annotators}&careless={chosen.careless}"
    options += f"&careless_annotators={chosen.careless_annotators}" if chosen.careless else ""
    found = [of_seed(options, seed, chosen.size) for seed in range(chosen.seeds)]
    print(f"{options}, {chosen.size} prompts, {chosen.seeds} seeds: mean (least to most)")
    for name in ("majority", "dawid_skene"):
        for place, figure in enumerate(("right", "NLL")):
            values = [one[name][place] for one in found]
            print(f"{name:12} {figure:5} {numpy.mean(values):.3f} ({min(values):.3f} to {max(values):.3f})")
    better = sum(one["dawid_skene"][0] > one["majority"][0] for one in found)
    print(f"dawid_skene right more often in {better} of {len(found)} seeds")


if __name__ == "__main__":
    main()
