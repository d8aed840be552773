"""``rlhf init``: what it reads off data and models, what it decides, and that what it writes runs as it stands."""

from __future__ import annotations

import csv
import errno
import gzip
import json
import math
import os
import shutil
import subprocess
import sys
import zipfile
from functools import lru_cache
from pathlib import Path

import pytest
import tiny
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from rlhf.config import load, yaml_reader
from rlhf.config.sections import DataSection
from rlhf.config.stages import SftConfig
from rlhf.data import sources
from rlhf.errors import RlhfError
from rlhf.models import adapters, embeddings
from rlhf.records import Comparison, Demonstration, Judgement, Message, Prompt, prompt_key
from rlhf.runs import storage
from rlhf.stages.registry import STAGES
from rlhf.start import chain, choose, fit, look, parts, project, read_files, render
from rlhf.start.basis import basis
from rlhf.start.facts import Lengths, Limit, ModelFacts, Options, Rows, Tokens
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
        tuple(map(shown, demonstrated)),
        tuple(map(comparison, compared)),
        tuple(Prompt(ask(n), f"a:{n}") for n in asked),
    )


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


def test_too_few_prompts_and_prompts_alone_are_refused(tmp_path):
    with pytest.raises(RlhfError, match=r"DAT031.*too few prompts: the parts have sft \d+, reward \d+, ppo \d"):
        parts.split(rows(range(8)))
    paths = [lines(tmp_path / "p.jsonl", [{"prompt": f"q{n}", "best one": "an answer"} for n in range(9)])]
    with pytest.raises(RlhfError, match="DAT032.*nothing to learn from.*collect.*--columns 'completion=best one'"):
        read_files.files(paths, Options())
    alone = parts.split(rows(demonstrated=range(5), asked=range(9)))
    assert len(alone.sft) == 5 and not alone.reward and alone.left_out == 9


def ranking(ranks):
    judgements = [
        Judgement(*((i, j) if ranks[i] <= ranks[j] else (j, i)), probability=0.5 if ranks[i] == ranks[j] else 1.0)
        for i in range(len(ranks))
        for j in range(i + 1, len(ranks))
    ]
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
            Comparison(talk, ("b", "a"), (Judgement(0, 1, margin=0.5),), ""),
            ranking([2, 1, 2]),
            comparison(4),
        ],
        "prompts": [Prompt(talk, ""), Prompt(ask(5), "")],
    }
    for kind, wanted in records.items():
        path = lines(tmp_path / f"{kind}.jsonl", map(parts.as_json, wanted))
        found = getattr(sources, f"load_{kind}")(DataSection(path=path)).records
        assert [vars(record) | {"where": ""} for record in found] == [vars(r) | {"where": ""} for r in wanted]


# ---- figures ----


def test_limits_are_the_quantile_of_outliers_and_the_longest_row_and_memory_is_tried_first():
    assert choose.limits([100] * 99 + [140], 512, False) == [144]
    assert choose.limits([100] * 99 + [500], None, False) == [104, 504]
    assert choose.limits([300] * 10, 128, False) == [128]
    assert choose.limits([3000] * 10, 8192, True) == [2048, 3000] and choose.limits([3000] * 10, 8192, False) == [3000]


@given(st.lists(st.integers(1, 50), min_size=1, max_size=40), st.sampled_from([0.5, 0.9, 0.99]))
@settings(deadline=None, max_examples=60)
def test_a_quantile_is_the_least_length_that_the_share_of_the_rows_does_not_exceed(lengths, share):
    wanted = min(x for x in lengths if sum(y <= x for y in lengths) >= share * len(lengths))
    assert choose.quantile(lengths, share) == wanted


@pytest.mark.parametrize(
    ("num_rows", "most", "wanted"),
    [(10_000, 32, 32), (640, 32, 32), (639, 32, 16), (100, 32, 4), (30, 32, 2), (3, 32, 2), (1, 32, 1)],
)
def test_a_batch_is_a_power_of_two_that_leaves_twenty_steps_a_pass(num_rows, most, wanted):
    assert choose.batch_size(num_rows, most, 20) == wanted


