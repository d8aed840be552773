"""Kill, starve and damage runs, and see that each one ends with the very bits of a run that nothing happened to.

    python scripts/torture.py [--stages sft,train-rm,ppo] [--kills 200] [--signals 100] [--flips 500] [--cold 10]
                              [--truncations 100] [--writes 0] [--drops 0] [--processes 2] [--out DIR]

Works on a random model of two layers. Runs are forked from a process in which everything is imported, so that one takes
a second or two; ``--cold`` of the kills are of new processes. Ends with one table, and OUT/torture.json; exit code 1 if
a single check failed.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from errno import EIO, ENOSPC
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
import yaml
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import rlhf.stages.ppo.run
import rlhf.stages.sft.run
import rlhf.stages.train_rm.run  # noqa: F401
from rlhf import cli, errors
from rlhf.runs import artifacts, checkpoints, interrupts, progress, snapshots, storage

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TIMED = ("time/", "memory/")
STAGES = ("sft", "train-rm", "ppo")
SIGNALS = (signal.SIGINT, signal.SIGTERM)
IMPORTS = 8.0
CONFIGS: dict[str, dict[str, Any]] = {
    "sft": {
        "model": {"path": "model"},
        "data": {"path": "demonstrations.jsonl"},
        "max_length": 64,
        "steps": 8,
        "holdout_fraction": 0.2,
        "min_end_token_rate": 0.0,
        "end_token_samples": 4,
        "save_every": 1,
        "lora": {"r": 4, "dropout": 0.1, "train_tokens": ["<|im_end|>"]},
        "optim": {"learning_rate": 0.2, "warmup_ratio": 0.3},  # so high that it stops early, behind its best step
        "evaluation": {"every": 1, "patience": 2},
        "batch": {"batch_size": 4, "micro_batch_size": 2},
        "sampling": {"max_new_tokens": 8},
    },
    "train-rm": {
        "policy": "runs/parent",
        "data": {"path": "comparisons.jsonl"},
        "max_length": 64,
        "steps": 8,
        "holdout_fraction": 0.2,
        "standardise_samples": 8,
        "save_every": 1,
        "optim": {"learning_rate": 0.1},
        "evaluation": {"every": 1, "patience": 2},
        "batch": {"batch_size": 4, "micro_batch_size": 2},
        "sampling": {"max_new_tokens": 16},
    },
    "ppo": {
        "policy": "runs/parent",
        "rewards": [
            {"run": "runs/reward"},
            {"function": "noisy_reward:noisy", "weight": 2.0, "standardise_samples": 8},
        ],
        "prompts": {"path": "prompts.jsonl", "max_tokens": 32},
        "steps": 4,
        "save_every": 1,
        "report_to": "none",
        "batch": {"batch_size": 8, "minibatch_size": 4, "micro_batch_size": 4},
        "sampling": {"max_new_tokens": 8},
        "value": {"pretrain_steps": 2, "min_explained_variance": 0.99},
        "kl": {"coef": 0.05, "target": 1.0, "horizon": 50},
        "optim": {"learning_rate": 3e-3, "schedule": "linear"},
        "evaluation": {"every": 1, "num_prompts": 4, "holdout_fraction": 0.3},
        "seed": 3,  # the best step comes before the last, so that a forgotten best shows
        "guards": {"entropy_nats": {"warn": 9.0}},
    },
}
# Checkpoints, by number, from which items are dropped: of SFT and reward model the one after the best step, and the
# early stop; PPO's first stand after its first evaluation and pretraining.
CUTS = {"sft": (3, 4), "train-rm": (4, 5), "ppo": (2, 7, 8)}
ITEMIZED = ("progress", "held_out")  # states whose items are dropped one by one; TRL's progress is one text
REWARD = "import random\n\n\ndef noisy(prompts, responses):\n    return [random.random() for _ in responses]\n"


@dataclass
class Line:
    """One row of the table: what was done, how often, how often it ended well, and what else is to be said."""

    test: str
    stage: str
    tried: int = 0
    good: int = 0
    remarks: dict[str, Any] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)

    def add(self, failure: str | None) -> None:
        self.tried += 1
        self.good += failure is None
        if failure:
            self.failures.append(failure)


def build_home(home: Path) -> None:
    """Model, data and configs, and the runs that reward modelling and PPO start from."""
    torch.manual_seed(11)
    specials = ["<|pad|>", "<|im_start|>", "<|im_end|>", "<|endoftext|>"]
    vocabulary = {token: i for i, token in enumerate([*specials, *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    inner = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token="<|pad|>",
        eos_token="<|endoftext|>",
        additional_special_tokens=["<|im_start|>", "<|im_end|>"],
        model_max_length=128,
    )
    tokenizer.chat_template = TEMPLATE
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(vocabulary),
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            intermediate_size=48,
            max_position_embeddings=128,
            initializer_range=0.2,
        )
    )
    model.save_pretrained(home / "model")
    tokenizer.save_pretrained(home / "model")
    rows = {
        "demonstrations": [{"prompt": f"hi {n}", "completion": f"ok {n % 3}"} for n in range(30)],
        "comparisons": [{"prompt": f"hi {n}", "chosen": f"ok {n}", "rejected": f"no {n}"} for n in range(30)],
        "prompts": [{"prompt": f"hi {n}"} for n in range(30)],
    }
    for name, found in rows.items():
        (home / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in found))
    (home / "noisy_reward.py").write_text(REWARD)
    for stage, config in CONFIGS.items():
        (home / f"{stage}.yaml").write_text(yaml.safe_dump(config))
    calm = ("evaluation.every=null", "evaluation.patience=null")
    parent = ("sft", "run_dir=runs/parent", "steps=80", "save_every=50", "lora.dropout=0", *calm)
    parent += ("optim.learning_rate=5e-3",)
    reward = ("train-rm", "run_dir=runs/reward", "steps=6", "optim.learning_rate=1e-3", *calm)
    for stage, *overrides in (parent, reward):
        code = wait(fork(home, stage, *overrides))
        if code:
            raise SystemExit(f"{stage} failed with exit code {code}, see {home}/log.txt")


def fork(home: Path, stage: str, *args: str, patch: Callable[[], None] | None = None) -> int:
    """Start ``rlhf STAGE -c STAGE.yaml ARGS`` in a child of this warm process; returns its process id.

    The child gets no signal before it handles signals: libraries' hooks around a fork swallow a KeyboardInterrupt.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    pid = os.fork()
    if pid:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
        return pid
    code = 1
    with contextlib.suppress(BaseException):
        os.setpgid(0, 0)
        os.chdir(home)
        log = os.open("log.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        sys.argv = ["rlhf", stage, "-c", f"{stage}.yaml", *args]
        torch.set_num_threads(1)
        if patch:
            patch()
        try:
            interrupts.install()
            signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
            cli.main()
        except SystemExit as stop:
            code = int(stop.code or 0)
        except BaseException:
            traceback.print_exc()
    os._exit(code)


def cold(home: Path, stage: str, *args: str, **environment: str) -> int:
    """The same in a new process."""
    command = [sys.executable, "-m", "rlhf", stage, "-c", f"{stage}.yaml", *args]
    with (home / "log.txt").open("ab") as log:
        process = subprocess.Popen(command, cwd=home, stdout=log, stderr=log, env={**os.environ, **environment})
    return process.pid


def last_words(home: Path) -> str:
    """The end of what the runs so far have printed."""
    return (home / "log.txt").read_text("utf-8", "replace")[-600:]


def wait(pid: int) -> int:
    """The exit code; minus the signal for a killed process."""
    _, status = os.waitpid(pid, 0)
    return os.waitstatus_to_exitcode(status)


def ended(pid: int) -> int | None:
    found, status = os.waitpid(pid, os.WNOHANG)
    return os.waitstatus_to_exitcode(status) if found else None


def fingerprint(run: Path) -> dict[str, str]:
    """Digest of everything that a run leaves and that does not tell the time."""
    found = {}
    for path in sorted(run.rglob("*")):
        name = path.relative_to(run).as_posix()
        if path.is_file() and name.split("/")[0] in (artifacts.ADAPTER, artifacts.HEAD, artifacts.SAMPLES):
            found[name] = storage.sha256(path)
        if path.is_file() and name.startswith(("checkpoints/best/", "checkpoints/last/")):
            found[name] = storage.sha256(path)
    lines = []
    for line in (run / artifacts.METRICS).read_text().splitlines():
        row = {key: value for key, value in json.loads(line).items() if not key.startswith(TIMED)}
        lines.append(json.dumps(row, sort_keys=True))
    found[artifacts.METRICS] = _digest("\n".join(lines))
    manifest = artifacts.read(run)
    metrics = {key: value for key, value in manifest.metrics.items() if not key.startswith(TIMED)}
    found[artifacts.MANIFEST] = _digest(json.dumps([metrics, manifest.details, manifest.identity], sort_keys=True))
    log = (run / artifacts.LOG).read_text().splitlines()
    found["warnings"] = _digest("\n".join(sorted({line.partition("WARNING ")[2] for line in log if "guards." in line})))
    return found


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def difference(run: Path, wanted: dict[str, str]) -> str | None:
    """The names that differ from the reference; None if none does."""
    if not artifacts.is_finished(run):
        return "unfinished"
    found = fingerprint(run)
    names = sorted(name for name in {*found, *wanted} if found.get(name) != wanted.get(name))
    return f"{len(names)} files differ: {', '.join(names[:4])}" if names else None


def inside_a_save(run: Path) -> bool:
    return any(".tmp-" in path.name or ".trash-" in path.name for path in run.rglob(".*"))


def finish(home: Path, stage: str, run: Path, wanted: dict[str, str], *args: str) -> str | None:
    """Resume to the end, twice if need be, and compare."""
    code = wait(fork(home, stage, f"run_dir={run.relative_to(home)}", "--resume", *args))
    outcome = f"resume ended with {code}" if code else difference(run, wanted)
    if outcome is None:
        shutil.rmtree(run)
    return outcome


class Torture:
    """One stage under every kind of accident, beside the run that nothing happened to."""

    def __init__(self, home: Path, stage: str, seed: int) -> None:
        self.home, self.stage, self.random = home, stage, random.Random(f"{stage}/{seed}")
        started = time.perf_counter()
        reference = home / "runs" / f"{stage}-reference"
        pid = fork(home, stage, f"run_dir=runs/{stage}-reference")
        first = self.first_checkpoint(pid, reference)
        code = wait(pid)
        if code:
            raise SystemExit(f"the reference run of {stage} failed with exit code {code}, see {home}/log.txt")
        self.seconds, self.training = time.perf_counter() - started, time.perf_counter() - first
        self.wanted = fingerprint(reference)
        self.count = 0

    def fresh(self) -> Path:
        self.count += 1
        return self.home / "runs" / f"{self.stage}-{self.count}"

    def first_checkpoint(self, pid: int, run: Path) -> float:
        """Wait until a checkpoint stands, or the process has ended without being waited for; the time then."""
        while not any((run / artifacts.CHECKPOINTS).glob("*")):
            if os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT):
                break
            time.sleep(0.002)
        return time.perf_counter()

    def kills(self, number: int, cold_ones: int) -> Line:
        """kill -9 at a random moment: in a third of the runs from the start, in the others from the first checkpoint.

        Every other run is killed a second time while it goes on.
        """
        line = Line("kill -9, then resume", self.stage)
        inside = early = 0
        for index in range(number):
            run, is_cold = self.fresh(), index < cold_ones
            where = f"run_dir={run.relative_to(self.home)}"
            for _ in range(1 + index % 2):
                start = cold if is_cold else fork
                pid = start(self.home, self.stage, where, "--resume")
                if index % 3:
                    self.first_checkpoint(pid, run)
                    time.sleep(self.random.uniform(0.0, self.training))
                else:
                    time.sleep(self.random.uniform(0.0, self.seconds + (IMPORTS if is_cold else 0.0)))
                os.kill(pid, signal.SIGKILL)
                wait(pid)
                inside += run.exists() and inside_a_save(run)
                early += not any((run / artifacts.CHECKPOINTS).glob("*"))
            line.add(finish(self.home, self.stage, run, self.wanted))
        line.remarks = {"inside a write": inside, "before the first checkpoint": early, "cold": min(cold_ones, number)}
        return line

    def signals(self, number: int) -> Line:
        """SIGTERM or SIGINT at a random moment: the exit code says so, and no completed step is lost."""
        line = Line("SIGINT or SIGTERM, then resume", self.stage)
        early = 0
        for index in range(number):
            run, signum = self.fresh(), (signal.SIGTERM, signal.SIGINT)[index % 2]
            pid = fork(self.home, self.stage, f"run_dir={run.relative_to(self.home)}", "save_every=1000")
            time.sleep(self.random.uniform(0.0, self.seconds))
            code = ended(pid)
            if code is None:
                os.kill(pid, signum)
                code = wait(pid)
            failure = None
            if artifacts.is_finished(run):
                early += 1
            elif run.exists() and code != 128 + signum:
                failure = f"exit code {code} after {signal.Signals(signum).name}: {last_words(self.home)}"
            elif lost := _steps_lost(run):
                failure = lost
            if failure is None and not artifacts.is_finished(run):
                failure = finish(self.home, self.stage, run, self.wanted, "save_every=1000")
            elif failure is None:
                failure = difference(run, self.wanted)
                shutil.rmtree(run)
            line.add(failure)
        line.remarks = {"finished before the signal": early}
        return line

    def every_checkpoint(self) -> Line:
        """Resume from each checkpoint in a new process."""
        line = Line("resume from each checkpoint, new process", self.stage)
        whole = self.fresh()
        wait(fork(self.home, self.stage, f"run_dir={whole.relative_to(self.home)}", "keep_checkpoints=1000"))
        places = checkpoints.candidates(whole / artifacts.CHECKPOINTS)
        orders = {path.name: snapshots.read_entry(path).order for path in places}  # type: ignore[union-attr]
        for name, order in orders.items():
            run = self.fresh()
            shutil.copytree(whole, run)
            for other, place in orders.items():
                if place > order:
                    shutil.rmtree(run / artifacts.CHECKPOINTS / other)
            (run / artifacts.MANIFEST).unlink()
            code = wait(cold(self.home, self.stage, f"run_dir={run.relative_to(self.home)}", "--resume"))
            line.add(f"{name}: exit code {code}" if code else _named(name, difference(run, self.wanted)))
            shutil.rmtree(run)
        shutil.rmtree(whole)
        return line

    def dropped_states(self, limit: int) -> Line:
        """Resume with one state, or one item of one, as a fresh process has it: the run must end otherwise."""
        line = Line("one state item dropped: seen in the outcome", self.stage)
        seen: dict[str, bool] = {}
        for place in CUTS[self.stage]:
            cut = self.fresh()
            wait(fork(self.home, self.stage, f"run_dir={cut.relative_to(self.home)}", patch=stop_after(place)))
            items = self.items(cut)
            chosen = self.random.sample(list(seen) or items, limit) if limit else items
            for item in chosen:
                seen[item] = seen.get(item, False) or self.sees_drop(cut, item)
            shutil.rmtree(cut)
        for item, is_seen in seen.items():
            line.add(None if is_seen else f"{item} dropped, and nothing changed")
        return line

    def sees_drop(self, cut: Path, item: str) -> bool:
        run = self.fresh()
        shutil.copytree(cut, run)
        where = f"run_dir={run.relative_to(self.home)}"
        code = wait(fork(self.home, self.stage, where, "--resume", patch=drop(item)))
        outcome = f"exit code {code}" if code else difference(run, self.wanted)
        shutil.rmtree(run)
        return outcome is not None

    def items(self, run: Path) -> list[str]:
        found = checkpoints.newest(run / artifacts.CHECKPOINTS)
        assert found
        states = snapshots.read(found[0])
        inner = {name: states.pop(name) for name in ITEMIZED if name in states and "json" not in states[name]}
        return [*states, *(f"{name}/{key}" for name, items in inner.items() for key in items)]

    def failed_writes(self, limit: int) -> Line:
        """Fail the Nth write, sync, rename or removal, N = 1, 2, 3 ...: the last checkpoint stays whole."""
        line = Line("the Nth write fails (ENOSPC, EIO)", self.stage)
        number, refused = 0, 0
        while True:
            number += 1
            if limit and number > limit:
                break
            place = number if not limit else self.random.randint(1, 150)
            run = self.fresh()
            code = wait(
                fork(
                    self.home,
                    self.stage,
                    f"run_dir={run.relative_to(self.home)}",
                    patch=fail_at(place, (ENOSPC, EIO)[number % 2]),
                )
            )
            if code == 0 and difference(run, self.wanted) is None and not limit:
                shutil.rmtree(run)
                break
            failure = None if code in (0, errors.EXIT_CODES["RES"]) else f"N={place}: exit code {code}"
            refused += code == errors.EXIT_CODES["RES"]
            if failure is None and not artifacts.is_finished(run):
                failure = _named(f"N={place}", finish(self.home, self.stage, run, self.wanted))
            elif failure is None:
                failure = _named(f"N={place}", difference(run, self.wanted))
            line.add(failure)
            shutil.rmtree(run, ignore_errors=True)
        line.remarks = {"exit code 6": refused}
        return line

    def rivals(self, number: int) -> Line:
        """Two processes started together on one directory: one of them writes it, the other is told so."""
        line = Line("two processes, one run directory", self.stage)
        for _ in range(number):
            run = self.fresh()
            pids = [fork(self.home, self.stage, f"run_dir={run.relative_to(self.home)}") for _ in range(2)]
            codes = sorted(wait(pid) for pid in pids)
            failure = None if codes == [0, errors.EXIT_CODES["CKP"]] else f"exit codes {codes}"
            line.add(failure or difference(run, self.wanted))
            shutil.rmtree(run)
        return line

    def scarce_memory(self, number: int) -> Line:
        """The address space is limited to a little more than what the warm process has."""
        line = Line("memory gives out", self.stage)
        refused = 0
        for _ in range(number):
            run, room = self.fresh(), self.random.randint(1 << 16, 16 << 20)
            code = wait(fork(self.home, self.stage, f"run_dir={run.relative_to(self.home)}", patch=limit_memory(room)))
            refused += code == errors.EXIT_CODES["RES"]
            failure = None if code in (0, errors.EXIT_CODES["RES"]) else f"{room >> 10} KiB more: exit code {code}"
            if failure is None:
                failure = difference(run, self.wanted) if code == 0 else finish(self.home, self.stage, run, self.wanted)
            line.add(failure)
            shutil.rmtree(run, ignore_errors=True)
        line.remarks = {"exit code 6": refused}
        return line

    def damage(self, flips: int, truncations: int) -> Iterator[Line]:
        """Flip a bit, cut or delete a file of the newest checkpoint: it is seen, and the one before is used."""
        run = self.fresh()
        wait(fork(self.home, self.stage, f"run_dir={run.relative_to(self.home)}"))
        place = run / artifacts.CHECKPOINTS
        found = checkpoints.newest(place)
        assert found
        last = found[0]
        files = sorted(path for path in last.rglob("*") if path.is_file())

        def flip(data: bytes) -> bytes:
            spot = self.random.randrange(len(data))
            return data[:spot] + bytes([data[spot] ^ 1 << self.random.randrange(8)]) + data[spot + 1 :]

        def cut(data: bytes) -> bytes:
            return data[: self.random.randrange(len(data))]

        for test, number, change in (("one bit flipped", flips, flip), ("a file cut short", truncations, cut)):
            line = Line(test, self.stage)
            for _ in range(number):
                path = self.random.choice(files)
                whole = path.read_bytes()
                path.write_bytes(change(whole))
                line.add(_uses_another(place, last))
                path.write_bytes(whole)
            yield line
        line = Line("a file deleted", self.stage)
        for path in files:
            whole = path.read_bytes()
            path.unlink()
            line.add(_uses_another(place, last))
            path.write_bytes(whole)
        yield line
        shutil.rmtree(run)

    def other_processes(self) -> Line:
        """The same seed in new processes, under another hash seed and in another working directory."""
        line = Line("same seed, new process, other hash seed and directory", self.stage)
        for hash_seed in ("0", "4242"):
            other = self.home.with_name(f"{self.home.name}-{self.stage}-{hash_seed}")
            shutil.copytree(
                self.home, other, ignore=shutil.ignore_patterns(f"{self.stage}-*", "sft-*", "train-rm-*", "ppo-*")
            )
            code = wait(cold(other, self.stage, "run_dir=runs/x", PYTHONHASHSEED=hash_seed))
            line.add(f"exit code {code}" if code else difference(other / "runs/x", self.wanted))
            shutil.rmtree(other)
        return line


