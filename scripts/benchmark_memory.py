"""Peak memory of PPO's four roles on one base, on four models, and of LoRA SFT alone, at equal micro-batch tokens.

    python scripts/benchmark_memory.py [--sizes 118M 300M] [--checkpointing] [--json FILE]
    python scripts/benchmark_memory.py --rollout

SFT is measured twice: by TRL's trainer as the stage uses it, whose output head on a device without Triton holds eight
copies of a tile of logits, and with this project's own head, as ``sft_lean``. Each case is a process of its own, twice:
once for what torch allocates, once for how far the resident set grows beyond what stood before the base was made.
``--rollout`` is how far a rollout alone does: 32 prompts of 32 tokens, 128 sampled tokens each, a vocabulary of 32,768
on a model of 64 wide. The last line printed is JSON.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import dataclasses
import gc
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from measure_memory import sft_peak
from measuring import ROLES, SHORT, Case, Peak, Ppo, WithoutProducts, four_roles, peak_of_update, ppo_peaks, random_base

from rlhf.config.sections import LoraSection
from rlhf.models import adapters
from rlhf.models.base import Base
from rlhf.models.roles import SharedBase
from rlhf.runs import runtime

TOKENS = {"micro": 16, "rows": 16, "prompt": 128, "response": 128}
SIZES = {
    "28M": Case("28M", (512, 6, 8, 8, 1408, 16384), micro=2, rows=2, prompt=64, response=64),
    "118M": Case("118M", (768, 12, 12, 12, 2352, 32000), **TOKENS),
    "300M": Case("300M", (1024, 20, 16, 16, 3072, 32000), **{**TOKENS, "micro": 4}),
}
KINDS = ("shared", "separate", "sft", "sft_lean")


def bases(case: Case, count: int) -> list[Base]:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return [random_base(case.config, case.dtype, device) for _ in range(count)]


def allocated(kind: str, case: Case) -> dict[str, int]:
    """Phase -> bytes at its worst moment, weights included."""
    with Peak() as made:
        found = bases(case, len(ROLES) if kind == "separate" else 1)
        roles = four_roles(found) if kind in ("shared", "separate") else None
    if roles:
        return ppo_peaks(Ppo(roles, found[0].chat, case), made.left)
    if kind == "sft":
        return {"training": made.left + sft_peak(case, found[0])}
    return {"training": made.left + _lean(case, found[0], measured=True)}


def resident(kind: str, case: Case) -> dict[str, int]:
    """Bytes by which the resident set grew, the pages of libraries that are first used here included."""
    before = runtime.peak_rss_mb()
    found = bases(case, len(ROLES) if kind == "separate" else 1)
    if kind in ("shared", "separate"):
        ppo = Ppo(four_roles(found), found[0].chat, case)
        short, sequences = ppo.sequences(SHORT, SHORT), ppo.sequences(case.prompt, case.response)
        ppo.rollout()
        ppo.rescoring(sequences)
        ppo.scoring(sequences)
        for name in ("policy", "value"):
            _two_steps(ppo, name, short, sequences)
    elif kind == "sft":
        sft_peak(case, found[0])
    else:
        _lean(case, found[0], measured=False)
    return {"process": round((runtime.peak_rss_mb() - before) * (1 << 20))}


def _lean(case: Case, base: Base, measured: bool) -> int:
    """One adapter, and the loss that SFT has by our own head; bytes above the base where it is measured."""
    with Peak() as made:
        roles = SharedBase(base)
        lora = adapters.fresh_lora(LoraSection(), base.model, base.tokenizer)
        roles.add("policy", adapter=lora, trained=True)
    ppo = Ppo(roles, base.chat, case, trained=("policy",))
    short, sequences = ppo.sequences(SHORT, SHORT), ppo.sequences(1, case.prompt + case.response - 1)
    if measured:
        return made.left + ppo.moments + peak_of_update(ppo.optimizers["policy"], ppo.policy, short, sequences)
    _two_steps(ppo, "policy", short, sequences)
    return 0


def _two_steps(ppo: Ppo, name: str, short: Any, sequences: Any) -> None:
    work: Callable[[Any], None] = getattr(ppo, name)
    for batches in ((short,), (short, sequences)):
        for batch in batches:
            work(batch)
        ppo.optimizers[name].step("")


def rollout() -> dict[str, float]:
    """MB by which a second rollout raises the resident set above what stood before it (Linux)."""
    case = Case("rollout", (64, 2, 4, 2, 128, 32768), rows=32, prompt=32, response=128)
    found = bases(case, 1)
    ppo = Ppo(four_roles(found), found[0].chat, case)
    ppo.rollout()
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before, _ = _resident()
    ppo.rollout()
    return {"before_mb": before, "rollout_mb": _resident()[1] - before}


def _resident() -> tuple[float, float]:
    """Resident set of this process now and at its highest since it was last reset, in MB."""
    rows = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(rows["VmRSS"].split()[0]) / 1024, int(rows["VmHWM"].split()[0]) / 1024


def in_a_process(kind: str, case: Case, how: str, without: bool) -> dict[str, int]:
    one = json.dumps({"kind": kind, "how": how, "without_products": without, "case": dataclasses.asdict(case)})
    done = subprocess.run([sys.executable, __file__, "--one", one], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{case.name} {kind} {how} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])  # type: ignore[no-any-return]


def ratios(peaks: dict[str, int]) -> dict[str, float]:
    pairs = (("shared", "sft"), ("shared", "sft_lean"), ("separate", "shared"))
    return {f"{over}/{under}": round(peaks[over] / peaks[under], 3) for over, under in pairs}


def compare(case: Case, without: bool) -> dict[str, Any]:
    """All kinds of one size, both measures, printed as they come."""
    figures: dict[str, Any] = {
        "size": case.name,
        "parameters": _parameters(case),
        "checkpointing": case.checkpointing,
        "micro_batch_tokens": case.micro * (case.prompt + case.response),
        "without_products": without,
        "allocated": {},
        "resident": {},
    }
    print(f"{case.name}: {figures['parameters'] / 1e6:.0f} M, {figures['micro_batch_tokens']:,} tokens a micro-batch")
    for measure in ("allocated",) if torch.cuda.is_available() else ("allocated", "resident"):
        for kind in KINDS:
            found = figures[measure][kind] = in_a_process(kind, case, measure, without)
            shown = "  ".join(f"{name} {size / 2**20:,.0f} MB" for name, size in found.items())
            print(f"  {measure:9} {kind:9} {shown}", flush=True)
        peaks = {kind: max(phases.values()) for kind, phases in figures[measure].items()}
        figures[f"{measure}_ratios"] = ratios(peaks)
        print(f"  {measure}: " + ", ".join(f"{k} {v:.3f}" for k, v in figures[f"{measure}_ratios"].items()), flush=True)
    return figures


def _parameters(case: Case) -> int:
    from rlhf.planning.shape import of_config

    return of_config(case.config.to_dict(), "").parameters


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", nargs="*", choices=SIZES, default=["118M", "300M"])
    parser.add_argument("--checkpointing", action="store_true", help="with gradient checkpointing")
    parser.add_argument("--without-products", action="store_true", help="zeros for matrix products, see measuring.py")
    parser.add_argument("--json", type=Path, help="write every figure there")
    parser.add_argument("--rollout", action="store_true", help="the rollout's own memory, at a large vocabulary")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.rollout:
        print(json.dumps(rollout()))
        return
    if arguments.one:
        given = json.loads(arguments.one)
        case = Case(**{**given["case"], "shape": tuple(given["case"]["shape"])})
        measure = allocated if given["how"] == "allocated" else resident
        with WithoutProducts() if given["without_products"] else contextlib.nullcontext():
            print(json.dumps(measure(given["kind"], case)))
        return
    cases = [dataclasses.replace(SIZES[size], checkpointing=arguments.checkpointing) for size in arguments.sizes]
    found = [compare(case, arguments.without_products) for case in cases]
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=2), "utf-8")
    print(json.dumps(found))


if __name__ == "__main__":
    main()
