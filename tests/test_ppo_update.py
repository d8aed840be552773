"""Experience and update on a tiny model: what the batch holds, and that batching changes no gradient."""

from __future__ import annotations

import random
import statistics
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from tiny import base, lora, shake

from rlhf.algorithms.algorithm import algorithm_of
from rlhf.config.stages import PpoConfig
from rlhf.data.batches import PassSize
from rlhf.data.tokenised import PromptRow
from rlhf.evaluation.policy_samples import SampledPolicy, sampling_of
from rlhf.losses import tensors
from rlhf.models import forward, packing
from rlhf.models.base import weights_checksum
from rlhf.models.heads import ScalarHead
from rlhf.models.roles import SharedBase
from rlhf.records import Message
from rlhf.rollouts.engine import Rollout
from rlhf.rollouts.hf import HfEngine
from rlhf.runs import runtime
from rlhf.scoring.function import FunctionScorer
from rlhf.training import loop as trainings
from rlhf.training import policy_update as updates
from rlhf.training import solved_critic, trained_critic
from rlhf.training.collector import Collector, CollectorSettings
from rlhf.training.experience import Passes
from rlhf.training.optimizer import Optimizer
from rlhf.training.policy_update import PolicySettings, PolicyUpdate
from rlhf.training.solved_critic import LeastSquares
from rlhf.training.trained_critic import ValueRole, ValueSettings


def lengths(prompts, responses):
    return [float(len(response)) for response in responses]


def config(**changes):
    values = {
        "prompts": {"path": "demo:prompts"},
        "sampling": {"max_new_tokens": 7, "concurrency": 3},
        "rewards": [{"function": f"{__name__}:lengths"}],
        "batch": {"batch_size": 6, "minibatch_size": 3, "micro_batch_size": 2},
        "missing_eos": {"score": -2.5},
    }
    return PpoConfig.model_validate({**values, **changes})


def passes_of(chosen, opened):
    size = PassSize(chosen.batch.micro_batch_size, chosen.batch.micro_batch_tokens)
    return Passes(size, opened.chat.pad_id, opened.device)


def critic_of(chosen, roles, opened, rate=1e-3):
    optimizer = Optimizer(roles.trained_parameters("value"), rate, 100)
    update = chosen.update
    settings = ValueSettings(update.epochs, chosen.batch.minibatch_size, update.value_clip_range)
    return ValueRole(roles, optimizer, passes_of(chosen, opened), settings)


def policy_of(chosen, roles, opened, rate=1e-3):
    optimizer = Optimizer(roles.trained_parameters("policy"), rate, 100)
    settings = PolicySettings(
        chosen.update, chosen.batch.minibatch_size, chosen.sampling.temperature, chosen.kl.place == "loss"
    )
    return PolicyUpdate(roles, optimizer, algorithm_of(chosen.update), passes_of(chosen, opened), settings)


def collector_of(chosen, roles, opened, critic, seed=3, engine=None):
    engine = engine or HfEngine(roles, "policy", opened.chat, chosen.sampling.concurrency)
    return Collector(
        SampledPolicy(roles, engine, opened.chat, passes_of(chosen, opened).size),
        FunctionScorer(f"{__name__}:lengths"),
        critic,
        algorithm_of(chosen.update),
        CollectorSettings(
            sampling_of(chosen.sampling, seed),
            chosen.missing_eos,
            chosen.kl,
            chosen.update,
            chosen.samples_per_prompt,
            chosen.reads_reference(),
        ),
    )


@pytest.fixture
def world(tmp_path):
    opened = base(tmp_path / "m", double=True)
    roles = SharedBase(opened)
    for seed, name in enumerate(("policy", "reference", "value")):
        head = ScalarHead(32).double() if name == "value" else None
        roles.add(name, adapter=lora(opened), head=head, trained=name != "reference")
        shake(roles, name, seed, size=0.1)
    roles.peft("policy")
    prompts = [PromptRow((Message("user", "p" * n),), [70 + n] * (n + 1)) for n in (3, 0, 5, 1, 4, 2)]

    def collect(chosen, coef=0.1, critic=None, seed=3, engine=None):
        critic = critic or critic_of(chosen, roles, opened)
        return collector_of(chosen, roles, opened, critic, seed, engine).collect(prompts, 0, coef)

    return opened, roles, collect


