"""What each command writes, every reader reads, with the right number of rows, or refuses for the right reason."""

from __future__ import annotations

import io
import json
import logging
import shlex
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny

from rlhf import cli
from rlhf.commands import filter as filtering
from rlhf.commands import score
from rlhf.config import load
from rlhf.data import lines, sources
from rlhf.errors import RlhfError
from rlhf.stages.registry import STAGES

REWARD = "runs/train-rm"
SHORTEST = "def shortest(prompts, responses):\n    return [-float(len(one)) for one in responses]\n"
SAMPLED = ("--prompts", "p.jsonl", "-n", "3")  # some are cut off, and some have no text
WRITERS = {
    "generate": ("generate", "runs/sft", *SAMPLED, "--out", "generate.jsonl"),
    "rank": ("rank", "runs/sft", *SAMPLED, "--reward", REWARD, "--out", "rank.jsonl"),
    "rank --top 1": ("rank", "runs/sft", *SAMPLED, "--reward", REWARD, "--judge", "lengths:shortest", "--top", "1",
                     "--out", "best.jsonl"),
    "score": ("score", REWARD, "--in", "generate.jsonl", "--out", "score.jsonl"),
    "filter": ("filter", "--in", "rank.jsonl", "--reward", REWARD, "--keep-share", "0.7", "--out", "filter.jsonl"),
    "filter without reward": ("filter", "--in", "score.jsonl", "--near-duplicates", "0.99", "--out", "plain.jsonl"),
    "compare": ("compare", "runs/sft", "m", *SAMPLED, "--reward", REWARD, "--resamples", "100", "--out", "compared"),
    "collect": ("collect", "-c", "collect.yaml"),
}  # fmt: skip
FILES = {
    "generate": "generate.jsonl", "rank": "rank.jsonl", "rank --top 1": "best.jsonl", "score": "score.jsonl",
    "filter": "filter.jsonl", "filter without reward": "plain.jsonl", "compare": "compared/rows.jsonl",
    "collect": "runs/collect/preferences.jsonl", "a collect run": "runs/collect", "prompts": "p.jsonl",
}  # fmt: skip
LABELS = {"prompt", "responses", "ranks", "scores", "provenance"}
STAGE_CONFIGS = {  # reader -> stage, data section, fields that it reads of what is written here
    "sft": ("sft", "data", {"prompt", "response", "finished"}),
    "train-rm": ("train-rm", "data", LABELS), "eval-rm": ("eval-rm", "data", LABELS),
    "eval-rm drift": ("eval-rm", "drift", {"prompt", "response", "finished", *LABELS}),
    "ppo": ("ppo", "prompts", {"prompt"}), "collect": ("collect", "prompts", {"prompt"}),
}  # fmt: skip
UNJUDGED, RANKED = "nobody has compared with another: rlhf collect", "a ranking, which rlhf train-rm reads"


def run(command, patch):
    """The exit code of a command in this process."""
    patch.setattr(cli.interrupts, "install", lambda: None)
    patch.setattr(sys, "argv", ["rlhf", *command])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    return stop.value.code


