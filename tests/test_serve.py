"""A reward over HTTP: nothing is lost, nobody is kept waiting for ever, and the client believes nothing unseen."""

from __future__ import annotations

import asyncio
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from pydantic import ValidationError

from rlhf.config.rewards import ServiceReward
from rlhf.errors import Problem, RlhfError
from rlhf.hub import installed
from rlhf.records import Message
from rlhf.runs import artifacts
from rlhf.scoring.scorer import Sample, Scores
from rlhf.scoring.service import TOKEN, ServiceScorer
from rlhf.serving.requests import RANK_BODY, SCORE_BODY, Limits, Refused, candidates_of, samples_of

served = pytest.mark.skipif(bool(installed.missing_for_serving()), reason="the serve extra is not installed")
ROOT = Path(__file__).parents[1]
SECRET = "a long and random token"


def sample(prompt, response, finished=True):
    return Sample((Message("user", prompt),), response, [], [], finished, [])


class Letters:
    """Letters of prompt and response, halved where it was cut off; slow, and particular about what it reads."""

    def __init__(self, seconds=0.0):
        self.seconds, self.sizes, self.go = seconds, [], threading.Event()
        self.go.set()

    def score(self, samples):
        self.go.wait(20)
        time.sleep(self.seconds)
        self.sizes.append(len(samples))
        if any("too long" in one.response for one in samples):
            raise RlhfError(Problem("MOD022", "reward", "too long."))
        if any("a bug" in one.response for one in samples):
            raise ZeroDivisionError("SECRET DETAIL")
        values = [(len(one.prompt[0].content) + len(one.response)) / (1 if one.finished else 2) for one in samples]
        values = [float("nan") if "no number" in one.response else v for one, v in zip(samples, values, strict=True)]
        mean = torch.tensor(values) / 3
        return Scores(mean, torch.stack([mean - 1, mean + 1], 1), {"a": mean, "b": -mean})


@contextmanager
def service(scorer, token=None, **settings):
    """A running service: its port and its batcher."""
    from rlhf.commands.serve import _bind, make_server
    from rlhf.serving.batcher import Batcher

    taken = _bind("127.0.0.1", 0)
    server = make_server(Batcher(scorer, Limits(**settings)), {"rewards": ["letters"]}, token)
    thread = threading.Thread(target=server.run, args=([taken],))
    thread.start()
    while not server.started:
        time.sleep(0.01)
    try:
        yield taken.getsockname()[1], server
    finally:
        server.should_exit = True
        thread.join(20)
        assert not thread.is_alive()


def ask(port, path, body=None, headers=None, method=None):
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    text = body if isinstance(body, bytes | type(None)) else json.dumps(body).encode()
    connection.request(method or ("GET" if body is None else "POST"), path, text, headers or {})
    answer = connection.getresponse()
    found = answer.status, json.loads(answer.read())
    connection.close()
    return found


def rows(*responses):
    return {"rows": [{"prompt": "hi", "response": response} for response in responses]}


@served
def test_of_500_requests_at_the_same_time_none_is_lost_or_given_another_ones_score():
    async def one(port, index):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        body = json.dumps(rows("x" * index, "y" * (2 * index))).encode()
        writer.write(b"POST /score HTTP/1.1\r\nHost: a\r\nConnection: close\r\nContent-Length: %d\r\n\r\n" % len(body))
        await writer.drain()
        await connected.wait()
        writer.write(body)
        text = await reader.read()
        writer.close()
        return text

    async def all_of_them(port):
        asyncio.get_running_loop().call_later(0.5, connected.set)
        return await asyncio.gather(*(one(port, index) for index in range(1, 501)))

    connected = asyncio.Event()
    scorer = Letters(0.002)
    with service(scorer) as (port, server):
        found = asyncio.run(all_of_them(port))
    for index, text in enumerate(found, 1):
        head, _, body = text.partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 200")
        wanted = torch.tensor([2.0 + index, 2.0 + 2 * index]) / 3
        assert json.loads(body)["scores"] == wanted.tolist()
    assert sum(scorer.sizes) == 1000 and max(scorer.sizes) <= 64
    assert server.batcher.num_requests == 500 and server.batcher.num_batches < 100