def test_the_other_figures_are_what_their_rules_say():
    assert choose.new_tokens([10] * 100, 9, None) == 16 and choose.new_tokens([100] * 100, 9, None) == 152
    assert choose.new_tokens([100] * 100, 9, 128) == 64 and choose.new_tokens([4000], 9, None) == 1024
    # behind a prompt of 190 tokens there are 66; behind one of 250 there are 6, and nine answers of ten have 30
    assert choose.new_tokens([30] * 90 + [90] * 10, 190, 256) == 66
    assert choose.new_tokens([30] * 90 + [90] * 10, 250, 256) == 32
    assert choose.new_tokens([10] * 9, 9, None, own_length=True) == 512
    assert choose.share_that_fits([1, 2, 3, 4], 3) == 0.75
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
        "path": "m",
        "num_parameters": 1,
        "context_length": 64,
        "template": None,
        "end_token": "<end>",
        "pad_token": "<pad>",
        "ends": ("<eos>",),
        "marks": ("<turn>", "<end>"),
        "untrained": (),
        "is_initialised": False,
        "bos": "",
    }
    return ModelFacts(**settings | changes)


@pytest.mark.parametrize(
    ("changes", "instruct", "tokens", "why"),
    [
        ({"ends": ("<eos>", "<end>")}, True, [], "ends its own turns with '<end>'"),
        ({}, False, ["<turn>", "<end>"], "the base ends with '<eos>', the template with '<end>'"),
        ({"template": "chatml"}, False, ["<turn>", "<end>"], "the base ends with '<eos>'"),
        ({"ends": ("<end>",), "untrained": ("<end>",)}, False, ["<end>"], "like those of tokens never seen"),
        (
            {"template": "plain", "ends": ("<end>",), "marks": ("<end>",), "untrained": None},
            False,
            [],
            "ended documents in pretraining",
        ),
        ({"ends": ("<end>",), "is_initialised": True}, False, ["<turn>", "<end>"], "as they were initialised"),
    ],
    ids=["instruct", "base", "no template", "untrained", "documents", "random"],
)
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
    ("share", "num_samples", "as_it_is", "changes", "wanted"),
    [
        (1.0, 100, False, {}, 0.84),
        (0.5, 64, False, {}, 0.32),
        (0.5, 1, False, {}, 0.0),
        (0.5, 64, True, {}, 0.5),
        (1.0, 64, False, {"is_initialised": True}, 0.2),
        (0.5, 64, False, {"is_initialised": True}, 0.1),
    ],
)
def test_the_end_rate_that_is_asked_for_follows_from_the_answers_that_fit(
    share, num_samples, as_it_is, changes, wanted
):
    """By hand: .9 less 2 * .03 is .84; .45 less 2 * .0622 is .3256."""
    found, why = choose.least_end_rate(facts(**changes), share, num_samples, as_it_is)
    assert found == wanted and (as_it_is or f"{share:.1%} of the answers in the data fit" in why)


def test_the_fixed_score_of_a_cut_off_answer_is_for_data_whose_answers_fit():
    assert choose.missing_end(0.95, False)[0] == choose.missing_end(1.0, False)[0] == 1.0
    assert choose.missing_end(0.8, False)[0] == 0.25 and choose.missing_end(1.0, True)[0] == 0.1
    assert "20.0% of the answers in the data" in choose.missing_end(0.8, False)[1]


def test_more_than_a_few_passes_are_for_few_rows_and_for_bases_that_were_never_pretrained():
    assert choose.least_steps(facts()) == (120, 10) and choose.least_steps(facts(is_initialised=True)) == (300, 30)


@lru_cache
def split_of_4000():
    return parts.split(rows(range(4000)))


