"""Steps of PPO on a pretend accelerator: the CPU's figures, no mixed devices, few launches and synchronisations.

``pretend_device`` says what this cannot show: bitsandbytes, real kernels, time and memory.
"""

from __future__ import annotations

from pathlib import Path

import pretend_device
import pytest
import torch
from tiny import build, exact, lora, shake

from rlhf.algorithms import ppo
from rlhf.config.stages import PpoConfig
from rlhf.data.batches import PassSize
from rlhf.data.tokenised import PromptRow
from rlhf.evaluation.policy_samples import SampledPolicy, answering, sampling_of
from rlhf.models.base import Loading, load_base
from rlhf.models.heads import ScalarHead
from rlhf.models.roles import SharedBase
from rlhf.records import Message
from rlhf.rollouts.engine import Sampling
from rlhf.rollouts.hf import HfEngine
from rlhf.runs import snapshots
from rlhf.scoring.ensemble import EnsembleScorer, References
from rlhf.scoring.shared import SharedScorer
from rlhf.training.collector import Collector, CollectorSettings
from rlhf.training.experience import Passes
from rlhf.training.optimizer import Optimizer
from rlhf.training.policy_update import PolicySettings, PolicyUpdate
from rlhf.training.solved_critic import LeastSquares
from rlhf.training.trained_critic import ValueRole, ValueSettings

CPU = torch.device("cpu")
PROMPTS = [PromptRow((Message("user", "hi"),), [70 + i] * (3 + i % 3)) for i in range(4)]
CONFIG = {
    "prompts": {"path": "demo:prompts"}, "batch": {"batch_size": 4, "minibatch_size": 4, "micro_batch_size": 2},
    "sampling": {"max_new_tokens": 6, "concurrency": 4}, "update": {"epochs": 1}, "runtime": {},
}  # fmt: skip
PLAIN = {"critic": "least squares", "checkpointing": False, "lora": {}, "reward": "one head", "double": True}


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    found = build(tmp_path_factory.mktemp("m"))
    load_base(str(found))  # transformers fills no position embedding, ever, where its first model is made on the device
    return found


@pytest.fixture
def device():
    with pretend_device.installed() as found:
        yield found


class World:
    """Everything that a step of PPO needs, on one device."""

    def __init__(self, directory: Path, device: torch.device, **kind):
        kind = {**PLAIN, **kind}
        torch.manual_seed(7)
        self.config = PpoConfig.model_validate(CONFIG)
        self.base = load_base(str(directory), Loading(device=device))
        if kind["double"]:
            exact(self.base.model)
        self.base.model.tie_weights()
        self.roles = SharedBase(self.base)
        self.roles.add("policy", adapter=lora(self.base, **kind["lora"]), trained=True)
        self.roles.add("reference", adapter=lora(self.base, **kind["lora"]))
        for name in ("first", "second"):
            self.roles.add(name, adapter=lora(self.base), head=reward_head(kind["reward"]).to(self.base.model.dtype))
        of_values = ScalarHead(32).zero_().to(self.base.model.dtype)
        self.roles.add("value", adapter=lora(self.base), head=of_values, trained=True)
        for seed, name in enumerate(self.roles.slots):
            shake(self.roles, name, seed, 0.1)
        if kind["checkpointing"]:
            self.roles.enable_gradient_checkpointing()
        self.engine = HfEngine(self.roles, "policy", self.base.chat, 4)
        self.scorer = self._scorer(kind["reward"])
        self.optimizer = Optimizer(self.roles.trained_parameters("policy"), 1e-3, 10)
        self.passes = Passes(PassSize(2), self.base.chat.pad_id, device)
        self.critic = LeastSquares(32, device)
        if kind["critic"] == "gradient":
            optimizer = Optimizer(self.roles.trained_parameters("value"), 1e-3, 10)
            self.critic = ValueRole(self.roles, optimizer, self.passes, ValueSettings(1, 4, 0.2))

    def _scorer(self, kind):
        members = [SharedScorer(self.roles, name, PassSize(2)) for name in ("first", "second")]
        if kind != "ensemble":
            return members[0]
        reference = HfEngine(self.roles, "reference", self.base.chat, 4)
        answer = answering(reference, self.base.chat, sampling_of(self.config.sampling, 5))
        return EnsembleScorer(members, "mean", 0.0, References(answer, 1))

    def collect(self, step: int):
        config = self.config
        policy = SampledPolicy(self.roles, self.engine, self.base.chat, self.passes.size)
        settings = CollectorSettings(
            sampling_of(config.sampling, 0), config.missing_eos, config.kl, config.update, 1, reads_reference=True
        )
        collector = Collector(policy, self.scorer, self.critic, ppo, settings)
        self.batch = collector.collect(PROMPTS, 4 * step, 0.05)
        return self.batch.metrics

    def update(self, step: int):
        settings = PolicySettings(self.config.update, 4, self.config.sampling.temperature, kl_in_loss=False)
        return PolicyUpdate(self.roles, self.optimizer, ppo, self.passes, settings).learn(self.batch, 0, step, 0.05)

    def step(self, step: int) -> dict[str, float]:
        figures = self.collect(step)
        if not step:
            self.critic.start(self.batch)
        return {**figures, **self.update(step), **self.critic.learn(self.batch, 0, step)}

    @property
    def state(self):
        return {"policy": self.roles.state("policy"), "optimizer": self.optimizer, **self.critic.state()}