@served
def test_score_rank_and_health_by_hand():
    with service(Letters()) as (port, _):
        status, found = ask(port, "/score", {"rows": [{"prompt": "abc", "response": "", "finished": False}]})
        assert status == 200 and found["scores"] == [0.5] and found["members"] == [[-0.5, 1.5]]
        assert found["heads"] == {"a": [0.5], "b": [-0.5]}
        turns = [{"role": "user", "content": "abc"}]
        found = ask(port, "/rank", {"prompt": turns, "responses": ["x", "xxx", "x", "xx"]})[1]
        assert found["order"] == [1, 3, 0, 2] and found["scores"][1] == 2.0
        found = ask(port, "/health")[1]
        assert (found["status"], found["rewards"], found["requests"], found["max_rows"]) == ("ok", ["letters"], 2, 64)


@served
def test_a_request_that_cannot_be_scored_spoils_no_other():
    scorer = Letters()
    scorer.go.clear()
    with service(scorer) as (port, server):
        texts, answers = ("fine", "too long", "good", "no number"), {}
        threads = [
            threading.Thread(target=lambda text=text: answers.update({text: ask(port, "/score", rows(text))}))
            for text in ("first", *texts)
        ]
        for thread in threads:
            waited = len(answers), server.batcher.num_open
            thread.start()
            while (len(answers), server.batcher.num_open) == waited:
                time.sleep(0.01)
        scorer.go.set()
        for thread in threads:
            thread.join(20)
    assert answers["fine"][1]["scores"] == answers["good"][1]["scores"] == [2.0]
    assert answers["too long"] == (400, {"error": {"code": "MOD022", "what": "reward: too long."}})
    assert answers["no number"][0] == 500 and answers["no number"][1]["error"]["code"] == "GRD011"


@served
def test_a_bug_is_500_without_a_trace_and_the_service_goes_on():
    with service(Letters()) as (port, _):
        status, found = ask(port, "/score", rows("a bug"))
        assert status == 500 and "SECRET" not in json.dumps(found) and found["error"]["code"] == "BUG001"
        assert ask(port, "/score", rows("fine"))[0] == 200


@served
def test_every_refusal_is_json_with_its_status():
    with service(Letters(), token=SECRET, max_body=300) as (port, _):
        allowed = {"Authorization": f"Bearer {SECRET}"}
        for headers in ({}, {"Authorization": "Bearer no"}, {"Authorization": SECRET}):
            for path in ("/score", "/rank", "/health"):
                status, found = ask(port, path, None if path == "/health" else rows("x"), headers)
                assert status == 401 and found["error"]["code"] == "REQ401"
        assert ask(port, "/score", rows("x"), allowed)[0] == 200
        assert ask(port, "/score", rows("x" * 400), allowed)[0] == 413
        assert ask(port, "/score", rows(*["x"] * 3), {**allowed, "Content-Length": "5"})[0] == 400
        chunked = (chunk for chunk in [b"x" * 200] * 3)
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
        connection.request("POST", "/score", chunked, allowed, encode_chunked=True)
        assert connection.getresponse().status == 413
        assert ask(port, "/nowhere", None, allowed)[0] == 404
        assert ask(port, "/score", None, allowed)[0] == 405
        assert ask(port, "/score", b"{", allowed)[0] == 400


def raw(port, text, wait):
    """What comes back within ``wait`` seconds for a request that stops short."""
    with socket.create_connection(("127.0.0.1", port), timeout=wait) as connection:
        connection.sendall(text)
        found = b""
        while part := connection.recv(4096):
            found += part
        return found


@served
@pytest.mark.parametrize(
    "begun",
    [b"", b"POST /score HTTP/1.1\r\nHost: a\r\n", b"POST /score HTTP/1.1\r\nHost: a\r\nContent-Length: 9\r\n\r\n{"],
)
def test_what_does_not_come_in_time_is_408(begun):
    with service(Letters(), read_seconds=0.3) as (port, _):
        found = raw(port, begun, 10)
        assert found.startswith(b"HTTP/1.1 408") and b'"REQ408"' in found
        head, _, body = found.partition(b"\r\n\r\n")
        assert f"content-length: {len(body)}".encode() in head.lower()


