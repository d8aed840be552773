"""The quickstart over many seeds, beside what its result can be compared with.

    python scripts/quickstart_seeds.py [--seeds 0-9] [--out runs/seeds] [--processes 2]

For each seed, on the same held-out prompts: the chain; PPO on gold itself (the ceiling); the best of n SFT answers by
the reward model; SFT on best-of-n answers to training prompts. All chains come first, then the comparisons. Resumable:
what has its summary.json or comparison.json is not run again. Ends with one table, and OUT/seeds.json.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy
import quickstart as q
import torch
from quickstart_gold import NUM_PROMPTS, judge, open_roles, sample, test_prompts

from rlhf.config.sections import DataSection
from rlhf.data import sources, tokenised
from rlhf.data.batches import PassSize
from rlhf.data.fitting import Limit
from rlhf.models.roles import SharedBase
from rlhf.runs import artifacts, progress, run_directory, runtime, storage
from rlhf.scoring.shared import SharedScorer

BEST_OF, BEST_OF_PROMPTS = 4, 600
SUMMARY, COMPARISON = "summary.json", "comparison.json"


def compare(out: Path, seed: int) -> None:
    """What the chain of one seed can be compared with; writes ``out/comparison.json``."""
    found: dict[str, float] = {}
    q.run_stage(
        "ppo",
        out,
        seed,
        f"run_dir={out}/ppo-gold",
        'rewards=[{function: "rlhf.demo.gold:reward"}]',
        "evaluation.every=100",
    )
    base, roles = open_roles(out)
    prompts = test_prompts(base, NUM_PROMPTS, seed)
    found["best_of_n"] = judge(best_of(roles, base, prompts, seed)).mean()
    roles.add("ceiling", adapter=out / "ppo-gold" / artifacts.ADAPTER)
    found["ppo_on_gold"] = judge(sample(roles, "ceiling", base, prompts, 1.0, seed)).mean()

    path = f"demo:prompts?size={BEST_OF_PROMPTS}&seed={seed + 5000}"
    loaded = sources.load_prompts(DataSection(path=path))
    train = tokenised.prompt_rows(loaded.records, base.chat, Limit(base.context_length), loaded.dropped)[0]
    answers = best_of(roles, base, train, seed)
    rows = [{"prompt": s.prompt[-1].content, "completion": s.response} for s in answers if s.finished and s.response]
    storage.write_text(out / "best_of_n.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    q.run_stage("sft", out, seed, f"run_dir={out}/sft-best", f"data.path={out}/best_of_n.jsonl", "epochs=2")
    roles.add("rejection", adapter=out / "sft-best" / artifacts.ADAPTER)
    found["sft_on_best_of_n"] = judge(sample(roles, "rejection", base, prompts, 1.0, seed)).mean()
    storage.write_json(out / COMPARISON, found)


def best_of(roles: SharedBase, base: Any, prompts: Any, seed: int) -> list[Any]:
    """Of ``BEST_OF`` SFT answers to each prompt, the one that the reward model scores highest."""
    repeated = [prompt for prompt in prompts for _ in range(BEST_OF)]
    samples = sample(roles, "sft", base, repeated, 1.0, runtime.derived_seed(seed, "best of n"))
    scores = SharedScorer(roles, "reward", PassSize(32)).score(samples).mean
    scores = scores.masked_fill(~torch.tensor([sample.finished for sample in samples]), -1e9)
    chosen = scores.view(-1, BEST_OF).argmax(1).tolist()
    return [samples[index * BEST_OF + best] for index, best in enumerate(chosen)]


def run_all(seeds: list[int], out: Path, processes: int) -> None:
    """Each seed's chain, then each seed's comparisons, in processes of one thread, ``processes`` at a time."""
    halves = [(seed, name) for name in (SUMMARY, COMPARISON) for seed in seeds]
    waiting = [(seed, name) for seed, name in halves if not (out / str(seed) / name).is_file()]
    running: dict[tuple[int, str], subprocess.Popen[bytes]] = {}
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    while waiting or running:
        while waiting and len(running) < processes:
            seed, name = waiting.pop(0)
            (out / str(seed)).mkdir(parents=True, exist_ok=True)
            log = (out / str(seed) / "log.txt").open("ab")
            command = [sys.executable, __file__, "--one", str(seed), "--half", name, "--out", str(out)]
            running[seed, name] = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
        finished = [key for key, process in running.items() if process.poll() is not None]
        for seed, name in finished:
            code = running.pop((seed, name)).returncode
            outcome = "done" if code == 0 else f"failed with exit code {code}, see {out}/{seed}/log.txt"
            progress.console.print(f"seed {seed}, {name}: {outcome}")
        time.sleep(1)


def report(seeds: list[int], out: Path) -> None:
    """The table of all finished seeds, and ``out/seeds.json``."""
    found = {s: json.loads(p.read_text()) for s in seeds if (p := out / str(s) / SUMMARY).is_file()}
    if not found:
        raise SystemExit("no seed has finished")
    columns: dict[str, list[float]] = {}
    for seed, summary in found.items():
        path = out / str(seed) / COMPARISON
        beside = json.loads(path.read_text()) if path.is_file() else {}
        best, rejection, ceiling = (
            beside.get(name, float("nan")) for name in ("best_of_n", "sft_on_best_of_n", "ppo_on_gold")
        )
        gold, axes = summary["gold"], summary["axes"]
        row = {
            "SFT": gold["sft"],
            "SFT best T": gold["sft_best_temperature"]["gold"],
            "PPO": gold["ppo"],
            "gain": gold["gain"],
            "over best T": gold["gain_over_best_temperature"]["gain"],
            "helpful": axes["helpful"]["ppo"] - axes["helpful"]["sft"],
            "best of 4": best,
            "SFT on best of 4": rejection,
            "PPO on gold": ceiling,
            "headroom used": gold["gain"] / (ceiling - gold["sft"]),
            "KL": summary["kl"],
            "RM accuracy": summary["reward_model"]["accuracy"],
            "seconds": summary["seconds"]["total"],
        }
        for name, value in row.items():
            columns.setdefault(name, []).append(value)
    digits = {"seconds": 0}
    rows = [
        (str(seed), *(f"{values[index]:.{digits.get(name, 2)}f}" for name, values in columns.items()))
        for index, seed in enumerate(found)
    ]
    for label, function in (("mean", numpy.nanmean), ("least", numpy.nanmin), ("most", numpy.nanmax)):
        rows.append((label, *(f"{function(values):.{digits.get(name, 2)}f}" for name, values in columns.items())))
    progress.show(progress.table("Gold over seeds", ("seed", *columns), rows))
    kinds = next(iter(found.values()))["reward_model"]["minimal_pairs"]
    pairs = {kind: [s["reward_model"]["minimal_pairs"][kind] for s in found.values()] for kind in kinds}
    shown = [(kind, f"{numpy.mean(v):.2f}", f"{min(v):.2f}", f"{max(v):.2f}") for kind, v in pairs.items()]
    title = "Reward model on minimal pairs"
    progress.show(progress.table(title, ("one thing differs", "mean", "least", "most"), shown))
    plain = {name: [run_directory.plain(value) for value in values] for name, values in columns.items()}
    storage.write_json(out / "seeds.json", {"seeds": list(found), "columns": plain, "minimal_pairs": pairs})


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", default="0-9", help="first-last, or one number")
    parser.add_argument("--out", type=Path, default=Path("runs/seeds"))
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--half", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one is not None:
        q.main(q.quickstart if args.half == SUMMARY else compare, args.out / str(args.one), args.one)
    else:
        progress.log_to_console()
        first, _, last = args.seeds.partition("-")
        chosen = list(range(int(first), int(last or first) + 1))
        run_all(chosen, args.out, args.processes)
        report(chosen, args.out)
