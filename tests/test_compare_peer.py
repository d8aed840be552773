"""scripts/compare_peer.py without the peer: what is read off the curves, and our run set up as TRL's."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tiny import base, lora, shake

SCRIPTS = Path(__file__).parents[1] / "scripts"
sys.path.insert(0, str(SCRIPTS))

from peer import curves, like_trl  # noqa: E402

from rlhf.algorithms.algorithm import algorithm_of  # noqa: E402
from rlhf.config.stages import PpoConfig  # noqa: E402
from rlhf.data.batches import PassSize, collate  # noqa: E402
from rlhf.data.tokenised import PromptRow  # noqa: E402
from rlhf.evaluation.policy_samples import SampledPolicy, sampling_of  # noqa: E402
from rlhf.models import forward  # noqa: E402
from rlhf.models.heads import ScalarHead  # noqa: E402
from rlhf.models.roles import SharedBase  # noqa: E402
from rlhf.records import Message  # noqa: E402
from rlhf.rollouts.engine import Rollout  # noqa: E402
from rlhf.scoring.function import FunctionScorer  # noqa: E402
from rlhf.training import loop as trainings  # noqa: E402
from rlhf.training.collector import Collector, CollectorSettings  # noqa: E402
from rlhf.training.experience import Experience, Passes  # noqa: E402
from rlhf.training.optimizer import Optimizer  # noqa: E402
from rlhf.training.policy_update import PolicySettings, PolicyUpdate  # noqa: E402
from rlhf.training.trained_critic import ValueRole, ValueSettings  # noqa: E402


def curve(*points):
    return [{"step": 2 * i, "cpu_s": seconds, "gold": gold} for i, (seconds, gold) in enumerate(points)]


def test_seconds_until_a_target_lie_between_the_evaluations_around_it():
    assert curves.seconds_until(0.75, curve((0, 0.5), (10, 0.7), (30, 0.8))) == pytest.approx(20)
    assert curves.seconds_until(0.75, curve((0, 0.5), (10, 0.75), (30, 0.6), (40, 0.9))) == pytest.approx(10)
    assert curves.seconds_until(0.75, curve((3, 0.8), (10, 0.6))) == 3
    assert curves.seconds_until(0.75, curve((0, 0.5), (10, 0.74))) is None
    assert curves.seconds_a_step(curve((0, 0.5), (50, 0.7), (56, 0.8), (62, 0.8))) == pytest.approx(3)


def test_the_interval_of_a_ratio_pairs_the_seeds():
    same = curves.ratio_over_seeds([1.0, 10.0, 100.0], [2.0, 20.0, 200.0])
    assert (same.estimate, same.low, same.high) == pytest.approx((2, 2, 2))
    mixed = curves.ratio_over_seeds([1.0, 1.0], [2.0, 8.0])
    assert mixed.estimate == pytest.approx(4)  # the geometric mean; of two seeds a quarter draws one of them twice
    assert (mixed.low, mixed.high) == pytest.approx((2, 8))


def test_a_report_has_ratios_and_differences_and_works_without_the_peer():
    ours, peer = curve((0, 0.5), (10, 0.7), (20, 0.8)), curve((0, 0.5), (20, 0.6), (60, 0.9))
    found = curves.report({0: {"ours": ours, "peer": peer}, 1: {"ours": ours, "peer": peer}})
    assert found["cpu_s_until_0.75"] == {"ours": pytest.approx([15, 15]), "peer": pytest.approx([40, 40])}
    assert found["ratio"]["geometric_mean"] == found["ratio"]["mean"] == pytest.approx(40 / 15)
    assert found["ratio_a_step"]["mean"] == pytest.approx(20 / 5)
    assert found["difference"]["2"]["mean"] == pytest.approx(0.1)
    assert found["difference"]["mean"]["ci95"] == pytest.approx([0.0, 0.0])
    never = curves.report({0: {"ours": curve((0, 0.5), (10, 0.7), (20, 0.7)), "peer": peer}})
    assert "ratio" not in never and never["cpu_s_until_0.75"]["ours"] == [None]
    alone = curves.report({0: {"ours": ours}})
    assert alone["cpu_s_until_0.75"] == {"ours": pytest.approx([15])} and "difference" not in alone


def test_the_state_behind_the_end_is_where_trl_has_it():
    recorded = json.loads((Path(__file__).parent / "golden" / "trl_ppo.json").read_text())
    rewards, lengths = torch.tensor(recorded["outputs"]["rewards"]), torch.tensor(recorded["lengths"])
    mask = torch.arange(rewards.shape[1])[None] < lengths[:, None]
    late = like_trl.with_state_behind_end(mask)
    assert late.sum(1).tolist() == [6, 2, 8, 4]  # of 5, 1, 8 and 3 tokens, where 8 fill the row
    assert bool((rewards.abs() > 1e-9)[late].all()) and not rewards[~late].any()


def lengths_reward(prompts, responses):
    return [float(len(response)) for response in responses]


@pytest.fixture
def training(tmp_path, monkeypatch):
    """A run without its data: what LikeTrl reads of it."""
    config = PpoConfig.model_validate(
        {
            "prompts": {"path": "demo:prompts"},
            "sampling": {"max_new_tokens": 7},
            "rewards": [{"function": f"{__name__}:lengths_reward"}],
            "update": {"gamma": 0.9, "lam": 0.8, "value_lam": 0.8},
            "batch": {"batch_size": 6, "minibatch_size": 3, "micro_batch_size": 2},
            "missing_eos": {"mode": "subtract", "penalty": 3.0},
            "kl": {"coef": 0.1},
        }
    )
    opened = base(tmp_path / "m", double=True)
    roles = SharedBase(opened)
    for seed, name in enumerate(("policy", "reference", "value")):
        head = ScalarHead(32).double() if name == "value" else None
        roles.add(name, adapter=lora(opened), head=head, trained=name != "reference")
        shake(roles, name, seed, size=0.1)
    prompts = [PromptRow((Message("user", "p" * n),), [70 + n] * (n + 1)) for n in range(6)]
    end = opened.chat.end_id
    tokens = [[end], [80, 81, 82, end], [80, 81, 82, 83, 84, 85, end], [80, end], [90] * 7, [90, 91, end]]
    written = Rollout(tokens, [row[-1] == end for row in tokens])
    engine = SimpleNamespace(generate=lambda *_: written)
    scorer = FunctionScorer(f"{__name__}:lengths_reward")
    optimizer = Optimizer(roles.trained_parameters("value"), 1e-3, 9)
    passes, algorithm = Passes(PassSize(2), opened.chat.pad_id, opened.device), algorithm_of(config.update)
    critic = ValueRole(roles, optimizer, passes, ValueSettings(config.update.epochs, 3, 0.2))
    collector = Collector(
        SampledPolicy(roles, engine, opened.chat, passes.size),
        scorer,
        critic,
        algorithm,
        CollectorSettings(
            sampling_of(config.sampling, 3), config.missing_eos, config.kl, config.update, 1, config.reads_reference()
        ),
    )
    policy = PolicyUpdate(
        roles,
        Optimizer(roles.trained_parameters("policy"), 1e-3, 9),
        algorithm,
        passes,
        PolicySettings(config.update, 3, 1.0, False),
    )
    batch = collector.collect(prompts, 0, 0.1)
    monkeypatch.setattr(trainings.Training, "roll_out", lambda self: batch)
    found = object.__new__(like_trl.LikeTrl)
    progress = SimpleNamespace(kl_coef=0.1)
    vars(found).update(collector=collector, policy=policy, progress=progress, before=batch)
    return found


def test_scores_and_values_stand_one_state_later_and_nothing_else_moves(training):
    batch, before = training.roll_out(), training.before
    late, width = training.late, before.mask.shape[1]
    lengths = before.mask.sum(1).tolist()
    assert min(lengths) < width == max(lengths), "rows of both kinds"
    for row, (sample, length) in enumerate(zip(before.samples, lengths, strict=True)):
        last = min(length, width - 1)
        ids = [*sample.response_ids, 0][: last + 1]
        with torch.no_grad(), training.roles.acting_as("value") as (model, head):
            alone = collate([sample.prompt_ids], [ids], 0, training.roles.device)
            values = forward.state_values(model, head, alone)[0].tolist()
        penalties = [float(before.old_logprobs[row, t] - before.ref_logprobs[row, t]) for t in range(length)]
        rewards = [-0.1 * penalty for penalty in penalties] + [0.0] * (last + 1 - length)
        rewards[last] += float(before.scores[row])
        deltas = [rewards[t] + 0.9 * (values[t + 1] if t < last else 0.0) - values[t] for t in range(last + 1)]
        wanted = [sum((0.9 * 0.8) ** (s - t) * deltas[s] for s in range(t, last + 1)) for t in range(last + 1)]
        assert late.advantages[row, : last + 1].tolist() == pytest.approx(wanted, abs=1e-5)
        returns = [a + v for a, v in zip(wanted, values, strict=True)]
        assert late.returns[row, : last + 1].tolist() == pytest.approx(returns, abs=1e-5)
        assert batch.advantages[row].tolist() == pytest.approx(wanted[:length] + [0.0] * (width - length), abs=1e-5)
    assert torch.equal(batch.mask, before.mask) and batch.samples is before.samples


def test_the_value_role_learns_from_the_late_states_and_the_policy_from_the_tokens(training, monkeypatch):
    seen = []

    def step(self):
        batch = self.roll_out()
        self.policy.learn(batch, 5, 1, 0.1)
        self.critic.learn(batch, 5, 1)

    def watched(batch, rows, passes):
        for part in micro_batches(batch, rows, passes):
            if batch is training.late:
                seen.append(int(part.mask.sum()))
            yield part

    micro_batches, learn = Experience.micro_batches, ValueRole.learn
    monkeypatch.setattr(trainings.Training, "step", step)
    monkeypatch.setattr(Experience, "micro_batches", watched)
    training.step()
    epochs = training.critic.settings.epochs
    assert sum(seen) == epochs * int(training.late.mask.sum())
    assert int(training.late.mask.sum()) > int(training.before.mask.sum())
    assert ValueRole.learn is learn


def test_the_weight_of_the_value_loss_is_an_epsilon(training):
    """AdamW on the loss times c takes the very steps of AdamW on the loss with epsilon / c."""
    ways = []
    for weight, eps in ((like_trl.VALUE_COEF, like_trl.EPS), (1.0, like_trl.EPS / like_trl.VALUE_COEF)):
        x = torch.tensor([1.0, -1e-7], dtype=torch.float64, requires_grad=True)
        optimizer = torch.optim.AdamW([x], lr=0.1, eps=eps, weight_decay=0.0)
        for _ in range(5):
            optimizer.zero_grad()
            (weight * (x * torch.tensor([1.0, 1e-7], dtype=torch.float64)).square().sum()).backward()
            optimizer.step()
        ways.append(x.tolist())
    assert ways[0] == pytest.approx(ways[1], rel=1e-9)
    optimizers = [Optimizer([torch.nn.Parameter(torch.zeros(1))], 1e-3, 9) for _ in range(2)]
    training.policy = replace(training.policy, optimizer=optimizers[0])
    training.collector = replace(training.collector, critic=replace(training.critic, optimizer=optimizers[1]))
    training.set_epsilons()
    found = [optimizer.adamw.param_groups[0]["eps"] for optimizer in optimizers]
    assert found == [1e-8, pytest.approx(1e-7)]


@pytest.mark.parametrize("steps", [5, 2])
def test_steps_that_no_curve_comes_of_are_refused(steps, monkeypatch, capsys):
    import compare_peer

    monkeypatch.setattr(sys, "argv", ["compare_peer.py", "--steps", str(steps), "--every", "2"])
    with pytest.raises(SystemExit) as left:
        compare_peer.main()
    assert left.value.code == 2 and "multiple of --every" in capsys.readouterr().err
