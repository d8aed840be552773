"""The corpus of bad inputs: each ends in one message with its place and fix, its exit code, and no forward pass.

The number in a test's id is the entry's number. Entries that do not apply, or in another form only:

    19      there is no setting for gradient accumulation: it follows from batch_size and micro_batch_size (18)
    34      the warm-up is a share of the steps: more than 1 is refused
    35      bfloat16 runs on every device that torch has; an absent device is refused
    61      a local directory may stand anywhere; what is neither a directory nor a hub id is refused
    69      a reward model with another tokenizer reads the text in tokens of its own: test_external_rewards
    72 to 80, 83  concern checkpoints, resources and running stages: test_checkpoints, test_security, test_guards,
              test_chain and test_torture have them
"""

from __future__ import annotations

import contextlib
import json
import re
import shutil
from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

from rlhf import cli
from rlhf.data import files, sources, tokenised
from rlhf.data.chat_format import ChatFormat
from rlhf.data.dropped import DroppedRows
from rlhf.data.fitting import Limit
from rlhf.errors import Problem, RlhfError
from rlhf.models import base as base_module
from rlhf.models import open_base
from rlhf.models.base import load_base
from rlhf.models.heads import ScalarHead
from rlhf.models.roles import SharedBase
from rlhf.records import Message, Prompt
from rlhf.runs import artifacts, interrupts
from rlhf.runs.artifacts import Manifest

CONFIGS = {
    "sft": (
        "run_dir: out\nmodel: {path: m}\ndata: {path: train.jsonl}\nmax_length: 96\nepochs: 1\n"
        "sampling: {max_new_tokens: 8}\n"
    ),
    "train-rm": "run_dir: out\npolicy: runs/sft\ndata: {path: pairs.jsonl}\nmax_length: 96\nepochs: 1\n",
    "ppo": (
        "run_dir: out\npolicy: runs/sft\nrewards: [{run: runs/train-rm}]\n"
        "prompts: {path: prompts.jsonl, max_tokens: 64}\nsteps: 1\nsampling: {max_new_tokens: 8}\n"
    ),
    "collect": "run_dir: out\npolicy: runs/sft\nprompts: {path: prompts.jsonl}\nsampling: {max_new_tokens: 8}\n",
    "eval-rm": "run_dir: out\nreward: runs/train-rm\ndata: {path: pairs.jsonl}\nmax_length: 96\n",
    "pipeline": "stages:\n  - {stage: sft, config: sft.yaml}\n",
}
TOKEN = "hf_AbCdEfGhIjKlMnOpQrStUvWx"


def demonstration(number):
    return {"prompt": f"p{number}", "completion": f"c{number}"}


def pair(number):
    return {"prompt": f"p{number}", "chosen": f"c{number}", "rejected": f"r{number}"}


def lines(rows):
    return b"".join((row if isinstance(row, bytes) else json.dumps(row).encode()) + b"\n" for row in rows)


@pytest.fixture(scope="session")
def template(tmp_path_factory):
    """A working directory with a tiny model ``m``, its untrained SFT and reward runs, and sound data."""
    home = tmp_path_factory.mktemp("corpus")
    opened = load_base(str(tiny.build(home / "m")))
    roles = SharedBase(opened)
    roles.add("policy", adapter=tiny.lora(opened))
    roles.add("reward", adapter=tiny.lora(opened), head=ScalarHead(opened.hidden_size))
    identity = artifacts.BaseIdentity("m", opened.digest, "float32")
    for slot, stage, kind in (("policy", "sft", "policy"), ("reward", "train-rm", "reward")):
        roles.save(slot, home / "runs" / stage)
        artifacts.write(home / "runs" / stage, Manifest(kind, stage, 0, {"a": 1}, {}, 1.0, base=identity))
    (home / "train.jsonl").write_bytes(lines(map(demonstration, range(40))))
    (home / "pairs.jsonl").write_bytes(lines(map(pair, range(40))))
    (home / "prompts.jsonl").write_bytes(lines({"prompt": f"p{number}"} for number in range(40)))
    for stage, text in CONFIGS.items():
        (home / f"{stage}.yaml").write_text(text)
    return home


@pytest.fixture
def home(template, tmp_path, monkeypatch):
    """A copy of the directory to break; whatever runs the model in it fails the test."""

    def no_forward(*_, **__):
        raise AssertionError("a forward pass, though the input is bad")

    shutil.copytree(template, tmp_path / "home")
    monkeypatch.chdir(tmp_path / "home")
    monkeypatch.setattr(base_module, "_refuse_other_logits", lambda *_: None)
    monkeypatch.setattr(torch.nn.Module, "__call__", no_forward)
    base_module._say_no_pad.cache_clear()
    yield tmp_path / "home"
    torch.use_deterministic_algorithms(False)
    torch.set_flush_denormal(False)


@pytest.fixture
def rlhf(home, here):
    """Run a command in this process, in the directory that may be broken."""
    return here


def refused(outcome, exit_code, *wanted):
    """One block of errors, the first of the code that is wanted first, and nothing that looks like a crash."""
    code, text = outcome
    assert code == exit_code, text
    assert "Traceback" not in text and "internal error" not in text and "error[" in text
    for words in wanted:
        assert words in text, text
    assert len(text.splitlines()) <= 25 and max(map(len, text.splitlines())) < 600
    assert {match[:3] for match in re.findall(r"error\[(\w+)\]", text)} == {wanted[0][:3]}
    return text


def by_stage_and_check(rlhf, stage, exit_code, *wanted):
    """The stage and ``rlhf check`` say the same, before a run directory is made."""
    command = ["check", "run.yaml", "--stage", stage]
    said = refused(rlhf(*command), exit_code, *wanted)
    assert refused(rlhf(stage, "-c", "run.yaml"), exit_code, *wanted) == said
    assert not Path("out").exists()
    return said


def changed(stage, **values):
    """The stage's sound config with other top-level keys; None removes one."""
    kept = [line for line in CONFIGS[stage].splitlines() if line.partition(":")[0] not in values]
    return "\n".join(kept + [f"{key}: {value}" for key, value in values.items() if value is not None]) + "\n"