def built(tmp_path, **changes):
    """The configs of a basis with 4,000 comparisons of one length, as they are read, and their text."""
    split = split_of_4000()
    counts = {name: len(getattr(split, name)) for name in parts.SHARES}
    lengths = {name: Lengths((2600,) * count, (2100,) * count, (500,) * count) for name, count in counts.items()}
    model = facts(context_length=32_768, **changes)
    trees = chain.build(basis(model, split, lengths, Limit(2600), False))
    texts = {name: render.render("A title.", tree) for name, tree in trees.items()}
    for name, text in texts.items():
        (tmp_path / f"{name}.yaml").write_text(text)
    loaded = {name: load.load(STAGES[name].config_class, tmp_path / f"{name}.yaml") for name in texts if name in STAGES}
    return loaded, texts


@pytest.mark.parametrize(
    ("num_parameters", "rate", "micro", "concurrency"), [(494_000_000, 2e-4, 2, 64), (8_030_000_000, 2e-4, 1, 32)]
)
def test_a_large_base_gets_bfloat16_checkpointing_and_batches_that_fit(
    tmp_path, num_parameters, rate, micro, concurrency
):
    """Rows of 2,600 tokens: 8,192 tokens a forward pass hold three, so two; 4,096 hold one."""
    found, _ = built(tmp_path, num_parameters=num_parameters)
    sft, reward, ppo = found["sft"], found["train-rm"], found["ppo"]
    assert sft.model.dtype == "bfloat16" and sft.runtime.gradient_checkpointing and ppo.runtime.gradient_checkpointing
    assert sft.max_length == 2600 and sft.optim.learning_rate == rate and ppo.optim.learning_rate == 3e-5
    assert (sft.batch.batch_size, sft.batch.micro_batch_size, reward.batch.micro_batch_size) == (16, micro, 1)
    assert sft.sampling.concurrency == ppo.sampling.concurrency == concurrency
    assert (ppo.prompts.max_tokens, ppo.sampling.max_new_tokens, ppo.batch.batch_size) == (2104, 752, 128)


@pytest.mark.parametrize("num_parameters", [1_000_000, 494_000_000])
def test_more_than_three_epochs_come_with_early_stopping_and_the_examination_comes_before_ppo(tmp_path, num_parameters):
    found, texts = built(tmp_path, num_parameters=num_parameters)
    for stage, least in (("sft", 64), ("train-rm", 32)):
        config = found[stage]
        part = len(split_of_4000().sft if stage == "sft" else split_of_4000().reward)
        assert round(config.holdout_fraction * part) >= least
        steps = math.ceil(part * (1 - config.holdout_fraction) * config.epochs / config.batch.batch_size)
        assert config.use == "best" and config.evaluation.patience == 3
        assert 10 <= steps / config.evaluation.every <= 20 and config.save_every == pytest.approx(steps / 4, abs=1)
        assert all("max_dropped_fraction" not in text for text in texts.values())
    assert found["sft"].loss_on == "last_turn" and found["sft"].require_improvement
    assert (found["ppo"].rewards[0].run, found["ppo"].rewards[0].examination) == ("runs/train-rm", "runs/eval-rm")
    order = [step["stage"] for step in yaml_reader.read_text(texts["pipeline"], "p")[0]["stages"]]
    assert order == ["sft", "train-rm", "eval-rm", "ppo"]


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
    ("row", "kind"),
    [
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, "comparisons"),
        ({"chosen": [], "rejected": []}, "comparisons"),
        ({"chosen": "same", "rejected": "same"}, "comparisons"),
        ({"prompt": "a", "responses": [], "ranks": []}, "comparisons"),
        ({"prompt": "a", "responses": [], "ratings": [1, 2.5]}, "comparisons"),
        ({"prompt": "a", "completion": "b", "label": True}, "comparisons"),
        ({"prompt": "a", "completion": "b", "label": "x"}, "demonstrations"),
        ({"prompt": "a", "completion": "b"}, "demonstrations"),
        ({"prompt": "a"}, "prompts"),
        ({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}, "demonstrations"),
        ({"messages": [{"role": "user", "content": "a"}]}, "prompts"),
        ({"instruction": "a"}, "prompts"),
        ({"instruction": "a", "output": "b"}, "demonstrations"),
    ],
)
def test_the_kind_of_a_file_is_seen_in_its_rows(row, kind):
    assert read_files.kind_of([row], "f") == kind


