"""Reward models on real pretrained backbones and people's preferences, beside what length alone says.

    python scripts/real_rewards.py --llmbar FILE --oasst FILE --gsm8k FILE --llama DIR --encoder DIR [--out runs/real]

Any of the data sets and backbones may be left out. Files are JSONL: LLMBar (prompt, chosen, rejected), OpenAssistant
pairs (the same, prompts as "Human:" and "Assistant:" turns, tree_id), answers to GSM8K (prompt, response, is_correct,
qid). ``--llama`` is a small causal model: it is fine-tuned on preferred responses (``rlhf sft``) and becomes a reward
model by ``rlhf train-rm``. ``--encoder`` is a BERT such as MiniLM, which ``train-rm`` cannot train: its pooler and one
logit are trained here by the same loss on frozen features, and it is examined as a ``model:`` of ``rlhf eval-rm``.

Rows of more than ``--characters`` are left out, and so is what a backbone has no room for; both are counted. 30 % of
the prompts (of conversations: of their trees) are held out. Length alone prefers the longer or the shorter response,
whichever was right on the training rows; ``over length`` is paired, on the rows that the backbone read, against what is
right there. Intervals are 95 %, over prompts. What is finished stays. Ends with a table and OUT/report.json.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from rlhf.config.rewards import ClassifierSection
from rlhf.config.sections import DataSection
from rlhf.data import sources
from rlhf.evaluation import figures
from rlhf.losses.preference import bradley_terry
from rlhf.metrics import intervals
from rlhf.models import sequence_classifier
from rlhf.models.sequence_classifier import Reading
from rlhf.records import Comparison, prompt_key
from rlhf.runs import artifacts, progress, run_directory, storage
from rlhf.training.optimizer import Optimizer

Row = dict[str, Any]
HELD_OUT, MAX_LENGTH, EPOCHS = 0.3, 512, 30
TURN = re.compile(r"\n\n(Human|Assistant):")
SPEAKERS = {"Human": "user", "Assistant": "assistant"}


def llmbar(row: Row) -> tuple[Row, str]:
    return {key: row[key] for key in ("prompt", "chosen", "rejected")}, row["prompt"]


def oasst(row: Row) -> tuple[Row, str]:
    parts = TURN.split(row["prompt"])[1:-2]
    turns = [
        {"role": SPEAKERS[who], "content": text.strip()} for who, text in zip(parts[::2], parts[1::2], strict=True)
    ]
    return {"prompt": turns, "chosen": row["chosen"], "rejected": row["rejected"]}, row["tree_id"]


def gsm8k(row: Row) -> tuple[Row, str]:
    return {"prompt": row["prompt"], "completion": row["response"], "label": row["is_correct"]}, str(row["qid"])


DATA: dict[str, Callable[[Row], tuple[Row, str]]] = {"llmbar": llmbar, "oasst": oasst, "gsm8k": gsm8k}


def prepare(name: str, source: Path, out: Path, characters: int, limit: int | None) -> dict[str, int]:
    """``out/train.jsonl`` and ``out/test.jsonl``, no prompt in both; returns the numbers of rows."""
    parts: dict[str, list[Row]] = {"train": [], "test": []}
    read = [DATA[name](json.loads(line)) for line in source.read_text("utf-8").splitlines()]
    fits = [(row, key) for row, key in read if _characters(row) <= characters]
    known = list(dict.fromkeys(key for _, key in fits))[:limit]
    held_out = dict(zip(known, figures.split(known, HELD_OUT, 0), strict=True))
    for row, key in fits:
        if key in held_out:
            parts["test" if held_out[key] else "train"].append(row)
    out.mkdir(parents=True, exist_ok=True)
    for part, rows in parts.items():
        run_directory.write_samples(out / f"{part}.jsonl", rows)
    return {"rows": len(read), "too_long": len(read) - len(fits), **{part: len(rows) for part, rows in parts.items()}}


def _characters(row: Row) -> int:
    prompt = row["prompt"] if isinstance(row["prompt"], str) else "".join(turn["content"] for turn in row["prompt"])
    return len(prompt) + max(len(row.get(key, "")) for key in ("chosen", "rejected", "completion"))


def comparisons(path: Path) -> tuple[Comparison, ...]:
    return sources.load_comparisons(DataSection(path=str(path), max_dropped_fraction=1.0)).records


def decided(records: Sequence[Comparison]) -> Iterator[tuple[str, str, str]]:
    """(prompt, preferred response, other) of each comparison with a preference."""
    for record in records:
        for one in record.judgements:
            if one.probability != 0.5:
                order = (one.first, one.second) if one.probability > 0.5 else (one.second, one.first)
                better, worse = (record.responses[index] for index in order)
                yield prompt_key(record.prompt), better, worse


def length_alone(out: Path) -> dict[str, Any]:
    """Accuracy of length on the held-out comparisons, in the direction that is right on the others."""

    def gaps(part: str) -> tuple[Any, list[str]]:
        found = list(decided(comparisons(out / f"{part}.jsonl")))
        return numpy.sign([len(better) - len(worse) for _, better, worse in found]), [key for key, _, _ in found]

    direction = 1 if gaps("train")[0].mean() >= 0 else -1
    signs, keys = gaps("test")
    accuracy = intervals.grouped_bootstrap(0.5 + 0.5 * direction * signs, keys, seed=0)
    return {"prefers": "longer" if direction > 0 else "shorter", "accuracy": figures.interval(accuracy)}


def stage(name: str, run_dir: Path, config: Row) -> Path:
    """A run of a stage in a process of its own; what is finished and unchanged stays."""
    path = run_dir.with_suffix(".yaml")
    path.write_text(json.dumps({"run_dir": str(run_dir), **config}, indent=1))
    code = subprocess.run([sys.executable, "-m", "rlhf", name, "-c", str(path), "--resume", "--overwrite"], check=False)
    if code.returncode:
        raise SystemExit(code.returncode)
    return run_dir


def causal(data: str, out: Path, model: Path, sft_rate: float) -> Path:
    """Preferred responses, then comparisons, on a small causal model; returns the examination."""
    labelled = {"columns": {}, "form": "prompt-completion"} if data == "gsm8k" else {"form": "chosen"}
    dropped = {"max_dropped_fraction": 0.2}
    train = {"path": str(out / "train.jsonl"), **dropped}
    sft = stage(
        "sft",
        out / "sft",
        {
            "model": {"path": str(model)},
            "data": {**train, **labelled},
            "epochs": 3,
            "min_end_token_rate": 0.0,
            "max_length": MAX_LENGTH,
            "optim": {"learning_rate": sft_rate},
            "batch": {"batch_size": 16, "micro_batch_size": 4},
            "sampling": {"max_new_tokens": 224},
            "lora": {"train_tokens": [AutoTokenizer.from_pretrained(model).eos_token]},
        },
    )
    reward = stage(
        "train-rm",
        out / "train-rm",
        {
            "policy": str(sft),
            "data": {**train, "max_dropped_fraction": 1.0},
            "epochs": 3,
            "max_length": MAX_LENGTH,
            "optim": {"learning_rate": 1e-3},
            "loss": "outcome" if data == "gsm8k" else "bradley_terry",
            "sampling": {"max_new_tokens": 224},
            "batch": {"batch_size": 16, "micro_batch_size": 4},
            "standardise_samples": 128,
        },
    )
    return examine(out, "causal", {"reward": str(reward)})


def examine(out: Path, name: str, subject: Row) -> Path:
    test = {"path": str(out / "test.jsonl"), "max_dropped_fraction": 1.0}
    config = {**subject, "data": test, "max_length": MAX_LENGTH, "probes": {"num_prompts": 0}}
    return stage("eval-rm", out / f"eval-{name}", config)


def encoder(out: Path, model: Path) -> Path:
    """Pooler and logit of an encoder, by Bradley-Terry on what it makes of the training pairs; the examination."""
    target = out / "encoder"
    if not (target / "config.json").is_file():
        torch.manual_seed(0)
        fresh = AutoModelForSequenceClassification.from_pretrained(model, num_labels=1)
        fresh.save_pretrained(target)
        AutoTokenizer.from_pretrained(model).save_pretrained(target)
        _train_head(target, comparisons(out / "train.jsonl"))
    return examine(out, "encoder", {"model": {"path": str(target), "too_long": "cut_prompt"}})


def _train_head(target: Path, records: Sequence[Comparison]) -> None:
    opened = sequence_classifier.load(ClassifierSection(path=str(target)), torch.device("cpu"))
    model, kept, features = opened.model, [], []
    for record in progress.track(records, "Encoding", len(records)):
        readings = [opened.reader.read(record.prompt, text, True) for text in record.responses]
        if max(len(one.ids) for one in readings) <= MAX_LENGTH:
            kept.append(record)
            features.append(torch.stack([_first_state(model, one) for one in readings]))
    trained = [*model.bert.pooler.parameters(), *model.classifier.parameters()]
    for parameter in trained:
        parameter.requires_grad_(True)
    batches = max(1, len(kept) // 16)
    optimizer = Optimizer(trained, 5e-4, EPOCHS * batches, weight_decay=0.01, warmup_ratio=0.05, schedule="linear")
    for _ in range(EPOCHS):
        order = torch.randperm(len(kept)).tolist()
        for chosen in (order[start::batches] for start in range(batches)):
            scores = [model.classifier(model.bert.pooler(features[index][:, None]))[:, 0] for index in chosen]
            bradley_terry([kept[index] for index in chosen], scores).loss.mean().backward()
            optimizer.step("encoder")
    model.save_pretrained(target)
    progress.console.print(f"{target}: trained on {len(kept)} of {len(records)} prompts, the others are too long.")


@torch.no_grad()
def _first_state(model: Any, reading: Reading) -> torch.Tensor:
    """[d] what the encoder makes of the first token, which its pooler reads."""
    found = model.bert(input_ids=torch.tensor([reading.ids]), token_type_ids=torch.tensor([reading.types]))
    return found.last_hidden_state[0, 0]  # type: ignore[no-any-return]


def figures_of(run: Path) -> Row:
    found = json.loads((run / artifacts.EXAMINATION).read_text("utf-8"))
    return {key: found[key] for key in ("comparisons", "prompts", "rows", "accuracy", "accuracy_over_length")}


def report(chosen: argparse.Namespace) -> Row:
    """Every data set on every backbone."""
    found: Row = {}
    for name in DATA:
        source, out = getattr(chosen, name), chosen.out / name
        if source is None:
            continue
        counts = prepare(name, source, out, chosen.characters, chosen.limit)
        found[name] = {"counts": counts, "length": length_alone(out), "backbones": {}}
        if chosen.llama:
            found[name]["backbones"]["llama"] = figures_of(causal(name, out, chosen.llama, chosen.sft_learning_rate))
        if chosen.encoder:
            found[name]["backbones"]["encoder"] = figures_of(encoder(out, chosen.encoder))
    return found


def show(found: Row) -> None:
    rows = []
    for name, one in found.items():
        length = one["length"]
        for backbone, said in one["backbones"].items():
            rows.append(
                (
                    name,
                    backbone,
                    str(one["counts"]["train"]),
                    f"{said['comparisons']} of {said['prompts']} prompts",
                    f"{_shown(length['accuracy'])} ({length['prefers']})",
                    _shown(said["accuracy"]),
                    _shown(said["accuracy_over_length"]),
                )
            )
    columns = ("data", "backbone", "rows trained on", "held-out comparisons", "length alone", "accuracy", "over length")
    progress.show(progress.table("Real data, real backbones", columns, rows))


def _shown(figure: Row) -> str:
    return f"{figure['estimate']:.3f} [{figure['ci95'][0]:.3f}, {figure['ci95'][1]:.3f}]"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in DATA:
        parser.add_argument(f"--{name}", type=Path, help="JSONL file")
    parser.add_argument("--llama", type=Path, help="directory of a small causal model")
    parser.add_argument("--encoder", type=Path, help="directory of a BERT")
    parser.add_argument("--out", type=Path, default=Path("runs/real"))
    parser.add_argument("--characters", type=int, default=1000, help="of a prompt and its longest response")
    parser.add_argument("--sft-learning-rate", type=float, default=1e-3, help="higher where no sample learns to end")
    parser.add_argument("--limit", type=int, help="prompts (or trees) of each data set")
    chosen = parser.parse_args()
    progress.log_to_console(quiet=True)
    found = report(chosen)
    storage.write_json(chosen.out / "report.json", found)
    show(found)


if __name__ == "__main__":
    main()
