"""The command line explains itself: help in the order of work, examples, and flags of other tools answered by a key."""

from __future__ import annotations

import pytest
import typer

from rlhf import cli
from rlhf.commands import parsing
from rlhf.config import foreign, load, migrations
from rlhf.config.migrations import COUNTED, ELSEWHERE, GONE, ROUGHLY, SAME
from rlhf.stages.registry import STAGES

GROUP = typer.main.get_command(cli.app)


def test_without_a_command_the_help_is_printed_in_the_order_of_work(here):
    code, text = here()
    assert code == 0 and (code, text) == here("--help") == here("--debug")
    places = [
        text.index(f"  {name} ") for name in ("init", "check", "plan", "sft", "train-rm", "eval-rm", "ppo", "chat")
    ]
    assert places == sorted(places)
    grouped = [name for names in parsing.SECTIONS.values() for name in names]
    assert sorted(grouped) == sorted(GROUP.commands) == sorted(parsing.EXAMPLES)


@pytest.mark.parametrize("name", GROUP.commands)
def test_every_option_has_a_help_shows_its_default_and_the_command_has_examples(name):
    command = GROUP.commands[name]
    for parameter in command.params:
        assert parameter.help, parameter.name
        assert parameter.default in (None, False) or parameter.show_default, parameter.name
    shown = command.get_help(typer.Context(command, info_name=name))
    for line in parsing.EXAMPLES[name]:
        assert f"  {line}\n" in f"{shown}\n" and f"rlhf {name}" in line
        assert parsing.example(f"rlhf {name}") in shown


@pytest.mark.parametrize(
    "name", [name for name, command in GROUP.commands.items() if any(one.required for one in command.params)]
)
def test_a_missing_argument_is_answered_with_an_example(here, name):
    code, text = here(name)
    assert code == 2 and "Missing" in text and f"Fix: {parsing.EXAMPLES[name][0]}; see rlhf {name} --help" in text


FLAGS = [
    ("sft", "--learning_rate 1e-5", "set optim.learning_rate=1e-5"),
    ("sft", "--learning-rate=1e-5", "set optim.learning_rate=1e-5"),
    ("ppo", "--learning_rate 1e-5", "set optim.learning_rate=1e-5"),
    ("eval-rm", "--learning_rate 1e-5", "rlhf eval-rm has no such setting"),
    ("learning-curve", "--learning_rate 1e-5", "set optim.learning_rate=1e-5"),
    ("sft", "--model_name_or_path org/m", "set model.path=org/m"),
    ("ppo", "--model-name-or-path org/m", f"{ELSEWHERE['model']}"),
    ("eval-rm", "--model_name_or_path org/rm", "set model.path=org/rm"),
    ("sft", "--dataset_name d", "set data.path=d"), ("ppo", "--dataset_name d", "set prompts.path=d"),
    ("collect", "--dataset_name d", "set prompts.path=d"), ("train-rm", "--max_length 9", "set max_length=9"),
    ("ppo", "--max_length 9", "set prompts.max_tokens=9"), ("sft", "--output_dir o", "set run_dir=o"),
    ("sft", "--num_train_epochs 3", "set epochs=3"), ("train-rm", "--num-train-epochs 3", "set epochs=3"),
    ("ppo", "--num_train_epochs 3", "rlhf ppo counts steps, each a batch of samples: set steps"),
    ("sft", "--gradient_checkpointing", "set runtime.gradient_checkpointing=true"),
    ("sft", "--packing True", "set packing=true"), ("sft", "--bf16", "set model.dtype=bfloat16"),
    ("ppo", "--kl_coef 0.1", "set kl.coef=0.1"), ("ppo", "--steps 9", "set steps=9"),
    ("ppo", "--kl.coef 0.1", "set kl.coef=0.1"), ("sft", "--seed -1", "set seed=-1"),
    ("ppo", "--cliprange 0.1", "set update.clip_range=0.1"), ("sft", "--eval_steps 9", "set evaluation.every=9"),
    ("sft", "--logging_steps 9", f"has no counterpart: {GONE['logging_steps']}"),
    ("sft", "--gradient_accumulation_steps 4",
     "set batch.batch_size; it is per_device_train_batch_size times this"),
]  # fmt: skip


@pytest.mark.parametrize(("stage", "flag", "wanted"), FLAGS, ids=[" ".join(case[:2]) for case in FLAGS])
def test_a_flag_of_another_tool_is_answered_with_the_key_of_that_stage(here, stage, flag, wanted):
    code, text = here(stage, *flag.split(" "), "--dry-run")
    shown = flag.replace("=", " ") if "=" in flag else flag
    shown = f"{shown} true" if flag in ("--gradient_checkpointing", "--bf16") else shown
    assert code == 2 and f"error[CFG013] {shown}: {wanted}." in text, text


def test_all_flags_are_answered_together_and_a_secret_is_never_shown(here):
    secret = "hf_" + "a1" * 17
    code, text = here("sft", "--learning_rate", "1e-5", "--hub_token", secret, "--packing", "data.path=x", "--limit", 3)
    assert code == 2 and text.count("CFG013") == 3 and secret not in text and "--packing true: set packing=true" in text
    code, text = here("sft", "--nonsense", "3")
    assert code == 2 and "CFG000" in text and "No such option: --nonsense" in text
    code, text = here("sft", "mine.yaml")
    assert code == 2 and "Fix: -c mine.yaml" in text


def test_a_key_that_is_offered_for_another_tools_name_is_a_key_of_some_stage_and_holds_the_value():
    keys = {stage: set(load.keys_of(found.config_class)) for stage, found in STAGES.items()}
    for name in SAME | COUNTED | ROUGHLY:
        assert any(foreign.ours(name, known) for known in keys.values()), name
        for stage, known in keys.items():
            assert foreign.answer(name, "1", known, stage), (stage, name)
    for table in migrations.IN_STAGE.values():
        assert set(table.values()) <= keys["ppo"] | keys["collect"]
