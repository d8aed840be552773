"""No pickle is run, no name leads elsewhere, no secret is shown, and what a run needs is there before it computes."""

from __future__ import annotations

import ast
import io
import json
import logging
import os
import pickle
import re
import shutil
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest
from peft import get_peft_model
from tiny import ARCHITECTURES, base, lora
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from rlhf import cli, secrets
from rlhf.config import load, yaml_reader
from rlhf.config.sections import DataSection
from rlhf.config.stages import PpoConfig, SftConfig
from rlhf.data import hub, jsonl, sources
from rlhf.demo import catalogue as demo
from rlhf.errors import RlhfError
from rlhf.hub import connection, model_files, names
from rlhf.models import adapters, open_base
from rlhf.models.base import Loading, load_base, load_tokenizer
from rlhf.preflight import prepare, resources
from rlhf.runs import artifacts, progress, run_directory
from rlhf.runs.artifacts import BaseIdentity, Manifest
from rlhf.runs.identity import Identity
from rlhf.stages.registry import STAGES

ROOT = Path(__file__).parents[1]
ENVIRONMENT = {"HF_TOKEN": "kcanary-0123", "DB_PASSWORD": 'p"w\\ö rd/1', "SHORT_KEY": "abc", "EDITOR": "kcanary"}


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("the token kcanary-0123.", "the token ***."),
        ("got 'kcanary-0...'", "got '***...'"),
        (json.dumps({"what": ENVIRONMENT["DB_PASSWORD"]}), '{"what": "***"}'),
        (repr(ENVIRONMENT["DB_PASSWORD"]), "'***'"),
        ("p%22w%5C%C3%B6%20rd%2F1", "***"),
        ("abc, kcanary", "abc, kcanary"),
        ("https://user:pw@host/x", "https://***@host/x"),
        ("https://host:80/x?a=1&token=pw1&b=2", "https://host:80/x?a=1&token=***&b=2"),
        ("got 'https://user:pass...'", "got 'https://user:***...'"),
        ("--set hf_token=pw1 (hf_token)", "--set hf_token=*** (hf_token)"),
        ("{'api_key': 'pw 1'}", "{'api_key': '***'}"),
        ("Authorization: Bearer abcdefgh12", "Authorization: Bearer ***"),
        ("hf_" + "Ab1" * 8, "***"),
        ("run.yaml:3:1 hf_token: unknown key.", "run.yaml:3:1 hf_token: unknown key."),
        ("max_tokens=3 eval/end_token_rate: 0.9", "max_tokens=3 eval/end_token_rate: 0.9"),
        ("runs/sk-a-model-of-scikit-learn tokenizer: x", "runs/sk-a-model-of-scikit-learn tokenizer: x"),
    ],
)
def test_secrets_are_masked_however_they_are_written_and_nothing_else_is(text, shown):
    assert secrets.mask(text, ENVIRONMENT) == shown
    assert (secrets.holds_secret(text, ENVIRONMENT) is not None) == (text != shown) or "..." in text


def test_what_a_logger_writes_is_masked_with_arguments_and_tracebacks(monkeypatch):
    monkeypatch.setenv("MY_API_KEY", "kcanary-4567")
    stream, logger = io.StringIO(), logging.Logger("rlhf")
    logger.addHandler(logging.StreamHandler(stream))
    secrets.guard(logger)
    logger.addHandler(later := logging.StreamHandler(stream))
    later.setFormatter(logging.Formatter("%(levelname)s %(message)s"))
    try:
        raise ValueError("kcanary-4567")
    except ValueError:
        logger.exception("%s and %s", "kcanary-4567", {"a": "kcanary-4567"}, stack_info=True)
    shown = stream.getvalue()
    assert "kcanary" not in shown and shown.count("ValueError: ***") == 2 and shown.count("*** and {'a': '***'}") == 2


def test_every_module_logs_where_secrets_are_masked():
    for path in (ROOT / "rlhf").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in ("logging.getLogger", "getLogger"):
                assert ast.unparse(node) == "logging.getLogger('rlhf')", path


# No pickle


