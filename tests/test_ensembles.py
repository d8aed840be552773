"""Members of an ensemble that differ in what they train: as runs, in exports, in examinations."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy
import pytest
import tiny
import torch
from safetensors.torch import load_file
from test_reward_training import REWARD, cut, fingerprint, home, rlhf, rows_of, train  # noqa: F401

from rlhf.config.stages import EvalRmConfig
from rlhf.config.train_rm import RewardConfig
from rlhf.data.batches import collate
from rlhf.evaluation.exam_tables import figures_table
from rlhf.models import forward
from rlhf.models.adapter_part import AdapterPart
from rlhf.models.base import load_base
from rlhf.models.heads import ScalarHead
from rlhf.models.roles import SharedBase
from rlhf.runs import artifacts
from rlhf.runs.artifacts import BaseIdentity, Manifest

KINDS = {
    "alike": {"members": 2, "ensemble": {"data": "all"}},
    "ranks": {"members": 2, "ensemble": {"ranks": [4, 6]}},
    "parts": {
        "members": 3,
        "ensemble": {"layers": [[0, 0], [-1, -1], None], "target_modules": [None, None, ["q_proj"]]},
    },
}
RELOAD = """
import json, sys
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer
assert "rlhf" not in sys.modules
texts, found = json.loads(sys.argv[1]), {}
for directory in sys.argv[2:]:
    model = AutoModelForSequenceClassification.from_pretrained(directory).eval()
    tokenizer = AutoTokenizer.from_pretrained(directory)
    with torch.no_grad():
        found[directory] = [float(model(**tokenizer(text, return_tensors="pt")).logits) for text in texts]
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def kinds(home):  # noqa: F811
    """A run of each kind of ensemble."""
    return {name: train("train-rm", f"kind-{name}", {**REWARD, **own}) for name, own in KINDS.items()}


def adapter(directory):
    return load_file(directory / "adapter/adapter_model.safetensors")


def moved(run):
    """For each member the (block, linear layer) whose adapter is no longer the policy's."""
    start = adapter(Path("runs/sft"))
    found = []
    for member in artifacts.members_of(run):
        own = adapter(member)
        assert own.keys() == start.keys()
        names = [name.split(".") for name in start if not torch.equal(own[name], start[name])]
        found.append({(parts[parts.index("layers") + 1], parts[-3]) for parts in names})
    return found


def test_members_train_their_own_blocks_and_linear_layers_and_no_others(kinds):
    linears = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert moved(kinds["parts"]) == [
        {("0", name) for name in linears},
        {("1", name) for name in linears},
        {("0", "q_proj"), ("1", "q_proj")},
    ]
    assert moved(kinds["alike"]) == [{(block, name) for block in "01" for name in linears}] * 2


@pytest.mark.parametrize("step", [4, 6])
def test_a_run_of_members_with_parts_goes_on_bit_for_bit(kinds, step):
    copy = cut(kinds["parts"], step, "members", "tokenizer", "samples")
    rlhf("train-rm", "-c", "kind-parts.yaml", "--set", f"run_dir={copy}", "--resume")
    assert fingerprint(copy) == fingerprint(kinds["parts"])


def card_of(name):
    return Path(f"plain/{name}/README.md").read_text()


def test_every_kind_of_ensemble_gives_its_scores_to_a_process_with_plain_transformers(kinds):
    given = [{"prompt": f"hi {n}", "response": f"ok {n}"} for n in range(3)]
    Path("kinds.jsonl").write_text("".join(json.dumps(row) + "\n" for row in given))
    texts = [
        f"<|im_start|>user\n{row['prompt']}<|im_end|>\n<|im_start|>assistant\n{row['response']}<|im_end|>"
        for row in given
    ]
    directories = {}
    for name, run in kinds.items():
        rlhf("export", run, f"plain/{name}")
        directories[name] = [f"plain/{name}/{index}" for index in range(KINDS[name]["members"])]
    named = [path for paths in directories.values() for path in paths]
    command = [sys.executable, "-c", RELOAD, json.dumps(texts), *named]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    logits = json.loads(done.stdout)
    for name, run in kinds.items():
        rlhf("score", run, "--in", "kinds.jsonl", "--out", "kinds-scored.jsonl")
        (told,) = re.findall(r"the mean of the directories' logits, each plus its constant: (.*)", card_of(name))
        constants = [float(one.split(" for ")[0]) for one in told.split(", ")]
        for index, row in enumerate(rows_of("kinds-scored.jsonl")):
            plain = [logits[path][index] + own for path, own in zip(directories[name], constants, strict=True)]
            assert row["members"] == pytest.approx(plain, abs=1e-4)
            assert row["score"] == pytest.approx(sum(plain) / len(plain), abs=1e-4)
            assert len({round(value, 3) for value in plain}) > 1