WHOLE = [
    ("01 missing", "sft", None, 2, ["CFG001", "run.yaml: no such file", "Fix: name a config"]),
    ("02 directory", "sft", Path(), 2, ["CFG001", "run.yaml: is a directory", "Fix"]),
    ("03 empty", "sft", b"", 2, ["CFG001", "run.yaml: empty", "Fix"]),
    ("03 only a comment", "sft", b"# nothing\n", 2, ["CFG001", "run.yaml: empty", "Fix"]),
    ("04 not UTF-8", "sft", b"a: 1\nb: caf\xe9\n", 2, ["CFG001", "run.yaml:2:7", "byte 0xe9 is not UTF-8", "Fix"]),
    ("05 tab", "sft", b"data:\n\tpath: x\n", 2, ["CFG002", "run.yaml:2:1", "tab", "Fix: indent with spaces"]),
    ("07 twice", "sft", b"seed: 1\n\nseed: 2\n", 2,
     ["CFG004", "run.yaml:3:1 seed", "already set at line 1", "Fix: keep one"]),
    ("08 list", "sft", b"- a\n", 2, ["CFG002", "run.yaml:1", "expected a mapping", "got a list", "Fix"]),
    ("09 python tag", "sft", b"seed: !!python/object/apply:os.mkdir [evil]\n", 8,
     ["SEC002", "run.yaml:1", "refused", "Fix"]),
    ("10 alias bomb", "sft", b"a: &a [x]\nb: [" + b"*a," * 101 + b"]\n", 8, ["SEC003", "run.yaml:2", "100 aliases"]),
    ("10 aliases that multiply", "sft",
     b"a: &a [x,x,x,x]\n" + b"".join(b"%c: &%c [%s]\n" % (c, c, b",".join([b"*%c" % (c - 1)] * 8))
                                    for c in range(ord("b"), ord("h"))), 8, ["SEC003", "run.yaml", "10,000 values"]),
    ("11 deep", "sft", b"[" * 40 + b"]" * 40, 8, ["SEC003", "run.yaml:1", "deeper than 32"]),
    ("12 large", "sft", b"# " + b"x" * (2 << 20), 8, ["SEC001", "run.yaml", "1 MiB", "Fix"]),
    ("06 NUL in a value", "sft", b'run_dir: "a\\0b"\n', 2, ["CFG002", "run.yaml:1:10", "\\x00"]),
]  # fmt: skip


@pytest.mark.parametrize(("name", "stage", "content", "code", "wanted"), WHOLE, ids=[case[0] for case in WHOLE])
def test_a_file_that_is_no_config(rlhf, name, stage, content, code, wanted):
    if content == Path():
        Path("run.yaml").mkdir()
    elif content is not None:
        Path("run.yaml").write_bytes(content)
    by_stage_and_check(rlhf, stage, code, *wanted)
    assert not Path("evil").exists()