CHAIN = """
import json, os, pickle, sys
from collections import OrderedDict
from pathlib import Path

events, opened = [], []

def watch(event, arguments):
    if event == "pickle.find_class":
        events.append([str(part) for part in arguments])
    elif event == "open" and str(arguments[0]).endswith((".bin", ".pt", ".pth", ".pkl")):
        opened.append(str(arguments[0]))

pickle.loads(pickle.dumps(OrderedDict()))  # before the hook: not seen
sys.addaudithook(watch)

class Evil:
    def __reduce__(self):
        return os.system, (f"touch {Path('canary').absolute()}",)

def lie_about(*places):
    before = list(opened)
    names = ("pytorch_model.bin", "adapter_model.bin", "optimizer.pt", "training_args.bin", "rng.pth", "state.pkl")
    for place in places:
        Path(place).mkdir(parents=True, exist_ok=True)
        for name in names:
            (Path(place) / name).write_bytes(pickle.dumps(Evil()))
    opened[:] = before

from rlhf.runs import progress
from rlhf.cli import app
progress.log_to_console()
lie_about("model", ".", "runs/sft/checkpoints")
import datasets
rows = [json.loads(line) for line in Path("preferences.jsonl").read_text().splitlines()]
datasets.Dataset.from_list(rows).to_parquet("preferences.parquet")
del events[:], opened[:]
for stage in ("sft", "train-rm", "ppo"):
    app([stage, "-c", f"{stage}.yaml", "--overwrite"], standalone_mode=False)
    lie_about(*(f"runs/{stage}/{name}" for name in ("", "adapter", "head", "tokenizer", "checkpoints/step-1")))
seen = list(events)
pickle.loads(pickle.dumps(OrderedDict()))
Path("seen.json").write_text(json.dumps({"seen": seen, "opened": opened, "control": len(events) - len(seen)}))
"""
SHORT = {
    "sft": """
model: {path: model}
data: {path: 'demo:demonstrations?size=40'}
max_length: 256
steps: 1
save_every: 1
lora: {r: 4, train_tokens: ['<eos>']}
end_token_samples: 2
min_end_token_rate: 0.0
report_to: tensorboard
""",
    "train-rm": """
data: {path: preferences.parquet}
max_length: 256
steps: 1
save_every: 1
standardise_samples: 8
report_to: tensorboard
""",
    "ppo": """
prompts: {path: 'demo:prompts?size=20'}
steps: 1
save_every: 1
sampling: {max_new_tokens: 8}
batch: {batch_size: 4, minibatch_size: 4, micro_batch_size: 4}
value: {pretrain_steps: 1}
evaluation: {every: 1, num_prompts: 2}
""",
}
CANARIES = {
    "HF_TOKEN": "kcanary01abcdef", "HUGGING_FACE_HUB_TOKEN": "kcanary02abcdef", "WANDB_API_KEY": "kcanary03/a=b c",
    "AWS_SECRET_ACCESS_KEY": 'kcanary04"\\ü+x', "DB_PASSWORD": "kcanary05abcdef", "MY_SECRET": "kcanary06abcdef",
    "CI_JOB_TOKEN": "kcanary07abcdef",
}  # fmt: skip


def environment():
    return {**os.environ, **CANARIES, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def python(code, *args, cwd):
    command = [sys.executable, "-c", code, *args]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=environment(), check=False, timeout=120)


def demo_model(directory):
    return shutil.copytree(ROOT / "rlhf" / "demo" / "base", directory)


@pytest.fixture(scope="module")
def chain(tmp_path_factory):
    """A finished chain that was run among evil pickles, watched by an audit hook, with secrets in the environment."""
    home = tmp_path_factory.mktemp("watched")
    demo_model(home / "model")
    for stage, text in SHORT.items():
        (home / f"{stage}.yaml").write_text(text)
    rows = demo.rows("demo:preferences?size=20")
    (home / "preferences.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    done = python(CHAIN, cwd=home)
    (home / "shown.txt").write_text(done.stdout + done.stderr)
    assert done.returncode == 0, done.stderr
    return home


def test_a_chain_never_unpickles_and_never_opens_a_pickle_that_lies_about(chain):
    """No event is tolerated: torch, transformers, trl, peft and datasets raise none on this path."""
    found = json.loads((chain / "seen.json").read_text())
    assert found["control"] == 1, "the hook sees no unpickling, so that it proves nothing"
    assert found["seen"] == [] and found["opened"] == []
    assert not (chain / "canary").exists()
    assert {path.parent.name for path in chain.glob("runs/*/manifest.json")} == {"sft", "train-rm", "ppo"}


def test_the_package_has_no_way_to_read_or_write_a_pickle():
    modules = {"pickle", "_pickle", "cPickle", "cloudpickle", "dill", "joblib", "shelve", "marshal"}
    loaders = {"torch.load", "torch.save", "numpy.load", "np.load", "pandas.read_pickle", "pd.read_pickle"}
    for path in (ROOT / "rlhf").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Import):
                assert not {alias.name.split(".")[0] for alias in node.names} & modules, path
            if isinstance(node, ast.ImportFrom):
                assert (node.module or "").split(".")[0] not in modules, path
                assert not {f"{node.module}.{alias.name}" for alias in node.names} & loaders, path
            if isinstance(node, ast.Attribute):
                assert ast.unparse(node) not in loaders and node.attr not in ("read_pickle", "save_pickle"), path
            if isinstance(node, ast.keyword):
                assert node.arg not in ("weights_only", "allow_pickle"), path


