"""What a run's identity is, how gates are judged, and that runs of an older version count: golden/runs-690edaa."""

from __future__ import annotations

import functools
import json
import operator
import shutil
from importlib import metadata
from pathlib import Path

import pytest
import torch

from rlhf.config import fields, load
from rlhf.config.rewards import RewardSource
from rlhf.config.sections import DataSection, LoraSection
from rlhf.config.stages import CollectConfig, EvalRmConfig, PipelineConfig, PpoConfig, SftConfig
from rlhf.config.train_rm import RewardConfig
from rlhf.errors import RlhfError
from rlhf.preflight import examined
from rlhf.runs import artifacts, identity, run_directory
from rlhf.stages import settling, starting
from rlhf.stages.registry import STAGES

GOLDEN = Path(__file__).parent / "golden/runs-690edaa"
FINISHED = ("sft", "train-rm", "ensemble", "collect", "eval-rm", "ppo", "ppo-examined")
STAGE_OF = {name: STAGES[name] for name in FINISHED if name in STAGES}
STAGE_OF |= {"ensemble": STAGES["train-rm"], "ppo-examined": STAGES["ppo"]}
RENAMED = {"drop_equal: true": "on_bad_row: drop", "accept_failed: true": "accept: failed"}


@pytest.fixture
def old(tmp_path, monkeypatch):
    """The runs of 690edaa in a directory of their own, which is the working directory; keys in configs are today's."""
    home = tmp_path / "old"
    shutil.copytree(GOLDEN, home)
    for path in (home / "configs").glob("*.yaml"):
        text = path.read_text()
        for before, after in RENAMED.items():
            text = text.replace(before, after)
        path.write_text(text)
    monkeypatch.chdir(home)
    return home


def config_of(name):
    return Path("configs", f"{name}.yaml")


def ready(name, *overrides):
    return starting.ready(STAGE_OF[name], config_of(name), overrides)


def weights(run):
    return {path.as_posix(): path.read_bytes() for path in Path("runs", run).rglob("*.safetensors")}


# --- identity ---


def made_from(config_class, settings, **digests):
    return identity.of(config_class.model_validate(settings), digests)


def test_gates_are_found_by_walking_the_schema():
    def found(config_class):
        return {".".join(pattern) for pattern in fields.gates(config_class)}

    data = {"data.on_bad_row", "data.max_dropped_fraction"}
    assert found(SftConfig) == {*data, "min_end_token_rate", "require_improvement"}
    assert found(RewardConfig) == data
    assert found(EvalRmConfig) == {*data, "thresholds", "drift.on_bad_row", "drift.max_dropped_fraction"}
    ppo = {f"{key.replace('data', place)}" for key in data for place in ("prompts", "evaluation.data")}
    assert found(PpoConfig) == {*ppo, "guards", "rewards.*.examination", "rewards.*.accept"}
    assert fields.is_gate(PpoConfig, "guards.kl_nats.stop") and fields.is_gate(PpoConfig, "rewards.11.examination.run")
    assert not fields.is_gate(PpoConfig, "rewards.0.length_calibration.run")
    assert not fields.is_gate(PpoConfig, "value.min_explained_variance")
    assert {"labeller.examination", "prompts.on_bad_row"} <= found(CollectConfig)


def test_a_key_that_an_older_version_did_not_know_is_a_change_only_away_from_its_default():
    data = {"path": "d"}
    new = made_from(SftConfig, {"data": data, "steps": 1})
    for key in ("use", "evaluation.every", "lora.use_dora", "optim.max_grad_norm", "data.form"):
        old = {name: value for name, value in new.values.items() if name != key}
        assert new.values[key] == made_from(SftConfig, {"data": data, "steps": 1}).values[key]
        assert new.changes(old) == {}, key
    other = made_from(SftConfig, {"data": data, "steps": 1, "use": "last", "evaluation": {"every": 5}})
    old = {name: value for name, value in new.values.items() if name not in ("use", "evaluation.every")}
    assert set(other.changes(old)) == {"use", "evaluation.every"}
    explicit = made_from(SftConfig, {"data": {"path": "d", "form": None}, "steps": 1, "optim": {"learning_rate": 2e-4}})
    assert explicit.changes({name: value for name, value in new.values.items() if "optim" not in name}) == {}