SETTINGS = [
    ("06 unknown key", "sft", {"learning_rte": 1}, ["CFG001", "run.yaml:7:1 learning_rte", "unknown key"]),
    ("06 unknown key, near one", "sft", {"optim": "{learning_rte: 1}"},
     ["CFG001", "run.yaml:7:9 optim.learning_rte", "Fix: did you mean 'optim.learning_rate'?"]),
    ("13 wrong type", "sft", {"max_length": "many"},
     ["CFG003", "run.yaml:6:1 max_length", "integer, got 'many'", "Fix"]),
    ("14 text for a number", "sft", {"optim": "{learning_rate: fast}"},
     ["CFG003", "run.yaml:7:9 optim.learning_rate", "number, got 'fast'", "Fix"]),
    ("15 lr NaN", "sft", {"optim": "{learning_rate: .nan}"}, ["CFG003", "optim.learning_rate", "got nan"]),
    ("15 lr infinite", "ppo", {"optim": "{learning_rate: .inf}"}, ["CFG003", "optim.learning_rate", "got inf"]),
    ("16 lr negative", "train-rm", {"optim": "{learning_rate: -1e-3}"}, ["CFG003", "greater than 0, got -0.001"]),
    ("17 lr beyond 1", "sft", {"optim": "{learning_rate: 1e6}"}, ["CFG003", "less than or equal to 1, got 1000000.0"]),
    ("18 batch_size 0", "sft", {"batch": "{batch_size: 0}"},
     ["CFG003", "run.yaml:7:9 batch.batch_size", "greater than or equal to 1, got 0"]),
    ("18 micro_batch_size 0", "ppo", {"batch": "{micro_batch_size: 0}"}, ["CFG003", "batch.micro_batch_size"]),
    ("20 epochs -2", "sft", {"epochs": -2}, ["CFG003", "run.yaml:6:1 epochs", "greater than 0, got -2"]),
    ("20 steps 0", "ppo", {"steps": 0}, ["CFG003", "run.yaml:6:1 steps", "greater than or equal to 1, got 0"]),
    ("20 neither epochs nor steps", "train-rm", {"epochs": None}, ["CFG007", "run.yaml", "one of epochs and steps"]),
    ("21 max_length 0", "sft", {"max_length": 0}, ["CFG003", "max_length", "greater than or equal to 8, got 0"]),
    ("21 max_length -5", "eval-rm", {"max_length": -5}, ["CFG003", "max_length", "greater than or equal to 8, got -5"]),
    ("23 rank 0", "sft", {"lora": "{r: 0}"}, ["CFG003", "lora.r", "greater than or equal to 1, got 0"]),
    ("23 rank -4", "sft", {"lora": "{r: -4}"}, ["CFG003", "lora.r", "got -4"]),
    ("23 alpha 0", "sft", {"lora": "{alpha: 0}"}, ["CFG003", "lora.alpha", "greater than 0, got 0"]),
    ("23 dropout 1.5", "sft", {"lora": "{dropout: 1.5}"}, ["CFG003", "lora.dropout", "less than 1, got 1.5"]),
    ("25 KL negative", "ppo", {"kl": "{coef: -0.1}"},
     ["CFG003", "run.yaml:7:6 kl.coef", "greater than or equal to 0, got -0.1"]),
    ("26 clip 0", "ppo", {"update": "{clip_range: 0}"}, ["CFG003", "update.clip_range", "greater than 0, got 0"]),
    ("26 clip 2", "ppo", {"update": "{clip_range: 2}"}, ["CFG003", "update.clip_range", "less than 1, got 2"]),
    ("27 gamma 1.2", "ppo", {"update": "{gamma: 1.2}"}, ["CFG003", "update.gamma", "less than or equal to 1, got 1.2"]),
    ("27 lambda -1", "ppo", {"update": "{lam: -1}"}, ["CFG003", "update.lam", "greater than or equal to 0, got -1"]),
    ("28 minibatch", "ppo", {"batch": "{batch_size: 64, minibatch_size: 48}"},
     ["CFG007", "run.yaml:7:1 batch", "minibatch_size 48 does not divide batch_size 64; 16 does"]),
    ("28 micro-batch", "sft", {"batch": "{batch_size: 16, micro_batch_size: 12}"},
     ["CFG007", "run.yaml", "batch.micro_batch_size 12 does not divide batch.batch_size 16; 4 does"]),
    ("28 samples_per_prompt", "ppo", {"samples_per_prompt": 7},
     ["CFG007", "run.yaml", "samples_per_prompt 7 does not divide batch.batch_size 64"]),
    ("30 temperature 0", "ppo", {"sampling": "{temperature: 0}"},
     ["CFG003", "sampling.temperature", "greater than 0, got 0"]),
    ("30 top_p", "ppo", {"sampling": "{top_p: 0}"},
     ["CFG001", "sampling.top_p", "unknown key", "Fix: known keys here"]),
    ("31 save_every 0", "ppo", {"save_every": 0}, ["CFG003", "save_every", "greater than or equal to 1, got 0"]),
    ("32 keep one", "ppo", {"keep_checkpoints": 1}, ["CFG003", "keep_checkpoints", "equal to 2, got 1"]),
    ("81 an unknown logger", "sft", {"report_to": "comet"}, ["CFG003", "report_to", "'none', 'tensorboard'"]),
    ("33 seed -1", "collect", {"seed": -1}, ["CFG003", "seed", "greater than or equal to 0, got -1"]),
    ("33 seed 2^70", "sft", {"seed": 2**70}, ["CFG003", "seed", "less than 4294967296"]),
    ("33 seed text", "sft", {"seed": "abc"}, ["CFG003", "seed", "integer, got 'abc'", "Fix"]),
    ("33 seed of 5000 digits", "sft", {"seed": "9" * 5000}, ["CFG003", "run.yaml:7:1 seed"]),
    ("34 warm-up beyond the steps", "sft", {"optim": "{learning_rate: 1e-4, warmup_ratio: 1.5}"},
     ["CFG003", "optim.warmup_ratio", "less than or equal to 1, got 1.5"]),
    ("36 variable", "sft", {"run_dir": "${OUT}/sft"},
     ["CFG011", "run.yaml:6:1 run_dir", "${OUT} is not filled in", "Fix: write the value"]),
    ("36 variable in a list", "ppo", {"rewards": "[{run: 'runs/${RM}'}]"}, ["CFG011", "rewards.0.run", "${RM}"]),
    ("63 remote code without a revision", "sft", {"model": "{path: m, trust_remote_code: true}"},
     ["SEC004", "model.trust_remote_code", "Fix: set revision to a commit"]),
]  # fmt: skip


@pytest.mark.parametrize(("name", "stage", "values", "wanted"), SETTINGS, ids=[case[0] for case in SETTINGS])
def test_a_setting_that_cannot_be(rlhf, name, stage, values, wanted):
    Path("run.yaml").write_text(changed(stage, **values))
    by_stage_and_check(rlhf, stage, 8 if wanted[0].startswith("SEC") else 2, *wanted)


def test_06_a_key_that_no_file_can_hold_on_the_command_line(rlhf):
    refused(rlhf("check", "sft.yaml", "--set", "data.columns.\ud800=x"), 2, "CFG005", "\\ud800", "no text can hold")


def test_06_more_than_twenty_mistakes_are_cut_with_their_number(rlhf):
    Path("run.yaml").write_text(CONFIGS["sft"] + "".join(f"key{number}: 1\n" for number in range(30)))
    assert by_stage_and_check(rlhf, "sft", 2, "CFG001", "run.yaml:7:1 key0").endswith("... and 10 more\n")


BOM = b"\xef\xbb\xbf"
ROWS = {"sft": demonstration, "train-rm": pair, "ppo": lambda number: {"prompt": f"p{number}"}}
FILES = {"sft": "train.jsonl", "train-rm": "pairs.jsonl", "ppo": "prompts.jsonl"}
U, A = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
GZIP, PARQUET, ZIP = b"\x1f\x8b\x08\x00" + b"\0" * 20, b"PAR1" + b"\0" * 20 + b"PAR1", b"PK\x03\x04" + b"\0" * 20

FILES_THAT_ARE_NO_DATA = [
    ("37 missing", None, ["DAT010", "train.jsonl: no such file", "Fix: check the path"]),
    ("37 directory", Path(), ["DAT010", "train.jsonl: is a directory"]),
    ("38 no bytes", b"", ["DAT013", "train.jsonl: no rows"]),
    ("39 blank lines", b"\n \n\n", ["DAT013", "train.jsonl: no rows", "blank lines skipped: 3"]),
    ("39 a byte order mark", BOM, ["DAT013", "train.jsonl: no rows"]),
    ("57 gzip", GZIP, ["DAT010", "train.jsonl: looks like gzip, not JSONL", "Fix"]),
    ("57 parquet", PARQUET, ["DAT010", "train.jsonl: looks like parquet, not JSONL", "Fix"]),
    ("57 zip", ZIP, ["DAT010", "train.jsonl: looks like zip, not JSONL", "Fix"]),
    ("57 csv", b"prompt,completion\na,b\n",
     ["DAT011", "train.jsonl:1", "invalid JSON at column 1", "It begins: 'prompt,completion'"]),
]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "content", "wanted"), FILES_THAT_ARE_NO_DATA, ids=[case[0] for case in FILES_THAT_ARE_NO_DATA]
)
def test_a_file_that_is_no_data(rlhf, name, content, wanted):
    shutil.copy("sft.yaml", "run.yaml")
    Path("train.jsonl").unlink()
    if content == Path():
        Path("train.jsonl").mkdir()
    elif content is not None:
        Path("train.jsonl").write_bytes(content)
    by_stage_and_check(rlhf, "sft", 3, *wanted)


