"""Mixtures: the shares that the weights say, the same rows for the same seed, and every repetition counted."""

from __future__ import annotations

import json
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf.config import load
from rlhf.config.sections import DataSection
from rlhf.config.stages import SftConfig
from rlhf.data import mixture, sources
from rlhf.errors import RlhfError
from rlhf.preflight import prepare
from rlhf.records import Message, Prompt, prompt_key, split_by_prompt
from rlhf.stages.registry import STAGES


def write(tmp_path, **sizes):
    for name, numbers in sizes.items():
        rows = [{"prompt": f"p{number}", "completion": f"{name} {number}"} for number in numbers]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def section(tmp_path, *entries, **options):
    listed = [{"path": str(tmp_path / f"{name}.jsonl"), **keys} for name, keys in entries]
    return DataSection.model_validate({"mixture": listed, **options})


def answers(loaded):
    return [record.messages[-1].content for record in loaded.records]


def test_without_weights_every_row_is_taken_once_and_shared_prompts_are_counted(tmp_path):
    write(tmp_path, a=range(4), b=range(2, 7))
    loaded = sources.load_demonstrations(section(tmp_path, ("a", {}), ("b", {})))
    assert answers(loaded) == [f"a {n}" for n in range(4)] + [f"b {n}" for n in range(2, 7)]
    assert f"2 prompts are in both {tmp_path / 'a.jsonl'} and {tmp_path / 'b.jsonl'}" in loaded.notes()
    assert [(one.num_records, one.num_drawn, one.share) for one in loaded.drawn] == [(4, 4, None), (5, 5, None)]


def test_weights_are_shares_of_the_rows_and_up_and_down_sampling_is_said(tmp_path):
    write(tmp_path, a=range(4), b=range(10, 26))
    loaded = sources.load_demonstrations(section(tmp_path, ("a", {"weight": 3.0}), ("b", {"weight": 2.0})))
    counts = Counter(answers(loaded))
    from_a = {text: count for text, count in counts.items() if text.startswith("a")}
    assert sum(counts.values()) == 20 and sum(from_a.values()) == 12 and set(from_a.values()) == {3}
    assert sum(count for text, count in counts.items() if text.startswith("b")) == 8 and max(counts.values()) == 3
    first, second = (note for note in loaded.notes() if "share" in note)
    assert first.endswith("a.jsonl: 12 rows drawn from 4 (share 0.600), each 3 times")
    assert second.endswith("b.jsonl: 8 rows drawn from 16 (share 0.400), 8 left out")
    part = mixture.Drawn("c", 10, 25, 0.5).sentence()
    assert part == "c: 25 rows drawn from 10 (share 0.500), 5 of them 3 times, the others 2 times"


def test_the_same_seed_draws_the_same_rows_and_another_one_others(tmp_path):
    write(tmp_path, a=range(40), b=range(50, 60))
    data = section(tmp_path, ("a", {"weight": 1.0}), ("b", {"weight": 1.0}), mixture_rows=20)
    one, two, other = (sources.load_demonstrations(data, seed) for seed in (3, 3, 4))
    assert answers(one) == answers(two) != answers(other) and one.digest == two.digest != other.digest
    assert len(one.records) == 20


@given(
    st.lists(st.integers(0, 9), min_size=1, max_size=30), st.integers(0, 40), st.integers(0, 40), st.integers(0, 2**32)
)
def test_a_larger_draw_holds_the_smaller_one_and_repeats_evenly(numbers, first, second, seed):
    records = [Prompt((Message("user", str(number)),), f"row {index}") for index, number in enumerate(numbers)]
    few, many = (
        Counter(record.where for record in mixture.take(records, count, seed)) for count in sorted((first, second))
    )
    assert few <= many and few.total() == min(first, second)
    times = [many[record.where] for record in records]
    assert max(times) - min(times) <= 1