@served
def test_a_second_request_on_a_connection_is_watched_too():
    with service(Letters(), read_seconds=1.0) as (port, _), socket.create_connection(("127.0.0.1", port)) as connection:
        connection.settimeout(10)
        connection.sendall(b"GET /health HTTP/1.1\r\nHost: a\r\n\r\n")
        found = b""
        while not found.endswith(b"}"):
            found += connection.recv(4096)
        assert found.startswith(b"HTTP/1.1 200")
        connection.sendall(b"GET /health HT")
        assert connection.recv(4096).startswith(b"HTTP/1.1 408")


@served
def test_too_many_are_429_too_slow_is_504_and_a_stop_lets_what_was_asked_finish():
    scorer, answers = Letters(), []
    scorer.go.clear()
    with service(scorer, max_waiting=1) as (port, server):
        thread = threading.Thread(target=lambda: answers.append(ask(port, "/score", rows("x" * 4))))
        thread.start()
        while not server.batcher.num_open:
            time.sleep(0.01)
        assert ask(port, "/score", rows("y"))[0] == 429
        server.handle_exit(signal.SIGTERM, None)
        time.sleep(0.2)
        assert not answers and not server.force_exit
        scorer.go.set()
        thread.join(20)
    assert answers[0][0] == 200 and answers[0][1]["scores"] == [2.0]
    scorer.go.clear()
    with service(scorer, score_seconds=1.0) as (port, _):
        assert ask(port, "/score", rows("y"))[0] == 504
        scorer.go.set()


@pytest.mark.parametrize(
    ("body", "status", "says"),
    [
        (b"[]", 400, "need an object"),
        (b'{"rows": []}', 400, "list of rows"),
        (b'{"rows": [1]}', 400, r"rows\[0\]"),
        (b'{"rows": [{"prompt": "a"}]}', 400, "'response': need text, got null"),
        (b'{"rows": [{"prompt": "", "response": "a"}]}', 400, "'prompt': empty"),
        (b'{"rows": [{"prompt": [{"role": "assistant", "content": "a"}], "response": "a"}]}', 400, "alternate"),
        (b'{"rows": [{"prompt": "a", "response": "a", "finished": 1}]}', 400, "true or false"),
        (b'{"rows": [{"prompt": "a", "response": "a", "answer": 1}]}', 400, "unknown: answer"),
        (b'{"rows": [{"prompt": "a", "response": "a"}], "x": 1}', 400, "unknown: x"),
        (b'{"rows": [{"prompt": "a", "response": NaN}]}', 400, "NaN is not JSON"),
        (b"\xff", 400, "not UTF-8"),
        (b"[" * 100_000, 400, "nested too deeply"),
        (json.dumps(rows(*["x"] * 65)).encode(), 413, "at most 64"),
    ],
)
def test_what_is_no_request_is_named_and_answered_with_a_right_one(body, status, says):
    with pytest.raises(Refused, match=says) as refused:
        samples_of(body, Limits())
    assert refused.value.status == status
    assert refused.value.body == (SCORE_BODY if status == 400 else {})


def test_what_is_no_ranking_is_named():
    assert len(candidates_of(b'{"prompt": "a", "responses": ["b", "c"]}', Limits())) == 2
    for body, says in ((b'{"prompt": "a"}', "'responses'"), (b'{"responses": ["a"]}', "'prompt': need text, got null")):
        with pytest.raises(Refused, match=says) as refused:
            candidates_of(body, Limits())
        assert refused.value.body == RANK_BODY


@served
def test_the_example_in_an_answer_and_in_the_readme_is_a_body_that_is_taken():
    readme = (ROOT / "README.md").read_text()
    with service(Letters()) as (port, _):
        for path, names in (("/score", {"rows", "prompt", "response", "finished"}), ("/rank", {"prompt", "responses"})):
            status, found = ask(port, path, b"{")
            assert status == 400 and set(found["error"]["fields"]) == names and "invalid JSON" in found["error"]["what"]
            example = found["error"]["example"]
            assert ask(port, path, example)[0] == 200 and json.dumps(example) in readme
        turns = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]
        assert ask(port, "/score", {"rows": [{"prompt": turns, "response": "r"}]})[0] == 200


