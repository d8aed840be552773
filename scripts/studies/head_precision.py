"""What an output head in bfloat16 costs in log-probabilities, and what logits in float32 cost in time.

    python scripts/studies/head_precision.py [--model DIR] [--tokens 200]

The same hidden states go through the head twice: as the model does it, rounded to bfloat16, and as training, rescoring
and sampling do it here (``rlhf.models.fused.logits``). Both are compared with the head in float64. Without ``--model``,
random states and weights of two sizes, at logits with a standard deviation of 6. One thread.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from rlhf.models.base import Loading, load_base
from rlhf.models.fused import logits
from rlhf.models.fused.self_checks import TEXT

SIZES = ((576, 49_152), (1_536, 151_936))
DEVIATION, REPEATS = 6.0, 5


def synthetic(width: int, vocabulary: int, tokens: int) -> tuple[nn.Linear, Tensor, Tensor]:
    """A head [V, d], hidden states [n, d] and the token drawn after each [n]."""
    generator = torch.Generator().manual_seed(0)
    head = nn.Linear(width, vocabulary, bias=False).requires_grad_(False)
    head.weight.copy_(torch.empty(vocabulary, width).normal_(0, DEVIATION / width**0.5, generator=generator))
    states = torch.randn(tokens, width, generator=generator)
    drawn = torch.multinomial((states @ head.weight.t()).softmax(-1), 1, generator=generator)[:, 0]
    return head.bfloat16(), states.bfloat16(), drawn


def of_a_model(path: str, tokens: int) -> tuple[nn.Module, Tensor, Tensor]:
    """The same of a model on ordinary text: the token drawn is the one that follows."""
    base = load_base(path, Loading(dtype="bfloat16"))
    ids = torch.tensor(base.tokenizer(TEXT * 4, add_special_tokens=False)["input_ids"][: tokens + 1])
    states = getattr(base.model, base.model.base_model_prefix)(ids[None]).last_hidden_state[0, :-1]
    return base.model.get_output_embeddings(), states, ids[1:]


def row(name: str, found: Callable[[], Tensor], exact: Tensor, drawn: Tensor) -> str:
    """One line of the table; ``exact`` [n, V] logits in float64."""
    found()
    start = time.process_time()
    for _ in range(REPEATS):
        found()
    milliseconds = (time.process_time() - start) / REPEATS * 1000
    picked = [part.double().log_softmax(-1).gather(1, drawn[:, None]) for part in (found(), exact)]
    error = (picked[0] - picked[1]).abs()
    return f"| {name} | {error.mean():.1e} | {error.max():.1e} | {milliseconds:.0f} |"


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a model directory or hub id")
    parser.add_argument("--tokens", type=int, default=200)
    args = parser.parse_args()
    torch.set_num_threads(1)
    cases = {f"{v:,} x {d}": synthetic(d, v, args.tokens) for d, v in SIZES} if not args.model else {}
    cases |= {args.model: of_a_model(args.model, args.tokens)} if args.model else {}
    print("| head | mean error, nats | largest | ms |\n|---|---|---|---|")
    for name, (head, states, drawn) in cases.items():
        exact = states.double() @ head.weight.double().t()
        print(row(f"{name}, in bfloat16", partial(head, states), exact, drawn))
        print(row(f"{name}, float32 logits", partial(logits.of, head, states), exact, drawn))


if __name__ == "__main__":
    main()
