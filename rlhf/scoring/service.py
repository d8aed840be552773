"""Scores by a service of ``rlhf serve``, on this machine or another."""

from __future__ import annotations

import http.client
import ipaddress
import json
import logging
import math
import os
import time
from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import urlsplit

import torch
from torch import Tensor

from rlhf.errors import Problem, RlhfError
from rlhf.scoring.scorer import Sample, Scores

log = logging.getLogger("rlhf")
TOKEN = "RLHF_SERVICE_TOKEN"
MIN_TOKEN = 16
SECONDS = 330.0
PAUSES = (0.5, 1.0, 2.0, 4.0, 8.0, 16.0)
MAX_ANSWER = 64 << 20
PASSING = (408, 429, 500, 502, 503, 504)


class _NotNow(Exception):
    """What may be gone at the next attempt."""


class ServiceScorer:
    """Asks ``url`` for scores, with the token of the environment variable RLHF_SERVICE_TOKEN if it is set.

    What may pass (no connection, no answer in time, 408, 429, 5xx) is tried again after each of ``pauses`` seconds.
    An answer with another number of scores than asked for, or one that is not finite, is an error.

    Raises:
        RlhfError: RES030 where the service cannot be reached, or is none.
    """

    def __init__(self, url: str, seconds: float = SECONDS, pauses: Sequence[float] = PAUSES) -> None:
        parts = urlsplit(url)
        self.url, self.seconds, self.pauses = url, seconds, tuple(pauses)
        self._secure, self._host, self._port = parts.scheme == "https", parts.hostname or "", parts.port
        self._path = parts.path.rstrip("/")
        token = os.environ.get(TOKEN)
        self._headers = {"Authorization": f"Bearer {token}"} if token else {}
        if token and not self._secure and not _is_this_machine(self._host):
            log.warning("%s: the token and all texts go over the network in the clear.", url)
        health = self._ask("GET", "/health", None)
        self.max_rows = health.get("max_rows")
        if health.get("status") != "ok" or type(self.max_rows) is not int or self.max_rows < 1:
            raise self._failed(f"is no reward service: /health says {json.dumps(health)[:80]}.", "an rlhf serve")
        log.info("%s scores with %s.", url, ", ".join(map(str, health.get("rewards", ["an unnamed reward"]))))

    def score(self, samples: Sequence[Sample]) -> Scores:
        """[B] as the service gives them.

        Raises:
            RlhfError: RES030 where it cannot be reached any more, refuses, or answers with something else.
        """
        assert self.max_rows
        parts = [samples[start : start + self.max_rows] for start in range(0, len(samples), self.max_rows)]
        found = [self._score(part) for part in parts]
        members = [part.members for part in found if part.members is not None]
        names = found[0].heads.keys() if found else ()
        if len({(None if part.members is None else part.members.shape[1], *part.heads) for part in found}) > 1:
            raise self._failed("changed its members or heads between two answers.", "one service behind the address")
        return Scores(
            torch.cat([part.mean for part in found]) if found else torch.zeros(0),
            torch.cat(members) if members else None,
            {name: torch.cat([part.heads[name] for part in found]) for name in names},
        )

    def _score(self, samples: Sequence[Sample]) -> Scores:
        rows = [
            {
                "prompt": [{"role": message.role, "content": message.content} for message in sample.prompt],
                "response": sample.response,
                "finished": sample.finished,
            }
            for sample in samples
        ]
        answer = self._ask("POST", "/score", json.dumps({"rows": rows}).encode())
        heads = answer.get("heads") or {}
        if not isinstance(heads, Mapping):
            raise self._failed("gave heads that are no object.", "an rlhf serve")
        mean = self._numbers(answer.get("scores"), len(rows))
        found = answer.get("members")
        members = None
        if found is not None:
            if (
                not isinstance(found, list)
                or len(found) != len(rows)
                or not all(isinstance(row, list) for row in found)
            ):
                raise self._failed(f"gave no members for each of {len(rows)} responses.", "an rlhf serve")
            members = torch.stack([self._numbers(row, len(found[0])) for row in found])
        return Scores(mean, members, {str(name): self._numbers(values, len(rows)) for name, values in heads.items()})

    def _numbers(self, values: Any, count: int) -> Tensor:
        """[count] float32."""
        if not isinstance(values, list) or len(values) != count:
            given = len(values) if isinstance(values, list) else "no list of"
            raise self._failed(f"gave {given} scores for {count} responses.", "an rlhf serve of this version")
        for value in values:
            if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
                raise self._failed(f"gave the score {value!r}, which is no finite number.", "mend the reward there")
        return torch.tensor([float(value) for value in values])

    def _ask(self, method: str, path: str, body: bytes | None) -> dict[str, Any]:
        """The answer's JSON, after as many attempts as it takes."""
        for pause in (*self.pauses, None):
            try:
                return self._once(method, path, body)
            except _NotNow as error:
                if pause is None:
                    what = f"gave no answer in {len(self.pauses) + 1} attempts: {error}."
                    raise self._failed(what, "start it, then --resume goes on from the last checkpoint") from None
                log.warning("%s: %s; again in %g s.", self.url, error, pause)
                time.sleep(pause)
        raise AssertionError("the last attempt returns or raises")

    def _once(self, method: str, path: str, body: bytes | None) -> dict[str, Any]:
        kind = http.client.HTTPSConnection if self._secure else http.client.HTTPConnection
        connection = kind(self._host, self._port, timeout=self.seconds)
        try:
            headers = {**self._headers, "Content-Type": "application/json", "Connection": "close"}
            connection.request(method, self._path + path, body, headers)
            response = connection.getresponse()
            text = response.read(MAX_ANSWER + 1)
        except (OSError, http.client.HTTPException) as error:
            raise _NotNow(str(error) or type(error).__name__) from None
        finally:
            connection.close()
        if response.status in PASSING:
            raise _NotNow(f"status {response.status}, {_said(text)}")
        if response.status != 200:
            fix = f"{TOKEN} as the service has it" if response.status == 401 else "what the service says"
            raise self._failed(f"refused with status {response.status}: {_said(text)}.", fix)
        if len(text) > MAX_ANSWER:
            raise self._failed(f"gave an answer of more than {MAX_ANSWER >> 20} MiB.", "an rlhf serve")
        try:
            answer = json.loads(text)
        except (ValueError, RecursionError):
            answer = None
        if not isinstance(answer, dict):
            raise self._failed(f"gave what is no JSON object: {text[:40]!r}.", "an rlhf serve")
        return answer

    def _failed(self, what: str, fix: str) -> RlhfError:
        return RlhfError(Problem("RES030", self.url, what, fix))


def _said(text: bytes) -> str:
    """What an error answer says, for a message."""
    try:
        error = json.loads(text)["error"]
        return f"{error['code']} {error['what']}"[:300]
    except (ValueError, KeyError, TypeError, RecursionError):
        return repr(text[:80])


def _is_this_machine(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
