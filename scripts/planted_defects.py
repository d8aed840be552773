"""Does the examination find what is wrong with a reward model? Defects are planted in labels of the embedded world.

    python scripts/planted_defects.py train [--out runs/defects] [--part 0/1]
    python scripts/planted_defects.py examine ...      # eval-rm on held-out labels of the same making
    python scripts/planted_defects.py calibrate ...    # what clean models of the seeds for that show in each probe
    python scripts/planted_defects.py report ...       # found and passed by defect and dose, out/report.json
    python scripts/planted_defects.py keep ...         # the figures of all into tests/golden, judged anew by the tests,
                                                       # and the rows of the table in docs/reward-models.md

Every model is small (600 rankings, one pass), has data and training of its own seed, and is made once: what stands
there is not made again. Bounds stand in configs/eval-rm.yaml, set from ``calibrate`` alone; found means that a figure
of ``FINDS`` failed, and where ``NAMED`` has a name, that it named it.

Defects: ``length`` adds so much gold for each ten words before the judge ranks; ``flips`` reverses so large a share of
the rankings, so that each comparison is wrong with that probability; ``careless``: one annotator of five ranks so large
a share of his rankings at random. Others: planted_labels.py.
"""

from __future__ import annotations

import argparse
import gzip
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from planted_labels import ANNOTATORS, PLANTS, Case, rankings

from rlhf.config import load
from rlhf.config.examination import ThresholdSection
from rlhf.config.stages import EvalRmConfig
from rlhf.evaluation import verdicts
from rlhf.runs import artifacts, progress, run_directory, storage
from rlhf.stages import starting
from rlhf.stages.registry import STAGES
from rlhf.stages.starting import Start

ROOT = Path(__file__).resolve().parent.parent
KEPT = ROOT / "tests/golden/planted_defects.json.gz"
TRAINED, EXAMINED, PROBED, NUM_SFT = 600, 300, 80, 5
UNPROBED = ("flips", "careless")  # their labels pay for nothing new
DOSES = {"length": (0.05, 0.1, 0.2, 0.3), "flips": (0.05, 0.1, 0.25, 0.35), "careless": (0.25, 0.5, 1.0)}
STATED = {"length": 0.2, "flips": 0.25, "careless": 1.0}
OTHERS = {
    **dict.fromkeys(PLANTS, 0.3), **dict.fromkeys(("refusal", "truncated", "rudeness", "sycophancy"), 0.6),
    "first_words": 8, "shuffled_prompts": 1.0, "brevity": 0.2,
}  # fmt: skip
FINDS = {
    **{name: (f"probes.{name}",) for name in PLANTS}, "rudeness": ("probes.own",),
    "length": ("probes.padding", "probes.caveats"), "careless": ("careless_annotator",),
    "flips": ("accuracy", "accuracy_when_sure", "label_noise"),
    "first_words": ("probes.truncated", "probes.padding", "probes.caveats", "probes.repetition"),
    "shuffled_prompts": ("probes.wrong_prompt",), "brevity": ("probes.truncated", "length_correlation"),
}  # fmt: skip
NAMED = {"careless": ANNOTATORS[0], "rudeness": "rude"}
CALIBRATION, CLEAN_CALIBRATION = range(5), range(8)
FOUND, PASSED, DOSED, TRIED = range(10, 30), range(10, 50), range(10, 13), range(10, 12)
SMALL = (
    "epochs=1",
    "batch.batch_size=8",
    "batch.micro_batch_size=8",
    "holdout_fraction=0.02",
    "standardise_samples=32",
)
JUDGED = (
    "accuracy", "accuracy_when_sure", "accuracy_over_length", "temperature", "label_noise", "length_correlation",
)  # fmt: skip


def cases() -> Iterator[Case]:
    """Models that bounds were set on, then those that are reported: other defects, stated doses, clean ones, doses."""
    for seed in CALIBRATION:
        yield Case("clean", 0.0, seed)
        yield from (Case(defect, dose, seed) for defect, dose in STATED.items())
    yield from (Case("clean", 0.0, seed) for seed in CLEAN_CALIBRATION if seed not in CALIBRATION)
    yield from (Case(defect, dose, TRIED[0]) for defect, dose in OTHERS.items())
    for seed in FOUND:
        yield Case("clean", 0.0, seed)
        yield from (Case(defect, dose, seed) for defect, dose in STATED.items())
    yield from (Case("clean", 0.0, seed) for seed in PASSED if seed not in FOUND)
    for seed in DOSED:
        for defect, doses in DOSES.items():
            yield from (Case(defect, dose, seed) for dose in doses if dose != STATED[defect])
    yield from (Case(defect, dose, seed) for seed in TRIED[1:] for defect, dose in OTHERS.items())


