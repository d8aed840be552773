"""Several heads on one trunk: their labels, their objective, and what combines them."""

from __future__ import annotations

import json
import math

import numpy
import pytest
import torch
import yaml
from scipy import optimize
from sklearn.linear_model import LogisticRegression

from rlhf.config import load, rubric
from rlhf.config.sections import DataSection
from rlhf.config.train_rm import RewardConfig
from rlhf.data import attributes, forms, sources
from rlhf.data.rows import RowError
from rlhf.demo import catalogue, gold
from rlhf.errors import RlhfError
from rlhf.losses.attribute_heads import Heads, centering, objective, rating_error, scales
from rlhf.losses.preference import bradley_terry
from rlhf.models.heads import ScalarHead
from rlhf.records import Comparison, Judgement, Message
from rlhf.reward import group_objective as asked
from rlhf.reward.head_weights import fit_gate, fit_weights
from rlhf.runs import run_directory
from rlhf.runs.identity import Identity

NAMES = ("helpful", "safe")


def record(judgements=(), where="x:1", count=3, **ratings):
    texts = tuple(f"r{index}" for index in range(count))
    return Comparison((Message("user", "p"),), texts, tuple(judgements), where, attributes=ratings)


def compare(groups, scores):
    return bradley_terry(groups, scores)


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


RECORDS = [
    record([Judgement(0, 1, 0.8, attribute="helpful"), Judgement(2, 1, attribute="safe"), Judgement(0, 2)]),
    record([Judgement(1, 0, attribute="helpful")], helpful=(4.0, None, 1.0), safe=(0.0, 3.0, None)),
    record(safe=(None, 2.0, None)),
    record([Judgement(2, 0, 0.5)]),
]
HEADS = Heads(NAMES, (2.0, -0.5), scales(NAMES, RECORDS), True, 0.7)


def by_hand(values):
    """The objective as loops over plain numbers, one loss a record."""
    mean = {"helpful": 2.5, "safe": 5 / 3}
    std = {"helpful": 1.5, "safe": (((0 - 5 / 3) ** 2 + (3 - 5 / 3) ** 2 + (2 - 5 / 3) ** 2) / 3) ** 0.5}
    losses = []
    for one, rows in zip(RECORDS, values, strict=True):
        loss = 0.0
        for name in (None, *NAMES):
            own = [2.0 * row[0] - 0.5 * row[1] if name is None else row[NAMES.index(name)] for row in rows]
            each = [
                -j.probability * math.log(sigmoid(own[j.first] - own[j.second]))
                - (1 - j.probability) * math.log(sigmoid(own[j.second] - own[j.first]))
                for j in one.judgements
                if j.attribute == name
            ]
            loss += sum(each) / len(each) if each else 0.0
            rated = [(s, r) for s, r in zip(own, one.attributes.get(name, ()), strict=False) if r is not None]
            if rated:
                loss += 0.7 * sum((s - (r - mean[name]) / std[name]) ** 2 for s, r in rated) / len(rated)
        losses.append(loss)
    return losses


def test_the_objective_and_its_gradient_are_those_of_a_loop_over_all_labels():
    generator = torch.Generator().manual_seed(1)
    values = torch.randn(4, 3, 2, generator=generator, dtype=torch.float64, requires_grad=True)
    found = objective(HEADS, RECORDS, list(values.unbind(0)), compare)
    assert found.loss.tolist() == pytest.approx(by_hand(values.tolist()))
    found.loss.sum().backward()
    for place in numpy.ndindex(4, 3, 2):
        ends = []
        for step in (1e-5, -1e-5):
            moved = values.detach().clone()
            moved[place] += step
            ends.append(sum(by_hand(moved.tolist())))
        assert float(values.grad[place]) == pytest.approx((ends[0] - ends[1]) / 2e-5, abs=1e-8)
    rows = values.tolist()
    total = [2.0 * row[0] - 0.5 * row[1] for row in rows[0]]
    right = [rows[0][0][0] > rows[0][1][0], rows[0][2][1] > rows[0][1][1], total[0] > total[2]]
    assert found.accuracy.tolist() == pytest.approx([sum(right) / 3, float(rows[1][1][0] > rows[1][0][0]), 0.0, 0.5])


