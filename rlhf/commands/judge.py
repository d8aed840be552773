"""What is done with a reward: compare policies, rank samples, filter data, serve scores."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from rlhf.commands.options import Json
from rlhf.commands.use import NewTokens, Policy, Seed, StopTokens, Temperature, Template, TopP, sampling
from rlhf.errors import Problem, RlhfError
from rlhf.runs import progress

REWARDS = typer.Option(
    "--reward",
    help="Reward run, examination of one (its length calibration is taken off), module:function, http://HOST:PORT of a "
    "service, or directory or hub id of a sequence classifier. Several: their mean.",
)
Rewards = Annotated[list[str], REWARDS]
MicroBatch = Annotated[int, typer.Option("--micro-batch-size", min=1, help="Responses a forward pass of a reward.")]
Prompts = Annotated[str, typer.Option("--prompts", help="JSONL of prompts, a data set, or - for stdin.")]


def compare(
    baseline: Policy,
    candidate: Annotated[str, typer.Argument(help="The same, and what is asked about.")],
    reward: Rewards,
    prompts: Prompts = "-",
    samples: Annotated[int, typer.Option("-n", "--samples", min=1, help="Responses a prompt of each policy.")] = 1,
    slice_by: Annotated[
        list[str] | None, typer.Option("--slice-by", help="Field of the prompts' rows: a table by it. Repeatable.")
    ] = None,
    temperature: Temperature = None,
    max_new_tokens: NewTokens = None,
    stop_token: StopTokens = None,
    top_p: TopP = 1.0,
    seed: Seed = 0,
    chat_template: Template = None,
    micro_batch_size: MicroBatch = 32,
    worst: Annotated[int, typer.Option("--worst", min=0, help="Regressions to show as text.")] = 5,
    resamples: Annotated[int, typer.Option("--resamples", min=100, help="Bootstrap resamples of the prompts.")] = 1000,
    suite: Annotated[
        Path | None, typer.Option("--suite", help="YAML of edge cases that both policies answer too.")
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", help="Directory for report.json and every response.")] = None,
    fail_if_worse: Annotated[
        bool,
        typer.Option(
            "--fail-if-worse",
            help="Exit 10 where the whole interval of the score difference is below 0, or "
            "that of a win rate below 1/2, or where a case is lost.",
        ),
    ] = False,
    as_json: Json = False,
) -> None:
    """Compare two policies on the same prompts under a reward. Win rates, slices, worst regressions."""
    asked = sampling("compare", seed, max_new_tokens, temperature, stop_token, top_p)
    module = progress.load("rlhf.commands.compare")
    options = module.Options(samples, slice_by or [], chat_template, asked, micro_batch_size, worst, resamples)
    found = module.compare((baseline, candidate), prompts, reward, options, out, suite)
    if as_json:
        typer.echo(json.dumps(found))
    else:
        module.print_report(found)
    if fail_if_worse:
        module.refuse_if_worse(found)


def rank(
    run: Policy,
    reward: Rewards,
    prompts: Prompts = "-",
    out: Annotated[str, typer.Option("--out", help="JSONL file, or - for stdout.")] = "-",
    samples: Annotated[int, typer.Option("-n", "--samples", min=1, help="Responses a prompt.")] = 8,
    top: Annotated[
        int | None, typer.Option("--top", min=1, help="Write only the best K of each prompt.", show_default=False)
    ] = None,
    judge: Annotated[
        str | None, typer.Option("--judge", help="Another reward, which measures what the first one chooses.")
    ] = None,
    temperature: Temperature = None,
    max_new_tokens: NewTokens = None,
    stop_token: StopTokens = None,
    top_p: TopP = 1.0,
    seed: Seed = 0,
    chat_template: Template = None,
    micro_batch_size: MicroBatch = 32,
    as_json: Json = False,
) -> None:
    """Sample n responses a prompt and rank them by a reward. The worth of the best of 1 to n is said."""
    _refuse_two_on_stdout(as_json, out)
    asked = sampling("rank", seed, max_new_tokens, temperature, stop_token, top_p)
    module = progress.load("rlhf.commands.rank")
    options = module.Options(judge, samples, top, chat_template, asked, micro_batch_size)
    found = module.rank(run, prompts, reward, options, out)
    if as_json:
        typer.echo(json.dumps(found))
    else:
        module.print_report(found)


def filter_rows(
    data: Annotated[str, typer.Option("--in", help="JSONL of prompt and response, a data set, or - for stdin.")] = "-",
    out: Annotated[str, typer.Option("--out", help="JSONL file, or - for stdout.")] = "-",
    reward: Annotated[list[str] | None, REWARDS] = None,
    keep_share: Annotated[
        float | None, typer.Option("--keep-share", min=0.0, max=1.0, help="Share of the rows to keep, the best ones.")
    ] = None,
    min_score: Annotated[float | None, typer.Option("--min-score", help="Drop rows with a lower score.")] = None,
    max_disagreement: Annotated[
        float | None, typer.Option("--max-disagreement", min=0.0, help="Drop rows over which the rewards differ more.")
    ] = None,
    near_duplicates: Annotated[
        float | None,
        typer.Option(
            "--near-duplicates",
            min=0.01,
            max=1.0,
            help="Drop rows that share this much of their word triples with a better one.",
        ),
    ] = None,
    length_outliers: Annotated[
        float | None,
        typer.Option(
            "--length-outliers",
            min=0.0,
            help="Drop responses whose log length is so many robust standard deviations from the median.",
        ),
    ] = None,
    micro_batch_size: MicroBatch = 32,
    as_json: Json = False,
) -> None:
    """Keep the rows of a data set that are worth training on. What is dropped is counted."""
    _refuse_two_on_stdout(as_json, out)
    module = progress.load("rlhf.commands.filter")
    rules = module.Rules(near_duplicates, length_outliers, max_disagreement, min_score, keep_share)
    counts = module.filter_rows(data, reward or [], rules, micro_batch_size, out)
    if as_json:
        typer.echo(json.dumps(counts))


def serve(
    rewards: Annotated[
        list[str],
        typer.Argument(
            metavar="REWARD...",
            help="Reward run, module:function, or directory or hub id of a sequence classifier. Several: their mean.",
        ),
    ],
    host: Annotated[
        str, typer.Option("--host", help="Address; one beyond this machine needs RLHF_SERVICE_TOKEN.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", min=0, max=65535, help="0: any free one.")] = 8300,
    max_batch: Annotated[int, typer.Option("--max-batch", min=1, help="Responses scored at a time.")] = 64,
    max_rows: Annotated[int, typer.Option("--max-rows", min=1, help="Responses a request, at most max-batch.")] = 64,
    max_body: Annotated[int, typer.Option("--max-body", min=1, help="Bytes a request.")] = 1 << 20,
    max_waiting: Annotated[int, typer.Option("--max-waiting", min=1, help="Requests at a time; then 429.")] = 1024,
    read_seconds: Annotated[float, typer.Option("--read-seconds", min=0.1, help="For a request to come; 408.")] = 10.0,
    score_seconds: Annotated[float, typer.Option("--score-seconds", min=0.1, help="For its answer; then 504.")] = 300.0,
) -> None:
    """Serve a reward over HTTP: POST /score and /rank, GET /health. SIGTERM lets requests finish."""
    if max_rows > max_batch:
        raise RlhfError(Problem("CFG003", "--max-rows", f"{max_rows} is more than --max-batch, {max_batch}."))
    if missing := importlib.import_module("rlhf.hub.installed").missing_for_serving():
        raise RlhfError(*missing)
    limits = importlib.import_module("rlhf.serving.requests").Limits(
        max_body, max_rows, read_seconds, score_seconds, max_waiting, max_batch
    )
    progress.load("rlhf.commands.serve").serve(rewards, host, port, limits)


def _refuse_two_on_stdout(as_json: bool, out: str) -> None:
    if as_json and out == "-":
        raise RlhfError(Problem("CFG040", "--json", "standard output has the rows.", "--out FILE"))


COMMANDS: dict[str, Callable[..., None]] = {
    "compare": compare,
    "rank": rank,
    "filter": filter_rows,
    "serve": serve,
}
