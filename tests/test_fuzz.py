"""Generated configs and data through the real loaders: a config or records, or one clean refusal, never a crash.

RLHF_FUZZ_CASES sets how many cases are tried in all; 2,000 where it is not set.
"""

from __future__ import annotations

import json
import os
import random
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rlhf.config import keys, load, stages
from rlhf.config.sections import DataSection, Section
from rlhf.data import sources
from rlhf.errors import MAX_SHOWN, RlhfError, render_json
from rlhf.stages.registry import STAGES

CASES = int(os.environ.get("RLHF_FUZZ_CASES", "2000"))
CLASSES = {name: stage.config_class for name, stage in STAGES.items()} | {"pipeline": stages.PipelineConfig}
SHIPPED = {path.stem: path.read_text() for path in sorted((Path(__file__).parents[1] / "configs").glob("*.yaml"))}
LOADERS = {
    "demonstrations": sources.load_demonstrations,
    "comparisons": sources.load_comparisons,
    "prompts": sources.load_prompts,
}
ODD = [
    "", " ", "\t", "\n", "\0", "-", "- ", "?", "? ", ":", ": ", "{", "}", "[", "]", "&a", "*a", "&a *a", "!", "!!int",
    "!!python/name:os", "|", ">", "'", '"', "#", "%", "@", "`", "---", "...", "<<: *a", "~", "null", "yes", "010",
    "0x1f", "1_000", "1e5", "1e999", "-1e999", ".nan", ".inf", "9" * 50, "9" * 5000, "0." + "0" * 400 + "1", "-0", "²",
    "१", "1:30", "2026-01-01", "'\ud800'", '"\\0"', '"\\ud800"', '"\\U0010ffff"', "\ufeff", "\u2028", "é", "${HOME}",
    "${", "hf_abcdefghijklmnopqrstuvwxyz", "../..", "demo:prompts?size=-1", "demo:base", "http://u:p@h", "run_dir",
    "optim", "learning_rate", "token", "a" * 300, "[" * 40, "{a: " * 40, "[[], {}]", "{? [a] : b}", "{1: 2}",
    "{null: 1}", "[a, b", "true", "True", "0", "-1", "1.0", "3.5",
]  # fmt: skip
FITTING = ["1", "2", "16", "0.5", "1e-4", "true", "null", "auto", "runs/x", "[]", "{}", "[a]", "demo:prompts"]


def settled(action, exit_codes):
    """The outcome, or None after a refusal that is short, printable, and of a right kind."""
    try:
        return action()
    except RlhfError as error:
        assert error.exit_code in exit_codes, error
        assert len(str(error).splitlines()) <= MAX_SHOWN + 1 and str(error).encode("utf-8")
        assert all(problem.where and problem.what and len(str(problem)) < 1200 for problem in error.problems), error
        assert all(str(problem).isprintable() for problem in error.problems), error
        assert json.loads(render_json(error.problems, error.exit_code))["problems"]
        return None


def examples(share):
    """Settings for ``share`` of all cases; the same ones in every run."""
    return settings(
        max_examples=max(1, int(CASES * share)),
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("fuzz")


def check_config(folder, stage, text, overrides=()):
    """A config that loads comes back from its own dump, and survives flattening."""
    path = folder / "run.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass"))
    config = settled(lambda: load.load(CLASSES[stage], path, overrides), (2, 8))
    if config is not None:
        assert isinstance(config, Section) and keys.flatten(config)
        path.write_text(load.dump(config), "utf-8")
        assert load.load(CLASSES[stage], path) == config
    return config


def edited(text, rng):
    """A few random edits: characters, tokens, lines."""
    for _ in range(rng.randint(1, 4)):
        place = rng.randrange(len(text) + 1)
        rows = text.split("\n")
        match rng.randrange(7):
            case 0:
                text = text[:place] + rng.choice(ODD) + text[place:]
            case 1:
                text = text[:place] + text[place + rng.randint(1, 5) :]
            case 2:
                text = text[:place] + chr(rng.choice([rng.randrange(128), rng.randrange(0x110000)])) + text[place:]
            case 3:
                rows.insert(rng.randrange(len(rows) + 1), rng.choice(rows))
                text = "\n".join(rows)
            case 4:
                row = rng.randrange(len(rows))
                rows[row] = " " * rng.randint(0, 3) + rows[row]
                text = "\n".join(rows)
            case 5:
                row = rng.randrange(len(rows))
                rows[row] = rows[row].partition(":")[0] + ": " + rng.choice(ODD)
                text = "\n".join(rows)
            case _:
                text = text.replace(rng.choice([" ", ":", "1", "e", "\n", "run"]), rng.choice(ODD), 1)
    return text


@given(seed=st.integers(0, 2**63))
@examples(0.3)
def test_an_edited_shipped_config_loads_or_is_refused(folder, seed):
    rng = random.Random(seed)
    stage = rng.choice(sorted(SHIPPED))
    check_config(folder, stage, edited(SHIPPED[stage], rng))


SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(ODD)
    | st.integers(-(10**60), 10**60)
)


def _names(section):
    for name, field in section.model_fields.items():
        yield name
        for inner in load.sections_in(field.annotation):
            yield from _names(inner)


KEYS = sorted({name for section in CLASSES.values() for name in _names(section)})
VALUES = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYS) | st.text(max_size=5), inner, max_size=4)
    ),
    max_leaves=8,
)


def sound(stage, path, value):
    """The shipped config with ``value`` at the path of its keys that ``path`` walks."""
    whole = yaml.safe_load(SHIPPED[stage])
    here = whole
    for step in path[:-1]:
        names = list(here) if isinstance(here, dict) else list(range(len(here)))
        inner = here[names[step % len(names)]]
        if not isinstance(inner, dict | list) or not inner:
            break
        here = inner
    names = list(here) if isinstance(here, dict) else list(range(len(here)))
    here[names[path[-1] % len(names)]] = value
    return whole


@given(
    stage=st.sampled_from(sorted(SHIPPED)),
    path=st.lists(st.integers(0, 30), min_size=1, max_size=3),
    value=VALUES | st.sampled_from(FITTING).map(yaml.safe_load),
    keep=st.booleans(),
)
@examples(0.2)
def test_any_structure_in_any_place_loads_or_is_refused(folder, stage, path, value, keep):
    whole = sound(stage, path, value) if keep else value
    check_config(folder, stage, yaml.safe_dump(whole, allow_unicode=True).encode("utf-8", "replace"))


PATHS = {stage: sorted(load.keys_of(config_class)) for stage, config_class in CLASSES.items()}


@given(stage=st.sampled_from(sorted(SHIPPED)), seed=st.integers(0, 2**63))
@examples(0.2)
def test_any_override_is_taken_or_refused(folder, stage, seed):
    rng = random.Random(seed)
    overrides = []
    for _ in range(rng.randint(1, 3)):
        words = rng.choice(PATHS[stage]).split(".")
        if rng.random() < 0.3:
            words.insert(rng.randrange(len(words) + 1), rng.choice([*ODD, "0", "1", "7"]))
        overrides.append(f"{'.'.join(words)}={rng.choice(ODD if rng.random() < 0.5 else FITTING)}")
    check_config(folder, stage, SHIPPED[stage], overrides)


FIELDS = (
    "prompt", "messages", "completion", "response", "chosen", "rejected", "margin", "responses", "ranks", "content",
)  # fmt: skip
WORDS = st.sampled_from(["", " ", "q", "a", "\0", "\ud800", "user"])
PLAIN = st.none() | st.booleans() | st.integers(-3, 3) | st.floats() | WORDS
ROLES = st.sampled_from(["user", "assistant", "system", "bot"])
TURN = st.fixed_dictionaries({}, optional={"role": ROLES, "content": PLAIN})
JSON = st.recursive(
    PLAIN | TURN,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(FIELDS), inner, max_size=4),
    max_leaves=6,
)
ROWS = st.lists(JSON | st.dictionaries(st.sampled_from(FIELDS), JSON, max_size=4), max_size=4)
COLUMNS = st.dictionaries(st.sampled_from(FIELDS), st.sampled_from(FIELDS), max_size=1)
SOUND = {
    "demonstrations": {"prompt": "p", "completion": "c"},
    "comparisons": {"prompt": "p", "chosen": "c", "rejected": "r"},
    "prompts": {"prompt": "p"},
}


PIECES = [*(text.encode("utf-8", "surrogatepass") for text in ODD), b"\xff", b"\x1f\x8b", b"PAR1", b"\\u0000", b"\r"]


def spoiled(data, rng):
    """A few random edits of bytes."""
    for _ in range(rng.randint(0, 3)):
        place = rng.randrange(len(data) + 1)
        data = data[:place] + rng.choice(PIECES) + data[place + rng.randint(0, 3) :]
    return data


@given(kind=st.sampled_from(sorted(LOADERS)), rows=ROWS, seed=st.integers(0, 2**63), columns=COLUMNS)
@examples(0.3)
def test_any_lines_are_records_or_refused(folder, kind, rows, seed, columns):
    rng = random.Random(seed)
    texts = [json.dumps(row, ensure_ascii=rng.random() < 0.5) for row in [SOUND[kind], *rows]]
    data = "\n".join(texts).encode("utf-8", "surrogatepass")
    path = folder / "d.jsonl"
    path.write_bytes(spoiled(data, rng) if rng.random() < 0.5 else data)
    section = DataSection(path=str(path), on_bad_row=rng.choice(["drop", "error"]), columns=columns)
    loaded = settled(lambda: LOADERS[kind](section), (3,))
    if loaded is not None:
        assert loaded.records and loaded.num_rows == len(loaded.records) + sum(loaded.num_dropped.values())
