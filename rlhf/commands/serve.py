"""``rlhf serve``: a reward as an HTTP service for whoever scores, PPO included."""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import os
import socket
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from rlhf import __version__
from rlhf.commands.generate import is_run
from rlhf.commands.scorers import FUNCTION, check_names, open_scorer
from rlhf.config.sections import RuntimeSection
from rlhf.errors import Problem, RlhfError
from rlhf.runs import artifacts, runtime
from rlhf.scoring.service import MIN_TOKEN, TOKEN
from rlhf.serving.app import make_app
from rlhf.serving.batcher import Batcher
from rlhf.serving.requests import Limits

log = logging.getLogger("rlhf")
LATE = b'{"error":{"code":"REQ408","what":"the request did not come in time"}}'


def serve(rewards: Sequence[str], host: str, port: int, limits: Limits) -> None:
    """Answer until a signal comes; then finish what was asked, and return. A second signal does not wait.

    Raises:
        RlhfError: SEC011 for an address beyond this machine without a token, SEC012 for a short token, RES023 for an
            address that cannot be had.
    """
    token = _token(host)
    check_names(rewards)
    taken = _bind(host, port)
    scorer = open_scorer(rewards, runtime.set_up(RuntimeSection(), 0), limits.max_batch)
    server = make_server(Batcher(scorer, limits), _about(rewards), token)
    log.info("Scoring with %s at http://%s:%d.", ", ".join(rewards), host, taken.getsockname()[1])
    server.run([taken])
    log.info(
        "Stopped; %d requests were answered in %d batches.", server.batcher.num_requests, server.batcher.num_batches
    )


class Server(uvicorn.Server):
    """Stops as asked by a signal, and returns instead of raising it once more."""

    def __init__(self, config: uvicorn.Config, batcher: Batcher) -> None:
        super().__init__(config)
        self.batcher = batcher
        self.should_exit: bool = False
        self.force_exit: bool = False

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self.force_exit, self.should_exit = self.should_exit, True


def make_server(batcher: Batcher, about: dict[str, Any], token: str | None) -> Server:
    """A server that is ready to run on a bound socket."""
    limits = batcher.limits

    class Protocol(_Prompt):
        seconds = limits.read_seconds

    config = uvicorn.Config(
        make_app(batcher, about, token),
        http=Protocol,
        ws="none",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_keep_alive=int(limits.read_seconds),
        timeout_graceful_shutdown=int(limits.score_seconds),
        backlog=2048,
    )
    return Server(config, batcher)


class _Prompt(H11Protocol):
    """Ends a connection whose request does not show its whole head in time: uvicorn itself would wait for ever."""

    seconds: float
    _deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._watch()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_watching()
        super().connection_lost(exc)

    def _watch(self) -> None:
        if self.cycle is not None and not self.cycle.response_complete:
            self._stop_watching()
        elif self._deadline is None:
            self._deadline = self.loop.call_later(self.seconds, self._too_late)

    def _stop_watching(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _too_late(self) -> None:
        if not self.transport.is_closing():
            head = "HTTP/1.1 408 Request Timeout\r\nContent-Type: application/json\r\nConnection: close\r\n"
            self.transport.write(f"{head}Content-Length: {len(LATE)}\r\n\r\n".encode() + LATE)
            self.transport.close()


def _token(host: str) -> str | None:
    token = os.environ.get(TOKEN)
    if token is None and not _is_loopback(host):
        what = f"{host} can be reached from other machines, and {TOKEN} is not set."
        raise RlhfError(Problem("SEC011", "--host", what, f"{TOKEN} in the environment, or --host 127.0.0.1"))
    if token is not None and len(token) < MIN_TOKEN:
        what = f"has fewer than {MIN_TOKEN} characters."
        raise RlhfError(Problem("SEC012", TOKEN, what, "a long random one, such as of openssl rand -hex 24"))
    return token


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _bind(host: str, port: int) -> socket.socket:
    """Before any model is opened: an address that is taken is said at once."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    taken = socket.socket(family, socket.SOCK_STREAM)
    try:
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        taken.bind((host, port))
    except OSError as error:
        taken.close()
        what = f"cannot be had: {error.strerror or error}."
        raise RlhfError(Problem("RES023", f"{host}:{port}", what, "another --port")) from None
    return taken


def _about(rewards: Sequence[str]) -> dict[str, Any]:
    digests = [artifacts.read(Path(name)).digest for name in rewards if not FUNCTION.fullmatch(name) and is_run(name)]
    return {"rewards": list(rewards), "digests": digests, "version": __version__}