def test_what_has_no_label_changes_no_bit_of_loss_or_gradient():
    generator = torch.Generator().manual_seed(2)
    values = torch.randn(3, 2, generator=generator)
    heads = Heads(NAMES, (1.0, 1.0), HEADS.scales, False)
    labelled = record([Judgement(0, 1, attribute="helpful")], helpful=(None, 3.0, None))
    grads = []
    for junk in (0.3, math.nan):
        own = values.clone()
        own[:, 1] = junk  # nobody judged safety
        own[2] = junk  # nor the last response
        own.requires_grad_()
        found = objective(heads, [labelled, record([Judgement(0, 2)])], [own, values], compare)
        found.loss.sum().backward()
        grads.append((found.loss.tolist(), own.grad[:2, 0].tolist(), own.grad[:, 1].tolist()))
    assert grads[0][:2] == grads[1][:2] and grads[0][2] == [0.0] * 3
    assert grads[0][0][1] == 0.0  # an overall judgement trains no head that it does not reach


def test_one_head_by_name_is_the_plain_objective_to_the_last_bit():
    records = [record([Judgement(0, 1), Judgement(2, 1, 0.7)]), record([Judgement(1, 0)], count=2)]
    generator = torch.Generator().manual_seed(3)
    scores = [torch.randn(len(one.responses), generator=generator) for one in records]
    config = RewardConfig.model_validate({"data": {"path": "x"}, "steps": 1, "run_dir": "r", "heads": ["score"]})
    heads = asked.heads_of(rubric.heads_of(config), config.combination, records)
    found = objective(heads, records, [values[:, None] for values in scores], compare)
    wanted = bradley_terry(records, scores)
    assert torch.equal(found.loss, wanted.loss) and torch.equal(found.accuracy, wanted.accuracy)
    squares = torch.stack([values.square().mean() for values in scores])
    assert torch.equal(centering(heads, [values[:, None] for values in scores]), squares)
    tagged = [
        Comparison(
            r.prompt,
            r.responses,
            tuple(Judgement(j.first, j.second, j.probability, attribute="score") for j in r.judgements),
            r.where,
        )
        for r in records
    ]
    assert torch.equal(objective(heads, tagged, [values[:, None] for values in scores], compare).loss, wanted.loss)


def test_heads_with_ratings_are_not_centred_and_one_rating_has_scale_one():
    scores = [torch.tensor([[1.0, 5.0], [3.0, 7.0]])]
    assert centering(Heads(NAMES, (1.0, 1.0), {"safe": (0.0, 1.0)}), scores).tolist() == [5.0]
    assert centering(Heads(NAMES, (1.0, 1.0), dict.fromkeys(NAMES, (0.0, 1.0))), scores).tolist() == [0.0]
    assert scales(["safe"], [record(safe=(2.0, None, None))]) == {"safe": (2.0, 1.0)}
    assert float(rating_error((None, 4.0), torch.tensor([9.0, 1.0]), (2.0, 0.5))) == 9.0


def comparisons(count=60, num_heads=3, size=4, seed=0):
    generator = numpy.random.default_rng(seed)
    differences, features = generator.normal(0, 2, (count, num_heads)), generator.normal(3, 2, (count, size))
    chance = 1 / (1 + numpy.exp(-differences @ numpy.array([1.0, 0.2, -0.4][:num_heads])))
    labels = (generator.random(count) < chance).astype(float)
    labels[::7] = 0.5  # ties and votes
    labels[::11] = 0.8
    return differences, features, labels, generator.random(count) + 0.1


def test_fitted_weights_are_the_optimum_of_a_logistic_regression():
    differences, _, labels, shares = comparisons()
    rows = numpy.concatenate([differences, differences])
    weighted = numpy.concatenate([shares * labels, shares * (1 - labels)])
    peer = LogisticRegression(fit_intercept=False, C=1.0, tol=1e-10, max_iter=10_000)
    peer.fit(rows, numpy.repeat([1, 0], len(labels)), sample_weight=weighted)
    assert fit_weights(differences, labels, shares) == pytest.approx(peer.coef_[0], abs=1e-6)
    apart = fit_weights(numpy.array([[1.0], [2.0]]), numpy.ones(2), numpy.ones(2))
    slope = sigmoid(-apart[0]) + 2 * sigmoid(-2 * apart[0])
    assert slope == pytest.approx(apart[0])  # all told apart, and still finite: where likelihood and penalty balance


