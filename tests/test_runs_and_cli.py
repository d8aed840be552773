"""Run directories, manifests, the layers, and the command line as a person meets it."""

from __future__ import annotations

import ast
import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from rlhf.errors import Problem, RlhfError, render
from rlhf.runs import artifacts, run_directory, storage
from rlhf.runs.artifacts import BaseIdentity, Manifest
from rlhf.runs.identity import Identity

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "scripts"))
import structure  # noqa: E402

PACKAGES = [
    ["errors", "limits"],
    ["secrets", "findings"],
    ["records"],
    ["demo"],
    ["config"],
    ["runs"],
    ["hub"],
    ["metrics"],
    ["report"],
    ["losses"],
    ["data"],
    ["planning"],
    ["preflight"],
    ["models"],
    ["rollouts", "scoring"],
    ["evaluation"],
    ["serving"],
    ["algorithms"],
    ["training"],
    ["reward"],
    ["stages"],
    ["start"],
    ["commands"],
    ["cli"],
    ["__main__"],
]  # fmt: skip


def test_packages_import_only_from_those_above_them_in_the_table_and_no_file_is_left_out():
    level = {name: number for number, names in enumerate(PACKAGES) for name in names}
    modules = structure.read(ROOT / "rlhf")
    known = {module.name for module in modules}
    for module in modules:
        if module.name == "__init__":
            continue
        for name, node in structure.imports(module, known, "rlhf"):
            other = name.split(".")[0]
            if other not in (module.package, "__init__"):
                assert level[other] < level[module.package], f"{module.at(node)} imports rlhf.{name}"
    assert not structure.circles(modules, "rlhf") and {module.package for module in modules} <= {*level, "__init__"}


def test_only_the_sft_stage_imports_trl_and_nothing_reads_pickles():
    for path in (ROOT / "rlhf").rglob("*.py"):
        names = {
            alias.name if isinstance(node, ast.Import) else node.module or ""
            for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, ast.Import | ast.ImportFrom)
            for alias in node.names
        }
        assert not any(name.split(".")[0] == "trl" for name in names) or path.parts[-2:-1] == ("sft",), path
        assert not names & {"pickle", "joblib", "dill"}, path
        assert "torch.load(" not in path.read_text() and "torch.save(" not in path.read_text(), path


def rlhf(*args, cwd=ROOT, stdin=None):
    command = [sys.executable, "-m", "rlhf", *args]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, input=stdin, check=False)


def test_help_is_quick_and_neither_it_nor_check_imports_torch(tmp_path):
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    shown = rlhf("--help")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert shown.returncode == 0 and after.ru_utime - before.ru_utime < 2.5  # CPU seconds: others may use the machine
    for command in ("sft", "train-rm", "collect", "ppo", "eval-rm", "generate", "score", "pipeline", "check", "show"):
        assert f" {command} " in shown.stdout
    (tmp_path / "sft.yaml").write_text("data: {path: 'demo:demonstrations?size=20'}\nepochs: 1\n")
    code = (
        "import sys; sys.argv = ['rlhf', 'check', sys.argv[1]]\n"
        "from rlhf.cli import main\n"
        "try: main()\n"
        "except SystemExit as stop: print(stop.code, 'torch' in sys.modules)\n"
    )
    found = subprocess.run([sys.executable, "-c", code, str(tmp_path / "sft.yaml")], capture_output=True, text=True)
    assert found.stdout.splitlines()[-1] == "0 False", found.stderr


def test_the_version_is_printed():
    assert rlhf("--version").stdout.startswith("rlhf 0.")


def test_mistakes_are_one_block_with_their_exit_code_and_json_on_request(tmp_path):
    (tmp_path / "ppo.yaml").write_text("prompts: {path: nowhere.jsonl}\nstps: 3\n")
    shown = rlhf("ppo", "-c", str(tmp_path / "ppo.yaml"))
    assert shown.returncode == 2 and "Traceback" not in shown.stderr and "did you mean 'steps'" in shown.stderr
    shown = rlhf("check", str(tmp_path / "ppo.yaml"), "--set", "steps=2", "--json-errors")
    assert json.loads(shown.stderr.strip())["exit_code"] == 2
    (tmp_path / "ppo.yaml").write_text("prompts: {path: nowhere.jsonl}\n")
    assert rlhf("check", str(tmp_path / "ppo.yaml")).returncode == 3
    assert rlhf("show", str(tmp_path / "none")).returncode == 5
    assert rlhf("ppo", "--nonsense").returncode == 2
    assert rlhf("sft", cwd=tmp_path).returncode == 2


def test_check_without_files_takes_the_shipped_configs():
    shown = rlhf("check", "--json")
    assert shown.returncode == 0
    assert {row["stage"] for row in json.loads(shown.stdout)} >= {
        "sft",
        "train-rm",
        "ppo",
        "eval-rm",
        "collect",
        "pipeline",
    }


