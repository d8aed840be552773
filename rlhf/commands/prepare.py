"""What is done before a run: check, plan, and look at the embedded world's data."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from rlhf.commands.options import Json, Sets
from rlhf.stages import inspection


def check(
    files: Annotated[list[Path] | None, typer.Argument(help="Config files; none: all of configs/.")] = None,
    config: Annotated[list[Path] | None, typer.Option("-c", "--config", help="The same as FILES.")] = None,
    stage: Annotated[
        str | None, typer.Option("--stage", help="Whose config it is, where the name does not say.")
    ] = None,
    sets: Sets = None,
    as_json: Json = False,
) -> None:
    """Check configs, paths and every data row, without weights or tokenizer."""
    results = inspection.check([*(files or []), *(config or [])], stage, sets or [])
    typer.echo(json.dumps(results) if as_json else "\n".join(inspection.check_lines(results)))


def demo(
    out: Annotated[Path, typer.Option("--out", help="Directory to write to.")],
    size: Annotated[int, typer.Option("--size", min=1, help="Rows of each data set.")] = 200,
    seed: Annotated[int, typer.Option("--seed", min=0)] = 0,
) -> None:
    """Write the embedded world's data sets as files to look at."""
    for path, rows in inspection.write_demo(out, size, seed).items():
        typer.echo(f"{path}: {rows} rows")


def plan(
    config: Annotated[Path, typer.Option("-c", "--config", help="Config file of one stage.")],
    stage: Annotated[
        str | None, typer.Option("--stage", help="Whose config it is, where the name does not say.")
    ] = None,
    gpu: Annotated[
        str | None, typer.Option("--gpu", help="Memory to fit into, such as 24GB; else this machine's.")
    ] = None,
    flops: Annotated[str | None, typer.Option("--flops", help="Operations a second as reached, such as 150T.")] = None,
    bandwidth: Annotated[str | None, typer.Option("--bandwidth", help="Bytes a second, such as 2T.")] = None,
    measure: Annotated[bool, typer.Option("--measure", help="Measure this machine's speed for a second.")] = False,
    sets: Sets = None,
    as_json: Json = False,
) -> None:
    """Predict memory and time of a stage from its config alone, and say what would fit."""
    module = importlib.import_module("rlhf.stages.plan")
    outcome = module.plan(config, stage or config.stem, sets or [], gpu, flops, bandwidth, measure)
    typer.echo(json.dumps(outcome) if as_json else "\n".join(module.lines(outcome)))


COMMANDS: dict[str, Callable[..., None]] = {"check": check, "plan": plan, "demo": demo}
