"""The command line: one command a stage, made from the registry, and the commands around them."""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from rlhf import __version__, errors, secrets
from rlhf.commands import before_a_run, curve, inspection, judge, pipeline, run_list, use, verdict
from rlhf.commands.options import Bare, ConfigFile, Json, Sets
from rlhf.commands.parsing import ANYWHERE, Command, Group, StageCommand, example
from rlhf.errors import Problem, RlhfError
from rlhf.hub import names
from rlhf.runs import artifacts, interrupts, progress, run_directory
from rlhf.stages import starting
from rlhf.stages.contract import Stage
from rlhf.stages.registry import STAGES, open_config
from rlhf.stages.starting import Start

log = logging.getLogger("rlhf")

Resume = Annotated[bool, typer.Option("--resume", help="Go on with the unfinished run in run_dir.")]
AllowChange = Annotated[
    list[str] | None, typer.Option("--allow-change", help="Config key that may differ when resuming. Repeatable.")
]
Limit = Annotated[
    int | None,
    typer.Option(
        "--limit", min=1, help="Read only the first N rows of each data set, for a trial.", show_default=False
    ),
]
# Typer carries its own copy of click, and offers these two by no name of its own.
UsageError: Any = typer.BadParameter.__mro__[1]
ClickException: Any = typer.BadParameter.__mro__[2]


app = typer.Typer(cls=Group, pretty_exceptions_enable=False, rich_markup_mode=None)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"rlhf {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,
    json_errors: Annotated[bool, typer.Option("--json-errors", help="Print errors as JSON.")] = False,
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_print_version, help="Print the version.")
    ] = False,
) -> None:
    """Classic RLHF on one machine: supervised fine-tuning, reward model, PPO."""


def _add_stage(stage: Stage) -> None:
    def command(
        config: ConfigFile = None,
        bare: Bare = None,
        sets: Sets = None,
        dry_run: Annotated[
            bool, typer.Option("--dry-run", help="Check, count tokens, show the plan; run nothing.")
        ] = False,
        overwrite: Annotated[bool, typer.Option("--overwrite", help="Move what stands in run_dir aside.")] = False,
        resume: Resume = False,
        allow_change: AllowChange = None,
        limit: Limit = None,
        as_json: Json = False,
    ) -> None:
        start = Start(overwrite, resume, tuple(allow_change or ()))
        path, overrides = config or _default_config(stage.default_config), [*(sets or []), *(bare or [])]
        overrides += starting.limits(stage, path, overrides, limit) if limit else []
        _run_stage(stage, path, overrides, start, as_json, dry_run)

    app.command(stage.id, cls=StageCommand, help=f"{stage.summary} Without -c, reads {stage.default_config}.")(command)


def _run_stage(
    stage: Stage, path: Path, overrides: list[str], start: Start, as_json: bool, dry_run: bool = False
) -> None:
    found = starting.ready(stage, path, overrides)
    if dry_run:
        lines = found.lines()
        typer.echo(json.dumps({"stage": stage.id, "plan": lines}) if as_json else "\n".join(lines))
        return
    found.run(start)
    if as_json:
        typer.echo(json.dumps(inspection.summary(found.run_dir)))


def _default_config(name: str) -> Path:
    if not Path(name).is_file():
        fix = "name a config with -c, or run in a directory that has configs/"
        raise RlhfError(Problem("CFG001", name, "no such file in the working directory.", fix))
    return Path(name)


def _examine(
    config: ConfigFile = None,
    bare: Bare = None,
    sets: Sets = None,
    benchmark: Annotated[
        str | None, typer.Option("--benchmark", help="rewardbench, rewardbench2 or rm-bench: score it by its rules.")
    ] = None,
    data: Annotated[str | None, typer.Option("--data", help="The rows: the same as data.path=.")] = None,
    fail_on: Annotated[
        str | None, typer.Option("--fail-on", help="warn or fail: exit 10 for this verdict or a worse one.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check, count tokens, show the plan.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Move what stands in run_dir aside.")] = False,
    resume: Resume = False,
    allow_change: AllowChange = None,
    limit: Limit = None,
    as_json: Json = False,
) -> None:
    if fail_on not in (None, "warn", "fail"):
        raise RlhfError(Problem("CFG005", "--fail-on", f"no verdict {fail_on}.", "warn or fail"))
    stage, start = STAGES["eval-rm"], Start(overwrite, resume, tuple(allow_change or ()))
    path, overrides = config or _default_config(stage.default_config), [*(sets or []), *(bare or [])]
    overrides += [f"benchmark={benchmark}"] if benchmark else []
    overrides += [f"data.path={data}"] if data else []
    overrides += starting.limits(stage, path, overrides, limit) if limit else []
    _run_stage(stage, path, overrides, start, as_json, dry_run)
    if fail_on and not dry_run:
        verdict.require(open_config(stage.id, path, overrides).run_dir, fail_on)


for _stage in STAGES.values():
    if _stage.id != "eval-rm":
        _add_stage(_stage)