def test_the_kind_of_a_file_is_that_of_most_rows_whatever_the_first_one_is():
    empty = {"prompt": "a", "completion": ""}
    assert read_files.kind_of([empty, *[{"prompt": "a", "completion": "b"}] * 2], "f") == "demonstrations"
    assert read_files.kind_of([{"id": 1}, {"prompt": "a", "chosen": "b", "rejected": "c"}], "f") == "comparisons"


@pytest.mark.parametrize(
    ("row", "wanted"),
    [
        (
            {"id": "a7", "question": "what is it?", "good": "it is one", "bad": "a b"},
            "--columns prompt=question --columns chosen=good --columns rejected=bad",
        ),
        (
            {"question": "what is it?", "answer": "it is one", "n": 3},
            "--columns prompt=question --columns completion=answer",
        ),
        ({"the prompt": "what?", "n": 1}, "--columns 'prompt=the prompt'"),
        ({"x": 1}, "--columns OURS=THEIRS;"),
    ],
)
def test_an_unknown_form_is_answered_with_its_columns_and_an_example_made_of_them(row, wanted):
    with pytest.raises(RlhfError) as error:
        read_files.kind_of([row], "f")
    assert f"its columns are {', '.join(row)}." in str(error.value) and wanted in str(error.value)


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


def talk(number, answer, more=""):
    return f"\n\nHuman: q{number}{more}\n\nAssistant: {answer}"


def as_published(path):
    """150 transcripts in pairs, and among them a row of each fault that such files have; two rows are only unusual."""
    rows_ = [{"chosen": talk(n, "ok" + "!" * (n % 2)), "rejected": talk(n, f"no{n % 3}")} for n in range(148)]
    twice = "\n\nHuman: and?"  # two turns of one speaker in a row
    rows_ += [{"chosen": talk(n, "ok", twice), "rejected": talk(n, "no", twice)} for n in (148, 149)]
    rows_[0:0] = [{"chosen": talk(150, ""), "rejected": talk(150, "no")}]
    rows_.insert(40, {"chosen": talk(151, "ok"), "rejected": talk(152, "no")})
    rows_.insert(60, {"chosen": talk(153, "same"), "rejected": talk(153, "same")})
    rows_.insert(80, {"chosen": talk(154, "ok"), "rejected": talk(154, "no" * 99)})
    rows_.append({"chosen": talk(155, "<|im_end|>"), "rejected": talk(155, "no")})
    text = "".join(json.dumps(row) + "\n" for row in rows_)
    path.write_bytes(gzip.compress((text + '{"chosen": "cut off in the mid').encode()))


