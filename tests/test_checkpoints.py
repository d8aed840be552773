"""Checkpoints hold every kind of value exactly, never a part of one, and a resumed run starts from a whole one."""

from __future__ import annotations

import json
import logging
import math
import os
import stat
from importlib import metadata
from pathlib import Path

import pytest
import torch
from tiny import base, lora, shake

from rlhf.data.batches import DataOrder
from rlhf.errors import RlhfError
from rlhf.models.heads import ScalarHead
from rlhf.models.roles import SharedBase
from rlhf.runs import artifacts, checkpoints, interrupts, run_directory, snapshots, storage
from rlhf.runs.identity import Identity
from rlhf.training.optimizer import Optimizer


class Held:
    def __init__(self, state=None):
        self.state = state

    def state_dict(self):
        return self.state

    def load_state_dict(self, state):
        self.state = state


def save(directory, state, order=1):
    snapshots.save(directory, 1, order, 0.0, 0, state)


def load(directory, state):
    entry = snapshots.read_entry(directory)
    assert entry and snapshots.damaged(directory, entry) is None
    snapshots.load(directory, entry, state)


def round_trip(directory, state):
    save(directory, {"x": Held(state)})
    back = Held()
    load(directory, {"x": back})
    return back.state


def test_values_of_every_kind_come_back_exactly(tmp_path):
    plain = {"a": 0.1, "b": 10**40, "c": (1, [2.5, None]), 3: True, "d": -0.0, "e": math.inf, "f": {}, "g": "é"}
    found = round_trip(tmp_path / "c", plain)
    assert found == plain and math.copysign(1, found["d"]) == -1 and type(found["c"]) is tuple
    assert math.isnan(round_trip(tmp_path / "n", {"a": math.nan})["a"])


def test_tensors_keep_type_shape_and_bits(tmp_path):
    tensors = [torch.randn(3, 2), torch.ones(2, dtype=torch.bfloat16), torch.tensor(3), torch.empty(0, 4)]
    found = round_trip(tmp_path / "c", {"all": tensors, "view": torch.arange(6).view(2, 3).T})
    for a, b in zip([*tensors, torch.arange(6).view(2, 3).T], [*found["all"], found["view"]], strict=True):
        assert a.dtype == b.dtype and torch.equal(a, b)


@pytest.mark.parametrize(
    "state",
    [{1: torch.tensor(1.0), "1": torch.tensor(2.0)}, {"a/b": torch.tensor(1.0), "a": {"b": torch.tensor(2.0)}}],
)
def test_two_tensors_of_one_name_are_never_merged(tmp_path, state):
    with pytest.raises(AssertionError, match="one name"):
        save(tmp_path / "c", {"x": Held(state)})
    assert not (tmp_path / "c").exists()


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_weights_that_are_not_finite_are_never_written(tmp_path, value):
    with pytest.raises(RlhfError, match=r"GRD005.*x/w"):
        save(tmp_path / "c", {"x": Held({"w": torch.tensor([1.0, value])})})
    assert not (tmp_path / "c").exists()


@pytest.mark.parametrize("text", ["[]", "{}", "not json", '{"files": {}, "states": ["x"]}', None])
def test_a_manifest_that_is_not_what_was_written_is_none(tmp_path, text):
    save(tmp_path / "c", {"x": Held({"a": 1})})
    path = tmp_path / "c" / snapshots.MANIFEST
    path.write_text(path.read_text("utf-8").replace(": ", ":  ", 1) if text is None else text, "utf-8")
    assert snapshots.read_entry(tmp_path / "c") is None


def test_checkpoints_that_changed_places_are_damaged(tmp_path):
    for index in (1, 2):
        save(tmp_path / f"step-{index}", {"x": Held({"a": torch.ones(2)})}, order=index)
    (tmp_path / "step-1").rename(tmp_path / "t")
    (tmp_path / "step-2").rename(tmp_path / "step-1")
    entry = snapshots.read_entry(tmp_path / "step-1")
    assert "belongs to another" in snapshots.damaged(tmp_path / "step-1", entry)