class Evil:
    """Makes a file where it is unpickled."""

    def __init__(self, canary):
        self.canary = canary

    def __reduce__(self):
        return Path.touch, (self.canary,)


@pytest.fixture
def evil(tmp_path):
    canary = tmp_path / "canary"
    pickle.loads(pickle.dumps(Evil(canary)))
    assert canary.exists(), "this pickle is harmless, so that it proves nothing"
    canary.unlink()
    yield pickle.dumps(Evil(canary))
    assert not canary.exists()


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth", "model.ckpt"])
def test_a_model_with_only_pickle_weights_is_refused_before_and_while_loading(tmp_path, evil, name):
    directory = demo_model(tmp_path / "m")
    (directory / "model.safetensors").unlink()
    (directory / name).write_bytes(evil)
    for open_it in (lambda: prepare_sft(tmp_path, model={"path": str(directory)}), lambda: load_base(str(directory))):
        with pytest.raises(RlhfError, match="SEC005.*safetensors") as caught:
            open_it()
        assert caught.value.exit_code == 8


def test_an_adapter_with_only_pickle_weights_is_refused(tmp_path, evil):
    (tmp_path / "adapter_config.json").write_text("{}")
    (tmp_path / "adapter_model.bin").write_bytes(evil)
    with pytest.raises(RlhfError, match="SEC005.*adapter_model.bin"):
        adapters.read(tmp_path)


@pytest.mark.parametrize("name", ["rows.pkl", "rows.pickle", "rows.pt", "rows.bin", "rows.jsonl", "rows.parquet"])
def test_a_pickle_is_no_data_set(tmp_path, evil, name, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / name).write_bytes(evil)
    with pytest.raises(RlhfError, match="DAT0"):
        sources.load_prompts(DataSection(path=name))


def test_a_directory_of_pickles_is_no_data_set(tmp_path, evil):
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "train.pkl").write_bytes(evil)
    with pytest.raises(RlhfError, match="DAT010"):
        sources.load_prompts(DataSection(path=str(tmp_path / "d")))


def test_a_model_that_brings_code_is_refused(tmp_path):
    directory = demo_model(tmp_path / "m")
    config = json.loads((directory / "config.json").read_text())
    config |= {"model_type": "own", "auto_map": {"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.Model"}}
    (directory / "config.json").write_text(json.dumps(config))
    (directory / "own.py").write_text(f"open({str(tmp_path / 'canary')!r}, 'w')")
    with pytest.raises(RlhfError, match="SEC007") as caught:
        load_base(str(directory))
    assert caught.value.exit_code == 8 and not (tmp_path / "canary").exists()
    for revision in (None, "main", "abc1234"):
        with pytest.raises(RlhfError, match="SEC004"):
            load_base(str(directory), Loading(revision=revision, trust_remote_code=True))
        with pytest.raises(RlhfError, match="SEC004"):
            model = {"path": str(directory), "revision": revision, "trust_remote_code": True}
            prepare_sft(tmp_path, model=model)
    assert not (tmp_path / "canary").exists()


# Configs