def train(case: Case, out: Path) -> None:
    """The reward model of a case, in ``out/CASE/train-rm``."""
    policy = out / "sft" / str(case.seed % NUM_SFT)
    if not artifacts.is_finished(policy):
        _stage("sft", policy, [f"data.path=demo:demonstrations?seed={case.seed % NUM_SFT}"], case.seed % NUM_SFT)
    sets = [f"policy={policy}", f"data.path={_write(case, out, 'train', TRAINED)}", *SMALL]
    _stage("train-rm", out / case.name / "train-rm", sets, case.seed)


def examine(case: Case, out: Path) -> None:
    """Its examination, in ``out/CASE/eval-rm``."""
    if artifacts.is_finished(out / case.name / "eval-rm") or not artifacts.is_finished(out / case.name / "train-rm"):
        return
    sets = [
        f"reward={out / case.name / 'train-rm'}",
        f"data.path={_write(case, out, 'test', EXAMINED)}",
        f"probes.num_prompts={0 if case.defect in UNPROBED else PROBED}",
        "num_resamples=500",
    ]
    _stage("eval-rm", out / case.name / "eval-rm", sets, case.seed)


def examined(out: Path, of: Iterable[Case]) -> dict[str, dict[str, Any]]:
    """Of every case that was examined, the figures that are judged, to three digits behind the point."""
    found = {}
    for case in of:
        path = out / case.name / "eval-rm" / artifacts.EXAMINATION
        if artifacts.is_finished(path.parent):
            report = json.loads(path.read_text())
            annotators = {
                name: {"comparisons": row["comparisons"], "below_others": _short(row["below_others"])}
                for name, row in (report["accuracy_by_annotator"] or {}).items()
            }
            found[case.name] = {
                "prompts": report["prompts"],
                **{key: _short(report[key]) for key in JUDGED},
                "accuracy_by_annotator": annotators,
                "accuracy_by_source": None,
                "probes": {name: {"change": _short(row["change"])} for name, row in report["probes"].items()},
            }
    return found


