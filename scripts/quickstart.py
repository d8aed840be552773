"""SFT -> reward model -> its examination -> PPO on the embedded world, then the truth about it: gold.

    python scripts/quickstart.py [--seed 0] [--out runs/quickstart]

Each stage runs in its own process with the shipped config; what is finished and unchanged is not run again. A reward
model that fails its examination stops the chain before PPO (exit 7). The end is three tickets answered before and
after, a table (base, SFT, SFT at its best temperature, PPO; per axis; 95 % intervals over prompts), the examination's
verdicts, plots and summary.json. Gold is measured on prompts that no stage trained on or chose by.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import resource
import shlex
import shutil
import sys
import textwrap
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rlhf import errors
from rlhf.commands import pipeline
from rlhf.errors import RlhfError
from rlhf.evaluation import exam_tables
from rlhf.runs import artifacts, interrupts, progress, storage

STAGES = {
    "sft": "the base learns from demonstrations", "train-rm": "a reward model learns from rankings",
    "eval-rm": "the reward model is examined", "ppo": "the policy learns from the reward model",
}  # fmt: skip
NUM_TICKETS, ANSWER_LENGTH = 3, 300
log = logging.getLogger("rlhf")


@contextmanager
def stopwatch(seconds: dict[str, float], name: str) -> Iterator[None]:
    """Adds the block's wall-clock seconds to ``seconds[name]``."""
    started = time.perf_counter()
    yield
    seconds[name] = seconds.get(name, 0.0) + time.perf_counter() - started


def run_stage(stage: str, out: Path, seed: int, *overrides: str) -> None:
    """One shipped config, moved to ``out`` and to this seed; data of the seed, splits as ever."""
    data = f"&seed={seed}" if stage == "eval-rm" else f"?seed={seed}"
    moved = {
        "sft": [f"data.path=demo:demonstrations{data}"],
        "train-rm": [f"policy={out}/sft", f"data.path=demo:preferences{data}"],
        "eval-rm": [f"reward={out}/train-rm", f"data.path=demo:preferences?split=test&size=300{data}"],
        "ppo": [
            f"policy={out}/sft",
            f"prompts.path=demo:prompts{data}",
            f"rewards.0.run={out}/train-rm",
            f"rewards.0.examination={out}/eval-rm",
        ],
    }[stage]
    moved = [f"run_dir={out}/{stage}", f"seed={seed}", *moved]
    pipeline.bring_up_to_date(stage, Path(f"configs/{stage}.yaml"), [*moved, *overrides])


def quickstart(out: Path, seed: int) -> None:
    """The chain, what came of it on the screen, and ``out/summary.json``."""
    seconds: dict[str, float] = {}
    out.mkdir(parents=True, exist_ok=True)
    for number, (stage, does) in enumerate(STAGES.items(), 1):
        log.info("Stage %d of %d, %s: %s.", number, len(STAGES), stage, does)
        with stopwatch(seconds, "eval" if stage == "eval-rm" else stage):
            run_stage(stage, out, seed)
    log.info("All stages are done. Now the truth about them, on held-out tickets:")
    os.environ |= progress.stage_environment()
    with stopwatch(seconds, "eval"):
        gold = progress.load("quickstart_gold")
        outcome = gold.measure_chain(out, seed)
    with progress.waiting("Drawing the plots"):
        gold.draw(outcome, out)
    usages = [resource.getrusage(who).ru_maxrss / 1024 for who in (resource.RUSAGE_CHILDREN, resource.RUSAGE_SELF)]
    measured = {"seconds": {**seconds, "total": sum(seconds.values())}, "peak_rss_mb": max(usages), "seed": seed}
    summary = {**outcome.summary, **measured}
    storage.write_json(out / "summary.json", summary)
    show_tickets(outcome.tickets[:NUM_TICKETS])
    show_table(outcome.intervals, summary["gold"]["num_prompts"])
    show_verdicts(out / "eval-rm")
    show_rest(summary, out)


