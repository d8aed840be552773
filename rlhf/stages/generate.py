"""``rlhf generate``: sample from any finished policy run."""

from __future__ import annotations

from pathlib import Path

from rlhf import artifacts, runtime
from rlhf.config.sections import RuntimeSection, SamplingSection
from rlhf.data import lines, sources, tokenised
from rlhf.evaluation import policy as measure
from rlhf.models import opening
from rlhf.models.roles import SharedBase
from rlhf.rollouts.engine import Sampling
from rlhf.rollouts.hf import HfEngine


def generate(
    run_dir: str, prompts: str, out: str, samples: int, temperature: float, max_new_tokens: int, top_p: float, seed: int
) -> None:
    """Read prompts (JSONL, ``-`` for stdin, or any data set), write prompt, response and whether it ended."""
    manifest = artifacts.read(run_dir, "policy")
    artifacts.verify(Path(run_dir), manifest)
    records = lines.load(sources.load_prompts, prompts)
    device = runtime.set_up(RuntimeSection(), seed)
    base = opening.reopen_base(manifest, device)
    runtime.set_threads(RuntimeSection(), base.model, device)
    opening.require_context(base.chat, 1, max_new_tokens, "--max-new-tokens")
    roles = SharedBase(base)
    roles.add("policy", adapter=artifacts.adapter_of(run_dir), trained=False)
    rows, _ = tokenised.prompt_rows(records, base.chat, base.context_length - max_new_tokens, 0.0, prompts)
    repeated = [row for row in rows for _ in range(samples)]
    engine = HfEngine(roles, "policy", base.chat, SamplingSection().concurrency)
    how = Sampling(max_new_tokens, temperature, runtime.derived_seed(seed, "generate"), top_p=top_p)
    found = measure.respond(engine, base.chat, repeated, how)
    lines.write(out, measure.sample_rows(found))
