"""Learning curves: nested shares, the fitted law and its step to the next doubling, and the command."""

from __future__ import annotations

import json
import re
import sys
from itertools import pairwise
from pathlib import Path

import numpy
import pytest
import tiny

from rlhf import cli
from rlhf.commands import learning_curve, pipeline
from rlhf.metrics import learning_curve_fit as curve
from rlhf.metrics.learning_curve_fit import Held
from rlhf.records import Message, Prompt, first_share, split_by_prompt
from rlhf.runs import artifacts

AMOUNTS = (100.0, 200.0, 400.0, 800.0)


def test_shares_are_nested_by_prompt_whatever_the_order_of_the_rows():
    records = [Prompt((Message("user", f"p {n // 2}"),), f"f:{n}") for n in range(200)]
    parts = [first_share(records, share, 3) for share in (0.125, 0.25, 0.5, 1.0)]
    assert [len(part) for part in parts] == [24, 50, 100, 200] and first_share(records, None, 3) == records
    for small, large in pairwise(parts):
        assert set(small) < set(large)
    assert set(first_share(records[::-1], 0.25, 3)) == set(parts[1]) != set(first_share(records, 0.25, 4))
    rest, _ = split_by_prompt(records, 0.5, 3)
    assert 10 < len(set(first_share(records, 0.5, 3)) & set(rest)) < 90


@pytest.mark.parametrize("floor, scale, exponent", [(0.2, 1.5, 0.5), (0.0, 0.9, 0.2), (0.1, 0.0, 0.5)])
def test_a_curve_of_the_law_is_found_and_its_next_doubling_predicted(floor, scale, exponent):
    def accuracy(n):
        return 1 - floor - scale * n**-exponent

    law = curve.fit(AMOUNTS, [accuracy(n) for n in AMOUNTS])
    assert law.accuracy(800.0)[0] == pytest.approx(accuracy(800.0), abs=1e-6)
    gain = curve.gain_of_doubling(law, 800.0)[0]
    assert gain == pytest.approx(accuracy(1600.0) - accuracy(800.0), abs=1e-6)
    if scale:
        assert law.exponent[0] == pytest.approx(exponent) and law.scale[0] == pytest.approx(scale, rel=1e-6)


def test_the_fit_is_the_least_squares_of_its_grid_and_floors_are_never_negative():
    generator = numpy.random.default_rng(0)
    values = 0.7 + 0.03 * numpy.arange(4) + generator.normal(0, 0.02, (5, 4))
    law = curve.fit(AMOUNTS, values)
    for row in range(5):
        own = ((values[row] - [law.accuracy(n)[row] for n in AMOUNTS]) ** 2).sum()
        for power in (0.05, 0.3, 1.0):
            columns = numpy.stack([numpy.ones(4), numpy.array(AMOUNTS) ** -power], 1)
            found, *_ = numpy.linalg.lstsq(columns, 1 - values[row], rcond=None)
            if found[0] >= 0:
                assert own <= ((1 - values[row] - columns @ found) ** 2).sum() + 1e-9
    assert (law.floor >= 0).all()
    steep = curve.fit(AMOUNTS, [0.2, 0.5, 0.8, 1.0])
    assert steep.floor[0] == 0
    for wrong in ((1.0, 2.0), (1.0, 1.0, 2.0)):
        with pytest.raises(ValueError, match="growing amounts"):
            curve.fit(wrong, numpy.zeros(len(wrong)))


def test_resamples_draw_the_same_prompts_for_every_amount_and_seeds_too():
    generator = numpy.random.default_rng(1)
    held = Held((generator.random((3, 300)) < 0.7).astype(float) * 2, numpy.full(300, 2.0))
    draws = curve.resampled([held], 1000, 0)
    own = held.right / 2
    assert curve.accuracies([held]) == pytest.approx(own.mean(1))
    assert draws.std(0) == pytest.approx(own.std(1) / 300**0.5, rel=0.1)
    gap = own[2] - own[1]
    assert (draws[:, 2] - draws[:, 1]).std() == pytest.approx(gap.std() / 300**0.5, rel=0.1)
    sure, wrong = Held(numpy.full((3, 9), 1.0), numpy.ones(9)), Held(numpy.zeros((3, 9)), numpy.ones(9))
    assert set(curve.resampled([sure, wrong], 100, 0)[:, 0]) == {0.0, 0.5, 1.0}


