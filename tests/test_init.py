"""``rlhf init``: what it reads off data and models, what it decides, and that what it writes runs as it stands."""

from __future__ import annotations

import errno
import json
import math
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import tiny
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from rlhf import storage
from rlhf.config import load, yaml_reader
from rlhf.config.sections import DataSection
from rlhf.config.stages import SftConfig
from rlhf.data import sources
from rlhf.data.records import Comparison, Demonstration, Judgement, Message, Prompt, prompt_key
from rlhf.errors import RlhfError
from rlhf.models import adapters, embeddings
from rlhf.stages.registry import STAGES
from rlhf.start import chain, choose, look, parts, project, render, told
from rlhf.start.facts import Lengths, ModelFacts, Rows
from rlhf.start.render import Choice

ROOT = Path(__file__).parents[1]
CONFIGS = ("sft", "train-rm", "eval-rm", "ppo", "pipeline")


def lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return str(path)


def ask(number):
    return (Message("user", f"q{number}"),)


def pair(number, **more):
    return {"prompt": f"q{number}", "chosen": "ok" + "!" * (number % 2), "rejected": f"no{number % 3}", **more}


# ---- parts ----


def comparison(number, responses=("a", "b")):
    return Comparison(ask(number), tuple(responses), (Judgement(0, 1),), f"p:{number}")


def shown(number):
    return Demonstration((*ask(number), Message("assistant", "a")), f"d:{number}")


def rows(compared=(), demonstrated=(), asked=()):
    return Rows(
        tuple(map(shown, demonstrated)), tuple(map(comparison, compared)),
        tuple(Prompt(ask(n), f"a:{n}") for n in asked), (),
    )  # fmt: skip


def keys(records):
    return {prompt_key(record.prompt) for record in records}


def test_preferences_alone_make_four_parts_that_share_no_prompt_and_lose_none():
    found = parts.split(rows([*range(2000), *range(500)]))
    sets = [keys(getattr(found, name)) for name in parts.SHARES]
    assert sum(map(len, sets)) == len(set().union(*sets)) == 2000 and found.left_out == 0
    # a share's standard error is at most sqrt(.25 / 2000) = .011
    for found_keys, share in zip(sets, (0.25, 0.45, 0.20, 0.10), strict=True):
        assert abs(len(found_keys) / 2000 - share) < 0.045
    assert (
        len(found.sft)
        + len(found.reward)
        + len(found.eval)
        + sum(1 + (number < 500) for number in range(2000) if prompt_key(ask(number)) in keys(found.ppo))
        == 2500
    )
    assert len(found.ppo) == len(keys(found.ppo))


def test_a_prompt_stays_in_its_part_when_rows_are_added_or_turned_round():
    few, many = parts.split(rows(range(120))), parts.split(rows(reversed(range(600))))
    for name in parts.SHARES:
        assert keys(getattr(few, name)) == keys(getattr(many, name)) & {prompt_key(ask(n)) for n in range(120)}


def test_own_demonstrations_and_prompts_take_the_place_of_the_shares():
    found = parts.split(rows(range(200), range(200, 300), range(300, 400)))
    assert keys(found.sft) == {prompt_key(ask(n)) for n in range(200, 300)}
    assert keys(found.ppo) == {prompt_key(ask(n)) for n in range(300, 400)}
    assert len(found.reward) + len(found.eval) == 200 and found.left_out == 0


def test_a_prompt_with_demonstration_and_preferences_serves_one_stage_and_the_rest_is_counted():
    found = parts.split(rows(range(300), range(300)))
    sets = [keys(getattr(found, name)) for name in parts.SHARES]
    assert sum(map(len, sets)) == 300 == len(set().union(*sets))
    assert all(record.where.startswith("d:") for record in found.sft)
    assert found.left_out == 300  # of each prompt one of its two rows


def test_too_few_prompts_and_prompts_alone_are_refused():
    with pytest.raises(RlhfError, match=r"DAT031.*too few prompts: the parts have sft \d+, reward \d+, ppo \d"):
        parts.split(rows(range(8)))
    with pytest.raises(RlhfError, match="DAT032.*nothing to learn from.*collect"):
        parts.split(rows(asked=range(99)))
    alone = parts.split(rows(demonstrated=range(5), asked=range(9)))
    assert len(alone.sft) == 5 and not alone.reward and alone.left_out == 9


