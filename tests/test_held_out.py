"""The held-out loss during training: the best step is used, an early stop ends it, and measuring changes no step."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import torch
import yaml
from peft import PeftModel
from transformers import AutoModelForCausalLM

from rlhf.commands import plan as planning
from rlhf.config.ppo_sections import MissingEosSection
from rlhf.config.stages import HeldOutSection, SftConfig
from rlhf.config.train_rm import RewardConfig
from rlhf.data.sources import load_comparisons, load_demonstrations
from rlhf.data.tokenised import Group
from rlhf.errors import RlhfError
from rlhf.hub.model_files import StoredTensor
from rlhf.losses.attribute_heads import Heads
from rlhf.models.base import load_base
from rlhf.models.heads import ScalarHead
from rlhf.models.roles import SharedBase
from rlhf.planning import clock
from rlhf.planning.clock import Speed
from rlhf.preflight import missing_ends, resources
from rlhf.records import Comparison, Judgement, Message, split_by_prompt
from rlhf.reward.member_step import Learner
from rlhf.reward.teacher import Teacher
from rlhf.runs import artifacts
from rlhf.runs.artifacts import Manifest
from rlhf.stages.sft import outcome as sft_outcome
from rlhf.stages.sft import spec as sft_spec
from rlhf.training import held_out

SFT = {
    "model": {"path": "m"}, "data": {"path": "rows.jsonl"}, "max_length": 64, "steps": 8, "holdout_fraction": 0.2,
    "min_end_token_rate": 0.0, "end_token_samples": 4, "save_every": 1, "keep_checkpoints": 9,
    "lora": {"r": 4, "dropout": 0.1, "train_tokens": ["<|im_end|>"]}, "optim": {"learning_rate": 0.1},
    "batch": {"batch_size": 4, "micro_batch_size": 2}, "sampling": {"max_new_tokens": 8},
}  # fmt: skip
REWARD = {
    "policy": "runs/sft", "data": {"path": "pairs.jsonl"}, "max_length": 64, "steps": 8, "holdout_fraction": 0.2,
    "standardise_samples": 8, "save_every": 1, "keep_checkpoints": 20, "optim": {"learning_rate": 5e-2},
    "batch": {"batch_size": 4, "micro_batch_size": 2}, "sampling": {"max_new_tokens": 8},
}  # fmt: skip


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A working directory with a tiny model, its SFT run, demonstrations and pairs."""
    monkeypatch.chdir(tmp_path)
    tiny.finished_sft(tmp_path)
    rows = [{"prompt": f"hi {n}", "completion": f"ok {n % 3}"} for n in range(30)]
    sides = [("ok", "no") if n % 3 else ("no", "ok") for n in range(30)]
    pairs = [{"prompt": f"hi {n}", "chosen": f"{a} {n}", "rejected": f"{b} {n}"} for n, (a, b) in enumerate(sides)]
    for name, found in (("rows", rows), ("pairs", pairs)):
        Path(f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in found))
    return tmp_path


def trained(here, stage, name, config, *args, code=0):
    """The run of a config, and what was said."""
    Path(f"{name}.yaml").write_text(yaml.safe_dump({"run_dir": f"runs/{name}", **config}))
    found, text = here(stage, "-c", f"{name}.yaml", *args)
    assert found == code, text
    return Path("runs") / name, text