@pytest.mark.parametrize(
    ("text", "code", "exit_code"),
    [
        ("run_dir: !!python/object/apply:os.system ['touch canary']", "SEC002", 8),
        ("a: &a [1]\nb: [" + "*a, " * 101 + "]", "SEC003", 8),
        ("a: &a [*a]", "SEC003", 8),
        ("[" * 5000, "SEC003", 8),
        ("#" * (1 << 20) + "\nsteps: 1", "SEC001", 8),
        ("hf_token: kcanary12", "SEC008", 8),
        ("data: {api_key: kcanary12}", "SEC008", 8),
        ("report_to: comet", "CFG003", 2),
    ],
)
def test_configs_that_attack_or_hold_secrets_are_refused(tmp_path, text, code, exit_code, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sft.yaml").write_text(text)
    problems = problems_of(lambda: load.load(SftConfig, tmp_path / "sft.yaml"))
    assert code in [problem.code for problem in problems] and not holds_canary(str(problems))
    assert not (tmp_path / "canary").exists()
    alone = [problem for problem in problems if problem.code == code]
    assert RlhfError(*alone).exit_code == exit_code


def test_evaluation_prompts_that_are_trained_on_are_counted(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    finished_run(tmp_path / "run")
    for name, numbers in {"a": range(10), "b": range(7, 12), "c": range(20, 22)}.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(f'{{"prompt": "p{number}"}}\n' for number in numbers))
    for evaluation, notes in {"b": ["evaluation.data: 3 of its prompts are trained on"], "c": []}.items():
        config = PpoConfig.model_validate(
            {
                "policy": "run",
                "rewards": [{"function": "a:b"}],
                "prompts": {"path": "a.jsonl"},
                "evaluation": {"data": {"path": f"{evaluation}.jsonl"}},
            }
        )
        assert prepare.prepare(config, STAGES["ppo"].needs(config)).notes() == notes


# Names


def prepare_sft(tmp_path, **settings):
    values = {"run_dir": str(tmp_path / "run"), "data": {"path": "demo:demonstrations?size=20"}, "steps": 1}
    config = SftConfig.model_validate(values | settings)
    return prepare.prepare(config, STAGES["sft"].needs(config))


TRAVERSALS = (
    "../../etc", "../up", "org/..", "org/../../etc", "a\0b", "\0", "%2e%2e/etc", "org/%2e%2e", "org%2fname",
    "\\\\host\\share", "..\\up", "org\\name", "a\nb", "org/na\x1bme",
)  # fmt: skip
NOT_THERE = (
    "/no/such/place", "//host/share/x", "a/b/c", "x" * 5000, "x/" * 3000, "org/", "/org", "org//name", "~/model",
    "https://huggingface.co/org/name", "file:///etc/passwd", "s3://bucket/x", "org/name@main", "org/name:1", " ",
    "\uff0e\uff0e/etc", "orgé/name", "./no/model", "C:/x",
)  # fmt: skip


@pytest.fixture
def nothing_is_opened(monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("a refused name was passed on")

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", refuse)
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", refuse)
    monkeypatch.setattr(hub, "read", refuse)
    monkeypatch.setattr(jsonl, "read", refuse)


@pytest.mark.parametrize(("name", "traverses"), [(n, True) for n in TRAVERSALS] + [(n, False) for n in NOT_THERE])
def test_a_name_that_is_neither_there_nor_a_hub_id_is_refused_unopened(
    tmp_path, monkeypatch, nothing_is_opened, name, traverses
):
    monkeypatch.chdir(tmp_path)
    for problems in (
        problems_of(lambda: prepare_sft(tmp_path, model={"path": name})),
        problems_of(lambda: load_tokenizer(name)),
        problems_of(lambda: load_base(name)),
    ):
        assert [problem.code for problem in problems] == ["SEC006" if traverses else "MOD001"]
    problems = problems_of(lambda: prepare_sft(tmp_path, data={"path": name}))
    assert [problem.code for problem in problems] == ["SEC006" if traverses else "DAT010"]
    assert RlhfError(*problems).exit_code == (8 if traverses else 3)
    assert str(problems[0]).isprintable() and len(str(problems[0])) < 400


def problems_of(action):
    with pytest.raises(RlhfError) as caught:
        action()
    return caught.value.problems


@pytest.mark.parametrize("name", ["org/name", "name", "org/name-v1.1_x", "a.b/c", "0x/1"])
def test_hub_ids_pass(name):
    assert names.refused(name, "model", "MOD001") is None


def test_existing_paths_pass_whatever_they_are_called(tmp_path, monkeypatch):
    (tmp_path / "odd name %2e").mkdir()
    (tmp_path / "below").mkdir()
    monkeypatch.chdir(tmp_path / "below")
    for name in ("../odd name %2e", str(tmp_path), "..", "."):
        assert names.refused(name, "model", "MOD001") is None


def test_a_mistyped_data_file_is_not_there_and_no_attack(tmp_path):
    problems = problems_of(lambda: prepare_sft(tmp_path, data={"path": "../data/no.jsonl"}))
    assert [problem.code for problem in problems] == ["DAT010"]


@pytest.mark.parametrize("revision", ["../../x", "a/../b", "%2e%2e", "a b", "", "a\0"])
def test_revisions_lead_nowhere_else(tmp_path, revision, nothing_is_opened):
    data = {"path": "demo:demonstrations?size=20", "revision": revision}
    settings = {"model": {"path": "org/name", "revision": revision}, "data": data}
    assert [p.code for p in problems_of(lambda: prepare_sft(tmp_path, **settings))] == ["SEC006", "SEC006"]
    assert problems_of(lambda: load_base("org/name", Loading(revision=revision)))[0].code == "SEC006"


def finished_run(run_dir):
    (run_dir / "adapter").mkdir(parents=True)
    (run_dir / "adapter" / "adapter_model.safetensors").write_bytes(b"weights")
    base = BaseIdentity("demo:base", "abc", "float32")
    return artifacts.write(run_dir, Manifest("policy", "sft", 0, {"a": 1}, {}, 1.0, base))


def test_a_run_reached_through_a_link_is_a_run_but_nothing_in_it_leads_out(tmp_path):
    """A link is not followed even to the right bytes: what is verified now could be another file when it is read."""
    manifest = finished_run(tmp_path / "run")
    (tmp_path / "link").symlink_to(tmp_path / "run")
    artifacts.verify(tmp_path / "link", manifest)
    inside = tmp_path / "run" / "adapter" / "inside"
    inside.symlink_to("adapter_model.safetensors")
    artifacts.verify(tmp_path / "run", manifest)

    weights = tmp_path / "run" / "adapter" / "adapter_model.safetensors"
    weights.rename(tmp_path / "elsewhere")
    weights.symlink_to(tmp_path / "elsewhere")
    assert {problem.code for problem in problems_of(lambda: artifacts.verify(tmp_path / "run", manifest))} == {"SEC009"}


@pytest.mark.parametrize("name", ["adapter", "head", "tokenizer", "config.yaml", "adapter/unlisted"])
def test_links_that_no_manifest_lists_do_not_lead_out_either(tmp_path, name):
    manifest = finished_run(tmp_path / "run")
    (tmp_path / "outside" / "adapter").mkdir(parents=True)
    if name == "adapter":
        shutil.copytree(tmp_path / "run" / "adapter", tmp_path / "outside" / "adapter", dirs_exist_ok=True)
        shutil.rmtree(tmp_path / "run" / "adapter")
    (tmp_path / "run" / name).symlink_to(tmp_path / "outside" / name)
    assert problems_of(lambda: artifacts.verify(tmp_path / "run", manifest))[0].code == "SEC009"


@pytest.mark.parametrize("name", ["../outside", "/etc/hostname", "adapter/../../outside"])
def test_a_manifest_that_lists_files_elsewhere_is_refused(tmp_path, name):
    manifest = finished_run(tmp_path / "run")
    (tmp_path / "outside").write_bytes(b"x")
    manifest.files[name] = {"sha256": "", "size": 1}
    problems = problems_of(lambda: artifacts.verify(tmp_path / "run", manifest))
    assert [problem.code for problem in problems] == ["SEC009"] and RlhfError(*problems).exit_code == 8


# Secrets


CRASH = """
import os, sys
from rlhf import cli
from rlhf.commands import inspection

def fail(*_):
    try:
        raise KeyError(os.environ["MY_SECRET"])
    except KeyError as error:
        raise RuntimeError(f"{os.environ['HF_TOKEN']} https://me:kcanary08@host/?token=kcanary09") from error

inspection.check = fail
sys.argv = ["rlhf", "check", *sys.argv[1:]]
cli.main()
"""
COMMAND = "import sys; from rlhf import cli; sys.argv[0] = 'rlhf'; cli.main()"
URLS = ("https://me:kcanary08@host/x", "https://kcanary09@host/x", "https://host/x?a=1&token=kcanary10")


def holds_canary(text):
    return "canary" in text


def test_no_secret_of_the_environment_is_written_by_runs_that_end_well(chain):
    for path in chain.rglob("*"):
        if path.is_file():
            data = path.read_bytes()
            for value in CANARIES.values():
                assert value.encode() not in data and value.encode("utf-16-le") not in data, path
    assert not holds_canary((chain / "shown.txt").read_text())


@pytest.mark.parametrize("flags", [(), ("--debug",), ("--json-errors",), ("--debug", "--json-errors")])
def test_no_secret_is_shown_by_a_crash(tmp_path, flags):
    done = python(CRASH, *flags, cwd=tmp_path)
    assert done.returncode == 1 and not holds_canary(done.stdout + done.stderr)
    assert "RuntimeError: *** https://***@host/?token=***" in done.stderr
    assert ("KeyError: '***'" in done.stderr) == ("--debug" in flags)


def test_a_config_that_holds_a_secret_is_refused_and_its_value_never_shown(tmp_path):
    for number, secret in enumerate((*URLS, *CANARIES.values(), "hf_" + "canary11" * 4)):
        config = {"data": {"path": "demo:demonstrations?size=20"}, "steps": 1, "model": {"path": secret}}
        (tmp_path / f"{number}.yaml").write_text(json.dumps(config, ensure_ascii=False), "utf-8")
    files = sorted(str(path) for path in tmp_path.glob("*.yaml"))
    done = python(COMMAND, "check", *files, "--stage", "sft", "--json-errors", "--debug", cwd=tmp_path)
    assert done.returncode == 8 and not holds_canary(done.stdout + done.stderr)
    problems = json.loads(done.stderr.strip().splitlines()[-1])["problems"]
    refused = [problem["where"].split(" ")[-1] for problem in problems if problem["code"] == "SEC008"]
    assert refused == ["model.path"] * len(files)
    assert "HF_TOKEN" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["--set", "hf_token=kcanary12"], 8),
        (["--set", f"steps={URLS[0]}" + "y" * 99], 8),
        (["--set", "steps=https://me:kcanary12" + "y" * 99 + "@host"], 8),
        (["--set", f"steps={CANARIES['HF_TOKEN']}"], 8),
        (["--set", f"run_dir={URLS[2]}"], 8),
        (["--api_key=kcanary12"], 2),
        (["--set", f"data.path={CANARIES['WANDB_API_KEY']}"], 8),
    ],
)
def test_no_secret_given_on_the_command_line_is_shown(tmp_path, arguments, code, monkeypatch, capsys):
    (tmp_path / "sft.yaml").write_text("data: {path: 'demo:demonstrations?size=20'}\nsteps: 1\n")
    for name, value in CANARIES.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "argv", ["rlhf", "sft", "-c", str(tmp_path / "sft.yaml"), *arguments, "--debug"])
    handler = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as caught:
        cli.main()
    signal.signal(signal.SIGTERM, handler)
    text = "".join(capsys.readouterr())
    assert caught.value.code == code and "error[" in text and not holds_canary(text)