def ranking(ranks):
    judgements = [
        Judgement(*((i, j) if ranks[i] <= ranks[j] else (j, i)), probability=0.5 if ranks[i] == ranks[j] else 1.0)
        for i in range(len(ranks)) for j in range(i + 1, len(ranks))
    ]  # fmt: skip
    return Comparison(ask(0), tuple(f"r{i}" for i in range(len(ranks))), tuple(judgements), "here")


@given(st.lists(st.integers(1, 4), min_size=2, max_size=5).filter(lambda ranks: len(set(ranks)) > 1))
@settings(deadline=None, max_examples=60)
def test_the_best_answer_and_the_ranks_of_a_ranking_are_those_that_it_came_from(ranks):
    record = ranking(ranks)
    assert parts.best_answer(record) == f"r{ranks.index(min(ranks))}"
    found = parts.ranks(record)
    for i, own in enumerate(ranks):
        for j, other in enumerate(ranks):
            assert (found[i] < found[j]) == (own < other)


def test_what_is_written_is_read_back_as_the_same_records(tmp_path):
    talk = (Message("system", "be kind"), *ask(1), Message("assistant", "yes"), Message("user", "and?"))
    records = {
        "demonstrations": [shown(3), Demonstration((*talk, Message("assistant", "no")), "")],
        "comparisons": [
            Comparison(talk, ("b", "a"), (Judgement(0, 1, margin=0.5),), ""), ranking([2, 1, 2]), comparison(4),
        ],
        "prompts": [Prompt(talk, ""), Prompt(ask(5), "")],
    }  # fmt: skip
    for kind, wanted in records.items():
        path = lines(tmp_path / f"{kind}.jsonl", map(parts.as_json, wanted))
        found = getattr(sources, f"load_{kind}")(DataSection(path=path)).records
        assert [vars(record) | {"where": ""} for record in found] == [vars(r) | {"where": ""} for r in wanted]


# ---- figures ----


def test_a_limit_is_the_longest_row_or_the_quantile_where_a_few_are_much_longer():
    even = choose.limit([100] * 99 + [140], 512)
    assert (even.tokens, even.num_longer) == (144, 0)
    long = choose.limit([100] * 99 + [500], None)
    assert (long.tokens, long.longest, long.quantile, long.num_longer) == (104, 500, 100, 1)
    assert choose.limit([300] * 10, 128).num_longer == 10
    assert "the 0.99 quantile is 100 tokens, the longest 500; 1 of 100 rows are longer" in long.why("x")


@given(st.lists(st.integers(1, 50), min_size=1, max_size=40), st.sampled_from([0.5, 0.9, 0.99]))
@settings(deadline=None, max_examples=60)
def test_a_quantile_is_the_least_length_that_the_share_of_the_rows_does_not_exceed(lengths, share):
    wanted = min(x for x in lengths if sum(y <= x for y in lengths) >= share * len(lengths))
    assert choose.quantile(lengths, share) == wanted


@pytest.mark.parametrize(
    ("num_rows", "most", "wanted"),
    [(10_000, 32, 32), (640, 32, 32), (639, 32, 16), (100, 32, 4), (30, 32, 4), (3, 32, 2), (1, 32, 1)],
)
def test_a_batch_is_a_power_of_two_that_leaves_twenty_steps_a_pass(num_rows, most, wanted):
    assert choose.batch_size(num_rows, most) == wanted