def test_a_batch_holds_scores_penalties_and_rewards_in_their_places(world):
    _, _, collect = world
    batch = collect(config())
    last = batch.mask.sum(1) - 1
    for row, sample in enumerate(batch.samples):
        wanted = float(len(sample.response)) if sample.finished else -2.5
        assert float(batch.scores[row]) == wanted
        kl = (batch.old_logprobs - batch.ref_logprobs)[row]
        for t in range(int(last[row]) + 1):
            extra = wanted if t == last[row] else 0.0
            assert float(batch.rewards[row, t]) == pytest.approx(-0.1 * float(kl[t]) + extra, abs=1e-6)
        assert (batch.rewards[row, last[row] + 1 :] == 0).all() and (batch.old_values[row, last[row] + 1 :] == 0).all()
    assert any(not sample.finished for sample in batch.samples)
    assert batch.metrics["rollout/end_token_rate"] < 1


@pytest.mark.parametrize("place", ["reward", "loss"])
def test_the_explained_variance_is_of_real_outcomes_by_thirds_and_does_not_depend_on_lambda(world, place):
    """With responses of one token and cut-off ones; the outcomes by a loop over scores, penalties and gamma."""
    opened, _, collect = world
    end = opened.chat.end_id
    tokens = [[end], [80, 81, 82, end], [80, 81, 82, 83, 84, 85, end], [80, end], [90] * 7, [90, 91, end]]
    engine = SimpleNamespace(generate=lambda *_: Rollout(tokens, [row[-1] == end for row in tokens]))
    update = {"gamma": 0.9, "lam": 0.3, "normalise_advantages": place == "reward"}
    name, found = "rollout/explained_variance", []
    for value_lam in (0.2, 1.0):
        chosen = config(update={**update, "value_lam": value_lam}, kl={"place": place})
        batch = collect(chosen, 0.5, engine=engine)
        found.append({key: value for key, value in batch.metrics.items() if key.startswith(name)})
    parts = {"": [], "_first_third": [], "_middle_third": [], "_last_third": []}
    for row, ids in enumerate(tokens):
        kl = (batch.old_logprobs - batch.ref_logprobs)[row].tolist()
        rewards = [-0.5 * nats if place == "reward" else 0.0 for nats in kl[: len(ids)]]
        rewards[-1] += float(len(batch.samples[row].response)) if ids[-1] == end else -2.5
        for t in range(len(ids)):
            outcome = sum(0.9 ** (k - t) * rewards[k] for k in range(t, len(ids)))
            third = ("_first_third", "_middle_third", "_last_third")[int(t / len(ids) * 3)]
            for part in ("", third):
                parts[part].append((outcome, outcome - float(batch.old_values[row, t])))
    variances = {
        part: [statistics.pvariance(column) for column in zip(*rows, strict=True)] for part, rows in parts.items()
    }
    wanted = {f"{name}{part}": 1 - wrong / spread for part, (spread, wrong) in variances.items()}
    assert found[0] == found[1] == pytest.approx(wanted, abs=1e-5)


def test_the_first_minibatch_has_ratio_one_and_nothing_clipped(world):
    opened, roles, collect = world
    chosen = config()
    batch = collect(chosen)
    policy = policy_of(chosen, roles, opened)
    figures = policy.accumulate(batch, policy.prepare(batch), [0, 1, 2], 0.1)
    assert figures["ratio"] == pytest.approx(1, abs=1e-6)
    assert figures["approx_kl"] == pytest.approx(0, abs=1e-10) and figures["clip_fraction"] == 0