def test_preferences_as_published_run_to_the_verdict_of_the_examination_with_no_hand_edits(tmp_path, monkeypatch, here):
    tiny.build(tmp_path / "m", "llama")
    monkeypatch.chdir(tmp_path)
    as_published(Path("prefs.jsonl.gz"))
    code, text = here("init", "new", "--data", "prefs.jsonl.gz", "--model", "m")
    assert code == 0, text
    assert "prefs.jsonl.gz: 156 rows read, 150 comparisons used; 2 rows (first: prefs.jsonl.gz:153)" in text
    dropped = {
        "an empty answer": 1,
        "no shared prompt": 41,
        "equal responses": 61,
        "too many tokens": 81,
        "a special token in the text": 155,
        "a broken line": 156,
    }
    assert "6 of 156 rows dropped: " in text
    assert all(f"1 with {reason} (first: prefs.jsonl.gz:{line})" in text for reason, line in dropped.items()), text
    assert "no prompt is in two parts" in text and "loss on the last turn" in text
    assert "never pretrained" in text and "'<|pad|>', distinct from the end token" in text
    monkeypatch.chdir(tmp_path / "new")
    code, text = here("check")
    assert code == 0 and text.count("a sound ") == len(CONFIGS)
    configs, data = written(Path())
    assert all(text.count("# ") >= (1 if name == "pipeline" else 3) for name, text in configs.items())
    asked = [{json.dumps(row["prompt"]) for row in rows_} for rows_ in data.values()]
    assert sum(map(len, asked)) == len(set().union(*asked)) == 150 and "max_dropped_fraction" not in str(configs)
    for stage in CONFIGS[:3]:
        code, text = here(stage)
        assert code == 0, text
    code, text = here("ppo")
    assert code == 7 and "GRD030" in text and "runs/train-rm failed" in text  # a random base learns to rank nothing
    code, text = here("ppo", "--set", "rewards.0.accept=failed")
    assert code == 0, text
    manifests = {name: json.loads(Path(f"runs/{name}/manifest.json").read_text()) for name in CONFIGS[:4]}
    assert manifests["sft"]["metrics"]["eval/end_token_rate"] >= 0.2
    assert all(
        not manifest["details"]["dropped"]["data"]["dropped"]
        for name, manifest in manifests.items()
        if name in ("sft", "train-rm")
    )
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
    assert "until SFT has taught it" not in text
    both = ("--data", "world/preferences.jsonl", "--data", "world/demonstrations.jsonl", "--model", "demo:base")
    code, text = here("init", "shown", *both)
    assert code == 0 and "epochs" in text and "taken as it is" not in text
    assert "answers at its own length until SFT has taught it that of the data: if GRD002" in text
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
        [sys.executable, "-m", "rlhf", *map(str, args)],
        cwd=cwd,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(path)},
        check=False,
    )
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


def written(directory):
    """The configs and data rows of a project."""
    configs = {path.stem: path.read_text() for path in (directory / "configs").iterdir()}
    data = {
        path.stem: [json.loads(line) for line in path.read_text().splitlines()]
        for path in (directory / "data").iterdir()
    }
    return configs, data


def test_rows_beyond_the_context_are_a_decision_and_max_length_takes_it(tmp_path, monkeypatch, here):
    monkeypatch.chdir(tmp_path)
    tiny.build(tmp_path / "m")  # a context of 128 tokens
    long = [pair(n) | {"rejected": "x" * (150 + n if n % 4 == 0 else 3)} for n in range(150)]
    lines(tmp_path / "p.jsonl", long)
    base = ("init", "new", "--data", "p.jsonl", "--model", "m")
    code, text = here(*base)
    assert code == 3 and text.count("error[") == 1 and not Path("new").exists()
    assert "38 of 150 rows (25.3%) would be dropped: 38 with too many tokens (first: p.jsonl:1). At most 5%" in text
    assert "The model's context is 128 tokens" in text
    assert "--max-length 128 goes on with the 112 comparisons that fit" in text
    chat = look.model("m")[1]
    prompts = [len(chat.prompt_ids(ask(n))) + 150 + n + 1 for n in range(0, 150, 4)]
    assert f"a context of at least {sorted(prompts)[38 - 7 - 1]} tokens" in text  # 7 of 150 are 4.7 %, 8 are 5.3 %
    code, text = here(*base, "--max-length", "129")
    assert code == 4 and "MOD022] --max-length: 129 tokens, more than the model's context of 128" in text
    code, text = here(*base, "--max-length", "7", "--json-errors")
    assert code == 2 and not Path("new").exists()
    code, text = here(*base, "--max-length", "24")
    assert code == 3 and "DAT051] p.jsonl: all 150 comparisons are longer than 24 tokens (median" in text
    code, text = here(*base, "--max-length", "128")
    assert (
        code == 0
        and "38 of 150 rows dropped: 38 with too many tokens (first" in text
        and "150 rows read, 112 comp" in text
    )
    configs, data = written(Path("new"))
    assert sum(map(len, data.values())) == 112 and "max_dropped_fraction" not in "".join(configs.values())
    assert {row["prompt"] for rows in data.values() for row in rows} == {f"q{n}" for n in range(150) if n % 4}
    assert configs["sft"].count("max_length: 128") == configs["eval-rm"].count("max_length: 128") == 1
    code, text = here("init", "other", *base[2:], "--max-dropped-fraction", "0.26")
    assert code == 0 and sum(map(len, written(Path("other"))[1].values())) == 112