def test_demo_writes_the_worlds_data(tmp_path):
    assert rlhf("demo", "--out", str(tmp_path / "d"), "--size", "5").returncode == 0
    for name in ("demonstrations", "preferences", "prompts"):
        assert len((tmp_path / "d" / f"{name}.jsonl").read_text().splitlines()) == 5


def manifest(**changes):
    base = BaseIdentity("demo:base", "abc", "float32")
    values = {"kind": "policy", "stage": "sft", "seed": 0, "identity": {"a": 1}, "metrics": {}, "seconds": 1.0}
    return Manifest(**{**values, "base": base, **changes})


def test_a_manifest_comes_back_and_proves_the_files(tmp_path):
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "w.bin").write_bytes(b"12345")
    written = artifacts.write(tmp_path, manifest())
    assert artifacts.read(tmp_path, "policy") == written
    artifacts.verify(tmp_path, written)
    (tmp_path / "adapter" / "w.bin").write_bytes(b"12346")
    with pytest.raises(RlhfError, match="CKP005.*w.bin"):
        artifacts.verify(tmp_path, written)
    with pytest.raises(RlhfError, match="CKP004.*needed: reward"):
        artifacts.read(tmp_path, "reward")


def test_what_is_no_finished_run_is_refused(tmp_path):
    with pytest.raises(RlhfError, match="CKP001"):
        artifacts.read(tmp_path / "no")
    with pytest.raises(RlhfError, match="CKP002"):
        artifacts.read(tmp_path)
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(RlhfError, match="CKP003"):
        artifacts.read(tmp_path)


def test_an_unchanged_run_is_current_a_changed_one_named_and_moved_aside(tmp_path):
    run_dir = tmp_path / "run"
    same, other = Identity({"a": 1}), Identity({"a": 2})
    with run_directory.open_run(run_dir, "sft", same, "") as run:
        run.finish(manifest())
    assert run_directory.status(run_dir, same) is None
    assert run_directory.status(run_dir, Identity({"a": 2, "b": 3})) == ["a: 1 -> 2", "b: nothing -> 3"]
    with pytest.raises(RlhfError, match="a: 1 -> 2"):
        run_directory.open_run(run_dir, "sft", other, "")
    run_directory.open_run(run_dir, "sft", other, "", overwrite=True).close()
    assert artifacts.is_finished(tmp_path / "run.old-1") and run_directory.status(run_dir, other) == ["no run yet"]


def test_metrics_never_hide_what_is_not_finite(tmp_path):
    with run_directory.open_run(tmp_path / "run", "sft", Identity({}), "") as run:
        run.write_metrics(1, {"loss": float("nan"), "kl": float("inf"), "score": 0.5})
    assert run_directory.read_metrics(tmp_path / "run") == [{"step": 1, "loss": "nan", "kl": "inf", "score": 0.5}]


def test_a_staged_directory_appears_whole_or_not_at_all(tmp_path):
    target = tmp_path / "target"
    with storage.staged_directory(target) as staging:
        (staging / "a").write_text("1")
    with pytest.raises(ZeroDivisionError), storage.staged_directory(target) as staging:
        (staging / "a").write_text("2")
        _ = 1 / 0
    assert (target / "a").read_text() == "1" and sorted(p.name for p in tmp_path.iterdir()) == ["target"]


@pytest.mark.parametrize(("umask", "of_files", "of_directories"), [(0o022, 0o644, 0o755), (0o027, 0o640, 0o750)])
def test_what_is_written_has_the_mode_that_the_umask_gives(tmp_path, umask, of_files, of_directories):
    before = os.umask(umask)
    try:
        target = tmp_path / "staged"
        with storage.staged_directory(target) as staging:
            (staging / "inner").mkdir(mode=0o700)
            for name in ("private", "inner/private"):
                (staging / name).touch(0o600)
        storage.copy_directory(target, tmp_path / "copy")
        with run_directory.open_run(tmp_path / "run", "sft", Identity({}), "a: 1") as run:
            run.write_metrics(1, {"a": 1.0})
            run.write_samples("s", [{"a": 1}])
            run.finish(manifest())
    finally:
        os.umask(before)
    paths = [path for name in ("staged", "copy", "run") for path in (tmp_path / name, *(tmp_path / name).rglob("*"))]
    assert len(paths) > 12
    for path in paths:
        assert path.stat().st_mode & 0o777 == (of_directories if path.is_dir() else of_files), path


def test_many_problems_are_cut_with_their_number():
    text = render([Problem("DAT001", f"row {i}", "bad.", "good") for i in range(25)])
    assert len(text.splitlines()) == 21 and text.endswith("... and 5 more")
