"""The commands one after the other on the embedded world, small: what they write, skip, refuse and say."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny
from safetensors import safe_open

ROOT = Path(__file__).parents[1]


def rlhf(*args, cwd, stdin=None, code=0, **environment):
    command = [sys.executable, "-m", "rlhf", *map(str, args)]
    env = {**os.environ, **environment}
    done = subprocess.run(command, capture_output=True, text=True, cwd=cwd, input=stdin, check=False, env=env)
    assert done.returncode == code, done.stderr
    return done


@pytest.fixture(scope="module")
def chain(tmp_path_factory):
    """A working directory with shortened shipped configs, brought up to date by ``rlhf pipeline``."""
    home = tmp_path_factory.mktemp("chain")
    (home / "configs").mkdir()
    short = {
        "sft": {
            "demo:demonstrations": '"demo:demonstrations?size=240"',
            "end_token_samples: 96": "end_token_samples: 24",
        },
        "train-rm": {
            "demo:preferences": '"demo:preferences?size=60"',
            "standardise_samples: 192": "standardise_samples: 32",
        },
        "ppo": {
            "path: demo:prompts": 'path: "demo:prompts?size=120"',
            "\nsteps: 28": "\nsteps: 3",
            "every: 7": "every: 2",
            "num_prompts: 64": "num_prompts: 16",
            "batch_size: 64": "batch_size: 16",
            "minibatch_size: 32": "minibatch_size: 8",
            "pretrain_steps: 8": "pretrain_steps: 1",
            "save_every: 14": "save_every: 2",
            "weight: 1.0": "accept: failed",
        },
        "eval-rm": {"size=300": "size=40", "num_resamples: 2000": "num_resamples: 200"},
        "collect": {"size=200": "size=12"},
        "pipeline": {},
    }
    for name, changes in short.items():
        text = (ROOT / "configs" / f"{name}.yaml").read_text()
        for old, new in changes.items():
            assert old in text, (name, old)
            text = text.replace(old, new)
        (home / "configs" / f"{name}.yaml").write_text(text)
    (home / "first.json").write_text(rlhf("pipeline", "--json", cwd=home).stdout)
    return home


def manifest(home, stage):
    return json.loads((home / "runs" / stage / "manifest.json").read_text())


def rows_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_the_pipeline_runs_every_stage_and_then_skips_them(chain):
    assert {row["outcome"] for row in json.loads((chain / "first.json").read_text())} == {"run"}
    again = rlhf("pipeline", "--json", cwd=chain)
    assert {row["outcome"] for row in json.loads(again.stdout)} == {"up to date"}
    assert "is up to date, skipped" in again.stderr


@pytest.mark.parametrize(
    ("stage", "files"),
    [
        ("sft", ["adapter/adapter_model.safetensors", "adapter/adapter_config.json", "tokenizer/tokenizer.json"]),
        ("train-rm", ["adapter/adapter_model.safetensors", "head/head.safetensors", "head/head.json"]),
        (
            "ppo",
            [
                "adapter/adapter_model.safetensors",
                "checkpoints/step-2/tensors.safetensors",
                "checkpoints/best/policy/adapter/adapter_model.safetensors",
                "checkpoints/last/value/critic.safetensors",
                "samples/step-0.jsonl",
                "samples/step-3.jsonl",
            ],
        ),
        ("eval-rm", ["eval.json", "plots/reliability.png", "plots/length_gap.png"]),
    ],
)
def test_a_run_directory_holds_what_it_should(chain, stage, files):
    run = chain / "runs" / stage
    for name in ["manifest.json", "config.yaml", "run.log", *files]:
        assert (run / name).stat().st_size > 0, name
    assert not [path for path in run.rglob("*") if path.suffix in (".bin", ".pt", ".pth", ".pkl")]
    key, rows = {"sft": ("data", 240), "train-rm": ("data", 60), "ppo": ("prompts", 120), "eval-rm": ("data", 40)}[
        stage
    ]
    assert manifest(chain, stage)["details"]["dropped"] == {key: {"rows": rows, "dropped": {}}}


def test_the_rounds_of_ppo_say_what_matters(chain):
    rows = rows_of(chain / "runs/ppo/metrics.jsonl")
    steps = [row for row in rows if "update/policy_loss" in row]
    assert [row["step"] for row in steps] == [1, 2, 3]
    assert all(row["update/optimizer_steps"] == 4 for row in steps)
    for name in (
        "rollout/score",
        "rollout/exact_kl_nats",
        "rollout/entropy_nats",
        "update/policy_grad_norm",
        "update/value_loss",
        "update/policy_clip_fraction",
        "rollout/explained_variance",
        "rollout/explained_variance_first_third",
    ):
        assert all(isinstance(row[name], float) for row in steps), name
    assert abs(steps[0]["rollout/exact_kl_nats"]) < 1e-4 and steps[0]["rollout/kl_nats"] == pytest.approx(0, abs=1e-4)
    assert [row["step"] for row in rows if "eval/score" in row] == [0, 2, 3]
    details = manifest(chain, "ppo")["details"]
    assert details["last_step"] == 3 and details["use"] == "best" and details["value_pretraining"]["batches"] <= 1
    sample = json.loads((chain / "runs/ppo/samples/step-3.jsonl").read_text().splitlines()[0])
    assert {"prompt", "response", "finished", "score", "exact_kl"} <= set(sample)


def test_lineage_is_proven_by_digests(chain):
    shown = rlhf("show", "runs/ppo", cwd=chain).stdout
    assert "policy: runs/sft (unchanged)" in shown and "rewards.0: runs/train-rm (unchanged)" in shown
    found = json.loads(rlhf("show", "runs/eval-rm", "--json", cwd=chain).stdout)
    assert [row["stage"] for row in found["lineage"]] == ["train-rm", "sft"]
    assert (
        found["parents"]["reward"]["digest"]
        == json.loads(rlhf("show", "runs/train-rm", "--json", cwd=chain).stdout)["digest"]
    )


def test_generate_and_score_stand_in_a_pipe(chain):
    prompts = '{"prompt": "hi , anna here . my red kettle arrived broken . it is order #47 ."}\n' * 2
    made = rlhf("generate", "runs/ppo", "--seed", "3", "-n", "2", cwd=chain, stdin=prompts).stdout
    rows = [json.loads(line) for line in made.splitlines()]
    assert len(rows) == 4 and all(row["response"] for row in rows)
    assert made == rlhf("generate", "runs/ppo", "--seed", "3", "-n", "2", cwd=chain, stdin=prompts).stdout
    scored = [json.loads(line) for line in rlhf("score", "runs/train-rm", cwd=chain, stdin=made).stdout.splitlines()]
    assert [row["response"] for row in scored] == [row["response"] for row in rows]
    assert all(isinstance(row["score"], float) for row in scored)
    rlhf("score", "runs/sft", cwd=chain, stdin=made, code=5)


def test_collected_preferences_train_a_reward_model(chain):
    rlhf("collect", cwd=chain)
    rows = [json.loads(line) for line in (chain / "runs/collect/preferences.jsonl").read_text().splitlines()]
    assert rows and all(sorted(row["ranks"])[0] == 1 and row["provenance"]["policy"] == "runs/sft" for row in rows)
    for row in rows:
        order = sorted(range(len(row["ranks"])), key=lambda i: row["ranks"][i])
        scores = [row["scores"][i] for i in order]
        assert scores == sorted(scores, reverse=True)
    shown = rlhf(
        "train-rm", "run_dir=runs/rm2", "data.path=runs/collect", "batch.batch_size=4", "--dry-run", cwd=chain
    ).stdout
    assert f"{len(rows)} rows" in shown or "prompts with" in shown


def test_a_changed_config_is_refused_by_name_and_overwriting_keeps_the_old_run(chain):
    done = rlhf("eval-rm", "num_bins=7", cwd=chain, code=5)
    assert "num_bins: 10 -> 7" in done.stderr and "Traceback" not in done.stderr
    rlhf("eval-rm", "num_bins=7", "--overwrite", cwd=chain)
    assert (chain / "runs/eval-rm.old-1/manifest.json").is_file()
    again = rlhf("pipeline", "--json", cwd=chain)
    assert "num_bins: 7 -> 10" in again.stderr
    assert [row["outcome"] for row in json.loads(again.stdout)].count("run") == 1


def test_a_dry_run_counts_and_writes_nothing(chain):
    shown = rlhf("ppo", "run_dir=runs/other", "--dry-run", cwd=chain).stdout
    assert "prompts to train on" in shown and "no run yet" in shown and not (chain / "runs/other").exists()


def test_a_model_that_is_not_given_the_tokens_to_stop_is_exit_7_with_the_fix_and_a_finished_run(chain):
    done = rlhf("sft", "run_dir=runs/endless", "sampling.max_new_tokens=2", cwd=chain, code=7)
    assert "end with '<eos>'" in done.stderr and "lora.train_tokens" not in done.stderr
    found = manifest(chain, "endless")
    answers = found["details"]["ending"]["answers"]
    assert answers["num_longer"] == answers["num"] and found["metrics"]["eval/end_token_rate"] < 0.9
    assert f"Fix: sampling.max_new_tokens: {answers['tokens_95_percent']}, which holds 95% of them" in done.stderr
    assert found["files"] == manifest(chain, "sft")["files"]  # how it is sampled changes no weight


def test_a_damaged_parent_is_refused(chain, tmp_path):
    import shutil

    shutil.copytree(chain / "runs/sft", chain / "runs/damaged")
    path = chain / "runs/damaged/adapter/adapter_model.safetensors"
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)
    done = rlhf("train-rm", "policy=runs/damaged", "run_dir=runs/x", cwd=chain, code=5)
    assert "CKP005" in done.stderr and "adapter_model.safetensors" in done.stderr


def test_an_adapter_names_its_base_as_the_config_does(chain):
    written = json.loads((chain / "runs/ppo/adapter/adapter_config.json").read_text())
    assert json.loads((chain / "runs/sft/adapter/adapter_config.json").read_text())["base_model_name_or_path"] == (
        "demo:base"
    )
    assert written["base_model_name_or_path"] == "demo:base"


def test_the_same_seed_gives_the_same_bits(chain):
    rlhf("train-rm", "run_dir=runs/again", cwd=chain)
    first, second = manifest(chain, "train-rm"), manifest(chain, "again")
    assert first["files"] == second["files"] and first["identity"] == second["identity"]


@pytest.mark.parametrize(("stage", "file"), [("eval-rm", "eval.json"), ("collect", "preferences.jsonl")])
def test_another_hash_seed_changes_no_byte_of_what_is_measured_or_collected(chain, stage, file):
    for seed in ("0", "77"):
        rlhf(stage, f"run_dir=runs/{stage}-{seed}", cwd=chain, PYTHONHASHSEED=seed)
    one, two = ((chain / f"runs/{stage}-{seed}" / file).read_bytes() for seed in ("0", "77"))
    assert one == two and len(one) > 100


def test_every_other_way_of_ppo_runs_too(chain):
    (chain / "my_reward.py").write_text(
        "def short(prompts, responses):\n    return [-len(r) / 10 for r in responses]\n"
    )
    rlhf(
        "ppo",
        "run_dir=runs/other-ppo",
        "steps=2",
        "samples_per_prompt=2",
        "kl.target=2.0",
        "kl.estimator=exact",
        "rewards=[{run: runs/train-rm, weight: 0.5}, {function: 'my_reward:short', weight: 2.0}]",
        "missing_eos.mode=subtract",
        "update.value_lam=0.95",
        "runtime.gradient_checkpointing=true",
        "use=last",
        "evaluation.data={path: 'demo:prompts?split=validation&size=8'}",
        "report_to=none",
        "update.entropy_coef=0.01",
        "value.fit=gradient",
        cwd=chain,
    )
    details = manifest(chain, "other-ppo")["details"]
    assert details["used_step"] == 2 and details["kl_coef_at_the_end"] != 0.1
    assert (chain / "runs/other-ppo/checkpoints/best/value/head/head.safetensors").is_file()
    rows = rows_of(chain / "runs/other-ppo/metrics.jsonl")
    steps = [row for row in rows if "update/policy_loss" in row]
    assert all(row["update/value_grad_norm"] > 0 for row in steps)
    for row in steps:  # the terms add up to the score before a penalty of 1 for each missing end
        terms = row["rollout/score/train-rm"] + row["rollout/score/my_reward.short"]
        assert row["rollout/score"] == pytest.approx(terms - (1 - row["rollout/end_token_rate"]), abs=1e-5)
        assert row["rollout/score/my_reward.short"] < 0
    assert not (chain / "runs/other-ppo/tensorboard").exists() and (chain / "runs/ppo/tensorboard").is_dir()
    rlhf(
        "ppo",
        "run_dir=runs/loss-ppo",
        "steps=2",
        "kl.place=loss",
        "update.normalise_advantages=false",
        "rewards=[{function: 'my_reward:short'}]",
        "value.fit=gradient",
        cwd=chain,
    )
    assert "head of zeros" in (chain / "runs/loss-ppo/run.log").read_text()


def interrupted(command, metrics, signum, cwd):
    """Start, send the signal once a step is done, and return exit code and standard error."""
    process = subprocess.Popen([sys.executable, "-m", "rlhf", *command], cwd=cwd, stderr=subprocess.PIPE, text=True)
    while not (metrics.is_file() and '"step": 1' in metrics.read_text()) and process.poll() is None:
        time.sleep(0.02)
    process.send_signal(signum)
    _, told = process.communicate()
    return process.returncode, told


def test_a_signal_ends_a_run_after_its_step_and_resume_ends_it_with_the_same_files(chain):
    run = chain / "runs/cut"
    code, told = interrupted(("ppo", "run_dir=runs/cut"), run / "metrics.jsonl", signal.SIGTERM, chain)
    assert code == 143 and "Finishing this step" in told and "saved step-" in told and "Traceback" not in told
    refused = rlhf("ppo", "run_dir=runs/cut", cwd=chain, code=5)
    assert "unfinished run" in refused.stderr and "--resume" in refused.stderr
    other = rlhf("ppo", "run_dir=runs/cut", "optim.learning_rate=1e-4", "--resume", cwd=chain, code=5)
    assert "CKP008" in other.stderr and "optim.learning_rate: 0.0015 -> 0.0001" in other.stderr
    assert "Resumed from runs/cut/checkpoints/step-" in rlhf("resume", "runs/cut", cwd=chain).stderr
    assert manifest(chain, "cut")["files"] == manifest(chain, "ppo")["files"]
    name = "rollout/score/train-rm"
    cut, whole = (
        [row[name] for row in rows_of(chain / f"runs/{run}/metrics.jsonl") if name in row] for run in ("cut", "ppo")
    )
    assert cut == whole and len(cut) == 3
    assert "up to date" in rlhf("resume", "runs/cut", cwd=chain).stderr


def test_a_second_signal_quits_at_once_and_leaves_what_was_saved(chain):
    command = ("ppo", "run_dir=runs/twice", "save_every=1")
    run = chain / "runs/twice"
    process = subprocess.Popen([sys.executable, "-m", "rlhf", *command], cwd=chain, stderr=subprocess.PIPE, text=True)
    while not (run / "checkpoints/step-1").is_dir() and process.poll() is None:
        time.sleep(0.01)
    for _ in range(2):
        process.send_signal(signal.SIGTERM)
        time.sleep(0.05)
    _, told = process.communicate()
    assert process.returncode == 143 and "Second signal: quits at once" in told
    assert "Resumed from runs/twice/checkpoints/step-" in rlhf("resume", "runs/twice", cwd=chain).stderr
    assert manifest(chain, "twice")["files"] == manifest(chain, "ppo")["files"]


def test_an_allowed_change_takes_effect_from_the_next_step(chain):
    run = chain / "runs/changed"
    command = ("sft", "run_dir=runs/changed", "optim.schedule=constant", "optim.warmup_ratio=0")
    code, told = interrupted(command, run / "metrics.jsonl", signal.SIGTERM, chain)
    assert code == 143 and "saved step-" in told
    done = rlhf(*command, "optim.learning_rate=1e-5", "--resume", "--allow-change", "optim", cwd=chain)
    assert "Resumes with a change: optim.learning_rate" in done.stderr
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    rates = [row["train/learning_rate"] for row in rows if "train/learning_rate" in row]
    assert set(rates) == {rates[0], 1e-5} and rates[0] != 1e-5 and rates == sorted(rates, reverse=True)


def test_an_interrupted_pipeline_lets_its_stage_save_and_goes_on_with_it(chain):
    text = (chain / "configs/train-rm.yaml").read_text().replace("run_dir: runs/train-rm", "run_dir: runs/cut-rm")
    (chain / "cut.yaml").write_text(text)
    (chain / "pipe.yaml").write_text("stages: [{stage: train-rm, config: cut.yaml}]\n")
    metrics = chain / "runs/cut-rm/metrics.jsonl"
    code, told = interrupted(("pipeline", "-c", "pipe.yaml"), metrics, signal.SIGINT, chain)
    assert code == 130 and "saved step-" in told
    assert "Resumed from runs/cut-rm/checkpoints/step-" in rlhf("pipeline", "-c", "pipe.yaml", cwd=chain).stderr
    assert manifest(chain, "cut-rm")["files"] == manifest(chain, "train-rm")["files"]


def test_packing_and_checkpointing_learn_the_same_kind_of_adapter(chain):
    rlhf("sft", "run_dir=runs/packed", "packing=true", "runtime.gradient_checkpointing=true", cwd=chain)
    plain, packed = (manifest(chain, name)["metrics"] for name in ("sft", "packed"))
    assert packed["eval/loss"] < packed["eval/base_loss"] and abs(packed["eval/loss"] - plain["eval/loss"]) < 0.1


def test_an_untied_end_token_is_learnt_and_another_base_is_refused_before_anything_runs(chain, tmp_path):
    tiny.build(tmp_path / "model", tie=False)
    rows = [{"prompt": f"hi {n % 20}", "completion": f"ok {n % 3}", "id": n} for n in range(40)]
    (chain / "short.jsonl").write_text("\n".join(json.dumps(row) for row in rows) + "\n\n")
    done = rlhf(
        "sft",
        f"model.path={tmp_path / 'model'}",
        "data.path=short.jsonl",
        "run_dir=runs/untied",
        "epochs=20",
        'lora.train_tokens=["<|im_end|>"]',
        "min_end_token_rate=0.9",
        "sampling.max_new_tokens=16",
        "max_length=64",
        "save_every=100",
        "optim.learning_rate=5e-3",
        cwd=chain,
    )
    assert "data: ignored fields: id" in done.stderr and "data: blank lines skipped: 1" in done.stderr
    with safe_open(chain / "runs/untied/adapter/adapter_model.safetensors", "pt") as file:
        trained = {name: file.get_tensor(name) for name in file.keys() if "trainable_tokens" in name}  # noqa: SIM118
    with safe_open(tmp_path / "model/model.safetensors", "pt") as file:
        own = {name: file.get_tensor(name) for name in ("model.embed_tokens.weight", "lm_head.weight")}
    assert len(trained) == 2
    for name, row in trained.items():
        before = next(weight for key, weight in own.items() if key.split(".")[-2] in name)[2]
        assert (row[0] - before).abs().max() > 1e-3, name


@pytest.fixture(scope="module")
def exported(chain):
    """The chain's reward model as a sequence classifier that knows nothing of the run."""
    rlhf("export", "runs/train-rm", "elsewhere", cwd=chain)
    return "elsewhere"


