"""Runs of several heads: resumed, scored in another process, used in PPO, examined, and exported to transformers."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import test_reward_training as rewards
import torch
import yaml
from safetensors.torch import load_file

from rlhf.config import rubric
from rlhf.config.rewards import ClassifierSection, RunReward
from rlhf.data.batches import PassSize
from rlhf.models import open_base
from rlhf.models.heads import ScalarHead
from rlhf.models.roles import SharedBase
from rlhf.records import Message
from rlhf.runs import artifacts
from rlhf.scoring.open_scorer import Host, open_classifier, open_source
from rlhf.scoring.rerendered import Rerendered
from rlhf.scoring.scorer import Sample

home = rewards.home
rlhf, train, cut, rows_of, fingerprint = rewards.rlhf, rewards.train, rewards.cut, rewards.rows_of, rewards.fingerprint
RUBRIC = {
    "name": "desk",
    "criteria": [
        {"name": "helpful", "weight": 2.0, "description": "answers"},
        {"name": "safe", "weight": 0.5, "description": "no harm"},
    ],
}
CLASSIFIER = """
import json, sys, torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer
found = {}
for directory in sys.argv[2:]:
    model = AutoModelForSequenceClassification.from_pretrained(directory).eval()
    tokenizer, rows = AutoTokenizer.from_pretrained(directory), []
    for line in open(sys.argv[1]):
        row = json.loads(line)
        turns = [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["response"]}]
        text = tokenizer.apply_chat_template(turns, tokenize=False).rstrip("\\n")
        ids = tokenizer(text, return_tensors="pt", add_special_tokens=False).input_ids
        with torch.no_grad():
            rows.append(model(input_ids=ids).logits[0].tolist())
    found[directory] = {name: [row[i] for row in rows] for i, name in model.config.id2label.items()}