def test_a_run_log_holds_no_secret(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "kcanary-log")
    progress.log_to_console()
    with run_directory.open_run(tmp_path / "run", "sft", Identity({}), ""):
        logging.getLogger("rlhf").warning("the token %s at %s", "kcanary-log", URLS[0])
    text = (tmp_path / "run" / "run.log").read_text("utf-8")
    assert "the token *** at https://***@host/x" in text and not holds_canary(text)


# Resources


def files_of(directory):
    return {path: path.stat().st_size for path in directory.rglob("*") if path.is_file()}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("target_modules", ["all-linear", "some"])
def test_the_size_of_an_adapter_is_known_from_the_headers_of_the_base(tmp_path, architecture, target_modules):
    opened = base(tmp_path / "m", architecture)
    targets = ["c_attn"] if architecture == "gpt2" else ["q_proj", "down_proj"]
    chosen = "all-linear" if target_modules == "all-linear" else targets
    adapter = get_peft_model(opened.model, lora(opened, target_modules=chosen))
    expected = sum(p.numel() for name, p in adapter.named_parameters() if "lora_" in name)
    tensors = model_files.read(tmp_path / "m", "model")
    assert resources.lora_parameters(tensors, 4, chosen) == expected


def test_the_estimate_covers_what_a_chain_wrote_and_is_not_far_above(chain, monkeypatch):
    monkeypatch.chdir(chain)
    for stage in ("sft", "train-rm", "ppo"):
        config = load.load(STAGES[stage].config_class, Path(f"{stage}.yaml"))
        needs = STAGES[stage].needs(config)
        parents = {parent.key: artifacts.read(parent.run_dir) for parent in needs.parents}
        need = needs.disk(model_files.read(Path("model"), ""), parents, 40)
        tensors = [
            size
            for path, size in files_of(Path("runs") / stage).items()
            if path.suffix == ".safetensors" and "tokenizer" not in path.parts
        ]
        assert need.largest * 1.2 + (1 << 16) > max(tensors), stage
        assert need.kept * 1.2 + (1 << 18) > sum(tensors) > need.kept / 4, stage
        assert need.needed >= 2.2 * need.largest


