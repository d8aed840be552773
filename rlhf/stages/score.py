"""``rlhf score``: score given responses with any finished reward run."""

from __future__ import annotations

from pathlib import Path

from rlhf import artifacts, runtime
from rlhf.config.sections import RuntimeSection
from rlhf.data import lines, sources, tokenised
from rlhf.models import opening
from rlhf.models.base import NO_LIMIT
from rlhf.models.heads import ScalarHead
from rlhf.models.roles import SharedBase
from rlhf.scoring.scorer import Sample
from rlhf.scoring.shared import SharedScorer


def score(run_dir: str, data: str, out: str, micro_batch_size: int) -> None:
    """Read prompts with responses (JSONL, ``-`` for stdin), write them with their standardised scores."""
    manifest = artifacts.read(run_dir, "reward")
    artifacts.verify(Path(run_dir), manifest)
    records = lines.load(sources.load_demonstrations, data)
    device = runtime.set_up(RuntimeSection(), 0)
    base = opening.reopen_base(manifest, device)
    runtime.set_threads(RuntimeSection(), base.model, device)
    roles = SharedBase(base)
    head = ScalarHead.load(Path(run_dir) / artifacts.HEAD)
    roles.add("reward", adapter=Path(run_dir) / artifacts.ADAPTER, head=head, trained=False)
    samples = []
    turns = tokenised.turns(records, base.chat, last_only=True, max_length=NO_LIMIT)
    for record, turn in zip(records, turns, strict=True):
        opening.require_context(base.chat, len(turn.prompt_ids), len(turn.response_ids), record.where)
        prompt, response = record.messages[:-1], record.messages[-1].content
        samples.append(Sample(prompt, response, turn.prompt_ids, turn.response_ids, True, turn.response_ids))
    scores = SharedScorer(roles, "reward", micro_batch_size).score(samples).mean.tolist()
    rows = [
        {
            "prompt": [{"role": message.role, "content": message.content} for message in sample.prompt],
            "response": sample.response,
            "score": value,
        }
        for sample, value in zip(samples, scores, strict=True)
    ]
    lines.write(out, rows)