def test_a_few_rows_beyond_the_context_are_left_out_and_counted(tmp_path, monkeypatch, here):
    monkeypatch.chdir(tmp_path)
    tiny.build(tmp_path / "m")
    rows_ = [pair(n) | ({"rejected": "x" * 150} if n < 4 else {}) for n in range(100)]
    rows_ += [{"prompt": f"q{n}", "chosen": "<|pad|>", "rejected": "a"} for n in range(2)]  # a special token
    lines(tmp_path / "p.jsonl", rows_)
    code, text = here("init", "new", "--data", "p.jsonl", "--model", "m")
    assert (
        code == 3
        and "6 of 102 rows (5.9%) would be dropped: 2 with a special token in the text (first: p.jsonl:101), " in text
    )
    assert "4 with too many tokens (first: p.jsonl:1). At most 5% may be" in text
    lines(tmp_path / "p.jsonl", rows_[:101])
    code, text = here("init", "new", "--data", "p.jsonl", "--model", "m")
    assert code == 0 and "5 of 101 rows dropped: 1 with a special token" in text
    assert sum(map(len, written(Path("new"))[1].values())) == 96


def test_answers_are_as_long_as_the_context_holds_behind_the_prompts_and_the_gate_follows(tmp_path):
    tiny.build(tmp_path / "m")
    rows_ = [{"prompt": f"q{n}" * 4, "chosen": "c" * (30 if n % 5 else 80), "rejected": "r"} for n in range(99)]
    made = project.make(tmp_path / "new", [lines(tmp_path / "p.jsonl", rows_)], str(tmp_path / "m"))
    sft = load.load(SftConfig, tmp_path / "new/configs/sft.yaml")
    ppo = load.load(STAGES["ppo"].config_class, tmp_path / "new/configs/ppo.yaml")
    assert ppo.prompts.max_tokens + ppo.sampling.max_new_tokens <= 128
    demos = written(tmp_path / "new")[1]["sft"]
    share = sum(len(row["completion"]) + 1 <= sft.sampling.max_new_tokens for row in demos) / len(demos)
    assert 0.5 < share < 1 and sft.min_end_token_rate == math.floor(20 * share) / 100  # a base without pretraining
    assert f"{share:.1%} of those in the data fit max_new_tokens" in dict(made.figures)["answers"]
    assert ppo.missing_eos.mode == "subtract" and (1 - share) * ppo.missing_eos.penalty <= 0.05


def test_a_row_is_as_long_as_its_stage_reads_it():
    split = parts.split(rows(range(100)))
    found = fit.lengths_of(split, {f"p:{n}": Tokens(prompt=10, best=5, longest=50) for n in range(100)})
    wholes = {name: set(lengths.whole) for name, lengths in found.items()}
    assert wholes == {"sft": {15}, "reward": {60}, "ppo": {10}, "eval": {60}}
    assert set(found["sft"].response) == {5} and set(found["reward"].prompt) == {10}