def test_the_other_figures_are_what_their_rules_say():
    assert choose.new_tokens([10] * 100, None) == 16 and choose.new_tokens([100] * 100, None) == 152
    assert choose.new_tokens([100] * 100, 128) == 64 and choose.new_tokens([4000], None) == 1024
    assert choose.dropped_fraction([[9] * 3 + [99], [9] * 9 + [99]], 10) == 0.25
    assert choose.dropped_fraction([[9], []], 10) == 0.05
    assert choose.micro_batch_size(512, 8192, 64) == 16 and choose.micro_batch_size(3000, 8192, 64) == 2
    assert choose.micro_batch_size(9000, 8192, 64) == 1 and choose.micro_batch_size(8, 8192, 4) == 4
    assert choose.epochs(640, 32, 60, 10) == 3 and choose.epochs(20, 4, 300, 10) == 10
    assert choose.epochs(99_999, 32, 60, 10) == 1
    assert choose.holdout_fraction(1000, 0.05, 16) == 0.05 and choose.holdout_fraction(100, 0.05, 16) == 0.16
    assert choose.holdout_fraction(10, 0.05, 16) == 0.25
    sizes = [choose.size_of(number) for number in (1_400_000, 124_000_000, 494_000_000, 8_030_000_000, 70_000_000_000)]
    assert [size.sft for size in sizes] == [3e-3, 2e-4, 2e-4, 2e-4, 1e-4]
    assert [size.is_large for size in sizes] == [False, True, True, True, True]


def facts(**changes):
    settings = {
        "path": "m", "num_parameters": 1, "context_length": 64, "template": None, "end_token": "<end>",
        "pad_token": "<pad>", "ends": ("<eos>",), "marks": ("<turn>", "<end>"), "untrained": (),
        "is_initialised": False, "bos": "",
    }  # fmt: skip
    return ModelFacts(**settings | changes)


@pytest.mark.parametrize(
    ("changes", "instruct", "tokens", "why"),
    [
        ({"ends": ("<eos>", "<end>")}, True, [], "ends its own turns with '<end>'"),
        ({}, False, ["<turn>", "<end>"], "the base ends with '<eos>', the template with '<end>'"),
        ({"template": "chatml"}, False, ["<turn>", "<end>"], "the base ends with '<eos>'"),
        ({"ends": ("<end>",), "untrained": ("<end>",)}, False, ["<end>"], "like those of tokens never seen"),
        ({"template": "plain", "ends": ("<end>",), "marks": ("<end>",), "untrained": None}, False, [],
         "ended documents in pretraining"),
        ({"ends": ("<end>",), "is_initialised": True}, False, ["<turn>", "<end>"], "as they were initialised"),
    ],
    ids=["instruct", "base", "no template", "untrained", "documents", "random"],
)  # fmt: skip
def test_the_tokens_that_are_trained_follow_from_what_the_base_ends_with(changes, instruct, tokens, why):
    model = facts(**changes)
    assert model.is_instruct is instruct
    found, reason = choose.train_tokens(model)
    assert found == tokens and why in reason


def test_untrained_rows_are_zero_or_next_to_each_other_and_random_matrices_are_seen():
    torch.manual_seed(1)
    drawn = torch.randn(200, 64)
    assert embeddings.looks_initialised(drawn) and not embeddings.looks_untrained(drawn, 7)
    trained = drawn * torch.rand(200, 1).add(0.5)
    trained[3] = 0
    trained[[5, 9]] = trained[5] + 0.001 * torch.randn(2, 64)
    assert not embeddings.looks_initialised(trained)
    assert embeddings.untrained(trained, range(20)) == {3, 5, 9}