def test_states_of_another_stage_or_shape_are_refused(tmp_path):
    opened = base(tmp_path / "m")
    roles = SharedBase(opened)
    roles.add("policy", adapter=lora(opened), trained=True)
    save(tmp_path / "c", {"policy": roles.state("policy")})
    with pytest.raises(RlhfError, match="CKP021"):
        load(tmp_path / "c", {"value": roles.state("policy")})
    other = SharedBase(base(tmp_path / "n"))
    wider = lora(other.base)
    wider.r = 8
    other.add("policy", adapter=wider, trained=True)
    with pytest.raises(RlhfError, match=r"CKP021.*policy does not fit"):
        load(tmp_path / "c", {"policy": other.state("policy")})


def train(roles, optimizer, order, steps):
    for _ in range(steps):
        rows = order.next()
        with roles.acting_as("policy") as (model, head):
            ids = torch.tensor([[60 + row, 61, 62] for row in rows])
            head(model.model(input_ids=ids).last_hidden_state[:, -1]).square().sum().backward()
        optimizer.step("test")


def test_a_checkpoint_brings_training_back_bit_for_bit_and_every_part_counts(tmp_path):
    opened = base(tmp_path / "m", double=True)
    roles = SharedBase(opened)
    roles.add("policy", adapter=lora(opened), head=ScalarHead(32).double(), trained=True)
    shake(roles, "policy", size=0.1)

    def fresh():
        for parameter in roles.trained_parameters("policy"):
            parameter.data.fill_(0.01)
        optimizer = Optimizer(roles.trained_parameters("policy"), 0.05, 20, schedule="linear")
        order = DataOrder(7, 2, seed=1)
        return {"policy": roles.state("policy"), "optimizer": optimizer, "order": order}

    def weights():
        return torch.cat([parameter.detach().flatten() for parameter in roles.trained_parameters("policy")])

    state = fresh()
    train(roles, state["optimizer"], state["order"], 4)
    save(tmp_path / "step-4", state)
    train(roles, state["optimizer"], state["order"], 4)
    wanted = weights()
    for dropped in (None, *state):
        again = fresh()
        load(tmp_path / "step-4", {**again, **({dropped: Held()} if dropped else {})})
        train(roles, again["optimizer"], again["order"], 4)
        assert torch.equal(weights(), wanted) == (dropped is None), dropped
    assert sorted(p.suffix for p in (tmp_path / "step-4").iterdir()) == [".json", ".json", ".safetensors"]


def test_settings_are_the_configs_after_a_resume_and_data_may_have_shrunk():
    def optimizer(**settings):
        return Optimizer([torch.nn.Parameter(torch.ones(2))], **settings)

    old, new = (
        optimizer(learning_rate=0.1, total_steps=9),
        optimizer(learning_rate=0.2, total_steps=9, weight_decay=0.5),
    )
    new.load_state_dict(old.state_dict())
    assert new.learning_rate == 0.2 and new.adamw.param_groups[0]["weight_decay"] == 0.5
    order = DataOrder(9, 2, seed=0)
    order.load_state_dict({"epoch": 0, "offset": 8})
    smaller = DataOrder(5, 2, seed=0)
    smaller.load_state_dict(order.state_dict())
    assert smaller.next() == smaller._order[:2] and smaller.epoch == 1


@pytest.fixture
def run_dir(tmp_path):
    return tmp_path / "run"


@pytest.fixture
def said(caplog, monkeypatch):
    monkeypatch.setattr(run_directory.log, "propagate", True)
    caplog.set_level(logging.INFO, "rlhf")
    return caplog


def opened_run(run_dir, identity=None, **how):
    run = run_directory.open_run(run_dir, "ppo", Identity(identity or {"a": 1}), "", **how)
    if not how:
        run.write_metrics(0, {"score": 0.0})
    return run


def steps(run_dir, numbers, resume=False, keep=2, every=1, needs=lambda step: ()):
    """Do the steps of a little run; returns what it resumed with."""
    position = checkpoints.Position()
    with opened_run(run_dir, resume=resume) as run:
        saved = checkpoints.Checkpoints(run, {"position": position}, every, keep)
        saved.resume(9)
        found = position.step
        for step in numbers:
            position.step = step
            run.write_metrics(step, {"loss": 0.5})
            for name in needs(step):
                (saved.directory / name).mkdir(parents=True, exist_ok=True)
                (saved.directory / name / "weights").write_text(str(step))
            saved.end_of_step(step, needs(step))
    return found


