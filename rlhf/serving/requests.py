"""What a request may say, and what an answer says: JSON in, samples out, and back."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from rlhf.data import jsonl, rows, turns
from rlhf.data.rows import RowError
from rlhf.scoring.scorer import Sample, Scores


@dataclass(frozen=True)
class Limits:
    """Of one request, and of all together.

    Args:
        read_seconds: within which a request's head must have come, and its body.
        score_seconds: within which a request is answered, waiting included.
        max_waiting: requests that wait or are scored at a time; one more is told to come again.
        max_batch: responses that are scored at a time, of as many requests as there are.
    """

    max_body: int = 1 << 20
    max_rows: int = 64
    read_seconds: float = 10.0
    score_seconds: float = 300.0
    max_waiting: int = 1024
    max_batch: int = 64


PROMPT_FIELD = 'text, or a list of turns {"role": "user", "content": text} that ends with a user turn'
RESPONSE_FIELD = "text; empty for a policy that ended at once"
SCORE_BODY: dict[str, Any] = {
    "example": {"rows": [{"prompt": "hello", "response": "hi there", "finished": True}]},
    "fields": {
        "rows": "a list of objects, each with",
        "prompt": PROMPT_FIELD,
        "response": RESPONSE_FIELD,
        "finished": "true or false, whether the response ended by itself; true where it is left out",
    },
}
RANK_BODY: dict[str, Any] = {
    "example": {"prompt": "hello", "responses": ["hi there", "go away"]},
    "fields": {"prompt": PROMPT_FIELD, "responses": "a list of texts"},
}


class Refused(Exception):
    """A request that is answered with an error; ``body`` is what a right one looks like, where it was malformed."""

    def __init__(self, status: int, what: str, code: str = "") -> None:
        super().__init__(what)
        self.status, self.what, self.code = status, what, code or f"REQ{status}"
        self.body: Mapping[str, Any] = {}


@contextmanager
def _shown(body: Mapping[str, Any]) -> Iterator[None]:
    """Let a malformed body be answered with a right one."""
    try:
        yield
    except Refused as refused:
        refused.body = body if refused.status == 400 else {}
        raise


@_shown(SCORE_BODY)
def samples_of(body: bytes, limits: Limits) -> list[Sample]:
    """The rows of ``/score``: {"rows": [{"prompt": text or messages, "response": text, "finished": true}]}.

    Raises:
        Refused: 400 for what is no such thing, 413 for too many rows.
    """
    found = _parsed(body)
    _only(found, "rows")
    items = found.get("rows")
    if not isinstance(items, list) or not items:
        raise Refused(400, "'rows': need a list of rows, each with prompt and response.")
    _require_rows(len(items), limits)
    return [_sample(item, f"rows[{index}]") for index, item in enumerate(items)]


@_shown(RANK_BODY)
def candidates_of(body: bytes, limits: Limits) -> list[Sample]:
    """The responses of ``/rank``: {"prompt": text or messages, "responses": [text]}.

    Raises:
        Refused: 400 for what is no such thing, 413 for too many responses.
    """
    found = _parsed(body)
    _only(found, "prompt", "responses")
    responses = found.get("responses")
    if not isinstance(responses, list) or not responses:
        raise Refused(400, "'responses': need a list of texts.")
    _require_rows(len(responses), limits)
    return [
        _sample({"prompt": found.get("prompt"), "response": response}, f"responses[{index}]")
        for index, response in enumerate(responses)
    ]


def answer_of(scores: Scores) -> dict[str, Any]:
    """Scores as JSON values, with members and heads where there are some."""
    answer: dict[str, Any] = {"scores": scores.mean.tolist()}
    if scores.members is not None:
        answer["members"] = scores.members.tolist()
    if len(scores.heads) > 1:
        answer["heads"] = {name: values.tolist() for name, values in scores.heads.items()}
    return answer


def ranking_of(scores: Scores) -> dict[str, Any]:
    """The same with ``order``: places of the responses, best first, of equal ones the earlier."""
    values = scores.mean.tolist()
    return {"order": sorted(range(len(values)), key=lambda place: (-values[place], place)), **answer_of(scores)}


def is_finite(scores: Scores) -> bool:
    return all(math.isfinite(value) for value in scores.mean.tolist())


def _parsed(body: bytes) -> Mapping[str, Any]:
    try:
        return jsonl.parse(body)
    except ValueError as error:
        raise Refused(400, str(error)) from None


def _only(found: Mapping[str, Any], *known: str) -> None:
    if unknown := sorted(found.keys() - set(known)):
        raise Refused(400, f"unknown: {rows.names(unknown)}; known: {', '.join(known)}.")


def _require_rows(count: int, limits: Limits) -> None:
    if count > limits.max_rows:
        raise Refused(413, f"{count} rows; at most {limits.max_rows} a request.")


def _sample(item: Any, place: str) -> Sample:
    if not isinstance(item, dict):
        raise Refused(400, f"'{place}': need an object with prompt and response.")
    try:
        prompt = turns.prompt_of(item.get("prompt"))
        turns.check_turns(prompt, "prompt", ends_with="user")
        response = item.get("response")
        if response != "":  # a policy may end at once
            response = rows.text_of(response, "response")
    except RowError as error:
        raise Refused(400, f"{place}: {error}") from None
    finished = item.get("finished", True)
    if not isinstance(finished, bool):
        raise Refused(400, f"'{place}.finished': need true or false.")
    if unknown := sorted(item.keys() - {"prompt", "response", "finished"}):
        raise Refused(400, f"'{place}': unknown: {rows.names(unknown)}; known: prompt, response, finished.")
    return Sample(prompt, response, [], [], finished, [])