@pytest.mark.parametrize("place", ["reward", "loss"])
def test_micro_batches_packing_and_checkpointing_change_no_gradient(world, place):
    opened, roles, collect = world
    found = []
    assert packing.packs(opened.model)
    for size, tokens, packs in ((6, None, False), (6, None, True), (6, 19, True), (1, None, True), (2, 24, True)):
        batch_section = {"batch_size": 6, "minibatch_size": 6, "micro_batch_size": size, "micro_batch_tokens": tokens}
        changes = {"batch": batch_section, "kl": {"place": place}}
        opened.model.packs_rows = packs
        changes["update"] = {"normalise_advantages": place == "reward", "entropy_coef": 0.01}
        chosen = config(**changes)
        batch = collect(chosen) if not found else batch  # noqa: F821
        if size == 2:
            roles.enable_gradient_checkpointing()
        policy = policy_of(chosen, roles, opened)
        policy.accumulate(batch, policy.prepare(batch), list(range(6)), 0.1)
        found.append(torch.cat([p.grad.flatten().clone() for p in roles.trained_parameters("policy")]))
        for parameter in roles.trained_parameters("policy"):
            parameter.grad = None
    assert found[0].abs().max() > 1e-3
    for other in found[1:]:
        assert torch.allclose(found[0], other, atol=1e-10)


@pytest.mark.parametrize("micro", [1, 2, 3])
def test_an_update_takes_epochs_times_minibatches_steps_whatever_the_accumulation(world, micro):
    opened, roles, collect = world
    chosen = config(batch={"batch_size": 6, "minibatch_size": 2, "micro_batch_size": micro}, update={"epochs": 3})
    policy, critic = policy_of(chosen, roles, opened), critic_of(chosen, roles, opened)
    checksum, reference = weights_checksum(opened.model), roles.state("reference").state_dict()["adapter"]
    batch = collect(chosen)
    figures = policy.learn(batch, 5, 1, 0.1)
    critic.learn(batch, 5, 1)
    assert policy.optimizer.step_count == critic.optimizer.step_count == 9 == figures["update/optimizer_steps"]
    assert weights_checksum(opened.model) == checksum
    after = roles.state("reference").state_dict()["adapter"]
    assert all(torch.equal(reference[key], after[key]) for key in reference)


def test_a_target_for_the_update_kl_ends_the_epochs_before_the_step(world):
    opened, roles, collect = world
    chosen = config(update={"epochs": 5, "target_kl": 1e-6})
    policy = policy_of(chosen, roles, opened, 1e-2)
    figures = policy.learn(collect(chosen), 5, 1, 0.1)
    assert policy.optimizer.step_count == 1 == figures["update/optimizer_steps"]
    assert all(parameter.grad is None for parameter in roles.trained_parameters("policy"))


def test_the_update_raises_what_is_rewarded_and_lowers_the_value_loss(world):
    """Responses scored by length: after updates on one batch, its better half has become likelier than its worse."""
    opened, roles, collect = world
    chosen = config(update={"epochs": 4}, kl={"coef": 0.0})
    batch = collect(chosen, 0.0)
    policy, critic = policy_of(chosen, roles, opened, 3e-3), critic_of(chosen, roles, opened, 3e-3)
    sequences = batch.sequences(range(6), opened.chat.pad_id, opened.device)
    losses = [float(critic.learn(batch, 1, 0)["update/value_loss"]) for _ in range(3)]
    policy.learn(batch, 5, 1, 0.0)
    with torch.no_grad(), roles.acting_as("policy") as (model, _):
        new = forward.response_logprobs(model, sequences, 1.0)
    advantages = policy.prepare(batch)
    assert float(tensors.masked_sum((new - batch.old_logprobs) * advantages, batch.mask)) > 0
    assert losses[2] < losses[0]