def rows_of(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def fingerprint(run):
    """Every file of the result, the metrics without times, and what the manifest says of the steps."""
    kept = [{key: row[key] for key in row if not key.startswith(("time/", "memory/"))} for row in rows_of(run)]
    manifest = artifacts.read(run)
    return manifest.digest, kept, manifest.details


def goes_on(here, stage, run, step):
    """Whether a copy of the run that ended with checkpoint ``step`` goes on to the same end."""
    copy = run.with_name(f"{run.name}-cut-{step}")
    shutil.copytree(run, copy)
    (copy / "manifest.json").unlink()
    for path in copy.glob("checkpoints/step-*"):
        if int(path.name.split("-")[1]) > step:
            shutil.rmtree(path)
    for name in ("adapter", "model", "members", "head", "plots"):
        shutil.rmtree(copy / name, ignore_errors=True)
    code, text = here(stage, "-c", f"{run.name}.yaml", "--set", f"run_dir={copy}", "--resume")
    return code == 0 and f"Resumed from {copy}/checkpoints/step-{step}" in text and fingerprint(copy)


def test_a_curve_takes_the_earlier_of_equal_steps_and_never_one_that_is_not_a_number():
    curve = held_out.Curve(HeldOutSection(every=2, patience=3), 13)
    assert [step for step in range(14) if curve.is_due(step)] == [0, 2, 4, 6, 8, 10, 12, 13]
    losses = [2.0, 1.5, 1.5, math.nan, 1.4, math.inf, 1.4]
    assert [curve.add(2 * number, loss) for number, loss in enumerate(losses)] == [
        True,
        True,
        False,
        False,
        True,
        False,
        False,
    ]
    assert (curve.best_step, curve.best_loss, curve.start_loss, curve.stopped_early) == (8, 1.4, 2.0, False)
    again = held_out.Curve(HeldOutSection(every=2, patience=3), 14)
    again.load_state_dict(json.loads(json.dumps(curve.state_dict())))
    assert not again.add(13, 1.4) and again.stopped_early
    assert not curve.add(13, 1.4) and not curve.stopped_early  # its last step: it has not stopped before its end
    broken = held_out.Curve(HeldOutSection(every=1), 2)
    assert broken.add(0, math.nan) and broken.add(1, 7.0) and broken.best_step == 1


def loss_by_hand(run, config):
    """Nats a response token over the held-out rows, one at a time, from transformers' own logits in float64."""
    base = load_base("m")
    _, rows = split_by_prompt(load_demonstrations(config.data).records, config.holdout_fraction, config.seed)
    if config.lora:
        model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("m"), run / "adapter")
    else:
        model = AutoModelForCausalLM.from_pretrained(run / "model")
    total, count = 0.0, 0
    for row in rows:
        prompt = base.chat.prompt_ids(row.messages[:-1])
        answer = [*base.chat.response_ids(row.messages[:-1], row.messages[-1].content), base.chat.end_id]
        with torch.no_grad():
            logits = model.eval()(torch.tensor([prompt + answer])).logits[0].double()
        logprobs = logits.log_softmax(-1)[len(prompt) - 1 : -1]
        total -= float(logprobs[range(len(answer)), answer].sum())
        count += len(answer)
    return total / count


@pytest.mark.parametrize("lora", [SFT["lora"], None], ids=["adapter", "every weight"])
def test_sft_that_gets_worse_stops_early_and_its_best_step_is_the_result(home, here, lora):
    settings = {**SFT, "lora": lora, "steps": 20, "evaluation": {"every": 1, "patience": 3}}
    settings["optim"] = {"learning_rate": 0.1, "warmup_ratio": 0.3}
    run, text = trained(here, "sft", "early", settings)
    curve = {row["step"]: row["eval/held_out_loss"] for row in rows_of(run) if "eval/held_out_loss" in row}
    best = min(curve, key=curve.get)
    assert list(curve) == list(range(best + 4)) and 0 < best < 17
    assert all(curve[step] >= curve[best] for step in range(best + 1, best + 4))
    manifest = artifacts.read(run)
    wanted = {
        "use": "best",
        "used_step": best,
        "best_step": best,
        "best_loss": curve[best],
        "start_loss": curve[0],
        "last_step": best + 3,
        "num_measured": best + 4,
        "stopped_early": True,
    }
    assert manifest.details["held_out"] == [wanted] and manifest.details["steps"] == best + 3
    assert (
        manifest.metrics["eval/start_loss"] == manifest.metrics["eval/base_loss"] == pytest.approx(curve[0], abs=1e-5)
    )
    assert manifest.metrics["eval/loss"] == pytest.approx(curve[best], abs=1e-4)
    config = SftConfig.model_validate(settings)
    assert loss_by_hand(run, config) == pytest.approx(manifest.metrics["eval/loss"], abs=1e-4)
    label = f"optimistic: these rows also chose the step that is used, as the best of {best + 4} measured ones"
    assert manifest.details["held_out_figures"] == label and f"These held-out figures are {label}." in text
    assert "Training stops early: 3 measurements in a row without a new best (evaluation.patience: 3)" in text
    assert f"Step {best} of {best + 3} is used" in text and label in here("show", run)[1]
    assert (run / "plots/held_out.png").stat().st_size > 5000
    for step in (best - 1, best + 3) if lora else (best + 1,):
        assert goes_on(here, "sft", run, step) == fingerprint(run)


