"""Looking without running: ``check``, ``show`` and ``demo``."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rlhf.commands import reader, text_view
from rlhf.config import load, migrate, reference, rubric, yaml_reader
from rlhf.config.migration import Migration
from rlhf.config.sections import DataSection
from rlhf.data import sources
from rlhf.data.deep import FIXES
from rlhf.demo import catalogue as demo
from rlhf.errors import Problem, RlhfError
from rlhf.findings import Findings
from rlhf.hub import connection, names
from rlhf.preflight import examined, prepare
from rlhf.preflight.prepare import Checked
from rlhf.runs import artifacts, progress, storage
from rlhf.runs.artifacts import Manifest
from rlhf.stages.registry import KINDS, STAGES, around, kinds_of, open_config, refuse_unknown

SHOWN = 5


def check(
    files: Sequence[Path], stage: str | None, overrides: Sequence[str], show: int = 0, deep: bool = False
) -> list[dict[str, Any]]:
    """Check configs; parents that have not run yet are noted, not refused. All problems are raised together.

    Args:
        show: that many rows of each data set come back as the model will see them, for which the tokenizer is loaded.
        deep: look for what is wrong between sound rows and data sets, also in tokens; see ``refuse_found``.
    """
    results: list[dict[str, Any]] = []
    findings = Findings()
    checked: list[Checked | None] = []
    kinds = kinds_of(files, stage, findings)
    for path, kind in kinds:
        folders = tuple(dict.fromkeys([path.parent, *(other.parent for other, _ in kinds)]))
        with findings.gathering():
            result, found = _check_file(path, kind, overrides, folders, show)
            results.append(result)
            checked.append(found)
    findings.refuse()
    if deep:
        progress.load("rlhf.commands.deep_check").add_findings(results, checked)
    return results


def refuse_found(results: Sequence[Mapping[str, Any]]) -> None:
    """Raise what a deep check found to be an error."""
    found = [entry for result in results for data in result.get("data", {}).values() for entry in data.get("found", [])]
    if errors := [Problem(one["code"], one["where"], one["what"], FIXES[one["code"]]) for one in found if one["code"]]:
        raise RlhfError(*errors)


def _check_file(
    path: Path, kind: str, overrides: Sequence[str], folders: tuple[Path, ...], show: int
) -> tuple[dict[str, Any], Checked | None]:
    config = open_config(kind, path, overrides, "--stage {kind}")
    result: dict[str, Any] = {"config": str(path), "stage": kind}
    if kind == "pipeline":
        return result | {"steps": [step.model_dump() for step in config.stages]}, None
    if kind not in STAGES:
        return result, None
    needs = STAGES[kind].needs(config)
    plan = prepare.prepare(config, needs, parents_may_be_missing=True, nearby=around(path))
    checked = Checked(kind, config, needs, plan, folders)
    result["data"] = {
        key: {"rows": len(loaded.records), "dropped": loaded.num_dropped, "notes": loaded.notes()}
        for key, loaded in plan.data.items()
    }
    result["not_checked"] = list(plan.unchecked)
    if show:
        _add_rows(result, checked, show)
    return result, checked


def _add_rows(result: dict[str, Any], checked: Checked, count: int) -> None:
    """The first rows of each data set: as the model will see them, or as text where no tokenizer can be had."""
    found = reader.of(checked)
    if not found.is_known:
        result["rows_shown"] = f"as text, without tokens: {found.note}"
        shown = text_view.rows(checked, count)
    else:
        result["rows_shown"] = f"with {found.note}" if found.note else "as the model reads them"
        shown = progress.load("rlhf.commands.token_view").rows(checked, count, found)
    for key, rows in shown.items():
        result["data"][key]["shown"] = rows


def reference_of(stage_id: str | None, schema: bool) -> str:
    """The reference of one stage's config or its JSON schema; of all as one document."""
    if stage_id is None and not schema:
        return reference.document(KINDS)
    refuse_unknown(stage_id or "", "rlhf config", "one of")
    config_class = KINDS[stage_id or ""]
    return json.dumps(reference.schema(config_class), indent=2) if schema else reference.table(config_class)


def require_reachable(model: str | None, data: Sequence[str]) -> None:
    """Raise for names of the hub that neither it nor its cache gives, before slow libraries are imported."""
    findings = Findings()
    if model is not None and _is_hub_name(model):
        findings.add(connection.model_problem(model, model, None))
    for path in data:
        if _is_hub_name(path) and not path.endswith(prepare.DATA_FILES) and connection.trouble():
            with findings.gathering():
                next(sources.raw_rows(DataSection(path=path)), None)
    findings.refuse()


def _is_hub_name(name: str) -> bool:
    return not demo.is_demo(name) and not names.exists(name) and names.refused(name, "", "MOD001") is None


def migrated(path: Path, stage_id: str | None) -> Migration:
    """A config of TRL or LlamaFactory as one of ours, in the form that ``check`` accepts.

    Raises:
        RlhfError: CFG030 for what cannot be translated, SEC008 where a secret would stand in the outcome.
    """
    old, _ = yaml_reader.read_file(path)
    if not isinstance(old, dict):
        raise RlhfError(Problem("CFG030", str(path), "has no keys at the top level.", "name a config"))
    listed = Path(str(old.get("dataset_dir") or "data")) / "dataset_info.json"
    try:
        data_sets = json.loads(listed.read_text("utf-8")) if storage.is_file(listed) else {}
    except ValueError as error:
        raise RlhfError(Problem("CFG030", str(listed), f"is no JSON: {error}.", "mend it")) from None
    found = migrate.migrate(old, KINDS, stage_id, str(path), data_sets if isinstance(data_sets, dict) else {})
    load.load_text(KINDS[found.stage], found.text(path.name), str(path))
    return found


