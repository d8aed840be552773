"""Record what TRL 1.12's own PPO code makes of one batch; run in an environment that has trl==1.12.0.

    python3 -m venv /tmp/trl-ppo
    /tmp/trl-ppo/bin/pip install torch==2.13.0
    /tmp/trl-ppo/bin/pip install trl==1.12.0 transformers==5.23.0 peft==0.21.2 accelerate==1.15.0 datasets==5.2.0
    /tmp/trl-ppo/bin/python scripts/trl_golden.py tests/golden/trl_ppo.json

The mathematics stands inline in the trainer's train(); the script takes those very lines out of the installed source
and executes them on the batch, so nothing is typed again here.
"""

from __future__ import annotations

import inspect
import json
import sys
import textwrap
from pathlib import Path
from types import SimpleNamespace

import torch
import trl
import trl.experimental.ppo.ppo_trainer as peer


def lines_between(first: str, last: str) -> str:
    """The trainer's lines from the one that contains ``first`` to the one before ``last``, dedented."""
    lines = inspect.getsource(peer.PPOTrainer.train).split("\n")
    start = next(i for i, line in enumerate(lines) if first in line)
    end = next(i for i, line in enumerate(lines) if i > start and last in line)
    return textwrap.dedent("\n".join(lines[start:end]))


def main(out: Path) -> None:
    assert trl.__version__ == "1.12.0", trl.__version__
    torch.manual_seed(7)
    lengths, width = [5, 1, 8, 3], 8  # one of a single token, one that fills the row
    shape = (len(lengths), width)
    sequence_lengths = torch.tensor(lengths) - 1
    steps = torch.arange(width).repeat(len(lengths), 1)
    sequence_lengths_p1 = sequence_lengths + 1
    padding_mask, padding_mask_p1 = steps > sequence_lengths[:, None], steps > sequence_lengths_p1[:, None]
    draw = lambda: torch.randn(shape, dtype=torch.float64)  # noqa: E731
    logprobs = torch.masked_fill(-draw().abs(), padding_mask, peer.INVALID_LOGPROB)
    ref_logprobs = torch.masked_fill(-draw().abs(), padding_mask, peer.INVALID_LOGPROB)
    values = torch.masked_fill(draw(), padding_mask_p1, 0)
    args = SimpleNamespace(
        kl_estimator="k1",
        kl_coef=0.07,
        whiten_rewards=False,
        gamma=0.98,
        lam=0.9,
        cliprange=0.2,
        cliprange_value=0.2,
        vf_coef=0.1,
    )
    scores = torch.tensor([1.5, -0.5, 0.25, 2.0], dtype=torch.float64)
    space = {
        **vars(peer),
        "args": args,
        "logprobs": logprobs,
        "ref_logprobs": ref_logprobs,
        "values": values,
        "scores": scores,
        "sequence_lengths": sequence_lengths,
        "sequence_lengths_p1": sequence_lengths_p1,
        "padding_mask": padding_mask,
        "padding_mask_p1": padding_mask_p1,
        "responses": torch.zeros(shape),
    }
    exec(lines_between("# 4. compute rewards", "empty_cache()"), space)

    new_logprobs = (logprobs + 0.3 * draw()).masked_fill(padding_mask, peer.INVALID_LOGPROB).requires_grad_()
    vpred = (values + 0.3 * draw()).masked_fill(padding_mask_p1, 0).requires_grad_()
    rows = list(range(len(lengths)))
    space |= {
        "new_logprobs": new_logprobs,
        "vpred": vpred,
        "mb_values": values,
        "mb_logprobs": logprobs,
        "mb_return": space["returns"],
        "mb_advantage": space["advantages"],
        "micro_batch_inds": rows,
    }
    exec(lines_between("vpredclipped = ", "loss = pg_loss"), space)
    policy_gradient = torch.autograd.grad(space["pg_loss"], new_logprobs)[0]
    value_gradient = torch.autograd.grad(space["vf_loss"], vpred)[0]
    names = ("rewards", "advantages", "returns", "pg_loss", "vf_loss", "vf_clipfrac")
    golden = {
        "trl": trl.__version__,
        "torch": torch.__version__,
        "args": vars(args),
        "lengths": lengths,
        "inputs": {
            name: value.tolist()
            for name, value in {
                "logprobs": logprobs,
                "ref_logprobs": ref_logprobs,
                "values": values,
                "scores": scores,
                "new_logprobs": new_logprobs.detach(),
                "new_values": vpred.detach(),
            }.items()
        },
        "outputs": {
            **{name: space[name].tolist() for name in names},
            "policy_gradient": policy_gradient.tolist(),
            "value_gradient": value_gradient.tolist(),
        },
    }
    out.write_text(json.dumps(golden, indent=1) + "\n")
    print(f"{out}: pg_loss {golden['outputs']['pg_loss']:.6f}, vf_loss {golden['outputs']['vf_loss']:.6f}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