def reward_head(kind: str) -> ScalarHead:
    if kind != "gated heads":
        return ScalarHead(32)
    head = ScalarHead(32, ("score", "helpful", "harmless"))
    head.set_gate(torch.randn(2, 32), torch.zeros(2), 1.5)
    return head


def agree(found: dict[str, float], wanted: dict[str, float]) -> None:
    assert found.keys() == wanted.keys()
    assert found == pytest.approx(wanted, rel=1e-3, abs=1e-5, nan_ok=True)


slow = pytest.mark.slow


@pytest.mark.parametrize(
    "kind",
    [
        {"critic": "gradient", "checkpointing": True, "lora": {"train_tokens": ["<|im_end|>"]}, "reward": "ensemble"},
        pytest.param({"lora": {"use_dora": True}, "reward": "gated heads"}, marks=slow),
        pytest.param({}, marks=slow),
        pytest.param({"checkpointing": True}, marks=slow),
        pytest.param({"critic": "gradient"}, marks=slow),
    ],
    ids=str,
)
def test_two_steps_have_the_figures_of_the_cpu(directory, device, kind):
    """Load, roles, rollout, scores, rescoring, values, update and critic: whatever mixes devices raises."""
    there, here = World(directory, device, **kind), World(directory, CPU, **kind)
    weights = [[*w.base.model.parameters(), *w.base.model.buffers()] for w in (there, here)]
    assert {weight.device.type for weight in weights[0]} == {device.type}
    assert all(torch.equal(a.cpu(), b) for a, b in zip(*weights, strict=True))
    for step in range(2):
        agree(there.step(step), here.step(step))
    assert [s.response_ids for s in there.batch.samples] == [s.response_ids for s in here.batch.samples]


@pytest.mark.parametrize("critic", ["least squares", pytest.param("gradient", marks=slow)])
def test_a_resumed_run_goes_on_as_the_uninterrupted_one(directory, device, tmp_path, critic):
    run = World(directory, device, critic=critic)
    run.step(0)
    snapshots.save(tmp_path / "step-1", 1, 1, 0.0, 0, run.state)
    resumed = World(directory, device, critic=critic)
    snapshots.load(tmp_path / "step-1", snapshots.read_entry(tmp_path / "step-1"), resumed.state)
    assert resumed.step(1) == run.step(1)