@served
def test_the_client_gets_what_the_scorer_gives_in_parts_with_members_and_heads(monkeypatch):
    samples = [sample("p" * n, "r" * (n % 5), finished=n % 3 > 0) for n in range(1, 24)]
    monkeypatch.setenv(TOKEN, SECRET)
    scorer = Letters()
    with service(scorer, token=SECRET, max_rows=10) as (port, _):
        found = ServiceScorer(f"http://127.0.0.1:{port}/").score(samples)
    wanted = Letters().score(samples)
    assert scorer.sizes == [10, 10, 3]
    assert torch.equal(found.mean, wanted.mean) and torch.equal(found.members, wanted.members)
    assert found.heads.keys() == {"a", "b"} and torch.equal(found.heads["b"], wanted.heads["b"])


class Stub(BaseHTTPRequestHandler):
    """Answers from ``script``: (status, text) one after the other, the last one for ever; None hangs up."""

    script: ClassVar[list] = []
    asked: ClassVar[list] = []

    def _answer(self):
        self.rfile.read(int(self.headers.get("content-length") or 0))
        self.asked.append(self.path)
        healthy = (200, '{"status": "ok", "max_rows": 64}')
        answer = healthy if self.path == "/health" else self.script.pop(0) if len(self.script) > 1 else self.script[0]
        if answer is None:
            self.connection.close()
            return
        self.send_response(answer[0])
        self.end_headers()
        self.wfile.write(answer[1].encode())

    do_GET = do_POST = _answer

    def log_message(self, *_):
        pass


@pytest.fixture
def stub():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Stub)
    server.handle_error = lambda *_: None
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    Stub.asked = []
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    thread.join()
    server.server_close()


GOOD = (200, '{"scores": [1.5, -2.0]}')
TWO = [sample("a", "b"), sample("c", "d")]


def test_what_may_pass_is_tried_again(stub):
    Stub.script = [None, (503, "{}"), (429, '{"error": {"code": "REQ429", "what": "later"}}'), GOOD]
    assert ServiceScorer(stub, pauses=[0.01] * 3).score(TWO).mean.tolist() == [1.5, -2.0]
    assert Stub.asked == ["/health", *["/score"] * 4]
    Stub.script = [(503, "{}")]
    with pytest.raises(RlhfError, match="RES030.*no answer in 3 attempts: status 503.*--resume") as gone:
        ServiceScorer(stub, pauses=[0.01] * 2).score(TWO)
    assert gone.value.exit_code == 6


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        ((200, '{"scores": [1.0]}'), "1 scores for 2 responses"),
        ((200, '{"scores": [1, NaN]}'), "the score nan"),
        ((200, '{"scores": [1, Infinity]}'), "the score inf"),
        ((200, '{"scores": [1, true]}'), "the score True"),
        ((200, '{"scores": [1, "2"]}'), "the score '2'"),
        ((200, '{"score": [1, 2]}'), "no list of scores"),
        ((200, '{"scores": [1, 2], "members": [[1], [1, 2]]}'), "2 scores for 1"),
        ((200, '{"scores": [1, 2], "members": [1, 2]}'), "no members"),
        ((200, '{"scores": [1, 2], "heads": {"a": [1]}}'), "1 scores for 2"),
        ((200, "<html>"), "no JSON object"),
        ((401, '{"error": {"code": "REQ401", "what": "who"}}'), "status 401: REQ401 who.*RLHF_SERVICE_TOKEN"),
        ((400, '{"error": {"code": "MOD022", "what": "too long"}}'), "status 400: MOD022 too long"),
        ((302, "elsewhere"), "status 302"),
    ],
)
def test_an_answer_that_is_none_is_an_error_at_once(stub, answer, says):
    Stub.script = [answer]
    with pytest.raises(RlhfError, match=f"RES030.*{says}"):
        ServiceScorer(stub, pauses=[0.01]).score(TWO)
    assert Stub.asked == ["/health", "/score"]


