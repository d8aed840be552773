"""Data sets by name: JSONL, whatever the datasets library loads, or the embedded world; every row a record."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf.config.sections import DataSection, MixtureSource
from rlhf.data import files, mixture, reading
from rlhf.data.consensus import Annotated
from rlhf.data.dropped import DroppedRows
from rlhf.data.mixture import Drawn
from rlhf.data.rows import BadLine
from rlhf.errors import Problem, RlhfError
from rlhf.findings import Findings
from rlhf.runs import storage

COLLECTED = "preferences.jsonl"


@dataclass(frozen=True)
class Loaded:
    """A data set as records.

    Args:
        digest: SHA-256 of the file, or of the records where there is no single file.
        dropped: rows that were read and are no record; a stage adds those that it cannot tokenise or that are too long.
        drawn: what each source of a mixture gave; empty where there is one source.
        left_out: sound records that a mixture did not draw.
        annotated: what several annotators said, where the config asks for it.
    """

    records: tuple[Any, ...]
    digest: str
    source: str
    dropped: DroppedRows
    warnings: tuple[str, ...] = ()
    drawn: tuple[Drawn, ...] = ()
    annotated: Annotated | None = None
    left_out: tuple[Any, ...] = ()

    @property
    def num_rows(self) -> int:
        """Rows read."""
        return self.dropped.num_rows

    @property
    def num_dropped(self) -> dict[str, int]:
        """Reason -> rows."""
        return self.dropped.counts

    def notes(self) -> list[str]:
        """What a person should know of the rows that were read: the dropped ones by reason, and the warnings."""
        return [self.dropped.sentence()] * bool(self.dropped.total) + list(self.warnings)


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
    """(where, row) of each row as it stands in the data, for a look at its form before it is read as a record.

    Raises:
        RlhfError: DAT011 in the end, for lines that hold no row, whatever ``on_bad_row`` says.
    """
    findings = Findings()
    for where, row in files.read(data, findings):
        if isinstance(row, BadLine):
            findings.add(reading.problem(where, row, data))
        else:
            yield where, row
    findings.refuse()


def _load(data: DataSection, kind: str, seed: int) -> Loaded:
    """All sources, whose problems are raised together, as one data set. A collect run's directory stands for the
    preferences in it."""
    parts: list[Loaded] = []
    findings = Findings()
    for source in data.sources:
        collected = Path(source.path) / COLLECTED
        if storage.is_file(collected):
            source = source.model_copy(update={"path": str(collected)})
        with findings.gathering():
            parts.append(_loaded(source, data, kind))
    findings.refuse()
    loaded = _mixed(parts, data.sources, data.mixture_rows, seed) if data.mixture else parts[0]
    if problems := loaded.dropped.problems():
        raise RlhfError(*problems)
    return loaded


def _loaded(source: MixtureSource, data: DataSection, kind: str) -> Loaded:
    before = files.stamp(source.path)
    found = reading.read(source, data, kind)
    digest = files.digest(source, found.records)
    if files.stamp(source.path) != before:
        raise RlhfError(Problem("DAT014", source.path, "changed while it was read.", "run again when it is written"))
    return Loaded(tuple(found.records), digest, source.path, found.dropped, tuple(found.all_notes()))


def _mixed(parts: Sequence[Loaded], sources: Sequence[MixtureSource], total: int | None, seed: int) -> Loaded:
    records, drawn = mixture.draw([part.records for part in parts], sources, total, seed)
    source, first = " + ".join(part.source for part in parts), parts[0].dropped
    dropped = DroppedRows(source, first.max_fraction, first.drops_bad_rows)
    for part in parts:
        dropped.take_in(part.dropped)
    notes = [f"{part.source}: {note}" for part in parts for note in part.warnings]
    notes += [one.sentence() for one in drawn]
    notes += mixture.shared_prompts([(part.source, part.records) for part in parts])
    counts = [[part.digest, one.num_drawn] for part, one in zip(parts, drawn, strict=True)]
    digest = storage.sha256_json({"sources": counts, "seed": seed if sources[0].weight else None})
    taken = {id(record) for record in records}
    left_out = tuple(record for part in parts for record in part.records if id(record) not in taken)
    return Loaded(tuple(records), digest, source, dropped, tuple(notes), tuple(drawn), left_out=left_out)