def test_a_default_that_has_changed_is_a_change():
    new = made_from(SftConfig, {"data": {"path": "d"}, "steps": 1})
    assert new.changes({**new.values, "max_length": 256}) == {"max_length": (256, 512)}


def test_a_section_that_was_not_there_is_a_change_though_each_of_its_keys_has_its_default():
    data = {"data": {"path": "d"}, "steps": 1}
    adapter, whole = (made_from(RewardConfig, {**data, "lora": lora}) for lora in ({}, None))
    assert whole.values["lora"] is None and adapter.values["lora.r"] is None
    assert set(adapter.changes(whole.values)) == {"lora"} and set(whole.changes(adapter.values)) == {"lora", "lora.r"}

    one, two = ({"rewards": [{"run": "a"}] * count, "prompts": {"path": "p"}} for count in (1, 2))
    one, two = made_from(PpoConfig, one), made_from(PpoConfig, two)
    assert {"rewards.1.run", "rewards.1.weight"} <= set(two.changes(one.values))
    assert "rewards.1.weight" in one.changes(two.values)
    inside = {name: value for name, value in two.values.items() if name != "rewards.1.reference_samples"}
    assert two.changes(inside) == {}, "the item was there, and only this key was not known"

    mixed = {"prompts": {"path": "p"}, "evaluation": {"data": {"path": "e"}}}
    new, without = made_from(PpoConfig, mixed), made_from(PpoConfig, {"prompts": {"path": "p"}})
    assert "evaluation.data" in new.changes(without.values)
    never = {name: value for name, value in without.values.items() if name != "evaluation.data"}
    assert new.changes(never)["evaluation.data.path"][1] == "e"


def test_gates_and_names_of_gates_make_no_difference_and_the_digest_of_an_examination_does_not_either():
    plain = {"rewards": [{"run": "a"}], "prompts": {"path": "p"}}
    named = {"rewards": [{"run": "a", "examination": "e", "accept": "failed"}], "prompts": {"path": "p"}}
    one = made_from(PpoConfig, plain, **{"rewards.0.run": "1"})
    other = made_from(PpoConfig, named, **{"rewards.0.run": "1", "rewards.0.examination.run": "2"})
    assert other.changes(one.values) == {} == one.changes(other.values)
    older = {**one.values, "rewards.0.examination": None, "rewards.0.accept_failed": False, "prompts.drop_equal": False}
    assert other.changes({**older, "prompts.max_dropped_fraction": 0.3}) == {}
    calibrated = {"rewards.0.run": "1", "rewards.0.length_calibration.run": "2"}
    assert "rewards.0.length_calibration.run" in made_from(PpoConfig, named, **calibrated).changes(one.values)


def test_a_removed_key_is_ignored_where_its_value_meant_what_is_always_done_today(monkeypatch, tmp_path):
    gone = {"lora_kind": fields.Gone(None, (("plain", None),)), "bits.of": fields.Gone("r", ((4, 16),))}
    monkeypatch.setitem(fields.GONE, LoraSection, gone)
    new = made_from(SftConfig, {"data": {"path": "d"}, "steps": 1})
    assert new.changes({**new.values, "lora.lora_kind": "plain"}) == {}
    assert set(new.changes({**new.values, "lora.lora_kind": "odd"})) == {"lora.lora_kind"}
    assert new.changes({**{k: v for k, v in new.values.items() if k != "lora.r"}, "lora.bits.of": 4}) == {}

    recorded = tmp_path / artifacts.CONFIG
    recorded.write_text("data: {path: d}\nsteps: 1\nlora: {lora_kind: plain}\n")
    with pytest.raises(RlhfError, match=r"CFG001.*lora.lora_kind: unknown key. Fix: remove it$"):
        load.load(SftConfig, recorded)
    (tmp_path / artifacts.STARTED).write_text("{}")
    assert load.load(SftConfig, recorded).lora == LoraSection()