# Two blocks, LoRA on all of their linear layers; measured on torch 2.13. A figure that falls is a new ceiling.
LAUNCHES_A_TOKEN, WAITS_IN_33_TOKENS, UPLOADS_A_ROLLOUT = 103, 3, 6
LAUNCHES_A_MICRO_BATCH, WAITS_A_MICRO_BATCH, UPLOADS_A_MICRO_BATCH = 560, 8.5, 7


def sampled(world, num_tokens):
    """Counts of a rollout, of whose rows not all end, and its tokens."""
    with pretend_device.counted() as counts:
        found = world.engine.generate([prompt.ids for prompt in PROMPTS], Sampling(num_tokens, 1.0, 1), range(4))
    assert max(map(len, found.tokens)) == num_tokens
    return counts


def test_sampling_and_updating_launch_and_wait_no_more_than_they_did(directory, device):
    world = World(directory, device, double=False)
    world.collect(0)  # checks at first use are over
    one, many = sampled(world, 1), sampled(world, 33)
    with pretend_device.counted() as updated:
        world.update(0)
    print(f"of one token\n{one}\nof 33 tokens\n{many}\nof two micro-batches\n{updated}")
    assert (many.launches - one.launches).total() / 32 <= LAUNCHES_A_TOKEN
    assert many.waits.total() <= WAITS_IN_33_TOKENS
    assert one.uploads.total() == many.uploads.total() <= UPLOADS_A_ROLLOUT
    assert updated.launches.total() / 2 <= LAUNCHES_A_MICRO_BATCH
    assert updated.waits.total() / 2 <= WAITS_A_MICRO_BATCH
    assert updated.uploads.total() / 2 <= UPLOADS_A_MICRO_BATCH


def test_mixed_devices_raise_and_each_way_to_wait_is_counted_with_its_line(device):
    x, here = torch.arange(6.0, device=device), torch.ones(6)
    with pretend_device.counted() as counts:
        for wrong in (lambda: x + here, lambda: torch.where(x > 2, x, here), lambda: here.copy_(x).add_(x)):
            with pytest.raises(RuntimeError, match="test_pretend_device.py:.* of tensors on the CPU and on lazy:0"):
                wrong()
    assert counts.waits.total() == 1, "of the copy to the host alone"
    ways = [
        lambda: float(x[1]),
        lambda: bool((x > 2).all()),
        lambda: x.tolist(),
        lambda: x.cpu(),
        lambda: x.nonzero(),
        lambda: x[x > 2],
        lambda: torch.equal(x, x),
        lambda: x.to("cpu", torch.float64),
        lambda: x[0].item(),
    ]
    for way in ways:
        with pretend_device.counted() as counts:
            way()
        assert counts.waits.total() == 1 and not counts.uploads
        assert "tests/test_pretend_device.py" in str(counts.waits)
    with pretend_device.counted() as counts:
        torch.tensor([1.0], device=device)
        here.to(device)
        x[[1, 2]]
        x[torch.tensor([1, 2])]
        x.view(2, 3).t()
        x.add_(1).mul(2.0)
    assert (counts.uploads.total(), counts.waits.total()) == (4, 0)
    assert counts.launches.total() == 3 + 2 + 2, "copies, choices and sums; a view is none"


def test_a_recorded_step_runs_on_its_own_memory_and_may_not_wait(device):
    x, total, factor = torch.ones(3, device=device), torch.zeros((), device=device), 2.0

    def step():
        x.mul_(factor)
        total.add_(x[:2].sum())

    replay, factor = pretend_device.record(step), 5.0
    assert x.tolist() == [1.0] * 3 and total.tolist() == 0.0, "recording runs nothing"
    replay()
    replay()
    assert x.tolist() == [4.0] * 3 and total.tolist() == 4.0 + 8.0
    for wrong in (lambda: x.add_(float(total)), lambda: x.add_(torch.ones(3).to(device))):
        with pytest.raises(RuntimeError, match="capturing"):
            pretend_device.record(wrong)
