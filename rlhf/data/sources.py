"""Data sets by name: JSONL, whatever the datasets library loads, or the embedded world; every row a record."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from rlhf import storage
from rlhf.config.sections import DataSection, MixtureSource, SourceSection
from rlhf.data import files, forms, mixture, rows
from rlhf.data.consensus import Annotated
from rlhf.data.forms import FORMS
from rlhf.data.labelled import Labelled, compared, rated
from rlhf.data.mixture import Drawn
from rlhf.data.rows import CutOff, EqualResponses, MissingField, RowError
from rlhf.errors import Problem, RlhfError

EQUAL = "two differently ranked responses are equal"
UNCOMPARED = "no response to the same prompt has the other label"
CUT_OFF = "a sample that was cut off"
COLLECTED = "preferences.jsonl"
OF_ATTRIBUTES = ("ratings", "attributes")
TURN_KEYS = {"role", "content", "from", "value"}


@dataclass(frozen=True)
class Loaded:
    """A data set as records.

    Args:
        num_rows: rows read; ``num_dropped`` says how many of them are no record, by reason.
        digest: SHA-256 of the file, or of the records where there is no single file.
        drawn: what each source of a mixture gave; empty where there is one source.
        annotated: what several annotators said, where the config asks for it.
    """

    records: tuple[Any, ...]
    num_rows: int
    num_dropped: dict[str, int]
    digest: str
    source: str
    warnings: tuple[str, ...] = ()
    drawn: tuple[Drawn, ...] = ()
    annotated: Annotated | None = None

    def notes(self) -> list[str]:
        """What a person should know of the rows that were read: the dropped ones by reason, and the warnings."""
        return [f"{count} rows dropped: {reason}" for reason, count in self.num_dropped.items()] + list(self.warnings)


def load_demonstrations(data: DataSection, seed: int = 0) -> Loaded:
    """Conversations that end with an assistant turn. ``seed`` sets which rows a mixture draws."""
    return _load(data, "demonstrations", seed)


def load_samples(data: DataSection, seed: int = 0) -> Loaded:
    """As ``load_demonstrations``, to judge and not to learn from: a policy's samples that were cut off or have no text
    are records too."""
    return _load(data, "samples", seed)


def load_comparisons(data: DataSection, seed: int = 0) -> Loaded:
    """Pairs and rankings."""
    return _load(data, "comparisons", seed)


def load_outcomes(data: DataSection, seed: int = 0) -> Loaded:
    """As ``load_comparisons``, with every labelled response rated, also where nothing to the same prompt has the other
    label."""
    return _load(data, "outcomes", seed)


def load_responses(data: DataSection, seed: int = 0) -> Loaded:
    """As ``load_comparisons``, and samples that nobody has judged (prompt, response), each a record without judgements;
    one that was cut off is dropped and counted."""
    return _load(data, "responses", seed)


def load_prompts(data: DataSection, seed: int = 0) -> Loaded:
    """Conversations that wait for an answer."""
    return _load(data, "prompts", seed)


def load_benchmark(name: str) -> Callable[[DataSection, int], Loaded]:
    """The reader of a benchmark's rows."""

    def load(data: DataSection, seed: int = 0) -> Loaded:
        return _load(data, name, seed)

    return load


def raw_rows(data: DataSection) -> Iterator[tuple[str, dict[str, Any]]]:
    """(where, row) of each row as it stands in the data, for a look at its form before it is read as a record."""
    problems: list[Problem] = []
    yield from files.read(data, problems, [])
    if problems:
        raise RlhfError(*problems)


def check_dropped(num_rows: int, dropped: Mapping[str, int], max_dropped_fraction: float, where: str) -> None:
    """Raise DAT020 where more than the allowed share of the rows would be dropped; the message has the counts."""
    total = sum(dropped.values())
    if total > max_dropped_fraction * num_rows:
        counts = "; ".join(f"{count} {reason}" for reason, count in dropped.items() if count)
        what = f"{total} of {num_rows} rows ({total / num_rows:.1%}) would be dropped: {counts}."
        raise RlhfError(Problem("DAT020", where, what, "mend the rows, or raise max_dropped_fraction openly"))


def _load(data: DataSection, kind: str, seed: int) -> Loaded:
    """All sources, whose problems are raised together, as one data set. A collect run's directory stands for the
    preferences in it."""
    parts: list[Loaded] = []
    problems: list[Problem] = []
    for source in data.sources:
        collected = Path(source.path) / COLLECTED
        if storage.is_file(collected):
            source = source.model_copy(update={"path": str(collected)})
        try:
            parts.append(_read(source, data, kind))
        except RlhfError as error:
            problems += error.problems
    if problems:
        raise RlhfError(*problems)
    return _mixed(parts, data.sources, data.mixture_rows, seed) if data.mixture else parts[0]


def _mixed(parts: Sequence[Loaded], sources: Sequence[MixtureSource], total: int | None, seed: int) -> Loaded:
    records, drawn = mixture.draw([part.records for part in parts], sources, total, seed)
    dropped: Counter[str] = Counter()
    for part in parts:
        dropped.update(part.num_dropped)
    notes = [f"{part.source}: {note}" for part in parts for note in part.warnings]
    notes += [one.sentence() for one in drawn]
    notes += mixture.shared_prompts([(part.source, part.records) for part in parts])
    counts = [[part.digest, one.num_drawn] for part, one in zip(parts, drawn, strict=True)]
    digest = storage.sha256_json({"sources": counts, "seed": seed if sources[0].weight else None})
    return Loaded(
        tuple(records), sum(part.num_rows for part in parts), dict(dropped), digest,
        " + ".join(part.source for part in parts), tuple(notes), tuple(drawn),
    )  # fmt: skip


