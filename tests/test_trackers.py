"""Trackers beside metrics.jsonl: real TensorBoard, stand-ins with the interfaces of the others; no point twice."""

from __future__ import annotations

import importlib
import json
import sys
from collections import Counter
from types import ModuleType, SimpleNamespace

import pytest

from rlhf.config import load
from rlhf.config.stages import SftConfig
from rlhf.errors import RlhfError
from rlhf.preflight import prepare
from rlhf.runs import run_directory
from rlhf.runs.tracking import Tracker
from rlhf.stages.registry import STAGES

SERVICES = ("wandb", "trackio", "mlflow")


class Service:
    """What a tracker's service holds: its runs by id, each with the points it was sent."""

    def __init__(self):
        self.points, self.calls, self.settings = [], [], {}

    def init(self, project, **settings):
        self.calls.append((project, settings))
        return SimpleNamespace(log=lambda values, step: self.sent(values, step), finish=lambda: None)

    def sent(self, values, step):
        self.points.append((step, dict(values)))

    def start_run(self, run_id, **settings):
        self.calls.append((run_id, settings))
        return SimpleNamespace(info=SimpleNamespace(run_id=run_id or "made-by-the-server"))


@pytest.fixture(params=SERVICES)
def service(request, monkeypatch):
    found, module = Service(), ModuleType(request.param)
    module.init, found.name = found.init, request.param
    if request.param == "mlflow":
        module.search_experiments = lambda filter_string: []
        module.create_experiment = lambda **settings: "experiment"
        module.start_run, module.end_run = found.start_run, lambda: None
        module.log_metrics = lambda metrics, step: found.sent(metrics, step)
        module.log_params = found.settings.update
        module.utils = SimpleNamespace(
            validation=SimpleNamespace(MAX_PARAM_VAL_LENGTH=500, MAX_PARAMS_TAGS_PER_BATCH=100)
        )
    monkeypatch.setitem(sys.modules, request.param, module)
    return found


def started(path, **identity):
    path.mkdir(exist_ok=True)
    (path / "run.json").write_text(json.dumps({"format": 1, "stage": "ppo", "identity": identity}))
    return path


def train(run_dir, report_to, steps, value=float):
    """What a stage does: a row of metrics.jsonl, then the trackers."""
    tracker = Tracker(run_dir, report_to)
    with (run_dir / "metrics.jsonl").open("a") as file:
        for step in steps:
            file.write(json.dumps({"step": step, "loss": run_directory.plain(value(step))}) + "\n")
            file.flush()
            tracker.write(step, {"loss": value(step)})
    return tracker


def cut_back(run_dir, rows):
    path = run_dir / "metrics.jsonl"
    path.write_text("".join(line + "\n" for line in path.read_text().splitlines()[:rows]))


def shown(run_dir):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run_dir / "tensorboard"))
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars("loss")]


def test_a_resumed_run_shows_no_point_twice_and_misses_none(service, tmp_path):
    run_dir = started(tmp_path / "ppo", **{"kl.coef": 0.1})
    train(run_dir, service.name, range(1, 6))
    cut_back(run_dir, 3)
    train(run_dir, service.name, range(4, 9)).close()
    assert service.points == [(step, {"loss": float(step)}) for step in range(1, 9)]


def test_a_resumed_run_goes_on_in_the_same_run_of_the_service(service, tmp_path):
    run_dir = started(tmp_path / "ppo")
    for _ in range(2):
        train(run_dir, service.name, []).close()
    (first, began), (second, again) = service.calls
    if service.name == "mlflow":
        assert (first, second) == (None, "made-by-the-server") and began["run_name"] == "ppo"
    else:
        key = "id" if service.name == "wandb" else "name"
        assert began[key] == again[key] and again["resume"] == "allow" and first == second == "rlhf"
    other = started(tmp_path / "other")
    train(other, service.name, []).close()
    assert service.calls[2] != service.calls[1]


