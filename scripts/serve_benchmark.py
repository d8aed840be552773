"""Requests to ``rlhf serve`` at the same time: none lost, the scores of ``rlhf score``, and how many a second.

python scripts/serve_benchmark.py runs/train-rm
"""

from __future__ import annotations

import argparse
import asyncio
import json
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from rlhf.commands.scorers import open_scorer
from rlhf.config.sections import DataSection
from rlhf.data import sources
from rlhf.runs import progress
from rlhf.scoring.scorer import Sample

RLHF = [sys.executable, "-m", "rlhf"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("reward", help="reward run")
    parser.add_argument("--data", default="demo:demonstrations", help="prompts with responses")
    parser.add_argument("--requests", type=int, default=500)
    arguments = parser.parse_args()
    progress.log_to_console(quiet=True)
    records = sources.load_demonstrations(DataSection(path=arguments.data, limit=arguments.requests)).records
    rows = [
        {
            "prompt": [{"role": message.role, "content": message.content} for message in record.prompt],
            "response": record.messages[-1].content,
        }
        for record in records
    ]
    wanted = by_score(arguments.reward, rows)
    samples = [Sample(record.prompt, record.messages[-1].content, [], [], True, []) for record in records]
    alone, seconds_alone = one_by_one(arguments.reward, samples)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    service = subprocess.Popen([*RLHF, "serve", arguments.reward, "--port", str(port)], stderr=subprocess.DEVNULL)
    try:
        wait_for(port, service)
        in_turn, seconds_in_turn = asyncio.run(ask(port, rows, 1))
        together, seconds_together = asyncio.run(ask(port, rows, len(rows)))
    finally:
        service.terminate()
        service.wait()
    print(f"{len(rows)} requests of one response each; {len(together)} answered when sent at the same time")
    for name, found, seconds in (
        ("model called one by one", alone, seconds_alone),
        ("service, one after the other", in_turn, seconds_in_turn),
        ("service, at the same time", together, seconds_together),
    ):
        largest = max(abs(own - other) for own, other in zip(found, wanted, strict=True))
        print(f"{name:<30} {len(rows) / seconds:7.0f} a second; largest difference from rlhf score {largest:.1e}")


def by_score(reward: str, rows: list[dict[str, object]]) -> list[float]:
    with tempfile.TemporaryDirectory() as directory:
        data, out = Path(directory) / "in.jsonl", Path(directory) / "out.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in rows))
        subprocess.run(
            [*RLHF, "score", reward, "--in", str(data), "--out", str(out)], check=True, stderr=subprocess.DEVNULL
        )
        return [json.loads(line)["score"] for line in out.read_text().splitlines()]


def one_by_one(reward: str, samples: list[Sample]) -> tuple[list[float], float]:
    scorer = open_scorer([reward], torch.device("cpu"), 1)
    scorer.score(samples[:1])
    started = time.perf_counter()
    found = [float(scorer.score([sample]).mean[0]) for sample in samples]
    return found, time.perf_counter() - started


def wait_for(port: int, service: subprocess.Popen[bytes]) -> None:
    while service.poll() is None:
        with socket.socket() as knock:
            if knock.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.1)
    sys.exit("the service ended")


async def ask(port: int, rows: list[dict[str, object]], at_once: int) -> tuple[list[float], float]:
    """The scores of one request a row, ``at_once`` of them open at a time, and the seconds that they took."""
    room = asyncio.Semaphore(at_once)

    async def one(row: dict[str, object]) -> float:
        async with room:
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            body = json.dumps({"rows": [row]}).encode()
            head = f"POST /score HTTP/1.1\r\nHost: a\r\nConnection: close\r\nContent-Length: {len(body)}\r\n\r\n"
            writer.write(head.encode() + body)
            text = await reader.read()
            writer.close()
            return float(json.loads(text.partition(b"\r\n\r\n")[2])["scores"][0])

    started = time.perf_counter()
    found = await asyncio.gather(*map(one, rows))
    return found, time.perf_counter() - started


if __name__ == "__main__":
    main()
