"""PPO whose served reward dies in the middle of it."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
from test_reward_training import PPO, fingerprint, home, rlhf, train  # noqa: F401

from rlhf.hub import installed
from rlhf.runs import artifacts
from rlhf.scoring.service import SECONDS, ServiceScorer

MORTAL = """
import os, signal
from pathlib import Path

calls = 0


def reward(prompts, responses):
    global calls
    if Path("die").exists():
        calls += 1
        if calls == 3:
            os.kill(os.getpid(), signal.SIGKILL)
    return [len(set(response)) / 7 for response in responses]
"""


@contextmanager
def service(port):
    """``rlhf serve`` of a function that kills its process at the third request after a file has appeared."""
    command = [sys.executable, "-m", "rlhf", "serve", "mortal:reward", "--port", str(port)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as running:
        try:
            for _ in range(600):
                with socket.socket() as knock:
                    if knock.connect_ex(("127.0.0.1", port)) == 0:
                        break
                assert running.poll() is None, running.stderr.read()
                time.sleep(0.1)
            yield running
        finally:
            running.kill()


@pytest.mark.skipif(bool(installed.missing_for_serving()), reason="the serve extra is not installed")
@pytest.mark.slow
def test_ppo_stops_when_its_reward_is_killed_and_goes_on_bit_for_bit(home, monkeypatch, capsys):  # noqa: F811
    monkeypatch.setattr(ServiceScorer.__init__, "__defaults__", (SECONDS, (0.01,)))
    (home / "mortal.py").write_text(MORTAL)
    monkeypatch.setenv("PYTHONPATH", f"{home}:{Path(artifacts.__file__).parents[1]}")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    config = {**PPO, "rewards": [{"url": f"http://127.0.0.1:{port}"}]}
    with service(port) as running:
        whole = train("ppo", "served", config)
        (home / "die").touch()
        Path("killed.yaml").write_text(json.dumps({**config, "run_dir": "runs/killed"}))
        capsys.readouterr()
        rlhf("ppo", "-c", "killed.yaml", code=6)
        assert running.wait(10) == -9
    said = " ".join(capsys.readouterr().err.split())
    assert "RES030" in said and "--resume goes on from the last checkpoint" in said
    killed = Path("runs/killed")
    assert not artifacts.is_finished(killed)
    assert [path.name for path in killed.glob("checkpoints/step-*")] == ["step-1"]
    (home / "die").unlink()
    with service(port):
        rlhf("ppo", "-c", "killed.yaml", "--resume")
    assert fingerprint(killed) == fingerprint(whole)
    assert "Resumed from runs/killed/checkpoints/step-1" in (killed / "run.log").read_text()
    rows = (killed / "metrics.jsonl").read_text().splitlines()
    assert len({json.loads(row)["step"] for row in rows}) > 3
