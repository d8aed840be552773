"""The scripts that compare reward models, look at real data and measure an ensemble, at their smallest."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import numpy
import pytest

SCRIPTS = Path(__file__).parents[1] / "scripts"
sys.path.insert(0, str(SCRIPTS))

import benchmark_ensemble  # noqa: E402
import compare_rewards  # noqa: E402
import real_rewards  # noqa: E402
from measuring import Case  # noqa: E402


def measured(right, gold, ece):
    """What ``measure`` finds of one seed with two comparisons a prompt, for each variant, all but the first alike."""
    flat = {"estimate": ece, "ci95": [0.0, 1.0]}
    prompts = [f"p{index}" for index in range(len(gold[0]))]
    return {
        "variants": {
            name: {
                "accuracy": flat,
                "ece": flat,
                "ece_after": flat,
                "temperature": flat,
                "seconds": 2.0,
                "right": right[min(row, 1)],
                "of_prompts": [prompt for prompt in prompts for _ in range(2)],
                "prompts": prompts,
                "best_of_1": [0.0] * len(prompts),
                "best_of_16": gold[min(row, 1)],
            }
            for row, name in enumerate(compare_rewards.VARIANTS)
        }
    }


def test_differences_of_variants_are_paired_and_seeds_are_put_together():
    first = measured([[0, 1, 0, 1], [1, 1, 0, 1]], [[0.5, 3.5], [1.0, 4.0]], 0.1)
    second = measured([[1, 1, 0, 0], [1, 1, 1, 0]], [[2.0, 2.0], [2.0, 3.0]], 0.3)
    said = compare_rewards.report({0: first, 1: second})
    single, ensemble, *_ = compare_rewards.VARIANTS
    over = said["seeds"][0]["variants"][ensemble]["over_first"]
    assert over["best_of_16"] == {"estimate": 0.5, "ci95": [0.5, 0.5]}, "whatever prompts are drawn"
    assert over["accuracy"]["estimate"] == 0.25 and over["accuracy"]["ci95"] == [0.0, 0.5]
    together = said["together"]
    assert together[single]["accuracy"]["estimate"] == 0.5 and "over_first" not in together[single]
    assert together[ensemble]["over_first"]["best_of_16"]["estimate"] == pytest.approx((0.5 + 0.5 + 0 + 1) / 4)
    assert together[single]["ece"] == {"estimate": 0.2, "ci95": None}


@pytest.mark.slow
def test_variants_are_trained_measured_and_left_as_they_are(tmp_path, monkeypatch, capsys):
    sets = ["--set", "epochs=null", "steps=1", "standardise_samples=8", "batch.batch_size=4", "holdout_fraction=0.3"]
    arguments = ["compare_rewards.py", "--seeds", "7", "--out", str(tmp_path), "--rankings", "20", *sets]
    monkeypatch.chdir(SCRIPTS.parent)
    monkeypatch.setattr(sys, "argv", arguments)
    monkeypatch.setattr(compare_rewards.measure, "__defaults__", (3, 12))
    compare_rewards.main()
    times = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.safetensors")}
    times[tmp_path / "7/measured.json"] = (tmp_path / "7/measured.json").stat().st_mtime_ns
    found = json.loads((tmp_path / "7/measured.json").read_text())["variants"]
    for one in found.values():
        assert len(one["best_of_16"]) == 3 and len(one["right"]) == len(one["of_prompts"])
        assert one["accuracy"]["estimate"] == pytest.approx(numpy.mean(one["right"]))
    first, *others = (found[name]["best_of_1"] for name in compare_rewards.VARIANTS)
    assert len(others) == 2 and all(other == first for other in others), "the same samples"
    said = json.loads((tmp_path / "report.json").read_text())
    compare_rewards.main()
    assert {path: path.stat().st_mtime_ns for path in times} == times
    assert json.loads((tmp_path / "report.json").read_text()) == said


def test_conversations_are_read_and_length_alone_is_measured_on_other_prompts(tmp_path):
    prompt = "\n\nHuman: One?\n\nAssistant: Two.\n\nHuman: Three?\n\nAssistant:"
    row, tree = real_rewards.oasst({"prompt": prompt, "chosen": "a", "rejected": "b", "tree_id": "t"})
    turns = [(turn["role"], turn["content"]) for turn in row["prompt"]]
    assert turns == [("user", "One?"), ("assistant", "Two."), ("user", "Three?")] and tree == "t"
    rows = [{"prompt": f"p{n}", "chosen": "x" * (3 if n % 4 else 1), "rejected": "yy"} for n in range(80)]
    rows.append({"prompt": "q" * 50, "chosen": "x", "rejected": "y"})
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    counts = real_rewards.prepare("llmbar", tmp_path / "rows.jsonl", tmp_path / "out", 40, None)
    parts = {part: (tmp_path / f"out/{part}.jsonl").read_text().splitlines() for part in ("train", "test")}
    kept = {part: [json.loads(line)["prompt"] for line in lines] for part, lines in parts.items()}
    assert counts == {"rows": 81, "too_long": 1, "train": len(kept["train"]), "test": len(kept["test"])}
    assert sorted(kept["train"] + kept["test"]) == sorted(f"p{n}" for n in range(80)) and 12 < len(kept["test"]) < 36
    said = real_rewards.length_alone(tmp_path / "out")
    wanted = numpy.mean([int(name[1:]) % 4 > 0 for name in kept["test"]])
    assert said["prefers"] == "longer" and said["accuracy"]["estimate"] == pytest.approx(wanted)
    assert said["accuracy"]["ci95"][0] < wanted < said["accuracy"]["ci95"][1]


@pytest.mark.skipif("RLHF_REAL_REWARDS" not in os.environ, reason="RLHF_REAL_REWARDS names no data and backbones")
@pytest.mark.slow
def test_real_data_on_real_backbones(tmp_path, monkeypatch):
    """RLHF_REAL_REWARDS: arguments of scripts/real_rewards.py, such as ``--llmbar FILE --encoder DIR``."""
    arguments = [*os.environ["RLHF_REAL_REWARDS"].split(), "--limit", "60", "--out", str(tmp_path)]
    monkeypatch.chdir(SCRIPTS.parent)
    monkeypatch.setattr(sys, "argv", ["real_rewards.py", *arguments])
    real_rewards.main()
    for one in json.loads((tmp_path / "report.json").read_text()).values():
        for figure in (one["length"]["accuracy"], *(said["accuracy"] for said in one["backbones"].values())):
            assert 0 <= figure["ci95"][0] <= figure["estimate"] <= figure["ci95"][1] <= 1


def test_members_raise_the_peak_of_training_by_their_adapters_and_heads():
    case = Case("tiny", (32, 2, 4, 4, 48, 300), micro=2, prompt=24, response=8)
    roles, slots = benchmark_ensemble.ensemble(benchmark_ensemble.opened(case), 2)
    own = sum(parameter.nbytes for parameter in roles.trained_parameters(slots[0]))
    peaks = [benchmark_ensemble.training_peak(case, members) for members in (1, 3)]
    assert peaks[1] - peaks[0] == pytest.approx(2 * own, rel=0.02) and peaks[0] > 6 * own
