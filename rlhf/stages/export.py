"""``rlhf export``: a run as a plain Hugging Face directory, compared with the run before it is believed."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from rlhf import artifacts, runtime, storage
from rlhf.artifacts import Manifest
from rlhf.config.sections import RuntimeSection
from rlhf.data.batches import Sequences, collate
from rlhf.data.records import Message
from rlhf.errors import Problem, RlhfError
from rlhf.models import forward, merged, opening
from rlhf.models.base import Base
from rlhf.models.heads import ScalarHead
from rlhf.models.roles import SharedBase

log = logging.getLogger("rlhf")
CARD, PROOF = "README.md", "rlhf_export.json"
PROBES = ("hello", "what is the capital of france ?", "a")


def export(run_dir: str, target: Path, adapter_only: bool) -> dict[str, Any]:
    """Write the run's model, tokenizer, card and proof to ``target``, and reload it with plain transformers.

    A policy becomes an ``AutoModelForCausalLM``, or its adapter alone; a reward model becomes an
    ``AutoModelForSequenceClassification`` with one label.

    A run on a quantised base is merged into the base as its files have it: the quantised weights are no numbers to add
    to. What is reloaded is compared with that base and the adapter beside it, and how far the run itself was from it is
    told as ``quantisation_difference``.

    Raises:
        RlhfError: CKP009 if ``target`` exists; what ``artifacts`` and ``merged`` refuse.
    """
    if target.exists():
        raise RlhfError(Problem("CKP009", str(target), "exists.", "name a directory that does not"))
    manifest = artifacts.read(run_dir, "policy", "reward")
    artifacts.verify(Path(run_dir), manifest)
    if adapter_only and manifest.kind == "reward":
        what = "a reward model is more than its adapter: the head would be lost."
        raise RlhfError(Problem("CKP004", run_dir, what, "leave --adapter-only out"))
    device = runtime.set_up(RuntimeSection(), 0)
    base = opening.reopen_base(manifest, device, whole=True)
    wanted = _expected(base, Path(run_dir), manifest)
    proof: dict[str, Any] = {"kind": manifest.kind, "run": run_dir, "digest": manifest.digest}
    if manifest.base and manifest.base.quantize and not adapter_only:
        own = _expected(opening.reopen_base(manifest, device), Path(run_dir), manifest)
        proof["quantisation_difference"] = _largest(own - wanted, manifest, _probes(base, base.chat.pad_id))
    with storage.staged_directory(target) as staging:
        if adapter_only:
            shutil.copytree(Path(run_dir) / artifacts.ADAPTER, staging, dirs_exist_ok=True)
        else:
            # The base is loaded again: what was measured above has an adapter beside it.
            proof |= _write_model(opening.reopen_base(manifest, device, whole=True), Path(run_dir), manifest, staging)
            proof["max_difference"] = _difference(staging, base, manifest, wanted, proof.get("constant", 0.0))
            log.info("Reloaded by transformers alone: largest difference %.3g.", proof["max_difference"])
        if base.chat.template:
            base.tokenizer.chat_template = base.chat.template
        base.tokenizer.save_pretrained(staging)
        storage.write_json(staging / PROOF, proof)
        storage.write_text(staging / CARD, _card(run_dir, manifest, proof, adapter_only))
    log.info("Exported %s to %s.", run_dir, target)
    return {"target": str(target), **proof}


def _write_model(base: Base, run_dir: Path, manifest: Manifest, target: Path) -> dict[str, Any]:
    adapter = run_dir / artifacts.ADAPTER
    if manifest.kind == "policy":
        merged.policy(base, adapter).save_pretrained(target)
        return {}
    model, constant = merged.reward(base, adapter, ScalarHead.load(run_dir / artifacts.HEAD))
    model.save_pretrained(target)
    return {"constant": constant}


def _probes(base: Base, pad_id: int) -> Sequences:
    """A few conversations of different lengths, right-padded."""
    rows = [(Message("user", text),) for text in PROBES]
    prompts = [base.chat.prompt_ids(messages) for messages in rows]
    responses = [
        [*base.chat.response_ids(messages, text), base.chat.end_id]
        for messages, text in zip(rows, reversed(PROBES), strict=True)
    ]
    return collate(prompts, responses, pad_id, base.device)


@torch.no_grad()
def _expected(base: Base, run_dir: Path, manifest: Manifest) -> torch.Tensor:
    """Logits [B, L, V] of the policy or scores [B] of the reward model, as the run itself gives them."""
    roles = SharedBase(base)
    head = ScalarHead.load(run_dir / artifacts.HEAD) if manifest.kind == "reward" else None
    roles.add("role", adapter=run_dir / artifacts.ADAPTER, head=head, trained=False)
    sequences = _probes(base, base.chat.pad_id)
    with roles.acting_as("role") as (model, own):
        if own is not None:
            return forward.end_scores(model, own, sequences)[:, 0].float().cpu()
        logits = model(input_ids=sequences.ids, attention_mask=sequences.attention_mask, use_cache=False).logits
        return logits.float().cpu()  # type: ignore[no-any-return]


@torch.no_grad()
def _difference(target: Path, base: Base, manifest: Manifest, wanted: torch.Tensor, constant: float) -> float:
    """The largest difference between ``wanted`` and what transformers alone reads from ``target``."""
    kind = AutoModelForCausalLM if manifest.kind == "policy" else AutoModelForSequenceClassification
    model = kind.from_pretrained(target, dtype=base.model.dtype).to(base.device).eval()
    sequences = _probes(base, model.config.pad_token_id if manifest.kind == "reward" else base.chat.pad_id)
    found = model(input_ids=sequences.ids, attention_mask=sequences.attention_mask).logits.float().cpu()
    difference = found[:, 0] + constant - wanted if manifest.kind == "reward" else found - wanted
    return _largest(difference, manifest, sequences)


def _largest(difference: torch.Tensor, manifest: Manifest, sequences: Sequences) -> float:
    """Of scores [B], or of the logits [B, L, V] of real tokens."""
    real = difference if manifest.kind == "reward" else difference[sequences.attention_mask.bool().cpu()]
    return float(real.abs().max())


def _card(run_dir: str, manifest: Manifest, proof: dict[str, Any], adapter_only: bool) -> str:
    assert manifest.base
    header = ["---", "library_name: transformers", f"base_model: {manifest.base.source}", "---"]
    what = "LoRA adapter" if adapter_only else "model"
    lines = [*header, "", f"# A {manifest.kind} {what} made by `rlhf {manifest.stage}`", ""]
    lines += [f"- base: {manifest.base.source} ({manifest.base.dtype}, digest {manifest.base.digest[:16]})"]
    lines += [f"- run: {run_dir}, digest {manifest.digest[:16]}, made on {manifest.created}, seed {manifest.seed}"]
    lines += [
        f"- made from {key}: {parent['run_dir']} ({parent['digest'][:16]})" for key, parent in manifest.parents.items()
    ]
    if manifest.base.quantize:
        lines += [f"- trained on the base in {manifest.base.quantize}" + _whole_base(proof)]
    if "max_difference" in proof:
        lines += [f"- largest difference to the run after reloading: {proof['max_difference']:.3g}"]
    if "constant" in proof:
        lines += [f"- the run's standardised score is the logit plus {proof['constant']:.6g}: the class has no bias"]
    lines += ["", "## What was measured", "", "| figure | value |", "|---|---|"]
    lines += [f"| {name} | {json.dumps(value)} |" for name, value in manifest.metrics.items()]
    lines += [
        "", "## Limits", "",
        "These figures are of the data that the run was measured on. A reward model is a guess at preferences, and a",
        "policy that was optimised against one may have learnt its mistakes.", "",
    ]  # fmt: skip
    return "\n".join(lines)


def _whole_base(proof: dict[str, Any]) -> str:
    if "quantisation_difference" not in proof:
        return ""
    return (
        ", and merged into the unquantised base, which is what the next line compares with: the run's own outputs "
        f"differ from it by up to {proof['quantisation_difference']:.3g}"
    )