def test_prompts_that_leave_no_room_for_an_answer_are_a_decision_or_left_out(tmp_path):
    """Answers of 30 tokens need 32 of a context of 64, and 32 are left for a prompt: nine of ten have 60."""
    split = parts.split(rows(range(400)))
    counts = {name: len(getattr(split, name)) for name in parts.SHARES}
    prompts = {name: tuple(20 if n % 10 == 0 else 60 for n in range(count)) for name, count in counts.items()}
    lengths = {name: Lengths(found, found, (30,) * len(found)) for name, found in prompts.items()}
    whole = basis(facts(), split, lengths, Limit(64), False)
    num_short = prompts["ppo"].count(20)
    with pytest.raises(RlhfError, match=rf"DAT020.*an answer of 32 behind {counts['ppo'] - num_short} of the"):
        fit.with_room(whole, Options())
    found = fit.with_room(whole, Options(max_length=64))
    assert len(found.parts.ppo) == num_short and set(found.lengths["ppo"].prompt) == {20}
    ppo = render.values(chain.build(found)["ppo"])
    assert ppo["prompts"]["max_tokens"] + ppo["sampling"]["max_new_tokens"] <= 64


def test_memory_bounds_a_large_model_only_where_the_data_are_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(choose, "MOST_TOKENS", 48)
    chat = look.model(str(tiny.build(tmp_path / "m")))[1]

    def limit_of(num_long):
        rows_ = [pair(n) | ({"rejected": "x" * 60} if n < num_long else {}) for n in range(100)]
        files = read_files.files([lines(tmp_path / "p.jsonl", rows_)], Options())
        return fit.fitting(files, chat, Options(), is_large=True).limit

    assert limit_of(5).tokens == 48 and limit_of(5).note == "5 of 100 rows are longer and were left out"
    kept = limit_of(6)
    assert kept.tokens > 80 and "--max-length 48 would leave out 6 of 100" in kept.note


def test_answers_that_a_column_calls_wrong_are_not_demonstrations_unnoticed(tmp_path):
    rows_ = [{"prompt": f"q{n // 2}", "response": f"a{n}", "is_right": n % 2 == 0} for n in range(4)]
    (file,) = read_files.files([lines(tmp_path / "d.jsonl", rows_)], Options())
    assert file.kind == "demonstrations"
    assert file.notes[-1].endswith("not read: --columns label=is_right --columns completion=response reads it")
    (file,) = read_files.files([str(tmp_path / "d.jsonl")], Options({"label": "is_right", "completion": "response"}, 3))
    assert file.kind == "comparisons" and file.dropped.num_rows == 3


def test_columns_limit_and_csv_give_data_in_our_own_names(tmp_path, monkeypatch, here):
    monkeypatch.chdir(tmp_path)
    tiny.build(tmp_path / "m")
    with Path("p.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerows([("id", "question", "good", "bad"), *((n, f"q {n}", "ok it", "no it") for n in range(120))])
    base = ("init", "new", "--data", "p.csv", "--model", "m")
    code, text = here(*base)
    flags = ("--columns", "prompt=question", "--columns", "chosen=good", "--columns", "rejected=bad")
    assert code == 3 and f"its columns are id, question, good, bad. Fix: {'say which columns they are, for instance '}"
    assert " ".join(flags) in text
    code, text = here(*base, *flags[:4], "--columns", "rejected=worse")
    assert code == 3 and "--columns rejected=worse: no file has it: p.csv has id, question, good, bad" in text
    code, text = here(*base, "--columns", "prompt")
    assert code == 2 and "CFG005] --columns: 'prompt' is not OURS=THEIRS" in text
    code, text = here(*base, *flags, "--limit", "100")
    assert code == 0 and "p.csv: 100 rows read, 100 comparisons used" in text
    _, data = written(Path("new"))
    assert sum(map(len, data.values())) == 100 and set(data["eval"][0]) == {"prompt", "chosen", "rejected"}
    code, text = here("init", "world", "--limit", "60")
    assert code == 0 and "60 rows read" in text and "demo:base" in Path("world/configs/sft.yaml").read_text()


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
