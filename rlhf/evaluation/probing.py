"""Scoring the probes: what each intervention does to the scores of a reward model, in deviations of its score."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy

from rlhf.config.examination import ProbesSection
from rlhf.evaluation.figures import FigureSettings, interval
from rlhf.evaluation.probes import Change, Exchange, Material, materials, probes_of
from rlhf.metrics import intervals
from rlhf.records import Comparison, prompt_key
from rlhf.scoring.scorer import Sample, Scorer


def probe(
    scorer: Scorer,
    chat: Any,
    comparisons: Sequence[Comparison],
    texts: ProbesSection,
    max_length: int,
    unit: float,
    settings: FigureSettings,
) -> dict[str, Any]:
    """Every probe's mean change, share of rises (ties 1/2) and counts, as JSON values; empty without prompts.

    Args:
        chat: chat format or reader, which says what is longer than ``max_length``; such exchanges are left out, and
            counted.
        unit: raw scores a deviation.
    """
    rows, tried = materials(comparisons, texts, settings.seed), probes_of(texts)
    changes = {one.name: [one.intervene(material) for material in rows] for one in tried}
    scores = _scores(scorer, chat, changes, max_length)
    return {
        one.name: {"does": one.does, **_figures(rows, changes[one.name], scores, unit, settings)}
        for one in tried
        if rows
    }


def _scores(scorer: Scorer, chat: Any, changes: dict[str, list[Change]], max_length: int) -> dict[Exchange, float]:
    """Of each exchange once; those that are too long have none."""
    exchanges = list(
        dict.fromkeys(one for found in changes.values() for change in found for side in change for one in side)
    )
    samples = {exchange: sample_of(exchange, chat) for exchange in exchanges}
    kept = {
        exchange: sample
        for exchange, sample in samples.items()
        if len(sample.prompt_ids) + len(sample.response_ids) <= max_length
    }
    if not kept:
        return {}
    values = scorer.score(list(kept.values())).mean.double().tolist()
    return dict(zip(kept, values, strict=True))


def sample_of(exchange: Exchange, chat: Any) -> Sample:
    """A finished response, as tokens."""
    ids = [*chat.response_ids(exchange.prompt, exchange.response), chat.end_id]
    return Sample(exchange.prompt, exchange.response, chat.prompt_ids(exchange.prompt), ids, True, ids)


def _figures(
    rows: Sequence[Material],
    changes: Sequence[Change],
    scores: dict[Exchange, float],
    unit: float,
    settings: FigureSettings,
) -> dict[str, Any]:
    values, keys = [], []
    for material, (after, before) in zip(rows, changes, strict=True):
        if all(exchange in scores for exchange in (*after, *before)):
            values.append((sum(scores[one] for one in after) - sum(scores[one] for one in before)) / unit)
            keys.append(prompt_key(material.prompt))
    counts = {"prompts": len(values), "too_long": len(rows) - len(values)}
    if not values:
        return {**counts, "change": None, "rises": None}
    rises = 0.5 + 0.5 * numpy.sign(values)
    mean, share = (
        intervals.grouped_bootstrap(found, keys, num_resamples=settings.num_resamples, seed=settings.seed)
        for found in (numpy.array(values), rises)
    )
    assert not math.isnan(mean.estimate)
    return {**counts, "change": interval(mean), "rises": interval(share)}