@pytest.fixture(scope="module")
def examined(kinds, home):  # noqa: F811
    """Two runs on different bases examined as one, with samples that nobody judged as the drift; and what each member
    gives to the responses, raw."""
    other = tiny.base(Path("m2"), "gpt2")
    roles = SharedBase(other)
    head = ScalarHead(32)
    head.scale.fill_(0.25)
    roles.add("reward", adapter=tiny.lora(other), head=head)
    tiny.shake(roles, "reward", size=0.1)
    roles.save("reward", alone := Path("runs/on-gpt2"))
    identity = BaseIdentity("m2", other.digest, "float32")
    artifacts.write(alone, Manifest("reward", "train-rm", 0, {"b": 1}, {}, 1.0, base=identity))
    samples = [{"prompt": f"hi {n}", "response": "ok" * (n + 4), "finished": n != 3} for n in range(9)]
    Path("later.jsonl").write_text("".join(json.dumps(row) + "\n" for row in samples))
    config = {
        "runs": [str(kinds["ranks"]), str(alone)],
        "data": {"path": "pairs.jsonl"},
        "max_length": 64,
        "num_resamples": 200,
        "drift": {"path": "later.jsonl", "max_dropped_fraction": 0.2},
    }
    train("eval-rm", "examined-both", config)
    sides = ("chosen", "rejected")
    pairs = [{"prompt": row["prompt"], "response": row[side]} for row in rows_of("pairs.jsonl") for side in sides]
    given = pairs + [row for row in samples if row["finished"]]
    Path("given.jsonl").write_text("".join(json.dumps(row) + "\n" for row in given))
    columns, scales = [], []
    for run in config["runs"]:
        rlhf("score", run, "--in", "given.jsonl", "--out", "given-scored.jsonl")
        heads = [load_file(member / "head/head.safetensors") for member in artifacts.members_of(run)]
        scores = numpy.array([row.get("members", [row["score"]]) for row in rows_of("given-scored.jsonl")]).T
        columns += [own * float(head["scale"]) + float(head["shift"]) for own, head in zip(scores, heads, strict=True)]
        scales += [float(head["scale"]) for head in heads]
    lengths = numpy.array([len(row["response"]) + 1 for row in given])
    return config, numpy.stack(columns), numpy.mean(scales), lengths, len(pairs)


def report_of(config):
    return json.loads(Path("runs/examined-both/eval.json").read_text())


def test_members_on_several_bases_are_examined_together_each_with_its_interval(examined):
    config, raw, _, _, count = examined
    report = report_of(config)
    said, differences = report["members"], raw[:, :count:2] - raw[:, 1:count:2]
    names = [f"{config['runs'][0]}/0", f"{config['runs'][0]}/1", config["runs"][1]]
    assert list(said["accuracy_by_member"]) == names and said["members"] == 3
    right = (differences > 0).mean(1)
    for name, wanted in zip(names, right, strict=True):
        found = said["accuracy_by_member"][name]
        assert found["estimate"] == pytest.approx(wanted) and found["ci95"][0] < wanted < found["ci95"][1]
    table = numpy.corrcoef(differences <= 0)
    assert numpy.array(said["error_correlations"]) == pytest.approx(table)
    assert said["error_correlation"] == pytest.approx((table[0, 1] + table[0, 2] + table[1, 2]) / 3)
    assert report["accuracy"]["estimate"] == pytest.approx((differences.mean(0) > 0).mean())
    assert artifacts.read("runs/examined-both").parents.keys() == {"runs.0", "runs.1"}
    shown = figures_table(report)
    told = dict(zip(*(map(str, column.cells) for column in shown.columns[:2]), strict=True))
    assert [told[f"accuracy, member {name}"][:5] for name in names] == [f"{one:.3f}" for one in right]
    assert told["correlation of the members' errors, mean of pairs"] == f"{said['error_correlation']:.3f}"