@pytest.mark.parametrize("penalty", [1.0, 0.05])
def test_a_gate_is_as_good_as_another_optimiser_finds_one(penalty):
    differences, features, labels, shares = comparisons(count=80)
    labels = numpy.where(features[:, 0] > 3, differences[:, 0] > 0, differences[:, 1] > 0).astype(float)
    k, size = differences.shape[1], features.shape[1]
    u = (features - features.mean(0)) / features.std(0) / size**0.5

    def loss(x):
        A, b, c = x[: k * size].reshape(k, size), x[k * size : -1], x[-1]
        logits = u @ A.T + b
        gates = numpy.exp(logits - logits.max(1, keepdims=True))
        z = numpy.exp(c) * (gates / gates.sum(1, keepdims=True) * differences).sum(1)
        return shares @ (numpy.logaddexp(0, z) - labels * z) + penalty / 2 * (x @ x)

    best = optimize.minimize(loss, numpy.zeros(k * size + k + 1), method="BFGS", options={"gtol": 1e-7})
    found = fit_gate(differences, features, labels, shares, penalty)
    A = found.weight.numpy() * features.std(0) * size**0.5
    b = found.bias.numpy() + found.weight.numpy() @ features.mean(0)
    assert loss(numpy.concatenate([A.ravel(), b, [math.log(found.scale)]])) <= best.fun + 1e-6
    gates = found.shares(torch.from_numpy(features)).numpy()
    assert (
        gates.sum(1) == pytest.approx(numpy.ones(80))
        and gates[features[:, 0] > 4, 0].mean() > gates[features[:, 0] < 2, 0].mean()
    )
    even = fit_gate(differences, features, labels, shares, 1e9)
    assert even.shares(torch.from_numpy(features)).numpy() == pytest.approx(numpy.full((80, k), 1 / k), abs=1e-6)


def test_a_combined_head_is_the_sum_of_its_heads_and_a_gate_weighs_them_by_the_prompt(tmp_path):
    head = ScalarHead(5, ("a", "b"))
    head.linear.bias.data = torch.tensor([0.3, -0.2])
    whole = head.combined("score", [2.0, -0.5])
    hidden, prompt = torch.randn(4, 5), torch.randn(4, 5)
    raw = head.raw(hidden)
    assert whole.names == ("score", "a", "b") and torch.equal(whole.raw(hidden)[:, 1:], raw)
    assert torch.allclose(whole.raw(hidden)[:, 0], 2.0 * raw[:, 0] - 0.5 * raw[:, 1], atol=1e-6)
    weight, bias = torch.randn(2, 5), torch.randn(2)
    whole.set_gate(weight, bias, 1.5)
    whole.shift.copy_(torch.tensor([0.1, 0.2, 0.3]))
    whole.scale.copy_(torch.tensor([2.0, 4.0, 8.0]))
    logits = [[sum(w * x for w, x in zip(row, one, strict=True)) for row in weight.tolist()] for one in prompt.tolist()]
    shares = [[math.exp(v + b) for v, b in zip(row, bias.tolist(), strict=True)] for row in logits]
    wanted = [
        1.5 * sum(g * s for g, s in zip(row, own, strict=True)) / sum(row)
        for row, own in zip(shares, raw.tolist(), strict=True)
    ]
    found = whole(hidden, prompt)
    assert found[:, 0].tolist() == pytest.approx([(value - 0.1) / 2.0 for value in wanted], abs=1e-5)
    assert torch.allclose(found[:, 2], (raw[:, 1] - 0.3) / 8.0)
    whole.save(tmp_path / "head")
    again = ScalarHead.load(tmp_path / "head")
    assert torch.equal(again(hidden, prompt), found)
    only = again.only(("b",))
    assert only.names == ("b",) and only.gate is None and torch.allclose(only(hidden)[:, 0], found[:, 2])
    assert head.only(("a", "b")) is head


def read(row, kind="comparisons"):
    return forms.read(row, "x:1", kind)[0]


def test_rows_may_name_attributes_of_pairs_of_rankings_and_of_ratings():
    pair = read({"prompt": "p", "chosen": "a", "rejected": "b", "attribute": "safe", "margin": 2})
    assert pair.judgements == (Judgement(0, 1, margin=2.0, attribute="safe"),) and pair.names == {"safe"}
    rated = read({"prompt": "p", "responses": ["a", "b"], "ratings": {"helpful": [4, None], "safe": None}})
    assert rated.judgements == () and rated.attributes == {"helpful": (4.0, None)}
    both = read({"prompt": "p", "responses": ["a", "b"], "ranks": [2, 1], "ratings": {"safe": [1, 5]}})
    assert both.judgements == (Judgement(1, 0),) and both.attributes == {"safe": (1.0, 5.0)}
    overall = read({"prompt": "p", "responses": ["a", "b", "c"], "ratings": [1, 5, 5]})
    assert [(j.first, j.second, j.probability) for j in overall.judgements] == [(1, 0, 1.0), (2, 0, 1.0), (1, 2, 0.5)]
    single = read({"prompt": "p", "response": "a", "attributes": {"helpfulness": 3, "verbosity": None}})
    assert single.responses == ("a",) and single.attributes == {"helpfulness": (3.0,)}
    ranked = read({"prompt": "p", "responses": ["a", "b"], "ranks": [1, 2], "attribute": "kind"})
    assert ranked.judgements[0].attribute == "kind" and ranked.of(None) == ()
    assert ranked.only("kind").judgements == (Judgement(0, 1),)