@pytest.mark.parametrize(
    ("stage", "config"),
    [
        ("sft", {**SFT, "runtime": {"gradient_checkpointing": True}, "require_improvement": False}),
        ("train-rm", {**REWARD, "length_coef": 0.1, "runtime": {"gradient_checkpointing": True}}),
    ],
    ids=["sft", "train-rm"],
)
def test_measuring_changes_no_step_and_adds_nothing_to_a_checkpoint_where_it_is_off(home, here, stage, config):
    config = {**config, "steps": 4, "use": "last", "save_every": None}
    plain, _ = trained(here, stage, "plain", config)
    watched, _ = trained(here, stage, "watched", {**config, "evaluation": {"every": 1}})
    first, second = artifacts.read(plain), artifacts.read(watched)
    assert first.digest == second.digest and "held_out" not in first.details
    rows = [
        {key: row[key] for key in row if key.startswith("train/")} for run in (plain, watched) for row in rows_of(run)
    ]
    rows = [row for row in rows if row]
    assert len(rows) == 8 and rows[:4] == rows[4:]
    entry, other = (json.loads((run / "checkpoints/step-4/checkpoint.json").read_text()) for run in (plain, watched))
    assert set(other["states"]) - set(entry["states"]) == {"held_out"}
    assert second.details["held_out"][0]["used_step"] == 4 and "held_out_figures" not in second.details
    assert not list(watched.glob("checkpoints/best-*")) and not (plain / "plots").exists()


def pair_loss_by_hand(member, config):
    """Mean of -log sigmoid(difference of raw scores) over the held-out pairs, from plain transformers and peft."""
    base, head = load_base("m"), ScalarHead.load(member / "head").double()
    _, records = split_by_prompt(load_comparisons(config.data).records, config.holdout_fraction, config.seed)
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("m"), member / "adapter").eval()
    losses = []
    for record in records:
        raw = []
        for text in record.responses:
            ids = [*base.chat.prompt_ids(record.prompt), *base.chat.response_ids(record.prompt, text), base.chat.end_id]
            with torch.no_grad():
                hidden = model(torch.tensor([ids]), output_hidden_states=True).hidden_states[-1][0, -1]
                raw.append(float(head.raw(hidden.double())))
        better = record.judgements[0]
        losses.append(math.log1p(math.exp(raw[better.second] - raw[better.first])))
    return sum(losses) / len(losses)


def test_each_member_has_its_own_best_step_and_its_own_early_stop(home, here):
    settings = {**REWARD, "members": 2, "centering_coef": 0.5, "evaluation": {"every": 2, "patience": 1}, "steps": 12}
    settings["ensemble"] = {"data": "folds"}
    run, text = trained(here, "train-rm", "two", settings)
    rows, manifest = rows_of(run), artifacts.read(run)
    entries = manifest.details["held_out"]
    assert any(entry["stopped_early"] for entry in entries)
    for index, entry in enumerate(entries):
        name = f"eval/held_out_loss_{index}"
        curve = {row["step"] - 12 * index: row[name] for row in rows if name in row}
        assert entry["best_step"] == min(curve, key=curve.get) == entry["used_step"]
        assert [entry["start_loss"], entry["last_step"]] == [curve[0], max(curve)]
        assert entry["stopped_early"] == (entry["last_step"] < 12)
        steps = [row["step"] - 12 * index for row in rows if row.get("train/member") == index]
        assert steps == list(range(1, entry["last_step"] + 1))
        member = artifacts.members_of(run)[index]
        found = pair_loss_by_hand(member, RewardConfig.model_validate(settings))
        assert found == pytest.approx(entry["best_loss"], abs=1e-4)
    assert manifest.details["held_out_figures"].startswith("optimistic") and "Member 1: Step" in text
    stop = entries[0]["last_step"]
    for step in (stop, 12 + entries[1]["last_step"] - 1):
        assert goes_on(here, "train-rm", run, step) == fingerprint(run)