def names(run_dir):
    return sorted(path.name for path in (run_dir / artifacts.CHECKPOINTS).iterdir())


def test_two_checkpoints_and_what_they_need_are_kept(run_dir):
    steps(run_dir, range(1, 6), needs=lambda step: (f"best-{3 if step == 4 else min(step, 2)}",))
    assert names(run_dir) == ["best-2", "best-3", "step-4", "step-5"]


def test_a_resumed_run_goes_on_from_the_newest_checkpoint_and_its_metrics_are_gapless(run_dir):
    steps(run_dir, range(1, 6), every=2)
    assert [row["step"] for row in run_directory.read_metrics(run_dir)] == [1, 2, 3, 4, 5]
    with (run_dir / artifacts.METRICS).open("a") as file:
        file.write('{"step": 6, "lo')
    assert steps(run_dir, range(5, 8), resume=True, every=2) == 4
    assert [row["step"] for row in run_directory.read_metrics(run_dir)] == [1, 2, 3, 4, 5, 6, 7]


def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(run_dir, said):
    steps(run_dir, range(1, 4))
    path = run_dir / artifacts.CHECKPOINTS / "step-3" / snapshots.VALUES
    path.write_text(path.read_text().replace("3", "4"))
    assert steps(run_dir, [], resume=True) == 2
    assert "step-3/values.json has" in said.text and "an earlier one is used" in said.text
    for name in ("step-2", "step-3"):
        (run_dir / artifacts.CHECKPOINTS / name / snapshots.TENSORS).unlink()
    with pytest.raises(RlhfError, match=r"CKP022.*none is whole"):
        steps(run_dir, [], resume=True)


def test_a_checkpoint_of_a_later_format_is_refused_and_other_libraries_are_said(run_dir, said, monkeypatch):
    steps(run_dir, (1, 2))
    monkeypatch.setattr(snapshots, "FORMAT", 1)
    with pytest.raises(RlhfError, match=r"CKP023.*format 2, this version reads 1"):
        steps(run_dir, [], resume=True)
    monkeypatch.undo()
    version = metadata.version
    monkeypatch.setattr(metadata, "version", lambda name: "0.0" if name == "torch" else version(name))
    monkeypatch.setattr(run_directory.log, "propagate", True)
    assert steps(run_dir, [], resume=True) == 2
    assert "torch is 0.0 here" in said.text and "may differ in its bits" in said.text


def test_fewer_steps_than_are_done_are_refused(run_dir):
    steps(run_dir, range(1, 13))
    with pytest.raises(RlhfError, match=r"CKP024.*12 steps are done, and the config asks for 9"):
        steps(run_dir, [], resume=True)


def test_a_lost_best_role_makes_its_checkpoint_unusable(run_dir):
    steps(run_dir, (1, 2), needs=lambda step: (f"best-{step}",))
    (run_dir / artifacts.CHECKPOINTS / "best-2" / "weights").unlink()
    assert steps(run_dir, [], resume=True) == 1


def test_without_a_checkpoint_a_resumed_run_starts_at_the_beginning_and_says_so(run_dir, said):
    assert steps(run_dir, (1, 2), every=None) == 0
    assert steps(run_dir, (1,), resume=True) == 0
    assert "No checkpoint was committed yet" in said.text
    assert [row["step"] for row in run_directory.read_metrics(run_dir)] == [1]


def test_another_input_is_refused_by_name_unless_allowed(run_dir, said):
    identity = {"optim.learning_rate": 1e-3, "lora.r": 4, "data.rows": "x", "steps": 5, "optim.schedule": "linear"}
    opened_run(run_dir, identity).close()
    for key, value in (("optim.learning_rate", 1e-4), ("lora.r", 8), ("data.rows", "y"), ("steps", 6)):
        changed = {**identity, key: value}
        with pytest.raises(RlhfError, match=rf"CKP008.*{key}: {identity[key]} -> {value}.*allow-change {key}"):
            opened_run(run_dir, changed, resume=True)
        opened_run(run_dir, changed, resume=True, allowed=(key.split(".")[0],)).close()
        assert f"Resumes with a change: {key}" in said.text
        opened_run(run_dir, identity, resume=True, allowed=(key,)).close()


