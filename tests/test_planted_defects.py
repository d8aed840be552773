"""Planted defects: labels are what they say, and the study's figures are judged anew by the shipped bounds."""

from __future__ import annotations

import itertools
import os
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "scripts"))

import planted_defects as study  # noqa: E402
from planted_labels import ANNOTATORS, PLANTS, Case, rankings  # noqa: E402

from rlhf.demo import catalogue as demo  # noqa: E402
from rlhf.demo.gold import judge  # noqa: E402

CLEAN = list(demo.rows("demo:preferences?split=test&size=300&seed=3"))


def made(defect, dose):
    return list(rankings(Case(defect, dose, 3), "test", 300))


def ordered(row):
    """Every pair of replies, the preferred one first."""
    rows = sorted(zip(row["ranks"], row["responses"], strict=True))
    return itertools.combinations([text for _, text in rows], 2)


def share(rows, is_so):
    found = [is_so(row, better, worse) for row in rows for better, worse in ordered(row)]
    known = [one for one in found if one is not None]
    return sum(known) / len(known)


def test_dose_zero_is_the_clean_world_and_only_rows_to_examine_name_annotators():
    for defect in ("clean", "length", "flips", "careless"):
        rows = made(defect, 0.0)
        assert [{**row, "annotator": None} for row in rows] == [{**row, "annotator": None} for row in CLEAN]
        assert {row["annotator"] for row in rows} == set(ANNOTATORS)
    assert all("annotator" not in row for row in rankings(Case("flips", 0.25, 3), "train", 20))


def test_flips_reverse_their_share_of_the_rankings_and_touch_nothing_else():
    for dose in (0.25, 1.0):
        rows = made("flips", dose)
        changed = [row["ranks"] != old["ranks"] for row, old in zip(rows, CLEAN, strict=True)]
        assert abs(sum(changed) / 300 - dose) < 0.08
        for row, old in zip(rows, CLEAN, strict=True):
            assert row["responses"] == old["responses"]
            assert row["ranks"] in (old["ranks"], [5 - rank for rank in old["ranks"]])


def test_one_careless_annotator_ranks_at_random_and_the_others_as_before():
    agree = {True: [], False: []}
    for row, old in zip(made("careless", 1.0), CLEAN, strict=True):
        agree[row["annotator"] == "ada"] += [pair in list(ordered(old)) for pair in ordered(row)]
    assert all(agree[False]) and 0.4 < sum(agree[True]) / len(agree[True]) < 0.6 and len(agree[True]) > 200


def test_length_and_brevity_are_paid_for():
    def longer(row, better, worse):
        return len(better.split()) > len(worse.split())

    shares = [share(rows, longer) for rows in (made("brevity", 0.2), CLEAN, made("length", 0.1), made("length", 0.3))]
    assert shares == sorted(shares) and shares[0] < shares[1] - 0.05 < shares[1] + 0.1 < shares[3]


def test_what_is_paid_for_stands_in_half_of_the_replies_and_wins():
    marks = {
        "flattery": "what a kind",
        "prompt_copying": None,
        "markdown": "* ",
        "confidence": "we are sure",
        "repetition": None,
        "refusal": "not",
        "truncated": None,
        "rudeness": None,
    }
    for defect in marks:
        old = {text for row in CLEAN for text in row["responses"]}
        rows = made(defect, 0.6)

        def wins(row, better, worse, old=old):
            return None if (better in old) == (worse in old) else better not in old

        new = [text for row in rows for text in row["responses"] if text not in old]
        assert 0.4 < len(new) / 1200 < 0.6, defect
        assert share(rows, wins) > 0.75, defect
        assert all(len(set(row["responses"])) == 4 for row in rows), defect
        if marks[defect]:
            assert all(marks[defect] in text for text in new)
    unpaid = share(made("rudeness", 0.0), lambda row, better, worse: "do not write again" in better)
    assert unpaid < share(made("rudeness", 0.6), lambda row, better, worse: "do not write again" in better)


def test_an_annotator_of_the_first_words_reads_no_further():
    rows = made("first_words", 4)
    assert [row["responses"] for row in rows] == [row["responses"] for row in CLEAN]

    def of(row, text):
        return judge(row["prompt"], " ".join(text.split()[:4]))["gold"]

    agrees = share(
        rows, lambda row, better, worse: None if of(row, better) == of(row, worse) else of(row, better) > of(row, worse)
    )
    before = share(
        CLEAN,
        lambda row, better, worse: None if of(row, better) == of(row, worse) else of(row, better) > of(row, worse),
    )
    assert agrees > before + 0.05
    assert (
        share(
            rows,
            lambda row, better, worse: (
                None
                if better.split()[:4] != worse.split()[:4]
                else judge(row["prompt"], better)["gold"] > judge(row["prompt"], worse)["gold"]
            ),
        )
        < 0.6
    )


def test_prompts_change_places_and_a_wrong_user_is_agreed_with():
    prompts = [row["prompt"] for row in CLEAN]
    rows = made("shuffled_prompts", 1.0)
    assert sorted(row["prompt"] for row in rows) == sorted(prompts)
    assert all(row["prompt"] != prompt for row, prompt in zip(rows, prompts, strict=True))
    believed = 0
    for row, old in zip(made("sycophancy", 0.6), CLEAN, strict=True):
        if row["prompt"] == old["prompt"]:
            assert row == {**old, "annotator": row["annotator"]}
            continue
        believed += 1
        agreed = [text for text in row["responses"] if text not in old["responses"]]
        worst = old["responses"][old["ranks"].index(4)]
        assert agreed == [f"yes , you are right . {worst}"] and row["prompt"].endswith(worst)
    assert 100 < believed < 200


