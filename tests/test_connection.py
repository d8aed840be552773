"""A hub that does not answer: one message within ten seconds, and the cache where it has what is asked for."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
import tiny
from huggingface_hub import constants

from rlhf.errors import RlhfError
from rlhf.hub import connection
from rlhf.models.base import load_tokenizer

ROOT = Path(__file__).parents[1]


@contextmanager
def endpoint(kind):
    """An address where nobody listens, one that takes connections and never answers, or a gateway without a hub."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{taken.getsockname()[1]}"
        if kind != "refused":
            taken.listen(8)
        if kind == "gateway":
            threading.Thread(target=answer, args=(taken,), daemon=True).start()
        yield address


def answer(taken):
    while True:
        try:
            connected, _ = taken.accept()
        except OSError:
            return
        connected.recv(4096)
        connected.sendall(b"HTTP/1.1 503 Unavailable\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")


@pytest.fixture
def online(monkeypatch, tmp_path):
    """The libraries may go to the network, which is ``endpoint``; the cache is empty."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(connection, "SECONDS", 0.5)
    for memory in (connection.trouble, connection._say_cached):
        memory.cache_clear()
    yield
    for memory in (connection.trouble, connection._say_cached):
        memory.cache_clear()


@pytest.mark.parametrize(
    ("kind", "reason"),
    [("refused", "Connection refused"), ("silent", "no answer from"), ("gateway", "answers 503")],
)
def test_an_unreachable_hub_is_asked_once_and_answered_with_one_message(online, monkeypatch, kind, reason):
    started = time.perf_counter()
    with endpoint(kind) as address:
        monkeypatch.setattr(constants, "ENDPOINT", address)
        for name in ("org/one", "org/two"):
            with pytest.raises(RlhfError) as caught:
                load_tokenizer(name, revision="v1")
            (problem,) = caught.value.problems
            assert problem.code == "MOD001" and problem.where == name and reason in problem.what
            assert address in problem.what and f"hf download {name} --revision v1" in problem.fix
            assert "a local path" in problem.fix and "HTTPS_PROXY" in problem.fix
    assert time.perf_counter() - started < 5 and constants.HF_HUB_OFFLINE


def test_what_is_in_the_cache_is_read_and_that_is_said_once(online, monkeypatch, tmp_path, caplog):
    place = tmp_path / "cache/models--org--tiny"
    (place / "refs").mkdir(parents=True)
    (place / "refs/main").write_text("0" * 40)
    tiny.build(place / "snapshots" / ("0" * 40))
    with endpoint("refused") as address:
        monkeypatch.setattr(constants, "ENDPOINT", address)
        assert [load_tokenizer("org/tiny").pad_token for _ in range(2)] == ["<|pad|>"] * 2
        shutil.rmtree(place)
        with pytest.raises(RlhfError, match="its cache does not have this"):
            load_tokenizer("org/tiny")
    said = [record.message for record in caplog.records if "cache" in record.message]
    assert len(said) == 1 and said[0].endswith("org/tiny is read from the cache.")


COMMANDS = {
    "a stage, its model": ("sft", "-c", "sft.yaml", "model.path=org/m"),
    "a stage, its data": ("sft", "-c", "sft.yaml", "data.path=org/d"),
    "check": ("check", "sft.yaml", "--set", "data.path=org/d", "--set", "model.path=org/m", "--show", "1"),
    "plan": ("plan", "sft.yaml", "--set", "data.path=org/d"),
    "init, its model": ("init", "mine", "--data", "rows.jsonl", "--model", "org/m"),
    "init, its data": ("init", "mine", "--data", "org/d", "--model", "demo:base"),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["refused", "silent"])
@pytest.mark.parametrize("args", COMMANDS.values(), ids=COMMANDS)
def test_no_command_waits_for_a_hub_or_repeats_a_librarys_warnings(tmp_path, args, kind):
    (tmp_path / "sft.yaml").write_text("data: {path: 'demo:demonstrations?size=20'}\nsteps: 1\n")
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n')
    environment = {name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"}
    with endpoint(kind) as address:
        environment |= {"HF_ENDPOINT": address, "HF_HOME": str(tmp_path / "home"), "PYTHONPATH": str(ROOT)}
        started = time.perf_counter()
        done = subprocess.run(
            [sys.executable, "-m", "rlhf", *args], capture_output=True, text=True, cwd=tmp_path, env=environment
        )
        seconds = time.perf_counter() - started
    text = done.stdout + done.stderr
    assert seconds < 10 and "Retrying" not in text and "Traceback" not in text, (seconds, text)
    if args[0] in ("check", "plan"):
        assert done.returncode == 0 and not done.stderr, text
        assert ("as the hub cannot be reached" if args[0] == "check" else "data is not readable (DAT015)") in text
    else:
        (message,) = done.stderr.splitlines()
        name = "org/d --repo-type dataset" if "data" in message else "org/m"
        assert done.returncode in (3, 4) and "the hub cannot be reached" in message and f"hf download {name}" in message