def test_run_directories_that_cannot_be_written_are_refused(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    (tmp_path / "dangling").symlink_to(tmp_path / "nothing")
    assert resources.run_dir_problem(str(tmp_path / "a" / "b")) is None
    for name, words in {
        "file": "is a file",
        "file/run": "is a file",
        "dangling": "symbolic link",
        "x" * 256: "longer than 255 bytes",
        "\0": "control",
        "a\x1b": "control",
    }.items():
        problem = resources.run_dir_problem(str(tmp_path / name))
        assert words in problem.what and RlhfError(problem).exit_code == (8 if words == "control" else 6)
    asked = []
    monkeypatch.setattr(os, "access", lambda place, mode: asked.append(place))
    assert "not writable" in resources.run_dir_problem(str(tmp_path / "a" / "b")).what and asked == [tmp_path]
    assert "cannot be written to" in resources.run_dir_problem(str(tmp_path)).what


def test_disk_memory_and_rights_are_refused_together_with_the_data(tmp_path, monkeypatch):
    (tmp_path / "meminfo").write_text("MemTotal: 9 kB\nMemAvailable:    2048 kB\n")
    monkeypatch.setattr(resources, "MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr(resources, "free_disk", lambda _: 33 << 20)
    problems = problems_of(lambda: prepare_sft(tmp_path, data={"path": "no.jsonl"}))
    assert [problem.code for problem in problems] == ["DAT010", "RES004", "RES003"]
    problems = problems_of(lambda: prepare_sft(tmp_path))
    assert RlhfError(*problems).exit_code == 6 and "available are 2.0 MiB" in problems[0].what
    assert "free are 33.0 MiB" in problems[1].what and "2.2" not in str(problems[0])
    (tmp_path / "file").write_text("")
    problems = problems_of(lambda: prepare_sft(tmp_path, run_dir=str(tmp_path / "file")))
    assert [problem.code for problem in problems] == ["RES002", "RES004"]


def test_exactly_enough_is_enough(tmp_path, monkeypatch):
    need = resources.Written(largest=1000, kept=1000)
    assert need.needed == 2200 + resources.BESIDES
    assert resources.disk_problem("run", need, need.needed) is None
    assert resources.disk_problem("run", need, need.needed - 1).code == "RES003"
    assert resources.memory_problem("m", 10, 10) is None and resources.memory_problem("m", 10, 9).code == "RES004"
    config = SftConfig.model_validate({"data": {"path": "x"}, "steps": 10, "save_every": 2})
    tensors = {"model.layers.0.q.weight": model_files.StoredTensor("F32", (10, 20), 800)}
    adapter = 4 * 16 * 30
    written = STAGES["sft"].needs(config).disk(tensors, {}, 0)
    assert written == resources.Written(3 * adapter, adapter + 2 * 3 * adapter)


def test_what_is_not_known_is_said_and_not_guessed(tmp_path, monkeypatch):
    monkeypatch.setattr(resources, "MEMINFO", tmp_path / "none")
    plan = prepare_sft(tmp_path)
    assert any("memory: this system does not say" in note for note in plan.unchecked)
    assert any("not known here" in line for line in plan.figures)
    monkeypatch.setattr(connection, "trouble", lambda: None)
    plan = prepare_sft(tmp_path, model={"path": "org/name"})
    assert plan.figures == () and any("disk and memory: the layers of org/name" in note for note in plan.unchecked)


def test_the_plan_of_a_dry_run_has_the_figures_and_a_finished_run_needs_no_room(chain, monkeypatch):
    monkeypatch.chdir(chain)
    config = load.load(STAGES["ppo"].config_class, Path("ppo.yaml"))
    monkeypatch.setattr(resources, "free_disk", lambda _: 0)
    prepare.prepare(config, STAGES["ppo"].needs(config))
    changed = load.load(STAGES["ppo"].config_class, Path("ppo.yaml"), ["seed=1"])
    problems = problems_of(lambda: prepare.prepare(changed, STAGES["ppo"].needs(changed)))
    assert [problem.code for problem in problems] == ["RES003"]
    monkeypatch.undo()
    done = CliRunner().invoke(cli.app, ["sft", "-c", str(chain / "sft.yaml"), "--dry-run", f"model.path={chain}/model"])
    assert done.exit_code == 0, done.exception
    assert re.search(r"^disk: \S+ MiB needed, .* free", done.stdout) and "\nmemory: " in done.stdout


def cut_short(directory):
    path = directory / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])


