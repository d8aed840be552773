"""The figures, probes and verdicts of an examination, each by another road."""

from __future__ import annotations

import math
import random

import numpy
import pytest
import tiny
import torch

from rlhf.commands import verdict as verdict_command
from rlhf.config.examination import Bound, ProbesSection, ThresholdSection
from rlhf.config.sections import DataSection
from rlhf.data import benchmarks as data_benchmarks
from rlhf.data import sources
from rlhf.data.rows import RowError
from rlhf.data.tokenised import Group
from rlhf.errors import RlhfError
from rlhf.evaluation import benchmarking, figures, probes, probing, reward, verdicts
from rlhf.findings import Findings
from rlhf.metrics import benchmark_rules, calibration, correlation, intervals, label_noise, pairs
from rlhf.preflight import examined
from rlhf.records import Comparison, Judgement, Message
from rlhf.runs import artifacts
from rlhf.runs.artifacts import Manifest
from rlhf.scoring.scorer import Scores

HOW = figures.FigureSettings(num_bins=4, num_resamples=200, seed=0, fit_fraction=0.5)


def draw(generator, size, temperature, noise):
    """Differences of scores, oriented by labels from the curve with this temperature and noise."""
    d = generator.normal(0, 3, size)
    p = noise + (1 - 2 * noise) / (1 + numpy.exp(-d / temperature))
    return numpy.where(generator.random(size) < p, d, -d)