def test_no_step_that_is_better_than_the_start_is_exit_7_of_a_finished_run(home, here):
    settings = {**SFT, "optim": {"learning_rate": 1.0}, "save_every": None}
    run, text = trained(here, "sft", "worse", settings, code=7)
    metrics = artifacts.read(run).metrics
    assert metrics["eval/loss"] > metrics["eval/start_loss"]
    assert f"error[GRD004] runs/worse: eval/loss: held-out loss {metrics['eval/loss']:.4f} nats a token" in text
    assert f"not below the {metrics['eval/start_loss']:.4f} of m, which training started from" in text
    assert "fewer epochs" in text and "evaluation.patience" in text and "Finished runs/worse" in text
    kept, text = trained(here, "sft", "start", {**settings, "evaluation": {"every": 4}}, code=7)
    assert artifacts.read(kept).details["held_out"][0]["used_step"] == 0
    same = pytest.approx(metrics["eval/start_loss"], rel=1e-6)  # logits of the rows that it trains are a product apart
    assert artifacts.read(kept).metrics["eval/loss"] == same


def manifest_of(rate=1.0, start=2.0, end=1.0, **details):
    metrics = {"eval/end_token_rate": rate, "eval/base_loss": 9.0, "eval/start_loss": start, "eval/loss": end}
    return Manifest("policy", "sft", 0, {}, metrics, 1.0, details=details)


def judged(manifest, **settings):
    config = SftConfig.model_validate({"data": {"path": "x"}, "steps": 3, **settings})
    return sft_spec.STAGE.gates(config, manifest)


def test_an_improvement_is_judged_from_the_manifest_against_what_training_started_from():
    assert judged(manifest_of()) == []
    for start, end in ((2.0, 2.0), (2.0, 3.0), (2.0, "nan"), (2.0, "inf")):
        assert [problem.code for problem in judged(manifest_of(start=start, end=end))] == ["GRD004"]
    worse = manifest_of(end=3.0)
    assert judged(worse, require_improvement=False) == judged(worse, steps=0) == []
    assert "the adapter runs/first" in judged(worse, adapter="runs/first")[0].what
    untouched = manifest_of(held_out=[{"used_step": 0}])
    assert [problem.code for problem in judged(untouched)] == ["GRD004"]
    old = Manifest("policy", "sft", 0, {}, {k: v for k, v in worse.metrics.items() if "start" not in k}, 1.0)
    assert judged(old) == judged(old, adapter="runs/first") == []
    old.metrics["eval/base_loss"] = 2.5
    assert [problem.code for problem in judged(old)] == ["GRD004"] and judged(old, adapter="runs/first") == []
    later = judged(worse, evaluation={"every": 1, "patience": 2})[0]
    assert "evaluation" not in later.fix and "lower optim.learning_rate" in later.fix


def ending(**changes):
    answers = {"num": 100, "num_longer": 0, "num_without_end": 0, "tokens_95_percent": 60, **changes.pop("answers", {})}
    return {
        "end_token": "<end>",
        "max_new_tokens": 64,
        "num_samples": 50,
        "end_row_untrained": False,
        "base_end_token": None,
        "num_base_end": 0,
        "answers": answers,
        **changes,
    }


LONG = {"num_longer": 47, "tokens_95_percent": 212}


