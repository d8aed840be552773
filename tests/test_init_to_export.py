"""From preferences and a model directory to models that plain transformers reads, without an edit in between."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tiny

ROOT = Path(__file__).parents[1]
STORIES = ROOT.parent / "shared" / "models" / "stories260K"

# Another process, and nothing of this package in it: greedy tokens and a score of one conversation.
PLAIN = """
import json, sys, torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
policy, reward, prompt = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(policy)
ask = [{"role": "user", "content": prompt}]
ids = tokenizer.apply_chat_template(ask, add_generation_prompt=True, return_tensors="pt", return_dict=False)
model = AutoModelForCausalLM.from_pretrained(policy).eval()
whole = model.generate(ids, do_sample=False, max_new_tokens=8)[0, ids.shape[1]:]
ends = model.generation_config.eos_token_id
text = tokenizer.decode(whole, skip_special_tokens=True).removeprefix(" ")
head = AutoModelForSequenceClassification.from_pretrained(reward).eval()
row = torch.cat([ids[0], whole])
with torch.no_grad():
    score = float(head(input_ids=row[None]).logits[0, 0])
print(json.dumps({"text": text, "score": score, "ended": int(whole[-1]) in ends, "rlhf": "rlhf" in sys.modules}))
"""


def command(cwd, *args, stdin=None):
    done = subprocess.run(
        [sys.executable, "-m", "rlhf", *map(str, args)],
        cwd=cwd,
        capture_output=True,
        text=True,
        input=stdin,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def from_init_to_export(home, model, data, prompt):
    """Every command as a person would type it; the differences, and what transformers alone says of one prompt."""
    command(home, "init", "new", "--data", data, "--model", model)
    command(
        home / "new", "pipeline", "--set", "ppo.rewards.0.accept=failed"
    )  # no reward model worth the name comes out
    policy, reward = (
        json.loads(command(home / "new", "export", f"runs/{run}", out, "--json"))
        for run, out in (("ppo", "policy"), ("train-rm", "reward"))
    )
    code = [sys.executable, "-c", PLAIN, "policy", "reward", prompt]
    done = subprocess.run(code, cwd=home / "new", capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    plain = json.loads(done.stdout)
    asked = json.dumps({"prompt": prompt})
    greedy = ("--temperature", "0", "--max-new-tokens", "8")
    own = json.loads(command(home / "new", "generate", "runs/ppo", *greedy, stdin=asked))
    assert plain["text"] == own["response"] and plain["ended"] == own["finished"] and not plain["rlhf"]
    if plain["ended"] and own["response"]:
        answered = json.dumps({"prompt": prompt, "completion": own["response"]})
        score = json.loads(command(home / "new", "score", "runs/train-rm", stdin=answered))["score"]
        assert plain["score"] + reward["constant"] == pytest.approx(score, abs=1e-3)
    figures = {
        kind: (found["max_difference"], found["max_difference_bfloat16"])
        for kind, found in (("policy", policy), ("reward", reward))
    }
    print(f"\n{model}: {figures}")
    return figures


@pytest.mark.slow
@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
def test_random_models_go_from_preferences_to_exports(tmp_path, architecture):
    tiny.build(tmp_path / "m", architecture, tie=architecture != "llama", template=None)
    rows = [{"prompt": f"q{n}", "chosen": "ok" + "!" * (n % 2), "rejected": f"no{n % 3}"} for n in range(150)]
    (tmp_path / "prefs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    figures = from_init_to_export(tmp_path, "m", "prefs.jsonl", "q7")
    assert all(exact < 1e-4 and half < 1.0 for exact, half in figures.values())


@pytest.mark.slow
@pytest.mark.skipif(not STORIES.is_dir(), reason="the model is not here")
def test_a_pretrained_model_goes_from_preferences_to_exports(tmp_path):
    command(tmp_path, "demo", "--out", "world", "--size", "240")
    figures = from_init_to_export(
        tmp_path, STORIES, "world/preferences.jsonl", "my red kettle arrived broken . it is order #47 ."
    )
    assert all(exact < 1e-4 for exact, _ in figures.values())
