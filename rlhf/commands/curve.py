"""What more labels would be worth: a reward model on growing shares of its data."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from rlhf.commands.options import Bare, ConfigFile, Json, Sets
from rlhf.errors import Problem, RlhfError
from rlhf.runs import progress


def learning_curve(
    config: ConfigFile = None,
    bare: Bare = None,
    sets: Sets = None,
    shares: Annotated[
        str, typer.Option("--shares", help="Growing shares of the training prompts, three or more.")
    ] = "0.125,0.25,0.5,1",
    seeds: Annotated[
        str | None, typer.Option("--seeds", help="Seeds, such as 0,1,2; none: the config's.", show_default=False)
    ] = None,
    out: Annotated[Path, typer.Option("--out", help="Directory of the runs, the report and the plot.")] = Path(
        "runs/learning-curve"
    ),
    resamples: Annotated[int, typer.Option("--resamples", min=100, help="Bootstrap resamples of the prompts.")] = 2000,
    as_json: Json = False,
) -> None:
    """Train reward models on growing shares of the data: would more labels help? Without -c, configs/train-rm.yaml."""
    path = config or Path("configs/train-rm.yaml")
    module = progress.load("rlhf.commands.learning_curve")
    report = module.run(
        path,
        [*(sets or []), *(bare or [])],
        [_number(text, "--shares") for text in shares.split(",")],
        [int(_number(text, "--seeds", whole=True)) for text in (seeds or "").split(",") if text],
        out,
        resamples,
    )
    if as_json:
        typer.echo(json.dumps(report))
    else:
        module.print_report(report)


def _number(text: str, option: str, whole: bool = False) -> float:
    try:
        return int(text) if whole else float(text)
    except ValueError:
        kind = "whole numbers" if whole else "numbers"
        raise RlhfError(Problem("CFG005", option, f"'{text}' is no number.", f"{kind}, with commas between")) from None


COMMANDS: dict[str, Callable[..., None]] = {"learning-curve": learning_curve}
