"""What is taken off a score for length: the fit, its effect on other prompts, and that all scorers do the same."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy
import pytest
import tiny
import torch
from sklearn.linear_model import LogisticRegression

from rlhf.config.rewards import RunReward
from rlhf.data.batches import PassSize
from rlhf.errors import RlhfError
from rlhf.evaluation import figures, lengths
from rlhf.evaluation.reward import Pairs, Responses
from rlhf.metrics import length_effect
from rlhf.models import open_base
from rlhf.models.roles import SharedBase
from rlhf.preflight import examined
from rlhf.preflight.examined import LengthCalibration
from rlhf.records import Message
from rlhf.runs import artifacts
from rlhf.scoring import open_scorer
from rlhf.scoring.length_correction import LengthCorrected
from rlhf.scoring.open_scorer import Host
from rlhf.scoring.scorer import Sample, Scores

HOW = figures.FigureSettings(num_bins=5, num_resamples=100, seed=0, fit_fraction=0.4)


def draw(size, asked=0.0, paid=0.05, seed=0):
    """Quality and length of two responses; the judge asks for ``asked`` a token, the score pays ``paid``."""
    generator = numpy.random.default_rng(seed)
    quality, tokens = generator.normal(0, 1, (size, 2)), generator.integers(5, 60, (size, 2)).astype(float)
    gap = quality[:, 0] - quality[:, 1] + asked * (tokens[:, 0] - tokens[:, 1])
    first = generator.random(size) < 1 / (1 + numpy.exp(-gap))
    sign = numpy.where(first, 1.0, -1.0)
    return quality + paid * tokens, tokens, sign


def test_the_excess_is_that_of_a_logistic_regression_without_intercept():
    scores, tokens, sign = draw(400)
    d, g = sign * (scores[:, 0] - scores[:, 1]), sign * (tokens[:, 0] - tokens[:, 1])
    scales = numpy.sqrt((d**2).mean()), numpy.sqrt((g**2).mean())
    rows = numpy.stack([d / scales[0], g / scales[1]], 1)
    model = LogisticRegression(fit_intercept=False, C=100.0, tol=1e-10)
    model.fit(numpy.vstack([rows, -rows]), [1] * 400 + [0] * 400, sample_weight=[0.5] * 800)
    a, b = model.coef_[0] / scales
    assert length_effect.excess(d, g, numpy.ones(400)) == pytest.approx(-b / a, rel=1e-3)
    twice = numpy.repeat(numpy.arange(400), 2)
    weights = 2 * numpy.ones(400)
    assert length_effect.excess(d, g, weights) == pytest.approx(
        length_effect.excess(d[twice], g[twice], numpy.ones(800))
    )
    assert math.isnan(length_effect.excess(-d, 0 * g, numpy.ones(400))) and math.isnan(
        length_effect.excess(-d, g, numpy.ones(400))
    )


@pytest.mark.parametrize("asked, paid", [(0.0, 0.05), (0.02, 0.05), (0.03, 0.0)])
def test_what_people_ask_for_stays_and_what_is_paid_beyond_it_goes(asked, paid):
    scores, tokens, sign = draw(6000, asked, paid)
    d, g = sign * (scores[:, 0] - scores[:, 1]), sign * (tokens[:, 0] - tokens[:, 1])
    assert length_effect.excess(d, g, numpy.ones(len(d))) == pytest.approx(paid - asked, abs=0.005)


def test_the_effect_is_measured_on_prompts_that_it_was_not_fitted_on():
    scores, tokens, sign = draw(800)
    d, g = sign * (scores[:, 0] - scores[:, 1]), sign * (tokens[:, 0] - tokens[:, 1])
    keys = [f"p {n}" for n in range(800)]
    found = Pairs(d, g, keys, 0, numpy.full(800, numpy.nan), [None] * 800, ["f"] * 800)
    both = [key for key in keys for _ in range(2)]
    preferences = numpy.stack([sign, -sign], 1).ravel()
    responses = Responses(scores.ravel(), tokens.ravel(), preferences, both)
    report = lengths.report(found, responses, 2.0, HOW)
    fitted = figures.split(keys, 0.4, 0)
    coef = length_effect.excess(d[fitted], g[fitted], numpy.ones(fitted.sum()))
    assert report["coef"] == pytest.approx(coef / 2) and report["ci95"][0] < 0.025 < report["ci95"][1]
    assert (report["fitted_on"], report["measured_on"]) == (fitted.sum(), (~fitted).sum())
    assert report["mean_length"] == pytest.approx(tokens[fitted].mean())
    rest = d[~fitted], (d - coef * g)[~fitted]
    for when, values in zip(("before", "after"), rest, strict=True):
        assert report[when]["accuracy"]["estimate"] == pytest.approx((values > 0).mean())
        assert report[when]["negative_log_likelihood"]["estimate"] == pytest.approx(
            numpy.log1p(numpy.exp(-values)).mean()
        )
    gained = report["accuracy_gained"]
    assert gained["estimate"] == pytest.approx((rest[1] > 0).mean() - (rest[0] > 0).mean()) and gained["ci95"][0] > 0
    assert report["before"]["length_correlation"]["estimate"] > 0.4
    assert abs(report["after"]["length_correlation"]["estimate"]) < 0.1
    equal = Pairs(d, 0 * g, keys, 0, found.margins, found.annotators, found.sources)
    assert lengths.report(equal, responses, 1.0, HOW) is None


class Fixed:
    def score(self, samples):
        return Scores(torch.tensor([1.0, 2.0]), torch.tensor([[0.0, 2.0], [1.0, 3.0]]), {"score": torch.zeros(2)})


def test_the_same_is_taken_off_a_score_and_each_of_its_members():
    samples = [Sample((Message("user", "p"),), "r", [1], [2] * n, True, [2] * n) for n in (3, 7)]
    found = LengthCorrected(Fixed(), LengthCalibration(0.5, 5.0)).score(samples)
    assert found.mean.tolist() == [2.0, 1.0] and found.members.tolist() == [[1.0, 3.0], [0.0, 2.0]]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    where = tmp_path_factory.mktemp("lengths")
    tiny.finished_sft(where)
    rows = [
        {"prompt": f"hi {n}", "chosen": f"ok {'x' * (n % 7)}{n}", "rejected": f"no {'y' * (n % 5)}{n}"}
        for n in range(40)
    ]
    (where / "rows.jsonl").write_text("".join(json.dumps(one) + "\n" for one in rows))
    return where


REWARD = {
    "policy": "runs/sft", "data": {"path": "rows.jsonl"}, "max_length": 64, "epochs": 4, "holdout_fraction": 0.1,
    "standardise_samples": 8, "optim": {"learning_rate": 1e-2}, "batch": {"batch_size": 8, "micro_batch_size": 8},
    "sampling": {"max_new_tokens": 6},
}  # fmt: skip
EXAMINED = {"data": {"path": "rows.jsonl"}, "max_length": 64, "num_resamples": 100, "probes": {"num_prompts": 0}}


def rows_of(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def test_score_ppo_and_compare_take_the_same_off_and_only_for_the_reward_that_was_examined(home, here, monkeypatch):
    monkeypatch.chdir(home)

    def run(stage, name, config):
        Path(f"{name}.yaml").write_text(json.dumps({**config, "run_dir": f"runs/{name}"}))
        code, said = here(stage, "-c", f"{name}.yaml")
        assert code == 0, said
        return said

    run("train-rm", "rm", {**REWARD, "members": 2})
    run("eval-rm", "exam", {**EXAMINED, "reward": "runs/rm"})
    said = Path("runs/exam/figures.txt").read_text()
    assert "length calibration: taken off a token" in said and "Kendall's tau-b and NDCG" in said
    report = json.loads(Path("runs/exam/eval.json").read_text())
    known = report["length_calibration"]
    assert known["coef"] and report["ranking"] is None
    given = [{"prompt": f"hi {n}", "response": "ok " + "z" * n} for n in range(6)]
    Path("given.jsonl").write_text("".join(json.dumps(one) + "\n" for one in given))
    for name in ("rm", "exam"):
        assert here("score", f"runs/{name}", "--in", "given.jsonl", "--out", f"{name}.jsonl")[0] == 0
    plain, corrected = rows_of("rm.jsonl"), rows_of("exam.jsonl")
    for n, (one, other) in enumerate(zip(plain, corrected, strict=True)):
        taken = known["coef"] * (3 + n + 1 - known["mean_length"])  # bytes are tokens, and one is the end
        assert one["score"] - other["score"] == pytest.approx(taken, abs=1e-5)
        assert one["disagreement"] == pytest.approx(other["disagreement"], abs=1e-6)
    source = RunReward(run="runs/rm", length_calibration="runs/exam", aggregate="min", reference_samples=0)
    manifest = artifacts.read("runs/rm")
    base = open_base.reopen_base(manifest, torch.device("cpu"))
    chat = base.chat
    samples = []
    for one in given:
        prompt = (Message("user", one["prompt"]),)
        ids = [*chat.response_ids(prompt, one["response"]), chat.end_id]
        samples.append(Sample(prompt, one["response"], chat.prompt_ids(prompt), ids, True, ids))
    found = open_scorer.open_source(source, "reward/0", manifest, Host(base, SharedBase(base), PassSize(4))).score(
        samples
    )
    assert found.mean.tolist() == pytest.approx([min(one["members"]) for one in corrected], abs=1e-5)
    code, said = here("compare", "runs/sft", "runs/sft", "--prompts", "given.jsonl", "--reward", "runs/exam", "--json")
    assert code == 0, said

    run("train-rm", "other", {**REWARD, "seed": 1})
    ppo = {
        "policy": "runs/sft",
        "prompts": {"path": "rows.jsonl", "max_tokens": 32},
        "steps": 1,
        "report_to": "none",
        "rewards": [{"run": "runs/other", "length_calibration": "runs/exam"}],
        "value": {"pretrain_steps": 0},
        "batch": {"batch_size": 4, "minibatch_size": 4, "micro_batch_size": 4},
        "sampling": {"max_new_tokens": 6},
    }
    Path("ppo.yaml").write_text(json.dumps(ppo))
    code, said = here("ppo", "-c", "ppo.yaml")
    assert code == 5 and "CKP011" in said and "length_calibration: runs/exam" in said
    Path("ppo.yaml").write_text(json.dumps({**ppo, "rewards": [{"run": "runs/rm", "length_calibration": "runs/exam"}]}))
    code, said = here("ppo", "-c", "ppo.yaml")
    assert code == 0, said
    assert "rewards.0.length_calibration" in artifacts.read("runs/ppo").parents

    assert here("export", "runs/other", "classifier")[0] == 0
    run("eval-rm", "outside", {**EXAMINED, "model": {"path": "classifier"}})
    model = {"model": {"path": "classifier"}}
    one, other = (
        open_scorer.open_source(tiny.reward({**model, **more}), "r", None, Host(base, None, PassSize(4)))
        .score(samples)
        .mean
        for more in ({}, {"length_calibration": "runs/outside"})
    )
    outside = examined.length_calibration("runs/outside")
    wanted = [outside.coef * (3 + n + 1 - outside.mean_length) for n in range(6)]
    assert (one - other).tolist() == pytest.approx(wanted, abs=1e-5) and outside.coef
    code, said = here("score", "runs/outside", "--in", "given.jsonl")
    assert code == 5 and "of no single one" in said


@pytest.mark.parametrize("source", [{"function": "a:b"}, {"runs": ["a", "b"]}, {"url": "http://localhost:1"}])
def test_only_what_can_be_examined_has_a_length_calibration(source):
    with pytest.raises(ValueError, match="length_calibration is of one run or one model"):
        tiny.reward({**source, "length_calibration": "runs/exam"})


def test_an_examination_that_fitted_nothing_is_refused(tmp_path):
    (tmp_path / "eval.json").write_text('{"length_calibration": null}')
    with pytest.raises(RlhfError, match="CKP013.*no length calibration"):
        examined.length_calibration(str(tmp_path))