CAUSES = {
    "answers": (0.4, {"answers": LONG}, ["47 of 100", "(47%) are longer", "max_new_tokens: 212, which holds 95%"]),
    "answers in part": (0.85, {"answers": {"num_longer": 9, "tokens_95_percent": 70}}, ["9 of 100"]),
    "row": (0.0, {"end_row_untrained": True}, ["is untrained, and stays frozen", "lora.train_tokens: ['<end>']"]),
    "cut": (0.1, {"answers": {"num_without_end": 100}}, ["100 of 100 answers", "lost '<end>' to", "too_long: drop"]),
    "other end": (0.2, {"base_end_token": "</s>", "num_base_end": 36}, ["36 of 50", "stop_tokens: ['</s>']"]),
    "training": (0.4, {"base_end_token_rate": 0.05}, ["m itself ends 5.0%", "more epochs", "for an instruct model"]),
    "unlearnt": (0.4, {"base_end_token_rate": 0.97}, ["97.0% of the responses of m itself end", "fewer epochs"]),
    "unknown": (0.4, {"answers": {"num_longer": 3}}, ["nothing measured here names a cause", "more epochs"]),
}
SAYS = {
    "answers": "are longer", "answers in part": "are longer", "row": "stays frozen", "cut": "to max_length",
    "other end": "the base's own end", "training": "not taught", "unlearnt": "unlearnt", "unknown": "nothing measured",
}  # fmt: skip


@pytest.mark.parametrize("cause", CAUSES)
def test_the_advice_on_a_policy_that_does_not_end_names_what_the_figures_support_and_nothing_else(cause):
    rate, seen, named = CAUSES[cause]
    (problem,) = judged(manifest_of(rate, ending=ending(**seen)), model={"path": "m"})
    said = str(problem)
    assert problem.code == "GRD002" and f"only {rate:.1%} of the sampled responses end with '<end>'" in said
    assert f"min_end_token_rate: {rate:g} accepts it" in said and "missing_eos" in said and "openly" not in said
    assert all(words in said for words in named), said
    assert {words for words in SAYS.values() if words in said} == {SAYS[cause]}, said
    assert judged(manifest_of(rate, ending=ending(**seen)), min_end_token_rate=rate) == []


def test_a_gate_of_null_follows_from_the_answers_that_fit_and_a_fixed_one_beyond_them_is_named_before_training():
    """By hand: 80 of 100 fit, .72 is nine tenths of that, and 2 sqrt(.72 * .28 / 50) = .127 is taken off: .593."""
    seen = ending(answers={"num_longer": 20, "tokens_95_percent": 90})
    assert judged(manifest_of(0.59, ending=seen), min_end_token_rate=None) == []
    (problem,) = judged(manifest_of(0.58, ending=seen), min_end_token_rate=None)
    assert problem.code == "GRD002" and "min_end_token_rate is 59.0%" in problem.what
    (taken,) = judged(manifest_of(0.49, ending=seen), min_end_token_rate=None, steps=0)
    assert "min_end_token_rate is 50.0%" in taken.what
    advice = "sampling.max_new_tokens: 90, or min_end_token_rate: null, which asks 59%"
    for rate, says in ((None, ""), (0.8, ""), (0.9, advice)):
        config = SftConfig.model_validate(
            {"data": {"path": "x"}, "steps": 3, "min_end_token_rate": rate, "sampling": {"max_new_tokens": 64}}
        )
        said, warns = missing_ends.what_fits(config, seen["answers"], 50)
        assert said.startswith("80.0% of the 100 training answers fit sampling.max_new_tokens (64)")
        assert says in said and ("more than the data teaches" in said) == warns == bool(says)


