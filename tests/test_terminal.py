"""What a person sees in a terminal: every stage once, chat as it streams, Ctrl-C, narrow and plain terminals."""

from __future__ import annotations

import importlib.util
import json
import re

import pytest
import terminal
import tiny
import yaml

CONFIGS = {
    "sft": {
        "model": {"path": "m"}, "data": {"path": "shown.jsonl"}, "max_length": 64, "holdout_fraction": 0.2, "steps": 3,
        "sampling": {"max_new_tokens": 16}, "min_end_token_rate": 0.0, "end_token_samples": 4,
        "batch": {"batch_size": 4, "micro_batch_size": 2},
    },
    "train-rm": {
        "policy": "runs/sft", "data": {"path": "pairs.jsonl"}, "max_length": 64, "steps": 3, "holdout_fraction": 0.2,
        "standardise_samples": 16, "batch": {"batch_size": 4, "micro_batch_size": 2},
        "sampling": {"max_new_tokens": 60},
    },
    "eval-rm": {
        "reward": "runs/train-rm", "data": {"path": "pairs.jsonl"}, "max_length": 64, "num_resamples": 100,
        "micro_batch_size": 4,
    },
    "collect": {
        "policy": "runs/sft", "labeller": {"function": "rlhf.demo.gold:reward"}, "prompts": {"path": "asked.jsonl"},
        "samples_per_prompt": 2, "sampling": {"max_new_tokens": 16, "concurrency": 8},
    },
    "ppo": {
        "policy": "runs/sft", "rewards": [{"run": "runs/train-rm"}], "prompts": {"path": "asked.jsonl"}, "steps": 3,
        "batch": {"batch_size": 4, "minibatch_size": 4, "micro_batch_size": 4}, "sampling": {"max_new_tokens": 16},
        "value": {"pretrain_steps": 1}, "evaluation": {"every": 1, "num_prompts": 4, "holdout_fraction": 0.3},
    },
}  # fmt: skip
SLOW_TOKENS = """
import time
from rlhf.commands import streaming
put = streaming.Stream.put
def slowly(self, tokens):
    time.sleep(0.05)
    put(self, tokens)
streaming.Stream.put = slowly
"""
BAR = re.compile(r"(SFT|Reward|PPO|Tokenising|Sampling|Scoring|Measuring) \d+/")
ASK = "wie geht es é ü 日本 👋 ?"
GREEDY = ("--temperature", "0", "--max-new-tokens", "60")


@pytest.fixture(scope="module")
def screens():
    started = terminal.Terminal()
    yield started
    started.close()


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A model, an SFT run, rows and configs."""
    where = tmp_path_factory.mktemp("terminal")
    tiny.finished_sft(where)
    tiny.build(where / "talkative")
    rows = {
        "shown": [{"prompt": f"hi {n}", "completion": f"ok {n % 3}"} for n in range(40)],
        "pairs": [{"prompt": f"hi {n}", "chosen": f"ok {n}", "rejected": f"no {n}"} for n in range(40)],
        "asked": [{"prompt": f"hi {n}"} for n in range(40)],
    }
    for name, found in rows.items():
        (where / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in found))
    for stage, config in CONFIGS.items():
        (where / f"{stage}.yaml").write_text(yaml.safe_dump(config))
    return where


def is_readable(session, run):
    """The last screen has every line of the run's log, nothing of a bar, and a cursor; the log has text alone."""
    log = (run / "run.log").read_text()
    assert "\x1b" not in log and "━" not in log and "0:00" not in log and "\r" not in log
    on_screen = "".join(session.lines)
    for line in log.splitlines():
        assert line.split(" ", 3)[3].replace(" ", "") in on_screen.replace(" ", "")
    assert not any(
        re.match(r"(SFT|Reward|PPO|Tokenising|Sampling|Scoring|Measuring) \d+/", line) for line in session.lines
    )
    assert session.sent.rfind(terminal.SHOW) > session.sent.rfind(terminal.HIDE)


@pytest.mark.parametrize(
    ("stage", "title", "figures", "columns"),
    [
        ("sft", "SFT 3/3", r" mean loss \d\.\d{3} 0:00 left", 40),
        ("train-rm", "Reward 3/3", r" ━+ mean loss \d\.\d{3} 0:00 left", 80),
        ("eval-rm", "Scoring 20/20", r" ━+ 0:00 left", 80),
        ("collect", "Sampling 10/10", r" ━+ 0:00 left", 80),
        ("ppo", "PPO 3/3", r" ━* ?score -?\d+\.\d\d KL -?\d+\.\d\d 0:00 left", 80),
    ],
)
def test_each_stage_shows_what_one_watches_and_leaves_a_readable_screen(screens, home, stage, title, figures, columns):
    done = screens.run(
        stage, "-c", f"{stage}.yaml", f"run_dir=runs/{stage}-seen", "--json", cwd=home, columns=columns, is_piped=True
    )
    assert done.code == 0, done.sent
    [answer] = done.stdout.splitlines()
    assert json.loads(answer)["stage"] == stage
    frames = [frame for frame in done.frames(title.split()[0]) if BAR.match(frame)]
    assert any(re.match(title + figures, frame) for frame in frames), frames
    assert all(len(frame) < columns for frame in frames)
    is_readable(done, home / f"runs/{stage}-seen")
    if stage == "train-rm":
        (home / "runs/train-rm-seen").rename(home / "runs/train-rm")