def test_the_exact_kl_can_stand_in_the_reward(world):
    _, _, collect = world
    batch = collect(config(kl={"estimator": "exact"}))
    first = float(batch.rewards[0, 0]) if int(batch.mask[0].sum()) > 1 else None
    if first is not None:
        assert first == pytest.approx(-0.1 * float(batch.exact_kl[0, 0]), abs=1e-6)
    assert (batch.exact_kl[batch.mask] > 0).all()


@pytest.mark.parametrize("place", ["reward", "loss"])
def test_without_a_penalty_no_step_runs_the_reference_and_nothing_else_changes(world, monkeypatch, place):
    opened, roles, collect = world
    update = {"normalise_advantages": False}
    chosen = config(kl={"coef": 0.0, "place": place}, value={"fit": "gradient"}, update=update)
    watched = config(
        kl={"coef": 0.0, "place": place}, value={"fit": "gradient"}, update=update, guards={"kl_nats": {"stop": 90.0}}
    )
    assert watched.reads_reference() and not chosen.reads_reference()
    acted, run = [], roles.acting_as
    monkeypatch.setattr(roles, "acting_as", lambda name: acted.append(name) or run(name))
    alone, both, found = collect(chosen, 0.0), None, []
    assert set(acted) == {"policy", "value"}
    both = collect(watched, 0.0)
    assert "reference" in acted
    for name in ("old_logprobs", "entropy", "old_values", "rewards", "advantages", "returns"):
        assert torch.equal(getattr(alone, name), getattr(both, name)), name
    assert alone.ref_logprobs is None and alone.exact_kl is None
    assert set(both.metrics) - set(alone.metrics) == {"rollout/kl_nats", "rollout/exact_kl_nats"}
    for batch in (alone, both):
        policy_of(chosen, roles, opened).accumulate(batch, batch.advantages, [0, 1, 2], 0.0)
        found.append(torch.cat([p.grad.flatten().clone() for p in roles.trained_parameters("policy")]))
        for parameter in roles.trained_parameters("policy"):
            parameter.grad = None
    assert torch.equal(*found) and found[0].abs().max() > 1e-3


@pytest.mark.parametrize(
    ("changes", "wanted"),
    [
        ({}, True),
        ({"kl": {"coef": 0.0}}, True),
        ({"kl": {"coef": 0.0}, "value": {"fit": "gradient"}}, False),
        ({"kl": {"coef": 0.1}, "value": {"fit": "gradient"}}, True),
        ({"kl": {"coef": 0.0, "target": 3.0}, "value": {"fit": "gradient"}}, True),
    ],
)
def test_the_reference_runs_where_something_reads_it(changes, wanted):
    assert config(**changes).reads_reference() is wanted


def test_minibatches_partition_the_batch_and_differ_between_epochs():
    parts = [[int(i) for i in rows] for rows in updates.minibatches(12, 4, seed=1, epoch=0)]
    assert sorted(i for part in parts for i in part) == list(range(12)) and [len(part) for part in parts] == [4, 4, 4]
    assert parts == [[int(i) for i in rows] for rows in updates.minibatches(12, 4, seed=1, epoch=0)]
    assert parts != [[int(i) for i in rows] for rows in updates.minibatches(12, 4, seed=1, epoch=1)]


def test_ridge_is_least_squares_with_rows_for_the_penalty():
    """The same minimum by a solver of its own: the penalty is d more rows, sqrt(penalty) e_i with target 0."""
    x = torch.randn(40, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) + 2
    y = x @ torch.tensor([1.0, -2.0, 0.5, 0.0, 3.0]).double() + 0.3 * x[:, 0] ** 2
    rows = torch.cat([x, y[:, None], torch.ones(40, 1)], 1)
    weight, bias = solved_critic.ridge(rows.t() @ rows, 0.7)
    penalty = 0.7 * float((x - x.mean(0)).square().sum(0).mean())
    more = torch.cat([penalty**0.5 * torch.eye(5), torch.zeros(5, 1)], 1).double()
    stacked = torch.cat([torch.cat([x, torch.ones(40, 1)], 1), more])
    wanted = torch.linalg.lstsq(stacked, torch.cat([y, torch.zeros(5)])[:, None]).solution[:, 0]
    assert torch.allclose(torch.cat([weight, bias[None]]), wanted, atol=1e-10)
    alike = torch.cat([torch.full((40, 5), 2.0), y[:, None], torch.ones(40, 1)], 1).double()
    weight, bias = solved_critic.ridge(alike.t() @ alike, 0.7)
    assert not weight.any() and float(bias) == pytest.approx(float(y.mean()))


