"""Checkpoints hold every kind of value exactly, and never a part of one."""

from __future__ import annotations

import json
import math

import pytest
import torch

from rlhf import checkpoints
from rlhf.errors import RlhfError


class Held:
    def __init__(self, state=None):
        self.state = state

    def state_dict(self):
        return self.state

    def load_state_dict(self, state):
        self.state = state


def round_trip(directory, state):
    checkpoints.save(directory, {"x": Held(state)})
    back = Held()
    checkpoints.load(directory, {"x": back})
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
        checkpoints.save(tmp_path / "c", {"x": Held(state)})
    assert not (tmp_path / "c").exists()


@pytest.mark.parametrize("manifest", ["[]", "{}", "not json", '{"files": {}, "states": ["x"]}'])
def test_a_manifest_that_vouches_for_nothing_is_refused(tmp_path, manifest):
    checkpoints.save(tmp_path / "c", {"x": Held({"a": 1})})
    (tmp_path / "c" / checkpoints.MANIFEST).write_text(manifest, "utf-8")
    with pytest.raises(RlhfError, match="CKP020"):
        checkpoints.load(tmp_path / "c", {"x": Held()})


@pytest.mark.parametrize("name", [checkpoints.TENSORS, checkpoints.VALUES, checkpoints.MANIFEST])
def test_a_missing_file_is_refused(tmp_path, name):
    checkpoints.save(tmp_path / "c", {"x": Held({"a": torch.ones(2)})})
    assert json.loads((tmp_path / "c" / checkpoints.MANIFEST).read_text("utf-8"))["states"] == ["x"]
    (tmp_path / "c" / name).unlink()
    with pytest.raises(RlhfError, match="CKP020"):
        checkpoints.load(tmp_path / "c", {"x": Held()})