def _named(name: str, failure: str | None) -> str | None:
    return f"{name}: {failure}" if failure else None


def _steps_lost(run: Path) -> str | None:
    """Whether metrics.jsonl tells of a step that the newest checkpoint does not have."""
    rows = (
        [json.loads(line) for line in (run / artifacts.METRICS).read_text().splitlines()]
        if (run / artifacts.METRICS).is_file()
        else []
    )
    found = checkpoints.newest(run / artifacts.CHECKPOINTS)
    done = max((row["step"] for row in rows), default=0)
    saved = found[1].step if found else 0
    return f"{done} steps were done, {saved} are saved" if done > saved else None


def _uses_another(place: Path, last: Path) -> str | None:
    progress.log_to_console(quiet=True)
    stream, sys.stderr = sys.stderr, open(os.devnull, "w")  # noqa: SIM115, PTH123
    try:
        found = checkpoints.newest(place)
    except errors.RlhfError as error:
        return f"no checkpoint left: {error}"
    finally:
        sys.stderr.close()
        sys.stderr = stream
    return "not detected" if found is None or found[0] == last else None


def stop_after(number: int) -> Callable[[], None]:
    """A patch: end the process hard once the ``number``-th checkpoint stands."""

    def patch() -> None:
        whole = checkpoints.Checkpoints.end_of_step

        def stopping(self: Any, at: int, *args: Any, **kwargs: Any) -> None:
            whole(self, at, *args, **kwargs)
            if self._order == number:
                os._exit(9)

        checkpoints.Checkpoints.end_of_step = stopping  # type: ignore[method-assign]

    return patch