def states_alone(opened, roles, role, batch):
    """Hidden state [N, d] before each response token, of every sequence alone; its return and its value, float64."""
    states, figures = [], []
    for row, sample in enumerate(batch.samples):
        ids = torch.tensor([[*sample.prompt_ids, *sample.response_ids]])
        with torch.no_grad(), roles.acting_as(role) as (model, _):
            inner = getattr(model, model.base_model_prefix)
            hidden = inner(input_ids=ids, use_cache=False).last_hidden_state[0]
        for t in range(len(sample.response_ids)):
            states.append(hidden[len(sample.prompt_ids) + t - 1].double())
            figures.append([float(batch.returns[row, t]), float(batch.old_values[row, t])])
    returns, values = torch.tensor(figures, dtype=torch.float64).unbind(1)
    return torch.stack(states), returns, values


@pytest.mark.parametrize("size", [1, 4])
def test_the_start_of_a_trained_value_head_is_that_of_every_state_alone(world, size):
    opened, roles, collect = world
    chosen = config(batch={"batch_size": 6, "minibatch_size": 6, "micro_batch_size": size})
    batch = collect(chosen)
    before = roles.state("value").state_dict()["adapter"]
    x, y, _ = states_alone(opened, roles, "value", batch)
    x = torch.cat([x, torch.ones(len(x), 1).double()], 1)
    penalty = trained_critic.RIDGE * (x - x.mean(0)).square().sum(0)[:-1].mean()
    gram = x.t() @ x + penalty * torch.eye(33).double().index_fill(1, torch.tensor([32]), 0.0)
    wanted = x @ torch.linalg.solve(gram, x.t() @ y)
    with roles.acting_as("value") as (_, head):
        head.shift.fill_(0.4), head.scale.fill_(2.0)
    critic_of(chosen, roles, opened).start(batch)
    with roles.acting_as("value") as (_, head):
        found = head(x[:, :-1])[:, 0]
    assert torch.allclose(found, wanted, atol=1e-6)
    spread, left = y.var(), (y - wanted).var()
    assert float(1 - left / spread) > 0, "the fit explains something"
    after = roles.state("value").state_dict()["adapter"]
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_the_batch_that_ends_the_pretraining_is_the_first_to_be_learnt_from(world, monkeypatch):
    opened, roles, collect = world
    chosen = config(value={"pretrain_steps": 2, "min_explained_variance": 1.0})
    made, recorded, batch, critic = [], [], collect(chosen), critic_of(chosen, roles, opened)

    def counted(self, *arguments):
        made.append((*arguments, random.random()))
        return replace(batch)

    monkeypatch.setattr(Collector, "collect", counted)
    training = object.__new__(trainings.Training)
    vars(training).update(
        prompts=trainings.Prompts(list(range(60)), []),
        ready=None,
        order=trainings.DataOrder(60, 6, 0),
        progress=trainings.Progress(0.1),
        collector=collector_of(chosen, roles, opened, critic),
        settings=SimpleNamespace(seed=0, pretraining=chosen.value),
        record=lambda step, values: recorded.append(values),
    )
    while training.progress.pretraining is None:
        training.pretrain_value()
    explained = [key.replace("rollout/", "pretrain/") for key in batch.metrics if "explained_variance" in key]
    assert [set(values) for values in recorded] == [{"pretrain/batch", *explained}] * 3
    assert training.progress.pretraining["batches"] == 2 and not training.progress.pretraining["reached"]
    assert critic.optimizer.step_count == 2 * chosen.update.epochs, "the first batch takes no gradient"
    offset, responses, ready = training.order.offset, training.progress.num_responses, training.ready
    assert (offset, responses, len(made)) == (12, 12, 3) and ready is not None
    generators = runtime.Generators().state_dict()
    assert training.roll_out() is ready[0] and training.ready is None and len(made) == 3
    after = random.random()
    assert training.roll_out() is not ready[0] and training.progress.num_responses == 24 == training.order.offset
    training.order.load_state_dict({"epoch": 0, "offset": offset})
    training.progress.num_responses = responses
    runtime.Generators().load_state_dict(generators)
    training.roll_out()
    assert made[-1] == made[2], "what was killed makes the same rows again, with the same random numbers"
    assert random.random() == after


