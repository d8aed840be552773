"""Examination of a reward model: a run of its own, with eval.json, plots and a table."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from rlhf.config import rubric
from rlhf.config.stages import EvalRmConfig
from rlhf.config.suite_file import CaseSection
from rlhf.config.suite_file import read as read_suite
from rlhf.data import fitting, tokenised
from rlhf.data.batches import PassSize
from rlhf.data.benchmarks import BenchmarkRow
from rlhf.data.fitting import Limit
from rlhf.data.sources import Loaded
from rlhf.data.tokenised import Group
from rlhf.errors import Problem, RlhfError
from rlhf.evaluation import benchmarking, exam_tables, figures, head_figures, lengths, ranking_figures, suite
from rlhf.evaluation import member_figures as together
from rlhf.evaluation import reward as examine
from rlhf.evaluation import verdicts as judging
from rlhf.evaluation.probing import probe
from rlhf.evaluation.reward import Pairs, Responses
from rlhf.models import open_base, sequence_classifier
from rlhf.models.heads import ScalarHead
from rlhf.models.roles import SharedBase
from rlhf.preflight.prepare import Plan
from rlhf.report import plots
from rlhf.runs import artifacts, runtime, storage
from rlhf.runs.artifacts import Manifest
from rlhf.runs.progress import as_text, show, waiting
from rlhf.runs.run_directory import Run
from rlhf.scoring import open_scorer
from rlhf.scoring.open_scorer import open_classifier, open_run
from rlhf.scoring.rerendered import Rerendered
from rlhf.scoring.scorer import Scorer, Scores
from rlhf.stages.registry import STAGES

log = logging.getLogger("rlhf")


@dataclass(frozen=True)
class Subject:
    """What is examined.

    Args:
        chat: chat format (or reader) that texts are tokenised with.
        scales: raw scores a deviation of SFT samples, of each member; none where nothing says so.
    """

    scorer: Scorer
    chat: Any
    scales: tuple[float, ...] = ()

    @property
    def unit(self) -> float | None:
        """The mean over the members; None where nothing says so, and the responses here do."""
        return sum(self.scales) / len(self.scales) if self.scales else None

    def standardised(self, scores: Scores) -> Tensor:
        """[B] the mean of the members' standardised scores in raw units, up to a constant: of a single model its raw
        scores, and of an ensemble what is optimised against, whose members weigh in it by their scales."""
        if scores.members is None or self.unit is None:
            return scores.mean
        return (scores.members / torch.tensor(self.scales)).mean(1) * self.unit


def run(config: EvalRmConfig, plan: Plan, run: Run) -> Manifest:
    """Score every response of the comparisons once, and what each probe makes of them; judge what the figures say."""
    started = time.perf_counter()
    device = runtime.set_up(config.runtime, config.seed)
    cases = read_suite(config.suite) if config.suite else []
    subject = _open(config, plan, device)
    groups, lengths = _tokenise(config, plan, subject.chat, "data")
    if config.benchmark:
        report = _benchmark(config, subject, groups)
        storage.write_json(run.path / artifacts.EXAMINATION, {**report, "tokens": vars(lengths)})
        show(exam_tables.benchmark_table(report))
        metrics = exam_tables.benchmark_metrics(report)
        return _finish(config, plan, run, started, metrics, {"rows": vars(lengths), "benchmark": config.benchmark})
    report = _report(config, plan, subject, groups)
    report["rows"] = vars(lengths)
    report |= _rubric(config, run)
    report |= {"suite": _suite(config, subject, cases)} if cases else {}
    verdicts = judging.judge(report, config.thresholds)
    report |= judging.table(verdicts)
    storage.write_json(run.path / artifacts.EXAMINATION, report)
    _draw(report, run.path / artifacts.PLOTS)
    tables = [exam_tables.figures_table(report), *([exam_tables.heads_table(report)] if "heads" in report else [])]
    storage.write_text(run.path / artifacts.FIGURES, as_text(*tables))
    show(exam_tables.verdict_lines(report["verdicts"]))
    log.info("Verdict: %s. All figures: %s", report["verdict"], run.path / artifacts.FIGURES)
    for one in verdicts:
        if one.verdict != judging.PASS:
            log.warning("%s: %s, %.3f. %s.", one.verdict, one.says, one.estimate, one.do[0].upper() + one.do[1:])
    suite.refuse_failed(report.get("suite", []), config.suite or "")
    details = {"rows": vars(lengths), "verdict": report["verdict"], "failed": judging.failed(verdicts)}
    return _finish(config, plan, run, started, exam_tables.metrics(report), details)


def _finish(
    config: EvalRmConfig, plan: Plan, run: Run, started: float, metrics: dict[str, float], details: dict[str, Any]
) -> Manifest:
    details["dropped"] = plan.dropped()
    return run.finish(
        Manifest(
            kind="examination",
            stage="eval-rm",
            seed=config.seed,
            identity=plan.identity,
            metrics=metrics,
            seconds=time.perf_counter() - started,
            base=plan.parents["reward"].base if config.reward else None,
            parents=plan.parents_table(STAGES["eval-rm"].needs(config)),
            details=details,
        )
    )


def _figure_settings(config: EvalRmConfig) -> figures.FigureSettings:
    return figures.FigureSettings(config.num_bins, config.num_resamples, config.seed, config.fit_fraction)


def _benchmark(config: EvalRmConfig, subject: Subject, groups: Sequence[Group]) -> dict[str, Any]:
    assert config.benchmark
    sizes = [len(group.responses) for group in groups]
    scores = examine.score(subject.scorer, groups).mean.double().split(sizes)
    scored = [(cast(BenchmarkRow, group.record), own.tolist()) for group, own in zip(groups, scores, strict=True)]
    return benchmarking.report(config.benchmark, scored, _figure_settings(config))


def _drift(
    config: EvalRmConfig, plan: Plan, subject: Subject, responses: Responses, pairs: Pairs, unit: float
) -> dict[str, Any]:
    """The figures on the second set, and how they differ from those on the first."""
    assert config.drift
    groups, lengths = _tokenise(config, plan, subject.chat, "drift")
    scores = examine.score(subject.scorer, groups)
    others, other_pairs = examine.responses_of(groups, scores), examine.pairs_of(groups, scores)
    if len(other_pairs.differences):
        found = figures.report(other_pairs, others, _figure_settings(config))
    elif other_pairs.num_ties:
        raise RlhfError(Problem("DAT053", "drift", "holds ties alone: nothing to examine.", "decided comparisons"))
    else:
        log.info("drift: %d samples that nobody has judged: no accuracy there.", len(others.scores))
        found = {"comparisons": 0, "prompts": len(set(others.groups)), "accuracy": None, "ece": None}
    changed = figures.drift(responses, others, (pairs, other_pairs), unit, _figure_settings(config))
    ranked = ranking_figures.report(groups, scores, _figure_settings(config))
    return {**found, **changed, "ranking": ranked, "responses": len(others.scores), "rows": vars(lengths)}


def _report(config: EvalRmConfig, plan: Plan, subject: Subject, groups: Sequence[Group]) -> dict[str, Any]:
    settings = _figure_settings(config)
    with waiting("Scoring the responses of the comparisons"):
        scores = examine.score(subject.scorer, groups)
    responses = examine.responses_of(groups, scores)
    pairs = examine.pairs_of(groups, scores)
    if not len(pairs.differences):
        what = f"holds no decided comparison {'in ' + config.head if config.head else 'overall'}: nothing to examine."
        raise RlhfError(Problem("DAT053", "data", what, "decided comparisons, or head: one whose attribute has some"))
    with waiting("Working out the figures and their intervals"):
        report = figures.report(pairs, responses, settings)
        report |= {
            "ranking": ranking_figures.report(groups, scores, settings),
            **_members(config, groups, scores, pairs),
        }
        report |= _heads(groups, scores, settings)
        unit = subject.unit or float(responses.scores.std()) or 1.0
        standard = Scores(subject.standardised(scores))
        report["length_calibration"] = lengths.report(
            examine.pairs_of(groups, standard), examine.responses_of(groups, standard), subject.unit or 1.0, settings
        )
    if config.drift:
        with waiting("Measuring the drift to the second data set"):
            report["drift"] = _drift(config, plan, subject, responses, pairs, unit)
    records = [group.record for group in groups]
    report["unit"] = {"raw_scores": unit, "of": "SFT samples" if subject.unit else "the examined responses"}
    with waiting("Scoring the responses as the probes change them"):
        report["probes"] = probe(
            subject.scorer, subject.chat, records, config.probes, config.max_length, unit, settings
        )
    return report


def _heads(groups: Sequence[Group], scores: Scores, settings: figures.FigureSettings) -> dict[str, Any]:
    """What each of several heads says of its attribute, and the rows of attributes that no head is of."""
    left_out = head_figures.without_a_head(groups, scores)
    for name, count in left_out.items():
        log.warning("%d rows have labels of %r, which no head is of: these labels are left out.", count, name)
    found = head_figures.report(groups, scores, settings)
    return ({"heads": found} if found else {}) | ({"without_a_head": left_out} if left_out else {})


def _rubric(config: EvalRmConfig, run: Run) -> dict[str, Any]:
    """The rubric that the reward run was trained by, which goes along with its examination."""
    path = artifacts.rubric_of(config.reward) if config.reward else None
    if path is None:
        return {}
    storage.write_text(run.path / artifacts.RUBRIC, path.read_text("utf-8"))
    return {"rubric": {"digest": storage.sha256(path), **rubric.read(path).model_dump()}}


def _members(config: EvalRmConfig, groups: Sequence[Group], scores: Scores, whole: Pairs) -> dict[str, Any]:
    """Of an ensemble, what its members say each alone, and what they err on in common."""
    if scores.members is None:
        return {}
    each = [examine.pairs_of(groups, Scores(column)) for column in scores.members.unbind(1)]
    names = [str(index) for index in range(len(each))] if config.reward else open_scorer.member_names(config.runs or ())
    alone = {
        name: figures.interval(examine.accuracy(own, config.seed, config.num_resamples))
        for name, own in zip(names, each, strict=True)
    }
    return {"members": {**together.report(whole, each), "accuracy_by_member": alone}}


def _suite(config: EvalRmConfig, subject: Subject, cases: Sequence[CaseSection]) -> list[dict[str, Any]]:
    scorer = subject.scorer if config.model else Rerendered(subject.scorer, subject.chat, "suite")
    return suite.examine(cases, scorer)


@waiting("Drawing the plots")
def _draw(report: dict[str, Any], directory: Path) -> None:
    directory.mkdir(exist_ok=True)
    plots.reliability(report["reliability"], directory / "reliability.png")
    plots.accuracy_by_length_gap(report["accuracy_by_length_gap"], directory / "length_gap.png")
    changes = {name: row["change"] for name, row in report["probes"].items() if row["change"]}
    if changes:
        plots.intervals(changes, "change of the score, in deviations", directory / "probes.png")


def _open(config: EvalRmConfig, plan: Plan, device: torch.device) -> Subject:
    if config.model:
        other = open_classifier(config.model, device, config.micro_batch_size)
        return Subject(other, other.classifier.reader)
    base = open_base.reopen_base(_first(plan), device)
    runtime.set_threads(config.runtime, base.model, device)
    roles = SharedBase(base)
    if config.runs:
        manifests = [plan.parents[f"runs.{index}"] for index in range(len(config.runs))]
        joined = open_scorer.open_runs(config.runs, manifests, roles, PassSize(config.micro_batch_size))
        scales = tuple(float(ScalarHead.load(head).scale[0]) for head in open_scorer.heads(config.runs))
        return Subject(joined, base.chat, scales)
    assert config.reward
    scorer = open_run(config.reward, roles, PassSize(config.micro_batch_size), raw=True, head=config.head)
    own = [slot.head for slot in roles.slots.values() if slot.head]
    scales = tuple(float(head.scale[head.names.index(config.head or head.names[0])]) for head in own)
    return Subject(scorer, base.chat, scales)


def _first(plan: Plan) -> Manifest:
    """The run whose base says how texts are tokenised: the one that is examined, or the first of several."""
    return plan.parents.get("reward") or plan.parents["runs.0"]


def dry_run(config: EvalRmConfig, plan: Plan) -> list[str]:
    """Token counts, with the tokenizer but without weights."""
    if config.model:
        chat: Any = sequence_classifier.open_reader(config.model)
    else:
        chat = open_base.open_chat(open_base.model_of(_first(plan)))
    groups, lengths = _tokenise(config, plan, chat, "data")
    said = [f"{len(read_suite(config.suite))} edge cases."] if config.suite else []
    return [lengths.sentence("data"), f"{sum(len(group.judgements) for group in groups)} comparisons.", *said]


def _tokenise(config: EvalRmConfig, plan: Plan, chat: Any, key: str) -> tuple[list[Group], tokenised.LengthReport]:
    """The rows of a data set as ids. All rows that were read count as dropped or not, whatever head is examined."""
    loaded = fitting.usable(plan.data[key], chat)
    others = [*loaded.records, *loaded.left_out]
    groups, lengths = tokenised.groups(
        _records(config, loaded, key), chat, Limit(config.max_length), loaded.dropped, others
    )
    if problems := loaded.dropped.problems():
        raise RlhfError(*problems)
    if loaded.dropped.total:
        log.info("%s: %s.", key, loaded.dropped.sentence())
    return groups, lengths


def _records(config: EvalRmConfig, loaded: Loaded, key: str) -> Sequence[Any]:
    """Comparisons; of a head that is examined those in its attribute. Samples that nobody judged are of every head."""
    records = loaded.records
    if config.head is None or not any(record.judgements or record.attributes for record in records):
        return records
    kept = [record.only(config.head) for record in records if record.of(config.head)]
    if not kept:
        what = f"holds no comparison in {config.head!r}, the head to examine."
        raise RlhfError(Problem("DAT053", key, what, f"pairs or rankings with attribute: {config.head}"))
    return kept