def test_an_old_key_of_ones_own_config_is_refused_with_the_new_one(tmp_path):
    path = tmp_path / "ppo.yaml"
    path.write_text("prompts: {path: p, drop_equal: true}\nrewards: [{run: a, examination: e, accept_failed: true}]\n")
    with pytest.raises(RlhfError) as stop:
        load.load(PpoConfig, path)
    texts = [str(problem) for problem in stop.value.problems]
    assert [text.partition(" Fix: ")[2] for text in texts] == [
        "it is now on_bad_row: write on_bad_row: drop",
        "it is now accept: write accept: failed",
    ]
    assert texts[0].startswith(f"error[CFG001] {path}:1:") and "unknown key" in texts[0]
    assert set(fields.GONE[DataSection]) & set(DataSection.model_fields) == set()
    assert set(fields.GONE[RewardSource]) & set(RewardSource.model_fields) == set()


# --- runs of 690edaa ---


def test_every_finished_run_of_690edaa_is_up_to_date_by_its_users_config_and_by_its_own(old):
    for name in FINISHED:
        assert ready(name).reasons is None, name
        own = Path("runs", name, artifacts.CONFIG)
        assert "drop_equal" in own.read_text()
        assert starting.ready(STAGE_OF[name], own).reasons is None, name
    assert ready("sft", "optim.learning_rate=1e-4").reasons == ["optim.learning_rate: 0.005 -> 0.0001"]
    assert ready("train-rm", "use=last").reasons == ["use: nothing -> last"]


@pytest.mark.parametrize("stage", ["sft", "train-rm", "ppo"])
def test_a_run_that_690edaa_left_unfinished_is_resumed_to_its_end(old, here, stage):
    run, known = f"{stage}-cut", json.loads(Path("resumed.json").read_text())
    code, text = here("resume", f"runs/{run}")
    assert code == 0 and f"Resumed from runs/{run}/checkpoints/step-2" in text, text
    steps = [
        row["step"]
        for row in run_directory.read_metrics(Path("runs", run))
        if "train/loss" in row or "time/update_s" in row
    ]
    assert steps == [1, 2, 3, 4]
    versions = {name: metadata.version(name) for name in known["versions"]}
    if versions == known["versions"] and torch.backends.cpu.get_cpu_capability() == known["processor"]:
        files = artifacts.read(Path("runs", run)).files
        trained = {path: digest for path, digest in known["files"][run].items() if path.endswith(".safetensors")}
        assert trained and {path: files[path]["sha256"] for path in trained} == trained


def another(key, value):
    """Keys and values that give a gate another value than it has."""
    section = key.rpartition(".")[0]
    if key.startswith("rewards."):
        accept = None if value == "failed" else "failed"
        return {f"{section}.examination": "runs/other", f"{section}.accept": accept}
    if isinstance(value, bool | str):
        return {key: {True: False, False: True, "drop": "error", "error": "drop"}[value]}
    new = 2 if value is None else value + 1 if isinstance(value, int) else value / 2 + 0.07
    ordered = key.startswith("thresholds.") and not key.startswith("thresholds.min_")
    return {f"{section}.warn": new, f"{section}.fail": new} if ordered else {key: new}


def changed(config, values):
    tree = config.model_dump()
    for key, value in values.items():
        *sections, leaf = (int(part) if part.isdigit() else part for part in key.split("."))
        functools.reduce(operator.getitem, sections, tree)[leaf] = value
    return type(config).model_validate(tree)