def test_a_service_that_is_not_there_is_named():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with pytest.raises(RlhfError, match=f"RES030.*127.0.0.1:{port}.*no answer in 2 attempts.*refused"):
        ServiceScorer(f"http://127.0.0.1:{port}", pauses=[0.01])


@pytest.mark.parametrize(
    "url",
    ["127.0.0.1:8300", "ftp://a", "http://", "http://a:b", "http://u:p@a", "http://a/?x=1", "http://a#b", "http://[a"],
)
def test_what_is_no_address_is_refused(url):
    with pytest.raises(ValidationError, match="url (must|is no)"):
        ServiceReward(url=url)
    assert ServiceReward(url="http://127.0.0.1:8300").name == "http://127.0.0.1:8300"


def test_serving_without_its_libraries_is_one_message(here, monkeypatch):
    monkeypatch.setattr(installed, "_is_there", lambda name: name != "fastapi")
    code, shown = here("serve", "test_compare:words")
    assert (
        code == 6
        and "RES005" in shown
        and "needs fastapi, not installed. Fix: pip install 'rlhf-pipeline[serve]'" in shown
    )


@served
def test_an_address_for_others_needs_a_long_token_and_one_that_is_taken_is_said(here, monkeypatch):
    monkeypatch.delenv(TOKEN, raising=False)
    code, shown = here("serve", "test_compare:words", "--host", "0.0.0.0", "--port", "0")
    assert code == 8 and "SEC011" in shown
    monkeypatch.setenv(TOKEN, "short")
    code, shown = here("serve", "test_compare:words", "--host", "0.0.0.0", "--port", "0")
    assert code == 8 and "SEC012" in shown and "short" not in shown
    monkeypatch.delenv(TOKEN)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        code, shown = here("serve", "test_compare:words", "--port", str(taken.getsockname()[1]))
        assert code == 6 and "RES023" in shown


@contextmanager
def process(*rewards):
    """``rlhf serve`` as a person starts it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "rlhf", "serve", *rewards, "--port", str(port)]
    running = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True, env=os.environ)
    try:
        for _ in range(600):
            with socket.socket() as knock:
                if knock.connect_ex(("127.0.0.1", port)) == 0:
                    break
            assert running.poll() is None, running.stderr.read()
            time.sleep(0.1)
        yield port, running
    finally:
        if running.poll() is None:
            running.kill()
        running.wait()


@served
def test_a_served_reward_stops_on_sigterm_with_exit_0():
    with process("rlhf.demo.gold:reward") as (port, running):
        assert ask(port, "/score", rows("hello"))[0] == 200
        running.send_signal(signal.SIGTERM)
        shown = running.communicate(timeout=60)[1]
    assert running.returncode == 0 and "Stopped; 1 requests were answered in 1 batches." in shown


@served
@pytest.mark.slow
def test_ppo_on_a_served_reward_is_ppo_on_the_reward(here, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    sft = "data: {path: 'demo:demonstrations?size=200'}\nsteps: 0\nmax_length: 200\nmin_end_token_rate: 0.0\n"
    (tmp_path / "sft.yaml").write_text(sft)
    code, shown = here("sft", "-c", "sft.yaml")
    assert code == 0, shown
    plain = "prompts: {path: 'demo:prompts?size=60'}\nbatch: {batch_size: 8, minibatch_size: 8, micro_batch_size: 8}\n"
    plain += "steps: 2\nevaluation: {num_prompts: 8}\nsampling: {max_new_tokens: 24}\nvalue: {pretrain_steps: 1}\n"
    plain += "report_to: none\n"
    digests = []
    with process("rlhf.demo.gold:reward") as (port, _):
        for name, reward in (("a", "function: 'rlhf.demo.gold:reward'"), ("b", f"url: 'http://127.0.0.1:{port}'")):
            (tmp_path / "ppo.yaml").write_text(f"run_dir: runs/{name}\nrewards: [{{{reward}}}]\n{plain}")
            code, shown = here("ppo", "-c", "ppo.yaml")
            assert code == 0, shown
            digests.append(artifacts.read(Path("runs") / name).files["adapter/adapter_model.safetensors"])
    assert digests[0] == digests[1]