@pytest.fixture(scope="module", autouse=True)
def _log_as_it_was():
    logger = logging.getLogger("rlhf")
    before = logger.handlers[:], logger.level, logger.propagate
    yield
    logger.handlers[:], logger.level, logger.propagate = before


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """Everything that is written, in a working directory of its own; responses of which some are cut off."""
    where = tmp_path_factory.mktemp("written")
    tiny.finished_sft(where, max_new_tokens=5)
    tiny.finished_reward(where)
    (where / "lengths.py").write_text(SHORTEST)
    (where / "p.jsonl").write_text("".join(f'{{"prompt": "where is chair {n} ?"}}\n' for n in range(8)))
    (where / "collect.yaml").write_text(
        "prompts: {path: p.jsonl}\nsamples_per_prompt: 4\nlabeller: {function: 'lengths:shortest'}\n"
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(where)
        for command in WRITERS.values():
            assert run(command, patch) == 0, command
    return where


def rows_of(name):
    path = Path(FILES[name])
    path = path / "preferences.jsonl" if path.is_dir() else path
    return [json.loads(line) for line in path.read_text().splitlines()]


def has_text(response):
    return bool(response.strip()) and "\0" not in response


def read(reader, path):
    """Number of records, and the notes of a data section."""
    if reader in ("score", "filter"):
        return len(score.read(path)), []
    if reader in ("generate", "rank", "compare"):
        return len(lines.load(sources.load_prompts, path)), []
    stage, key, _ = STAGE_CONFIGS[reader]
    section = f"{{path: {path}, max_dropped_fraction: 1.0}}"
    text = f"{key}: {section}\n" + {
        "sft": "steps: 1\n",
        "train-rm": "steps: 1\n",
        "eval-rm": f"reward: {REWARD}\n",
    }.get(stage, "")
    text += "data: {path: p.jsonl}\n" if key == "drift" else ""
    needs = STAGES[stage].needs(load.load_text(STAGES[stage].config_class, text, "c.yaml"))
    (item,) = [one for one in needs.inputs if one.key == key]
    loaded = item.read(item.section, 0)
    return len(loaded.records), loaded.notes()


def wanted(writer, reader, rows):
    """How many records a reader finds, or why it refuses them."""
    ended = sum(row.get("finished") is not False and has_text(row["response"]) for row in rows if "response" in row)
    is_ranked, takes_prompts = "collect" in writer, reader in ("ppo", "collect", "generate", "rank", "compare")
    if takes_prompts:
        return len(rows)
    if writer == "prompts":
        return "'completion'" if reader in ("sft", "score", "filter") else "'chosen'"
    if is_ranked:
        return RANKED if reader in ("sft", "score", "filter") else len(rows)
    return {"sft": ended, "eval-rm drift": ended, "score": len(rows), "filter": len(rows)}.get(reader, UNJUDGED)


@pytest.mark.parametrize("reader", [*STAGE_CONFIGS, "score", "filter", "generate", "rank", "compare"])
@pytest.mark.parametrize("writer", FILES)
def test_what_is_written_is_read_or_refused_for_the_right_reason(writer, reader, written, monkeypatch):
    monkeypatch.chdir(written)
    rows = rows_of(writer)
    expected = wanted(writer, reader, rows)
    if isinstance(expected, str):
        with pytest.raises(RlhfError) as refused:
            read(reader, FILES[writer])
        assert expected in str(refused.value) and refused.value.exit_code == 3
        return
    found, notes = read(reader, FILES[writer])
    assert found == expected > 0
    if reader in STAGE_CONFIGS:
        unread = set().union(*rows) - STAGE_CONFIGS[reader][2]
        said = [note for note in notes if "ignored fields" in note]
        assert said == ([f"ignored fields: {', '.join(sorted(unread))}"] if unread else [])


def test_what_is_written_has_responses_that_were_cut_off_and_some_without_text(written, monkeypatch):
    monkeypatch.chdir(written)
    for name in ("generate", "rank", "score", "compare"):
        assert {row["finished"] for row in rows_of(name)} == {True, False}, name
    assert all(row.get("finished", True) for name in ("filter", "filter without reward") for row in rows_of(name))
    texts = {
        name: [text for row in rows_of(name) for text in row.get("responses", [row.get("response")])]
        for name in WRITERS
    }
    lacking = {name for name, own in texts.items() if not all(map(has_text, own))}
    assert "generate" in lacking <= {"generate", "score", "compare"}


def test_a_response_that_was_cut_off_scores_the_same_wherever_it_is_scored(written, monkeypatch):
    monkeypatch.chdir(written)
    score.score(REWARD, "rank.jsonl", "again.jsonl", 8, None)
    again = [json.loads(line) for line in Path("again.jsonl").read_text().splitlines()]
    ranked = rows_of("rank")
    assert [row["finished"] for row in again] == [row["finished"] for row in ranked]
    assert [row["score"] for row in again] == pytest.approx([row["score"] for row in ranked], abs=1e-5)


def test_a_sample_without_text_can_be_scored_and_is_dropped_by_filter_but_an_empty_row_is_a_mistake(
    written, monkeypatch, tmp_path
):
    monkeypatch.chdir(written)
    source, out = str(tmp_path / "in.jsonl"), str(tmp_path / "out.jsonl")
    sampled = [
        {"prompt": "hi", "response": text, "finished": done}
        for text in ("", " ", "a\0", "yes")
        for done in (True, False)
    ]
    Path(source).write_text("".join(json.dumps(row) + "\n" for row in sampled))
    score.score(REWARD, source, out, 8, None)
    found = [json.loads(line) for line in Path(out).read_text().splitlines()]
    assert [(row["response"], row["finished"]) for row in found] == [(r["response"], r["finished"]) for r in sampled]
    counts = filtering.filter_rows(source, [], filtering.Rules(near_duplicates=1.0), 8, out)
    assert counts == {"rows": 8, "dropped": {"cut off": 4, "empty": 3, "near-duplicates": 0}, "kept": 1}
    for text in ("", "a\0"):
        Path(source).write_text(json.dumps({"prompt": "hi", "response": text}) + "\n")
        with pytest.raises(RlhfError, match="DAT004.*'response'"):
            score.read(source)


SFT = """
model: {path: m}
data: {path: sft.jsonl}
max_length: 100
steps: 2
batch: {batch_size: 2, micro_batch_size: 2}
sampling: {max_new_tokens: 8}
min_end_token_rate: 0
require_improvement: false
"""


def recipe():
    """The commands of the block in the documentation that ranks, filters and trains on what is kept."""
    text = (Path(__file__).parents[1] / "docs/reward-models.md").read_text()
    (block,) = [part for part in text.split("\n\n") if "    rlhf rank " in part]
    return [line.split("#")[0].strip() for line in block.splitlines()]


def test_the_documented_recipe_runs_as_it_stands(written, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name in ("m", "runs/sft", "runs/train-rm"):
        shutil.copytree(written / name, tmp_path / name)
    shutil.copytree(written / "runs/sft", tmp_path / "runs/ppo")
    words = ["red", "blue", "old", "new", "lost", "broken", "late", "small"]
    rows = [{"prompt": f"the {one} {other} chair is here", "topic": one} for one in words for other in words]
    (tmp_path / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[:12]))
    (tmp_path / "prompts.jsonl").write_text(
        "".join(json.dumps({"prompt": row["prompt"]}) + "\n" for row in rows[20:32])
    )
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs/sft.yaml").write_text(SFT)
    commands = recipe()
    assert [line.split()[1] for line in commands] == ["compare", "rank", "filter", "sft", "generate", "check"]
    for line in commands:
        given = ""
        for part in line.split(" | "):
            program, *command = shlex.split(part)
            monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(given.encode())))
            code = run(command, monkeypatch)
            shown = capsys.readouterr()
            given = shown.out
            assert (program, code) == ("rlhf", 0), f"{part}\n{shown.err}"
    best, kept = (
        [json.loads(row) for row in Path(name).read_text().splitlines()] for name in ("best.jsonl", "sft.jsonl")
    )
    assert len(best) == 12 and 0 < len(kept) <= sum(row["finished"] for row in best)
    assert len(Path("scored.jsonl").read_text().splitlines()) == 12
