"""A directory with configs and data splits, decided whole before a byte of it is written."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from rlhf.demo import catalogue as demo
from rlhf.errors import DISK, Problem, RlhfError
from rlhf.hub import names
from rlhf.preflight import resources as machine
from rlhf.runs import storage
from rlhf.start import chain, choose, fit, look, parts, read_files, summary
from rlhf.start.basis import basis
from rlhf.start.facts import Options
from rlhf.start.render import render

WORLD = "demo:"
MODEL = "demo:base"


@dataclass(frozen=True)
class Project:
    """File -> text, and what was decided, as lines of a table."""

    files: dict[str, str]
    figures: tuple[tuple[str, str], ...]


def make(directory: Path, data: Sequence[str], model: str | None, options: Options | None = None) -> Project:
    """Look, decide, and write.

    Without data, or with ``demo:``, and without another model or any option it is the embedded world's own chain.

    Raises:
        RlhfError: RES007 for a directory that holds something, RES002 for one that cannot be written to, CFG009 where
            data need a model, and what is wrong with model or data.
    """
    _refuse_unfit(directory)
    wanted, options = list(data) or [WORLD], options or Options()
    if model is None and wanted != [WORLD]:
        what = "not named, and the embedded world's base knows the words of that world only."
        raise RlhfError(Problem("CFG009", "--model", what, "a directory or hub id, for instance Qwen/Qwen2.5-0.5B"))
    if wanted == [WORLD] and model in (None, MODEL) and options == Options():
        project = embedded_world()
    else:
        project = own(wanted, model or MODEL, options)
    _write(directory, project)
    return project


def own(data: Sequence[str], model: str, options: Options) -> Project:
    """The chain of a model and files of one's own; ``demo:`` stands for all data sets of the embedded world."""
    named = [name for path in data for name in ([WORLD + kind for kind in demo.DATASETS] if path == WORLD else [path])]
    facts, chat = look.model(_lasting(model))
    fitting = fit.fitting(
        read_files.files(named, options), chat, options, choose.size_of(facts.num_parameters).is_large
    )
    rows = read_files.rows(fitting.files)
    split = parts.split(rows)
    last_only = fit.rewrites_turns(rows.demonstrations, chat)
    whole = basis(facts, split, fit.lengths_of(split, fitting.tokens), fitting.limit, last_only)
    found = fit.with_room(whole, options)
    configs = chain.build(found)
    files = {f"configs/{name}.yaml": render(summary.TITLES[name], tree) for name, tree in configs.items()}
    for part, path in chain.DATA.items():
        if records := getattr(found.parts, part):
            lines = (json.dumps(parts.as_json(record), ensure_ascii=False) for record in records)
            files[path] = "".join(f"{line}\n" for line in lines)
    return Project(files, (*summary.of_data(fitting.files, split, found), *summary.figures(found, configs)))


def embedded_world() -> Project:
    """The shipped chain; its data sets are made when they are read."""
    folder = resources.files("rlhf.start") / "world"
    found = {f"configs/{entry.name}": entry.read_text("utf-8") for entry in folder.iterdir() if entry.is_file()}
    files = dict(sorted(found.items()))
    return Project(
        files, (("model", MODEL), ("data", "the embedded world's; rlhf demo --out DIR writes it to look at"))
    )


def _lasting(model: str) -> str:
    """A path that means the same inside of the new directory."""
    if demo.is_demo(model):
        return model
    if refused := names.refused(model, "--model", "MOD001"):
        raise RlhfError(refused)
    return str(Path(model).resolve()) if names.exists(model) else model


def _refuse_unfit(directory: Path) -> None:
    if directory.is_file() or (directory.is_dir() and any(directory.iterdir())):
        what = "is a file." if directory.is_file() else "is not empty."
        raise RlhfError(Problem("RES007", str(directory), what, "name a new directory"))
    if unwritable := machine.directory_problem(str(directory), names.shown(str(directory)), "directory"):
        raise RlhfError(unwritable)


def _write(directory: Path, project: Project) -> None:
    """A new directory whole or not at all; into one that is there and empty, which may be somebody's place to stand.

    Raises:
        RlhfError: RES002 where nothing can be written there.
    """
    try:
        if not directory.is_dir():
            with storage.staged_directory(directory) as staging:
                _write_into(staging, project)
            return
        try:
            _write_into(directory, project)
        except BaseException:
            for name in {Path(file).parts[0] for file in project.files}:
                shutil.rmtree(directory / name, ignore_errors=True)
            raise
    except OSError as error:
        if error.errno in DISK:
            raise
        what, fix = f"cannot be written to: {error.strerror}.", "another directory, or the right to write there"
        raise RlhfError(Problem("RES002", names.shown(str(directory)), what, fix)) from None


def _write_into(directory: Path, project: Project) -> None:
    for name, text in project.files.items():
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        storage.write_text(path, text)