def check_lines(results: Sequence[dict[str, Any]], colour: bool = False) -> Iterator[str]:
    for result in results:
        yield f"{result['config']}: a sound {result['stage']} config."
        if "rows_shown" in result:
            yield f"  rows are shown {result['rows_shown']}."
        for key, entry in result.get("data", {}).items():
            yield f"  {key}: {entry['rows']} rows."
            yield from (f"  {key}: {note}." for note in entry["notes"])
            yield from _found_lines(key, entry.get("found", []))
            for row in entry.get("shown", []):
                yield from _row_lines(row, colour)
        yield from (f"  not checked: {note}." for note in result.get("not_checked", []))


def _found_lines(key: str, found: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Warnings and notes by kind, the first few of each; errors are raised."""
    kinds = dict.fromkeys((one["level"], one["kind"]) for one in found if not one["code"])
    for level, kind in kinds:
        own = [one for one in found if (one["level"], one["kind"]) == (level, kind)]
        yield f"  {key}: {level}, {kind}: {len(own)}."
        yield from (_visible(f"     {one['where']}: {one['what']}") for one in own[:SHOWN])
        if len(own) > SHOWN:
            yield f"     ... and {len(own) - SHOWN} more (--json has all)"


def _row_lines(row: Mapping[str, Any], colour: bool) -> Iterator[str]:
    """A row as text; what is marked is green, or stands between brackets that text hardly has."""
    before, after = ("\x1b[32m", "\x1b[0m") if colour else ("\u27e6", "\u27e7")
    yield f"  -- {row['where']}: {row['about']}"
    text = "".join(f"{before}{_visible(part)}{after}" if marked else _visible(part) for part, marked in row["parts"])
    yield from (f"     {line}" for line in text.split("\n"))


def _visible(text: str) -> str:
    """Whatever a terminal could take for a command or would not show, escaped."""
    return "".join(letter if letter == "\n" or letter.isprintable() else ascii(letter)[1:-1] for letter in text)


def summary(run_dir: Path) -> dict[str, Any]:
    """The manifest with the artifact's digest and its lineage, as JSON values."""
    manifest = artifacts.read(run_dir)
    lineage = [{"run_dir": name, "stage": parent.stage, "digest": parent.digest} for name, parent in _lineage(manifest)]
    return {"run_dir": str(run_dir), "digest": manifest.digest, **asdict(manifest), "lineage": lineage}


def describe(run_dir: Path) -> str:
    """The same for a person."""
    manifest = artifacts.read(run_dir)
    lines = [
        f"{run_dir}: a {manifest.kind} run, made by rlhf {manifest.stage} on {manifest.created} "
        f"in {manifest.seconds:.0f} s (seed {manifest.seed}).",
        f"  digest    {manifest.digest[:16]}",
    ]
    if manifest.base:
        lines.append(f"  base      {manifest.base.source} ({manifest.base.dtype}, {manifest.base.digest[:16]})")
    for key, parent in manifest.parents.items():
        lines.append(f"  parent    {key}: {parent['run_dir']} ({_state(parent)})")
    lines += [
        f"  ancestor  {name}: rlhf {parent.stage}" for name, parent in _lineage(manifest)[len(manifest.parents) :]
    ]
    lines += [f"  note      {mark}" for mark in examined.marks(manifest)]
    lines += [f"  failed    {problem}" for problem in artifacts.failed_gates(manifest)]
    if path := artifacts.rubric_of(run_dir):
        found = rubric.read(path)
        lines.append(f"  rubric    {found.name} ({storage.sha256(path)[:16]})")
        lines += [f"  criterion {line}" for line in rubric.lines(found)]
    lines += [f"  metric    {key} = {_number(value)}" for key, value in manifest.metrics.items()]
    said = (examined.ACCEPTED, artifacts.FAILED_GATES)
    lines += [f"  detail    {key} = {json.dumps(value)}" for key, value in manifest.details.items() if key not in said]
    lines += [f"  file      {name} ({entry['size']:,} bytes)" for name, entry in manifest.files.items()]
    return "\n".join(lines)


def _lineage(manifest: Manifest) -> list[tuple[str, Manifest]]:
    """The runs that this one was made from, nearest first, as far as their directories still stand."""
    found: list[tuple[str, Manifest]] = []
    waiting = [manifest]
    while waiting:
        for parent in waiting.pop(0).parents.values():
            name = parent["run_dir"]
            if artifacts.is_finished(Path(name)) and name not in [known for known, _ in found]:
                found.append((name, artifacts.read(name)))
                waiting.append(found[-1][1])
    return found


def _state(parent: dict[str, str]) -> str:
    if not artifacts.is_finished(Path(parent["run_dir"])):
        return "gone"
    return "unchanged" if artifacts.read(parent["run_dir"]).digest == parent["digest"] else "changed since"


def _number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else json.dumps(value)


def write_demo(out: Path, size: int, seed: int) -> dict[str, int]:
    """Each data set of the embedded world as ``out/NAME.jsonl``; returns path -> rows."""
    out.mkdir(parents=True, exist_ok=True)
    counts = {}
    for name in demo.DATASETS:
        rows = list(demo.rows(f"demo:{name}?size={size}&seed={seed}"))
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        storage.write_text(out / f"{name}.jsonl", text)
        counts[str(out / f"{name}.jsonl")] = len(rows)
    return counts
