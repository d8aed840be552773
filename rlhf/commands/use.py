"""What is done with finished runs: sample, score, talk, export."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from rlhf.commands.options import Json
from rlhf.config.sections import SamplingSection
from rlhf.errors import Problem, RlhfError
from rlhf.runs import progress
from rlhf.runs.policy_sampling import Asked

Policy = Annotated[str, typer.Argument(help="Policy run, or directory or hub id of a causal language model.")]
THE_RUNS = "Default: the run's own; for a model that is not a run,"
DEFAULTS = SamplingSection()
Temperature = Annotated[
    float | None,
    typer.Option(
        "--temperature",
        min=0.0,
        max=100.0,
        help=f"0 is greedy. {THE_RUNS} {DEFAULTS.temperature:g}.",
        show_default=False,
    ),
]
NewTokens = Annotated[
    int | None,
    typer.Option(
        "--max-new-tokens", min=1, help=f"Longest response. {THE_RUNS} {DEFAULTS.max_new_tokens}.", show_default=False
    ),
]
StopTokens = Annotated[
    list[str] | None,
    typer.Option(
        "--stop-token",
        help=f"Token that ends a response too, '' for none. Repeatable. {THE_RUNS} none.",
        show_default=False,
    ),
]
TopP = Annotated[float, typer.Option("--top-p", min=1e-6, max=1.0, help="Sample from the likeliest tokens alone.")]
Seed = Annotated[int, typer.Option("--seed", min=0, help="Seed of the sampling.")]
Template = Annotated[
    str | None, typer.Option("--chat-template", help="chatml or plain, for a model whose tokenizer has none.")
]


def generate(
    run: Policy,
    prompts: Annotated[str, typer.Option("--prompts", help="JSONL of prompts, a data set, or - for stdin.")] = "-",
    out: Annotated[str, typer.Option("--out", help="JSONL file, or - for stdout.")] = "-",
    samples: Annotated[int, typer.Option("-n", "--samples", min=1, help="Responses a prompt.")] = 1,
    temperature: Temperature = None,
    max_new_tokens: NewTokens = None,
    stop_token: StopTokens = None,
    top_p: TopP = 1.0,
    seed: Seed = 0,
    chat_template: Template = None,
) -> None:
    """Sample responses from a policy run or any model."""
    asked = sampling("generate", seed, max_new_tokens, temperature, stop_token, top_p)
    progress.load("rlhf.commands.generate").generate(run, prompts, out, samples, chat_template, asked)


def chat(
    run: Policy,
    reward: Annotated[
        str | None, typer.Option("--reward", help="Reward run, or directory or hub id of a classifier.")
    ] = None,
    system: Annotated[str | None, typer.Option("--system", help="A system turn at the beginning.")] = None,
    temperature: Temperature = None,
    max_new_tokens: NewTokens = None,
    stop_token: StopTokens = None,
    top_p: TopP = 1.0,
    seed: Seed = 0,
    chat_template: Template = None,
) -> None:
    """Talk with a policy run or any model. /again, /reset and /quit are commands."""
    asked = sampling("chat", seed, max_new_tokens, temperature, stop_token, top_p)
    progress.load("rlhf.commands.chat").chat(run, reward, system, chat_template, asked)


def sampling(
    command: str,
    seed: int,
    max_new_tokens: int | None,
    temperature: float | None,
    stop_tokens: list[str] | None,
    top_p: float,
) -> Asked:
    """What a command line asks for; imports torch."""
    derived = progress.load("rlhf.runs.runtime").derived_seed(seed, command)
    named = [token for token in stop_tokens if token] if stop_tokens else None
    return Asked(derived, max_new_tokens, temperature, named, top_p)


def score(
    run: Annotated[
        str,
        typer.Argument(
            help="Reward run, examination of one (its length calibration is taken off), or "
            "directory or hub id of a sequence classifier."
        ),
    ],
    data: Annotated[str, typer.Option("--in", help="JSONL of prompt and response, or - for stdin.")] = "-",
    out: Annotated[str, typer.Option("--out", help="JSONL file, or - for stdout.")] = "-",
    micro_batch_size: Annotated[int, typer.Option("--micro-batch-size", min=1, help="Responses a forward pass.")] = 32,
    label: Annotated[str | None, typer.Option("--label", help="Label of a classifier that has several.")] = None,
) -> None:
    """Score responses with a reward run or any classifier."""
    progress.load("rlhf.commands.score").score(run, data, out, micro_batch_size, label)


def export(
    run: Annotated[str, typer.Argument(help="Run directory of a policy or reward model.")],
    target: Annotated[Path, typer.Argument(help="Directory to write, which must not exist.")],
    adapter_only: Annotated[bool, typer.Option("--adapter-only", help="The policy's adapter, not merged.")] = False,
    head: Annotated[str | None, typer.Option("--head", help="One head of a reward run, as the only label.")] = None,
    push_to_hub: Annotated[
        str | None, typer.Option("--push-to-hub", metavar="OWNER/NAME", help="Upload it there, as a private one.")
    ] = None,
    public: Annotated[bool, typer.Option("--public", help="With --push-to-hub: for everyone to see.")] = False,
    as_json: Json = False,
) -> None:
    """Write a run as a plain Hugging Face directory."""
    if public and push_to_hub is None:
        raise RlhfError(Problem("CFG040", "--public", "nothing is uploaded.", "--push-to-hub OWNER/NAME"))
    module = progress.load("rlhf.commands.export")
    outcome = module.export(run, target, adapter_only, push_to_hub, public, head)
    if as_json:
        typer.echo(json.dumps(outcome))


COMMANDS: dict[str, Callable[..., None]] = {"generate": generate, "score": score, "chat": chat, "export": export}