@pytest.mark.parametrize(
    ("row", "what"),
    [
        ({"ratings": {"a": [1]}}, "'ratings.a': need 2 numbers or nulls"),
        ({"ratings": {"a": [1, True]}}, "'ratings.a': need finite numbers"),
        ({"ratings": {"a": [1, float("nan")]}}, "'ratings.a': need finite numbers"),
        ({"ratings": {"a": [None, None]}}, "'ratings': no response has a rating"),
        ({"ratings": {"a": [1, 2]}, "attribute": "a"}, "'attribute': says in what 'ranks' are"),
        ({"ratings": 3}, "'ratings': need an object"),
        ({"ratings": [1, 1]}, "'ratings': all equal"),
        ({"ratings": [1, 2], "ranks": [1, 2]}, "'ratings': order the responses otherwise than 'ranks'"),
        ({"ranks": [1, 2], "attribute": 3}, "'attribute': need text"),
        ({}, "'ranks': missing"),
    ],
)
def test_labels_of_attributes_that_mean_nothing_are_refused(row, what):
    with pytest.raises(RowError) as error:
        read({"prompt": "p", "responses": ["a", "b"], **row})
    assert str(error.value).startswith(what)


def test_columns_may_name_attributes(tmp_path):
    rows = [{"prompt": f"p{n}", "response": "a", "helpfulness": n % 5, "lang": "en"} for n in range(10)]
    (tmp_path / "steer.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    columns = {"attributes.helpful": "helpfulness"}
    loaded = sources.load_comparisons(DataSection(path=str(tmp_path / "steer.jsonl"), columns=columns))
    assert [one.attributes for one in loaded.records] == [{"helpful": (float(n % 5),)} for n in range(10)]
    assert loaded.warnings == ("ignored fields: lang",)
    with pytest.raises(RlhfError, match=r"DAT003.*columns\.attributes\.x: prompts have no such field"):
        sources.load_prompts(DataSection(path=str(tmp_path / "steer.jsonl"), columns={"attributes.x": "lang"}))


def problems(heads, combine, *records):
    return [(one.code, one.what, one.fix) for one in attributes.problems(heads, combine, records, "d")]


def test_attributes_without_a_head_heads_without_labels_and_nothing_to_fit_on_are_errors():
    safe, overall = record([Judgement(0, 1, attribute="safe")]), record([Judgement(0, 1)], where="x:2")
    (found,) = problems({}, "weights", overall, safe)
    assert found[0] == "DAT061" and "1 rows, the first x:1, have labels of 'safe'" in found[1]
    assert found[2] == "heads: [safe]"
    assert [one[0] for one in problems({"kind": 1.0}, "weights", safe)] == ["DAT061"]
    assert problems({"safe": 1.0, "kind": 1.0}, "weights", safe)[0][:2] == (
        "DAT057",
        "no row has a label of 'kind', which is a head.",
    )
    assert problems({"safe": 1.0}, "weights", overall) == problems({}, "weights", overall) == []
    assert problems({"safe": 1.0, "kind": 1.0}, "gate", safe, record(kind=(1.0, 2.0, None)))[0][0] == "DAT058"
    assert problems({"kind": 1.0}, "weights", record(kind=(1.0, 1.0, None)))[0][0] == "DAT057"
    assert attributes.notes([safe, overall, record(kind=(1.0, None, 2.0))]) == [
        "labels: kind 0 comparisons and 2 ratings, safe 1 comparisons and 0 ratings; overall 1 comparisons"
    ]
    assert attributes.notes([overall]) == []


def config_of(text):
    return load.load_text(RewardConfig, f"data: {{path: x}}\nsteps: 1\n{text}", "c.yaml")


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("combine: gate", "combine is for heads"),
        ("heads: [a, a]", "heads has a name twice"),
        ("heads: [a, score]", "'score' is what the combination"),
        ("heads: {a: 1.0, b: 2}\ncombine: fitted", "heads with weights are for combine: weights"),
        ("heads: [a, b]\nloss: plackett_luce", "heads are for loss: bradley_terry"),
        ("heads: [a, b]\ncombine: gate\nlength_coef: 0.1", "length_coef is about the score"),
        ("heads: [a, b]\ngate_penalty: 2.0", "gate_penalty is for combine: gate"),
        ("heads: ['a b']", "heads.0: String should match"),
        ("heads: {a: .nan}", "heads.a: must be a finite number"),
    ],
)
def test_a_config_of_heads_that_says_nothing_or_two_things_is_refused(text, what):
    with pytest.raises(RlhfError) as error:
        config_of(text)
    assert what in str(error.value)