def test_samples_that_nobody_judged_drift_in_score_length_and_disagreement(examined, capsys):
    config, raw, unit, lengths, count = examined
    found = report_of(config)["drift"]
    assert found["responses"] == found["prompts"] == 8 and found["comparisons"] == 0
    assert found["accuracy"] is None and found["accuracy_lost"] is None and found["ece"] is None
    mean, (low, high) = raw.mean(0), numpy.quantile(raw.mean(0)[:count], (0.01, 0.99))
    assert found["score_lost"]["estimate"] == pytest.approx(
        (mean[:count].mean() - mean[count:].mean()) / unit, abs=1e-3
    )
    assert found["outside"]["estimate"] == ((mean[count:] < low) | (mean[count:] > high)).mean()
    assert found["length_gained"]["estimate"] == pytest.approx(lengths[count:].mean() - lengths[:count].mean())
    apart = (raw - raw[:, :count].mean(1, keepdims=True)).std(0)
    wanted = apart[count:].mean() - apart[:count].mean()
    assert found["disagreement_gained"]["estimate"] == pytest.approx(wanted, abs=1e-3)
    verdicts = {one["key"] for one in report_of(config)["verdicts"]}
    assert "drift_outside" in verdicts and "drift_accuracy" not in verdicts
    log = Path("runs/examined-both/run.log").read_text()
    assert "data: the very rows that the reward model was trained on" in log
    assert "8 samples that nobody has judged" in log and "1 with a cut-off answer" in log
    Path("strict.yaml").write_text(json.dumps({**config, "run_dir": "runs/strict", "drift": {"path": "later.jsonl"}}))
    rlhf("eval-rm", "-c", "strict.yaml", code=3)
    assert "1 with a cut-off answer" in " ".join(capsys.readouterr().err.split())


def test_one_thing_is_examined():
    for named in ({"reward": "a", "runs": ["a", "b"]}, {"runs": ["a"]}, {"runs": ["a", "a"]}):
        with pytest.raises(ValueError, match=r"exactly one of reward, runs and model|at least 2|names a run twice"):
            EvalRmConfig.model_validate({"data": {"path": "x"}, **named})


def test_gradients_of_a_part_are_those_of_the_whole_and_there_are_no_others(tmp_path):
    found = {}
    for name, part in (("whole", None), ("part", AdapterPart(frozenset({1}), frozenset({"v_proj", "up_proj"})))):
        opened = tiny.base(tmp_path / name, double=True)
        torch.manual_seed(3)
        roles = SharedBase(opened)
        roles.add("reward", adapter=tiny.lora(opened), head=ScalarHead(32).double(), trained=True, part=part)
        tiny.shake(roles, "reward")
        sequences = collate([[5, 6, 7], [8]], [[9, 10], [11, 12, 13]], 0, opened.device)
        with roles.acting_as("reward") as (model, head):
            forward.end_scores(model, head, sequences).sum().backward()
        named = dict(roles.peft("reward").named_parameters())
        found[name] = {key: value.grad for key, value in named.items() if value.grad is not None}
        trained = {id(parameter) for parameter in roles.trained_parameters("reward")}
        assert {id(named[key]) for key in found[name]} <= trained
    own = [key for key in found["whole"] if ".layers.1." in key and ("v_proj" in key or "up_proj" in key)]
    assert sorted(found["part"]) == sorted(own) and len(own) == 4
    assert all(torch.allclose(found["part"][key], found["whole"][key], rtol=1e-9) for key in own)


@pytest.mark.parametrize(
    ("ensemble", "said"),
    [
        ({"layers": [[0, 2], None]}, "MOD030] ensemble.layers.0: [0, 2] are no blocks from first to last; there are 2"),
        ({"layers": [None, [1, 0]]}, "MOD030] ensemble.layers.1"),
        ({"target_modules": [None, ["qkv"]]}, "MOD030] ensemble.target_modules.1: qkv match no linear layer"),
    ],
)
def test_a_part_that_the_model_does_not_have_is_refused(home, capsys, ensemble, said):  # noqa: F811
    Path("parts.yaml").write_text(json.dumps({**REWARD, "run_dir": "runs/parts", "members": 2, "ensemble": ensemble}))
    rlhf("train-rm", "-c", "parts.yaml", code=4)
    assert said in " ".join(capsys.readouterr().err.split())


def test_a_part_that_the_policy_does_not_adapt_is_refused(home, capsys):  # noqa: F811
    opened = load_base("m")
    roles = SharedBase(opened)
    roles.add("policy", adapter=tiny.lora(opened, target_modules=["q_proj"]))
    roles.save("policy", Path("runs/sft-q"))
    identity = BaseIdentity("m", opened.digest, "float32")
    artifacts.write(Path("runs/sft-q"), Manifest("policy", "sft", 0, {"q": 1}, {}, 1.0, base=identity))
    config = {**REWARD, "policy": "runs/sft-q", "run_dir": "runs/q", "members": 2}
    Path("q.yaml").write_text(json.dumps({**config, "ensemble": {"target_modules": [["q_proj", "v_proj"], None]}}))
    rlhf("train-rm", "-c", "q.yaml", code=4)
    assert "reward/0: the policy's adapter has nothing in v_proj." in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize("key", ["layers", "target_modules"])
def test_a_part_for_each_member_or_none(key):
    with pytest.raises(ValueError, match=f"ensemble.{key} has 1 entries for 2 members"):
        RewardConfig.model_validate({**REWARD, "run_dir": "r", "members": 2, "ensemble": {key: [None]}})