app.command("eval-rm", cls=StageCommand, help="Examine a reward model. Without -c, reads configs/eval-rm.yaml.")(
    _examine
)
for _name, _function in {**use.COMMANDS, **judge.COMMANDS, **before_a_run.COMMANDS, **curve.COMMANDS}.items():
    app.command(_name, cls=StageCommand if _name in curve.COMMANDS else Command)(_function)


@app.command("resume", cls=Command)
def _resume(
    run: Annotated[Path, typer.Argument(help="Directory of an unfinished run.")],
    allow_change: AllowChange = None,
    as_json: Json = False,
) -> None:
    """Go on with a run that was cut off. Its config is the one that it was started with."""
    stage = STAGES[run_directory.started(run)["stage"]]
    start = Start(resume=True, allowed=tuple(allow_change or ()))
    _run_stage(stage, run / artifacts.CONFIG, [f"run_dir={run}"], start, as_json)


@app.command("pipeline", cls=Command)
def _pipeline(
    config: ConfigFile = None,
    sets: Annotated[
        list[str] | None, typer.Option("--set", help="Override one key of a stage: STAGE.a.b=c. Repeatable.")
    ] = None,
    limit: Annotated[
        int | None,
        typer.Option(
            "--limit",
            min=1,
            show_default=False,
            help="Read only the first N rows of each data set of every "
            "stage, for a trial. These are other runs: finished ones are moved aside and made anew.",
        ),
    ] = None,
    first: Annotated[str | None, typer.Option("--from", metavar="STAGE", help="Begin with this stage.")] = None,
    last: Annotated[str | None, typer.Option("--to", metavar="STAGE", help="End with this stage.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the plan of each stage; run nothing.")] = False,
    as_json: Json = False,
) -> None:
    """Run stages in order, each in its own process. What is finished and unchanged is skipped. STAGE is the name of a
    stage, or its number where the pipeline has the stage more than once."""
    path = config or _default_config("configs/pipeline.yaml")
    part = pipeline.Part(tuple(sets or ()), limit, first, last)
    if dry_run:
        plans = pipeline.plans(path, part)
        lines = [line for plan in plans for line in (f"{plan['title']}:", *(f"  {line}" for line in plan["plan"]))]
        typer.echo(json.dumps(plans) if as_json else "\n".join(lines))
        return
    outcome = pipeline.run(path, part)
    if as_json:
        typer.echo(json.dumps(outcome))


@app.command("show", cls=Command)
def _show(
    run: Annotated[
        Path | None, typer.Argument(help="A run, or a directory that holds some; none: runs/.", show_default=False)
    ] = None,
    as_json: Json = False,
) -> None:
    """What a run is: kind, parents, metrics, lineage; or the runs of a directory, a line each."""
    if run is not None and (artifacts.is_finished(run) or not names.exists(str(run))):
        typer.echo(json.dumps(inspection.summary(run)) if as_json else inspection.describe(run))
        return
    entries = run_list.below(run or run_list.RUNS)
    if run is not None and not entries:
        raise RlhfError(Problem("CKP001", str(run), "is not a run and holds none.", "rlhf show lists those in runs/"))
    lines = run_list.lines(entries, run or run_list.RUNS)
    typer.echo(json.dumps([asdict(entry) for entry in entries]) if as_json else "\n".join(lines))


def main() -> None:
    """Entry point: every outcome is an exit code, every mistake one block of text."""
    progress.log_to_console(announces="--json" not in sys.argv[1:])
    interrupts.install()
    flags: dict[str, Any] = {name: name in sys.argv[1:] for name in ANYWHERE}
    try:
        code = app(prog_name="rlhf", standalone_mode=False) or errors.EXIT_OK
    except RlhfError as error:
        code = _left(error) or _report(error.problems, error.exit_code, flags)
    except ClickException as error:
        where = error.ctx.command_path if isinstance(error, UsageError) and error.ctx else "rlhf"
        fix = "; ".join(text for text in (example(where), f"see {where} --help") if text)
        code = _report((Problem("CFG000", where, error.format_message(), fix),), 2, flags)
    except interrupts.Interrupted as stop:
        saved = f"saved {stop.saved}" if stop.saved else "no step was under way"
        log.error("Interrupted by %s; %s. --resume goes on with an unfinished run.", stop, saved)
        code = stop.exit_code
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = errors.EXIT_OK
    except Exception as error:
        problem = errors.of_the_machine(error)
        if problem is None:
            what = f"internal error, {type(error).__name__}: {error}"
            problem = Problem("BUG001", "rlhf", what, "run again with --debug and report the traceback")
        code = _left(error) or _report((problem,), RlhfError(problem).exit_code, flags)
    sys.exit(code)


def _left(error: Exception) -> int:
    """The exit code of the signal that ``error`` came of, where a library made one of being left; else 0."""
    signum = interrupts.raised()
    if not signum:
        return 0
    log.error("Interrupted by %s (%s: %s).", signal.Signals(signum).name, type(error).__name__, error)
    return 128 + signum


def _report(problems: tuple[Problem, ...], code: int, flags: dict[str, Any]) -> int:
    if flags["--debug"] and (error := sys.exc_info()[1]):
        secrets.show_traceback(error)
    text = errors.render_json(problems, code) if flags["--json-errors"] else errors.render(problems)
    log.error(text)
    return code