@pytest.mark.parametrize("name", FINISHED)
def test_no_gate_changes_what_a_finished_run_is(old, name):
    found, stage = ready(name), STAGE_OF[name]
    manifest, gates = artifacts.read(found.run_dir), identity.gates(found.config)
    own = identity.of(found.config, {}).values
    digests = {key: value for key, value in found.plan.identity.items() if own.get(key, "") != value}
    assert "data.rows" in digests or "prompts.rows" in digests
    tried = [key for key in gates if not key.startswith("labeller.")]
    for key in tried:
        config = changed(found.config, another(key, gates[key]))
        assert identity.gates(config)[key] != gates[key], key
        assert identity.of(config, digests).changes(manifest.identity) == {}, key
    patterns = {tuple("*" if part.isdigit() else part for part in key.split(".")) for key in tried}
    optional = {"drift", "labeller", *(() if name == "ppo-examined" else ("evaluation",))}
    wanted = {pattern for pattern in fields.gates(stage.config_class) if pattern[0] not in optional}
    assert all(any(one[: len(pattern)] == pattern for one in patterns) for pattern in wanted - {("data", "mixture")})


# --- gates of finished runs ---


def measured(run, **metrics):
    """As if a run had measured these figures."""
    manifest = artifacts.read(Path("runs", run))
    artifacts.rewrite(Path("runs", run), artifacts.replace(manifest, metrics={**manifest.metrics, **metrics}))


def test_a_finished_run_is_judged_again_from_its_files_and_stands(old, here):
    before = {name: weights(name) for name in ("sft", "train-rm", "ppo")}
    measured("sft", **{"eval/end_token_rate": 0.5})
    for stage, override, said in (
        ("sft", "min_end_token_rate=0.6", "GRD002"),
        ("train-rm", "data.max_dropped_fraction=0.01", "GRD021"),
        ("ppo", "guards={patience: 1, kl_nats: {stop: 0.01}}", "GRD020"),
    ):
        code, text = here(stage, "-c", config_of(stage), override)
        assert code == 7 and said in text and "Running on" not in text, text
        assert weights(stage) == before[stage] and not list(Path("runs").glob("*.old-*"))
        code, text = here("show", f"runs/{stage}")
        assert said in text
        code, text = here(stage, "-c", config_of(stage), "policy=runs/sft" if stage == "ppo" else "seed=0")
        assert ("GRD002" in text or code == 0) if stage != "sft" else (code == 0 and "up to date" in text), text


def test_rows_dropped_for_any_reason_count_together_and_so_do_those_that_only_reading_finds(old, here):
    counted = {"prompts": {"rows": 50, "dropped": {"a fault": 3, "too many tokens": 2}}}
    manifest = artifacts.Manifest("policy", "ppo", 0, {}, {}, 1.0, details={"dropped": counted})
    for bound, codes in ((0.1, []), (0.099, ["GRD021"])):
        prompts = {"path": "p", "max_dropped_fraction": bound}
        config = PpoConfig.model_validate({"run_dir": "none", "prompts": prompts, "rewards": [{"run": "a"}]})
        needs = STAGES["ppo"].needs(config)
        assert [problem.code for problem in settling.judge(config, needs, manifest)] == codes

    manifest = artifacts.read("runs/train-rm")
    manifest.details["rows"]["num_dropped"] = 0  # 690edaa counted only what was too long; one pair of 50 is equal
    artifacts.rewrite(Path("runs/train-rm"), manifest)
    code, text = here("train-rm", "-c", config_of("train-rm"), "data.max_dropped_fraction=0.01")
    assert code == 7 and "GRD021" in text and "1 of 50 rows" in text, text
    code, text = here("train-rm", "-c", config_of("train-rm"), "data.max_dropped_fraction=0.01", "steps=5")
    assert code == 3 and "DAT020" in text, "a run that is to be made is refused before it starts"