def no_header(directory):
    (directory / "model.safetensors").write_bytes(struct.pack("<Q", 1 << 60) + b"{}")


def no_json(directory):
    (directory / "model.safetensors").write_bytes(struct.pack("<Q", 4) + b"[[[[")


def deep_json(directory):
    (directory / "model.safetensors").write_bytes(struct.pack("<Q", 200_000) + b"[" * 200_000)


def empty(directory):
    (directory / "model.safetensors").write_bytes(b"")


def index_of(directory, name):
    (directory / "model.safetensors").rename(directory / "model-1-of-2.safetensors")
    index = {"weight_map": {"a": "model-1-of-2.safetensors", "b": name}}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))


def missing_shard(directory):
    index_of(directory, "model-2-of-2.safetensors")


def shard_elsewhere(directory):
    index_of(directory, "../other/model.safetensors")


def absolute_shard(directory):
    index_of(directory, "/etc/hostname")


def with_adapter(directory):
    (directory / "adapter_config.json").write_text('{"base_model_name_or_path": "org/another"}')


def no_weights(directory):
    (directory / "model.safetensors").unlink()


@pytest.mark.parametrize(
    ("damage", "code"),
    [
        (cut_short, "MOD006"),
        (no_header, "MOD006"),
        (no_json, "MOD006"),
        (deep_json, "MOD006"),
        (empty, "MOD006"),
        (missing_shard, "MOD006"),
        (shard_elsewhere, "SEC009"),
        (absolute_shard, "SEC009"),
        (with_adapter, "MOD007"),
        (no_weights, "MOD001"),
    ],
)
def test_a_damaged_model_is_refused_before_anything_is_loaded(tmp_path, damage, code):
    directory = demo_model(tmp_path / "m")
    damage(directory)
    assert [p.code for p in problems_of(lambda: prepare_sft(tmp_path, model={"path": str(directory)}))] == [code]
    if code == "MOD007":
        assert problems_of(lambda: load_base(str(directory)))[0].code == code