@pytest.mark.parametrize(
    ("longer", "most", "rule", "says", "warns"),
    [
        (4, 64, {}, "cuts off 4.0%", False),
        (20, 64, {}, "penalty: 0.25", True),
        (20, 128, {}, "at most 5%", False),
        (20, 80, {}, "more than 5%", True),
        (20, 64, {"mode": "subtract", "penalty": 0.25}, "cuts off 20.0%", False),
        (20, 64, {"mode": "subtract", "penalty": 0.5}, "subtracts 0.5", True),
        (20, 64, {"score": 0.0}, "cuts off 20.0%", False),
    ],
)
def test_ppo_says_how_many_answers_it_cuts_off_and_warns_where_shorter_ones_would_pay(longer, most, rule, says, warns):
    """Where 20 % are cut off, what each loses may be .05 / .2 = .25."""
    manifest = manifest_of(ending=ending(answers={"num_longer": longer, "tokens_95_percent": 90}), steps=3)
    said, warned = missing_ends.what_is_cut(manifest, "runs/sft", MissingEosSection.model_validate(rule), most)
    assert says in said and warned == warns, said
    untrained = manifest_of(0.7, ending=ending(answers={"num_longer": 0}), steps=0)
    said, warned = missing_ends.what_is_cut(untrained, "runs/sft", MissingEosSection(), 64)
    assert "trained nothing" in said and "cuts off 30.0%" in said and "penalty: 0.16" in said and warned
    assert missing_ends.what_is_cut(manifest_of(), "runs/ppo", MissingEosSection(), 64) == ("", False)


def test_a_model_taken_as_it_is_is_not_told_to_train_longer():
    (problem,) = judged(manifest_of(0.5, ending=ending()), steps=0)
    assert "no step was trained" in problem.what and "max_new_tokens" in problem.fix and "epochs" in problem.fix
    (old,) = judged(manifest_of(0.899))
    assert "89.9%" in old.what and old.fix.startswith("min_end_token_rate: 0.899")


def test_the_best_weights_and_the_measurements_are_planned_for(home):
    tensors = {"model.layers.0.q.weight": StoredTensor("F32", (10, 20), 800)}
    adapter = 4 * 16 * 30
    common = {"data": {"path": "x"}, "steps": 10, "save_every": 2}
    every = {"evaluation": {"every": 3}}
    wanted = {"last": adapter + 2 * 3 * adapter, "best": adapter + 2 * (3 + 1) * adapter}
    for use, kept in wanted.items():
        config = SftConfig.model_validate({**common, **every, "use": use})
        assert sft_spec.STAGE.needs(config).disk(tensors, {}, 0) == resources.Written(3 * adapter, kept)
    Path("sft.yaml").write_text(yaml.safe_dump({**SFT, "evaluation": {"every": 3}, "run_dir": "r"}))
    found = planning.plan(Path("sft.yaml"), "sft", [], planning.Device(flops="1e9", bandwidth="1e9"))
    spec, _, _ = planning._spec(
        SftConfig.model_validate({**SFT, "evaluation": {"every": 3}}), "sft", Path("sft.yaml"), "cpu"
    )
    assert (found["measuring"]["times"], found["measuring"]["tokens"]) == (4, 6 * 64)  # steps 0, 3, 6, 8
    passes = clock.operations(spec, 64, True, clock.FORWARD)
    assert found["measuring"]["seconds"] == pytest.approx(6 * 64 * passes / 1e9)
    assert clock.measuring(spec.with_(measured=0), Speed(1.0, 1.0)) is None
    assert any("4 measurements of the held-out loss" in line for line in planning.lines(found))


def sigmoid_loss(x):
    return math.log1p(math.exp(-x))


def by_hand(kind, s, index):
    """The loss of group ``index`` from its raw scores [K][k]."""
    if kind == "outcome":
        return sum(sigmoid_loss(x) if good else sigmoid_loss(-x) for (x,), good in zip(s, RATINGS, strict=True)) / 3
    if kind == "plackett_luce":
        a, b, c = (math.exp(x) for (x,) in s)
        return -(math.log(a / (a + b + c)) + math.log(b / (b + c))) / 2
    if kind == "heads":
        (mean, deviation), (helpful, safe) = SCALE, zip(*s, strict=True)
        pair = sigmoid_loss(helpful[0] - helpful[1])
        return (
            pair if index else pair + sum((safe[i] - (r - mean) / deviation) ** 2 for i, r in ((0, 4.0), (2, 1.0))) / 2
        )
    gaps = [(i, j) for i in range(3) for j in range(3) if i != j]
    gap = s[0][0] - s[1][0]
    labels = 0.9 * sigmoid_loss(gap) + 0.1 * sigmoid_loss(-gap)
    fitted = sum(((s[i][0] - s[j][0]) - (TAUGHT[i] - TAUGHT[j])) ** 2 for i, j in gaps) / 6
    return 0.75 * labels + 0.25 * fitted


