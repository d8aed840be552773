"""What is done with finished runs: sample, score, export."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from rlhf.commands.options import Json


def generate(
    run: Annotated[str, typer.Argument(help="Run directory of a policy.")],
    prompts: Annotated[str, typer.Option("--prompts", help="JSONL of prompts, a data set, or - for stdin.")] = "-",
    out: Annotated[str, typer.Option("--out", help="JSONL file, or - for stdout.")] = "-",
    samples: Annotated[int, typer.Option("-n", "--samples", min=1, help="Responses a prompt.")] = 1,
    temperature: Annotated[float, typer.Option("--temperature", min=0.0, max=100.0, help="0 is greedy.")] = 1.0,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", min=1)] = 64,
    top_p: Annotated[float, typer.Option("--top-p", min=1e-6, max=1.0)] = 1.0,
    seed: Annotated[int, typer.Option("--seed", min=0)] = 0,
) -> None:
    """Sample responses from any finished policy run."""
    module = importlib.import_module("rlhf.stages.generate")
    module.generate(run, prompts, out, samples, temperature, max_new_tokens, top_p, seed)


def score(
    run: Annotated[str, typer.Argument(help="Reward run, or directory or hub id of a sequence classifier.")],
    data: Annotated[str, typer.Option("--in", help="JSONL of prompt and response, or - for stdin.")] = "-",
    out: Annotated[str, typer.Option("--out", help="JSONL file, or - for stdout.")] = "-",
    micro_batch_size: Annotated[int, typer.Option("--micro-batch-size", min=1)] = 32,
    label: Annotated[str | None, typer.Option("--label", help="Label of a classifier that has several.")] = None,
) -> None:
    """Score responses with a finished reward run, or with a sequence classifier from elsewhere."""
    importlib.import_module("rlhf.stages.score").score(run, data, out, micro_batch_size, label)


def export(
    run: Annotated[str, typer.Argument(help="Run directory of a policy or reward model.")],
    target: Annotated[Path, typer.Argument(help="Directory to write, which must not exist.")],
    adapter_only: Annotated[bool, typer.Option("--adapter-only", help="The policy's adapter, not merged.")] = False,
    as_json: Json = False,
) -> None:
    """Write a run as a plain Hugging Face directory that other tools read."""
    outcome = importlib.import_module("rlhf.stages.export").export(run, target, adapter_only)
    if as_json:
        typer.echo(json.dumps(outcome))


COMMANDS: dict[str, Callable[..., None]] = {"generate": generate, "score": score, "export": export}