def drop(item: str) -> Callable[[], None]:
    """A patch: when a checkpoint is given back, one state (or one item of it) stays as it is in a fresh process."""
    name, _, key = item.partition("/")

    def patch() -> None:
        def load(directory: Path, entry: Any, state: Any) -> None:
            held = snapshots.read(directory)
            for part, stateful in state.items():
                if part != name:
                    stateful.load_state_dict(held[part])
                elif key:
                    stateful.load_state_dict({**held[part], key: stateful.state_dict()[key]})
                elif hasattr(stateful, "trainer"):  # a part of TRL's trainer, which is not there yet: by its own means
                    stateful.trainer.restored[name] = held[name]
                    _forget(stateful.trainer, name)

        snapshots.load = load

    return patch


def _forget(trainer: Any, name: str) -> None:
    """TRL's trainer goes on without one of the parts."""
    none = lambda *_: None  # noqa: E731
    if name == "weights":
        trainer._load_from_checkpoint = none
    elif name == "generators":
        trainer._load_rng_state = none
    elif name == "optimizer":
        trainer._load_optimizer_and_scheduler = lambda _: trainer.lr_scheduler.load_state_dict(
            trainer.restored["scheduler"]
        )
    elif name == "scheduler":
        trainer._load_optimizer_and_scheduler = lambda _: trainer.optimizer.load_state_dict(
            trainer.restored["optimizer"]
        )
    else:
        state = json.loads(trainer.restored[name]["json"])
        trainer.restored[name]["json"] = json.dumps({**state, "global_step": 0, "epoch": 0})


