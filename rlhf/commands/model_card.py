"""What an exported directory says of itself: base, run, data, rubric, figures and limits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rlhf.config import rubric
from rlhf.config.train_rm import COMBINED
from rlhf.demo import catalogue as demo
from rlhf.hub import names
from rlhf.preflight import examined
from rlhf.runs import artifacts
from rlhf.runs.artifacts import Manifest

CARD = "README.md"


def of(run_dir: str, manifest: Manifest, proof: dict[str, Any], adapter_only: bool) -> str:
    assert manifest.base
    what = "LoRA adapter" if adapter_only else "model"
    lines = [
        *_header(manifest, adapter_only),
        "",
        f"# A {manifest.kind} {what} made by `rlhf {manifest.stage}`",
        "",
    ]
    lines += [f"- base: {manifest.base.source} ({manifest.base.dtype}, digest {manifest.base.digest[:16]})"]
    lines += [f"- run: {run_dir}, digest {manifest.digest[:16]}, made on {manifest.created}, seed {manifest.seed}"]
    for key, parent in manifest.parents.items():
        lines += [f"- made from {key}: {parent['run_dir']} ({parent['digest'][:16]})"]
    lines += [f"- note: {mark}" for mark in examined.marks(manifest)]
    lines += _data_lines(manifest)
    if manifest.base.quantize:
        lines += [f"- trained on the base in {manifest.base.quantize}" + _whole_base(proof)]
    if "max_difference" in proof:
        lines += [f"- largest difference to the run after reloading: {proof['max_difference']:.3g}"]
    if "max_difference_bfloat16" in proof:
        lines += [f"- the same where it is loaded in bfloat16: {proof['max_difference_bfloat16']:.3g}"]
    lines += [f"- {sentence}" for sentence in score_sentences(proof)]
    lines += _label_lines(proof) + _rubric_lines(run_dir)
    lines += ["", "## What was measured", "", "| figure | value |", "|---|---|"]
    lines += [f"| {name} | {json.dumps(value)} |" for name, value in manifest.metrics.items()]
    if label := manifest.details.get("held_out_figures"):
        lines += ["", f"Figures on held-out rows are {label}."]
    lines += [
        "",
        "## Limits",
        "",
        "These figures are of the data that the run was measured on. A reward model is a guess at preferences, and a",
        "policy that was optimised against one may have learnt its mistakes.",
        "",
    ]
    return "\n".join(lines)


def score_sentences(proof: dict[str, Any]) -> list[str]:
    """How what is exported of a reward run gives the numbers of ``rlhf score``; nothing of a policy.

    The weight of the class holds the scale already, and the class has no bias for what is left of shift and bias.
    """
    if "members" in proof:
        said = [sentence for one in proof["members"][:1] for sentence in score_sentences(one)[-1:]]
        constants = [one.get("constant", one.get("constants", {}).get(COMBINED)) for one in proof["members"]]
        if None in constants:  # a gate's sum is not exported
            return ["rlhf score's number of a head is the mean of the directories' logits plus constants", *said]
        listed = ", ".join(f"{value:.7g} for {index}" for index, value in enumerate(constants))
        return [f"rlhf score's number is the mean of the directories' logits, each plus its constant: {listed}", *said]
    calibrated = "a length calibration is not exported: rlhf score EXAMINATION takes it off"
    if "constant" in proof:
        whose = f"number of head {proof['head']}" if "head" in proof else "number"
        what = f"rlhf score's {whose} is the logit plus {proof['constant']:.7g}: the class has no bias"
        return [what, calibrated]
    if "constants" not in proof:
        return []
    numbers = [
        f"rlhf score's number of {'the run' if name == COMBINED else f'head {name}'} is the logit of label {name} "
        f"plus {value:.7g}"
        for name, value in proof["constants"].items()
    ]
    return [*numbers, calibrated]


def _label_lines(proof: dict[str, Any]) -> list[str]:
    """How several heads make the run's score."""
    if "constants" not in proof:
        return []
    if COMBINED not in proof["constants"]:
        return [
            f"- the run's own score weighs the heads by the prompt ({proof['combine']}), which no label can: rlhf score"
        ]
    total = " + ".join(f"{weight:.6g} {name}" for name, weight in proof["weights"].items())
    return [f"- {COMBINED} is {total}, of their scores before standardising ({proof['combine']})"]


def _rubric_lines(run_dir: str) -> list[str]:
    """The rubric that the labels were made by."""
    path = artifacts.rubric_of(run_dir)
    if path is None:
        return []
    found = rubric.read(path)
    said = [f"- {line}" for line in rubric.lines(found)]
    return ["", f"## Labelled by: {found.name}", "", *([found.description, ""] if found.description else []), *said]


def of_ensemble(run_dir: str, manifest: Manifest, proof: dict[str, Any]) -> str:
    count = len(proof["members"])
    lines = [
        f"# An ensemble of {count} reward models made by `rlhf {manifest.stage}`",
        "",
        f"Run {run_dir}, digest {manifest.digest[:16]}. Directories 0 to {count - 1} are sequence classifiers.",
        "",
        *(f"- {sentence}" for sentence in score_sentences(proof)),
        "",
    ]
    return "\n".join(lines)


def _header(manifest: Manifest, adapter_only: bool) -> list[str]:
    """The card's metadata; a base is named only where the hub could have it."""
    assert manifest.base
    task = "text-generation" if manifest.kind == "policy" else "text-classification"
    header = ["---", f"library_name: {'peft' if adapter_only else 'transformers'}", f"pipeline_tag: {task}"]
    if not names.exists(manifest.base.source) and not demo.is_demo(manifest.base.source):
        header += [f"base_model: {manifest.base.source}"]
    return [*header, f"tags: [rlhf, {manifest.stage}]", "---"]


def _data_lines(manifest: Manifest) -> list[str]:
    """The data of the run, and of the runs that it was made from, as far as they are still there."""
    made = [("", manifest)]
    for key, parent in manifest.parents.items():
        if artifacts.is_finished(Path(parent["run_dir"])):
            made += [(f" of {key}", artifacts.read(parent["run_dir"]))]
    return [
        f"- data{whose}: {found.identity[f'{name}.path']} (rows' digest {str(digest)[:16]})"
        for whose, found in made
        for key, digest in found.identity.items()
        if key.endswith(".rows") and f"{(name := key.removesuffix('.rows'))}.path" in found.identity
    ]


def _whole_base(proof: dict[str, Any]) -> str:
    if "quantisation_difference" not in proof:
        return ""
    return (
        ", and merged into the unquantised base, which is what the next line compares with: the run's own outputs "
        f"differ from it by up to {proof['quantisation_difference']:.3g}"
    )
