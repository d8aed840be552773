"""Which kind of config a file is: the wrong command names the right one, and check and plan need no name."""

from __future__ import annotations

from itertools import permutations
from pathlib import Path

import pytest

from rlhf.commands import plan
from rlhf.config import recognition, yaml_reader
from rlhf.errors import RlhfError
from rlhf.stages.registry import KINDS, open_config

CONFIGS = Path(__file__).parents[1] / "configs"
SHIPPED = [path.relative_to(CONFIGS) for path in sorted(CONFIGS.rglob("*.yaml"))]
DEVICE = plan.Device()
COMMANDS = [kind for kind in KINDS if kind != "rubric"]


@pytest.mark.parametrize(("given", "kind"), [*permutations(COMMANDS, 2)])
def test_every_stage_refuses_every_other_stages_config_with_one_message(tmp_path, given, kind):
    for number, path in enumerate(one for one in SHIPPED if one.stem == kind):
        copy = tmp_path / f"mine-{number}.yaml"
        copy.write_text((CONFIGS / path).read_text())
        for file in (CONFIGS / path, copy):
            with pytest.raises(RlhfError) as caught:
                open_config(given, file, ["run_dir=x"] if given != "pipeline" else [])
            (problem,) = caught.value.problems
            article = "an" if kind in ("sft", "eval-rm") else "a"
            assert problem.code == "CFG012" and problem.what == f"this is {article} {kind} config."
            assert problem.fix == f"did you mean rlhf {kind} -c {file}?"


@pytest.mark.parametrize("path", SHIPPED, ids=str)
def test_the_keys_of_a_shipped_config_tell_its_stage_and_its_own_stage_takes_it(path):
    assert recognition.by_keys(yaml_reader.read_file(CONFIGS / path)[0], KINDS) == [path.stem]
    open_config(path.stem, CONFIGS / path)


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("data: {path: a}\nepochs: 1", ["sft", "train-rm"]),
        ("data: {path: a}", ["sft", "train-rm", "eval-rm"]),
        ("prompts: {path: a}", ["collect", "ppo"]),
        ("prompts: {path: a}\nrewards: [{run: r}]", ["ppo"]),
        ("data: {path: a}\nreward: r", ["eval-rm"]),
        ("data: {path: a}\nepochs: 1\nmodel: {path: m}", ["sft"]),
        ("data: {path: a}\nepochs: 1\npolicy: p", ["train-rm"]),
        ("name: x\ncriteria: []", ["rubric"]),
        ("prompts: {path: a}\nlabeller: {run: r}\nstps: 3", ["collect"]),
        ("kl: {coef: 1}\nsteps: 3", ["ppo"]),
        ("data: {path: a, columns: {prompt: q}}\nreward: r", ["eval-rm"]),
        ("nonsense: 1", []),
        ("- a", []),
        ("data: {path: a}\noptim: {learning_rate: 1, value_learning_rate: 2}\nprompts: {path: a}", ["ppo"]),
    ],
)
def test_keys_say_the_kind_or_all_that_fit_alike(text, wanted):
    assert recognition.by_keys(yaml_reader.read_text(text, "x")[0], KINDS) == wanted


def test_a_rubric_has_no_command_of_its_own(tmp_path):
    (tmp_path / "x.yaml").write_text("name: desk\ncriteria: [{name: safe, description: no harm}]\n")
    with pytest.raises(RlhfError, match="this is a rubric config. Fix: name it as rubric in train-rm.yaml"):
        open_config("sft", tmp_path / "x.yaml")


def test_a_slip_in_a_stages_own_config_is_named_by_its_key(tmp_path):
    for name, stage, text, key in (
        ("ppo", "ppo", "prompts: {path: a}\nstps: 3\n", "did you mean 'steps'"),
        ("sft", "sft", "data: {path: a}\nepochs: 1\npolicy: p\n", "policy: unknown key"),
        ("x", "sft", "data: {path: a}\nepoch: 1\n", "epoch: unknown key"),
    ):
        (tmp_path / f"{name}.yaml").write_text(text)
        with pytest.raises(RlhfError, match=key):
            open_config(stage, tmp_path / f"{name}.yaml")


def test_check_and_plan_take_the_same_files_and_are_strict_where_a_file_fits_two_stages(tmp_path, monkeypatch, here):
    monkeypatch.chdir(tmp_path)
    Path("configs").mkdir()
    data = "path: 'demo:preferences?size=9'"
    texts = {
        "a": "model: {path: demo:base}\ndata: {path: 'demo:demonstrations?size=9'}\nsteps: 1\n",
        "b": f"policy: runs/sft\ndata: {{{data}}}\nsteps: 1\n",
        "c": "prompts: {path: 'demo:prompts?size=9'}\nkl: {coef: 0.1}\n",
        "d": "stages: [{stage: sft, config: configs/a.yaml}, {stage: ppo, config: configs/c.yaml}]\n",
        "other": "hello: 1\n",
    }
    for name, text in texts.items():
        Path("configs", f"{name}.yaml").write_text(text)
    Path("both.yaml").write_text(f"data: {{{data}}}\nepochs: 1\n")
    for command, told, num_all in (("check", "a sound ", 4), ("plan", "(named by configs/a.yaml)", 3)):
        code, text = here(command)
        assert code == 0 and text.count(told) == num_all, text
        assert "Left out: configs/other.yaml: its keys fit no config." in text
        code, text = here(command, "configs/c.yaml", "-c", "configs/a.yaml", "-c", "configs/b.yaml")
        assert code == 0 and text.count(told) == 3, text
        assert here(command, "configs/other.yaml")[0] == 2
        code, text = here(command, "both.yaml")
        assert code == 2 and "CFG008" in text and "--stage with one of sft, train-rm" in text
        code, text = here(command, "configs/c.yaml", "--stage", "sft")
        assert code == 2 and "this is a ppo config. Fix: --stage ppo" in text
    stages = [one["stage"] for one in plan.plans([Path("configs/d.yaml"), Path("configs/a.yaml")], None, [], DEVICE)]
    assert stages == ["sft", "ppo"]
