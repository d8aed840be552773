"""The embedded world: deterministic, split by prompt, and a gold judge that reads text alone."""

from __future__ import annotations

import itertools
import math
import random
from dataclasses import replace

import pytest

from rlhf.demo import catalogue, gold, minimal_pairs
from rlhf.demo.replies import ABSENT, FACTS, GOOD, HABIT_OF, HABITS, WRONG, write
from rlhf.demo.world import ACTIONS, SPLITS, split_of, tickets
from rlhf.errors import RlhfError

PROMPT = "hi , anna here . my red kettle arrived broken . it is order #47 ."
PERFECT = "hi anna , sorry for the trouble . we will replace your kettle from order #47 ."


@pytest.mark.parametrize("name", catalogue.DATASETS)
def test_the_same_name_gives_the_same_rows_and_another_seed_others(name):
    rows = [list(catalogue.rows(f"demo:{name}?size=50&seed={seed}")) for seed in (1, 1, 2)]
    assert rows[0] == rows[1] != rows[2] and len(rows[0]) == 50


def test_splits_share_no_prompt_whatever_the_seed():
    prompts = {
        split: {
            row["prompt"]
            for seed in (0, 1)
            for row in catalogue.rows(f"demo:prompts?size=300&seed={seed}&split={split}")
        }
        for split in SPLITS
    }
    for first, second in itertools.combinations(SPLITS, 2):
        assert not prompts[first] & prompts[second]
    assert all(split_of(prompt) == split for split, found in prompts.items() for prompt in found)


@pytest.mark.parametrize(
    ("response", "axes"),
    [
        (PERFECT, {"helpful": 1, "safe": 1, "friendly": 1, "concise": 1}),
        ("", {"helpful": 0, "safe": 0, "friendly": 0, "concise": 0}),
        ("we will replace it .", {"helpful": 0.3, "safe": 1, "friendly": 0, "concise": 1}),
        ("hi ben , we will trace your lamp from order #48 .", {"helpful": 0, "safe": 1, "friendly": 0.4, "concise": 1}),
        # action right, item wrong, order absent, name right: .30 - .125 + .20
        (
            "dear anna , thank you for writing . we will replace your lamp .",
            {"helpful": 0.375, "safe": 1, "friendly": 1, "concise": 1},
        ),
        (PERFECT + " this is your own fault .", {"helpful": 1, "safe": 1, "friendly": 0, "concise": 1}),
        (PERFECT + " use it anyway for now .", {"helpful": 1, "safe": 0, "friendly": 1, "concise": 1}),
    ],
)
def test_the_judge_by_hand(response, axes):
    found = gold.judge(PROMPT, response)
    for axis, value in axes.items():
        assert found[axis] == pytest.approx(value), axis
    weights = {"helpful": 0.45, "safe": 0.25, "friendly": 0.2, "concise": 0.1}
    assert found["gold"] == pytest.approx(sum(weights[axis] * value for axis, value in axes.items()))


def test_filler_repetition_and_length_cost_concision():
    filler = "please note that many things can take some time ."
    assert gold.judge(PROMPT, f"{PERFECT} {filler}")["concise"] == pytest.approx(0.5)
    assert gold.judge(PROMPT, f"{PERFECT} we will replace your kettle from order #47 .")["concise"] < 1
    assert gold.judge(PROMPT, "we will replace it now and " * 12)["concise"] == 0


def test_every_ticket_has_its_facts_in_its_text_and_a_good_reply_is_perfect():
    for ticket, rng in itertools.islice(tickets("train", 3, "x"), 300):
        facts = gold.facts_of(ticket.text)
        assert facts == {"action": ticket.action, "item": ticket.item, "order": f"#{ticket.code}", "name": ticket.name}
        assert gold.judge(ticket.text, write(ticket, GOOD, rng))["gold"] == pytest.approx(1)


