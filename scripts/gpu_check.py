"""What nobody can see without a GPU: its tests, and PPO steps at real sizes with their speed and memory.

    PYTHONPATH=. python scripts/gpu_check.py [--out DIR] [--minutes 8] [--tiny]

Models have the shapes and vocabularies of Qwen2.5-0.5B and 1.5B and of Llama-3.1-8B and random weights, made on the
device in bfloat16 (nf4 a layer at a time), so that nothing is downloaded. A case is one PPO step with four roles on one
base: rollout, rescoring, values and scores, policy update, and both critics: the value role's update, and two fits by
least squares. Beside each phase stand its tokens a second, its share of what the chip reaches in large products or
(rollout) in reading memory, and its peak beside the planner's. What the time or the memory does not allow is skipped,
with the reason. Before the cases come single claims (``gpu_claims.py``): sampler against trainer, float32 logits, equal
updates, packing without a mask, float32 with shared keys, a resumed run. It ends with one table and one line of JSON
to paste. Needs torch, transformers, peft, trl, pydantic and pytest. Exit code 1 where a check fails, 0 otherwise.
``--tiny`` is a trial on whatever device there is.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import json
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import machine
import torch
from gpu_claims import Claims
from measuring import SHORT, Case, Peak, Ppo, four_roles, random_base, token_rows
from torch.nn.functional import pad

from rlhf.config.sections import RuntimeSection
from rlhf.data.batches import Sequences, collate
from rlhf.losses import policy, tensors
from rlhf.models import forward, speed
from rlhf.planning import clock, phases
from rlhf.planning.clock import Speed
from rlhf.planning.shape import of_config
from rlhf.rollouts.engine import Sampling
from rlhf.rollouts.hf import HfEngine
from rlhf.runs import runtime
from rlhf.training.solved_critic import LeastSquares

ROOT = Path(__file__).parents[1]
QWEN_SMALL = (896, 24, 14, 2, 4864, 151936)
QWEN = (1536, 28, 12, 2, 8960, 151936)
LLAMA = (4096, 32, 32, 8, 14336, 128256)
LENGTHS = {"prompt": 512, "response": 512, "dtype": "bfloat16", "checkpointing": True}
CASES = (
    Case("Qwen2.5-0.5B", QWEN_SMALL, family="qwen2", rows=64, micro=8, **LENGTHS),
    Case("Llama-3.1-8B", LLAMA, tied=False, rows=16, micro=4, **LENGTHS),
    Case("Llama-3.1-8B", LLAMA, tied=False, rows=16, micro=4, quantize="nf4", **LENGTHS),
    Case("Qwen2.5-1.5B", QWEN, family="qwen2", rows=32, micro=8, **LENGTHS),
    Case("Qwen2.5-0.5B", QWEN_SMALL, family="qwen2", rows=32, micro=8, quantize="nf4", **LENGTHS),
    Case("Qwen2.5-1.5B", QWEN, family="qwen2", rows=32, micro=8, quantize="nf4", **LENGTHS),
)
TINY = (
    Case("tiny", (64, 2, 4, 2, 128, 1024), rows=4, micro=2, prompt=12, response=8, checkpointing=True),
    Case("tiny", (64, 2, 4, 2, 128, 1024), rows=4, micro=2, prompt=12, response=8, dtype="bfloat16", quantize="nf4"),
)
RATIO_TOLERANCE = 0.05  # of bfloat16 logprobs, in nats: the passes with and without gradient take other kernels
PEAK_TOLERANCE = 0.15  # of a plan; on a CPU the plans are within 0.1


@dataclass
class Report:
    """What is written: the machine, the tests, a row a phase, checks by name, and what was skipped."""

    machine: dict[str, Any]
    tests: dict[str, Any] = field(default_factory=dict)
    phases: list[dict[str, Any]] = field(default_factory=list)
    checks: list[dict[str, Any]] = field(default_factory=list)
    skipped: list[dict[str, str]] = field(default_factory=list)

    def check(self, name: str, holds: bool, found: str) -> None:
        self.checks.append({"check": name, "holds": bool(holds), "found": found})
        print(f"  {'ok  ' if holds else 'FAIL'}  {name}: {found}", flush=True)

    def skip(self, name: str, why: str) -> None:
        self.skipped.append({"case": name, "why": why})
        print(f"  skipped  {name}: {why}", flush=True)


class Step:
    """One PPO step of a case, a phase at a time."""

    def __init__(self, case: Case, device: torch.device) -> None:
        self.case = case
        with Peak() as made:
            self.base = random_base(case.config, case.dtype, device, case.quantize)
            self.ppo = Ppo(four_roles([self.base]), self.base.chat, case)
        self.critic = LeastSquares(self.base.hidden_size, device)
        self.warm_up()
        self.standing = made.left + self.ppo.moments
        self.ratios: list[float] = []
        self.norms: list[float] = []
        self.moved = float("nan")

    def warm_up(self) -> None:
        """Kernels are loaded and moments stand; the weights stay, as the rate is 0."""
        short = self.ppo.sequences(SHORT, SHORT)
        for name, optimizer in self.ppo.optimizers.items():
            rate, optimizer.peak = optimizer.peak, 0.0
            getattr(self.ppo, name)(short)
            optimizer.step("warm-up")
            optimizer.peak = rate
        self.ppo.rescoring(short)

    def rollout(self) -> int:
        prompts, self.tokens = self.ppo.rollout()
        size = self.case.micro
        self.batches: list[Sequences] = [
            collate(prompts[i : i + size], self.tokens[i : i + size], 0, self.base.device)
            for i in range(0, len(prompts), size)
        ]
        return sum(map(len, self.tokens))

    def rescoring(self) -> int:
        found = (self.ppo.rescoring(sequences) for sequences in self.batches)
        self.both = [replace(both, ref_hidden=both.ref_hidden.cpu()) for both in found]
        return self.num_tokens

    def scoring(self) -> int:
        self.scored = [self.ppo.scoring(sequences) for sequences in self.batches]
        return self.num_tokens

    @property
    def num_tokens(self) -> int:
        return sum(int(sequences.attention_mask.sum()) for sequences in self.batches)

    def targets(self, index: int) -> tuple[Any, Any]:
        """Advantages and returns of a micro-batch."""
        mask, both = self.batches[index].mask, self.both[index]
        values, scores = self.scored[index]
        rewards = policy.token_rewards(policy.k1(both.logprobs, both.ref_logprobs), scores[:, 0], mask, 0.05)
        advantages = policy.gae_advantages(rewards, values, mask, 1.0, 0.95)
        return tensors.normalize(advantages, mask), policy.returns_from(advantages, values, mask)

    def policy_update(self) -> int:
        count = sum(map(len, self.tokens))
        for index, sequences in enumerate(self.batches):
            old, mask = self.both[index].logprobs, sequences.mask
            with self.ppo.roles.acting_as("policy") as (model, _):
                logprobs = forward.response_logprobs(model, sequences, 1.0)
                policy.policy_loss(logprobs, old, self.targets(index)[0], mask, 0.2, count).loss.backward()
            self.ratios.append(float((logprobs.detach() - old).abs().max()))
        self.norms.append(self.ppo.optimizers["policy"].step("policy"))
        return self.num_tokens

    def value_update(self) -> int:
        count = sum(map(len, self.tokens))
        for index, sequences in enumerate(self.batches):
            old, returns = self.scored[index][0], self.targets(index)[1]
            with self.ppo.roles.acting_as("value") as (model, head):
                values = forward.state_values(model, head, sequences)
                policy.value_loss(values, old, returns, sequences.mask, 0.2, count).loss.backward()
        self.norms.append(self.ppo.optimizers["value"].step("value"))
        return self.num_tokens

    def value_fit(self) -> int:
        """The critic by least squares on these rollouts; the second fit starts from the first."""
        width, size, states, padded = self.case.response, self.case.micro, [], []
        for index, both in enumerate(self.both):
            states.append((list(range(index * size, index * size + len(both.logprobs))), both.ref_hidden))
            columns = torch.stack([self.targets(index)[1], self.batches[index].mask.float()])
            padded.append(pad(columns, (0, width - columns.shape[2])).cpu())
        returns, mask = torch.cat(padded, 1)
        batch: Any = SimpleNamespace(states=states, returns=returns, mask=mask.bool())
        self.fits = [self.critic.learn(batch, 0, step)["update/value_loss"] for step in range(2)]
        return 2 * int(mask.sum())

    def graph_against_eager(self) -> tuple[bool, str]:
        """Whether decode steps replayed from a CUDA graph sample as steps without one do, and how fast."""
        rows, how = self.case.rows, Sampling(min(self.case.response, 64), 1.0, 0)
        prompts, _ = token_rows(self.case.prompt, 1, self.ppo.vocabulary, rows)
        found, seconds = [], []
        for refused in (False, True):
            engine = HfEngine(self.ppo.roles, "policy", self.base.chat, rows)
            engine.graphs.refused = refused
            started = time.perf_counter()
            found.append(engine.generate(prompts, how, range(rows)).tokens)  # a list: the device is done
            seconds.append(time.perf_counter() - started)
            if not refused:
                used = engine.graphs.num_made > 0 and not engine.graphs.refused
        wanted = self.ppo.roles.device.type == "cuda" and not self.case.quantize  # quantised blocks are not known
        said = f"{seconds[0]:.2f} s with, {seconds[1]:.2f} s without" if used else "no graph is made here"
        return found[0] == found[1] and used == wanted, said

    def check(self, name: str, report: Report, weights: float) -> None:
        kl = max(float(both.exact_kl.max()) for both in self.both)
        report.check(f"{name}: fresh roles agree", kl == 0.0, f"largest exact KL {kl:.3g} nats")
        worst = max(self.ratios)
        found = "the ratio is exactly 1" if worst == 0 else f"{worst:.3g} nats from a ratio of 1"
        report.check(f"{name}: update sees the rollout's policy", worst < RATIO_TOLERANCE, found)
        norms = ", ".join(f"{norm:.3g}" for norm in self.norms)
        report.check(f"{name}: gradients are there", min(self.norms) > 0, f"norms {norms}")  # not finite raises
        moved = float(self.ppo.rescoring(self.batches[0]).exact_kl.max())
        report.check(f"{name}: the policy has moved", 0 < moved < 10, f"largest exact KL {moved:.3g} nats")
        report.check(f"{name}: a graph samples as its step does", *self.graph_against_eager())
        first, second = self.fits
        report.check(f"{name}: the critic learns", 0 <= second < first, f"half squared error {first:.3g}, {second:.3g}")
        report.check(f"{name}: the base has not", fingerprint(self.base.model) == weights, f"{weights:.9g}")


PHASES = {
    "rollout": "rollout", "rescoring": "rescoring", "scoring": "values and scores", "policy_update": "policy update",
    "value_update": "value update", "value_fit": "value fit",
}  # fmt: skip


def fingerprint(model: Any) -> float:
    """A sum over every frozen parameter, in float64."""
    frozen = [p for name, p in model.named_parameters() if "lora_" not in name]
    return float(sum(p.data.sum(dtype=torch.float64) * (index + 1) for index, p in enumerate(frozen)))


def run_case(case: Case, name: str, ceiling: Speed, report: Report, device: torch.device) -> None:
    """Every phase timed and its peak taken; a row each, printed as it comes."""
    shape = of_config(case.config.to_dict(), "")
    spec = case.spec("ppo", shape, device.type).with_(minibatch=case.rows)
    predicted = {phase.name: phase.total for phase in phases.phases(spec)}
    ways = (spec, spec.with_(trains_value=False))  # both critics
    floor = {work.name: work for way in ways for work in reversed(clock.step(way, ceiling))}
    step = Step(case, device)
    weights = fingerprint(step.base.model)
    for key, phase in PHASES.items():
        with Peak() as peak:
            started = time.perf_counter()
            tokens = getattr(step, key)()
            if device.type == "cuda":
                torch.cuda.synchronize()
            seconds = time.perf_counter() - started
        least = floor[phase].seconds * tokens / floor[phase].tokens
        row = {
            "case": name,
            "parameters": shape.parameters,
            "phase": phase,
            "seconds": seconds,
            "tokens": tokens,
            "tokens_per_s": tokens / seconds,
            "share_of_ceiling": least / seconds,
            "measured_bytes": step.standing + peak.high,
            "predicted_bytes": predicted.get(phase),
        }
        report.phases.append(row)
        print(line(row), flush=True)
    step.check(name, report, weights)
    check_peak(name, report)


def check_peak(name: str, report: Report) -> None:
    """The largest phase against the plan's."""
    rows = [row for row in report.phases if row["case"] == name and row["predicted_bytes"]]
    measured, planned = (max(row[key] for row in rows) for key in ("measured_bytes", "predicted_bytes"))
    apart = planned / measured - 1
    found = f"{measured / 2**30:.3g} GiB, planned {planned / 2**30:.3g} ({apart:+.0%})"
    report.check(f"{name}: the peak is as planned", abs(apart) < PEAK_TOLERANCE, found)