def fail_at(number: int, code: int) -> Callable[[], None]:
    """A patch: the ``number``-th operation on the disk fails, and every one after it (the disk stays full)."""
    count = 0

    def patch() -> None:
        def before(operation: str, path: Path) -> None:
            nonlocal count
            count += 1
            if count >= number and operation != "remove":
                raise OSError(code, os.strerror(code), str(path))

        storage.before = before

    return patch


def limit_memory(room: int) -> Callable[[], None]:
    """A patch: the process may take ``room`` bytes more than it has."""

    def patch() -> None:
        size = int(Path("/proc/self/statm").read_text("ascii").split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (size + room, size + room))

    return patch


def torture(home: Path, stage: str, args: argparse.Namespace) -> list[Line]:
    """Every test of one stage."""
    subject = Torture(home, stage, args.seed)
    lines = [subject.kills(args.kills, args.cold), subject.signals(args.signals)]
    if not args.short:
        lines += [subject.every_checkpoint(), subject.other_processes()]
    lines.append(subject.dropped_states(args.drops))
    lines += subject.damage(args.flips, args.truncations)
    lines += [subject.failed_writes(args.writes), subject.rivals(args.rivals), subject.scarce_memory(args.memory)]
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stages", default=",".join(STAGES))
    parser.add_argument("--critic", default="least_squares", choices=("least_squares", "gradient"), help="PPO's")
    for name, number in (("kills", 200), ("signals", 100), ("flips", 500), ("truncations", 100), ("cold", 10)):
        parser.add_argument(f"--{name}", type=int, default=number)
    parser.add_argument("--writes", type=int, default=0, help="so many at random; 0: N = 1, 2, 3 ... until success")
    parser.add_argument("--rivals", type=int, default=50)
    parser.add_argument("--memory", type=int, default=50, help="runs in too little memory")
    parser.add_argument("--drops", type=int, default=0, help="so many state items at random; 0: all")
    parser.add_argument("--short", action="store_true", help="leave out what takes new processes")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, default=2, help="stages at a time")
    parser.add_argument("--out", type=Path, help="working directory, kept; default: a temporary one")
    args = parser.parse_args()
    home = args.out or Path(tempfile.mkdtemp(prefix="rlhf-torture-"))
    home.mkdir(parents=True, exist_ok=True)
    home = home.resolve()
    started = time.perf_counter()
    CONFIGS["ppo"]["value"]["fit"] = args.critic
    build_home(home)
    results = run_stages(home, args)
    lines = [line for stage in args.stages.split(",") for line in results[stage]]
    rows = [
        (
            f"{line.test} ({line.stage})",
            str(line.tried),
            str(line.good),
            ", ".join(f"{k}: {v}" for k, v in line.remarks.items()),
        )
        for line in lines
    ]
    progress.show(progress.table("Torture", ("test", "tried", "good", "remarks"), rows))
    for line in lines:
        for failure in line.failures[:5]:
            progress.console.print(f"{line.test}, {line.stage}: {failure}", markup=False)
    storage.write_json(
        home / "torture.json", {"seconds": time.perf_counter() - started, "lines": [vars(line) for line in lines]}
    )
    progress.console.print(f"{time.perf_counter() - started:.0f} s; figures in {home}/torture.json")
    good = all(line.tried == line.good for line in lines)
    if good and not args.out:
        shutil.rmtree(home)
    sys.exit(0 if good else 1)


def run_stages(home: Path, args: argparse.Namespace) -> dict[str, list[Line]]:
    """Each stage in a process of its own, ``--processes`` at a time; no threads here, because children are forked."""
    waiting, running, results = args.stages.split(","), {}, {}
    while waiting or running:
        while waiting and len(running) < args.processes:
            stage = waiting.pop(0)
            pid = os.fork()
            if pid == 0:
                code = 1
                with contextlib.suppress(Exception):
                    found = torture(home, stage, args)
                    (home / f"{stage}.json").write_text(json.dumps([vars(line) for line in found]))
                    code = 0
                os._exit(code)
            running[pid] = stage
        pid, status = os.wait()
        stage = running.pop(pid)
        if status:
            raise SystemExit(f"the torture of {stage} broke down, see {home}/log.txt")
        results[stage] = [Line(**line) for line in json.loads((home / f"{stage}.json").read_text())]
    return results


if __name__ == "__main__":
    main()
