"""A finished policy is sampled as its own run samples it, unless something else is asked for, and it is said."""

from __future__ import annotations

import io
import json
import re
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import tiny

from rlhf.config import load
from rlhf.config.sections import PolicySamplingSection, SamplingSection
from rlhf.config.stages import CollectConfig
from rlhf.errors import RlhfError
from rlhf.planning.specs import Ground
from rlhf.runs import artifacts, policy_sampling
from rlhf.runs.artifacts import Manifest
from rlhf.stages import ancestry
from rlhf.stages.registry import STAGES

PROMPTS = [f"where is chair {n} ?" for n in range(12)]
SHORT = {"max_new_tokens": 4, "temperature": 0.5, "stop_tokens": ["e"]}


def policy_run(where, name, **sampling):
    """The SFT run under another name, whose config had these sampling settings."""
    shutil.copytree(where / "runs/sft", where / "runs" / name)
    manifest = artifacts.read(where / "runs/sft")
    identity = {"a": 1, **{f"sampling.{key}": value for key, value in sampling.items()}}
    artifacts.write(where / "runs" / name, replace(manifest, identity=identity))


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A model, a run on it that does not say how it samples, and two that do."""
    where = tmp_path_factory.mktemp("policies")
    tiny.finished_sft(where)
    policy_run(where, "short", **SHORT)
    policy_run(where, "cut", max_new_tokens=3, temperature=1.0, concurrency=2, of_a_later_version=1)
    policy_run(where, "long", max_new_tokens=40, temperature=1.0, stop_tokens=[])
    (where / "p.jsonl").write_text("".join(json.dumps({"prompt": text}) + "\n" for text in PROMPTS))
    return where


@pytest.fixture
def run(world, here, monkeypatch):
    monkeypatch.chdir(world)

    def ran(*command):
        code, shown = here(*command)
        assert code == 0, shown
        return shown

    return ran


def responses(path="out.jsonl"):
    return [json.loads(line)["response"] for line in Path(path).read_text().splitlines()]


def test_generate_samples_as_the_run_does_and_as_it_is_asked_to(run):
    sampled = {}
    for name, source, *flags in (
        ("own", "runs/short"),
        ("asked", "runs/sft", "--max-new-tokens", 4, "--temperature", 0.5, "--stop-token", "e"),
        ("defaults", "runs/sft"),
        ("elsewhere", "m"),
        ("all of it", "runs/short", "--max-new-tokens", 64, "--temperature", 1, "--stop-token", ""),
    ):
        shown = run("generate", source, "--prompts", "p.jsonl", "--out", "out.jsonl", *flags)
        (sampled[name, "said"],) = [line for line in shown.splitlines() if line.startswith("Sampling ")]
        sampled[name] = responses()
    assert sampled["own"] == sampled["asked"] != sampled["defaults"] == sampled["all of it"]
    stop = "stop_tokens ['e']"
    assert sampled["own", "said"] == (
        f"Sampling runs/short with max_new_tokens 4, temperature 0.5, {stop}, as its own run does."
    )
    assert sampled["asked", "said"] == (
        "Sampling runs/sft with max_new_tokens 4 (asked for, instead of 64), temperature 0.5 (asked for, instead of "
        f"1.0), {stop} (asked for, instead of []), by rlhf's defaults: its run does not say."
    )
    assert sampled["elsewhere", "said"] == (
        "Sampling m with max_new_tokens 64, temperature 1.0, by rlhf's defaults: it is not a run, and its "
        "generation_config gives only its end tokens."
    )


def test_what_a_models_generation_config_says_of_sampling_is_not_used(run, world):
    def generated():
        run("generate", "m", "--prompts", "p.jsonl", "--out", "out.jsonl")
        return responses()

    before, path = generated(), world / "m/generation_config.json"
    text = path.read_text()
    leaks = {"do_sample": True, "temperature": 0.01, "top_k": 1, "top_p": 0.1, "max_new_tokens": 2, "max_length": 5}
    path.write_text(json.dumps({**json.loads(text), **leaks}))
    try:
        assert generated() == before
    finally:
        path.write_text(text)


def test_compare_samples_each_policy_as_it_was_trained_and_counts_what_was_cut_off(run, world):
    command = ("--prompts", "p.jsonl", "--reward", "test_compare:shorter", "--resamples", "100", "--out", "out")
    shown = run("compare", "runs/cut", "runs/long", *command)
    assert "sampled differently, each as its own run does: max_new_tokens 3 and 40. --max-new-tokens samples" in shown
    report = json.loads(Path("out/report.json").read_text())
    rows = [json.loads(line) for line in Path("out/rows.jsonl").read_text().splitlines()]
    cut, whole = rows[::2], rows[1::2]
    # same noise: the baseline's response is the beginning of the candidate's
    assert all(long["response"].startswith(short["response"][:1]) for short, long in zip(cut, whole, strict=True))
    num_cut, num_whole = (sum(not row["finished"] for row in own) for own in (cut, whole))
    assert (report["baseline"]["cut_off"], report["candidate"]["cut_off"]) == (num_cut, num_whole)
    assert num_cut > num_whole and report["baseline"]["sampling"]["max_new_tokens"] == 3
    both = [n for n in range(12) if cut[n]["finished"] and whole[n]["finished"]]
    assert report["both_ended"]["comparisons"] == len(both)
    assert f"{num_cut} ({num_cut / 12:.0%}) at 3 tokens -> {num_whole} ({num_whole / 12:.0%}) at 40 tokens" in shown

    shown = run("compare", "runs/cut", "runs/long", *command, "--max-new-tokens", "5")
    assert "sampled differently" not in shown
    assert json.loads(Path("out/report.json").read_text())["ties"] == 12
    shown = run("compare", "m", "runs/cut", *command)
    assert "Sampling m with max_new_tokens 3, temperature 1.0, as runs/cut, with which it is compared." in shown


def test_rank_and_chat_sample_as_the_run_does(run, monkeypatch):
    shown = run("rank", "runs/cut", "--prompts", "p.jsonl", "--reward", "test_compare:words", "-n", "2", "--out", "r")
    assert "Sampling runs/cut with max_new_tokens 3, temperature 1.0, as its own run does." in shown
    monkeypatch.setattr(sys, "stdin", io.StringIO("hello\n"))
    shown = run("chat", "runs/cut")
    assert "Sampling runs/cut with max_new_tokens 3" in shown
    assert 1 <= int(re.search(r"\[(\d+) tokens", shown)[1]) <= 3


def test_collect_takes_from_the_policy_what_its_config_leaves_open(run, world):
    config = {
        "policy": "runs/short",
        "prompts": {"path": "p.jsonl"},
        "samples_per_prompt": 3,
        "labeller": {"function": "test_compare:shorter"},
        "sampling": {"max_new_tokens": 20},
    }
    Path("collect.yaml").write_text(json.dumps(config))
    shown = run("collect", "-c", "collect.yaml")
    assert "max_new_tokens 20 (asked for, instead of 4), temperature 0.5, stop_tokens ['e'], as its own" in shown
    row = json.loads(Path("runs/collect/preferences.jsonl").read_text().splitlines()[0])
    assert (row["provenance"]["max_new_tokens"], row["provenance"]["temperature"]) == (20, 0.5)
    assert not any("e" in text for text in row["responses"])
    identity = artifacts.read("runs/collect").identity
    assert (identity["sampling.temperature"], identity["sampling.stop_tokens"]) == (0.5, ["e"])
    assert "up to date" in run("collect", "-c", "collect.yaml")
    assert "up to date" in run("collect", "-c", "collect.yaml", "sampling.temperature=0.5")
    manifest = artifacts.read("runs/short")
    artifacts.write(Path("runs/short"), replace(manifest, identity={**manifest.identity, "sampling.temperature": 0.6}))
    assert "sampling.temperature: 0.5 -> 0.6" in run("collect", "-c", "collect.yaml", "--dry-run")


def test_a_run_says_how_it_samples_or_is_refused():
    manifest = Manifest("policy", "ppo", 0, {"sampling.max_new_tokens": 9, "sampling.unknown": 2, "seed": 1}, {}, 1.0)
    assert policy_sampling.of_run(manifest) == SamplingSection(max_new_tokens=9)
    assert policy_sampling.of_run(replace(manifest, identity={"seed": 1})) is None
    with pytest.raises(RlhfError, match="CKP003.*ppo run.*sampling"):
        policy_sampling.of_run(replace(manifest, identity={"sampling.max_new_tokens": "many"}))
    section = PolicySamplingSection(temperature=0.7, stop_tokens=[])
    assert section.of(SamplingSection(max_new_tokens=9, stop_tokens=["x"])) == SamplingSection(
        max_new_tokens=9, temperature=0.7
    )


def alike(prompts, responses):
    return [0.0] * len(responses)


def test_collect_says_of_each_prompt_that_it_drops_whether_responses_lack_or_a_preference(run):
    """Both labellers see the same samples; the second prefers none of them."""
    found = {}
    for labeller in ("test_compare:shorter", "test_policy_sampling:alike"):
        config = {
            "policy": "runs/short",
            "prompts": {"path": "p.jsonl"},
            "samples_per_prompt": 2,
            "run_dir": labeller[-5:],
            "labeller": {"function": labeller},
            "sampling": {"max_new_tokens": 12},
        }
        Path("collect.yaml").write_text(json.dumps(config))
        shown = run("collect", "-c", "collect.yaml")
        counts = artifacts.read(labeller[-5:]).metrics
        ranked, short, equal = found[labeller] = [
            counts[f"collect/{name}"] for name in ("prompts", "groups_short", "groups_alike")
        ]
        assert f"{ranked} prompts ranked; {short} dropped because fewer than two different responses" in shown
        assert f"to them were left, {equal} because all that were left scored the same" in shown
        assert ranked + short + equal == 12
    (ranked, short, equal), (none, as_short, all_equal) = found.values()
    assert 0 < short < 12 and (none, as_short, all_equal) == (0, short, ranked + equal)


def test_what_collect_left_open_is_no_change_to_a_run_that_wrote_it_down(world):
    """Runs made before a null meant the policy's own had the same keys with these values."""
    config = load.load_text(CollectConfig, "policy: runs/long\nprompts: {path: p.jsonl}\n", "c.yaml")
    settled = STAGES["collect"].needs(config).settled({"policy": artifacts.read(world / "runs/long")})
    assert settled == {
        "sampling.max_new_tokens": 40,
        "sampling.temperature": 1.0,
        "sampling.concurrency": 64,
        "sampling.engine": "hf",
        "sampling.stop_tokens": [],
    }


def test_what_is_planned_for_collect_is_as_long_as_the_policy_is_sampled(world, tmp_path):
    configs = {
        "sft": f"run_dir: runs/a\nmodel: {{path: {world / 'm'}}}\ndata: {{path: d}}\nsteps: 1\n"
        "sampling: {max_new_tokens: 24}\n",
        "ppo": "run_dir: runs/b\npolicy: runs/a\nprompts: {path: d}\nsampling: {max_new_tokens: 48}\n",
    }
    for name, text in configs.items():
        (tmp_path / f"{name}.yaml").write_text(text)

    def planned(policy, sampling=""):
        config = load.load_text(CollectConfig, f"policy: {policy}\nprompts: {{path: d}}\n{sampling}", "c.yaml")
        ground = Ground(ancestry.find(policy, tmp_path), {}, "cpu", "base")
        return STAGES["collect"].needs(config).memory(ground).response

    assert (planned("runs/a"), planned("runs/b"), planned(str(world / "runs/short"))) == (24, 48, 4)
    assert planned("runs/b", "sampling: {max_new_tokens: 7}\n") == 7
