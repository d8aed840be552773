"""Ensembles of reward models: how members differ, combine and disagree, and that a run of them is one run."""

from __future__ import annotations

import json
import logging
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy
import pytest
import tiny
import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from rlhf import cli
from rlhf.config import load
from rlhf.config.sections import DataSection
from rlhf.config.train_rm import RewardConfig
from rlhf.data import sources
from rlhf.errors import RlhfError
from rlhf.metrics import member_errors as shared
from rlhf.models.base import load_base
from rlhf.models.roles import SharedBase
from rlhf.planning import phases, specs
from rlhf.planning.specs import Ground
from rlhf.records import Judgement, Message, split_by_prompt
from rlhf.reward import member_turns
from rlhf.reward.length_penalty import LengthPenalty, correlation
from rlhf.reward.member_data import all_but_fold, bootstrapped
from rlhf.runs import artifacts, snapshots, storage
from rlhf.runs.artifacts import BaseIdentity, Manifest
from rlhf.scoring import aggregate
from rlhf.scoring.ensemble import EnsembleScorer, References
from rlhf.scoring.scorer import Sample, Scores, WeightedScorer
from rlhf.stages import ancestry
from rlhf.stages.registry import STAGES

REWARD = {
    "policy": "runs/sft", "data": {"path": "pairs.jsonl"}, "max_length": 64, "steps": 4, "holdout_fraction": 0.3,
    "standardise_samples": 12, "save_every": 1, "keep_checkpoints": 9, "optim": {"learning_rate": 1e-2},
    "batch": {"batch_size": 4, "micro_batch_size": 2}, "sampling": {"max_new_tokens": 8},
}  # fmt: skip
PPO = {
    "policy": "runs/sft", "prompts": {"path": "pairs.jsonl", "max_tokens": 32}, "steps": 3, "save_every": 1,
    "keep_checkpoints": 9, "report_to": "none", "value": {"pretrain_steps": 0},
    "batch": {"batch_size": 4, "minibatch_size": 4, "micro_batch_size": 4}, "sampling": {"max_new_tokens": 8},
    "evaluation": {"every": 3, "num_prompts": 3, "holdout_fraction": 0.3},
}  # fmt: skip


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A working directory with a tiny model that often ends its answers, its SFT run, and pairs."""
    where = tmp_path_factory.mktemp("rewards")
    directory = tiny.build(where / "m", tie=False)
    weights = load_file(directory / "model.safetensors")
    generator = torch.Generator().manual_seed(0)
    weights["lm_head.weight"][2] = torch.randn(32, generator=generator)
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    opened = load_base(str(directory))
    roles = SharedBase(opened)
    roles.add("policy", adapter=tiny.lora(opened))
    roles.save("policy", where / "runs/sft")
    identity = BaseIdentity("m", opened.digest, "float32")
    artifacts.write(where / "runs/sft", Manifest("policy", "sft", 0, {"a": 1}, {}, 1.0, base=identity))
    sides = [("ok", "no") if n % 3 else ("no", "ok") for n in range(30)]
    rows = [
        {"prompt": f"hi {n}", "chosen": f"{a} {n}", "rejected": f"{b} {n % 5} {n}"} for n, (a, b) in enumerate(sides)
    ]
    (where / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(where)
        patch.setattr(cli.interrupts, "install", lambda: None)
        yield where
    torch.use_deterministic_algorithms(False)
    torch.set_flush_denormal(False)


def rlhf(*args, code=0):
    logger = logging.getLogger("rlhf")
    before = logger.handlers[:], logger.level, logger.propagate
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as stop:
        patch.setattr(sys, "argv", ["rlhf", *map(str, args)])
        cli.main()
    logger.handlers[:], logger.level, logger.propagate = before
    assert stop.value.code == code


def train(stage, name, config, *args):
    """A finished run of ``stage``."""
    Path(f"{name}.yaml").write_text(yaml.safe_dump({"run_dir": f"runs/{name}", **config}))
    rlhf(stage, "-c", f"{name}.yaml", *args)
    return Path("runs") / name


@pytest.fixture(scope="module")
def ensemble(home):
    settings = {"members": 2, "ensemble": {"ranks": [4, 6]}, "contradicted": 9}
    return train("train-rm", "two", {**REWARD, **settings})


def rows_of(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def fingerprint(run):
    """Every file of the result, and the metrics without times."""
    kept = [
        {key: value for key, value in row.items() if not key.startswith(("time/", "memory/"))}
        for row in rows_of(run / "metrics.jsonl")
    ]
    return artifacts.read(run).digest, kept


def cut(run, step, *results):
    """A copy of the run as it was when ``step`` was saved."""
    copy = run.with_name(f"{run.name}-cut-{step}")
    shutil.copytree(run, copy)
    (copy / "manifest.json").unlink()
    for path in copy.glob("checkpoints/step-*"):
        if int(path.name.split("-")[1]) > step:
            shutil.rmtree(path)
    for name in results:
        shutil.rmtree(copy / name)
    return copy


def test_a_bootstrap_draws_whole_prompts_and_folds_leave_each_prompt_out_once():
    prompts = ["a", "b", "a", "c", "d", "d", "e"]
    by_prompt = {name: [row for row, own in enumerate(prompts) if own == name] for name in prompts}
    drawn = bootstrapped(prompts, 3)
    counts = {name: {drawn.count(row) for row in rows} for name, rows in by_prompt.items()}
    assert all(len(found) == 1 for found in counts.values()) and sum(min(c) for c in counts.values()) == 5
    assert drawn != bootstrapped(prompts, 4) and drawn == bootstrapped(prompts, 3)
    shares = [len(set(bootstrapped([str(n) for n in range(2000)], seed))) / 2000 for seed in range(3)]
    assert shares == pytest.approx([1 - numpy.exp(-1)] * 3, abs=0.03)
    left_out = [set(range(7)) - set(all_but_fold(prompts, fold, 3, 0)) for fold in range(3)]
    assert sorted(row for rows in left_out for row in rows) == list(range(7))
    assert all(rows == {row for name in {prompts[r] for r in rows} for row in by_prompt[name]} for rows in left_out)


def test_aggregates_equal_loops_and_an_offset_of_a_member_and_prompt_changes_no_disagreement():
    generator = torch.Generator().manual_seed(5)
    members, references = (torch.randn(4, 3, generator=generator, dtype=torch.float64) for _ in range(2))
    gains = (members - references).tolist()
    spread = [(sum((g - sum(row) / 3) ** 2 for g in row) / 3) ** 0.5 for row in gains]
    level = [sum(row) / 3 for row in references.tolist()]
    means = [sum(row) / 3 for row in members.tolist()]
    wanted = {
        "mean": means,
        "min": [a + min(row) for a, row in zip(level, gains, strict=True)],
        "mean_minus_std": [a - 0.7 * s for a, s in zip(means, spread, strict=True)],
        "mean_minus_variance": [a - 0.7 * s * s for a, s in zip(means, spread, strict=True)],
    }
    offsets = torch.tensor([[3.0, -9.0, 1.5]], dtype=torch.float64)
    for name, values in wanted.items():
        assert aggregate.AGGREGATES[name](members, references, 0.7).tolist() == pytest.approx(values)
        shifted = aggregate.AGGREGATES[name](members + offsets, references + offsets, 0.7)
        assert shifted.tolist() == pytest.approx([value - 1.5 for value in values])
    assert aggregate.disagreement(members + offsets, references + offsets).tolist() == pytest.approx(spread)


def test_correlation_of_errors_is_that_of_being_wrong():
    generator = numpy.random.default_rng(0)
    differences = generator.normal(0.4, 1, (3, 200)) + generator.normal(0, 1, 200)
    wrong = (differences <= 0).astype(float)
    table = numpy.corrcoef(wrong)
    assert numpy.array(shared.error_correlations(differences)) == pytest.approx(table)
    assert shared.mean_error_correlation(differences) == pytest.approx((table[0, 1] + table[0, 2] + table[1, 2]) / 3)
    assert shared.mean_error_correlation(numpy.ones((2, 4))) is None
    first, second = numpy.array([0.0, 2.0, 1.0]), numpy.array([1.0, -1.0])
    assert shared.chance_above(first, second) == pytest.approx((0 + 1 + 1 + 1 + 0.5 + 1) / 6)
    assert shared.chance_above(first, second[:0]) is None


class Fixed:
    """Scores by the text of the response, plus a constant by the text of the prompt."""

    def __init__(self, responses, prompts):
        self.responses, self.prompts, self.asked = responses, prompts, 0

    def score(self, samples):
        self.asked += len(samples)
        return Scores(torch.tensor([self.responses[s.response] + self.prompts[s.prompt[0].content] for s in samples]))


def sample(prompt, response, finished=True):
    return Sample((Message("user", prompt),), response, [1], [2], finished, [2])


def test_members_are_compared_in_differences_to_answers_of_the_reference_asked_once_a_prompt():
    asked = []

    def answer(samples, numbers):
        asked.append(list(numbers))
        texts = ["r0", "r1"] * (len(samples) // 2)
        return [
            sample(s.prompt[0].content, text, s.prompt[0].content != "z")
            for s, text in zip(samples, texts, strict=True)
        ]

    words = {"r0": 0.0, "r1": 1.0, "x": 2.0, "y": 3.0}
    first = Fixed(words, {"p": 100.0, "q": 0.0, "z": 7.0})
    second = Fixed({**words, "x": 4.0}, {"p": 0.0, "q": -50.0, "z": 0.0})
    scorer = EnsembleScorer([first, second], "min", 0.0, References(answer, 2))
    batch = [sample("p", "x"), sample("q", "y"), sample("p", "y"), sample("z", "x")]
    found = scorer.score(batch)
    # p: references 100.5 and 0.5, gains of x 1.5 and 3.5, of y 2.5 twice; q: .5 and -49.5; z has none: 9 and 4
    assert found.mean.tolist() == [50.5 + 1.5, -24.5 + 2.5, 50.5 + 2.5, 4.0]
    assert found.disagreement.tolist() == [1.0, 0.0, 0.0, 2.5]
    assert len(asked) == 1 and len(set(asked[0])) == 6
    times = first.asked
    assert scorer.score(batch[::-1]).mean.tolist() == found.mean.tolist()[::-1]
    assert len(asked) == 1 and first.asked == times + 4
    again = References(answer, 2)
    again.load_state_dict(json.loads(json.dumps(scorer.references.state_dict())))
    assert EnsembleScorer([first, second], "min", 0.0, again).score(batch).mean.tolist() == found.mean.tolist()
    assert len(asked) == 1
    both = WeightedScorer([(scorer, -2.0), (first, 1.0)]).score(batch)
    assert both.disagreement.tolist() == [2.0, 0.0, 0.0, 5.0]


def test_a_run_of_members_holds_each_of_them_and_says_what_they_share(ensemble):
    assert not (ensemble / "adapter").exists() and [p.name for p in artifacts.members_of(ensemble)] == ["0", "1"]
    ranks = [json.loads((p / "adapter/adapter_config.json").read_text())["r"] for p in artifacts.members_of(ensemble)]
    assert ranks == [4, 6]
    manifest = artifacts.read(ensemble)
    assert {name.split("/")[0] for name in manifest.files} == {"members", "tokenizer"}
    rows = [row for row in rows_of(ensemble / "metrics.jsonl") if "train/loss" in row]
    assert [row["train/member"] for row in rows] == [0] * 4 + [1] * 4
    said = manifest.details["members_held_out"]
    assert manifest.details["members"] == said["members"] == len(said["accuracy"]) == 2
    raw = torch.tensor([row["raw_scores"] for row in rows_of(ensemble / "samples/standardise.jsonl")])
    for index, member in enumerate(artifacts.members_of(ensemble)):
        head = load_file(member / "head/head.safetensors")
        assert float(head["shift"]) == pytest.approx(float(raw[:, index].mean()), abs=1e-5)
        assert float(head["scale"]) == pytest.approx(float(raw[:, index].std(correction=0)), abs=1e-5)


@pytest.mark.parametrize("step", [2, 4, 5])
def test_a_run_of_members_goes_on_bit_for_bit_within_a_member_and_between_two(ensemble, step):
    copy = cut(ensemble, step, "members", "tokenizer", "samples")
    rlhf("train-rm", "-c", "two.yaml", "--set", f"run_dir={copy}", "--resume")
    assert fingerprint(copy) == fingerprint(ensemble)
    assert f"Resumed from {copy}/checkpoints/step-{step}" in (copy / "run.log").read_text()


def test_the_comparisons_that_are_contradicted_most_are_held_against_members_that_have_not_seen_them(ensemble):
    config = load.load(RewardConfig, Path("two.yaml"))
    records = sources.load_comparisons(config.data).records
    train_records, _ = split_by_prompt(records, config.holdout_fraction, config.seed)
    drawn = member_turns.rows_of(config, [SimpleNamespace(record=record) for record in train_records])
    given = [{"prompt": r.prompt[0].content, "response": text} for r in records for text in r.responses]
    Path("each.jsonl").write_text("".join(json.dumps(row) + "\n" for row in given))
    rlhf("score", ensemble, "--in", "each.jsonl", "--out", "each-scored.jsonl")
    heads = [load_file(member / "head/head.safetensors") for member in artifacts.members_of(ensemble)]
    scores = torch.tensor([row["members"] for row in rows_of("each-scored.jsonl")])
    raw = scores * torch.tensor([float(head["scale"]) for head in heads])
    wanted = {}
    for record, pair in zip(records, (raw[::2] - raw[1::2]).tolist(), strict=True):
        seen = [record in train_records and train_records.index(record) in rows for rows in drawn]
        unseen = [value for value, known in zip(pair, seen, strict=True) if not known]
        used = unseen or pair
        if sum(used) < 0:
            wanted[record.where] = (sum(used) / len(used), all(seen), len(used))
    found = rows_of(ensemble / "contradicted.jsonl")
    assert len(found) == min(9, len(wanted)) > 1
    assert [row["where"] for row in found] == sorted(wanted, key=lambda where: wanted[where][0])[: len(found)]
    for row in found:
        difference, seen, members = wanted[row["where"]]
        assert row["difference"] == pytest.approx(difference, abs=1e-4)
        assert (row["seen"], row["members"]) == (seen, members)
        assert row["probability"] == pytest.approx(1 / (1 + numpy.exp(-difference)), abs=1e-4)
    assert {row["members"] for row in found} == {1, 2}


def test_more_steps_for_every_member_are_another_run(ensemble):
    config = ("--set", "optim.schedule=constant", "--set", "run_dir=runs/longer")
    rlhf("train-rm", "-c", "two.yaml", *config)
    longer = cut(Path("runs/longer"), 3, "members")
    rlhf("train-rm", "-c", "two.yaml", *config, "--set", f"run_dir={longer}", "--set", "steps=5", "--resume", code=5)


def test_scores_of_an_ensemble_are_the_mean_of_what_its_exports_give(ensemble):
    given = [{"prompt": f"hi {n // 2}", "response": f"ok {n}"} for n in range(4)]
    Path("given.jsonl").write_text("".join(json.dumps(row) + "\n" for row in given))
    rlhf("score", ensemble, "--in", "given.jsonl", "--out", "scored.jsonl")
    rlhf("export", ensemble, "classifiers")
    columns = []
    for index in range(2):
        directory = Path("classifiers") / str(index)
        model = AutoModelForSequenceClassification.from_pretrained(directory).eval()
        tokenizer, constant = AutoTokenizer.from_pretrained(directory), constant_of(directory)
        logits = []
        for row in given:
            text = f"<|im_start|>user\n{row['prompt']}<|im_end|>\n<|im_start|>assistant\n{row['response']}<|im_end|>"
            logits.append(float(model(**tokenizer(text, return_tensors="pt")).logits.detach()) + constant)
        columns.append(logits)
    found = rows_of("scored.jsonl")
    for row, members in zip(found, zip(*columns, strict=True), strict=True):
        assert row["members"] == pytest.approx(members, abs=1e-4)
        assert row["score"] == pytest.approx(sum(members) / 2, abs=1e-4)
    for first, second in ((0, 1), (2, 3)):
        gains = [column[second] - column[first] for column in columns]
        assert found[first]["disagreement"] is None
        assert found[second]["disagreement"] == pytest.approx(abs(gains[0] - gains[1]) / 2, abs=1e-4)


def constant_of(directory):
    return json.loads(next(path for path in directory.glob("*.json") if "constant" in path.read_text()).read_text())[
        "constant"
    ]


def test_an_examination_tells_of_the_members(ensemble):
    examined = {"reward": str(ensemble), "data": {"path": "pairs.jsonl"}, "max_length": 64, "num_resamples": 100}
    train("eval-rm", "examined", examined)
    said = json.loads(Path("runs/examined/eval.json").read_text())["members"]
    rows = [json.loads(line) for line in Path("pairs.jsonl").read_text().splitlines()]
    both = [{"prompt": row["prompt"], "response": row[side]} for row in rows for side in ("chosen", "rejected")]
    Path("both.jsonl").write_text("".join(json.dumps(row) + "\n" for row in both))
    rlhf("score", ensemble, "--in", "both.jsonl", "--out", "all.jsonl")
    members = numpy.array([row["members"] for row in rows_of("all.jsonl")])
    right = (members[::2] - members[1::2]) > 0  # standardising shifts and scales, and keeps the order
    assert said["accuracy"] == pytest.approx(right.mean(0).tolist())


def test_ppo_against_a_careful_ensemble_goes_on_bit_for_bit(ensemble):
    rewards = [{"run": str(ensemble), "aggregate": "mean_minus_std", "reference_samples": 2}]
    run = train("ppo", "careful-ppo", {**PPO, "rewards": rewards})
    rows = [row for row in rows_of(run / "metrics.jsonl") if "rollout/score" in row]
    assert len(rows) == 3 and all(row["rollout/disagreement"] > 0 for row in rows)
    held = snapshots.read(run / "checkpoints/step-2")
    prompts = {row["prompt"][0]["content"] for row in rows_of(run / "samples/step-0.jsonl")}
    assert len(held["references.0"]["known"]) == len(prompts) + 2 * 4
    copy = cut(run, 2, "adapter")
    rlhf("ppo", "-c", f"{run.name}.yaml", "--set", f"run_dir={copy}", "--resume")
    assert fingerprint(copy) == fingerprint(run)


def test_one_member_has_nothing_to_aggregate_and_is_refused_before_anything_is_loaded(ensemble, capsys):
    single = train("train-rm", "one", {**REWARD, "steps": 1})
    assert (single / "adapter").is_dir() and not (single / "members").exists()
    Path("careful.yaml").write_text(
        yaml.safe_dump({**PPO, "run_dir": "runs/none", "rewards": [{"run": str(single), "aggregate": "min"}]})
    )
    for command in (("ppo", "-c", "careful.yaml"), ("check", "careful.yaml", "--stage", "ppo")):
        rlhf(*command, code=2)
        assert "CFG031] rewards.0.aggregate: min needs several members" in capsys.readouterr().err
    run = train("ppo", "joined", {**PPO, "steps": 1, "rewards": [{"runs": [str(single), str(ensemble)]}]})
    assert set(artifacts.read(run).parents) == {"policy", "rewards.0.runs.0", "rewards.0.runs.1"}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"ensemble": {"data": "folds"}}, "members: 2 or more"),
        ({"members": 3, "ensemble": {"ranks": [4]}}, "1 entries for 3 members"),
        ({"members": 2, "lora": None}, "lora: null trains every weight"),
    ],
)
def test_settings_of_an_ensemble_that_say_nothing_are_refused(changes, said):
    with pytest.raises(ValueError, match=said):
        RewardConfig.model_validate({**REWARD, "run_dir": "r", **changes})


@pytest.mark.parametrize(
    "source",
    [
        {"function": "a:b", "aggregate": "min"},
        {"run": "r", "aggregate": "min", "disagreement_coef": 1.0},
        {"run": "r", "runs": ["a", "b"]},
    ],
)
def test_a_source_that_cannot_be_aggregated_is_refused(source):
    with pytest.raises(ValueError):
        tiny.reward(source)


def test_members_cost_memory_by_their_adapters_alone(ensemble):
    found = {}
    for count in (1, 5):
        Path("sized.yaml").write_text(yaml.safe_dump({**REWARD, "run_dir": "r", "members": count}))
        config = load.load(RewardConfig, Path("sized.yaml"))
        ground = Ground(ancestry.find("runs/sft", Path()), {}, "cpu", "here")
        found[count] = phases.peak(STAGES["train-rm"].needs(config).memory(ground))
    own = sum(tensor.numel() for tensor in load_file("runs/sft/adapter/adapter_model.safetensors").values()) + 33
    assert found[5].total - found[1].total == 4 * 4 * own
    assert specs.of_run(str(ensemble), artifacts.read(ensemble)).rank == 4


def test_a_member_that_was_left_out_of_the_manifest_or_changed_is_seen(ensemble, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(ensemble, copy)
    storage.write_bytes(copy / "members/1/head/head.safetensors", b"another")
    with pytest.raises(RlhfError, match=r"CKP005.*members/1/head"):
        artifacts.verify(copy, artifacts.read(copy))


def labelled(tmp_path, **fields):
    row = {"prompt": "a", "chosen": "b", "rejected": "c", **fields}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    return sources.load_comparisons(DataSection(path=str(tmp_path / "rows.jsonl")))


def test_votes_and_probabilities_are_soft_labels(tmp_path):
    for fields, wanted in (({"votes": [3, 1]}, 0.75), ({"votes": [2, 2]}, 0.5), ({"probability": 0.6}, 0.6), ({}, 1.0)):
        loaded = labelled(tmp_path, **fields)
        assert loaded.records[0].judgements == (Judgement(0, 1, wanted),) and not loaded.warnings


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"votes": [1, 3]}, "the chosen one needs half"),
        ({"votes": [0, 0]}, "the chosen one needs half"),
        ({"votes": [1.5, 1]}, "two whole numbers"),
        ({"probability": 0.4}, "from 0.5 to 1"),
        ({"probability": True}, "from 0.5 to 1"),
        ({"probability": 0.7, "votes": [7, 3]}, "leave one of them out"),
    ],
)
def test_soft_labels_that_say_nothing_or_the_opposite_are_refused(tmp_path, fields, said):
    with pytest.raises(RlhfError, match=f"DAT004.*{said}"):
        labelled(tmp_path, **fields)


def test_margins_that_no_row_has_are_not_asked_for_in_silence(home, capsys):
    for key in ("use_margins", "weight_by_margin"):
        Path("margins.yaml").write_text(yaml.safe_dump({**REWARD, "run_dir": "runs/none", key: True}))
        rlhf("check", "margins.yaml", "--stage", "train-rm", code=3)
        assert f"DAT053] pairs.jsonl: no comparison has a margin, which {key} asks for" in capsys.readouterr().err
    rows = [{**row, "margin": 2.0} for row in rows_of("pairs.jsonl")]
    rows[3]["margin"] = -1.0
    Path("strong.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    strong = {**REWARD, "run_dir": "runs/none", "weight_by_margin": True, "data": {"path": "strong.jsonl"}}
    Path("margins.yaml").write_text(yaml.safe_dump(strong))
    rlhf("check", "margins.yaml", "--stage", "train-rm", code=3)
    assert "1 rows, the first strong.jsonl:4, have no margin, or one below 0" in capsys.readouterr().err


def test_a_reward_run_goes_on_from_another_one_adapter_and_raw_head(ensemble):
    still = {**REWARD, "steps": 1, "optim": {"learning_rate": 1e-12}, "save_every": None}
    first = train("train-rm", "clean", {**REWARD, "steps": 2})
    again = train("train-rm", "from-clean", {**still, "init_from": str(first)})
    before, after = (load_file(run / "adapter/adapter_model.safetensors") for run in (first, again))
    policy = load_file("runs/sft/adapter/adapter_model.safetensors")
    assert all(torch.allclose(before[name], after[name], atol=1e-9) for name in before)
    assert any(not torch.equal(before[name], policy[name]) for name in before)
    heads = [load_file(run / "head/head.safetensors") for run in (first, again)]
    for name in heads[0]:  # standardised anew, on the same samples: the same shift and scale
        assert torch.allclose(heads[1][name], heads[0][name], atol=1e-5), name
    spread = train("train-rm", "two-from-one", {**still, "init_from": str(first), "members": 2})
    for member in artifacts.members_of(spread):
        assert torch.allclose(
            load_file(member / "adapter/adapter_model.safetensors")[name_of(before)], before[name_of(before)], atol=1e-9
        )
    both = train("train-rm", "two-from-two", {**still, "init_from": str(ensemble), "members": 2})
    for own, start in zip(artifacts.members_of(both), artifacts.members_of(ensemble), strict=True):
        found, wanted = (load_file(path / "head/head.safetensors")["linear.weight"] for path in (own, start))
        assert torch.allclose(found, wanted, atol=1e-9)
    assert set(artifacts.read(both).parents) == {"policy", "init_from"}


def name_of(tensors):
    return next(name for name in tensors if "lora_B" in name)


def test_a_start_with_other_members_or_another_base_is_refused_before_anything_is_loaded(ensemble, capsys):
    Path("start.yaml").write_text(yaml.safe_dump({**REWARD, "run_dir": "r", "init_from": str(ensemble), "members": 3}))
    rlhf("train-rm", "-c", "start.yaml", code=2)
    assert "CFG032] init_from: has 2 members, and members is 3" in capsys.readouterr().err
    copy = Path("runs/elsewhere")
    shutil.copytree(ensemble, copy)
    manifest = json.loads((copy / "manifest.json").read_text())
    manifest["base"] |= {"digest": "0" * 64, "source": "org/other"}
    (copy / "manifest.json").write_text(json.dumps(manifest))
    rlhf("train-rm", "-c", "start.yaml", "--set", f"init_from={copy}", "--set", "members=2", code=4)
    assert "MOD021] init_from: made on another base" in capsys.readouterr().err


def test_rankings_train_by_plackett_luce_and_shares_of_votes_do_not(home, capsys):
    rows = [{"prompt": f"hi {n}", "responses": [f"ok {n}", "no", f"ok {n} no"], "ranks": [1, 3, 2]} for n in range(20)]
    Path("ranked.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    ranked = {**REWARD, "data": {"path": "ranked.jsonl"}, "loss": "plackett_luce", "save_every": None}
    losses = [row["train/loss"] for row in rows_of(train("train-rm", "ranked", ranked) / "metrics.jsonl")[:4]]
    assert losses[3] < losses[0]
    (home / "ranked.jsonl").write_text(
        "".join(json.dumps({"prompt": f"p{n}", "chosen": "a", "rejected": "b", "votes": [2, n]}) + "\n" for n in (0, 1))
    )
    rlhf("check", "ranked.yaml", "--stage", "train-rm", code=3)
    assert "DAT054] ranked.jsonl: 1 rows, the first ranked.jsonl:2, do not rank" in capsys.readouterr().err
    with pytest.raises(ValueError, match="label_smoothing is for loss: bradley_terry"):
        RewardConfig.model_validate({**ranked, "run_dir": "r", "label_smoothing": 0.1})


def test_labels_of_single_responses_train_alone_and_beside_pairs(home, capsys):
    rows = [
        {"prompt": f"hi {n // 2}", "completion": f"{'ok' if n % 3 else 'no'} {n}", "label": n % 3 > 0}
        for n in range(40)
    ]
    Path("labelled.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    labelled = {**REWARD, "data": {"path": "labelled.jsonl"}, "loss": "outcome", "steps": 12, "save_every": None}
    run = train("train-rm", "outcomes", labelled)
    found = artifacts.read(run).metrics
    scored = [{"prompt": row["prompt"], "response": row["completion"]} for row in rows]
    Path("labels-in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in scored))
    rlhf("score", run, "--in", "labels-in.jsonl", "--out", "labels-out.jsonl")
    raw = [row["score"] * found["eval/score_scale"] + found["eval/score_shift"] for row in rows_of("labels-out.jsonl")]
    records = sources.load_outcomes(DataSection(path="labelled.jsonl")).records
    assert len(records) == 20 and any(not record.judgements for record in records)
    held = {record.prompt[0].content for record in split_by_prompt(records, 0.3, 0)[1]}
    own = [(row["label"], score) for row, score in zip(rows, raw, strict=True) if row["prompt"] in held]
    assert found["eval/labels"] == len(own)
    assert found["eval/label_accuracy"] == pytest.approx(sum(good == (score > 0) for good, score in own) / len(own))
    wins = [a > b for good, a in own if good for bad, b in own if not bad]
    assert found["eval/label_auroc"] == pytest.approx(sum(wins) / len(wins))
    assert found["eval/label_brier"] == pytest.approx(
        sum((1 / (1 + numpy.exp(-score)) - good) ** 2 for good, score in own) / len(own), abs=1e-5
    )
    mixed = {"mixture": [{"path": "labelled.jsonl"}, {"path": "pairs.jsonl"}]}
    both = train("train-rm", "mixed", {**labelled, "data": mixed, "steps": 2})
    assert {"eval/labels", "eval/comparisons"} <= set(artifacts.read(both).metrics)
    rlhf("check", "mixed.yaml", "--stage", "train-rm", "--set", "data={path: pairs.jsonl}", code=3)
    assert "DAT055] pairs.jsonl: no row has a label of its own" in capsys.readouterr().err


def test_the_length_penalty_descends_the_square_of_the_mean_product_whatever_the_micro_batches():
    def made(lengths):
        return SimpleNamespace(responses=[[0] * length for length in lengths])

    groups = [made([3, 7]), made([5, 1, 9]), made([4])]
    scores = [torch.tensor(values, dtype=torch.float64) for values in ([0.2, 1.0], [0.1, -0.4, 0.3], [2.0])]
    gaps = [(-4.0,), (4.0, -4.0, -8.0)]
    scale = (sum(gap**2 for own in gaps for gap in own) / 4) ** 0.5
    products = [
        (0.2 - 1.0) * -4 / scale,
        ((0.1 + 0.4) * 4 + (0.1 - 0.3) * -4 + (-0.4 - 0.3) * -8) / 3 / scale,
        0.0,
    ]
    whole, parts = LengthPenalty(0.5, groups), LengthPenalty(0.5, groups)
    assert whole.penalty(groups, scores).tolist() == [0.0] * 3  # nothing is known of the mean before the first step
    for one, values in zip(groups, scores, strict=True):
        parts.penalty([one], [values])
    mean = whole.end_of_step()["train/length_product"]
    assert mean == pytest.approx(0.1 * sum(products) / 3) and parts.end_of_step() == {"train/length_product": mean}
    assert whole.penalty(groups, scores).tolist() == pytest.approx([2 * 0.5 * mean * value for value in products])
    off = LengthPenalty(0.0, groups)
    assert off.penalty(groups, scores).tolist() == [0.0] * 3 and off.end_of_step() == {}


def test_correlation_with_length_is_the_same_for_either_order_of_a_pair():
    gaps, differences = [3.0, -1.0, 2.0], [1.0, 0.5, -0.2]
    wanted = (3.0 - 0.5 - 0.4) / ((9 + 1 + 4) ** 0.5 * (1 + 0.25 + 0.04) ** 0.5)
    assert correlation(gaps, differences) == pytest.approx(wanted)
    assert correlation([-gaps[0], *gaps[1:]], [-differences[0], *differences[1:]]) == pytest.approx(wanted)
    assert correlation([0.0, 0.0], [1.0, 2.0]) is None


def test_a_run_without_regard_to_length_goes_on_bit_for_bit_and_leans_on_it_less(home):
    rows = [
        {"prompt": f"hi {n}", "chosen": f"ok {n} {'so ' * (n % 3)}so", "rejected": f"no {'so ' * 4 * (n % 5 == 0)}{n}"}
        for n in range(40)
    ]
    Path("long.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    optim = {"learning_rate": 3e-3}
    config = {**REWARD, "data": {"path": "long.jsonl"}, "steps": 30, "save_every": 25, "optim": optim}
    run = train("train-rm", "lengthless", {**config, "length_coef": 0.3})
    copy = cut(run, 25, "adapter", "head")
    rlhf("train-rm", "-c", "lengthless.yaml", "--set", f"run_dir={copy}", "--resume")
    assert fingerprint(copy) == fingerprint(run)
    assert snapshots.read(run / "checkpoints/step-25")["length"]["mean"] != 0.0
    kept = artifacts.read(train("train-rm", "barely", {**config, "length_coef": 1e-9})).metrics
    found = artifacts.read(run).metrics
    assert abs(found["eval/length_correlation"]) < 0.75 * abs(kept["eval/length_correlation"])


def test_a_student_comes_to_give_the_differences_of_its_teachers_on_whatever_base(ensemble):
    config = {**REWARD, "steps": 60, "save_every": 50, "teachers": [str(ensemble)], "centering_coef": 0.0}
    student = train("train-rm", "student", config)
    sides = ("chosen", "rejected")
    given = [{"prompt": row["prompt"], "response": row[side]} for row in rows_of("pairs.jsonl") for side in sides]
    Path("to-fit.jsonl").write_text("".join(json.dumps(row) + "\n" for row in given))
    raw = []
    for run in (ensemble, student):
        rlhf("score", run, "--in", "to-fit.jsonl", "--out", "fitted.jsonl")
        heads = [load_file(member / "head/head.safetensors") for member in artifacts.members_of(run)]
        rows = [row.get("members", [row["score"]]) for row in rows_of("fitted.jsonl")]
        scales = torch.tensor([float(head["scale"]) for head in heads])
        raw.append((torch.tensor(rows) * scales).mean(1))
    gaps = [values[::2] - values[1::2] for values in raw]
    assert (gaps[1] - gaps[0]).square().mean() < 0.1 * gaps[0].square().mean()
    said = artifacts.read(student).details["distilled"]
    assert said["teacher_accuracy"] == pytest.approx(artifacts.read(ensemble).metrics["eval/accuracy"])
    assert said["accuracy_kept"] == artifacts.read(student).metrics["eval/accuracy"] / said["teacher_accuracy"]
    copy = cut(student, 50, "adapter", "head")
    rlhf("train-rm", "-c", "student.yaml", "--set", f"run_dir={copy}", "--resume")
    assert fingerprint(copy) == fingerprint(student)
