"""Reward functions that are not what they should be get a message, never a traceback."""

from __future__ import annotations

import pytest

from rlhf.errors import RlhfError
from rlhf.records import Message
from rlhf.scoring.function import FunctionScorer
from rlhf.scoring.scorer import Sample

SAMPLE = Sample((Message("user", "hi"),), "a", [1], [2], True, [2])


def nothing(prompts, responses):
    return None


def one_number(prompts, responses):
    return 1.0


@pytest.mark.parametrize(("name", "kind"), [("nothing", "NoneType"), ("one_number", "float")])
def test_a_function_that_gives_no_list_is_named(name, kind):
    with pytest.raises(RlhfError, match=f"GRD010.*{kind} instead of a list"):
        FunctionScorer(f"{__name__}:{name}").score([SAMPLE])


def test_a_module_with_a_syntax_error_is_named(tmp_path, monkeypatch):
    (tmp_path / "broken_reward.py").write_text("x = = 1\n", "utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(RlhfError, match="CFG030.*broken_reward"):
        FunctionScorer("broken_reward:f")