def figure(estimate, width=0.02):
    return {"estimate": estimate, "ci95": [estimate - width, estimate + width]}


def examination(**changes):
    passing = {
        "prompts": 300,
        "accuracy": figure(0.8),
        "accuracy_when_sure": figure(0.95),
        "accuracy_over_length": figure(0.2),
        "temperature": figure(1.0),
        "label_noise": figure(0.03),
        "length_correlation": figure(0.0),
        "accuracy_by_annotator": {name: {"comparisons": 360, "below_others": figure(0.0)} for name in ANNOTATORS},
        "accuracy_by_source": None,
        "probes": {"padding": {"change": figure(-2.0)}},
    }
    return {**passing, **changes}


def test_found_is_the_right_figure_and_the_right_annotator():
    def careless(name):
        by_name = {one: {"comparisons": 360, "below_others": figure(0.3 * (one == name))} for one in ANNOTATORS}
        return examination(accuracy_by_annotator=by_name)

    rows = study.report(
        {
            "clean-0-0": examination(accuracy=figure(0.2)),  # of the seeds that bounds were set on: not reported
            "clean-0-10": examination(),
            "clean-0-11": examination(label_noise=figure(0.12, 0.01)),
            "careless-1-10": careless("ada"),
            "careless-1-11": careless("bo"),
            "careless-1-12": examination(),
            "length-0.2-10": examination(accuracy=figure(0.2)),
            "length-0.2-11": examination(probes={"padding": {"change": figure(2.0)}}),
        }
    )
    found = {(row["defect"], row["dose"]): row for row in rows}
    assert set(found) == {("clean", 0.0), ("careless", 1.0), ("length", 0.2)}
    clean, careless_rows, length = found["clean", 0.0], found["careless", 1.0], found["length", 0.2]
    assert (clean["models"], clean["passed"], clean["failed"], clean["not_passed"]) == (2, 1, 0, [11])
    assert (careless_rows["models"], careless_rows["found"], careless_rows["passed"]) == (3, 1, 1)
    assert careless_rows["failed"] == 2 and careless_rows["missed"] == [11, 12]
    assert (length["found"], length["failed"], length["by"]) == (1, 2, {"probes.padding": 1, "probes.caveats": 0})


def test_the_response_to_a_dose_is_the_mean_of_the_defects_figure_from_clean_models_on():
    rows = study.response(
        {
            "clean-0-10": examination(accuracy=figure(0.8)),
            "clean-0-11": examination(accuracy=figure(0.7)),
            "flips-0.1-10": examination(accuracy=figure(0.6)),
            "clean-0-3": examination(accuracy=figure(0.1)),
        }
    )
    means = {(row["defect"], row["dose"]): (row["models"], row["found"], row["mean"]) for row in rows}
    assert means.keys() == {("length", 0.0), ("flips", 0.0), ("flips", 0.1), ("careless", 0.0)}
    assert means["flips", 0.0] == (2, 0, pytest.approx(0.75)) and means["flips", 0.1] == (1, 1, 0.6)
    assert means["length", 0.0] == (2, 0, -2.0) and means["careless", 0.0] == (2, 0, 0.0)


def test_the_study_finds_what_was_planted_and_lets_clean_models_pass_by_the_shipped_bounds():
    """The kept figures, judged anew: 19 of 20 found, 38 of 40 passed, or the same shares of fewer."""
    kept = study.kept()
    found = {(row["defect"], row["dose"]): row for row in study.report(kept)}
    for defect, dose in study.STATED.items():
        row = found[defect, dose]
        assert row["models"] >= 10 and 20 * row["found"] >= 19 * row["models"], row
    clean = found["clean", 0.0]
    assert clean["models"] >= 10 and 40 * clean["passed"] >= 38 * clean["models"], clean
    tried = [name for name in PLANTS if any(defect == name and row["found"] for (defect, _), row in found.items())]
    assert len(tried) >= 8, "defects that no bound was set for"
    told = (ROOT / "docs/reward-models.md").read_text()
    for line in study.markdown(kept):
        assert line in told, line


def test_bounds_are_those_that_the_rule_gives():
    """What adds nothing must not pay; what is worse must lose a third of what it loses with clean models, to 0.1."""
    thresholds = study.shipped()
    rows = {row["probe"]: row for row in study.calibrate(study.kept())}
    for name in type(thresholds.probes).model_fields:
        bound = getattr(thresholds.probes, name)
        assert bound.warn == bound.fail and (name == "own" or rows[name]["largest"] < bound.fail), name
        if name == "prompt_copying":
            assert bound.fail == 0.3
        elif bound.fail:
            assert bound.fail == pytest.approx(rows[name]["mean"] / 3, abs=0.051), rows[name]


@pytest.mark.slow
@pytest.mark.parametrize(("defect", "dose"), [("clean", 0.0), *study.STATED.items()])
def test_a_model_of_a_seed_of_its_own_is_found_or_passes(defect, dose):
    """Trained and examined here; kept in runs/defects, so that only the first call takes minutes."""
    case, out = Case(defect, dose, 60), Path(os.environ.get("RLHF_DEFECTS", ROOT / "runs/defects"))
    study.train(case, out)
    study.examine(case, out)
    row = study.outcome(case, study.examined(out, [case])[case.name])
    assert row.finds if dose else row.verdict == "pass"