def test_a_run_that_failed_a_gate_is_no_parent_until_it_passes(old, here):
    measured("sft", **{"eval/loss": 9.0, "eval/base_loss": 7.0})
    assert here("train-rm", "-c", config_of("train-rm"))[0] == 0, "it was not judged yet"
    code, text = here("sft", "-c", config_of("sft"))
    assert code == 7 and "GRD004" in text and "9.0" in text
    code, text = here("train-rm", "-c", config_of("train-rm"), "run_dir=runs/new")
    assert code == 7 and "error[GRD004] policy: runs/sft" in text and not Path("runs/new").exists()
    code, text = here("sft", "-c", config_of("sft"), "require_improvement=false")
    assert code == 0 and "runs/sft is up to date" in text
    assert load.load(SftConfig, Path("runs/sft/config.yaml")).require_improvement is False
    assert here("resume", "runs/sft")[0] == 0, "judged by what it keeps as its own config"
    assert here("train-rm", "-c", config_of("train-rm"))[0] == 0


def test_training_that_ends_at_a_gate_is_kept_and_passes_once_the_gate_is_lowered(old, here):
    short = ("sft", "-c", config_of("sft"), "run_dir=runs/short", "sampling.max_new_tokens=1")
    code, text = here(*short, "min_end_token_rate=1.0", "steps=2")
    assert code == 7 and text.count("error[GRD002]") == 1 and "Finished runs/short" in text, text
    before = weights("short")
    code, text = here("train-rm", "-c", config_of("train-rm"), "policy=runs/short", "run_dir=runs/new")
    assert code == 7 and "error[GRD002] policy: runs/short" in text and not Path("runs/new").exists()
    code, text = here(*short, "min_end_token_rate=0.0", "steps=2")
    assert code == 0 and "runs/short is up to date" in text and "Running on" not in text and weights("short") == before
    assert not artifacts.failed_gates(artifacts.read("runs/short"))


def test_other_thresholds_judge_the_same_figures_and_make_nothing_anew(old, here):
    exam = Path("runs/eval-rm")
    before, plots = artifacts.read(exam), json.loads((exam / "eval.json").read_text())
    assert before.details["verdict"] == "fail"
    nothing = {name: {"warn": None, "fail": None} for name in ("over_length", "underconfidence")}
    probes = {key.partition(".")[2]: {"warn": None, "fail": None} for key in before.details["failed"] if "." in key}
    wide = f"thresholds={json.dumps({**nothing, 'probes': probes, 'min_prompts': 1})}"
    code, text = here("eval-rm", "-c", config_of("eval-rm"), wide)
    assert code == 0 and "judged again by other thresholds: warn, before: fail" in text and "Running on" not in text
    after = artifacts.read(exam)
    artifacts.verify(exam, after)
    report = json.loads((exam / "eval.json").read_text())
    assert after.details["verdict"] == report["verdict"] == "warn" and after.details["failed"] == []
    assert {key: report[key] for key in plots if key not in artifacts.VERDICTS} == {
        key: plots[key] for key in plots if key not in artifacts.VERDICTS
    }
    assert after.digest == before.digest and ready("ppo-examined").reasons is None
    code, text = here("eval-rm", "-c", config_of("eval-rm"))
    assert code == 0 and "fail, before: warn" in text and artifacts.read(exam).digest == before.digest
    code, text = here("eval-rm", "-c", config_of("eval-rm"))
    assert code == 0 and "before" not in text


def test_an_examination_is_whole_at_every_moment_of_being_judged_again(old, monkeypatch):
    exam = Path("runs/eval-rm")
    manifest, report = artifacts.read(exam), json.loads((exam / "eval.json").read_text())
    written, write = [], artifacts.storage.write_json

    def watched(path, value):
        write(path, value)
        written.append(path.name)
        artifacts.verify(exam, artifacts.read(exam))
        assert artifacts.read(exam).digest == manifest.digest

    monkeypatch.setattr(artifacts.storage, "write_json", watched)
    now = artifacts.judged_again(exam, manifest, {**report, "verdict": "pass", "verdicts": []})
    artifacts.rewrite(exam, now)
    assert written == ["manifest.json", "eval.json", "manifest.json"]
    report["accuracy"] = {"estimate": 0.4, "ci95": [0.3, 0.5]}
    write(exam / "eval.json", report)
    with pytest.raises(RlhfError, match="CKP005"):
        artifacts.verify(exam, artifacts.read(exam))