def calibrate(found: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Each probe's change in the clean models of ``CLEAN_CALIBRATION``: mean, and the one nearest to paying."""
    reports = [found[Case("clean", 0.0, seed).name] for seed in CLEAN_CALIBRATION]
    rows = []
    for name in reports[0]["probes"]:
        changes = [report["probes"][name]["change"]["estimate"] for report in reports]
        rows.append({"probe": name, "mean": sum(changes) / len(changes), "largest": max(changes)})
    return rows


def shipped() -> ThresholdSection:
    """The bounds of configs/eval-rm.yaml."""
    return load.load(EvalRmConfig, ROOT / STAGES["eval-rm"].default_config).thresholds


@dataclass(frozen=True)
class Outcome:
    """What the shipped bounds make of one model: the failures that are the defect's own, and the whole verdict."""

    seed: int
    finds: list[str]
    verdict: str


def outcome(case: Case, figures: Mapping[str, Any]) -> Outcome:
    judged = verdicts.judge(figures, shipped())
    finds = [
        one.key
        for one in judged
        if one.verdict == verdicts.FAIL
        and one.key in FINDS.get(case.defect, ())
        and NAMED.get(case.defect, "") in one.says
    ]
    return Outcome(case.seed, finds, verdicts.overall(judged))


def response(found: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """By defect and dose, dose 0 being the clean models: how often it was found, and the mean of its first figure."""
    rows = []
    for defect in DOSES:
        for dose in (0.0, *DOSES[defect]):
            name = defect if dose else "clean"
            figures = [
                found[one.name]
                for one in cases()
                if (one.defect, one.dose) == (name, dose) and one.name in found and one.seed >= FOUND[0]
            ]
            if figures:
                values = [_first(defect, one) for one in figures]
                hits = sum(bool(outcome(Case(defect, dose, 0), one).finds) for one in figures)
                rows.append(
                    {
                        "defect": defect,
                        "dose": dose,
                        "models": len(figures),
                        "found": hits,
                        "figure": FINDS[defect][0],
                        "mean": sum(values) / len(values),
                    }
                )
    return rows


def _first(defect: str, figures: Mapping[str, Any]) -> float:
    if defect == "careless":
        return float(figures["accuracy_by_annotator"][ANNOTATORS[0]]["below_others"]["estimate"])
    name = FINDS[defect][0]
    figure = figures["probes"][name.removeprefix("probes.")]["change"] if "." in name else figures[name]
    return float(figure["estimate"])


def report(found: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """How often each defect was found by its own figure, and models passed; seeds that bounds were set on left out."""
    outcomes: dict[tuple[str, float], list[Outcome]] = {}
    for case in cases():
        if case.name in found and case.seed >= FOUND[0]:
            outcomes.setdefault((case.defect, case.dose), []).append(outcome(case, found[case.name]))
    return [
        {
            "defect": defect,
            "dose": dose,
            "models": len(rows),
            "found": sum(bool(row.finds) for row in rows),
            "passed": sum(row.verdict == verdicts.PASS for row in rows),
            "failed": sum(row.verdict == verdicts.FAIL for row in rows),
            "by": {key: sum(key in row.finds for row in rows) for key in FINDS.get(defect, ())},
            "missed": [row.seed for row in rows if not row.finds],
            "not_passed": [row.seed for row in rows if row.verdict != verdicts.PASS],
        }
        for (defect, dose), rows in sorted(outcomes.items())
    ]


def markdown(found: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """The rows of the table in docs/reward-models.md: defect, dose, models, found and passed."""
    return [
        f"| {row['defect']} | {row['dose']:g} | {row['models']} | "
        f"{row['found'] if row['by'] else '-'} | {row['passed']} |"
        for row in report(found)
    ]


def kept() -> dict[str, dict[str, Any]]:
    """The figures of the study, as ``keep`` wrote them."""
    return dict(json.loads(gzip.decompress(KEPT.read_bytes())))


def _short(figure: Mapping[str, Any] | None) -> dict[str, Any] | None:
    if figure is None:
        return None
    return {"estimate": round(figure["estimate"], 3), "ci95": [round(value, 3) for value in figure["ci95"]]}


def _write(case: Case, out: Path, split: str, size: int) -> Path:
    path = out / case.name / f"{split}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    run_directory.write_samples(path, rankings(case, split, size))
    return path


def _stage(stage: str, run_dir: Path, sets: list[str], seed: int) -> None:
    """The shipped config of a stage with overrides, in this process; what is finished and unchanged stays."""
    path = ROOT / STAGES[stage].default_config
    starting.ready(STAGES[stage], path, [f"run_dir={run_dir}", f"seed={seed}", *sets]).run(Start(overwrite=True))


def _show(title: str, rows: list[dict[str, Any]]) -> None:
    shown = [tuple(f"{one:.2f}" if isinstance(one, float) else str(one) for one in row.values()) for row in rows]
    progress.show(progress.table(title, tuple(rows[0]), shown))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("train", "examine", "calibrate", "report", "keep"))
    parser.add_argument("--out", type=Path, default=Path("runs/defects"))
    parser.add_argument("--part", default="0/1", help="i/n: every n-th case from the i-th, to share the work")
    args = parser.parse_args()
    progress.log_to_console(quiet=True)
    index, count = map(int, args.part.split("/"))
    if args.what in ("train", "examine"):
        for case in list(cases())[index::count]:
            {"train": train, "examine": examine}[args.what](case, args.out)
    elif args.what == "keep":
        KEPT.write_bytes(gzip.compress(json.dumps(examined(args.out, cases()), sort_keys=True).encode(), mtime=0))
        print("\n".join(markdown(kept())))
    elif args.what == "calibrate":
        _show("Clean models", calibrate(examined(args.out, cases())))
    else:
        found = examined(args.out, cases())
        rows, doses = report(found), response(found)
        storage.write_json(args.out / "report.json", {"cases": rows, "doses": doses})
        _show("Planted defects", rows)
        _show("Dose and response", doses)


if __name__ == "__main__":
    main()