assert "rlhf" not in sys.modules
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def labelled(home):
    """Pairs in two attributes and overall, and ratings of one of them."""
    rows = []
    for n in range(24):
        texts = [f"ok {n}", f"no {n % 5} {n}"]
        good, bad = texts if n % 3 else texts[::-1]
        rows += [
            {"prompt": f"hi {n}", "chosen": good, "rejected": bad, "attribute": "helpful"},
            {"prompt": f"hi {n}", "chosen": bad, "rejected": good},
            {"prompt": f"hi {n}", "responses": texts, "ratings": {"safe": [n % 4, None if n % 2 else 3]}},
        ]
    Path("labelled.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    Path("rubric.yaml").write_text(yaml.safe_dump(RUBRIC))
    given = [{"prompt": f"hi {n}", "response": text} for n in range(24) for text in (f"ok {n}", f"no {n % 5} {n}")]
    Path("labelled-given.jsonl").write_text("".join(json.dumps(row) + "\n" for row in given))
    return {**rewards.REWARD, "data": {"path": "labelled.jsonl"}, "contradicted": 99}


@pytest.fixture(scope="module")
def summed(labelled):
    return train("train-rm", "summed", {**labelled, "rubric": "rubric.yaml"})


@pytest.fixture(scope="module")
def gated(labelled):
    return train("train-rm", "gated", {**labelled, "heads": ["helpful", "safe"], "combine": "gate", "members": 2})


KNOWN = {}


def scored(run):
    """What the finished run gives to each (prompt, response); the gated one in a new process."""
    if run not in KNOWN:
        out = f"{run.name}-scored.jsonl"
        arguments = ["score", str(run), "--in", "labelled-given.jsonl", "--out", out]
        if run.name == "gated":
            subprocess.run([sys.executable, "-m", "rlhf", *arguments], capture_output=True, check=True)
        else:
            rlhf(*arguments)
        KNOWN[run] = {(row["prompt"][0]["content"], row["response"]): row for row in rows_of(out)}
    return KNOWN[run]


def test_the_sum_of_the_heads_is_what_a_run_scores_by_and_its_first_number(summed):
    manifest = artifacts.read(summed)
    assert manifest.details["heads"] == ["score", "helpful", "safe"]
    assert manifest.details["weights"] == [{"helpful": 2.0, "safe": 0.5}]
    head = ScalarHead.load(summed / "head")
    for row in scored(summed).values():
        raw = {name: row["heads"][name] * head.scale[i] + head.shift[i] for i, name in enumerate(head.names) if i}
        wanted = (2.0 * raw["helpful"] + 0.5 * raw["safe"] - head.shift[0]) / head.scale[0]
        assert row["score"] == pytest.approx(float(wanted), abs=1e-4)
    samples = rows_of(summed / "samples/standardise.jsonl")
    for name, place in (("helpful", 1), ("safe", 2)):
        values = torch.tensor([row["raw_heads"][name][0] for row in samples], dtype=torch.float64)
        assert float(head.shift[place]) == pytest.approx(float(values.mean()), abs=1e-5)
        assert float(head.scale[place]) == pytest.approx(float(values.std(correction=0)), abs=1e-5)


@pytest.mark.parametrize(("name", "step"), [("summed", 2), ("gated", 2), ("gated", 5)])
def test_heads_and_gates_go_on_bit_for_bit(name, step, request):
    run = request.getfixturevalue(name)
    copy = cut(run, step, *(path.name for path in run.iterdir() if path.name in ("head", "adapter", "members")))
    rlhf("train-rm", "-c", f"{name}.yaml", "--set", f"run_dir={copy}", "--resume")
    assert fingerprint(copy) == fingerprint(run)


@pytest.mark.parametrize("name", ["summed", "gated"])
def test_another_process_gives_the_scores_that_the_run_itself_gave(name, request):
    run = request.getfixturevalue(name)
    rows = scored(run)
    heads = [ScalarHead.load(member / "head") for member in artifacts.members_of(run)]
    found = [row for row in rows_of(run / "contradicted.jsonl") if row["members"] == len(heads)]
    assert {row.get("attribute") for row in found} == {None, "helpful"}
    for row in found:
        prompt = row["prompt"][0]["content"]
        better, worse = rows[prompt, row["preferred"]], rows[prompt, row["other"]]
        if row.get("attribute"):  # of an ensemble the mean of standardised heads, whose scales differ
            if len(heads) > 1:
                continue
            gap = (better["heads"]["helpful"] - worse["heads"]["helpful"]) * float(heads[0].scale[1])
        else:
            sides = [row.get("members", [row["score"]]) for row in (better, worse)]
            own = zip(*sides, heads, strict=True)
            gap = sum((a - b) * float(head.scale[0]) for a, b, head in own) / len(heads)
        assert row["difference"] == pytest.approx(gap, abs=2e-4)


def test_each_number_of_a_run_is_a_label_that_transformers_alone_reads(summed, gated):
    rlhf("export", summed, "out-summed")
    rlhf("export", summed, "out-safe", "--head", "safe")
    rlhf("export", summed, "out-score", "--head", "score")
    rlhf("export", gated, "out-gated")
    rlhf("export", gated, "out-none", "--head", "score", code=4)
    rlhf("export", gated, "out-none", "--head", "kind", code=2)
    assert not Path("out-none").exists()
    places = ["out-summed", "out-safe", "out-score", "out-gated/0", "out-gated/1"]
    command = [sys.executable, "-c", CLASSIFIER, "labelled-given.jsonl", *places]
    logits = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    proofs = {place: json.loads((Path(place) / "rlhf_export.json").read_text()) for place in places}
    rows = list(scored(summed).values())
    wanted = {"score": [row["score"] for row in rows]}
    wanted |= {name: [row["heads"][name] for row in rows] for name in ("helpful", "safe")}
    assert list(logits["out-summed"]) == ["score", "helpful", "safe"]
    for name, values in logits["out-summed"].items():
        whose = "the run" if name == "score" else f"head {name}"
        said = rf"rlhf score's number of {whose} is the logit of label {name} plus (\S+)"
        constant = float(re.search(said, Path("out-summed/README.md").read_text())[1])
        assert [value + constant for value in values] == pytest.approx(wanted[name], abs=1e-4)
    for place, name, label in (("out-safe", "safe", "safe"), ("out-score", "score", "LABEL_0")):
        whose = "number of head safe" if name == "safe" else "number"
        said = rf"rlhf score's {whose} is the logit plus (\S+): the class has no bias"
        constant = float(re.search(said, Path(place, "README.md").read_text())[1])
        values = [value + constant for value in logits[place][label]]
        assert values == pytest.approx(wanted[name], abs=1e-4)
    rows = list(scored(gated).values())
    assert list(logits["out-gated/0"]) == ["helpful", "safe"]
    for name in ("helpful", "safe"):
        members = [
            [value + proofs[place]["constants"][name] for value in logits[place][name]]
            for place in ("out-gated/0", "out-gated/1")
        ]
        means = [(a + b) / 2 for a, b in zip(*members, strict=True)]
        assert means == pytest.approx([row["heads"][name] for row in rows], abs=1e-4)
    card = Path("out-summed/README.md").read_text()
    assert "score is 2 helpful + 0.5 safe" in card and "## Labelled by: desk" in card and "safe (0.5): no harm" in card
    assert "weighs the heads by the prompt" in Path("out-gated/0/README.md").read_text()
    for label, name in (("safe", "safe"), ("score", None)):
        section = ClassifierSection(path="out-summed", label=label)
        found = open_classifier(section, torch.device("cpu"), 8).score(samples()).mean
        assert found.tolist() == pytest.approx(scores_of(head=name), abs=1e-4)


def test_fitted_weights_turn_a_head_round_that_overall_comparisons_go_against(labelled):
    rows = []
    for n in range(30):
        texts = {"prompt": f"hi {n}", "chosen": f"ok {n % 7}", "rejected": f"no {n % 5} {n % 7}"}
        rows += [{**texts, "attribute": "helpful"}, {**texts, "chosen": texts["rejected"], "rejected": texts["chosen"]}]
        rows.append({"prompt": f"hi {n}", "response": texts["chosen"], "attributes": {"safe": n % 4}})
    Path("against.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = {**labelled, "data": {"path": "against.jsonl"}, "steps": 20, "contradicted": 0, "holdout_fraction": 0.5}
    run = train("train-rm", "fitted", {**config, "heads": ["helpful", "safe"], "combine": "fitted"})
    manifest = artifacts.read(run)
    (weights,) = manifest.details["weights"]
    assert manifest.metrics["eval/accuracy/helpful"] > 0.9 and weights["helpful"] < -0.1
    assert manifest.metrics["eval/accuracy"] > 0.9  # on prompts that the weights were not fitted on
    assert manifest.details["comparisons"] == 8 and manifest.metrics["eval/comparisons"] == 7
    assert "15 rows train no head: their labels are overall" in (run / "run.log").read_text()


def samples():
    return [
        Sample((Message("user", row["prompt"]),), row["response"], [], [], True, [])
        for row in rows_of("labelled-given.jsonl")[:6]
    ]


def scores_of(**source):
    """By a reward source of the summed run."""
    manifest = artifacts.read("runs/summed")
    base = open_base.reopen_base(manifest, torch.device("cpu"))
    host = Host(base, SharedBase(base), PassSize(8))
    scorer = open_source(RunReward(run="runs/summed", **source), "reward", manifest, host)
    return Rerendered(scorer, base.chat, "runs/summed").score(samples()).mean.tolist()


def test_a_head_of_a_run_is_a_reward_of_its_own(summed, gated, capsys):
    wanted = [row["heads"]["safe"] for row in list(scored(summed).values())[:6]]
    assert scores_of(head="safe") == pytest.approx(wanted, abs=1e-5)
    source = {"run": "runs/summed", "head": "safe", "weight": 2.0}
    short = {"steps": 1, "evaluation": {"every": 1, "num_prompts": 3, "holdout_fraction": 0.3}}
    run = train(
        "ppo",
        "ppo-safe",
        {**rewards.PPO, "rewards": [source], **short, "value": {"fit": "gradient", "pretrain_steps": 0}},
    )
    head, value = ScalarHead.load(summed / "head"), ScalarHead.load(run / "checkpoints/best/value/head")
    assert value.names == ("safe",)
    hidden = torch.randn(5, 32)
    assert torch.allclose(head.only(("safe",)).folded()(hidden), head(hidden)[:, 2:], atol=1e-5)
    capsys.readouterr()
    rlhf("ppo", "-c", "ppo-safe.yaml", "--set", "rewards.0.head=kind", "--set", "run_dir=runs/none", code=2)
    assert "CFG032] rewards.0.head: the run has no head 'kind'. Fix: one of score, helpful, safe" in (
        capsys.readouterr().err
    )
    rlhf("train-rm", "-c", "gated.yaml", "--set", "init_from=runs/summed", "--set", "run_dir=runs/on", "--dry-run")
    rlhf(
        "train-rm",
        "-c",
        "gated.yaml",
        "--set",
        "init_from=runs/summed",
        "--set",
        "run_dir=runs/on",
        "--set",
        "heads=[helpful, safe, kind]",
        code=3,
    )


def test_an_examination_tells_each_head_and_carries_the_rubric(summed, capsys):
    config = {"reward": "runs/summed", "data": {"path": "labelled.jsonl"}, "num_resamples": 100, "max_length": 64}
    run = train("eval-rm", "eval-summed", {**config, "probes": {"num_prompts": 2}})
    report = json.loads((run / "eval.json").read_text())
    rows = scored(summed)
    pairs = [row for row in rows_of("labelled.jsonl") if row.get("attribute") == "helpful"]
    sides = [[rows[row["prompt"], row[side]] for side in ("chosen", "rejected")] for row in pairs]
    right = [chosen["heads"]["helpful"] > rejected["heads"]["helpful"] for chosen, rejected in sides]
    assert report["heads"]["helpful"]["accuracy"]["estimate"] == pytest.approx(sum(right) / len(right))
    overall = [row for row in rows_of("labelled.jsonl") if "chosen" in row and "attribute" not in row]
    sides = [[rows[row["prompt"], row[side]] for side in ("chosen", "rejected")] for row in overall]
    right = [chosen["score"] > rejected["score"] for chosen, rejected in sides]
    assert report["accuracy"]["estimate"] == pytest.approx(sum(right) / len(right)) and report["comparisons"] == 24
    assert report["heads"]["safe"]["ratings"] == 36 and report["heads"]["safe"]["accuracy"] is None
    assert report["rubric"]["name"] == "desk"
    assert rubric.read(run / "rubric.yaml").weights == {"helpful": 2.0, "safe": 0.5}
    assert {"rubric.yaml"} < set(artifacts.read(run).files) and "rubric.yaml" in artifacts.read(summed).files
    rlhf("show", run)
    assert "rubric    desk" in capsys.readouterr().out
    alone = train("eval-rm", "eval-helpful", {**config, "head": "helpful", "probes": {"num_prompts": 2}})
    own = json.loads((alone / "eval.json").read_text())
    assert own["accuracy"]["estimate"] == report["heads"]["helpful"]["accuracy"]["estimate"] and "heads" not in own
    rlhf("eval-rm", "-c", "eval-helpful.yaml", "--set", "head=kind", "--set", "run_dir=runs/none", code=2)
    capsys.readouterr()
    source = {"run": "runs/summed", "head": "safe", "examination": "runs/eval-helpful"}
    Path("other.yaml").write_text(yaml.safe_dump({**rewards.PPO, "run_dir": "runs/none", "rewards": [source]}))
    rlhf("ppo", "-c", "other.yaml", code=5)
    assert "is of the head helpful, not of safe" in capsys.readouterr().err


def test_a_changed_rubric_is_another_run(summed, capsys):
    text = Path("rubric.yaml").read_text()
    try:
        Path("rubric.yaml").write_text(text.replace("no harm", "no harm at all"))
        rlhf("train-rm", "-c", "summed.yaml", code=5)
    finally:
        Path("rubric.yaml").write_text(text)
    assert "rubric" in capsys.readouterr().err
    assert load_file(summed / "head/head.safetensors")["linear.weight"].shape[0] == 3