RATINGS, SCALE, TAUGHT = (1.0, 0.0, 1.0), (2.5, 1.5), (0.3, -0.2, 1.0)
PAIR, RANKED = (Judgement(0, 1, 1.0),), (Judgement(0, 1, 1.0), Judgement(1, 2, 1.0), Judgement(0, 2, 1.0))
KINDS = {
    "outcome": ({"loss": "outcome"}, {"judgements": (), "ratings": RATINGS}),
    "plackett_luce": ({"loss": "plackett_luce"}, {"judgements": RANKED}),
    "heads": ({"heads": ["helpful", "safe"], "combine": "gate"},
              {"judgements": (Judgement(0, 1, 1.0, attribute="helpful"),)}),
    "teachers": ({"teachers": ["runs/a"], "teacher_weight": 0.25, "label_smoothing": 0.1}, {"judgements": PAIR}),
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_the_held_out_loss_is_the_objective_without_what_is_not_about_labels(tmp_path, kind):
    settings, fields = KINDS[kind]
    shared = {
        "data": {"path": "x"},
        "steps": 1,
        "centering_coef": 0.7,
        "batch": {"batch_size": 2, "micro_batch_size": 2},
    }
    config, base = RewardConfig.model_validate({**shared, **settings}), tiny.base(tmp_path / "m")
    heads = Heads(("helpful", "safe"), (1.0, 1.0), {"safe": SCALE}, summed=False) if kind == "heads" else None
    roles, head = SharedBase(base), ScalarHead(32, heads.names if heads else ("score",))
    roles.add("reward", adapter=tiny.lora(base), head=head, trained=True)
    taught = Teacher({f"x:{n}": torch.tensor(TAUGHT) for n in range(3)}, 1) if kind == "teachers" else None
    groups = []
    for n, ids in enumerate(([70, 71, 2], [72, 2], [73, 74, 75, 2])):
        attributes = {"safe": (4.0, None, 1.0)} if heads and n == 0 else {}
        record = Comparison((Message("user", "x"),), ("a", "b", "c"), where=f"x:{n}", attributes=attributes, **fields)
        groups.append(Group([5, 6 + n], [ids, [80, *ids], [81, 82, *ids]], record.judgements, record))
    if heads:
        overall = replace(groups[2].record, judgements=PAIR)
        groups[2] = replace(groups[2], judgements=PAIR, record=overall)
    learner = Learner(config, base, roles, taught, heads)
    measured = learner.measured(groups)
    assert len(measured) == (2 if heads else 3)
    losses = []
    for index, group in enumerate(measured):
        raw = []
        for response in group.responses:
            with torch.no_grad():
                outcome = base.model(torch.tensor([group.prompt_ids + response]), output_hidden_states=True)
            raw.append(head.linear(outcome.hidden_states[-1][0, -1]).tolist())
        losses.append(by_hand(kind, raw, index))
    assert learner.loss("reward", measured) == pytest.approx(sum(losses) / len(losses), rel=1e-4)
    if heads:
        with pytest.raises(RlhfError, match=r"DAT058.*evaluation.every: none of the 1 held-out prompts"):
            learner.measured(groups[2:])


def test_a_loss_without_a_finite_perplexity_is_still_a_figure():
    assert sft_outcome._perplexity(1.5) == pytest.approx(4.481689)
    assert sft_outcome._perplexity(800.0) == math.inf and math.isnan(sft_outcome._perplexity(math.nan))