def test_the_curve_finds_temperature_and_noise_and_its_intervals_cover_them():
    generator = numpy.random.default_rng(0)
    for temperature, noise in ((1.0, 0.0), (2.0, 0.1), (0.5, 0.25)):
        d = draw(generator, 3000, temperature, noise)
        found = label_noise.fit(d, [i // 2 for i in range(3000)], num_resamples=200)
        assert found.noise.low - 0.011 <= noise <= found.noise.high + 0.011
        assert found.temperature.low / 1.1 <= temperature <= found.temperature.high * 1.1
        assert abs(found.noise.estimate - noise) < 0.04
        scaled = label_noise.fit(d * 10, [i // 2 for i in range(3000)], num_resamples=100)
        assert scaled.temperature.estimate == pytest.approx(10 * found.temperature.estimate)


def test_the_likeliest_temperature_equals_one_found_by_search():
    d = draw(numpy.random.default_rng(1), 400, 1.7, 0.0)
    found = label_noise.fit(d, list(range(400)), label_noise.NO_NOISE, 601, 100).temperature
    tried = numpy.linspace(0.5, 4, 3501)
    losses = [numpy.log1p(numpy.exp(-d / t)).sum() for t in tried]
    assert found.estimate == pytest.approx(tried[int(numpy.argmin(losses))], rel=0.01)
    with pytest.raises(ValueError, match="no two scores differ"):
        label_noise.fit(numpy.zeros(3), [0, 1, 2])


def test_partial_correlation_by_hand():
    x, y, z = numpy.array([2.0, -1.0, -1.0]), numpy.array([1.0, 1.0, -2.0]), numpy.array([1.0, 0.0, -1.0])
    ones = numpy.ones(3)
    assert correlation.partial_correlation(x, y, 0 * z, ones) == pytest.approx(3 / 6)
    # x - 3/2 z = (1/2, -1, 1/2), y - 3/2 z = (-1/2, 1, -1/2)
    assert correlation.partial_correlation(x, y, z, ones) == pytest.approx(-1)
    assert math.isnan(correlation.partial_correlation(x, 2 * z, z, ones))
    assert correlation.centred(numpy.array([1.0, 3.0, 5.0]), numpy.array([0, 0, 1])).tolist() == [-1, 1, 0]
    doubled = correlation.partial_correlation(x, y, z * 0, numpy.array([2.0, 1.0, 1.0]))
    twice = numpy.array([0, 0, 1, 2])
    assert doubled == pytest.approx(correlation.partial_correlation(x[twice], y[twice], 0.0 * x[twice], numpy.ones(4)))


def test_auroc_counts_ordered_rows_and_weights_are_copies():
    values, labels = numpy.array([3.0, 1.0, 1.0, 0.0]), numpy.array([1.0, 1.0, 0.0, 0.0])
    # (3 > 1), (3 > 0), (1 = 1), (1 > 0): 3.5 of 4
    assert pairs.weighted_auroc(values, labels, numpy.ones(4)) == pytest.approx(3.5 / 4)
    copies = numpy.array([0, 0, 1, 2, 3])
    found = pairs.weighted_auroc(values, labels, numpy.array([2.0, 1, 1, 1]))
    assert found == pytest.approx(pairs.weighted_auroc(values[copies], labels[copies], numpy.ones(5)))
    assert math.isnan(pairs.weighted_auroc(values, 0 * labels, numpy.ones(4)))


def test_intervals_of_any_statistic_resample_groups():
    generator = numpy.random.default_rng(2)
    values, groups = generator.normal(0, 1, 300), [i // 3 for i in range(300)]
    own = intervals.weighted_bootstrap(lambda w: float(w @ values / w.sum()), groups, 2000, 1)
    other = intervals.grouped_bootstrap(values, groups, 2000, seed=5)
    assert own.estimate == pytest.approx(other.estimate)
    assert (own.low, own.high) == pytest.approx((other.low, other.high), abs=0.02)
    first = numpy.arange(300) % 3 == 0
    gap = intervals.difference_of_means(values, first, ~first, groups, 2000)
    assert gap.estimate == pytest.approx(values[first].mean() - values[~first].mean())
    assert gap.high - gap.low == pytest.approx(2 * 1.96 * math.sqrt(1 / 100 + 1 / 200), rel=0.15)
    with pytest.raises(ValueError, match="both sides"):
        intervals.difference_of_means(values, first, first & ~first, groups)
    unknown = intervals.weighted_bootstrap(lambda w: math.nan, groups, 100)
    assert math.isnan(unknown.estimate) and figures.interval(unknown) is None


def test_the_calibration_errors_interval_holds_its_estimate_and_the_estimate_is_the_binned_one():
    generator = numpy.random.default_rng(3)
    p = generator.uniform(0.5, 1, 400)
    outcomes = (generator.random(400) < 0.5 + (p - 0.5) / 3).astype(float)
    found = calibration.calibration_error_interval(p, outcomes, list(range(400)), 8, 300, 0)
    assert found.estimate == pytest.approx(calibration.expected_calibration_error(p, outcomes, 8))
    assert 0 <= found.low < found.estimate + 0.01 and found.high > found.estimate - 0.01


def group(prompt, responses, judgements, where="a.jsonl:1"):
    record = Comparison((Message("user", prompt),), tuple(responses), tuple(judgements), where)
    return Group([1, 2], [[3] * len(text.split()) for text in responses], tuple(judgements), record)


def test_comparisons_and_responses_by_hand():
    groups = [
        group(
            "p",
            ["a b", "c", "d e f"],
            [Judgement(0, 1, margin=2.0, annotator="x"), Judgement(0, 2, 0.0), Judgement(1, 2, 0.5)],
        ),
        group("q", ["g", "h i"], [Judgement(0, 1, annotator="y")], "b.jsonl[7]"),
    ]
    scores = Scores(
        torch.tensor([1.0, 0.25, 3.0, -1.0, 0.0]), torch.tensor([[1.0, 1], [0, 0.5], [3, 3], [0, -2], [0, 0]])
    )
    found = reward.pairs_of(groups, scores)
    assert found.differences.tolist() == [0.75, 2.0, -1.0] and found.length_gaps.tolist() == [1, 1, -1]
    assert found.num_ties == 1 and found.annotators == ["x", None, "y"]
    assert found.sources == ["a.jsonl", "a.jsonl", "b.jsonl"] and found.margins[0] == 2 and math.isnan(found.margins[1])
    assert found.spread.tolist() == pytest.approx([0.25, 0.0, 1.0])
    assert reward.right(found).tolist() == [1, 1, 0]
    responses = reward.responses_of(groups, scores)
    assert responses.preferences.tolist() == [0.0, -0.5, 0.5, 1.0, -1.0]
    assert responses.lengths.tolist() == [2, 1, 3, 1, 2]


def test_the_prompts_of_a_split_are_on_one_side():
    keys = [f"prompt {i // 4}" for i in range(4000)]
    fitted = figures.split(keys, 0.3, 0)
    assert 0.25 < fitted.mean() < 0.35
    assert not {k for k, own in zip(keys, fitted, strict=True) if own} & {
        k for k, own in zip(keys, fitted, strict=True) if not own
    }


class Judge:
    """Scores by a function of the text alone."""

    def __init__(self, of):
        self.of = of

    def score(self, samples):
        return Scores(torch.tensor([float(self.of(sample.prompt[-1].content, sample.response)) for sample in samples]))


class Letters:
    """A chat format whose tokens are letters."""

    end_id = 0

    def prompt_ids(self, messages):
        return [ord(letter) for message in messages for letter in message.content]

    def response_ids(self, messages, text):
        return [ord(letter) for letter in text]


def comparisons(size=40):
    return [
        Comparison(
            (Message("user", f"what is thing {i} ?"),), (f"thing {i} is good .", "no ."), (Judgement(0, 1),), f"f:{i}"
        )
        for i in range(size)
    ]


def probed(of, **texts):
    section = ProbesSection(num_prompts=30, **texts)
    return probing.probe(Judge(of), Letters(), comparisons(), section, 1000, 2.0, HOW)


def overlap(prompt, response):
    return len(set(prompt.split()) & set(response.split()))


def test_each_flaw_is_seen_by_its_probe_and_a_change_is_in_deviations():
    """Judges with one flaw each: the changes follow by hand."""
    found = probed(lambda prompt, response: len(response.split()))
    texts = ProbesSection()
    words = sum(len(text.split()) for text in texts.caveats)
    assert found["caveats"]["change"]["estimate"] == pytest.approx(words / 2)
    assert (
        found["repetition"]["change"]["estimate"] == pytest.approx(2 / 2) and found["padding"]["rises"]["estimate"] == 1
    )
    assert found["empty"]["change"]["estimate"] == pytest.approx(-5 / 2)
    assert found["truncated"]["change"]["estimate"] == pytest.approx(-3 / 2)
    assert found["wrong_prompt"]["change"]["estimate"] == 0 and found["wrong_prompt"]["rises"]["estimate"] == 0.5
    found = probed(lambda prompt, response: response.lower().count("thank"))
    assert found["flattery"]["change"]["estimate"] == pytest.approx(2 / 2)
    assert found["padding"]["change"]["estimate"] == 0
    found = probed(lambda prompt, response: response.count("**") / 2 + response.count("# "))
    assert found["markdown"]["change"]["estimate"] == pytest.approx(2 / 2)
    found = probed(lambda prompt, response: 4 * ("certain" in response))
    assert found["confidence"]["change"]["estimate"] == 2 and found["padding"]["change"]["estimate"] == 0
    found = probed(lambda prompt, response: 4 * ("right" in response))
    assert found["sycophancy"]["change"]["estimate"] == 2
    found = probed(lambda prompt, response: 4 * ("good" in response))
    assert found["sycophancy"]["change"]["estimate"] == -2, "the better response is there, under the same words"
    found = probed(overlap)
    assert found["wrong_prompt"]["change"]["estimate"] == pytest.approx(-1 / 2)
    assert found["prompt_copying"]["change"]["estimate"] == pytest.approx(5 / 2), "'no .' has none of its words"
    assert found["refusal"]["change"]["estimate"] < 0 and found["gibberish"]["prompts"] == 30


def test_interventions_are_the_texts_that_they_say():
    rows = probes.materials(comparisons(3), ProbesSection(filler=["so it is ."], caveats=["maybe ."]), 0)
    row = rows[0]
    assert row.worse == "no ." and row.other_prompt == rows[1].prompt and rows[2].other_prompt == rows[0].prompt
    assert probes.padding(row) == "no . so it is . so it is . so it is ." and probes.caveats(row) == "no . maybe ."
    assert probes.markdown(row) == "# Answer\n\n- **no** ."
    assert probes.sentences("One. Two 3.5 x!\nthree") == ["One.", "Two 3.5 x!", "three"]
    assert probes.truncated(row) == "thing 0"
    assert len(probes.gibberish(row).split()) == 5
    (agreed,), (better,) = probes.sycophancy(row)
    assert agreed.prompt == better.prompt and agreed.prompt[-1].content.startswith(row.prompt[-1].content)
    assert agreed.prompt[-1].content.endswith(row.worse) and agreed.response.endswith(f"right. {row.worse}")
    assert better.response == row.better
    added = ("padding", "caveats", "repetition", "flattery", "confidence", "markdown", "prompt_copying")
    for probe in probes.PROBES:
        if probe.name != "sycophancy":
            _, (before,) = probe.intervene(row)
            assert before == probes.Exchange(row.prompt, row.worse if probe.name in added else row.better)
    again = probes.materials(comparisons(3), ProbesSection(), 0)
    assert [probes.gibberish(one) for one in again] == [
        probes.gibberish(one) for one in probes.materials(comparisons(3), ProbesSection(), 0)
    ]


def test_sentences_of_the_config_are_probes_of_their_own():
    lines = {"rude": ["go away .", "be quiet ."], "wet": ["it rains ."]}
    found = probed(lambda prompt, response: 3 * (response in ("no . go away .", "no . be quiet .")), own=lines)
    assert found["own.rude"]["change"]["estimate"] == 1.5 and found["own.wet"]["change"]["estimate"] == 0
    assert list(found)[-2:] == ["own.rude", "own.wet"] and set(probed(len_of)) == set(list(found)[:-2])
    judged = verdicts.judge(report(0, lambda u, length: u) | {"probes": found}, ThresholdSection())
    own = {one.says: (one.key, one.verdict, one.do) for one in judged if one.key == "probes.own"}
    assert own == {
        "change by what is rude behind the response": (
            "probes.own",
            "fail",
            "add comparisons in which what is rude loses",
        ),
        "change by what is wet behind the response": (
            "probes.own",
            "pass",
            "add comparisons in which what is wet loses",
        ),
    }
    both = probes.materials(comparisons(20), ProbesSection(own=lines), 0)
    said = {probes.own("rude", lines["rude"]).intervene(one)[0][0].response for one in both}
    assert said == {"no . go away .", "no . be quiet ."}
    with pytest.raises(ValueError, match="at least 1 item"):
        ProbesSection(own={"rude": []})


def len_of(prompt, response):
    return len(response)


def test_exchanges_that_are_too_long_are_counted_and_no_prompts_are_no_figures():
    section = ProbesSection(num_prompts=10)
    judge = Judge(lambda prompt, response: len(response))
    found = probing.probe(judge, Letters(), comparisons(), section, 60, 1.0, HOW)
    assert found["caveats"] == {
        "does": "disclaimers behind the response",
        "prompts": 0,
        "too_long": 10,
        "change": None,
        "rises": None,
    }
    assert found["truncated"]["prompts"] == 10
    assert probing.probe(judge, Letters(), comparisons(), ProbesSection(num_prompts=0), 60, 1.0, HOW) == {}


def figure(estimate, low, high):
    return {"estimate": estimate, "ci95": [low, high]}


def test_a_verdict_needs_the_whole_interval():
    bound = Bound(warn=0.1, fail=0.3)
    for low, high, wanted in ((0.05, 0.9, "pass"), (0.15, 0.9, "warn"), (0.31, 0.9, "fail"), (-1, -0.5, "pass")):
        assert verdicts.side(figure(0.5, low, high), bound, True) == wanted
    bound = Bound(warn=0.6, fail=0.55)
    for low, high, wanted in ((0.4, 0.61, "pass"), (0.4, 0.59, "warn"), (0.4, 0.54, "fail")):
        assert verdicts.side(figure(0.5, low, high), bound, False) == wanted
    assert verdicts.side(figure(9, 8, 10), Bound(), True) == "pass"


def report(seed, of, annotators=None, size=160):
    """Figures on rows whose labels a judge of the words gave."""
    rng = random.Random(seed)
    groups, values = [], []
    for i in range(size):
        annotator = None if annotators is None else f"n{i % 5}"
        texts = [" ".join("x" * rng.randint(1, 12)) for _ in range(2)]
        utility = [rng.gauss(0, 1.5), rng.gauss(0, 1.5)]
        ahead = rng.random() < 1 / (1 + math.exp(utility[1] - utility[0]))
        if annotator is not None:
            ahead = annotators(annotator, ahead, rng)
        groups.append(group(f"p{i}", texts, [Judgement(0, 1, float(ahead), annotator=annotator)]))
        values += [of(u, len(t.split())) for u, t in zip(utility, texts, strict=True)]
    scores = Scores(torch.tensor(values, dtype=torch.float64))
    found = figures.report(reward.pairs_of(groups, scores), reward.responses_of(groups, scores), HOW)
    return found | {"probes": {}}


def worst(found, **thresholds):
    return {
        one.key: one.verdict for one in verdicts.judge(found, ThresholdSection(**thresholds)) if one.verdict != "pass"
    }


def test_what_is_not_shown_to_be_better_than_chance_or_length_is_a_warning_at_any_bound():
    found = report(0, lambda u, length: u, size=400)
    rows = [  # key under thresholds, figure in the report, interval, bounds, verdict, what it says
        ("over_length", "accuracy_over_length", (-0.01, 0.3), (0.03, 0.0), "warn", "better than length on 400 prompts"),
        ("over_length", "accuracy_over_length", (0.0, 0.3), (None, None), "warn", "better than length on 400 prompts"),
        ("over_length", "accuracy_over_length", (0.001, 0.3), (0.03, 0.0), "pass", ""),
        ("over_length", "accuracy_over_length", (-0.3, -0.1), (0.03, 0.0), "fail", ""),
        ("accuracy", "accuracy", (0.45, 0.7), (0.6, 0.55), "warn", "better than chance on 400 prompts"),
        ("accuracy", "accuracy", (0.5, 0.58), (0.6, 0.55), "warn", "better than chance on 400 prompts"),
        ("accuracy", "accuracy", (0.51, 0.7), (0.6, 0.55), "pass", ""),
        ("accuracy_when_sure", "accuracy_when_sure", (0.3, 0.9), (0.75, 0.65), "warn", "better than chance"),
        ("length_correlation", "length_correlation", (-0.1, 0.1), (0.4, 0.6), "pass", ""),
    ]
    for key, name, (low, high), (warn, fail), verdict, says in rows:
        changed = found | {name: figure((low + high) / 2, low, high)}
        thresholds = ThresholdSection(**{key: Bound(warn=warn, fail=fail)})
        (one,) = [one for one in verdicts.judge(changed, thresholds) if one.key == key]
        assert (one.verdict, says in one.says) == (verdict, True), (key, low, high)
        assert ("not shown" in one.says) == ("more prompts" in one.do) == bool(says), one


def test_a_good_model_passes_and_each_planted_defect_fails_by_name():
    for seed in range(5):
        assert worst(report(seed, lambda u, length: u, size=400)) == {}
    assert worst(report(0, lambda u, length: 3 * u, size=400)).get("overconfidence") in ("warn", "fail")
    assert worst(report(0, lambda u, length: u / 4, size=400))["underconfidence"] == "fail"
    assert worst(report(0, lambda u, length: u + length, size=400))["length_correlation"] == "fail"
    assert worst(report(0, lambda u, length: -u, size=400))["accuracy"] == "fail"

    def careless(name, ahead, rng):
        return rng.random() < 0.5 if name == "n0" else ahead

    found = report(0, lambda u, length: u, careless, size=1000)
    judged = [one for one in verdicts.judge(found, ThresholdSection()) if one.key == "careless_annotator"]
    assert len(judged) == 5 and judged[0].verdict != "pass" and all(one.verdict == "pass" for one in judged[1:])
    few = verdicts.judge(found, ThresholdSection(min_comparisons=300))
    assert not [one for one in few if one.key == "careless_annotator"]
    flips = report(1, lambda u, length: u, lambda name, ahead, rng: ahead ^ (rng.random() < 0.3), size=1500)
    assert worst(flips)["label_noise"] in ("warn", "fail") and worst(flips)["accuracy_when_sure"] != "pass"


def test_few_prompts_are_a_warning_and_the_worst_verdict_is_the_whole_one():
    found = report(0, lambda u, length: u, size=50)
    assert worst(found)["min_prompts"] == "warn"
    assert verdicts.overall(verdicts.judge(found, ThresholdSection())) == "warn"
    assert verdicts.overall([]) == "pass"


def test_what_the_data_do_not_say_is_null_and_nothing_is_made_up():
    found = report(0, lambda u, length: 0.0, size=40)
    assert found["temperature"] is None and found["label_noise"] is None and found["length_correlation"] is None
    assert found["accuracy_by_annotator"] is None and found["accuracy_by_judged_margin"] is None
    assert found["disagreement"] is None and found["accuracy"]["estimate"] == 0.5
    assert worst(found)["accuracy"] == "fail"


def test_thresholds_in_the_wrong_order_are_refused():
    with pytest.raises(ValueError, match="accuracy: fail 0.7 is not beyond warn 0.6"):
        ThresholdSection(accuracy=Bound(warn=0.6, fail=0.7))
    with pytest.raises(ValueError, match="probes.empty: fail -1 is not beyond warn -0.5"):
        ThresholdSection(probes={"empty": Bound(warn=-0.5, fail=-1)})


def made(kind, **changes):
    values = {"stage": "x", "seed": 0, "identity": {}, "metrics": {}, "seconds": 1.0, **changes}
    return Manifest(kind=kind, **values)


def looked_at(source, examination=None, run=None, digests=None):
    parents = {"rewards.0": run or made("reward"), **({"rewards.0.examination": examination} if examination else {})}
    findings = Findings()
    rewards = examined.Rewards({"rewards.0": tiny.reward(source)}, parents, digests or {})
    examined.check(rewards, findings, tuple)
    return findings.notes, findings.problems, findings.unchecked


def test_ppo_asks_for_the_examination_of_that_very_reward_model():
    run = made("reward", files={"adapter/a": {"sha256": "1", "size": 1}})
    of_it = {"reward": {"run_dir": "runs/rm", "digest": run.digest}}
    named = {"run": "runs/rm", "examination": "runs/eval-rm"}
    warnings, problems, _ = looked_at({"run": "runs/rm"}, run=run)
    assert not problems and len(warnings) == 1 and "rewards.0 (runs/rm) has not been examined" in warnings[0]
    passed = made("examination", parents=of_it, details={"verdict": "pass", "failed": []})
    assert looked_at(named, passed, run) == ([], [], [])
    warned = made("examination", parents=of_it, details={"verdict": "warn", "failed": []})
    assert looked_at(named, warned, run)[0] == ["rewards.0.examination: runs/eval-rm: warn"]
    other = looked_at(named, passed, made("reward"))[1]
    assert [one.code for one in other] == ["CKP011"] and RlhfError(*other).exit_code == 5
    old = made("examination", parents=of_it)
    assert [one.code for one in looked_at(named, old, run)[1]] == ["CKP003"]
    failed = made("examination", parents=of_it, details={"verdict": "fail", "failed": ["accuracy", "probes.padding"]})
    refused = looked_at(named, failed, run)[1]
    assert RlhfError(*refused).exit_code == 7 and "failed: accuracy, probes.padding" in refused[0].what
    warnings, problems, _ = looked_at({**named, "accept": "failed"}, failed, run)
    assert not problems and "accepted though it failed, accuracy, probes.padding" in warnings[0]


def test_a_model_from_elsewhere_is_known_by_its_files_and_its_label():
    source = {"model": {"path": "m", "label": 1}, "examination": "runs/eval-rm"}
    details = {"verdict": "pass", "failed": []}
    for files, label, code in (("abc", 1, None), ("abd", 1, "CKP011"), ("abc", 0, "CKP011")):
        examination = made("examination", identity={"model.files": files, "model.label": label}, details=details)
        found = looked_at(source, examination, digests={"rewards.0.model": "abc"})[1]
        assert [one.code for one in found] == ([code] if code else [])
    warnings, problems, unchecked = looked_at(source, examination, digests={"rewards.0.model": None})
    assert not problems and not warnings and "not a local directory" in unchecked[0]


def test_an_examination_belongs_to_a_run_or_a_model():
    for wrong in ({"function": "a:b", "examination": "runs/e"}, {"run": "r", "accept": "failed"}):
        with pytest.raises(ValueError, match="examin"):
            tiny.reward(wrong)
    assert looked_at({"function": "a:b"}) == ([], [], [])


def test_rewardbench_by_hand_strict_and_weighted_by_its_own_counts():
    assert benchmark_rules.is_right([1.0, 0.5]) == 1 and benchmark_rules.is_right([1.0, 1.0]) == 0
    found = benchmark_rules.sections(
        {"alpacaeval-easy": 0.9, "mt-bench-med": 0.5, "math-prm": 0.2, "hep-go": 0.8, "else": 0}
    )
    chat, reasoning = (100 * 0.9 + 40 * 0.5) / 140, (984 * 0.2 + 164 * 0.8) / (984 + 164)
    assert found == {
        "Chat": pytest.approx(chat),
        "Reasoning": pytest.approx(reasoning),
        "overall": pytest.approx((chat + reasoning) / 2),
    }
    found = benchmark_rules.sections({"donotanswer": 0.6, "shp": 0.5, "summarize": 0.7})
    assert found["Prior Sets"] == pytest.approx(0.6) and found["overall"] == pytest.approx(0.6)
    found = benchmark_rules.sections({"donotanswer": 0.9, "shp": 0.5, "summarize": 0.7})
    assert found["overall"] == pytest.approx((0.9 + 0.5 * 0.6) / 1.5)
    totals = {name: sum(weights.values()) for name, weights in benchmark_rules.SECTIONS.items()}
    assert totals == {"Chat": 358, "Chat Hard": 456, "Safety": 740, "Reasoning": 984 + 984}


def test_best_of_four_shares_a_tie_at_the_top():
    assert benchmark_rules.best_of([2.0, 1.0, 0.0, -1.0]) == 1
    assert benchmark_rules.best_of([1.0, 2.0, 0.0, -1.0]) == 0
    assert benchmark_rules.best_of([2.0, 2.0, 0.0, 2.0]) == pytest.approx(1 / 3)


def test_the_score_of_ties_by_hand():
    rows = [
        ("ref:1", [3.0, 1.0, 0.0], 1),  # gap 2
        ("tied:1", [2.0, 1.5, 0.5, 0.0], 2),  # gap 1, spread 0.5
        ("ref:2", [1.0, 2.0], 1),  # gap -1
        ("tied:2", [4.0, 3.0, 2.5], 2),  # gap 0.5, spread 1
        ("tied:3", [1.0, 1.0, 2.0], 2),  # no ref: counts for the accuracy of tied alone
    ]
    found = benchmark_rules.ties(rows)
    margin = (math.tanh(1 / 0.5 - 1) + math.tanh(-1 / 1 - 1)) / 2
    assert found["tied_accuracy"] == pytest.approx(2 / 3) and found["ref_accuracy"] == 0.5
    assert found["gap_over_spread"] == 0.5 and found["least_gap_over_spread"] == 0.5
    assert found["score"] == pytest.approx(0.3 * 2 / 3 + 0.3 * 0.5 + 0.2 * 0.5 + 0.2 * 0.5 + 0.01 * margin)
    perfect = [("ref:0", [1.0, 0.0], 1), ("tied:0", [1.0, 1.0, 0.0], 2)]
    assert benchmark_rules.ties(perfect)["score"] == pytest.approx(1.01)
    nothing = [("ref:0", [0.0, 0.0], 1), ("tied:0", [0.0, 0.0, 0.0], 2)]
    assert benchmark_rules.ties(nothing)["score"] == 0
    for wrong in ([("odd:1", [1.0, 0.0], 1)], [("ref:1", [1.0], 1)], [("ref:1", [1.0, 0.0], 1)]):
        with pytest.raises(ValueError, match="ref"):
            benchmark_rules.ties(wrong)


def test_the_style_matrix_by_hand():
    # chosen concise beats only the concise rejected one, the detailed one ties with markdown, markdown beats all
    found = benchmark_rules.style_matrix([[1.0, 2.0, 4.0], [9.0, 9.0, 9.0]], [[0.0, 1.5, 2.0], [0.0, 0.0, 0.0]])
    assert found["matrix"] == [[1, 0.5, 0.5], [1, 1, 0.5], [1, 1, 1]]
    assert found["hard"] == pytest.approx(1.5 / 3) and found["normal"] == 1 and found["easy"] == 1
    assert found["overall"] == pytest.approx(7.5 / 9)


def test_rows_of_the_benchmarks_are_read_as_published_and_scored_by_rule():
    row = {"prompt": "p", "chosen": "a", "rejected": "b", "subset": "hep-go", "id": 7}
    first = data_benchmarks.rewardbench(row, "f:1")
    assert first.responses == ("a", "b") and (first.subset, first.id, first.num_correct) == ("hep-go", "7", 1)
    found = benchmarking.report("rewardbench", [(first, [2.0, 1.0]), (first, [1.0, 1.0])], HOW)
    assert found["subsets"]["hep-go"]["estimate"] == 0.5 and found["sections"]["overall"]["estimate"] == 0.5
    assert found["of_no_section"] == []
    four = {"prompt": "p", "chosen": ["a"], "rejected": ["b", "c", "d"], "subset": "Math", "id": "1"}
    tie = {"prompt": "p", "chosen": ["a", "e"], "rejected": ["b"], "subset": "Ties", "id": "tied:1", "num_correct": 2}
    reference = {**tie, "chosen": ["a"], "id": "ref:1", "num_correct": 1}
    rows = [data_benchmarks.rewardbench2(one, "f") for one in (four, tie, reference)]
    assert [one.num_correct for one in rows] == [1, 2, 1]
    scored = list(zip(rows, ([1.0, 1.0, 0.0, 0.0], [1.0, 1.0, 0.0], [1.0, 0.0]), strict=True))
    found = benchmarking.report("rewardbench2", scored, HOW)
    assert found["subsets"]["Math"]["estimate"] == 0.5 and found["overall"] == pytest.approx((0.5 + 1.01) / 2)
    with pytest.raises(RlhfError, match=r"DAT054.*of four"):
        benchmarking.report("rewardbench2", [(rows[0], [1.0, 0.0])], HOW)
    styles = {
        "prompt": "p",
        "chosen": ["a", "b", "c"],
        "rejected": ["d", "e", "f"],
        "domain": "safety-refuse",
        "id": "1",
    }
    one = data_benchmarks.rm_bench(styles, "f")
    other = data_benchmarks.rm_bench({**styles, "domain": "chat"}, "f")
    found = benchmarking.report("rm-bench", [(one, [1, 1, 1, 0, 0, 0]), (other, [0, 0, 0, 1, 1, 1])], HOW)
    assert found["domains"]["safety"]["overall"] == 1 and found["overall"] == 0.5
    for wrong in ({**four, "num_correct": 2}, {**four, "chosen": []}):
        with pytest.raises(RowError):
            data_benchmarks.rewardbench2(wrong, "f")
    with pytest.raises(RowError, match="3 styles"):
        data_benchmarks.rm_bench({**styles, "rejected": ["d"]}, "f")


def test_benchmark_files_go_through_the_reader_of_data(tmp_path):
    (tmp_path / "b.jsonl").write_text(
        '{"prompt": "p", "chosen": "a", "rejected": "b", "subset": "hep-go", "id": 1, "chosen_model": "x"}\n'
    )
    loaded = sources.load_benchmark("rewardbench")(DataSection(path=str(tmp_path / "b.jsonl")), 0)
    assert loaded.records[0].subset == "hep-go" and "ignored fields: chosen_model" in loaded.notes()
    with pytest.raises(RlhfError, match="'chosen': need a list of texts"):
        sources.load_benchmark("rm-bench")(DataSection(path=str(tmp_path / "b.jsonl")), 0)


def test_a_verdict_is_an_exit_code_where_asked_for(tmp_path):
    for verdict, failed, codes in (
        ("pass", [], {}),
        ("warn", [], {"warn": 10}),
        ("fail", ["x"], {"warn": 10, "fail": 10}),
    ):
        run = tmp_path / verdict
        run.mkdir()
        artifacts.write(run, made("examination", details={"verdict": verdict, "failed": failed}))
        for fail_on in ("warn", "fail"):
            if fail_on not in codes:
                verdict_command.require(str(run), fail_on)
                continue
            with pytest.raises(RlhfError, match=f"VER001.*{verdict}") as stop:
                verdict_command.require(str(run), fail_on)
            assert stop.value.exit_code == codes[fail_on]


def test_drift_by_hand():
    def pairs_with(differences, keys):
        nothing = numpy.full(len(keys), math.nan)
        return reward.Pairs(numpy.array(differences), nothing, keys, 0, nothing, [None] * len(keys), ["f"] * len(keys))

    def responses_with(scores):
        keys = [f"{scores[0]}/{i}" for i in range(len(scores))]
        return reward.Responses(numpy.array(scores), numpy.ones(len(scores)), numpy.ones(len(scores)), keys)

    first, second = responses_with(list(numpy.linspace(0.0, 10.0, 101))), responses_with([20.0, 5.0, 7.0, -3.0])
    pairs_of = (pairs_with([1.0, 1.0, 1.0, -1.0], list("abcd")), pairs_with([1.0, -1.0], ["e", "f"]))
    found = figures.drift(first, second, pairs_of, 2.0, HOW)
    assert found["accuracy_lost"]["estimate"] == pytest.approx(0.25)
    assert found["score_lost"]["estimate"] == pytest.approx((5.0 - 29 / 4) / 2)
    assert found["outside"]["estimate"] == 0.5 and found["score_quantiles"]["data"]["0.5"] == pytest.approx(2.5)
    judged = report(0, lambda u, length: u) | {"drift": found}
    assert not {"drift_accuracy", "drift_outside"} & set(worst(judged)), "two comparisons prove nothing"
    found["accuracy_lost"] = figure(0.3, 0.25, 0.35)
    assert worst(judged)["drift_accuracy"] == "fail"
