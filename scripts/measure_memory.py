"""Measured beside predicted memory of SFT, reward training and PPO's phases, on models of random weights.

    python scripts/measure_memory.py [--quick] [--json FILE]

On a CPU the measure is the allocator's own: every allocation and release that torch reports while a phase runs, added
to what was live before. Pages, code and the libraries' own buffers are not in it, and the resident set is printed
beside. On CUDA it is torch.cuda.max_memory_allocated(). Quantised bases are measured where bitsandbytes is installed.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import importlib.util
import json
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from measuring import (
    SHORT,
    Case,
    Peak,
    Ppo,
    WithoutProducts,
    four_roles,
    peak_of_update,
    ppo_peaks,
    random_base,
    token_rows,
)
from peft import get_peft_model
from torch.utils.data import SequentialSampler

from rlhf.config.sections import LoraSection
from rlhf.config.stages import SftConfig
from rlhf.data.batches import collate
from rlhf.data.tokenised import Dialogue
from rlhf.models import adapters, forward
from rlhf.models.base import Base
from rlhf.models.fused import lora as fused_lora
from rlhf.models.heads import ScalarHead
from rlhf.models.roles import SharedBase
from rlhf.planning.phases import phases
from rlhf.planning.shape import of_config
from rlhf.runs import runtime
from rlhf.stages.sft import run as sft
from rlhf.training.optimizer import Optimizer

SMOL = (576, 12, 9, 3, 1536, 49152)  # 71 M
GPT = (768, 12, 12, 12, 3072, 32768)  # 138 M
QWEN = (896, 16, 14, 2, 4864, 65536)  # 300 M
SMALL = (512, 6, 8, 8, 1408, 16384)  # 28 M
FEW = {"micro": 2, "prompt": 96, "response": 32, "rows": 8}
QUANTISED = {**FEW, "dtype": "bfloat16"}
CASES = (
    Case("28M", SMALL), Case("28M", SMALL, checkpointing=True), Case("71M", SMOL), Case("71M", SMOL, dtype="bfloat16"),
    Case("71M", SMOL, checkpointing=True, **FEW), Case("71M", SMOL, dtype="bfloat16", checkpointing=True, **FEW),
    Case("71M", SMOL, micro=1, prompt=64, response=192, rows=4), Case("138M", GPT, **FEW),
    Case("138M", GPT, dtype="bfloat16", checkpointing=True, **FEW), Case("111M gpt2", GPT, family="gpt2", **FEW),
    Case("111M gpt2", GPT, family="gpt2", dtype="bfloat16", **FEW),
    Case("111M gpt2", GPT, family="gpt2", dtype="bfloat16", checkpointing=True, **FEW), Case("300M", QWEN, **FEW),
    Case("300M", QWEN, dtype="bfloat16", **FEW), Case("71M nf4", SMOL, quantize="nf4", **QUANTISED),
    Case("71M nf4", SMOL, quantize="nf4", checkpointing=True, **QUANTISED),
    Case("71M int8", SMOL, quantize="int8", **QUANTISED),
    Case("71M int8", SMOL, quantize="int8", checkpointing=True, **QUANTISED),
    Case("71M qwen3", SMOL, family="qwen3", **FEW),
    Case("71M qwen3", SMOL, family="qwen3", dtype="bfloat16", checkpointing=True, **FEW),
)  # fmt: skip


def measure(case: Case, device: torch.device) -> list[dict[str, Any]]:
    """Every phase of the three stages: measured and predicted bytes."""
    shape = of_config(case.config.to_dict(), "")
    found: list[dict[str, Any]] = []
    for stage, run in (("sft", _sft), ("train-rm", _train_rm), ("ppo", _ppo)):
        with Peak() as loaded:
            base = random_base(case.config, case.dtype, device, case.quantize)
        predicted = {phase.name: phase.total for phase in phases(case.spec(stage, shape, device.type))}
        for name, high in run(case, base).items():
            if name in predicted:
                measured = loaded.left + high
                found.append({"stage": stage, "phase": name, "measured": measured, "predicted": predicted[name]})
        del base
        gc.collect()
    return found


def _train_rm(case: Case, base: Base) -> dict[str, int]:
    roles, vocabulary = SharedBase(base), case.shape[-1]
    with Peak() as made:
        lora = adapters.fresh_lora(LoraSection(), base.model, base.tokenizer)
        roles.add("policy", adapter=lora)
        roles.add("reward", adapter=lora, head=ScalarHead(base.hidden_size), trained=True)
        optimizer = Optimizer(roles.trained_parameters("reward"), 1e-5, 9)
    if case.checkpointing:
        roles.enable_gradient_checkpointing()

    def update(sequences: Any) -> None:
        with roles.acting_as("reward") as (model, head):
            forward.end_scores(model, head, sequences).sum().backward()

    standing = made.left + 2 * sum(p.nbytes for p in roles.trained_parameters("reward"))
    batches = [
        collate(*token_rows(*size, vocabulary, case.micro), 0, base.device)
        for size in ((SHORT, SHORT), (case.prompt, case.response))
    ]
    return {"training": standing + peak_of_update(optimizer, update, *batches)}


def _sft(case: Case, base: Base) -> dict[str, int]:
    return {"training": sft_peak(case, base)}


def _ppo(case: Case, base: Base) -> dict[str, int]:
    with Peak() as made:
        ppo = Ppo(four_roles([base]), base.chat, case)
    return ppo_peaks(ppo, made.left)


def sft_peak(case: Case, base: Base) -> int:
    """TRL's own trainer, two optimizer steps of two micro-batches each, all short but for the last one."""
    config = SftConfig.model_validate(
        {
            "data": {"path": "x"},
            "steps": 2,
            "max_length": case.prompt + case.response,
            "batch": {"batch_size": 2 * case.micro, "micro_batch_size": case.micro},
            "runtime": {"gradient_checkpointing": case.checkpointing},
        }
    )
    rows = []
    for prompt, response in [(SHORT, SHORT)] * 3 + [(case.prompt, case.response)]:
        for p, r in zip(*token_rows(prompt, response, case.shape[-1], case.micro), strict=True):
            rows.append(Dialogue(p + r, [False] * len(p) + [True] * len(r)))
    with tempfile.TemporaryDirectory() as directory, Peak() as peak:
        model = get_peft_model(base.model, adapters.fresh_lora(config.lora, base.model, base.tokenizer))
        fused_lora.install(base.model)
        trainer = sft._trainer(config, model, base, rows, SimpleNamespace(path=Path(directory)))
        trainer._get_train_sampler = lambda *_: SequentialSampler(trainer.train_dataset)
        trainer.train()
    return peak.high


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="the smallest model alone")
    parser.add_argument("--json", type=Path, help="write every figure there")
    parser.add_argument("--without-products", action="store_true", help="zeros for matrix products, see measuring.py")
    parser.add_argument("--only", type=int, nargs="*", help="numbers of cases")
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    cases = [CASES[i] for i in arguments.only] if arguments.only else CASES[:2] if arguments.quick else CASES
    print(f"{'case':44} {'phase':22} {'measured':>9} {'predicted':>9} {'error':>7}")
    every = []
    for case in cases:
        if case.quantize and importlib.util.find_spec("bitsandbytes") is None:
            print(f"{case.name} {case.dtype}: not measured, bitsandbytes is not installed.")
            continue
        how = f"{case.name} {case.dtype} {case.micro} x ({case.prompt}+{case.response}) of {case.rows}"
        how += " ckpt" if case.checkpointing else ""
        with WithoutProducts() if arguments.without_products else contextlib.nullcontext():
            rows = measure(case, device)
        for row in rows:
            row |= {"case": how, "error": row["predicted"] / row["measured"] - 1}
            every.append(row)
            mb = [f"{row[key] / 2**20:6.0f} MB" for key in ("measured", "predicted")]
            print(f"{how:44} {row['stage'] + ' ' + row['phase']:22} {mb[0]} {mb[1]} {row['error']:+7.1%}", flush=True)
    worst = max(every, key=lambda row: abs(row["error"]))
    within = sum(abs(row["error"]) <= 0.1 for row in every)
    print(f"{within} of {len(every)} within 10 %; worst {worst['error']:+.1%}: {worst['case']}, {worst['phase']}.")
    print(f"Largest resident set of this process: {runtime.peak_rss_mb():.0f} MB.")
    if arguments.json:
        arguments.json.write_text(json.dumps(every, indent=2), "utf-8")


if __name__ == "__main__":
    main()
