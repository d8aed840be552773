"""What is done before a run: begin, check, plan, look up a key, look at the embedded world's data."""

from __future__ import annotations

import importlib
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated

import typer

from rlhf.commands import inspection
from rlhf.commands.options import Json, Sets
from rlhf.errors import Problem, RlhfError
from rlhf.runs import progress, storage

Files = Annotated[list[Path] | None, typer.Argument(help="Config files; none: all of configs/.")]
MoreFiles = Annotated[
    list[Path] | None, typer.Option("-c", "--config", help="The same as FILES. Repeatable.", show_default=False)
]
OfStage = Annotated[
    str | None,
    typer.Option(
        "--stage", help="Whose configs they are, where neither their names nor their keys say.", show_default=False
    ),
]


def check(
    files: Files = None,
    config: MoreFiles = None,
    stage: OfStage = None,
    sets: Sets = None,
    show: Annotated[
        int, typer.Option("--show", min=0, help="Print N rows of each data set as the model will see them.")
    ] = 0,
    deep: Annotated[
        bool,
        typer.Option(
            "--deep",
            help="Also what is wrong between rows and data sets: duplicates, contradictions, "
            "leakage, special tokens, length. Exit 3 on errors.",
        ),
    ] = False,
    as_json: Json = False,
) -> None:
    """Check configs, paths and every data row. No weights are read, a tokenizer only with --show or --deep."""
    results = inspection.check([*(files or []), *(config or [])], stage, sets or [], show, deep)
    colour = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    typer.echo(json.dumps(results) if as_json else "\n".join(inspection.check_lines(results, colour)))
    inspection.refuse_found(results)


def config(
    stage: Annotated[str | None, typer.Argument(help="A stage, or pipeline; none: all, as Markdown.")] = None,
    schema: Annotated[bool, typer.Option("--schema", help="Print the JSON schema, for editors.")] = False,
) -> None:
    """Print every key of a config with its meaning."""
    typer.echo(inspection.reference_of(stage, schema), nl=stage is not None)


def migrate(
    old: Annotated[Path, typer.Argument(help="Config of TRL (script arguments) or LlamaFactory.")],
    out: Annotated[Path | None, typer.Option("--out", help="File to write, which must not exist.")] = None,
    stage: Annotated[
        str | None, typer.Option("--stage", help="sft, train-rm or ppo, where the file does not tell.")
    ] = None,
) -> None:
    """Translate a config of TRL or LlamaFactory. Every key that has no counterpart is named."""
    if out and out.exists():
        raise RlhfError(Problem("CFG010", str(out), "stands there already.", "name another file"))
    found = inspection.migrated(old, stage)
    if out is None:
        typer.echo(found.text(old.name), nl=False)
        return
    storage.write_text(out, found.text(old.name))
    counts = f"{len(found.undecided)} keys to decide, {len(found.gone)} without counterpart"
    typer.echo(f"{out}: a {found.stage} config; {counts}.")


def demo(
    out: Annotated[Path, typer.Option("--out", help="Directory to write to.")],
    size: Annotated[int, typer.Option("--size", min=1, help="Rows of each data set.")] = 200,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Seed of the data.")] = 0,
) -> None:
    """Write the embedded world's data sets as files to look at."""
    for path, rows in inspection.write_demo(out, size, seed).items():
        typer.echo(f"{path}: {rows} rows")


def init(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="Directory to make; it must be new or empty.")],
    data: Annotated[
        list[str] | None,
        typer.Option(
            "--data",
            help="File of demonstrations, preferences, rankings, ratings or "
            "prompts; demo: for the embedded world. Repeatable.",
        ),
    ] = None,
    model: Annotated[str | None, typer.Option("--model", help="Directory or hub id of the base.")] = None,
    columns: Annotated[
        list[str] | None,
        typer.Option(
            "--columns",
            metavar="OURS=THEIRS",
            help="Our name of a column that has another one in your files, such as prompt=question. Repeatable.",
        ),
    ] = None,
    limit: Annotated[
        int | None,
        typer.Option(
            "--limit", min=1, help="Read only the first N rows of each file, for a trial.", show_default=False
        ),
    ] = None,
    max_length: Annotated[
        int | None,
        typer.Option(
            "--max-length",
            min=8,
            help="Longest row in tokens; longer ones are left out, however many there are.",
            show_default=False,
        ),
    ] = None,
    max_dropped_fraction: Annotated[
        float | None,
        typer.Option(
            "--max-dropped-fraction",
            min=0.0,
            max=1.0,
            help="Share of a file's rows that may be left out as bad, equal or too long; else 0.05.",
            show_default=False,
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Write configs that run for your data and model. Each key has its reason next to it."""
    inspection.require_reachable(model, data or [])
    options = progress.load("rlhf.start.facts").Options
    given = {"limit": limit, "max_length": max_length, "max_dropped_fraction": max_dropped_fraction}
    wanted = options(_renamed(columns or []), **{name: value for name, value in given.items() if value is not None})
    project = progress.load("rlhf.start.project").make(directory, data or [], model, wanted)
    if as_json:
        typer.echo(json.dumps({"directory": str(directory), "files": list(project.files), "figures": project.figures}))
        return
    typer.echo("\n".join(f"{name:<16}{text}" for name, text in project.figures))
    typer.echo(f"\nWrote {', '.join(project.files)}.\nNext: cd {directory} && rlhf pipeline")


def _renamed(columns: Sequence[str]) -> dict[str, str]:
    """Our field name -> the name in the files."""
    found: dict[str, str] = {}
    for text in columns:
        ours, sign, theirs = text.partition("=")
        if not (ours and sign and theirs):
            raise RlhfError(Problem("CFG005", "--columns", f"'{text}' is not OURS=THEIRS.", "prompt=question"))
        if ours in found:
            raise RlhfError(Problem("CFG005", "--columns", f"names {ours} twice.", "one column for each field"))
        found[ours] = theirs
    return found


def plan(
    files: Files = None,
    config: MoreFiles = None,
    stage: OfStage = None,
    gpu: Annotated[
        str | None, typer.Option("--gpu", help="Memory to fit into, such as 24GB; else this machine's.")
    ] = None,
    flops: Annotated[str | None, typer.Option("--flops", help="Operations a second as reached, such as 150T.")] = None,
    bandwidth: Annotated[str | None, typer.Option("--bandwidth", help="Bytes a second, such as 2T.")] = None,
    measure: Annotated[bool, typer.Option("--measure", help="Measure this machine's speed for a second.")] = False,
    sets: Sets = None,
    as_json: Json = False,
) -> None:
    """Predict memory and time of stages from their configs. What would make them fit is said."""
    module = importlib.import_module("rlhf.commands.plan")
    device = module.Device(gpu, flops, bandwidth, measure)
    outcome = module.plans([*(files or []), *(config or [])], stage, sets or [], device)
    if as_json:
        typer.echo(json.dumps(outcome))
        return
    typer.echo("\n\n".join("\n".join(module.lines(one)) for one in outcome))


COMMANDS: dict[str, Callable[..., None]] = {
    "init": init, "check": check, "plan": plan, "config": config, "migrate": migrate, "demo": demo,
}  # fmt: skip
