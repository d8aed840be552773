"""rlhf show without a run: what stands below runs/, in which state, with its headline figure."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from rlhf.commands import run_list
from rlhf.runs import artifacts, run_directory
from rlhf.runs.artifacts import Manifest
from rlhf.runs.identity import Identity

GATE = {"code": "GRD002", "where": "runs/gated: eval/end_token_rate", "what": "low."}
MADE = {
    "mine/sft": ("policy", "sft", {"eval/loss": 2.754, "eval/base_loss": 3.41, "eval/end_token_rate": 0.98}, {}),
    "mine/train-rm": ("reward", "train-rm", {"eval/accuracy": 0.7125}, {"members": 3}),
    "eval-rm": ("examination", "eval-rm", {"eval/accuracy": 0.7}, {"verdict": "fail", "failed": list("abcd")}),
    "bench": ("examination", "eval-rm", {"eval/accuracy": 0.7}, {}),
    "a/b/c/ppo": ("policy", "ppo", {"eval/score": 1.5, "start/score": 0.25, "eval/exact_kl_nats": 3.25},
                  {"best_step": 20, "last_step": 28}),
    "collect": ("preferences", "collect", {"collect/prompts": 120}, {}),
    "gated": ("policy", "sft", {"eval/loss": "nan"}, {"failed_gates": [GATE]}),
}  # fmt: skip
FIGURES = {
    "mine/sft": "held-out loss 2.75, before 3.41, end rate 0.98", "mine/train-rm": "accuracy 0.713, members 3",
    "eval-rm": "verdict fail (a, b, c, ...)", "bench": "no verdict, accuracy 0.7",
    "a/b/c/ppo": "score 1.5, before 0.25, KL 3.25, best step 20 of 28", "collect": "prompts 120",
    "gated": "held-out loss nan",
}  # fmt: skip


def finished(path, kind="policy", stage="sft", metrics=None, details=None):
    with run_directory.open_run(path, stage, Identity({}), "") as run:
        (path / "adapter").mkdir()
        (path / "adapter" / "w.safetensors").write_bytes(b"1234")
        run.finish(Manifest(kind, stage, 0, {}, metrics or {}, 1.0, details=details or {}))


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, (kind, stage, metrics, details) in MADE.items():
        finished(Path("runs", name), kind, stage, metrics, details)
    return Path("runs")


def states(directory=run_list.RUNS):
    return {one.run_dir.removeprefix("runs/"): one.state for one in run_list.below(directory)}


def test_finished_runs_at_any_depth_with_their_headline_figure(home, here):
    code, text = here("show")
    assert code == 0
    (header, *rows) = text.splitlines()
    assert header.split() == ["run", "stage", "date", "state", "figures"] and len(rows) == len(MADE)
    for name, (_, stage, *_) in MADE.items():
        (row,) = [row for row in rows if row.startswith(f"runs/{name} ")]
        day = artifacts.read(home / name).created[:10]
        state = "failed a gate: GRD002 eval/end_token_rate" if name == "gated" else "finished"
        assert row.split(maxsplit=3)[1:3] == [stage, day] and f"  {state}  " in row and row.endswith(FIGURES[name])
    code, text = here("show", "runs/mine", "--json")
    assert code == 0 and [one["run_dir"] for one in json.loads(text)] == ["runs/mine/sft", "runs/mine/train-rm"]
    assert {one["stage"] for one in json.loads(text)} == {"sft", "train-rm"}


def test_unfinished_damaged_and_moved_aside_runs_are_listed_as_what_they_are(home, here):
    with run_directory.open_run(home / "cut", "ppo", Identity({}), "") as run:
        for step in range(8):
            run.write_metrics(step, {"rollout/score": float(step)})
    with (home / "cut/metrics.jsonl").open("a") as file:
        file.write('{"step": 8, "rollout')
    run_directory.open_run(home / "begun", "sft", Identity({}), "").close()
    for name in ("no manifest", "short", "lost"):
        finished(home / name)
    (home / "no manifest/manifest.json").write_text("{")
    (home / "short/adapter/w.safetensors").write_bytes(b"1")
    shutil.rmtree(home / "lost/adapter")
    run_directory.open_run(home / "unreadable", "sft", Identity({}), "").close()
    (home / "unreadable/run.json").write_text("[]")
    run_directory.open_run(home / "collect", "collect", Identity({"a": 1}), "", overwrite=True).close()
    (home / ".half.tmp-1").mkdir()
    shutil.copy(home / "begun/run.json", home / ".half.tmp-1/run.json")
    found = states()
    assert found["cut"] == "unfinished at step 7" and found["begun"] == "unfinished, before its first step"
    assert found["no manifest"].startswith("damaged: manifest.json is not readable")
    assert found["short"] == "damaged: adapter/w.safetensors has another size"
    assert found["lost"] == "damaged: adapter/w.safetensors is missing"
    assert found["unreadable"].startswith("damaged: run.json is not readable")
    assert found["collect.old-1"] == "finished" and not any("half" in name for name in found)
    code, text = here("show")
    assert code == 0 and text.count("(moved aside)") == 1
    assert "finished (moved aside) prompts 120" in " ".join(text.split())
    code, text = here("show", "runs/cut")
    assert code == 0 and "unfinished at step 7" in text
    assert here("show", "runs/no manifest")[0] == 5


def test_a_finished_run_is_described_and_no_run_says_what_to_do_next(home, here, tmp_path, monkeypatch):
    code, text = here("show", "runs/mine/sft")
    assert code == 0 and "runs/mine/sft: a policy run" in text
    Path("empty").mkdir()
    code, text = here("show", "empty")
    assert code == 5 and "error[CKP001] empty: is not a run and holds none." in text
    monkeypatch.chdir(tmp_path / "empty")
    code, text = here("show")
    assert code == 0 and "No run in runs yet. Next: rlhf pipeline" in text
    assert here("show", "--json") == (0, "[]\n")


def test_two_hundred_runs_are_listed_in_a_second_without_torch(home):
    for number in range(200):
        shutil.copytree(home / "mine/sft", home / f"many/{number}")
    code = (
        "import sys, time; started = time.process_time(); sys.argv = ['rlhf', 'show']\n"
        "from rlhf.cli import main\n"
        "try: main()\n"
        "except SystemExit as stop: print(stop.code, 'torch' in sys.modules, time.process_time() - started)\n"
    )
    root = str(Path(__file__).parents[1])
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={"PYTHONPATH": root, "PATH": ""}, check=True
    )
    *rows, last = done.stdout.splitlines()
    stop, torch, seconds = last.split()
    assert (stop, torch) == ("0", "False") and float(seconds) < 2 and len(rows) == 201 + len(MADE)