@dataclass
class _Reading:
    """What has been found in a source so far."""

    records: list[Any] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    missing: dict[str, list[Problem]] = field(default_factory=dict)
    ignored: set[str] = field(default_factory=set)
    present: set[str] = field(default_factory=set)
    num_rows: int = 0
    dropped: Counter[str] = field(default_factory=Counter)


def _read(source: MixtureSource, data: DataSection, kind: str) -> Loaded:
    _check_choice(source, kind)
    found = _Reading()
    before = files.stamp(source.path)
    for where, raw in islice(files.read(source, found.problems, found.notes), source.limit):
        found.num_rows += 1
        found.present |= raw.keys()
        _row(files.renamed(raw, source.columns), where, source, data, kind, found)
    _compare_labelled(data, found, kind)
    _raise(source, found)
    check_dropped(found.num_rows, found.dropped, data.max_dropped_fraction, source.path)
    if not found.records:
        raise RlhfError(Problem("DAT013", source.path, f"no rows left: all {found.num_rows} were dropped."))
    if found.ignored:
        found.notes.append(f"ignored fields: {rows.names(sorted(found.ignored))}")
    digest = files.digest(source, found.records)
    if files.stamp(source.path) != before:
        raise RlhfError(Problem("DAT014", source.path, "changed while it was read.", "run again when it is written"))
    return Loaded(
        tuple(found.records), found.num_rows, dict(found.dropped), digest, source.path, tuple(found.notes)
    )  # fmt: skip


def _row(
    row: Mapping[str, Any], where: str, source: SourceSection, data: DataSection, kind: str, found: _Reading
) -> None:
    try:
        record, form = forms.read(row, where, kind, source.form)
        found.records.append(record)
        found.ignored.update(row.keys() - set(form.fields))
        for name in form.fields:
            if not isinstance(value := row.get(name), str) and name not in OF_ATTRIBUTES:
                found.ignored.update(f"{name}[].{key}" for key in _extra_keys(value))
    except EqualResponses as error:
        _equal(where, error, data, found)
    except CutOff:
        found.dropped[CUT_OFF] += 1
    except MissingField as error:
        theirs = source.columns.get(error.field)
        fix = f"columns.{error.field} names '{theirs}'" if theirs else ""
        found.problems.append(Problem("DAT004", where, str(error), fix))
        found.missing.setdefault(error.field, []).append(found.problems[-1])
    except RowError as error:
        found.problems.append(Problem("DAT004", where, str(error)))


def _equal(where: str, error: EqualResponses, data: DataSection, found: _Reading) -> None:
    found.dropped[EQUAL] += 1
    if not data.drop_equal:
        found.problems.append(Problem("DAT012", where, str(error), "drop the row, or set drop_equal: true"))


def _compare_labelled(data: DataSection, found: _Reading, kind: str) -> None:
    """Responses with a label of their own become comparisons between those to one prompt, rated where told."""
    labelled = [record for record in found.records if isinstance(record, Labelled)]
    if not labelled:
        return
    if kind == "outcomes":
        made, equal = rated(labelled)
        alone = 0
    else:
        made, alone, equal = compared(labelled)
    for where, error in equal:
        _equal(where, error, data, found)
    if alone:
        found.dropped[UNCOMPARED] += alone
    found.records = [record for record in found.records if not isinstance(record, Labelled)] + made
    used = len(labelled) - alone - len(equal)
    found.notes.append(f"{used} labelled responses give {len(made)} comparisons, one a prompt")


def _extra_keys(value: Any) -> set[str]:
    """Keys of the turns of a conversation beside what is read of them."""
    turns = value if isinstance(value, list) else (value,)
    return {key for turn in turns if isinstance(turn, Mapping) for key in turn if turn[key] is not None} - TURN_KEYS


def _check_choice(source: SourceSection, kind: str) -> None:
    """Columns and form are those of the kind of data."""
    known = list(dict.fromkeys(name for form in FORMS[kind] for name in form.fields))
    wrong = [
        Problem("DAT003", source.path, f"columns.{ours}: {kind} have no such field.", f"one of {rows.names(known)}")
        for ours in source.columns
        if ours not in known and not ("attributes" in known and ours.startswith(files.ATTRIBUTE))
    ]
    forms_known = [form.name for form in FORMS[kind]]
    if source.form and source.form not in forms_known:
        fix = f"one of {', '.join(forms_known)}"
        wrong.append(Problem("DAT003", source.path, f"form {source.form}: {kind} have no such form.", fix))
    if wrong:
        raise RlhfError(*wrong)


def _raise(source: SourceSection, found: _Reading) -> None:
    problems, num_rows, present = found.problems, found.num_rows, rows.names(sorted(found.present))
    for ours, theirs in source.columns.items():
        if num_rows and theirs not in found.present:
            what = f"no field '{theirs}' (columns.{ours}) in any row; found {present}."
            raise RlhfError(Problem("DAT003", source.path, what, "name a field that is there"))
    same = len({problem.what for problem in problems}) == 1 and len(problems) == num_rows > 1
    if same and not found.records:
        first = problems[0]
        fix = first.fix or "columns maps other names: {ours: theirs}"
        raise RlhfError(Problem(first.code, source.path, f"all {num_rows} rows: {first.what}", fix))
    for name, missing in found.missing.items():
        if len(missing) == num_rows > 1:
            what = f"all {num_rows} rows: no field '{name}'; found {present}."
            one = Problem("DAT003", source.path, what, "columns maps other names: {ours: theirs}")
            raise RlhfError(one, *(problem for problem in problems if problem.code != "DAT004"))
    if problems:
        raise RlhfError(*problems)
    if not num_rows:
        raise RlhfError(Problem("DAT013", source.path, "; ".join(("no rows", *found.notes)) + "."))