def answers(session):
    """What stands between a question, or a command, and the remark in brackets, with the lines of a file."""
    found = re.findall(r"> [^\r\n]*\r\n((?:(?!\r\n> ).)*?)\r\n\[\d+ tokens", session.sent, re.DOTALL)
    return [answer.replace("\r\n", "\n") for answer in found]


def test_chat_streams_the_very_text_that_a_pipe_gives_and_draws_no_bar(screens, home):
    typed = [
        ("> ", ASK),
        (" tokens", "/again"),
        (" tokens", "/reset"),
        ("A new conversation", "/again"),
        ("Nothing was asked yet", "x" * 30),
        (" tokens", "/quit"),
    ]
    typed = [(wait, f"{turn}\n") for wait, turn in typed]
    for source, settings in (("runs/sft", ("--seed", "3")), ("talkative", GREEDY)):
        shown = screens.run("chat", source, *settings, cwd=home, typed=typed)
        piped = screens.run("chat", source, *settings, cwd=home, typed=typed, is_piped=True, is_fed=True)
        assert shown.code == piped.code == 0 and len(answers(shown)) == 3
        assert "".join(f"{answer}\n" for answer in answers(shown)) == piped.stdout
        assert "Sampling 0/" not in shown.sent and terminal.HIDE not in shown.sent
    assert all(len(answer) > 20 for answer in answers(shown)), "greedy answers of this model are long ones"


@pytest.mark.skipif(importlib.util.find_spec("readline") is None, reason="a terminal cuts lines at 4095 bytes")
def test_a_line_longer_than_a_terminal_takes_arrives_whole_and_a_mistake_costs_one_turn(screens, home):
    typed = [("> ", f"{'y' * 6000}\n"), ("shorter prompts", ""), ("> ", "hi\n"), (" tokens]", ""), ("> ", "\x04")]
    done = screens.run("chat", "runs/sft", cwd=home, typed=typed)
    assert done.code == 0 and len(answers(done)) == 1
    told = re.search(r"prompt (\d+) \+ max_new_tokens 1 exceed", "".join(done.lines))
    assert int(told[1]) > 6000, "one token a byte"


@pytest.mark.slow  # on a busy machine the second key can reach the terminal before the prompt reads it
def test_ctrl_c_stops_the_answer_and_not_the_conversation(screens, home):
    whole = screens.run("chat", "talkative", *GREEDY, cwd=home, typed=[("", "hi\n")], is_piped=True, is_fed=True).stdout
    begun = whole[:2].replace("\n", "\r\n")
    keys = [("> ", "hi\n"), (f"hi\r\n{begun}", "\x03"), ("stopped]\r\n> ", "\x03"), ("leaves.", ""), ("> ", "\x04")]
    done = screens.run("chat", "talkative", *GREEDY, cwd=home, typed=keys, prelude=SLOW_TOKENS)
    text, number = re.search(r"hi\r\n(.*?)(?:\^C)?\r\n\[(\d+) tokens, stopped\]", done.sent, re.DOTALL).groups()
    assert done.code == 0 and whole.startswith(text.replace("^C", "").replace("\r\n", "\n")) and 0 < int(number) < 60
    assert "/quit or Ctrl-D leaves." in done.lines


@pytest.mark.slow  # the key is typed while a bar is drawn, which a busy machine delays
def test_ctrl_c_under_a_bar_stands_on_a_line_of_its_own_and_the_cursor_comes_back(screens, home):
    cut = screens.run(
        "sft", "-c", "sft.yaml", "run_dir=runs/cut", "steps=3000", cwd=home, typed=[("SFT 0/3000", "\x03")]
    )
    assert cut.code == 130 and "Finishing this step, then saving. Once more to quit at once." in cut.lines
    assert any(line.startswith("Interrupted by SIGINT; saved step-") for line in cut.lines)
    is_readable(cut, home / "runs/cut")
    typed = [("Sampling 0/", "\x03")]
    arguments = ("generate", "m", "--prompts", "asked.jsonl", "-n", "300", "--max-new-tokens", "16")
    cut = screens.run(*arguments, "--out", "o.jsonl", cwd=home, typed=typed)
    assert cut.code == 130 and cut.sent.rfind(terminal.SHOW) > cut.sent.rfind(terminal.HIDE)
    assert "Interrupted by SIGINT" in "".join(cut.lines) and not any(BAR.match(line) for line in cut.lines)


def test_a_plain_terminal_gets_no_colours_and_a_dumb_one_no_control_sequence(screens, home):
    score = ("score", "runs/train-rm", "--in", "shown.jsonl", "--out", "scores.jsonl", "--micro-batch-size", "1")
    plain = screens.run(*score, cwd=home, environment={"NO_COLOR": "1"})
    assert plain.code == 0 and plain.frames("Scoring 40/40") and not re.search(r"\x1b\[[0-9;]*3\d", plain.sent)
    assert re.search(r"\x1b\[[0-9;]*32m", screens.run(*score, cwd=home).sent)
    dumb = screens.run(*score, cwd=home, environment={"TERM": "dumb"})
    assert dumb.code == 0 and "\x1b" not in dumb.sent and not re.search(r"Scoring \d", dumb.sent)
