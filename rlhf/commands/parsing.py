"""How the command line is read and explained: commands in the order of work, flags of other tools, examples."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

from typer.core import TyperCommand, TyperGroup

from rlhf import secrets
from rlhf.config import foreign, load
from rlhf.config.yaml_reader import shown
from rlhf.errors import Problem, RlhfError
from rlhf.stages.registry import STAGES

ANYWHERE = ("--debug", "--json-errors")
NUMBER = re.compile(r"-\d")

SECTIONS: dict[str, tuple[str, ...]] = {
    "Begin": ("init", "check", "plan"),
    "The chain, in this order": ("sft", "train-rm", "eval-rm", "ppo"),
    "The chain as a whole": ("pipeline", "resume", "show"),
    "Use what was made": ("chat", "generate", "score", "compare", "rank", "export", "serve"),
    "More and better data": ("collect", "filter", "learning-curve"),
    "Look up": ("config", "migrate", "demo"),
}

# The first of a command's examples stands in its error messages too.
EXAMPLES: dict[str, tuple[str, ...]] = {
    "init": ("rlhf init mine --data prefs.jsonl --model Qwen/Qwen2.5-0.5B", "rlhf init world --data demo:"),
    "check": ("rlhf check configs/sft.yaml --show 3", "rlhf check --deep"),
    "plan": ("rlhf plan configs/ppo.yaml --gpu 24GB", "rlhf plan --measure"),
    "sft": ("rlhf sft -c configs/sft.yaml optim.learning_rate=1e-4", "rlhf sft --limit 200 run_dir=runs/trial"),
    "train-rm": ("rlhf train-rm -c configs/train-rm.yaml members=3", "rlhf train-rm --dry-run"),
    "eval-rm": ("rlhf eval-rm -c configs/eval-rm.yaml --fail-on fail",),
    "ppo": ("rlhf ppo -c configs/ppo.yaml kl.coef=0.05", "rlhf ppo --resume"),
    "collect": ("rlhf collect -c configs/collect.yaml samples_per_prompt=8",),
    "pipeline": ("rlhf pipeline -c configs/pipeline.yaml",),
    "resume": ("rlhf resume runs/ppo",),
    "show": ("rlhf show", "rlhf show runs/ppo"),
    "chat": ("rlhf chat runs/ppo --reward runs/train-rm",),
    "generate": ("rlhf generate runs/ppo --prompts prompts.jsonl --out answers.jsonl",
                 "echo '{\"prompt\": \"hello\"}' | rlhf generate runs/sft -n 4"),
    "score": ("rlhf score runs/train-rm --in answers.jsonl --out scores.jsonl",),
    "compare": ("rlhf compare runs/sft runs/ppo --reward runs/train-rm --prompts prompts.jsonl",),
    "rank": ("rlhf rank runs/sft --reward runs/train-rm --prompts prompts.jsonl --out ranked.jsonl",),
    "filter": ("rlhf filter --in rows.jsonl --out kept.jsonl --reward runs/train-rm --keep-share 0.5",),
    "export": ("rlhf export runs/ppo exported", "rlhf export runs/train-rm rm --push-to-hub me/rm"),
    "serve": ("rlhf serve runs/train-rm --port 8300",),
    "learning-curve": ("rlhf learning-curve -c configs/train-rm.yaml --shares 0.25,0.5,1",),
    "config": ("rlhf config ppo", "rlhf config sft --schema"),
    "migrate": ("rlhf migrate trl.yaml --out configs/sft.yaml",),
    "demo": ("rlhf demo --out world --size 50",),
}  # fmt: skip


class Group(TyperGroup):
    """Commands by what they are for. The flags of ``ANYWHERE`` may stand behind a command as well as before it."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        hoisted = [arg for arg in args if arg in ANYWHERE]
        rest = [arg for arg in args if arg not in ANYWHERE]
        return super().parse_args(ctx, hoisted + (rest or ["--help"]))

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        widest = max(map(len, self.commands))
        for title, names in SECTIONS.items():
            with formatter.section(title):
                rows = [(name, self.commands[name].get_short_help_str(formatter.width - 6 - widest)) for name in names]
                formatter.write_dl([(f"{name:<{widest}}", text) for name, text in rows])


class Command(TyperCommand):
    """A command whose help ends with examples."""

    def format_epilog(self, ctx: Any, formatter: Any) -> None:
        with formatter.section("Examples"):
            for line in EXAMPLES[str(self.name)]:
                formatter.write(f"{'':>{formatter.current_indent}}{line}\n")


class StageCommand(Command):
    """A command that answers flags of TRL and LlamaFactory, and keys written as flags, with the key to set."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        own = {name for parameter in self.params for name in (*parameter.opts, *parameter.secondary_opts)} | {"--help"}
        if problems := list(_foreign(args, own, STAGE_OF.get(str(self.name), str(self.name)))):
            raise RlhfError(*problems)
        return super().parse_args(ctx, args)


STAGE_OF = {"learning-curve": "train-rm"}


def example(command_path: str) -> str:
    """An example of a command, by its path as the parser has it ("rlhf sft"); empty for none."""
    return EXAMPLES.get(command_path.rpartition(" ")[2], ("",))[0]


def _foreign(args: Sequence[str], own: set[str], stage: str) -> Iterator[Problem]:
    keys = set(load.keys_of(STAGES[stage].config_class))
    for flag, value in _flags(args):
        if flag in own:
            continue
        names = (flag.removeprefix("--"), flag.removeprefix("--").replace("-", "_"))
        found = next((told for name in names if (told := foreign.answer(name, value, keys, stage))), None)
        if found is not None:
            given = flag if secrets.is_secret_name(names[1]) else secrets.mask(f"{flag} {value}")
            yield Problem("CFG013", shown(given), f"{secrets.mask(found)}.")


def _flags(args: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Each long flag with its value: behind an equals sign, or the next argument where that can be one; else true."""
    for index, arg in enumerate(args):
        if not arg.startswith("--") or arg == "--":
            continue
        flag, equals, value = arg.partition("=")
        following = args[index + 1] if index + 1 < len(args) else "-"
        if not equals:
            is_value = (not following.startswith("-") or NUMBER.match(following)) and "=" not in following
            value = following if is_value else "true"
        yield flag, value