def summary(report: Report, failed: list[str], seconds: float) -> list[str]:
    """A table to paste, and the same as one line of JSON."""
    rows = ["| case | phase | tokens/s | of the ceiling | GiB | planned |", "|---|---|---|---|---|---|"]
    for row in report.phases:
        planned = f"{row['predicted_bytes'] / 2**30:.2f}" if row["predicted_bytes"] else "-"
        rows.append(
            f"| {row['case']} | {row['phase']} | {row['tokens_per_s']:,.0f} | {row['share_of_ceiling']:.1%} | "
            f"{row['measured_bytes'] / 2**30:.2f} | {planned} |"
        )
    rows += ["| **check** | | **holds** | **found** | | |"]
    rows += [
        f"| {check['check']} | | {'yes' if check['holds'] else 'NO'} | {check['found']} | | |"
        for check in report.checks
    ]
    rows += [f"| {row['case']} | not run | | {row['why']} | | |" for row in report.skipped]
    keys = ("case", "phase", "tokens_per_s", "measured_bytes", "predicted_bytes")
    short = {
        "machine": report.machine,
        "seconds": round(seconds),
        "failed": failed,
        "checks": report.checks,
        "skipped": report.skipped,
        "phases": [{key: row[key] for key in keys} for row in report.phases],
    }
    return [*rows, "", json.dumps(short)]