def test_a_tracker_that_is_named_later_gets_what_it_missed(service, tmp_path):
    run_dir = started(tmp_path / "sft")
    train(run_dir, "none", range(1, 4))
    train(run_dir, ["tensorboard", service.name], range(4, 6)).close()
    assert [step for step, _ in service.points] == [step for step, _ in shown(run_dir)] == [1, 2, 3, 4, 5]


def test_a_tracker_is_told_the_identity_and_no_secret(service, tmp_path, monkeypatch):
    monkeypatch.setenv("MY_API_KEY", "canary-7731")
    run_dir = started(tmp_path / "sft", **{"model.path": "x-canary-7731", "optim.learning_rate": 1e-4})
    train(run_dir, service.name, []).close()
    told = service.settings if service.name == "mlflow" else service.calls[0][1]["config"]
    assert told == {"model.path": "x-***", "optim.learning_rate": 1e-4}
    assert "canary" not in repr(service.calls)


def test_tensorboard_shows_metrics_jsonl_after_any_cut_and_what_is_not_finite(tmp_path):
    run_dir = started(tmp_path / "ppo")
    train(run_dir, "tensorboard", range(1, 6))
    cut_back(run_dir, 3)
    train(run_dir, "tensorboard", range(4, 7), value=lambda step: step + 0.5).close()
    assert shown(run_dir) == [(1, 1.0), (2, 2.0), (3, 3.0), (4, 4.5), (5, 5.5), (6, 6.5)]
    other = started(tmp_path / "nan")
    train(other, "tensorboard", [1], value=lambda step: float("nan"))
    train(other, "tensorboard", []).close()
    ((step, value),) = shown(other)
    assert step == 1 and value != value


def test_no_tracker_writes_nothing(tmp_path):
    Tracker(tmp_path, "none").write(1, {"loss": 1.0})
    assert list(tmp_path.iterdir()) == []


def test_what_a_trackers_library_raises_is_told_with_its_name(service, tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise RuntimeError("no network\nmore")

    run_dir = started(tmp_path / "sft")
    tracker = train(run_dir, service.name, [1])
    monkeypatch.setattr(service, "sent", refuse)
    with pytest.raises(RlhfError, match=f"RES020.*report_to: {service.name}: cannot be written: no network. Fix"):
        tracker.write(2, {"loss": 1.0})


def test_a_tracker_that_is_not_installed_is_refused_before_any_row_is_read(tmp_path, monkeypatch):
    for name in ("wandb", "mlflow"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    (tmp_path / "wandb").mkdir()
    monkeypatch.setattr(sys, "path", [str(tmp_path), *(entry for entry in sys.path if entry)])
    importlib.invalidate_caches()
    path = tmp_path / "sft.yaml"
    path.write_text("data: {path: nowhere.jsonl}\nepochs: 1\nreport_to: [tensorboard, wandb, mlflow, wandb]\n")
    config = load.load(SftConfig, path)
    with pytest.raises(RlhfError) as caught:
        prepare.prepare(config, STAGES["sft"].needs(config))
    first, second, *_ = caught.value.problems
    assert (first.code, first.where, first.fix) == ("RES021", "report_to: wandb", "pip install wandb")
    assert second.where == "report_to: mlflow" and caught.value.exit_code == 6
    assert Counter(problem.code for problem in caught.value.problems)["RES021"] == 2


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ("comet", "must be 'none', 'tensorboard', 'wandb', 'trackio' or 'mlflow', got 'comet'"),
        ("[none]", "got 'none'"),
        ("[wandb, 3]", "got 3"),
        ("3", "got 3"),
    ],
)
def test_an_unknown_tracker_is_one_problem_that_lists_the_known_ones(tmp_path, given, wanted):
    path = tmp_path / "sft.yaml"
    path.write_text(f"data: {{path: d.jsonl}}\nepochs: 1\nreport_to: {given}\n")
    with pytest.raises(RlhfError) as caught:
        load.load(SftConfig, path)
    (problem,) = caught.value.problems
    assert problem.code == "CFG003" and wanted in problem.what and "report_to" in problem.where