@given(st.lists(st.floats(0.01, 100), min_size=1, max_size=6), st.integers(0, 1000))
def test_quotas_add_up_and_are_within_one_row_of_the_exact_share(weights, total):
    found = mixture.quotas(weights, total)
    assert sum(found) == total
    assert all(abs(n - total * w / sum(weights)) < 1 + 1e-9 for n, w in zip(found, weights, strict=True))


def test_a_source_that_would_give_no_row_is_refused(tmp_path):
    write(tmp_path, a=range(4), b=range(4))
    with pytest.raises(RlhfError, match="DAT031.*b.jsonl.*no row at all"):
        sources.load_demonstrations(section(tmp_path, ("a", {"weight": 1.0}), ("b", {"weight": 1e-3})))


def test_the_problems_of_all_sources_come_together(tmp_path):
    write(tmp_path, a=range(2))
    (tmp_path / "b.jsonl").write_text('{"prompt": 3, "completion": "x"}\n')
    with pytest.raises(RlhfError) as caught:
        sources.load_demonstrations(section(tmp_path, ("a", {}), ("b", {}), ("c", {})))
    assert [problem.code for problem in caught.value.problems] == ["DAT004", "DAT010"]


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("{path: a.jsonl, mixture: [{path: b.jsonl}]}", "exactly one of path and mixture"),
        ("{limit: 3}", "exactly one of path and mixture"),
        ("{mixture: [{path: a, weight: 1.0}, {path: b}]}", "every source of a mixture a weight, or none"),
        ("{mixture: [{path: a}], mixture_rows: 5}", "mixture_rows needs a mixture with weights"),
        ("{mixture: [{path: a}], split: train, form: alpaca}", "split and form: set it in each source"),
        ("{mixture: []}", "at least 1"),
        ("{mixture: [{path: a, weigth: 2}]}", "did you mean 'data.mixture.weight'"),
        ("{mixture: [{path: a, weight: 0}]}", "greater than 0"),
    ],
)
def test_mixtures_that_say_two_things_are_refused_by_the_loader(tmp_path, text, wanted):
    path = tmp_path / "sft.yaml"
    path.write_text(f"data: {text}\nepochs: 1\n")
    with pytest.raises(RlhfError) as caught:
        load.load(SftConfig, path)
    assert wanted in str(caught.value) and caught.value.exit_code == 2


def test_identity_names_each_source_with_its_count_and_splits_share_no_prompt(tmp_path):
    write(tmp_path, a=range(30), b=range(20, 50))
    path = tmp_path / "sft.yaml"
    entries = ", ".join(f"{{path: '{tmp_path / name}.jsonl', weight: {w}}}" for name, w in (("a", 2), ("b", 1)))
    path.write_text(f"data: {{mixture: [{entries}], limit: 25}}\nepochs: 1\nrun_dir: '{tmp_path / 'run'}'\n")
    config = load.load(SftConfig, path)
    plan = prepare.prepare(config, STAGES["sft"].needs(config))
    assert plan.identity["data.mixture.0.path"].endswith("a.jsonl") and plan.identity["data.limit"] == 25
    assert [plan.identity[f"data.mixture.{n}.drawn"] for n in (0, 1)] == [33, 17]
    rest, held_out = split_by_prompt(plan.data["data"].records, 0.2, 0)
    assert not {prompt_key(r.prompt) for r in rest} & {prompt_key(r.prompt) for r in held_out}
    other = prepare.prepare(load.load(SftConfig, path, ["seed=1"]), STAGES["sft"].needs(config))
    assert other.identity["data.rows"] != plan.identity["data.rows"]


def test_the_smaller_limit_of_a_source_and_of_the_mixture_holds(tmp_path):
    write(tmp_path, a=range(9), b=range(9))
    loaded = sources.load_demonstrations(section(tmp_path, ("a", {"limit": 2}), ("b", {"limit": 7}), limit=5))
    assert Counter(text[0] for text in answers(loaded)) == {"a": 2, "b": 5}