# --- the gate before PPO ---


def pipeline_of(*names):
    steps = [{"stage": STAGE_OF[name].id, "config": str(config_of(name))} for name in names]
    Path("pipeline.yaml").write_text(json.dumps({"stages": steps}))


def test_the_pipeline_stops_at_a_failed_examination_and_accepting_it_leaves_a_mark(old, here):
    pipeline_of("sft", "train-rm", "eval-rm", "ppo")
    before = weights("ppo")
    code, text = here("pipeline", "-c", "pipeline.yaml")
    assert code == 7 and "Stage 3 of 4: eval-rm: runs/eval-rm is up to date" in text and "Stage 4" not in text
    for words in ("GRD030", "over_length", "probes.gibberish", "other thresholds", "rewards.0.accept: failed"):
        assert words in text
    assert "has not been examined" not in text

    named = ("--set", "ppo.rewards.0.examination=runs/eval-rm")
    code, text = here("pipeline", "-c", "pipeline.yaml", *named)
    assert code == 7 and "GRD030" in text and weights("ppo") == before
    code, text = here("pipeline", "-c", "pipeline.yaml", *named, "--set", "ppo.rewards.0.accept=failed")
    assert code == 0 and "Stage 4 of 4: ppo: runs/ppo is up to date" in text and weights("ppo") == before
    mark = "runs/ppo was optimised against runs/train-rm, which failed its examination runs/eval-rm (over_length,"
    assert mark in here("show", "runs/ppo")[1]
    assert artifacts.read("runs/ppo").parents["rewards.0.examination"]["run_dir"] == "runs/eval-rm"

    code, text = here("collect", "-c", config_of("collect"), "policy=runs/ppo", "run_dir=runs/after")
    assert code == 0 and mark in text and examined.marks(artifacts.read("runs/after"))[0].startswith(mark)
    Path("asked.jsonl").write_text('{"prompt": "say hello 1"}\n')
    sampled = ("--reward", "runs/train-rm", "--prompts", "asked.jsonl", "--max-new-tokens", "8")
    text = here("compare", "runs/sft", "runs/ppo", *sampled)[1]
    assert text.count("failed its examination") >= 2, "when it is opened, and below the table"
    assert "failed its examination" in here("rank", "runs/ppo", *sampled, "--out", "ranked.jsonl")[1]
    assert here("export", "runs/ppo", "out")[0] == 0 and mark in Path("out/README.md").read_text()


def test_what_is_said_of_an_examination_that_is_not_named_is_true(old):
    def notes(*overrides):
        return " ".join(ready("ppo", *overrides).plan.notes())

    assert "was examined in runs/eval-rm (verdict: fail, by over_length" in notes() and "has not been" not in notes()
    assert "rewards.0.examination: runs/eval-rm makes it count" in notes()
    assert "runs/ensemble) has not been examined" in notes("rewards.0.run=runs/ensemble")
    assert "examined" not in notes("rewards=[{function: 'a:b'}]")


def test_a_missing_run_names_the_command_that_makes_it(old, here):
    shutil.rmtree("runs")
    code, text = here("ppo", "-c", config_of("ppo-examined"))
    assert code == 5 and "rewards.0.examination: runs/eval-rm: no such run directory. Fix: rlhf eval-rm -c" in text
    for command in ("rlhf sft -c configs/sft.yaml", "rlhf train-rm -c configs/train-rm.yaml"):
        assert command in text
    code, text = here("train-rm", "-c", config_of("train-rm"), "policy=runs/nobody", "data.path=runs/collect")
    assert "Fix: rlhf sft with run_dir=runs/nobody" in text and "Fix: rlhf collect -c configs/collect.yaml" in text