ONE_ROW = [  # each stands in line 573 of otherwise sound data
    ("40 broken JSON", "sft", b'{"prompt": "a b',
     ["DAT011", "invalid JSON at column 12", "It begins:"], "a broken line"),
    ("41 not UTF-8", "sft", b'{"prompt": "\xe9"}',
     ["DAT011", "byte 0xe9 at byte 13 is not UTF-8"], "bytes that are not UTF-8"),
    ("42 key twice", "ppo", b'{"prompt": "a", "prompt": "b"}',
     ["DAT011", "key 'prompt' stands twice"], "a broken line"),
    ("43 list", "sft", b"[1]", ["DAT011", "need an object, got list"], "a broken line"),
    ("43 number", "ppo", b"7", ["DAT011", "need an object, got int"], "a broken line"),
    ("45 a field missing", "sft", {"prompt": "a"},
     ["DAT004", "'completion': missing (this row has: prompt)"], "a missing field"),
    ("46 null", "sft", {"prompt": None, "completion": "a"},
     ["DAT004", "'prompt': need text, got null"], "a value that does not fit its field"),
    ("46 number", "train-rm", {**pair(1), "chosen": 3},
     ["DAT004", "'chosen': need text, got int"], "a value that does not fit its field"),
    ("47 empty completion", "sft", {"prompt": "a", "completion": ""},
     ["DAT004", "'completion': empty"], "an empty answer"),
    ("47 blank chosen", "train-rm", {**pair(1), "chosen": " \n"}, ["DAT004", "'chosen': empty"], "an empty answer"),
    ("48 chosen is rejected", "train-rm", {**pair(1), "rejected": "c1"},
     ["DAT012", "'chosen' equals 'rejected'"], "equal responses"),
    ("49 other prompts", "train-rm", {"chosen": [U, A], "rejected": [{**U, "content": "z"}, A]},
     ["DAT004", "'rejected'", "one conversation with 'chosen' up to"], "no shared prompt"),
    ("52 unknown role", "sft", {"messages": [U, A, {**U, "role": "bot"}]},
     ["DAT004", "'messages[2].role': need system, user or assistant, got 'bot'"], "an unknown speaker"),
    ("52 two systems", "sft", {"messages": [U, {**U, "role": "system"}, U, A]},
     ["DAT004", "'messages[1].role'", "must alternate"], "turns out of order"),
    ("52 no assistant", "sft", {"messages": [U]},
     ["DAT004", "'messages'", "must end with a turn of the assistant"], "turns out of order"),
    ("56 lone surrogate", "ppo", b'{"prompt": "\\ud800"}',
     ["DAT004", "'prompt'", "surrogate"], "a NUL or half a character"),
    ("56 NUL", "ppo", b'{"prompt": "a\\u0000b"}', ["DAT004", "'prompt'", "NUL"], "a NUL or half a character"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "stage", "row", "wanted", "reason"), ONE_ROW, ids=[case[0] for case in ONE_ROW])
def test_a_broken_row_is_dropped_and_counted_or_refused_by_its_line(rlhf, name, stage, row, wanted, reason):
    key = "prompts" if stage == "ppo" else "data"
    settings = f"{{path: {FILES[stage]}, on_bad_row: error{', max_tokens: 64' if stage == 'ppo' else ''}}}"
    Path("run.yaml").write_text(changed(stage, **{key: settings}))
    rows = [ROWS[stage](number) for number in range(600)]
    rows[572] = row
    Path(FILES[stage]).write_bytes(lines(rows))
    text = by_stage_and_check(rlhf, stage, 3, *wanted, f"{FILES[stage]}:573: ", "Fix: ", "on_bad_row: drop leaves it")
    assert text.count("error[") == 1
    code, text = rlhf("check", f"{stage}.yaml")
    assert code == 0 and f"{key}: 599 rows" in text
    assert f"{key}: 1 of 600 rows dropped: 1 with {reason} (first: {FILES[stage]}:573)." in text


def test_55_a_very_long_line_is_never_dropped(rlhf):
    shutil.copy("ppo.yaml", "run.yaml")
    line = b'{"prompt": "' + b"x" * (17 << 20) + b'"}'
    Path("prompts.jsonl").write_bytes(lines([{"prompt": "p"}] * 572 + [line]))
    by_stage_and_check(rlhf, "ppo", 3, "DAT011", "prompts.jsonl:573: ", "longer than 16 MiB", "Fix: cut the line")


def test_39_a_byte_order_mark_before_rows_is_accepted_and_blank_lines_are_counted(rlhf):
    Path("train.jsonl").write_bytes(BOM + b"\n" + Path("train.jsonl").read_bytes() + b"\n\n")
    code, text = rlhf("check", "sft.yaml")
    assert code == 0 and "data: 40 rows" in text and "blank lines skipped: 3" in text


def test_44_a_field_that_no_row_has_is_one_message_with_the_fields_that_there_are(rlhf):
    shutil.copy("train-rm.yaml", "run.yaml")
    Path("pairs.jsonl").write_bytes(lines({"prompt": "p", "chosen": f"c{number}"} for number in range(9)))
    text = by_stage_and_check(rlhf, "train-rm", 3, "DAT004", "pairs.jsonl: all 9 rows", "'rejected'", "Fix: columns")
    assert "prompt, chosen" in text and text.count("error[") == 1


