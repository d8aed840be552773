"""``rlhf export``: a run as a plain Hugging Face directory, compared with the run before it is believed."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from rlhf.commands import model_card
from rlhf.config.sections import RuntimeSection
from rlhf.config.train_rm import COMBINED
from rlhf.data.batches import Sequences, collate
from rlhf.errors import Problem, RlhfError
from rlhf.hub import upload
from rlhf.models import forward, merged, open_base
from rlhf.models.base import Base
from rlhf.models.heads import ScalarHead
from rlhf.models.roles import SharedBase
from rlhf.models.sequence_classifier import PROOF
from rlhf.records import Message
from rlhf.runs import artifacts, runtime, storage
from rlhf.runs.artifacts import Manifest
from rlhf.runs.progress import waiting

log = logging.getLogger("rlhf")
PROBES = ("hello", "what is the capital of france ?", "a")


def export(
    run_dir: str,
    target: Path,
    adapter_only: bool,
    repository: str | None = None,
    public: bool = False,
    head: str | None = None,
) -> dict[str, Any]:
    """Write the run's model, tokenizer, card and proof to ``target``, and reload it with plain transformers; then
    upload it to ``repository`` of the hub, where one is named.

    A policy becomes an ``AutoModelForCausalLM``, or its adapter alone; a reward model becomes an
    ``AutoModelForSequenceClassification`` with one label, of several heads with one more for each of them, or with that
    of ``head`` alone; an ensemble a directory with one for each member. A gate's sum depends on the prompt and is left
    out.

    A run on a quantised base is merged into the full-precision base from its files: an adapter cannot be added to
    quantised weights. The reloaded model is compared with that base and its adapter. ``quantisation_difference`` says
    how far the run itself was from it.

    Raises:
        RlhfError: CKP009 if ``target`` exists; CFG040 for a head that is not there, MOD040 for a gate's sum; RES012 if
            the hub cannot be used, before anything is computed; what ``artifacts`` and ``merged`` refuse.
    """
    if target.exists():
        raise RlhfError(Problem("CKP009", str(target), "exists.", "name a directory that does not"))
    manifest = artifacts.read(run_dir, "policy", "reward")
    artifacts.verify(Path(run_dir), manifest)
    if adapter_only and manifest.kind == "reward":
        what = "a reward model is more than its adapter: the head would be lost."
        raise RlhfError(Problem("CKP004", run_dir, what, "leave --adapter-only out"))
    if adapter_only and artifacts.adapter_of(run_dir) is None:
        raise RlhfError(
            Problem("CKP004", run_dir, "trained every weight: it has no adapter.", "leave --adapter-only out")
        )
    if head is not None:
        known = manifest.details.get("heads", [COMBINED]) if manifest.kind == "reward" else []
        if head not in known:
            fix = f"one of {', '.join(known)}" if known else "leave it out"
            raise RlhfError(Problem("CFG040", "--head", f"{run_dir} has no head {head!r}.", fix))
    if repository:
        upload.require_login(repository)
    device = runtime.set_up(RuntimeSection(), 0)
    members = artifacts.members_of(run_dir)
    with storage.staged_directory(target) as staging:
        if len(members) == 1:
            proof = _written(run_dir, 0, manifest, device, adapter_only, staging, head)
        else:
            proof = {"kind": manifest.kind, "run": run_dir, "digest": manifest.digest, "members": []}
            for index in range(len(members)):
                (staging / str(index)).mkdir()
                where = staging / str(index)
                proof["members"].append(_written(run_dir, index, manifest, device, False, where, head))
            storage.write_text(staging / model_card.CARD, model_card.of_ensemble(run_dir, manifest, proof))
    for sentence in model_card.score_sentences(proof):
        log.info("%s.", sentence)
    log.info("Exported %s to %s.", run_dir, target)
    if repository:
        proof["url"] = upload.upload(target, repository, public)
        log.info("Uploaded to %s.", proof["url"])
    return {"target": str(target), **proof}


@waiting("Writing the model, and comparing it with what transformers reads")
def _written(
    run_dir: str,
    member: int,
    manifest: Manifest,
    device: torch.device,
    adapter_only: bool,
    staging: Path,
    name: str | None = None,
) -> dict[str, Any]:
    """Write the run (or one member of it) to ``staging``, reload it, and say how it compares."""
    source = artifacts.members_of(run_dir)[member]
    base = open_base.reopen_base(manifest, device, whole=True)
    head = _head(source, name) if manifest.kind == "reward" else None
    wanted = _expected(base, source, head)
    proof: dict[str, Any] = {"kind": manifest.kind, "run": run_dir, "digest": manifest.digest}
    if manifest.base and manifest.base.quantize and not adapter_only:
        own = _expected(open_base.reopen_base(manifest, device), source, head)
        proof["quantisation_difference"] = _largest(own - wanted, manifest, _probes(base, base.chat.pad_id))
    if adapter_only:
        shutil.copytree(source / artifacts.ADAPTER, staging, dirs_exist_ok=True)
    else:
        # The base is loaded again, since the one measured above carries an adapter.
        proof |= _write_model(open_base.reopen_base(manifest, device, whole=True), source, head, staging)
        if "constants" in proof:
            proof |= {"combine": manifest.details["combine"], "weights": manifest.details["weights"][member]}
        constants = [*proof["constants"].values()] if "constants" in proof else [proof.get("constant", 0.0)]
        proof["max_difference"] = _difference(staging, base, manifest, wanted, constants, base.model.dtype)
        log.info("Reloaded by transformers alone: largest difference %.3g.", proof["max_difference"])
        if base.model.dtype == torch.float32:
            half = proof["max_difference_bfloat16"] = _difference(
                staging, base, manifest, wanted, constants, torch.bfloat16
            )
            log.info("Reloaded in bfloat16: largest difference %.3g.", half)
    if base.chat.template:
        base.tokenizer.chat_template = base.chat.template
    base.tokenizer.save_pretrained(staging)
    storage.write_json(staging / PROOF, proof)
    storage.write_text(staging / model_card.CARD, model_card.of(run_dir, manifest, proof, adapter_only))
    return proof


def _head(source: Path, name: str | None) -> ScalarHead:
    """What is exported of a reward run's head: one number, or all that do not depend on the prompt.

    Raises:
        RlhfError: MOD040 for the sum of a gate.
    """
    head = ScalarHead.load(artifacts.head_of(source))
    if head.gate is not None and name == head.names[0]:
        what = f"{name!r} weighs its heads by the prompt, and a plain classifier has no place for that."
        raise RlhfError(Problem("MOD040", "--head", what, f"one of {', '.join(head.names[1:])}, or rlhf score"))
    return head.only((name,) if name else head.names[1:] if head.gate is not None else head.names)


def _write_model(base: Base, run_dir: Path, head: ScalarHead | None, target: Path) -> dict[str, Any]:
    adapter = artifacts.adapter_of(run_dir)
    if head is None:
        merged.policy(base, adapter).save_pretrained(target)
        return {}
    model, constants = merged.reward(base, adapter, head)
    model.save_pretrained(target)
    if len(constants) == 1:
        return {"constant": constants[0]} | ({} if head.names[0] == COMBINED else {"head": head.names[0]})
    return {"constants": dict(zip(head.names, constants, strict=True))}


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
def _expected(base: Base, run_dir: Path, head: ScalarHead | None) -> torch.Tensor:
    """Logits [B, L, V] of the policy or scores [B, k] of the reward model, as the run itself gives them."""
    roles = SharedBase(base)
    roles.add("role", adapter=artifacts.adapter_of(run_dir), head=head, trained=False)
    sequences = _probes(base, base.chat.pad_id)
    with roles.acting_as("role") as (model, own):
        if own is not None:
            return forward.end_scores(model, own, sequences).float().cpu()
        logits = model(input_ids=sequences.ids, attention_mask=sequences.attention_mask, use_cache=False).logits
        return logits.float().cpu()  # type: ignore[no-any-return]


@torch.no_grad()
def _difference(
    target: Path, base: Base, manifest: Manifest, wanted: torch.Tensor, constants: Sequence[float], dtype: torch.dtype
) -> float:
    """The largest difference between ``wanted`` and what transformers alone reads from ``target`` in ``dtype``."""
    kind = AutoModelForCausalLM if manifest.kind == "policy" else AutoModelForSequenceClassification
    model = kind.from_pretrained(target, dtype=dtype).to(base.device).eval()
    sequences = _probes(base, model.config.pad_token_id if manifest.kind == "reward" else base.chat.pad_id)
    found = model(input_ids=sequences.ids, attention_mask=sequences.attention_mask).logits.float().cpu()
    difference = found + torch.tensor(constants) - wanted if manifest.kind == "reward" else found - wanted
    return _largest(difference, manifest, sequences)


def _largest(difference: torch.Tensor, manifest: Manifest, sequences: Sequences) -> float:
    """Of scores [B, k], or of the logits [B, L, V] of real tokens."""
    real = difference if manifest.kind == "reward" else difference[sequences.attention_mask.bool().cpu()]
    return float(real.abs().max())
