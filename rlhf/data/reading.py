"""One source as records: each row in its form, the rows that are dropped, and what is wrong with the source."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from itertools import islice
from typing import Any

from rlhf.config.sections import DataSection, MixtureSource, SourceSection
from rlhf.data import files, forms, tables
from rlhf.data.dropped import DroppedRows
from rlhf.data.forms import FORMS, Form
from rlhf.data.labelled import Labelled, compared, rated
from rlhf.data.rows import UNCOMPARED, BadLine, CutOff, EndOfReading, MissingField, RowError, names
from rlhf.errors import Problem, RlhfError
from rlhf.findings import Findings

NO_TURNS = ("ratings", "attributes", "provenance")
TURN_KEYS = {"role", "content", "from", "value"}
FIX, OR_DROP = "fix the row, or remove it", "; on_bad_row: drop leaves it out"
OTHER_NAMES = "columns maps other names: {ours: theirs}; form says which form the rows have"
OF_ALL = {
    "DAT004": OTHER_NAMES,
    "DAT011": "one JSON object a line; a file of another format needs the suffix of that format",
    "DAT012": "responses that differ",
}


class Reading:
    """What has been found in a source so far."""

    def __init__(self, source: MixtureSource, data: DataSection) -> None:
        self.source = source
        self.records: list[Any] = []
        self.dropped = DroppedRows(source.path, data.max_dropped_fraction, data.on_bad_row == "drop")
        self.faults: list[tuple[str, RowError]] = []
        self.findings = Findings()
        self.joined: list[str] = []
        self.ignored: set[str] = set()
        self.present: set[str] = set()

    def all_notes(self) -> list[str]:
        """What a person should know of the rows, other than those that are dropped."""
        said = list(self.findings.notes)
        if self.joined:
            turns = "turns of one speaker in a row were joined, a blank line between them"
            said.append(f"{len(self.joined):,} rows (first: {self.joined[0]}): {turns}")
        if self.ignored:
            said.append(f"ignored fields: {names(sorted(self.ignored))}")
        return said

    def add(self, where: str, row: Mapping[str, Any], kind: str) -> None:
        """The record of a row, or its fault."""
        try:
            record, form = forms.read(row, where, kind, self.source.form)
        except CutOff as error:
            self.dropped.add(error.reason, where)
        except RowError as error:
            self.fault(where, error)
        else:
            self.records.append(record)
            self._ignored(row, form)
            if record.joined:
                self.joined.append(where)

    def fault(self, where: str, error: RowError) -> None:
        self.faults.append((where, error))
        self.dropped.add(error.reason, where)

    def compare_labelled(self, kind: str) -> None:
        """Responses with a label of their own become comparisons between those to one prompt, or are rated."""
        labelled = [record for record in self.records if isinstance(record, Labelled)]
        if not labelled:
            return
        made, equal = rated(labelled) if kind == "outcomes" else ([], [])
        alone: list[str] = []
        if kind != "outcomes":
            made, alone, equal = compared(labelled)
        for where, error in equal:
            self.fault(where, error)
        for where in alone:
            self.dropped.add(UNCOMPARED, where, fix="label good and bad responses to one prompt")
        self.records = [record for record in self.records if not isinstance(record, Labelled)] + made
        used = len(labelled) - len(alone) - len(equal)
        self.findings.note(f"{used} labelled responses give {len(made)} comparisons, one a prompt")

    def _ignored(self, row: Mapping[str, Any], form: Form) -> None:
        self.ignored.update(row.keys() - set(form.fields))
        for name in form.fields:
            if not isinstance(value := row.get(name), str) and name not in NO_TURNS:
                self.ignored.update(f"{name}[].{key}" for key in _extra_keys(value))


def read(source: MixtureSource, data: DataSection, kind: str) -> Reading:
    """Every row of the source, as the records of ``kind``.

    Raises:
        RlhfError: DAT003 for columns, fields or a form that no row has, DAT013 where there is no row or none is left,
            DAT004, DAT011 and DAT012 for rows with a fault where they are not dropped.
    """
    _check_choice(source, kind)
    found = Reading(source, data)
    for where, row in islice(files.read(source, found.findings), source.limit):
        found.dropped.num_rows += 1
        if isinstance(row, BadLine):
            found.fault(where, row)
        else:
            found.present |= row.keys()
            found.add(where, files.renamed(row, source.columns), kind)
    found.compare_labelled(kind)
    _refuse(found)
    return found


def problem(where: str, error: RowError, source: SourceSection) -> Problem:
    """A row's fault, with what to do about it."""
    if isinstance(error, EndOfReading):
        return Problem(error.code, where, str(error), "cut the line, or write the file anew")
    named = _named(error, source)
    return Problem(error.code, where, str(error), f"{named}; {FIX}{OR_DROP}" if named else f"{FIX}{OR_DROP}")