def test_47_every_empty_row_is_named(rlhf):
    shutil.copy("sft.yaml", "run.yaml")
    rows = [demonstration(number) | ({"completion": ""} if number % 2 else {}) for number in range(60)]
    Path("train.jsonl").write_bytes(lines(rows))
    by_stage_and_check(
        rlhf,
        "sft",
        3,
        "DAT020",
        "30 of 60 rows (50.0%) would be dropped: 30 with an empty answer (first: ",
        "train.jsonl:2)",
        "on_bad_row: error names each",
        "max_dropped_fraction: 0.5 (now 0.05)",
    )
    Path("run.yaml").write_text(changed("sft", data="{path: train.jsonl, on_bad_row: error}"))
    text = by_stage_and_check(rlhf, "sft", 3, "DAT004", "train.jsonl:2: 'completion': empty", "... and 10 more")
    assert text.count("error[") == 20


def test_48_pairs_that_are_all_equal_are_one_message(rlhf):
    shutil.copy("train-rm.yaml", "run.yaml")
    Path("pairs.jsonl").write_bytes(lines({**pair(number), "rejected": f"c{number}"} for number in range(20)))
    by_stage_and_check(rlhf, "train-rm", 3, "DAT012", "pairs.jsonl: all 20 rows", "Fix: responses that differ")


def test_51_more_equal_pairs_than_may_be_dropped(rlhf):
    Path("run.yaml").write_text(changed("train-rm", data="{path: pairs.jsonl}"))
    rows = [pair(number) | ({"rejected": f"c{number}"} if number % 2 else {}) for number in range(20)]
    Path("pairs.jsonl").write_bytes(lines(rows))
    by_stage_and_check(rlhf, "train-rm", 3, "DAT020", "10 of 20 rows (50.0%) would be dropped", "Fix", "max_dropped")


def by_stage_and_dry_run(rlhf, stage, exit_code, *wanted):
    """What takes a tokenizer to see: the stage and its ``--dry-run`` say the same."""
    command = [stage, "-c", "run.yaml"]
    said = refused(rlhf(*command, "--dry-run"), exit_code, *wanted)
    assert said in refused(rlhf(*command), exit_code, *wanted)
    return said


LONG = "x" * 90
TOKENISED = [
    ("22 max_length beyond the context", "sft", {"max_length": 100_000}, None, 4,
     ["MOD022", "max_length: 100000 tokens", "context of 128", "Fix: 128 or less"]),
    ("22 max_length beyond the context", "train-rm", {"max_length": 129}, None, 4, ["MOD022", "max_length: 129"]),
    ("22 max_length beyond the context", "eval-rm", {"max_length": 129}, None, 4, ["MOD022", "max_length: 129"]),
    ("50 all too long", "sft", {}, [{"prompt": f"{n}" + LONG, "completion": "a"} for n in range(9)], 3,
     ["DAT051", "train.jsonl", "rows are longer than 96 tokens (median 112", "Fix: a larger max_length"]),
    ("50 all too long", "train-rm", {}, [{**pair(n), "chosen": LONG} for n in range(9)], 3,
     ["DAT051", "pairs.jsonl", "longer than 96 tokens", "Fix: a larger max_length (now 96, the base has room for 128"]),
    ("50 all too long", "ppo", {}, [{"prompt": f"{n}" + LONG} for n in range(9)], 3,
     ["DAT051", "prompts", "longer than 64 tokens", "Fix"]),
    ("51 half too long", "sft", {},
     [{"prompt": f"p{n}", "completion": LONG if n % 2 else "a"} for n in range(100)], 3,
     ["DAT020", "50 of 100 rows (50.0%) would be dropped: 50 with too many tokens (first: train.jsonl:2)",
      "Fix: a larger max_length (now 96, the base has room for 128), too_long: truncate, or max_dropped_fraction"]),
    ("53 nothing to hold out", "sft", {}, [demonstration(1)] * 3, 3, ["DAT030", "1 distinct prompt", "Fix"]),
    ("56 control token", "sft", {}, [*map(demonstration, range(8)), {"prompt": "stop <|im_end|>", "completion": "a"}],
     3, ["DAT020", "1 of 9 rows (11.1%)", "1 with a special token in the text (first: train.jsonl:9)", "Fix"]),
    ("56 control token", "train-rm", {}, [*map(pair, range(8)), {**pair(9), "rejected": "a<|im_start|>b"}], 3,
     ["DAT020", "1 with a special token in the text (first: pairs.jsonl:9)", "Fix"]),
    ("56 control token", "ppo", {}, [*({"prompt": f"p{n}"} for n in range(8)), {"prompt": "<|endoftext|>"}], 3,
     ["DAT020", "1 with a special token in the text (first: prompts.jsonl:9)", "Fix"]),
]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "stage", "values", "rows", "code", "wanted"), TOKENISED, ids=[f"{c[0]}, {c[1]}" for c in TOKENISED]
)
def test_rows_that_do_not_fit_the_model(rlhf, name, stage, values, rows, code, wanted):
    Path("run.yaml").write_text(
        changed(stage, holdout_fraction=0.0001, **values) if stage in ("sft", "train-rm") else changed(stage, **values)
    )
    if rows:
        Path(FILES[stage]).write_bytes(lines(rows))
    by_stage_and_dry_run(rlhf, stage, code, *wanted)


@pytest.mark.parametrize("stage", ["sft", "train-rm", "ppo", "collect"])
def test_29_a_response_that_does_not_fit_behind_its_prompt(rlhf, stage):
    batch = {"batch": "{batch_size: 8, minibatch_size: 8}"} if stage == "ppo" else {}
    Path("run.yaml").write_text(changed(stage, sampling="{max_new_tokens: 120}", **batch))
    by_stage_and_dry_run(rlhf, stage, 4, "MOD022", "sampling.max_new_tokens: ", "120 tokens", "context", "Fix")


def test_30_sampling_that_cannot_be_on_the_command_line(rlhf):
    for option in ("--top-p 0", "--top-p nan", "--temperature nan", "--temperature inf", "--max-new-tokens 0"):
        outcome = rlhf("generate", "runs/sft", "--prompts", "prompts.jsonl", *option.split())
        refused(outcome, 2, "CFG000", option.split()[0], "Fix")
    outcome = rlhf("generate", "runs/sft", "--prompts", "prompts.jsonl", "--max-new-tokens", 128)
    refused(outcome, 4, "MOD022", "--max-new-tokens: prompt 1 + response 128 tokens exceed", "Fix")