@pytest.mark.parametrize(
    ("num_parameters", "rate", "micro", "concurrency"), [(494_000_000, 2e-4, 4, 64), (8_030_000_000, 2e-4, 2, 32)]
)
def test_a_large_base_gets_bfloat16_checkpointing_and_batches_that_fit(
    tmp_path, num_parameters, rate, micro, concurrency
):
    """Rows of 1,600 tokens with a tail beyond 2,048: 8,192 tokens a forward pass hold 4 at the limit, 4,096 two."""
    split = parts.split(rows(range(4000)))
    shares = {name: len(getattr(split, name)) for name in parts.SHARES}
    whole = {name: (1600,) * (count - count // 10) + (3000,) * (count // 10) for name, count in shares.items()}
    lengths = {name: Lengths(found, tuple(length - 500 for length in found), (500,) * len(found))
               for name, found in whole.items()}  # fmt: skip
    basis = chain.basis(facts(num_parameters=num_parameters, context_length=32_768), split, lengths, False)
    found = {}
    for name, tree in chain.build(basis).items():
        if name != "pipeline":
            (tmp_path / "x.yaml").write_text(render.render("A title.", tree))
            found[name] = load.load(STAGES[name].config_class, tmp_path / "x.yaml")
    sft, reward, ppo = found["sft"], found["train-rm"], found["ppo"]
    assert sft.model.dtype == "bfloat16" and sft.runtime.gradient_checkpointing and ppo.runtime.gradient_checkpointing
    assert sft.max_length == 2048 and sft.optim.learning_rate == rate and ppo.optim.learning_rate == 3e-5
    assert 0.1 <= sft.data.max_dropped_fraction < 0.2 and sft.batch.batch_size == 32
    assert (sft.batch.micro_batch_size, reward.batch.micro_batch_size) == (micro, micro // 2)
    assert sft.sampling.concurrency == ppo.sampling.concurrency == concurrency
    assert (ppo.prompts.max_tokens, ppo.sampling.max_new_tokens, ppo.batch.batch_size) == (2048 - 752, 752, 128)
    assert f"{shares['eval'] // 10} of {shares['eval']} rows are longer" in dict(
        told.figures(basis, chain.build(basis)))["eval-rm"]  # fmt: skip


# ---- text ----


@given(st.text(max_size=12), st.one_of(st.floats(1e-9, 1e9), st.integers(), st.booleans(), st.none()))
@settings(deadline=None, max_examples=80)
@example("null", 1.5)
@example("true", 3e-05)
@example(".5", 0)
def test_a_rendered_config_is_read_as_the_values_that_it_was_made_of(text, number):
    if yaml_reader.UNWRITABLE.search(text):
        return
    why = "a reason that is long enough to stand above its key, " * 3
    tree = {"a": Choice(text, why), "b": {"c": Choice(number, "short"), "d": [text, "x"]}, "e": [{"f": text}]}
    written = render.render("A title.", tree)
    found, _ = yaml_reader.read_text(written, "here")
    wanted = render.values(tree)
    if isinstance(number, float):
        assert math.isclose(found["b"].pop("c"), wanted["b"].pop("c"), rel_tol=1e-5)
    assert found == wanted
    assert max(map(len, written.splitlines())) <= 120


# ---- looking ----


@pytest.mark.parametrize(
    ("row", "form"),
    [
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, "preferences"),
        ({"chosen": [], "rejected": []}, "preferences"),
        ({"prompt": "a", "responses": [], "ranks": []}, "rankings"),
        ({"responses": [], "ratings": [1, 2.5]}, "ratings"),
        ({"prompt": "a", "completion": "b"}, "demonstrations"), ({"prompt": "a"}, "prompts"),
        ({"messages": [{"role": "user"}, {"role": "assistant"}]}, "demonstrations"),
        ({"messages": [{"role": "user"}]}, "prompts"),
    ],
)  # fmt: skip
def test_the_form_of_a_file_is_seen_in_its_first_row(row, form):
    assert look.form_of(row, "f") == form


def test_ratings_become_ranks_files_are_merged_with_their_counts_and_strange_forms_are_refused(tmp_path):
    rated = [{"prompt": f"p{n}", "responses": ["a", "b", "c"], "ratings": [1, 3.5, 3.5]} for n in range(4)]
    even = {"prompt": "x", "responses": ["a", "b"], "ratings": [2, 2]}
    paths = [
        lines(tmp_path / "r.jsonl", [*rated, even]),
        lines(tmp_path / "p.jsonl", [pair(1), pair(2), {"prompt": "z", "chosen": "s", "rejected": "s"}]),
        lines(tmp_path / "q.jsonl", [{"prompt": "only"}]),
    ]
    found = look.files(paths)
    assert [parts.ranks(record) for record in found.comparisons[:4]] == [[3, 1, 1]] * 4
    assert len(found.comparisons) == 6 and len(found.prompts) == 1
    assert found.counts[0].endswith("4 ratings; 1 rows dropped: all ratings equal")
    assert "2 preferences; 1 rows dropped: two differently ranked responses are equal" in found.counts[1]
    with pytest.raises(RlhfError, match="DAT003.*no known form of a row: it has question, solution"):
        look.files([lines(tmp_path / "s.jsonl", [{"question": "a", "solution": "b"}])])
    with pytest.raises(RlhfError, match="DAT004.*p.jsonl:2"):
        look.files([lines(tmp_path / "p.jsonl", [pair(1), {"prompt": "z", "chosen": "s"}])])


def test_a_model_is_described_by_its_tokenizer_config_and_embeddings(tmp_path):
    plain, chat = look.model(str(tiny.build(tmp_path / "m", "qwen2", template=None)))
    assert plain.template == "chatml" and chat.end_token == "<|im_end|>" and plain.is_initialised
    assert plain.marks == ("<|im_end|>", "<|im_start|>") and plain.ends == ("<|endoftext|>",)
    model = tiny.Qwen2ForCausalLM.from_pretrained(tmp_path / "m")
    assert plain.num_parameters == sum(parameter.numel() for parameter in model.parameters())
    with torch.no_grad():
        weight = model.get_input_embeddings().weight
        weight *= torch.linspace(0.5, 1.5, len(weight))[:, None]
        weight[2] = weight[3]  # the end token is like the other one
    model.save_pretrained(tmp_path / "m")
    found, _ = look.model(str(tmp_path / "m"))
    assert not found.is_initialised and found.untrained == ("<|im_end|>",)
    assert look.model("demo:base")[0].untrained == ()


def test_a_template_that_writes_earlier_turns_anew_makes_loss_on_the_last_turn(tmp_path):
    shorten = tiny.CHATML.replace("{{ m['content'] }}", "{{ m['content'] if loop.last else m['content'][:1] }}")
    tiny.build(tmp_path / "m", template=shorten.replace("if loop.last", "if loop.last or m['role'] == 'user'"))
    talk = [*ask(0), Message("assistant", "first"), *ask(1), Message("assistant", "second")]
    rows_ = [{"messages": [{"role": m.role, "content": f"{m.content}{n}"} for m in talk]} for n in range(30)]
    project.make(tmp_path / "new", [lines(tmp_path / "d.jsonl", rows_)], str(tmp_path / "m"))
    assert load.load(SftConfig, tmp_path / "new/configs/sft.yaml").loss_on == "last_turn"
    tiny.build(tmp_path / "n")
    project.make(tmp_path / "other", [lines(tmp_path / "d.jsonl", rows_)], str(tmp_path / "n"))
    assert load.load(SftConfig, tmp_path / "other/configs/sft.yaml").loss_on == "all_turns"


# ---- whole ----


def test_preferences_alone_run_to_the_end_with_no_hand_edits(tmp_path, monkeypatch, here):
    tiny.build(tmp_path / "m", "llama")
    lines(tmp_path / "prefs.jsonl", map(pair, range(150)))
    monkeypatch.chdir(tmp_path)
    code, text = here("init", "new", "--data", "prefs.jsonl", "--model", "m")
    assert code == 0 and "prefs.jsonl: 150 preferences" in text and "no prompt is in two parts" in text
    assert "never pretrained" in text and "'<|pad|>', distinct from the end token" in text
    monkeypatch.chdir(tmp_path / "new")
    code, text = here("check")
    assert code == 0 and text.count("a sound ") == len(CONFIGS)
    written = {name: Path(f"configs/{name}.yaml").read_text() for name in CONFIGS}
    assert all(text.count("# ") >= (1 if name == "pipeline" else 3) for name, text in written.items())
    sets = [set() for _ in range(4)]
    for found, name in zip(sets, ("sft", "preferences", "prompts", "eval"), strict=True):
        found |= {json.loads(line)["prompt"] for line in Path(f"data/{name}.jsonl").read_text().splitlines()}
    assert sum(map(len, sets)) == len(set().union(*sets)) == 150
    for stage in CONFIGS[:4]:
        code, text = here(stage)
        assert code == 0, text
    manifests = {name: json.loads(Path(f"runs/{name}/manifest.json").read_text()) for name in CONFIGS[:4]}
    assert manifests["sft"]["metrics"]["eval/end_token_rate"] >= 0.2
    assert manifests["train-rm"]["details"]["rows"]["num_dropped"] == 0
    sft = load.load(SftConfig, Path("configs/sft.yaml"))
    assert sft.lora.train_tokens == ["<|im_end|>", "<|im_start|>"] and Path(sft.model.path) == (tmp_path / "m")
    longest = max(len(f"<|im_start|>user\nq{n}<|im_end|>") for n in (99, 149))
    assert longest < sft.max_length <= 64


def test_an_instruct_model_is_taken_as_it_is_unless_there_are_demonstrations(tmp_path, monkeypatch, here):
    monkeypatch.chdir(tmp_path)
    code, _ = here("demo", "--out", "world", "--size", "80")
    assert code == 0
    code, text = here("init", "new", "--data", "world/preferences.jsonl", "--model", "demo:base")
    assert code == 0 and "no steps: the instruct model is taken as it is" in text
    both = ("--data", "world/preferences.jsonl", "--data", "world/demonstrations.jsonl", "--model", "demo:base")
    code, text = here("init", "shown", *both)
    assert code == 0 and "epochs" in text and "taken as it is" not in text
    monkeypatch.chdir(tmp_path / "new")
    code, text = here("sft")
    assert code == 0 and "an adapter that adds nothing" in text
    metrics = json.loads(Path("runs/sft/manifest.json").read_text())["metrics"]
    assert metrics["eval/loss"] == metrics["eval/base_loss"] and metrics["eval/end_token_rate"] > 0.9
    settings, state = adapters.read(Path("runs/sft/adapter"))
    assert settings.r == 16 and all(bool((tensor == 0).all()) for name, tensor in state.items() if "lora_B" in name)
    code, text = here("sft")
    assert code == 0 and "up to date" in text
    code, text = here("train-rm", "--dry-run")
    assert code == 0 and "to train on" in text


def command(cwd, *args, path=ROOT):
    done = subprocess.run(
        [sys.executable, "-m", "rlhf", *map(str, args)], cwd=cwd, capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": str(path)}, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_demonstrations_alone_make_an_sft_stage_alone_and_say_so(tmp_path, monkeypatch, here):
    tiny.build(tmp_path / "m")
    lines(tmp_path / "d.jsonl", ({"prompt": f"q{n}", "completion": "ok"} for n in range(30)))
    monkeypatch.chdir(tmp_path)
    code, text = here("init", "new", "--data", "d.jsonl", "--model", "m", "--json")
    assert code == 0
    found = json.loads(text)
    assert found["files"] == ["configs/sft.yaml", "configs/pipeline.yaml", "data/sft.jsonl"]
    assert "SFT alone: without preferences there is no reward model" in dict(found["figures"])["stages"]


def test_long_rows_are_dropped_by_a_limit_that_the_config_names_and_the_table_counts(tmp_path):
    tiny.build(tmp_path / "m")
    rows_ = [pair(n) | {"rejected": "x" * (150 if n % 4 == 0 else 3)} for n in range(150)]
    made = project.make(tmp_path / "new", [lines(tmp_path / "p.jsonl", rows_)], str(tmp_path / "m"))
    config = load.load(STAGES["train-rm"].config_class, tmp_path / "new/configs/train-rm.yaml")
    told = dict(made.figures)["train-rm"]
    part = [json.loads(line) for line in (tmp_path / "new/data/preferences.jsonl").read_text().splitlines()]
    longer = sum(len(row["rejected"]) > 100 for row in part)
    assert config.max_length == 128 and f"{longer} of {len(part)} rows are longer and will be dropped" in told
    assert longer / len(part) <= config.data.max_dropped_fraction < 0.6


def test_what_cannot_be_made_leaves_nothing_behind(tmp_path, monkeypatch, here):
    monkeypatch.chdir(tmp_path)
    lines(tmp_path / "p.jsonl", map(pair, range(20)))
    tiny.build(tmp_path / "m")
    Path("used").mkdir()
    Path("used/file").write_text("mine")
    for args, exit_code, wanted in (
        (("used",), 6, "RES007] used: is not empty. Fix: name a new directory"),
        (("p.jsonl",), 6, "RES007] p.jsonl: is a file"),
        (("new", "--data", "p.jsonl"), 2, "CFG009] --model: not named"),
        (
            ("new", "--data", "p.jsonl", "--model", "org/nothing"),
            4,
            "MOD001] org/nothing: not in the cache, and",
        ),
        (("new", "--data", "p.jsonl", "--model", "../nowhere"), 8, "SEC006"),
        (("new", "--data", "gone.jsonl", "--model", "m"), 3, "DAT010] gone.jsonl: no such file"),
        (("new", "--data", "p.jsonl", "--model", "m"), 3, "DAT031] --data: too few prompts"),
    ):
        code, text = here("init", *args)
        assert code == exit_code and wanted in text and "Traceback" not in text, text
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m", "p.jsonl", "used"]
    assert Path("used/file").read_text() == "mine"


def test_a_place_that_cannot_be_written_to_is_one_message_and_is_left_as_it_was(tmp_path, monkeypatch, here):
    """As root, permissions do not bind: a file in the way, a file system that refuses, and what access says."""
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("mine")
    Path("sft.yaml").write_text("data: {path: 'demo:demonstrations?size=40'}\nsteps: 1\n")
    below_a_file = (
        (("init", "file/mine", "--data", "demo:"), "error[RES002] file/mine: cannot be made: "),
        (("sft", "-c", "sft.yaml", "run_dir=file/run"), "error[RES002] run_dir: file/run: cannot be made: "),
        (("demo", "--out", "file/world"), "error[RES002] file/world: cannot be read or written: Not a directory."),
    )
    for args, wanted in below_a_file:
        code, text = here(*args)
        assert code == 6 and wanted in text and "Fix: " in text and "Traceback" not in text, text

    def refuse(operation, path):
        if operation == "write" and path.name.startswith("ppo"):
            raise OSError(errno.EROFS, "Read-only file system", str(path))

    Path("empty").mkdir()
    with monkeypatch.context() as patch:
        patch.setattr(storage, "before", refuse)
        for directory in ("new", "empty"):
            code, text = here("init", directory, "--data", "demo:")
            assert code == 6 and f"error[RES002] {directory}: cannot be written to: Read-only file system." in text
    with monkeypatch.context() as patch:
        patch.setattr(os, "access", lambda place, mode: not mode & os.W_OK)
        for args in (("init", "other", "--data", "demo:"), ("sft", "-c", "sft.yaml")):
            code, text = here(*args)
            assert code == 6 and "error[RES002]" in text and "is not writable. Fix: another " in text
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["empty", "file", "sft.yaml"]


def test_without_data_it_is_the_embedded_worlds_chain_as_shipped(tmp_path, monkeypatch, here):
    shipped = {path.name: path.read_text() for path in (ROOT / "configs").glob("*.yaml")}
    carried = {path.name: path.read_text() for path in (ROOT / "rlhf/start/world").glob("*.yaml")}
    assert carried == shipped, "copy configs/*.yaml to rlhf/start/world/, which the wheel carries"
    monkeypatch.chdir(tmp_path)
    assert here("init", "a")[0] == here("init", "b", "--data", "demo:", "--model", "demo:base")[0] == 0
    Path("c").mkdir()
    monkeypatch.chdir("c")
    assert here("init", ".")[0] == 0
    for name in ("a", "b", "c"):
        assert {path.name: path.read_text() for path in Path(tmp_path, name, "configs").iterdir()} == shipped
    assert here("check")[0] == 0


@pytest.mark.slow
def test_an_installed_wheel_makes_and_runs_the_embedded_world_and_own_data(tmp_path):
    tree = tmp_path / "tree"
    shutil.copytree(ROOT / "rlhf", tree / "rlhf", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, tree)
    build = "from setuptools import setup; setup(script_args=['-q', 'bdist_wheel', '-d', 'dist'])"
    done = subprocess.run([sys.executable, "-c", build], cwd=tree, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    site = tmp_path / "site"
    zipfile.ZipFile(next((tree / "dist").glob("*.whl"))).extractall(site)
    shutil.rmtree(tree)
    command(tmp_path, "init", "world", path=site)
    assert "a sound ppo config" in command(tmp_path / "world", "check", path=site)
    tiny.build(tmp_path / "m")
    lines(tmp_path / "prefs.jsonl", map(pair, range(150)))
    command(tmp_path, "init", "own", "--data", "prefs.jsonl", "--model", "m", path=site)
    command(tmp_path / "own", "pipeline", path=site)
