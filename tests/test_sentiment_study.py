"""scripts/studies/sentiment.py without its model and its lexicon: labels, prompts, configs and what is reported."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import pytest
import yaml

STUDIES = Path(__file__).parents[1] / "scripts" / "studies"
sys.path.insert(0, str(STUDIES))

import sentiment  # noqa: E402
import sentiment_report  # noqa: E402
import sentiment_world as world  # noqa: E402

from rlhf.runs import storage  # noqa: E402
from rlhf.stages.registry import open_config  # noqa: E402


@pytest.fixture
def good_words(monkeypatch):
    """Gold is the share of words that are 'good'."""
    monkeypatch.setattr(
        world, "gold", lambda _, responses: [text.split().count("good") / len(text.split()) for text in responses]
    )


@pytest.mark.parametrize("difference", [0.0, 0.2, 0.5])
def test_the_order_of_two_labels_is_bradley_terry_in_the_difference_of_gold(difference):
    count = 4000
    won = sum(world.utility(difference, f"a{one}") > world.utility(0.0, f"b{one}") for one in range(count)) / count
    expected = 1 / (1 + math.exp(-world.SHARPNESS * difference))
    assert won == pytest.approx(expected, abs=4 * math.sqrt(expected * (1 - expected) / count))
    assert world.utility(difference, "a1") == world.utility(difference, "a1"), "a text's label depends on nothing else"


def test_no_prompt_is_in_two_parts_and_the_word_lists_give_enough():
    texts = world.openings()
    assert len(set(texts)) == len(texts) >= sum(world.SIZES.values())
    found = world.parts(texts, 1, world.SIZES)
    prompts = [row["prompt"] for rows in found.values() for row in rows]
    assert {name: len(rows) for name, rows in found.items()} == world.SIZES
    assert len(set(prompts)) == len(prompts) and {text.removeprefix(world.INSTRUCTION) for text in prompts} <= set(
        texts
    )
    assert world.parts(texts, 1, world.SIZES) == found != world.parts(texts, 2, world.SIZES)
    with pytest.raises(SystemExit, match="3 distinct openings, and the study needs 4"):
        world.parts(texts[:3], 1, {"ppo": 4})


def test_openings_of_a_file_are_its_first_words_each_once(tmp_path):
    (tmp_path / "reviews.txt").write_text("a b c d\na b c e\n\nf g\nx y z w\n")
    assert world.openings_of(tmp_path / "reviews.txt", words=3) == ["a b c", "x y z"]


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("One two three four five six seven eight. And more", "One two three four five six seven eight."),
        (
            "Well. One two three four five six seven 3.5 eight! No?",
            "Well. One two three four five six seven 3.5 eight!",
        ),
        ("One two three. Four five six seven eight and no end", None),
        ("Good.", None),
    ],
)
def test_a_text_is_cut_at_the_first_sentence_that_ends_late_enough(text, kept):
    assert world.cut(text) == kept
    rows = world.demonstrations([{"prompt": "p", "response": text}])
    assert rows == ([{"prompt": "p", "completion": kept}] if kept else [])


def test_agreement_counts_the_pairs_that_gold_orders_as_the_labels_do(good_words):
    rows = [
        {"responses": ["good", "bad"], "ranks": [1, 2]},
        {"responses": ["good", "bad"], "ranks": [2, 1]},
        {"responses": ["good bad", "bad good"], "ranks": [1, 2]},
        {"responses": ["bad", "good bad", "good"], "ranks": [3, 2, 1]},
        {"responses": ["good", "bad"], "ranks": [1, 1]},
    ]
    assert world.agreement(rows) == (pytest.approx((1 + 0 + 0.5 + 3) / 6), 6)
    assert math.isnan(world.agreement([])[0])


def test_every_config_is_one_that_its_stage_reads(tmp_path):
    chain = sentiment.Chain("org/model", "bfloat16", 2, tmp_path)
    found = sentiment.configs(chain)
    assert tuple(found) == sentiment.CHAIN
    for name, config in found.items():
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump(config))
        read = open_config(sentiment.STAGE_OF.get(name, name), path)
        assert (read.seed, read.run_dir) == (2, f"{tmp_path}/{name}")


def test_what_is_there_is_not_made_again_and_what_failed_leaves_nothing(tmp_path):
    def fail(path):
        path.write_text("half")
        raise SystemExit(7)

    with pytest.raises(SystemExit):
        sentiment.once(tmp_path / "rows.jsonl", fail)
    assert not (tmp_path / "rows.jsonl").exists()
    sentiment.once(tmp_path / "rows.jsonl", lambda path: path.write_text("whole") and None)
    sentiment.once(tmp_path / "rows.jsonl", fail)
    assert (tmp_path / "rows.jsonl").read_text() == "whole"


def answers(*texts):
    return [{"prompt": f"p{one}", "response": text, "finished": True} for one, text in enumerate(texts)]


@pytest.fixture
def chain(tmp_path):
    """A finished chain of three test prompts, to the last of which no ranked answer has text; PPO is 3 nats away."""
    at = tmp_path / "bfloat16" / "4"
    files = {
        "test": [{"prompt": f"p{one}"} for one in range(3)],
        "base": answers("bad", "bad", "bad"),
        "sft-answers": answers("bad", "good bad", "bad"),
        "ppo-answers": answers("good", "good good", "good"),
        "ranked": [
            {"prompt": [{"role": "user", "content": f"p{prompt}"}], "score": score, "judge": judge, "finished": ended}
            for prompt, score, judge, ended in (
                (0, 1.0, 0.0, True),
                (0, 2.0, 1.0, True),
                (1, 5.0, 1.0, False),
                (1, 0.0, 0.25, True),
            )
        ],
    }
    for name, rows in files.items():
        (at / "data").mkdir(parents=True, exist_ok=True)
        world.write(at / "data" / f"{name}.jsonl", rows)
    for stage in sentiment_report.STAGES:
        metrics = {"eval/exact_kl_nats": 3.0, "memory/peak_rss_mb": 900.0, "memory/peak_cuda_mb": 100.0}
        (at / stage).mkdir()
        storage.write_json(at / stage / "manifest.json", {"seconds": 10.0, "metrics": metrics, "details": {}})
    verdicts = [
        {"key": "accuracy", "verdict": "pass", "estimate": 0.8, "says": "accuracy"},
        {"key": "probes.padding", "verdict": "fail", "estimate": 0.4, "says": "change by padding"},
    ]
    figures = {"accuracy": {"estimate": 0.8}, "verdict": "fail", "verdicts": verdicts}
    storage.write_json(at / "eval-rm" / "eval.json", figures)
    (at / "examination").mkdir()
    world.write(at / "examination" / "preferences.jsonl", [{"responses": ["good", "bad"], "ranks": [1, 2]}])
    (at / "ppo" / "samples").mkdir()
    world.write(
        at / "ppo" / "samples" / "step-2.jsonl", answers("a b good bad", "a b good good", "c b good good bad bad")
    )
    timed = {"time/rollout_s": 2.0, "time/update_s": 3.0}
    evaluated = {"eval/score": 0.7, "eval/exact_kl_nats": 1.5}
    world.write(at / "ppo" / "metrics.jsonl", [{"step": 2, **timed}, {"step": 2, **evaluated}])
    plan = {"stage": "ppo", "peak": 200 << 20, "work": [{"seconds": 4.0}, {"seconds": 2.0}]}
    storage.write_json(at / sentiment_report.PLAN, [plan])
    return at


def test_the_report_says_what_the_files_of_a_finished_chain_say(chain, tmp_path, good_words, capsys):
    (tmp_path / "bfloat16" / "5" / "data").mkdir(parents=True)
    sentiment_report.report(tmp_path)
    said = json.loads((tmp_path / "report.json").read_text())["bfloat16"]
    assert said["seeds"] == ["4"], "a chain that has not reached its end is not reported"
    gold = {name: row["by_seed"][0] for name, row in said["policies"].items()}
    assert gold["SFT"] == pytest.approx(0.5 / 3) and gold["PPO"] == 1
    assert gold["SFT, mean of 16 samples"] == pytest.approx((0.5 + 0.625 + 0) / 3)
    assert gold["best of 4 by the reward model"] == pytest.approx((1 + 0.25 + 0) / 3), "a cut-off answer ranks behind"
    assert said["policies"]["PPO"]["kl"] == 3 and said["policies"]["best of 4 by the reward model"]["ended"] == 0.75
    assert said["policies"]["PPO"]["over_sft"]["estimate"] == pytest.approx(1 - 0.375)
    (point,) = said["curve"]
    assert (point["step"], point["score"], point["kl"]) == (2, 0.7, [1.5])
    assert point["gold"]["estimate"] == pytest.approx((1 / 4 + 1 / 2 + 1 / 3) / 3) and point["alike"] == 2 / 3
    judged = said["reward_models"]["4"]
    assert (judged["labels_agree"], judged["verdict"]) == (1, "fail") and judged["gain"] == pytest.approx(1 - 0.375)
    assert [one["key"] for one in judged["beyond"]] == ["probes.padding"]
    assert sentiment_report.peak_mb({"memory/peak_rss_mb": 7.0}) == 7, "without a GPU it is the process's"
    ppo = said["costs"][-1]
    assert [ppo[key] for key in ("seconds", "peak_mb", "planned_mb", "step_s", "planned_step_s")] == [
        10,
        100,
        200,
        5,
        6,
    ]
    shown = capsys.readouterr().err
    assert "+1.00 [+1.00, +1.00]" in shown and "probes.padding: change by padding" in shown


def test_a_report_of_nothing_is_refused(tmp_path):
    with pytest.raises(SystemExit, match="no chain below"):
        sentiment_report.report(tmp_path)
