"""The files that ``init`` is given, as records: what each file holds, and what of it was left out and why."""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

from rlhf.config.sections import DataSection
from rlhf.data import files as rows_of
from rlhf.data import forms, sources
from rlhf.data.dropped import DroppedRows
from rlhf.data.rows import BadLine, RowError, names
from rlhf.errors import Problem, RlhfError
from rlhf.findings import Findings
from rlhf.records import Comparison
from rlhf.start.facts import Options, Rows

READERS = {
    "comparisons": sources.load_comparisons,
    "demonstrations": sources.load_demonstrations,
    "prompts": sources.load_prompts,
}
LOOKED_AT = 200
TYPED = {"unpaired": ("label", bool), "transcripts": ("text", list)}  # other kinds have these fields with other values
PAIR = ("prompt", "chosen", "rejected")
FORMS = "prompt with chosen and rejected, with responses and ranks or ratings, with completion, or alone; or messages"


@dataclass(frozen=True)
class File:
    """One file: its records that are in use, and the rows that are dropped, in which a record may count for several."""

    path: str
    kind: str
    records: tuple[Any, ...]
    dropped: DroppedRows
    notes: tuple[str, ...] = ()

    def share_dropped(self, num_more: int = 0) -> float:
        """Of its rows, if ``num_more`` were dropped too."""
        return (self.dropped.total + num_more) / self.dropped.num_rows

    def without(self, reasons: Mapping[str, str]) -> File:
        """The same without the records at some places: place -> why."""
        for record in self.records:
            if record.where in reasons:
                self.dropped.add(reasons[record.where], record.where, record.num_rows)
        return replace(self, records=tuple(record for record in self.records if record.where not in reasons))


def files(paths: Sequence[str], options: Options) -> list[File]:
    """Every file, by what most of its first rows are.

    Raises:
        RlhfError: DAT003 for a form that is not known and for a column that no file has, DAT032 for prompts alone,
            DAT056 for labels of attributes, and what keeps a file from being read; of all files together.
    """
    found: list[File] = []
    findings = Findings()
    present: dict[str, list[str]] = {}
    looked: list[dict[str, Any]] = []
    for path in paths:
        with findings.gathering():
            data = DataSection(path=path, limit=options.limit, max_dropped_fraction=1.0)
            if options.columns:
                present[path] = list(dict.fromkeys(name for row in _rows(data) for name in row))
                columns = {ours: theirs for ours, theirs in options.columns.items() if theirs in present[path]}
                data = data.model_copy(update={"columns": columns})
            looked = list(islice(_rows(data), LOOKED_AT))
            kind = kind_of(looked, path)
            found.append(_file(kind, data, _unread_labels(looked) if kind == "demonstrations" else []))
    for ours, theirs in options.columns.items():
        if len(present) == len(paths) and not any(theirs in columns for columns in present.values()):
            shown = "; ".join(f"{path} has {names(columns)}" for path, columns in present.items())
            what = f"no file has it: {shown}."
            findings.add(Problem("DAT003", f"--columns {ours}={theirs}", what, "another name"))
    if not findings.problems and all(file.kind == "prompts" for file in found):
        fix = f"add demonstrations or preferences, which rlhf collect makes; or {example(looked)}"
        findings.add(Problem("DAT032", "--data", "prompts alone: there is nothing to learn from.", fix))
    findings.refuse()
    return found


def rows(found: Sequence[File]) -> Rows:
    """All records, by what they are."""
    shown, compared, asked = (
        tuple(record for file in found if file.kind == kind for record in file.records)
        for kind in ("demonstrations", "comparisons", "prompts")
    )
    return Rows(shown, compared, asked)


def kind_of(looked: Sequence[Mapping[str, Any]], path: str) -> str:
    """What most rows are that have a known form.

    Raises:
        RlhfError: DAT003 where no row has one.
    """
    votes = Counter(kind for row in looked if (kind := _kind(row)))
    if votes or not looked:
        return votes.most_common(1)[0][0] if votes else "demonstrations"  # the reader says that there are no rows
    columns = names(dict.fromkeys(name for row in looked for name in row))
    what = f"no row has a known form; its columns are {columns or 'none'}."
    raise RlhfError(Problem("DAT003", path, what, f"{example(looked)}; the forms are: {FORMS}"))


def example(looked: Sequence[Mapping[str, Any]]) -> str:
    """A ``--columns`` that fits the columns of a file, the text columns first to last."""
    texts: dict[str, bool] = {}
    for name, value in ((name, value) for row in looked for name, value in row.items() if isinstance(value, str)):
        texts[name] = texts.get(name, False) or " " in value.strip()
    foreign = [name for name, has_words in texts.items() if name not in PAIR and (has_words or len(texts) == 1)]
    for wanted in (PAIR, ("prompt", "completion"), ("prompt",)):
        missing = [ours for ours in wanted if ours not in texts]
        if missing and len(missing) <= len(foreign):
            pairs = zip(missing, foreign, strict=False)
            flags = " ".join(f"--columns {shlex.quote(f'{ours}={theirs}')}" for ours, theirs in pairs)
            return f"say which columns they are, for instance {flags}"
    return "say which columns they are: --columns OURS=THEIRS"


def _rows(data: DataSection) -> Iterator[dict[str, Any]]:
    """The rows as they stand there, under our names."""
    for _, row in islice(rows_of.read(data, Findings()), data.limit):
        if not isinstance(row, BadLine):
            yield rows_of.renamed(row, data.columns)


def _kind(row: Mapping[str, Any]) -> str | None:
    """What a row is by its fields; what it holds decides only between demonstrations and prompts."""
    for form in forms.FORMS["comparisons"]:
        is_shown = form.sole and row.keys() & set(form.shown_by)
        field, needed = TYPED.get(form.name, ("", object))
        if not isinstance(row.get(field), needed):
            continue
        if is_shown or row.keys() >= set(form.needs):
            return "comparisons"
    kinds = [kind for kind in ("demonstrations", "prompts") if _has_form(row, kind)]
    return next((kind for kind in kinds if _is_readable(row, kind)), kinds[0] if kinds else None)


def _has_form(row: Mapping[str, Any], kind: str) -> bool:
    return any(row.keys() >= set(form.needs) for form in forms.FORMS[kind] if not form.told)


def _is_readable(row: Mapping[str, Any], kind: str) -> bool:
    try:
        forms.read(row, "", kind)
    except RowError:
        return False
    return True


def _file(kind: str, data: DataSection, notes: Sequence[str]) -> File:
    loaded = READERS[kind](data)
    if named := [record.where for record in loaded.records if isinstance(record, Comparison) and record.names]:
        what = f"{len(named)} rows, the first {named[0]}, have labels of attributes, and init sets up no heads."
        fix = "init with overall labels, then heads: in train-rm.yaml"
        raise RlhfError(Problem("DAT056", loaded.source, what, fix))
    return File(loaded.source, kind, loaded.records, loaded.dropped, (*loaded.warnings, *notes))


def _unread_labels(looked: Sequence[Mapping[str, Any]]) -> list[str]:
    """Demonstrations that some column calls right or wrong may be answers that nobody should learn."""
    columns = dict.fromkeys(name for row in looked for name, value in row.items() if isinstance(value, bool))
    answer = next((name for name in ("response", "output") if looked and name in looked[0]), "completion")
    flags = "" if answer == "completion" else f" --columns completion={answer}"
    return [f"{name} is true or false, and was not read: --columns label={name}{flags} reads it" for name in columns]