def test_more_steps_at_a_constant_learning_rate_are_no_other_run(run_dir):
    constant = {"optim.schedule": "constant", "optim.warmup_ratio": 0.0}
    opened_run(run_dir, {**constant, "steps": 5}).close()
    opened_run(run_dir, {**constant, "steps": 9}, resume=True).close()
    warm = {**constant, "optim.warmup_ratio": 0.1}
    with pytest.raises(RlhfError, match="CKP008"):
        opened_run(run_dir, {**warm, "steps": 5}, resume=True)


def test_unfinished_runs_are_refused_without_resume_and_foreign_directories_always(run_dir, tmp_path):
    opened_run(run_dir).close()
    with pytest.raises(RlhfError, match=r"CKP006.*unfinished run.*--resume"):
        opened_run(run_dir)
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "letter.txt").write_text("x")
    with pytest.raises(RlhfError, match="CKP006"):
        opened_run(tmp_path / "home", resume=True)
    with opened_run(run_dir, {"a": 2}, resume=True, overwrite=True) as run:
        assert not run.resumed and (tmp_path / "run.old-1").is_dir()


def test_what_a_killed_process_left_behind_is_swept_away_at_any_depth(run_dir):
    steps(run_dir, (1,))
    for name in (
        "samples/.a.jsonl.tmp-1",
        "checkpoints/.step-2.tmp-1/tensors",
        "checkpoints/.step-0.trash-1/x",
        ".hidden",
    ):
        (run_dir / name).parent.mkdir(parents=True, exist_ok=True)
        (run_dir / name).write_text("x")
    steps(run_dir, [], resume=True)
    left = [path.name for path in run_dir.rglob("*") if path.name.startswith(".")]
    assert sorted(left) == [".hidden", ".lock"] and names(run_dir) == ["step-1"]


def test_power_may_fail_before_any_write_sync_rename_or_removal(run_dir, tmp_path, monkeypatch):
    """What was not synced is lost: the newest checkpoint that verifies is never older than the last save."""
    synced, points = {}, []
    sync = os.fsync

    def fsync(descriptor):
        sync(descriptor)
        found = os.fstat(descriptor)
        path = Path(f"/proc/self/fd/{descriptor}")
        synced[found.st_ino] = path.read_bytes() if stat.S_ISREG(found.st_mode) else None

    def before(operation, path):
        place = tmp_path / "points" / str(len(points))
        source = run_dir / artifacts.CHECKPOINTS
        for file in [path for path in source.rglob("*") if path.is_file()]:
            copy = place / file.relative_to(source)
            copy.parent.mkdir(parents=True, exist_ok=True)
            whole = file.read_bytes()
            copy.write_bytes(whole if synced.get(file.stat().st_ino) == whole else b"")
        points.append((place, operation))

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(storage, "before", before)
    position, committed = checkpoints.Position(), []
    with opened_run(run_dir) as run:
        saved = checkpoints.Checkpoints(run, {"position": position}, 1)
        for step in range(1, 5):
            position.step, first = step, len(points)
            best = saved.directory / f"best-{step}"
            with storage.staged_directory(best) as staging:
                storage.write_text(staging / "weights", str(step))
            saved.end_of_step(step, (best.name,))
            committed += [step - 1] * (len(points) - first)
    assert {operation for _, operation in points} == {"write", "sync", "rename", "remove"}
    for (place, _), least in zip(points[-len(committed) :], committed, strict=True):
        if least:
            found = checkpoints.newest(place)
            assert found and found[1].step >= least
            assert snapshots.read(found[0]) == {"position": {"step": found[1].step}}


def test_a_run_has_one_writer(run_dir):
    with opened_run(run_dir), pytest.raises(RlhfError, match=r"CKP007.*another process"):
        opened_run(run_dir, resume=True)
    opened_run(run_dir, resume=True).close()


def test_a_signal_waits_for_the_end_of_the_step_and_is_saved(run_dir, monkeypatch):
    monkeypatch.setattr(interrupts, "_received", 15)
    with pytest.raises(interrupts.Interrupted) as caught:
        steps(run_dir, (1, 2), every=None)
    assert (caught.value.saved, caught.value.exit_code) == ("step-1", 143)
    monkeypatch.setattr(interrupts, "_received", None)
    assert steps(run_dir, [], resume=True) == 1
    assert json.loads((run_dir / artifacts.STARTED).read_text())["stage"] == "ppo"