def show_tickets(tickets: Sequence[Any]) -> None:
    """What customers wrote, and what they are answered before and after PPO."""
    rows = []
    for ticket in tickets:
        rows.append(("ticket", "", ticket.prompt))
        for name, (answer, value) in ticket.answers.items():
            rows.append((f"  {name}", f"{value:.2f}", textwrap.shorten(answer, ANSWER_LENGTH, placeholder=" ...")))
    progress.console.print(f"\nThe first {len(tickets)} held-out tickets, answered by SFT and by PPO, with their gold:")
    progress.show(progress.grid(rows))


def show_table(policies: dict[str, Any], num_prompts: int) -> None:
    """Gold and its axes of every policy."""
    rows = [
        (name, *(f"{one.estimate:.2f} \u00b1{(one.high - one.low) / 2:.2f}" for one in row.values()))
        for name, row in policies.items()
    ]
    axes = next(iter(policies.values()))
    progress.console.print(f"\nGold on {num_prompts} held-out tickets, with 95 % intervals over tickets:")
    progress.show(progress.table("", ("", *axes), rows))


def show_verdicts(run: Path) -> None:
    """One line each; the figures behind them are in a file."""
    report = json.loads((run / artifacts.EXAMINATION).read_text("utf-8"))
    progress.console.print(
        f"\nExamination of the reward model: {report['verdict']}. All figures: {run / artifacts.FIGURES}"
    )
    progress.show(exam_tables.verdict_lines(report["verdicts"]))


def show_rest(summary: dict[str, Any], out: Path) -> None:
    """The gain in one line, the files, and what to do next."""
    figures, rlhf = summary["gold"], command()
    over = figures["gain_over_best_temperature"]["gain"]
    ppo, reward = (shlex.quote(f"{out}/{stage}") for stage in ("ppo", "train-rm"))
    progress.console.print(
        f"\nPPO over SFT: {figures['gain']:+.2f} [{figures['ci95'][0]:+.2f}, {figures['ci95'][1]:+.2f}] gold, "
        f"{over:+.2f} over SFT at its best temperature, {summary['kl']:.1f} nats away from it. "
        f"{summary['seconds']['total']:.0f} s, {summary['peak_rss_mb']:.0f} MB.\n"
        f"Files: {out}/summary.json, {out}/plots/, {out}/samples.jsonl\n\n"
        "Next: talk to it, see what it was made from, and begin with your own (a file in place of demo:preferences,\n"
        "a model directory or hub id in place of demo:base):\n"
        f"  {rlhf} chat {ppo} --reward {reward}\n"
        f"  {rlhf} show {ppo}\n"
        f"  {rlhf} init mine --data demo:preferences --model demo:base",
        markup=False,
    )


def command() -> str:
    """How this rlhf is called from here: by its name, by the path of its script, or as a module."""
    script = Path(sys.executable).with_name("rlhf")
    if (found := shutil.which("rlhf")) and Path(found).samefile(script):
        return "rlhf"
    if not script.is_file():
        return shlex.join([sys.executable, "-m", "rlhf"])
    here = Path.cwd()
    return shlex.quote(str(script.relative_to(here) if script.is_relative_to(here) else script))


def main(function: Callable[..., None], *arguments: Any) -> None:
    """Log to the screen; a stage that failed, a mistake and a signal are exit codes without a traceback."""
    progress.log_to_console()
    interrupts.install()
    try:
        function(*arguments)
    except RlhfError as error:
        log.error(errors.render(error.problems))
        sys.exit(error.exit_code)
    except interrupts.Interrupted as stop:
        log.error("Interrupted by %s: the same command goes on from here.", stop)
        sys.exit(stop.exit_code)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/quickstart"))
    chosen = parser.parse_args()
    main(quickstart, chosen.out, chosen.seed)