def test_a_reward_model_from_elsewhere_scores_examines_and_ranks(chain, exported):
    rows = (chain / "runs/ppo/samples/step-3.jsonl").read_text().splitlines()
    finished = "".join(row + "\n" for row in rows if json.loads(row)["finished"])
    own = rlhf("score", "runs/train-rm", cwd=chain, stdin=finished).stdout.splitlines()
    other = rlhf("score", exported, cwd=chain, stdin=finished)
    assert "elsewhere scores as a model of its own and reads prompt, response and end token" in other.stderr
    for a, b in zip(own, other.stdout.splitlines(), strict=True):
        assert json.loads(a)["score"] == pytest.approx(json.loads(b)["score"], abs=1e-4)
    rlhf("score", "runs/train-rm", "--label", "1", cwd=chain, stdin=finished, code=2)

    examined = ("run_dir=runs/eval-elsewhere", "reward=null", f'model={{"path": "{exported}"}}')
    assert "comparisons" in rlhf("eval-rm", "--dry-run", *examined, cwd=chain).stdout
    sets = [word for override in examined for word in ("--set", override)]
    shown = rlhf("check", "configs/eval-rm.yaml", "--show", "1", *sets, cwd=chain).stdout
    assert "read as prompt, response and end token" in shown and "a model from elsewhere" in shown
    rlhf("eval-rm", *examined, cwd=chain)
    found, wanted = (
        json.loads((chain / f"runs/{name}/eval.json").read_text()) for name in ("eval-elsewhere", "eval-rm")
    )
    assert found["accuracy"] == wanted["accuracy"] and found["comparisons"] == wanted["comparisons"]

    ranked = ("collect", "-c", "configs/collect.yaml", "run_dir=runs/collect-elsewhere")
    rlhf(*ranked, "--set", f'labeller={{"model": {{"path": "{exported}"}}}}', cwd=chain)
    row = json.loads((chain / "runs/collect-elsewhere/preferences.jsonl").read_text().splitlines()[0])
    assert row["provenance"]["labeller"] == exported and len(set(row["scores"])) > 1
    refused = rlhf(
        "check", "configs/collect.yaml", "--set", 'labeller={"model": {"path": "runs/sft"}}', cwd=chain, code=4
    )
    assert "labeller.model: runs/sft has no readable config.json" in refused.stderr