def _named(error: RowError, source: SourceSection) -> str:
    """What the config calls a field that is missing."""
    theirs = source.columns.get(error.field) if isinstance(error, MissingField) else None
    return f"columns.{error.field} names '{theirs}'" if isinstance(error, MissingField) and theirs else ""


def _extra_keys(value: Any) -> set[str]:
    """Keys of a conversation's turns besides what is read of them."""
    turns = value if isinstance(value, list) else (value,)
    return {key for turn in turns if isinstance(turn, Mapping) for key in turn if turn[key] is not None} - TURN_KEYS


def _check_choice(source: SourceSection, kind: str) -> None:
    """Columns and form are those of the kind of data."""
    known = list(dict.fromkeys(name for form in FORMS[kind] for name in form.fields))
    wrong = [
        Problem("DAT003", source.path, f"columns.{ours}: {kind} have no such field.", f"one of {names(known)}")
        for ours in source.columns
        if ours not in known and not ("attributes" in known and ours.startswith(tables.ATTRIBUTE))
    ]
    forms_known = [form.name for form in FORMS[kind]]
    if source.form and source.form not in forms_known:
        fix = f"one of {', '.join(forms_known)}"
        wrong.append(Problem("DAT003", source.path, f"form {source.form}: {kind} have no such form.", fix))
    if wrong:
        raise RlhfError(*wrong)


def _refuse(found: Reading) -> None:
    """Raise what is wrong with the whole source, and the faults of its rows where they are not dropped."""
    source, num_rows = found.source, found.dropped.num_rows
    present = names(sorted(found.present))
    for ours, theirs in source.columns.items():
        if num_rows and theirs not in found.present:
            what = f"no field '{theirs}' (columns.{ours}) in any row; found {present or 'none'}."
            raise RlhfError(Problem("DAT003", source.path, what, "name a field that is there"))
    if not num_rows:
        what = "; ".join(("no rows", *found.findings.notes)) + "."
        raise RlhfError(Problem("DAT013", source.path, what, "rows, one a line, or another path"))
    if not found.records and found.faults:
        _refuse_all(found, present)
    refused = [
        problem(where, error, source)
        for where, error in found.faults
        if not found.dropped.drops_bad_rows or isinstance(error, EndOfReading)
    ]
    if refused:
        raise RlhfError(*refused)
    if not found.records:
        what = f"no row is left: {found.dropped.sentence()}."
        raise RlhfError(Problem("DAT013", source.path, what, "rows that can be compared, or responses that ended"))


def _refuse_all(found: Reading, present: str) -> None:
    """Raise what all rows have in common, where none can be used: as a rule they have another form."""
    faults, num_rows, path = found.faults, found.dropped.num_rows, found.source.path
    if any(isinstance(error, EndOfReading) for _, error in faults):
        return
    first = faults[0][1]
    if len({str(error) for _, error in faults}) == 1 and len(faults) == num_rows > 1:
        fix = _named(first, found.source) or OF_ALL[first.code]
        raise RlhfError(Problem(first.code, path, f"all {num_rows} rows: {first}", fix))
    read = [error for _, error in faults if not isinstance(error, BadLine)]
    missing = Counter(error.field for error in read if isinstance(error, MissingField))
    for name, count in missing.items():
        if count == len(read) > 1:
            what = f"all {count} rows: no field '{name}'; found {present}."
            others = [problem(*fault, found.source) for fault in faults if isinstance(fault[1], BadLine)]
            raise RlhfError(Problem("DAT003", path, what, OTHER_NAMES), *others)
    if found.dropped.drops_bad_rows:
        where, error = faults[0]
        more = f" No row can be used: {found.dropped.sentence()}." if num_rows > 1 else ""
        raise RlhfError(Problem(error.code, where, f"{error}{more}", OF_ALL[error.code]))