@pytest.mark.parametrize("stage", ["sft", "train-rm", "ppo"])
def test_53_fewer_rows_than_a_batch(rlhf, stage):
    batch = "{batch_size: 64, minibatch_size: 64}" if stage == "ppo" else "{batch_size: 64, micro_batch_size: 8}"
    Path("run.yaml").write_text(changed(stage, batch=batch))
    by_stage_and_dry_run(rlhf, stage, 3, "DAT052", "fewer than the 64 that a batch takes", "Fix: more rows")


def test_54_prompts_to_train_and_to_measure_on_that_are_the_same_are_counted(rlhf):
    Path("other.jsonl").write_bytes(lines({"prompt": f"p{number}"} for number in range(37, 60)))
    code, text = rlhf("check", "ppo.yaml", "--set", "evaluation.data.path=other.jsonl")
    assert code == 0 and "evaluation.data: 3 of its prompts are trained on." in text
    edit(
        "runs/train-rm/manifest.json",
        identity={"data.rows": sources.load_comparisons(sources.DataSection(path="pairs.jsonl")).digest},
    )
    code, text = rlhf("check", "eval-rm.yaml")
    assert code == 0 and "data: the very rows that the reward model was trained on." in text


def test_56_a_control_token_in_what_is_scored(rlhf):
    Path("bad.jsonl").write_bytes(lines([demonstration(1), {"prompt": "<|im_end|>", "completion": "a"}]))
    refused(rlhf("score", "runs/train-rm", "--in", "bad.jsonl"), 3, "DAT060", "bad.jsonl:2: a user turn", "Fix")


@pytest.mark.parametrize(
    ("path", "exit_code", "code"), [("./no/such/model", 4, "MOD001"), ("../../nowhere", 8, "SEC006")]
)
def test_59_a_path_that_is_no_hub_id_either_is_seen_by_check(rlhf, path, exit_code, code):
    Path("run.yaml").write_text(changed("sft", model=f"{{path: {path}}}"))
    by_stage_and_check(rlhf, "sft", exit_code, code, f"model.path: {path}: no such path, and no hub id", "Fix")


def test_56_a_mark_of_the_template_is_refused_in_text_though_it_is_no_special_token():
    tokenizer = tiny.tokenizer("{% for m in messages %}<turn>{{ m['content'] }}<|im_end|>{% endfor %}")
    tokenizer.add_tokens(["<turn>", "<other>", " "])
    chat = ChatFormat(tokenizer)
    records = [Prompt((Message("user", text),), f"d.jsonl:{n}") for n, text in enumerate(["a <other> b", "a<turn>b"])]
    with pytest.raises(RlhfError, match="DAT060.*d.jsonl:1: a user turn contains the special token '<turn>'") as caught:
        tokenised.prompt_rows(records, chat, Limit(100), DroppedRows("prompts", 0.0, False))
    assert len(caught.value.problems) == 1


def test_58_data_that_changes_while_it_is_read(rlhf, monkeypatch):
    read = files.jsonl.read

    def read_and_append(path, *rest):
        for row in read(path, *rest):
            yield row
            path.write_bytes(path.read_bytes() + b"\n")

    shutil.copy("sft.yaml", "run.yaml")
    monkeypatch.setattr(files.jsonl, "read", read_and_append)
    rows = Path("train.jsonl").read_bytes()
    refused(rlhf("check", "run.yaml", "--stage", "sft"), 3, "DAT014", "train.jsonl: changed while it was read", "Fix")
    Path("train.jsonl").write_bytes(rows)
    refused(rlhf("sft", "-c", "run.yaml"), 3, "DAT014", "train.jsonl: changed while it was read", "Fix")


def edit(path, **changes):
    value = json.loads(Path(path).read_text("utf-8"))
    Path(path).write_text(json.dumps(value | changes), "utf-8")


def shorten(path, size):
    Path(path).write_bytes(Path(path).read_bytes()[:size])


def only_pickle():
    Path("m/model.safetensors").rename("m/pytorch_model.bin")


def remote_code():
    edit("m/config.json", model_type="own", auto_map={"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.Model"})
    Path("m/own.py").write_text("open('evil', 'w')\n")