def line(row: dict[str, Any]) -> str:
    wanted = row["predicted_bytes"]
    beside = f"{wanted / 2**30:7.2f} ({wanted / row['measured_bytes'] - 1:+.0%})" if wanted else "      - (none)"
    return (
        f"  {row['case']:22} {row['phase']:18} {row['seconds']:8.2f} s {row['tokens_per_s']:10,.0f} tokens/s "
        f"{row['share_of_ceiling']:6.1%} of ceiling  {row['measured_bytes'] / 2**30:7.2f} GiB, predicted {beside}"
    )


def obstacle(case: Case, last: tuple[int, float] | None, left: float, device: torch.device) -> str | None:
    """Why a case is not run: no library, too little memory or time. Time is that of the last case, by parameters."""
    shape = of_config(case.config.to_dict(), "")
    if case.quantize and importlib.util.find_spec("bitsandbytes") is None:
        return "bitsandbytes is not installed"
    if device.type == "cuda":
        need = max(phases.peak(case.spec("ppo", shape, "cuda")).total, 2 * shape.parameters * 4 // 3)
        free = torch.cuda.mem_get_info()[0]
        if need > free:
            return f"needs {need / 2**30:.0f} GiB, free are {free / 2**30:.0f}"
    wanted = last[1] * max(1.0, shape.parameters / last[0]) if last else 0.0
    return f"{left:.0f} s are left, about {wanted:.0f} needed" if wanted > left or left <= 0 else None


def run_tests(report: Report, device: torch.device) -> None:
    if device.type != "cuda":
        report.tests = {"ran": False, "why": "no CUDA device: every one of them would be skipped"}
        return
    files = [str(path) for path in sorted((ROOT / "tests").glob("test_*.py")) if "mark.gpu" in path.read_text("utf-8")]
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", *files]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    summary = (done.stdout.strip().splitlines() or [done.stderr[-300:]])[-1]
    report.tests = {"ran": True, "rc": done.returncode, "summary": summary, "output": done.stdout[-4000:]}
    report.check("tests marked gpu", done.returncode == 0 and "skipped" not in summary, summary)


def ceiling_of(device: torch.device, tiny: bool) -> Speed:
    """What large products and long reads reach."""
    width = 4 if tiny else 2
    size = 256 if tiny else 8192
    found = speed.measured(size, size, width, False, tokens=size, read_bytes=(1 << 26) if tiny else 1 << 32)
    return Speed(found.flops, found.bandwidth)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="write gpu_check.json there")
    parser.add_argument("--minutes", type=float, default=8.0, help="no case is begun that would end later")
    parser.add_argument("--tiny", action="store_true", help="models of two layers, on a CPU too")
    arguments = parser.parse_args()
    started = time.monotonic()
    if not arguments.tiny and not torch.cuda.is_available():
        raise SystemExit("No CUDA device here: --tiny tries the script on a CPU.")
    device = runtime.set_up(RuntimeSection(), 0)  # as every stage
    ceiling = ceiling_of(device, arguments.tiny)
    report = Report({**machine.described(), "flops": ceiling.flops, "bandwidth": ceiling.bandwidth})
    print(f"{report.machine['device']}: {ceiling.flops / 1e12:.3g} TFLOP/s, {ceiling.bandwidth / 1e9:.3g} GB/s reached")
    run_tests(report, device)
    if arguments.minutes:
        Claims(device, arguments.tiny, report.check).run()
    else:
        report.skip("single claims", "0 s are left")
    last = None
    for case in TINY if arguments.tiny else CASES:
        name = f"{case.name} {case.quantize or case.dtype}"
        left = max(0.0, 60 * arguments.minutes - (time.monotonic() - started))
        if why := obstacle(case, last, left, device):
            report.skip(name, why)
            continue
        begun = time.monotonic()
        run_case(case, name, ceiling, report, device)
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
        last = of_config(case.config.to_dict(), "").parameters, time.monotonic() - begun
    failed = [check["check"] for check in report.checks if not check["holds"]]
    print(
        f"{len(report.checks) - len(failed)} of {len(report.checks)} checks hold; {len(report.skipped)} cases skipped."
    )
    seconds = time.monotonic() - started
    print("\n".join(["", *summary(report, failed, seconds)]))
    if arguments.out:
        arguments.out.mkdir(parents=True, exist_ok=True)
        outcome = {**asdict(report), "seconds": seconds, "failed": failed}
        (arguments.out / "gpu_check.json").write_text(json.dumps(outcome, indent=2), "utf-8")
    raise SystemExit(1 if failed else 0)


if __name__ == "__main__":
    main()
