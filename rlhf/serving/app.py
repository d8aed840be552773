"""The HTTP service: who may ask, how much, and what comes back; every error is JSON."""

from __future__ import annotations

import asyncio
import hmac
import logging
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from rlhf.errors import RlhfError
from rlhf.scoring.scorer import Sample, Scores
from rlhf.serving.batcher import Batcher
from rlhf.serving.requests import Limits, Refused, answer_of, candidates_of, ranking_of, samples_of

log = logging.getLogger("rlhf")
Reader = Callable[[bytes, Limits], Sequence[Sample]]


def make_app(batcher: Batcher, about: Mapping[str, Any], token: str | None) -> FastAPI:
    """``POST /score``, ``POST /rank`` and ``GET /health``.

    Args:
        about: what ``/health`` says of the reward.
        token: that every request must carry as ``Authorization: Bearer``; None: nobody is asked for one.
    """
    limits = batcher.limits

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        working = asyncio.create_task(batcher.run())
        yield
        working.cancel()
        batcher.close()

    app = FastAPI(lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)

    async def score(request: Request) -> JSONResponse:
        return JSONResponse(answer_of(await _scored(request, samples_of)))

    async def rank(request: Request) -> JSONResponse:
        return JSONResponse(ranking_of(await _scored(request, candidates_of)))

    async def health(request: Request) -> JSONResponse:
        _require_token(request, token)
        counts = {"waiting": batcher.num_open, "requests": batcher.num_requests, "batches": batcher.num_batches}
        return JSONResponse({"status": "ok", **about, "max_rows": limits.max_rows, **counts})

    async def _scored(request: Request, read: Reader) -> Scores:
        _require_token(request, token)
        samples = read(await _body(request, limits), limits)
        try:
            async with asyncio.timeout(limits.score_seconds):
                return await batcher.score(samples)
        except TimeoutError:
            raise Refused(504, f"not scored within {limits.score_seconds:g} s.") from None

    app.add_api_route("/score", score, methods=["POST"], response_model=None)
    app.add_api_route("/rank", rank, methods=["POST"], response_model=None)
    app.add_api_route("/health", health, methods=["GET"], response_model=None)
    app.add_exception_handler(Refused, _refused)
    app.add_exception_handler(RlhfError, _mistake)
    app.add_exception_handler(HTTPException, _http)
    app.add_exception_handler(Exception, _bug)
    return app


def _require_token(request: Request, token: str | None) -> None:
    given = request.headers.get("authorization", "")
    if token is not None and not hmac.compare_digest(given.encode(), f"Bearer {token}".encode()):
        raise Refused(401, "needs the header Authorization: Bearer with the service's token.")


async def _body(request: Request, limits: Limits) -> bytes:
    """The whole body, if it is neither too large nor too slow."""
    too_large = Refused(413, f"a body of more than {limits.max_body} bytes.")
    if int(request.headers.get("content-length") or 0) > limits.max_body:
        raise too_large
    parts, size = [], 0
    try:
        async with asyncio.timeout(limits.read_seconds):
            async for part in request.stream():
                size += len(part)
                if size > limits.max_body:
                    raise too_large
                parts.append(part)
    except TimeoutError:
        raise Refused(408, f"the body did not come within {limits.read_seconds:g} s.") from None
    return b"".join(parts)


def _error(status: int, code: str, what: str, body: Mapping[str, Any] | None = None) -> JSONResponse:
    # What was not read of a body would be taken for the next request.
    headers = {"Connection": "close"} if status in (401, 408, 413) else {"Retry-After": "1"} if status == 429 else {}
    if status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return JSONResponse({"error": {"code": code, "what": what, **(body or {})}}, status, headers)


def _refused(_: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, Refused)
    return _error(error.status, error.code, error.what, error.body)


def _mistake(_: Request, error: Exception) -> JSONResponse:
    """What a text does that the reward cannot read is the asker's; what the reward does is not."""
    assert isinstance(error, RlhfError)
    problem = error.problems[0]
    status = 400 if problem.code[:3] in ("DAT", "MOD") else 500
    if status == 500:
        log.error("%s", error)
    return _error(status, problem.code, f"{problem.where}: {problem.what}")


def _http(_: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    return _error(error.status_code, f"REQ{error.status_code}", str(error.detail))


def _bug(_: Request, error: Exception) -> JSONResponse:
    return _error(500, "BUG001", "internal error; the service's log has more.")
