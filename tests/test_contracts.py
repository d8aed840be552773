"""What holds for every stage and every kind of reward, however many there are."""

from __future__ import annotations

import pytest
import tiny

from rlhf.config import keys, load
from rlhf.config.rewards import KINDS, RewardSource, RunReward
from rlhf.config.stages import PpoConfig
from rlhf.errors import Problem, RlhfError
from rlhf.findings import Findings
from rlhf.preflight import examined
from rlhf.scoring.open_scorer import OPENERS
from rlhf.stages.registry import STAGES, stage_of

SOURCES = {"run": "r", "runs": ["a", "b"], "model": {"path": "m"}, "function": "a:b", "url": "http://h:1"}
CONFIGS = {
    "sft": {"data": {"path": "d"}, "steps": 1}, "train-rm": {"data": {"path": "d"}, "steps": 1},
    "collect": {"prompts": {"path": "d"}}, "ppo": {"prompts": {"path": "d"}},
    "eval-rm": {"reward": "r", "data": {"path": "d"}},
}  # fmt: skip


def test_findings_are_gathered_across_errors_and_raised_once_in_their_order():
    first, second, third = (Problem(f"CFG00{n}", "here", "wrong.") for n in (1, 2, 3))
    findings = Findings()
    findings.refuse()
    findings.add(first, None)
    with findings.gathering():
        raise RlhfError(second, third)
    with pytest.raises(RlhfError) as raised:
        findings.refuse()
    assert raised.value.problems == (first, second, third)
    with pytest.raises(ZeroDivisionError), findings.gathering():
        _ = 1 / 0


@pytest.mark.parametrize("key", SOURCES)
def test_the_key_that_names_a_reward_says_its_kind_which_can_be_opened_and_is_recorded_with_every_key(key):
    source = tiny.reward({key: SOURCES[key]})
    assert type(source) is KINDS[key] and type(source) in OPENERS and source.name
    recorded = keys.flatten(source).keys()
    assert recorded >= set(RewardSource.model_fields) - {"model"}, "an old run knows them all: none may be missing"
    others = {other: None for other in SOURCES if other != key}
    assert tiny.reward({key: SOURCES[key], **others}) == source


def test_every_kind_is_in_each_table_by_kind_and_no_other():
    assert set(OPENERS) == set(KINDS.values()) and set(SOURCES) == set(KINDS)
    assert set(examined.MATCHES) == {kind for kind in KINDS.values() if "examination" not in kind.useless}


@pytest.mark.parametrize(
    ("source", "where", "said"),
    [
        ("{run: a, url: b}", "rewards.1:", "give exactly one of run, runs, model, function and url"),
        ("{weight: 2.0}", "rewards.1:", "give exactly one of"),
        ("a", "rewards.1:", "must be a valid dictionary"),
        ("{url: 'http://h:1/?q'}", "rewards.1:", "url must have neither query nor fragment"),
        ("{function: 'a:b', head: h}", "rewards.1:", "head is for run or runs"),
        ("{run: a, wieght: 2.0}", "rewards.1.wieght:", "did you mean 'rewards.weight'?"),
        ("{runs: [a]}", "rewards.1.runs:", "at least 2 items"),
        ("{model: {path: m, labl: 1}}", "rewards.1.model.labl:", "did you mean 'rewards.model.label'?"),
        ("{run: a, weight: x}", "rewards.1.weight:", "must be a valid number"),
    ],
)
def test_a_mistake_in_a_reward_is_placed_by_the_keys_that_the_user_wrote(source, where, said):
    text = f"prompts: {{path: d}}\nrewards:\n  - {{run: a}}\n  - {source}\n"
    with pytest.raises(RlhfError) as raised:
        load.load_text(PpoConfig, text, "ppo.yaml")
    (problem,) = raised.value.problems
    assert problem.where.startswith("ppo.yaml:4:") and f"{problem.where}:".endswith(f" {where}")
    assert said in f"{problem.what} {problem.fix}"


def test_a_kind_that_is_made_in_code_obeys_the_same_rules():
    with pytest.raises(ValueError, match="give exactly one"):
        RunReward(run="a", url="http://h:1")
    with pytest.raises(ValueError, match="give exactly one"):
        RewardSource(run="a")


@pytest.mark.parametrize("name", STAGES)
def test_every_stage_has_its_base_from_one_place_and_says_what_it_writes_and_reads(name):
    stage = STAGES[name]
    config = stage.config_class.model_validate(CONFIGS[name])
    needs = stage.needs(config)
    assert stage_of(config) is stage and needs.memory and needs.inputs
    assert (stage.origin(config) is None) != (stage.parent(config) is None)
    assert stage.parent(config) in (None, needs.parents[0].run_dir if needs.parents else None)
    assert needs.origin == stage.origin(config)
