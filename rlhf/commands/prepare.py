"""What is done before a run: check, and look at the embedded world's data."""

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


def init(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="Directory to make; it must be new or empty.")],
    data: Annotated[
        list[str] | None, typer.Option("--data", help="File of demonstrations, preferences, rankings, ratings or "
                                       "prompts; demo: for the embedded world. Repeatable.")
    ] = None,
    model: Annotated[str | None, typer.Option("--model", help="Directory or hub id of the base.")] = None,
    as_json: Json = False,
) -> None:  # fmt: skip
    """Look at data and a model, and write a commented chain of configs that runs."""
    project = importlib.import_module("rlhf.start.project").make(directory, data or [], model)
    if as_json:
        typer.echo(json.dumps({"directory": str(directory), "files": list(project.files), "figures": project.figures}))
        return
    typer.echo("\n".join(f"{name:<16}{text}" for name, text in project.figures))
    typer.echo(f"\nWrote {', '.join(project.files)}.\nNext: cd {directory} && rlhf pipeline")


COMMANDS: dict[str, Callable[..., None]] = {"init": init, "check": check, "demo": demo}