# --- parts of a pipeline ---


def test_the_plan_of_a_pipeline_names_what_is_not_made_yet(old, here):
    shutil.rmtree("runs")
    pipeline_of("sft", "train-rm", "eval-rm", "ppo")
    code, text = here("pipeline", "-c", "pipeline.yaml", "--dry-run", "--from", "sft", "--limit", "20")
    assert code == 0 and not Path("runs").exists(), text
    assert "Stage 1 of 4: sft:" in text and "data: 16 rows" in text and "6 steps of 8." in text
    assert "Stage 4 of 4: ppo:" in text and "rewards.0: runs/train-rm has not been run yet" in text
    code, text = here("pipeline", "-c", "pipeline.yaml", "--from", "train-rm", "--to", "eval-rm")
    assert code == 5 and "configs/train-rm.yaml: policy: runs/sft: no finished run there" in text
    assert "Fix: rlhf sft -c configs/sft.yaml before stage 2 of 4: train-rm" in text
    pipeline_of("ppo-examined", "eval-rm")
    code, text = here("pipeline", "-c", "pipeline.yaml")
    assert code == 5 and "Fix: rlhf eval-rm -c configs/eval-rm.yaml before stage 1 of 2: ppo" in text


def test_a_part_of_a_pipeline_is_named_by_stage_or_by_number(old, here):
    pipeline_of("train-rm", "ensemble", "eval-rm")
    code, text = here("pipeline", "-c", "pipeline.yaml", "--from", "2", "--to", "2")
    assert code == 0 and "Stage 2 of 3: train-rm: runs/ensemble is up to date" in text and "Stage 3" not in text
    for wrong, said in (
        (("--to", "train-rm"), "more than once. Fix: its number: 1 (train-rm, configs/train-rm.yaml), 2"),
        (("--from", "ppo"), "the pipeline has no stage ppo"),
        (("--from", "3", "--to", "1"), "comes before stage 3"),
        (("--set", "eval-rm=3"), "not of the form STAGE.key"),
        (("--set", "eval-rm.num_bin=3"), "num_bins"),
        (("--to", "2", "--set", "eval-rm.num_bins=3"), "leave out"),
    ):
        code, text = here("pipeline", "-c", "pipeline.yaml", *wrong)
        assert code == 2 and said in text, text
    code, text = here("pipeline", "-c", "pipeline.yaml", "--dry-run", "--set", "3.num_bins=3", "--from", "3")
    assert code == 0 and "run_dir runs/eval-rm: num_bins: 4 -> 3." in text


# --- the chains that are shipped ---


@pytest.mark.parametrize(
    "folder",
    [
        "configs",
        "rlhf/start/world",
        *sorted(
            str(path.parent.relative_to(GOLDEN.parents[2]))
            for path in (GOLDEN.parents[2] / "configs").glob("*/pipeline.yaml")
        ),
    ],
)
def test_every_shipped_chain_examines_the_reward_model_before_ppo_and_names_the_examination(folder):
    home = GOLDEN.parents[2] / folder
    steps = [step.stage for step in load.load(PipelineConfig, home / "pipeline.yaml").stages]
    assert steps.index("eval-rm") < steps.index("ppo")
    exam, ppo = (load.load(STAGES[name].config_class, home / f"{name}.yaml") for name in ("eval-rm", "ppo"))
    assert [(one.run, one.examination) for one in ppo.rewards] == [(exam.reward, exam.run_dir)]


def test_make_examines_before_ppo():
    text = (GOLDEN.parents[2] / "Makefile").read_text()
    rule = next(line for line in text.splitlines() if line.startswith("$(RUNS)/ppo/manifest.json:"))
    assert "$(RUNS)/eval-rm/manifest.json" in rule