def two_shards(kept):
    weights = load_file("m/model.safetensors")
    names = {name: f"model-0000{1 + index % 2}-of-00002.safetensors" for index, name in enumerate(sorted(weights))}
    for file in set(names.values()):
        shard = {name: weights[name] for name in weights if names[name] == file}
        save_file(shard, f"m/{file}", metadata={"format": "pt"})
    Path("m/model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}))
    Path("m/model.safetensors").unlink()
    if kept:
        shorten("m/model-00002-of-00002.safetensors", kept)
    else:
        Path("m/model-00002-of-00002.safetensors").unlink()


def broken_weights(value):
    weights = load_file("m/model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][0, :12] = value
    save_file(weights, "m/model.safetensors", metadata={"format": "pt"})


def another_tokenizer(tokenizer):
    for name in ("chat_template.jinja", "tokenizer.json", "tokenizer_config.json"):
        Path("m", name).unlink(missing_ok=True)
    tokenizer.save_pretrained("m")


def more_tokens():
    tokenizer = tiny.tokenizer()
    tokenizer.add_tokens(["<one>", "<two>"])
    another_tokenizer(tokenizer)


def without_eos():
    tokenizer = tiny.tokenizer(None)
    tokenizer.eos_token = None
    another_tokenizer(tokenizer)


def encoder_of_two_labels():
    edit("m/config.json", architectures=["LlamaForSequenceClassification"], tie_word_embeddings=False)


MODELS = [
    ("24 LoRA targets", lambda: None, {"lora": "{target_modules: [q_prj]}"}, 4,
     ["MOD030", "lora.target_modules", "q_prj match no linear layer; there are", "q_proj"]),
    ("24 unknown token", lambda: None, {"lora": "{train_tokens: ['<no>']}"}, 4,
     ["MOD031", "lora.train_tokens", "'<no>'", "Fix"]),
    ("59 missing", lambda: None, {"model": "{path: ./no/such/model}"}, 4,
     ["MOD001", "./no/such/model: no such path, and no hub id", "Fix: check the path"]),
    ("60 hub id, offline", lambda: None, {"model": "{path: org/nothing}"}, 4,
     ["MOD001", "org/nothing", "not in the cache, and HF_HUB_OFFLINE is set", "Fix: unset HF_HUB_OFFLINE"]),
    ("61 parent directories", lambda: None, {"model": "{path: ../../nowhere}"}, 8,
     ["SEC006", "../../nowhere: no such path, and no hub id: it has the part '..'", "Fix"]),
    ("61 a directory without a model", lambda: None, {"model": "{path: ../home/runs}"}, 4,
     ["MOD001", "model.path: ../home/runs", "no config.json", "Fix"]),
    ("62 only pickle", only_pickle, {}, 8,
     ["SEC005", "m: has only pickle weights", "Fix: a revision with safetensors"]),
    ("63 remote code", remote_code, {}, 8,
     ["SEC007", "needs Python code of its own", "model.trust_remote_code: true with model.revision"]),
    ("64 cut off", lambda: shorten("m/model.safetensors", 9_000), {}, 4,
     ["MOD006", "m: model.safetensors: 9,000 bytes, but its header says", "Fix"]),
    ("64 cut off in the header", lambda: shorten("m/model.safetensors", 100), {}, 4,
     ["MOD006", "m: model.safetensors: no whole safetensors header in 100 bytes", "Fix"]),
    ("64 no bytes", lambda: shorten("m/model.safetensors", 0), {}, 4,
     ["MOD006", "m: model.safetensors: no whole safetensors header in 0 bytes"]),
    ("64 no safetensors", lambda: Path("m/model.safetensors").write_bytes(b"\4" + b"\0" * 7 + b"oops"), {}, 4,
     ["MOD006", "m: model.safetensors: its header is not readable", "Fix"]),
    ("64 a shard cut off", lambda: two_shards(9_000), {}, 4,
     ["MOD006", "m: model-00002-of-00002.safetensors: 9,000 bytes, but its header says", "Fix"]),
    ("64 a shard missing", lambda: two_shards(0), {}, 4,
     ["MOD006", "m: model-00002-of-00002.safetensors: missing", "Fix"]),
    ("64 no weights", lambda: Path("m/model.safetensors").unlink(), {}, 4, ["MOD001", "m: has neither"]),
    ("64 broken config", lambda: Path("m/config.json").write_text("{"), {}, 4,
     ["MOD001", "m: the tokenizer cannot be"]),
    ("64 broken tokenizer", lambda: Path("m/tokenizer.json").write_text("{"), {}, 4,
     ["MOD001", "m: the tokenizer cannot be loaded", "Fix"]),
    ("65 NaN", lambda: broken_weights(float("nan")), {}, 4,
     ["MOD008", "m: 12 weights are NaN or infinite: 12 in model.layers.1.mlp.up_proj.weight", "Fix"]),
    ("65 infinite", lambda: broken_weights(float("-inf")), {}, 4, ["MOD008", "m: 12 weights are NaN or infinite"]),
    ("66 more tokens than embeddings", more_tokens, {}, 4,
     ["MOD003", "m: the tokenizer has 262 tokens, the embeddings 260 rows", "Fix: the tokenizer that belongs"]),
    ("68 no template", lambda: another_tokenizer(tiny.tokenizer(None)), {}, 4,
     ["MOD010", "tokenizer: has no chat template", "Fix: model.chat_template: one of chatml, plain"]),
    ("68 a template beside the model's own", lambda: None, {"model": "{path: m, chat_template: plain}"}, 4,
     ["MOD010", "model.chat_template", "has a chat template of its own", "Fix"]),
    ("68 no end token", without_eos, {"model": "{path: m, chat_template: plain}"}, 4,
     ["MOD010", "chat template", "Fix"]),
    ("70 a classifier as the base", encoder_of_two_labels, {}, 4, ["MOD005", "m: lacks 1 weights: lm_head.weight"]),
]  # fmt: skip


@pytest.mark.parametrize(("name", "damage", "values", "code", "wanted"), MODELS, ids=[case[0] for case in MODELS])
def test_a_model_that_cannot_be_used(rlhf, name, damage, values, code, wanted):
    Path("run.yaml").write_text(changed("sft", **values))
    damage()
    refused(rlhf("sft", "-c", "run.yaml"), code, *wanted)
    assert not Path("evil").exists()


def test_67_a_tokenizer_without_pad_is_told_once_and_padding_is_the_end_token(rlhf):
    another_tokenizer(tiny.tokenizer(pad=None))
    code, text = rlhf("sft", "-c", "sft.yaml", "--dry-run")
    assert code == 0 and text.count("The tokenizer of m has no pad token: rows are padded with the end token") == 1
    chat = open_base.open_chat(open_base.model_of(artifacts.read("runs/sft")))
    assert chat.pad_id == chat.end_id


def test_70_a_reward_that_is_no_reward_run(rlhf):
    for run, wanted in (
        ("runs/sft", ["CKP004", "rewards.0: runs/sft: is a policy run", "needed: reward"]),
        ("m", ["CKP002", "rewards.0: m: unfinished", "Fix"]),
        ("runs/none", ["CKP001", "rewards.0: runs/none: no such run", "Fix"]),
    ):
        refused(rlhf("ppo", "-c", "ppo.yaml", f"rewards.0.run={run}"), 5, *wanted)
    refused(rlhf("eval-rm", "-c", "eval-rm.yaml", "reward=runs/sft"), 5, "CKP004", "reward: runs/sft")
    refused(rlhf("score", "runs/sft", "--in", "train.jsonl"), 5, "CKP004", "runs/sft: is a policy run")
    refused(rlhf("generate", "runs/train-rm", "--prompts", "prompts.jsonl"), 5, "CKP004", "needed: policy")


@pytest.mark.parametrize("name", ["head.safetensors", "head.json"])
def test_70_a_reward_run_that_lost_its_head(rlhf, name):
    Path("runs/train-rm/head", name).unlink()
    wanted = ["CKP005", f"runs/train-rm/head/{name}: missing, though the manifest lists it", "Fix"]
    for command in ("ppo -c ppo.yaml", "check ppo.yaml", "score runs/train-rm --in train.jsonl"):
        refused(rlhf(*command.split()), 5, *wanted)


def test_71_a_reward_run_on_another_base_that_is_not_what_it_was_made_on(rlhf):
    manifest = json.loads(Path("runs/train-rm/manifest.json").read_text())
    edit("runs/train-rm/manifest.json", base=manifest["base"] | {"digest": "0" * 64})
    for command in (["ppo", "-c", "ppo.yaml"], ["check", "ppo.yaml"]):
        refused(rlhf(*command), 4, "MOD020", "rewards.0: m is not the base of this run: digest", "Fix")
    edit("runs/train-rm/manifest.json", base=manifest["base"] | {"digest": "0" * 64, "source": "elsewhere"})
    code, text = rlhf("check", "ppo.yaml")
    assert code == 0 and "rewards.0: its base elsewhere is not a local directory, taken for a hub id" in text


def test_71_a_base_that_changed_under_a_finished_run(rlhf):
    broken_weights(0.5)
    for stage in ("train-rm", "ppo", "collect", "eval-rm"):
        outcome = rlhf(stage, "-c", f"{stage}.yaml", f"run_dir=out/{stage}")
        refused(outcome, 4, "MOD020", "m: is not the base of this run: digest", "Fix: restore the model")
    for command in ("generate runs/sft --prompts prompts.jsonl", "score runs/train-rm --in train.jsonl"):
        refused(rlhf(*command.split()), 4, "MOD020", "m: is not the base of this run: digest")


SECRETS = [
    ("84 key", {"hf_token": "opensesame"}, [], ["SEC008", "run.yaml:7:1 hf_token"], "opensesame"),
    ("84 key below", {"model": "{path: m, api_key: opensesame}"}, [], ["SEC008", "model.api_key"], "opensesame"),
    ("84 value", {"model": f"{{path: m, revision: {TOKEN}}}"}, [], ["SEC008", "model.revision"], TOKEN),
    ("84 value in a list", {"lora": f"{{target_modules: [sk-{TOKEN}]}}"}, [], ["SEC008", "target_modules.0"], TOKEN),
    ("84 password in an address", {"run_dir": "s3://me:opensesame@host/x"}, [], ["SEC008", "run_dir"], "opensesame"),
    ("84 beside other mistakes", {"seed": "x", "wandb_token": "opensesame"}, [],
     ["SEC008", "wandb_token"], "opensesame"),
    ("84 key on the command line", {}, ["--set", "hf_token=opensesame"], ["SEC008", "--set hf_token"], "opensesame"),
    ("84 value on the command line", {}, ["--set", f"run_dir={TOKEN}"], ["SEC008", "--set run_dir=***"], TOKEN),
    ("84 as a key", {TOKEN: 1}, [], ["SEC008", "run.yaml:7:1 ***"], TOKEN),
]  # fmt: skip


@pytest.mark.parametrize(("name", "values", "options", "wanted", "secret"), SECRETS, ids=[case[0] for case in SECRETS])
def test_a_secret_is_refused_and_never_shown(rlhf, name, values, options, wanted, secret):
    Path("run.yaml").write_text(changed("sft", **values))
    for command in (["sft", "-c", "run.yaml"], ["check", "run.yaml", "--stage", "sft"]):
        assert secret not in refused(rlhf(*command, *options), 8, *wanted, "Fix: remove it", "HF_TOKEN")
        code, text = rlhf(*command, *options, "--json-errors")
        assert code == 8 and secret not in text and json.loads(text)["exit_code"] == 8
    assert not Path("out").exists()


def test_06_a_pipeline_names_the_mistakes_of_its_stages_before_any_starts(rlhf):
    Path("sft.yaml").write_text(changed("sft", stps=3))
    refused(rlhf("pipeline", "-c", "pipeline.yaml"), 2, "CFG001", "sft.yaml:7:1 stps: unknown key")
    Path("pipeline.yaml").write_text("stages:\n  - {stage: stf, config: sft.yaml}\n")
    refused(rlhf("pipeline", "-c", "pipeline.yaml"), 2, "CFG008", "pipeline.yaml", "no stage is called 'stf'", "Fix")
    refused(rlhf("pipeline", "-c", "none.yaml"), 2, "CFG001", "none.yaml: no such file", "Fix")


def test_38_data_of_generate_and_score_is_read_as_strictly(rlhf):
    Path("bad.jsonl").write_bytes(b'{"prompt": "a", "response": "b"}\n{"prompt": "a"')
    refused(rlhf("generate", "runs/sft", "--prompts", "bad.jsonl"), 3, "DAT011", "bad.jsonl:2: invalid JSON")
    refused(rlhf("score", "runs/train-rm", "--in", "bad.jsonl"), 3, "DAT011", "bad.jsonl:2: invalid JSON")
    refused(rlhf("generate", "runs/sft", "--prompts", "none.jsonl"), 3, "DAT010", "none.jsonl: no such file", "Fix")
    refused(rlhf("show", "m"), 5, "CKP001", "m: is not a run and holds none", "Fix")


def test_35_a_device_that_is_not_there(rlhf, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for stage in ("sft", "train-rm", "ppo", "collect", "eval-rm"):
        outcome = rlhf(stage, "-c", f"{stage}.yaml", "runtime.device=cuda", f"run_dir=out/{stage}")
        refused(outcome, 6, "RES001", "runtime.device: cuda is not available", "Fix: runtime.device: cpu")


def test_a_signal_that_a_library_turns_into_an_error_of_its_own_still_ends_the_run_as_a_signal(rlhf, monkeypatch):
    def converts(error):
        def app(**_):
            with contextlib.suppress(interrupts.Interrupted):
                interrupts._on_signal(2, None)
            raise error

        return app

    for error in (RuntimeError("empty mode stack"), RlhfError(Problem("MOD001", "m", "empty mode stack"))):
        monkeypatch.setattr(interrupts, "_received", None)
        monkeypatch.setattr(interrupts, "_raised", False)
        monkeypatch.setattr(cli, "app", converts(error))
        code, text = rlhf("sft")
        assert code == 130 and "Interrupted by SIGINT (" in text and "empty mode stack" in text
