"""The sentiment study of a small real model on one GPU of 24 GB, and a block to paste into an issue or a pull request.

    python scripts/reproduce_gpu.py [--out runs/reproduce-gpu] [--seeds 0-2] [--block]

Runs ``scripts/studies/sentiment.py`` on Qwen2.5-0.5B-Instruct at a pinned revision (a gigabyte, downloaded once), in
bfloat16, and prints what it found beside the machine, the versions and the commit: a table, and one line of JSON.
Resumable: what is finished is left alone. ``--block`` prints the block of what is there and runs nothing.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import machine
import torch

from rlhf.runs import storage

STUDY = Path(__file__).parent / "studies" / "sentiment.py"
MODEL, REVISION = "Qwen/Qwen2.5-0.5B-Instruct", "7ae557604adf67be50417f59c2c2f167def9a775"
DTYPE, MACHINE, REPORT = "bfloat16", "machine.json", "report.json"


def download() -> str:
    """The directory of the pinned model in the cache of the hub.

    Raises:
        SystemExit: where it is not there and the hub does not answer.
    """
    from huggingface_hub import snapshot_download

    try:
        return str(snapshot_download(MODEL, revision=REVISION, allow_patterns=["*.json", "*.safetensors", "*.txt"]))
    except Exception as error:
        raise SystemExit(f"{MODEL} at {REVISION}: {error}") from None


def run(out: Path, seeds: str) -> None:
    """The study, in a process of its own, and a note of the machine that it ran on.

    Raises:
        SystemExit: without a GPU, and with the exit code of a study that failed.
    """
    if not torch.cuda.is_available():
        raise SystemExit("No CUDA device here. scripts/studies/sentiment.py runs on a CPU, with a model of 135 M.")
    arguments = ["--model", download(), "--dtypes", DTYPE, "--seeds", seeds, "--out", str(out)]
    out.mkdir(parents=True, exist_ok=True)
    storage.write_json(out / MACHINE, machine.described())
    done = subprocess.run([sys.executable, str(STUDY), *arguments], check=False)
    if done.returncode:
        raise SystemExit(done.returncode)


def interval(found: Mapping[str, float]) -> str:
    return f"{found['estimate']:+.2f} [{found['low']:+.2f}, {found['high']:+.2f}]"


def number(value: float | None, digits: int = 2) -> str:
    return "-" if value is None else f"{value:,.{digits}f}"


def block(where: Mapping[str, Any], report: Mapping[str, Any]) -> Iterator[str]:
    """Lines to paste: the machine, the policies and the costs as tables, and all of it as one line of JSON."""
    found, versions = report[DTYPE], ", ".join(f"{name} {version}" for name, version in where["versions"].items())
    memory = f", {where['memory_gib']} GiB" if where["memory_gib"] else ""
    yield f"**{MODEL}** at `{REVISION[:12]}`, {DTYPE}, seeds {', '.join(found['seeds'])}"
    yield f"{where['device']}{memory}, CUDA {where['cuda']}; commit {where['commit']}"
    yield f"Python {where['python']}, {versions}"
    yield ""
    yield from ("| policy | gold, 95 % | over SFT | KL, nats | ended |", "|---|---|---|---|---|")
    for name, row in found["policies"].items():
        figures = interval(row["gold"]), interval(row["over_sft"]), number(row["kl"]), number(row["ended"])
        yield f"| {name} | {' | '.join(figures)} |"
    yield ""
    yield from ("| stage | seconds | seconds a step | predicted | peak, MB | planned |", "|---|---|---|---|---|---|")
    for row in found["costs"]:
        times = number(row["seconds"], 0), number(row["step_s"]), number(row["planned_step_s"])
        yield f"| {row['stage']} | {' | '.join(times)} | {number(row['peak_mb'], 0)} | {number(row['planned_mb'], 0)} |"
    yield ""
    yield json.dumps({"model": MODEL, "revision": REVISION, "machine": where, DTYPE: found})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/reproduce-gpu"))
    parser.add_argument("--seeds", default="0-2", help="first-last, or one number")
    parser.add_argument("--block", action="store_true", help="the block of what is there, and nothing else")
    arguments = parser.parse_args()
    if not arguments.block:
        run(arguments.out, arguments.seeds)
    texts = [arguments.out / name for name in (MACHINE, REPORT)]
    if missing := [str(path) for path in texts if not path.is_file()]:
        raise SystemExit(f"not there yet: {', '.join(missing)}")
    print("\n".join(block(*(json.loads(path.read_text("utf-8")) for path in texts))))


if __name__ == "__main__":
    main()