def test_whole_shards_are_read_as_one_model(tmp_path):
    directory = demo_model(tmp_path / "m")
    whole = model_files.read(directory, "model")
    index_of(directory, "model-1-of-2.safetensors")
    assert model_files.read(directory, "model") == whole and len(whole) > 10


def test_a_run_from_elsewhere_does_not_decide_that_code_is_run(monkeypatch):
    identity = BaseIdentity("org/m", "d", "float32", revision="a" * 40, trust_remote_code=True)
    manifest = Manifest(kind="policy", stage="sft", seed=0, identity={}, metrics={}, seconds=1.0, base=identity)
    monkeypatch.delenv(open_base.CONSENT, raising=False)
    with pytest.raises(RlhfError, match=r"SEC010 org/m.*RLHF_TRUST_REMOTE_CODE=1|SEC010. org/m") as caught:
        open_base.model_of(manifest)
    assert caught.value.exit_code == 8
    monkeypatch.setenv(open_base.CONSENT, "1")
    assert open_base.model_of(manifest).trust_remote_code


def test_a_config_of_many_values_is_refused_before_it_costs_time(tmp_path):
    (tmp_path / "big.yaml").write_text("a: [" + "1," * 400_000 + "]")
    before = time.monotonic()
    with pytest.raises(RlhfError, match="SEC003.*10,000 values"):
        yaml_reader.read_file(tmp_path / "big.yaml")
    assert time.monotonic() - before < 5


@pytest.mark.parametrize("name", ["csv", "text", "imagefolder"])
def test_a_format_of_the_datasets_library_is_no_data_set(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "private.csv").write_text("prompt\nsecret\n")
    with pytest.raises(RlhfError, match="DAT010.*format of the datasets library"):
        sources.load_prompts(DataSection(path=name))