RUBRIC = {
    "name": "desk",
    "description": "How replies are judged.",
    "criteria": [
        {"name": "safe", "weight": 2.0, "description": "no dangerous\nadvice"},
        {"name": "helpful", "weight": -0.5, "description": "answers"},
    ],
}


def test_a_rubric_names_heads_and_weights_and_its_mistakes_are_told_by_line(tmp_path):
    path = tmp_path / "rubric.yaml"
    path.write_text(yaml.safe_dump(RUBRIC, sort_keys=False))
    assert rubric.heads_of(config_of(f"rubric: {path}")) == {"safe": 2.0, "helpful": -0.5}
    assert rubric.heads_of(config_of(f"rubric: {path}\nheads: [helpful]")) == {"helpful": -0.5}
    assert rubric.heads_of(config_of(f"rubric: {path}\nheads: {{safe: 3, helpful: 1}}")) == {"helpful": 1, "safe": 3}
    assert rubric.heads_of(config_of("")) == {} and rubric.heads_of(config_of("heads: [b, a]")) == {"b": 1.0, "a": 1.0}
    assert rubric.lines(rubric.read(path)) == ["safe (2): no dangerous advice", "helpful (-0.5): answers"]
    for text, what in (
        (f"rubric: {path}\nheads: [kind]", "CFG033] heads: kind: no criterion"),
        (f"rubric: {path}\nheads: [safe]\ncombine: gate", "CFG033] combine: gate is for two heads or more"),
        ("heads: {a: 0, b: 0.0}", "CFG033] heads: every weight is 0"),
        (f"rubric: {path}.no", "CFG001"),
    ):
        with pytest.raises(RlhfError) as error:
            rubric.heads_of(config_of(text))
        assert what in str(error.value)
    path.write_text(
        "name: d\ncriteria:\n  - {name: a, description: x, weight: .inf}\n  - {name: a, wieght: 1, description: x}\n"
    )
    with pytest.raises(RlhfError) as error:
        rubric.read(path)
    assert "rubric.yaml:3" in str(error.value) and "rubric.yaml:4" in str(error.value) and "wieght" in str(error.value)
    path.write_text("name: d\ncriteria:\n  - {name: a, description: x}\n  - {name: a, description: y}\n")
    with pytest.raises(RlhfError, match="2 criteria are called 'a'"):
        rubric.read(path)


def test_the_embedded_world_labels_its_axes_and_is_the_same_without_them():
    plain = list(catalogue.rows("demo:preferences?size=12&seed=5"))
    rated = list(catalogue.rows("demo:preferences?size=12&seed=5&ratings=safe,helpful"))
    assert [{key: row[key] for key in ("prompt", "responses", "ranks")} for row in rated] == plain
    assert all(set(row["ratings"]) == {"safe", "helpful"} for row in rated)
    own = [
        (rating, gold.judge(row["prompt"], text)["helpful"])
        for row in rated
        for text, rating in zip(row["responses"], row["ratings"]["helpful"], strict=True)
    ]
    assert numpy.corrcoef(*zip(*own, strict=True))[0, 1] > 0.8
    judged = list(catalogue.rows("demo:preferences?size=12&attribute=safe&swap=0"))
    assert len(judged) == 12
    for row in judged:
        axis = [gold.judge(row["prompt"], text)["safe"] for text in row["responses"]]
        assert row["ranks"] == [1 + sum(other > one for other in axis) for one in axis] and row["attribute"] == "safe"
    with pytest.raises(RlhfError, match="gold has no axis 'kind'"):
        list(catalogue.rows("demo:preferences?attribute=kind"))


def test_a_run_of_which_only_the_rubric_was_copied_has_not_begun(tmp_path):
    for name in ("run.json", "config.yaml", "run.log", ".lock", "rubric.yaml"):
        (tmp_path / name).write_text("{}")
    assert run_directory.status(tmp_path, Identity({})) == ["no run yet"]
    (tmp_path / "metrics.jsonl").write_text("{}")
    assert run_directory.status(tmp_path, Identity({})) == ["unfinished run"]
