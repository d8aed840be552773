"""What a reward model's objective needs of its comparisons, checked before anything is loaded."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from rlhf.config.sections import DataSection
from rlhf.config.train_rm import Combination, Objective
from rlhf.data import attributes, consensus, sources
from rlhf.data.sources import Loaded
from rlhf.errors import Problem, RlhfError
from rlhf.hub import installed
from rlhf.records import Comparison, Judgement

MAX_NAMED = 5


@dataclass(frozen=True)
class ForReward:
    """Reads comparisons for a reward model.

    Args:
        heads: name -> weight; empty for one score.
        consensus: what makes one label of several annotators' rows; None: every row as it stands.
        held_out: annotators whose rows are not trained on.

    Raises:
        RlhfError: DAT053 to DAT062 where they do not have what it asks for, RES024 where a library for annotators is
            missing.
    """

    objective: Objective
    combination: Combination
    heads: Mapping[str, float]
    consensus: Literal["majority", "dawid_skene"] | None = None
    held_out: Sequence[str] = ()

    def __call__(self, data: DataSection, seed: int = 0) -> Loaded:
        load = sources.load_outcomes if self.objective.loss == "outcome" else sources.load_comparisons
        loaded = load(data, seed)
        if self.objective.loss == "outcome" and all(record.ratings is None for record in loaded.records):
            what = "no row has a label of its own, which loss: outcome asks for."
            raise RlhfError(Problem("DAT055", loaded.source, what, "rows with prompt, completion and label"))
        if self.consensus or self.held_out:
            loaded = self._of_annotators(loaded)
        problems = margins(self.objective, loaded.records, loaded.source)
        problems += rankings(self.objective, loaded.records, loaded.source)
        problems += attributes.problems(self.heads, self.combination.combine, loaded.records, loaded.source)
        if problems:
            raise RlhfError(*problems)
        return replace(loaded, warnings=(*loaded.warnings, *attributes.notes(loaded.records)))

    def _of_annotators(self, loaded: Loaded) -> Loaded:
        if missing := installed.missing_for_annotators():
            raise RlhfError(*missing)
        rated = [record.where for record in loaded.records if record.attributes and record.judgements]
        if self.consensus and rated:
            what = f"{len(rated)} rows, the first {', '.join(rated[:MAX_NAMED])}, have votes and ratings of attributes."
            fix = "ratings in rows of their own: a consensus is of votes"
            raise RlhfError(Problem("DAT062", loaded.source, what, fix))
        found = consensus.put_together(loaded.records, self.consensus, self.held_out, loaded.source)
        notes = (*loaded.warnings, *found.notes())
        return replace(loaded, records=found.records, warnings=notes, annotated=found)


def noted(load: Callable[[DataSection, int], Loaded]) -> Callable[[DataSection, int], Loaded]:
    """``load``, with a note on the attributes that there are labels of."""

    def read(data: DataSection, seed: int = 0) -> Loaded:
        loaded = load(data, seed)
        return replace(loaded, warnings=(*loaded.warnings, *attributes.notes(loaded.records)))

    return read


def margins(objective: Objective, records: Sequence[Comparison], source: str) -> list[Problem]:
    """Where margins are asked for: none anywhere, or as weights one that is missing or below 0."""
    if not objective.use_margins and not objective.weight_by_margin:
        return []
    key = "weight_by_margin" if objective.weight_by_margin else "use_margins"
    given = [judgement.margin for record in records for judgement in record.judgements]
    if all(margin is None for margin in given):
        return [Problem("DAT053", source, f"no comparison has a margin, which {key} asks for.", f"{key}: false")]
    bad = [
        record.where
        for record in records
        if any(judgement.margin is None or judgement.margin < 0 for judgement in record.judgements)
    ]
    if not objective.weight_by_margin or not bad:
        return []
    what = f"{len(bad)} rows, the first {', '.join(bad[:MAX_NAMED])}, have no margin, or one below 0."
    return [Problem("DAT053", source, what, "weigh with margins that every row has")]


def rankings(objective: Objective, records: Sequence[Comparison], source: str) -> list[Problem]:
    """Rows that are no ranking, where Plackett-Luce asks for one."""
    if objective.loss != "plackett_luce":
        return []
    bad = [record.where for record in records if levels(record.judgements, len(record.responses)) is None]
    if not bad:
        return []
    what = f"{len(bad)} rows, the first {', '.join(bad[:MAX_NAMED])}, do not rank all their responses."
    return [Problem("DAT054", source, what, "loss: bradley_terry, which takes pairs and shares of votes as they are")]


def levels(judgements: Sequence[Judgement], num_responses: int) -> list[int] | None:
    """How many responses are preferred to each one, where the judgements are one ranking of them all, ties included."""
    ahead = [0] * num_responses
    for judgement in judgements:
        if judgement.probability not in (0.0, 0.5, 1.0):
            return None
        if judgement.probability != 0.5:
            ahead[judgement.second if judgement.probability == 1.0 else judgement.first] += 1
    judged = {frozenset((judgement.first, judgement.second)) for judgement in judgements}
    whole = len(judged) == len(judgements) == num_responses * (num_responses - 1) // 2
    alike = all(
        (ahead[judgement.first] == ahead[judgement.second]) == (judgement.probability == 0.5)
        and (ahead[judgement.first] < ahead[judgement.second]) == (judgement.probability == 1.0)
        for judgement in judgements
    )
    return ahead if whole and alike else None