def test_ppo_learns_from_a_reward_model_from_elsewhere_and_from_a_run_on_another_base(chain, exported, tmp_path):
    term = json.dumps({"model": {"path": exported}, "standardise_samples": 16})
    rlhf(
        "ppo", "run_dir=runs/ppo-elsewhere", f"rewards=[{term}]", "steps=1", "optim.value_learning_rate=1e-3", cwd=chain
    )
    made = manifest(chain, "ppo-elsewhere")
    assert made["identity"]["rewards.0.model.files"] and made["details"]["standards"][0]["scale"] > 0
    log = (chain / "runs/ppo-elsewhere/run.log").read_text()
    assert "elsewhere standardised on" in log and "has no use for optim.value_learning_rate." in log

    tiny.build(tmp_path / "model")
    rows = [{"prompt": f"hi {n % 20}", "completion": f"ok {n % 3}"} for n in range(40)]
    (chain / "few.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    other = ("max_length=64", "optim.learning_rate=5e-3", 'lora.train_tokens=["<|im_end|>"]')
    rlhf(
        "sft",
        f"model.path={tmp_path / 'model'}",
        "data.path=few.jsonl",
        "run_dir=runs/sft-other",
        "epochs=8",
        "min_end_token_rate=0",
        "sampling.max_new_tokens=16",
        *other,
        cwd=chain,
    )
    rlhf(
        "ppo",
        "policy=runs/sft-other",
        "run_dir=runs/ppo-other",
        "prompts.path=few.jsonl",
        "steps=1",
        "batch.batch_size=8",
        "batch.minibatch_size=8",
        "sampling.max_new_tokens=8",
        cwd=chain,
    )
    assert "is on a base of its own (demo:base)" in (chain / "runs/ppo-other/run.log").read_text()


def test_a_conversation_is_answered_scored_and_taken_up_again(chain, exported):
    ask = "hi , anna here . my red kettle arrived broken . it is order #47 ."
    turns = f"/again\n{ask}\n/again\n/reset\n{ask}\n/quit\n{ask}\n"
    done = rlhf("chat", "runs/ppo", "--reward", "runs/train-rm", cwd=chain, stdin=turns)
    assert "Nothing was asked yet" in done.stderr
    answers = [answer.strip() for answer in done.stdout.splitlines()]
    assert len(answers) == 3 and all(answers)
    assert done.stdout == rlhf("chat", "runs/ppo", "--reward", exported, cwd=chain, stdin=turns).stdout
    shown = re.findall(r"\[\d+ tokens, score (-?\d+\.\d+)\]", done.stderr)
    rows = "".join(json.dumps({"prompt": ask, "completion": answer}) + "\n" for answer in answers)
    scored = rlhf("score", "runs/train-rm", cwd=chain, stdin=rows).stdout.splitlines()
    assert [float(text) for text in shown] == pytest.approx([json.loads(row)["score"] for row in scored], abs=2e-3)

    greedy = ("--temperature", "0", "--max-new-tokens", "40")
    rlhf("export", "runs/ppo", "whole-policy", cwd=chain)
    said = [rlhf("chat", name, *greedy, cwd=chain, stdin=ask).stdout for name in ("runs/ppo", "whole-policy")]
    made = [
        json.loads(rlhf("generate", name, *greedy, cwd=chain, stdin=json.dumps({"prompt": ask})).stdout)["response"]
        for name in ("runs/ppo", "whole-policy")
    ]
    assert said[0] == said[1] and made[0] == made[1] == said[0].strip()
    for source, code, words in (
        ("runs/nothere", 5, "no such directory"),
        ("runs/train-rm", 5, "is a reward run"),
        ("whole-policy", 4, "has a chat template of its own"),
    ):
        template = ("--chat-template", "plain") if source == "whole-policy" else ()
        assert words in rlhf("chat", source, *template, cwd=chain, stdin=ask, code=code).stderr
    assert "leave it out" in rlhf("chat", "runs/ppo", "--chat-template", "plain", cwd=chain, stdin=ask, code=2).stderr
