"""Requests that wait together are scored together: one thread, one batch at a time."""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from rlhf.errors import Problem, RlhfError
from rlhf.scoring.scorer import Sample, Scorer, Scores
from rlhf.serving.requests import Limits, Refused, is_finite

log = logging.getLogger("rlhf")


@dataclass(frozen=True)
class _Waiting:
    samples: Sequence[Sample]
    answer: asyncio.Future[Scores]


class Batcher:
    """Scores what many ask for. While one batch is scored the next one gathers; nobody waits for a batch to fill.

    Args:
        scorer: is called in one thread, never twice at a time.
    """

    def __init__(self, scorer: Scorer, limits: Limits) -> None:
        self.scorer, self.limits = scorer, limits
        self.num_requests = self.num_batches = self.num_open = 0
        self._queue: deque[_Waiting] = deque()
        self._arrived = asyncio.Event()
        self._thread = ThreadPoolExecutor(1, "scoring")

    async def score(self, samples: Sequence[Sample]) -> Scores:
        """Scores of ``samples``, which are at most ``max_batch``.

        Raises:
            Refused: 429 where too many wait already.
            RlhfError: what the scorer says of these samples.
        """
        if self.num_open >= self.limits.max_waiting:
            raise Refused(429, f"{self.num_open} requests are waiting already; come again.")
        answer: asyncio.Future[Scores] = asyncio.get_running_loop().create_future()
        self.num_open += 1
        try:
            self._queue.append(_Waiting(samples, answer))
            self._arrived.set()
            return await answer
        finally:
            self.num_open -= 1

    async def run(self) -> None:
        """Score batch after batch, until cancelled."""
        loop = asyncio.get_running_loop()
        while True:
            await self._arrived.wait()
            batch = self._next()
            if not batch:
                self._arrived.clear()
                continue
            parts = [waiting.samples for waiting in batch]
            try:
                found: Sequence[Scores | Exception] = await loop.run_in_executor(self._thread, self._score, parts)
            except Exception as error:
                log.error("A batch failed.", exc_info=error)
                found = [error] * len(batch)
            self.num_batches += 1
            self.num_requests += len(batch)
            for waiting, own in zip(batch, found, strict=True):
                if waiting.answer.done():  # its request was given up
                    continue
                if isinstance(own, Exception):
                    waiting.answer.set_exception(own)
                else:
                    waiting.answer.set_result(own)

    def close(self) -> None:
        self._thread.shutdown(wait=True)

    def _next(self) -> list[_Waiting]:
        """As many waiting requests, in their order, as a batch has room for."""
        batch: list[_Waiting] = []
        num_free = self.limits.max_batch
        while self._queue and (not batch or len(self._queue[0].samples) <= num_free):
            waiting = self._queue.popleft()
            if not waiting.answer.done():
                batch.append(waiting)
                num_free -= len(waiting.samples)
        return batch

    def _score(self, parts: Sequence[Sequence[Sample]]) -> list[Scores | Exception]:
        """Scores of each part, or what is wrong with it: one request's mistake is no other's."""
        try:
            whole = self.scorer.score([sample for part in parts for sample in part])
            if not is_finite(whole):
                raise RlhfError(Problem("GRD011", "reward", "gave a score that is not finite."))
        except RlhfError as error:
            return [error] if len(parts) == 1 else [self._score([part])[0] for part in parts]
        found: list[Scores | Exception] = []
        start = 0
        for part in parts:
            rows = slice(start, start + len(part))
            members = None if whole.members is None else whole.members[rows]
            found.append(Scores(whole.mean[rows], members, {name: own[rows] for name, own in whole.heads.items()}))
            start += len(part)
        return found