@pytest.mark.parametrize(
    "low, high, said",
    [
        (0.002, 0.03, "more labels help"),
        (-0.01, 0.004, "less than a point"),
        (0.001, 0.004, "less than a point"),
        (-0.01, 0.03, "not told apart"),
    ],
)
def test_the_verdict_follows_the_interval(low, high, said):
    gain = {"estimate": (low + high) / 2, "ci95": [low, high]}
    found = learning_curve.verdict(gain, 0.8, 3)
    assert "One seed" not in found and learning_curve.verdict(gain, 0.8, 1).startswith(f"{found} One seed")
    assert said in found and f"[{low:+.3f}, {high:+.3f}] to the accuracy of 0.800" in found


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A working directory with an SFT run, pairs and a config; stages run in this process instead of their own."""
    tiny.finished_sft(tmp_path)
    rows = [{"prompt": f"hi {n}", "chosen": f"ok {n}", "rejected": f"no {n}"} for n in range(60)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(one) + "\n" for one in rows))
    (tmp_path / "rm.yaml").write_text(
        json.dumps(
            {
                "policy": "runs/sft",
                "data": {"path": "rows.jsonl"},
                "max_length": 64,
                "epochs": 2,
                "holdout_fraction": 0.2,
                "standardise_samples": 8,
                "optim": {"learning_rate": 1e-2},
                "sampling": {"max_new_tokens": 6},
                "batch": {"batch_size": 4, "micro_batch_size": 4},
            }
        )
    )
    monkeypatch.chdir(tmp_path)
    started = []

    def in_this_process(command):
        started.append(command)
        with monkeypatch.context() as patch, pytest.raises(SystemExit) as stop:
            patch.setattr(sys, "argv", ["rlhf", *command[3:]])
            cli.main()
        return stop.value.code

    monkeypatch.setattr(pipeline, "_in_its_own_process", in_this_process)
    return started


def test_a_learning_curve_is_ordinary_runs_and_goes_on_with_what_is_missing(home, here):
    command = ("learning-curve", "-c", "rm.yaml", "--shares", "0.125,0.5,1", "--out", "curve", "--resamples", "100")
    code, said = here(*command)
    assert code == 0 and "Learning curve" in said and "Doubling the labels is predicted to add" in said, said
    report = json.loads(Path("curve/learning-curve.json").read_text())
    assert [row["prompts"] for row in report["curve"]] == [6, 24, 48] and report["held_out_prompts"] == [12]
    keys = []
    for row in report["curve"]:
        run = Path(row["run_dirs"][0])
        outcomes = [json.loads(line) for line in (run / "samples/held_out.jsonl").read_text().splitlines()]
        keys.append([one["prompt"] for one in outcomes])
        metrics = artifacts.read(run, "reward").metrics
        assert row["accuracy"]["estimate"] == pytest.approx(metrics["eval/accuracy"]) == row["by_seed"][0]
        assert numpy.mean([one["right"] for one in outcomes]) == pytest.approx(metrics["eval/accuracy"])
    assert keys[0] == keys[1] == keys[2] and Path("curve/learning-curve.png").stat().st_size > 0
    assert len(home) == 3
    (Path(report["curve"][1]["run_dirs"][0]) / "manifest.json").unlink()
    code, said = here(*command, "--json")
    assert code == 0 and json.loads(said[said.index('{"curve"') :]) == report
    assert len(home) == 4 and "--set=train_fraction=0.5" in home[3]


@pytest.mark.parametrize(
    "more, said",
    [
        (("--shares", "0.5,1"), "CFG005.*need 3 or more growing shares"),
        (("--shares", "0.5,0.25,1"), "CFG005.*growing"),
        (("--shares", "a,b,c"), "CFG005.*'a' is no number"),
        (("--seeds", "1.5"), "CFG005.*'1.5' is no number"),
        (("--set", "train_fraction=0.5"), "CFG005.*is what the shares are"),
        (("--shares", "0.05,0.5,1"), "DAT052.*has 2 prompts, and a batch takes 4"),
    ],
)
def test_shares_that_make_no_curve_are_refused_before_anything_is_trained(home, here, more, said):
    code, shown = here("learning-curve", "-c", "rm.yaml", "--out", "curve", *more)
    assert code in (2, 3) and not home and not Path("curve").exists()
    assert re.search(said, shown, re.S), shown