def test_the_critic_by_least_squares_is_at_the_minimum_of_its_cost(world):
    """Each fit against a solver of its own, on the reference's hidden states of every sequence alone."""
    opened, roles, collect = world
    critic, chosen = LeastSquares(32, opened.device), config()
    weight, bias, mean, scale = torch.zeros(32 + solved_critic.FEATURES).double(), 0.0, None, None
    for number in range(2):
        batch = collect(chosen, 0.1 + number, critic, number)
        x, y, values = states_alone(opened, roles, "reference", batch)
        if mean is None:
            spread = x.var(0, correction=0).sqrt()
            mean, scale = x.mean(0), spread + 1e-3 * spread.mean()
            assert not values.any(), "before the first fit every value is 0"
        z = (x - mean) / scale
        f = torch.cat([z, (z @ critic.projection.double()).clamp(min=0)], 1)
        found = f @ weight + bias
        if number:
            assert torch.allclose(found, values, atol=1e-4), "the batch has the critic's values"
        wrong = y - found
        penalty = solved_critic.PULL * (f - f.mean(0)).square().sum(0).mean()
        centred = f - f.mean(0)
        # the dual: as many unknowns as states instead of features
        dual = torch.linalg.solve(centred @ centred.t() + penalty * torch.eye(len(f)).double(), wrong - wrong.mean())
        change = centred.t() @ dual
        weight, bias = weight + change, bias + wrong.mean() - f.mean(0) @ change
        loss = critic.learn(batch, 0, number)["update/value_loss"]
        assert torch.allclose(critic.weight, weight, atol=1e-4 * float(weight.abs().max()))
        assert float(critic.bias) == pytest.approx(float(bias), rel=1e-4)
        assert loss == pytest.approx(0.5 * float((y - f @ weight - bias).square().mean()), rel=1e-3)
        assert loss < 0.5 * float(wrong.square().mean())


def test_the_critic_by_least_squares_comes_back_from_its_state(world):
    opened, _, collect = world
    critic, chosen = LeastSquares(32, opened.device), config()
    critic.start(collect(chosen, 0.1, critic))
    again = LeastSquares(32, opened.device)
    again.load_state_dict(critic.state_dict())
    for own in (critic, again):
        own.learn(collect(chosen, 0.3, own, 5), 0, 1)
    first, second = critic.state_dict(), again.state_dict()
    assert first.pop("fits") == second.pop("fits") == 2
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_dimension_that_hardly_varied_at_first_does_not_rule_the_critic(world):
    critic = LeastSquares(4, torch.device("cpu"))
    first = torch.randn(64, 4, generator=torch.Generator().manual_seed(0))
    first[:, 3] = 5.0
    critic._standardise([first[:32], first[32:]])
    assert float(critic.scale[3]) == pytest.approx(1e-3 * float(first.double().std(0, correction=0).mean()), rel=1e-3)
    assert torch.allclose(critic.scale[:3].double(), first.double().std(0, correction=0)[:3], rtol=2e-3)
    alike = torch.full((8, 4), 2.0)
    critic._standardise([alike])
    assert torch.isfinite(torch.cat(list(critic._features(alike)))).all()