def test_the_desks_habits_are_poor_and_the_most_likely_reply():
    rows = list(catalogue.rows("demo:demonstrations?size=1500"))
    mean = sum(gold.judge(row["prompt"], row["completion"])["gold"] for row in rows) / len(rows)
    assert 0.45 < mean < 0.58
    assert set(HABIT_OF) == set(ACTIONS)
    for ticket, rng in itertools.islice(tickets("train", 4, "x"), 100):
        assert (
            gold.judge(ticket.text, write(ticket, HABITS[HABIT_OF[ticket.action]], rng, habitual=True))["gold"] < 0.65
        )


def test_ranks_follow_gold_as_often_as_bradley_terry_says():
    """Without swaps, P(the better of two is ranked better) = sigmoid(15 * gold difference), summed over all pairs."""
    expected = found = 0.0
    for row in catalogue.rows("demo:preferences?size=400&swap=0"):
        values = [gold.judge(row["prompt"], text)["gold"] for text in row["responses"]]
        for i, j in itertools.combinations(range(4), 2):
            if values[i] != values[j]:
                better, worse = (i, j) if values[i] > values[j] else (j, i)
                expected += 1 / (1 + math.exp(-15 * (values[better] - values[worse])))
                found += row["ranks"][better] < row["ranks"][worse]
    assert found / expected == pytest.approx(1, abs=0.02) and expected > 1000


def test_label_noise_and_length_bias_are_options():
    def agreement(options):
        hits = total = 0
        for row in catalogue.rows(f"demo:preferences?size=200{options}"):
            values = [gold.judge(row["prompt"], text)["gold"] for text in row["responses"]]
            for i, j in itertools.combinations(range(4), 2):
                hits += (values[i] > values[j]) == (row["ranks"][i] < row["ranks"][j])
                total += 1
        return hits / total

    plain = agreement("&swap=0&sharpness=1000")
    assert plain > 0.95 > agreement("") > agreement("&swap=1&sharpness=1000")
    assert agreement("&length_bias=0.5") < agreement("") - 0.03


def test_minimal_pairs_differ_in_one_thing_and_gold_knows_it():
    for pair in minimal_pairs.minimal_pairs(20):
        better, worse = (gold.judge(pair["prompt"], pair[name]) for name in ("chosen", "rejected"))
        assert better["gold"] > worse["gold"] and split_of(pair["prompt"]) == "test"
        if pair["fact"] in FACTS:
            first, second = pair["chosen"].split(), pair["rejected"].split()
            assert sum(a != b for a, b in zip(first, second, strict=True)) == 1


def test_the_noisy_judge_is_the_same_for_the_same_text_and_follows_gold():
    poor = "do not write again ."
    first = gold.noisy_reward([PROMPT] * 2, [PERFECT, poor])
    assert first == gold.noisy_reward([PROMPT] * 2, [PERFECT, poor]) and first[0] > first[1]
    assert gold.ranks_of([0.1, 0.5, 0.5, -1]) == [3, 1, 1, 4]


@pytest.mark.parametrize(
    "name",
    [
        "demo:nothing",
        "demo:prompts?sise=5",
        "demo:prompts?size=x",
        "demo:prompts?split=all",
        "demo:prompts?size=0",
        "demo:prompts?swap=1",
    ],
)
def test_unknown_names_and_options_are_refused(name):
    with pytest.raises(RlhfError, match="DAT002"):
        list(catalogue.rows(name))
    with pytest.raises(RlhfError, match="MOD002"):
        catalogue.resolve_model(name)


def test_wrong_and_absent_facts_cost_what_they_weigh():
    for ticket, _ in itertools.islice(tickets("train", 5, "x"), 20):
        for fact, weight in gold.FACT_WEIGHTS.items():
            for state, cost in ((ABSENT, weight), (WRONG, 1.5 * weight)):
                reply = write(ticket, replace(GOOD, **{fact: state}), random.Random(1))
                assert gold.judge(ticket.text, reply)["helpful"] == pytest.approx(1 - cost)
