"""Scores by models that share nothing with the policy: another base, another tokenizer, an encoder."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch
from torch import Tensor

from rlhf.data.batches import micro_batches
from rlhf.errors import Problem, RlhfError
from rlhf.models.sequence_classifier import Classifier, Reading
from rlhf.runs.progress import track
from rlhf.scoring.scorer import Sample, Scores

log = logging.getLogger("rlhf")


class ClassifierScorer:
    """One logit of a sequence classifier, of prompt and response as its own tokenizer writes them.

    A score is what transformers gives for the conversation alone: batches are padded behind it, and where the model's
    config names no pad token, so that transformers could not tell padding from text, rows are read one at a time. A
    response that was cut off ends where it was cut.

    Args:
        too_long: "error" for MOD022 at a conversation beyond the model's context, "cut_prompt" to leave out the
            beginning of its prompt; how many were cut is logged.
    """

    def __init__(self, classifier: Classifier, micro_batch_size: int, too_long: str, where: str) -> None:
        self.classifier, self.too_long, self.where = classifier, too_long, where
        self.pad_id: int | None = classifier.model.config.get_text_config().pad_token_id
        self.micro_batch_size = micro_batch_size if self.pad_id is not None else 1

    @torch.no_grad()
    def score(self, samples: Sequence[Sample]) -> Scores:
        """[B] logits, as they are (plus the constant that an exported reward model has beside its logit).

        Raises:
            RlhfError: MOD022 for a conversation that does not fit.
        """
        reader, before = self.classifier.reader, self.classifier.reader.num_cleaned
        readings = [reader.read(sample.prompt, sample.response, sample.finished) for sample in samples]
        if reader.num_cleaned > before:
            log.warning(
                "%s: special tokens of its own in %d texts were left out.", self.where, reader.num_cleaned - before
            )
        rows_ids = self._fitting(readings)
        scores = torch.zeros(len(samples))
        parts = micro_batches([len(reading.ids) for reading in rows_ids], self.micro_batch_size)
        for rows in track(parts, "Scoring", len(parts)):
            scores[rows] = self._logits([rows_ids[row] for row in rows])
        return Scores(scores + self.classifier.constant)

    def tokens_read(self, sample: Sample) -> int:
        """Tokens of a response in the classifier's own tokenizer, and one for its end: as an examination counts."""
        return len(self.classifier.reader.response_ids(sample.prompt, sample.response)) + 1

    def _logits(self, readings: Sequence[Reading]) -> Tensor:
        device, width = self.classifier.device, max(len(reading.ids) for reading in readings)

        def padded(rows: Sequence[Sequence[int]], fill: int) -> Tensor:
            return torch.tensor([[*row, *[fill] * (width - len(row))] for row in rows], device=device)

        inputs = {
            "input_ids": padded([reading.ids for reading in readings], self.pad_id or 0),
            "attention_mask": padded([[1] * len(reading.ids) for reading in readings], 0),
        }
        if readings[0].types is not None:
            inputs["token_type_ids"] = padded([reading.types or [] for reading in readings], 0)
        return self.classifier.model(**inputs).logits[:, self.classifier.column].float().cpu()  # type: ignore[no-any-return]

    def _fitting(self, readings: Sequence[Reading]) -> list[Reading]:
        limit = self.classifier.reader.context_length
        if limit is None:
            return list(readings)
        fitting, num_cut = [], 0
        for reading in readings:
            excess = len(reading.ids) - limit
            if excess <= 0:
                fitting.append(reading)
                continue
            start, end = reading.prompt_tokens
            if self.too_long == "error" or excess >= end - start:
                what = f"a conversation of {len(reading.ids)} tokens exceeds what it reads, {limit}."
                fix = "shorter prompts or responses"
                fix += ", or too_long: cut_prompt" if self.too_long == "error" else ""
                raise RlhfError(Problem("MOD022", self.where, what, fix))
            num_cut += 1
            types = reading.types and [*reading.types[:start], *reading.types[start + excess :]]
            fitting.append(
                Reading([*reading.ids[:start], *reading.ids[start + excess :]], types, (start, end - excess))
            )
        if num_cut:
            log.warning(
                "%s: the beginning of %d prompts of %d was left out: longer than %d tokens.",
                self.where,
                num_cut,
                len(readings),
                limit,
            )
        return fitting
