"""Which rows fit: their lengths in the model's tokens, the limit, and the decision to ask for when too many do not."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from rlhf.data.chat_format import ChatFormat
from rlhf.data.rows import EQUAL, SPECIAL_TOKEN, TOO_LONG
from rlhf.errors import Problem, RlhfError
from rlhf.records import Comparison, Demonstration, Prompt
from rlhf.runs.progress import track
from rlhf.start import choose
from rlhf.start.basis import Basis
from rlhf.start.facts import Lengths, Limit, Options, Tokens
from rlhf.start.parts import SHARES, Parts, require
from rlhf.start.read_files import File

REFUSED = {"DAT060": SPECIAL_TOKEN, "MOD013": "turns that the chat template refuses"}  # by the chat format, in one row


@dataclass(frozen=True)
class Fitting:
    """The files without the rows that are longer than ``limit``; ``tokens`` has those of a row by its place."""

    files: tuple[File, ...]
    limit: Limit
    tokens: Mapping[str, Tokens]


@dataclass(frozen=True)
class _Measured:
    """A file with the length of each record, in order."""

    file: File
    tokens: tuple[Tokens, ...]

    def longer(self, limit: int) -> list[Any]:
        """The records that are longer."""
        rows = zip(self.file.records, self.tokens, strict=True)
        return [record for record, one in rows if one.whole > limit]

    def share_dropped(self, limit: int) -> float:
        return self.file.share_dropped(sum(record.num_rows for record in self.longer(limit)))


def fitting(files: Sequence[File], chat: ChatFormat, options: Options, is_large: bool) -> Fitting:
    """The rows that fit the given limit, or else the first of ``choose.limits`` that keeps enough of every file.

    Raises:
        RlhfError: MOD022 for a given limit beyond the context; DAT020 where more than the allowed share of a file would
            be left out, with what there is to decide; DAT051 where no row of a file fits.
    """
    given, context = options.max_length, chat.context_length
    if given and context and given > context:
        what = f"{given} tokens, more than the model's context of {context}."
        raise RlhfError(Problem("MOD022", "--max-length", what, f"{context} or less"))
    measured = [_measure(file, chat) for file in files]
    lengths = [one.whole for file in measured for one in file.tokens]
    limits = [given] if given else choose.limits(lengths, context, is_large)
    bound = options.max_dropped_fraction
    enough = [one for one in limits if all(file.share_dropped(one) <= bound for file in measured)]
    limit = (enough or limits[-1:])[0]
    if problems := [problem for file in measured if (problem := _refusal(file, limit, options))]:
        raise RlhfError(*problems)
    fit = tuple(file.file.without({row.where: TOO_LONG for row in file.longer(limit)}) for file in measured)
    by_place = {row.where: one for found in measured for row, one in zip(found.file.records, found.tokens, strict=True)}
    note = _note(limit, lengths, options, is_large)
    return Fitting(fit, Limit(limit, note, given is not None), by_place)


def _measure(file: File, chat: ChatFormat) -> _Measured:
    """The lengths of a file's records; what the model's tokens cannot hold, or cannot tell apart, is left out."""
    tokens: list[Tokens] = []
    refused: dict[str, str] = {}
    for record in track(file.records, "Tokenising", len(file.records)):
        try:
            found = _tokens(record, chat)
        except RlhfError as error:
            code = error.problems[0].code
            if code not in REFUSED:
                raise
            refused[record.where] = REFUSED[code]
            continue
        if found is None:
            refused[record.where] = EQUAL
        else:
            tokens.append(found)
    kept = file.without(refused)
    if not tokens:
        raise RlhfError(
            Problem("DAT013", file.path, f"no row is left: {kept.dropped.sentence()}.", "other rows, or another model")
        )
    return _Measured(kept, tuple(tokens))


def _tokens(record: Any, chat: ChatFormat) -> Tokens | None:
    """None where differently ranked responses are the same tokens."""
    prompt = len(chat.prompt_ids(record.prompt))
    if isinstance(record, Prompt):
        return Tokens(prompt, 0, 0)
    if not isinstance(record, Comparison):
        response = len(chat.response_ids(record.prompt, record.messages[-1].content)) + 1
        return Tokens(prompt, response, response)
    responses = [chat.response_ids(record.prompt, text) for text in record.responses]
    strict = [judgement for judgement in record.judgements if judgement.probability != 0.5]
    if any(responses[judgement.first] == responses[judgement.second] for judgement in strict):
        return None
    best = responses[strict[0].first] if strict else responses[0]
    return Tokens(prompt, len(best) + 1, max(map(len, responses)) + 1)


def _refusal(found: _Measured, limit: int, options: Options) -> Problem | None:
    """What is to be decided before a file can be used, with the figures of each choice; nothing is used afterwards."""
    file, bound, longer = found.file, options.max_dropped_fraction, found.longer(limit)
    num_records = len(file.records)
    if len(longer) == num_records:
        median = statistics.median_low([one.whole for one in found.tokens])
        what = f"all {num_records:,} {file.kind} are longer than {limit:,} tokens (median {median:,})."
        fix = "a larger --max-length" if options.max_length else "a model with a longer context, or shorter rows"
        return Problem("DAT051", file.path, what, fix)
    bad, share = file.share_dropped(), found.share_dropped(limit)
    is_decided = options.max_length is not None
    if (bad if is_decided else share) <= bound:
        return None
    needed = _needed(found, bound)
    if not is_decided:
        file.without({record.where: TOO_LONG for record in longer})
    file.dropped.max_fraction = bound
    problem = file.dropped.problems()[0]
    what = f"{problem.what} At most {bound:.0%} may be."
    flags = [f"--max-dropped-fraction {math.ceil(100 * bad - 1e-9) / 100:g}"] if bad > bound else []
    if is_decided or not longer:
        return replace(problem, what=what, fix=f"repair the rows, or go on without them: {flags[0]}")
    kept = f"{num_records - len(longer):,} {file.kind}"
    fix = (
        f"{' '.join([f'--max-length {limit}', *flags])} goes on with the {kept} that fit; or a model with a context of "
        f"at least {needed:,} tokens, which keeps the data"
    )
    return replace(problem, what=f"{what} The model's context is {limit:,} tokens.", fix=fix)


def _needed(found: _Measured, bound: float) -> int:
    """The least length that leaves out no more than the allowed share, or else only the longest."""
    lengths = sorted(one.whole for one in found.tokens)
    return next((length for length in lengths if found.share_dropped(length) <= bound), lengths[-1])


def _note(limit: int, lengths: Sequence[int], options: Options, is_large: bool) -> str:
    num_longer = sum(length > limit for length in lengths)
    longer = f"{num_longer:,} of {len(lengths):,} rows are longer and were left out"
    if options.max_length:
        return f"as --max-length says; {longer}" if num_longer else "as --max-length says"
    if is_large and limit > choose.MOST_TOKENS:
        most = choose.MOST_TOKENS
        num_longer = sum(length > most for length in lengths)
        return f"long rows take much memory; --max-length {most} would leave out {num_longer:,} of {len(lengths):,}"
    return longer if num_longer else ""


def with_room(found: Basis, options: Options) -> Basis:
    """The same without the prompts of PPO behind which the context does not hold an answer.

    Raises:
        RlhfError: DAT020 where they are more than the allowed share and the person has not decided on a length, DAT031
            where too few are left.
    """
    context, prompts = found.model.context_length, found.lengths["ppo"].prompt
    if not context or not prompts:
        return found
    fits = [length <= context - found.new_tokens for length in prompts]
    num_long = fits.count(False)
    if num_long > options.max_dropped_fraction * len(prompts) and not options.max_length:
        what = (
            f"the model's context of {context:,} tokens does not hold an answer of {found.new_tokens:,} behind "
            f"{num_long:,} of the {len(prompts):,} prompts for PPO."
        )
        fix = f"--max-length {found.limit.tokens} goes on without them; or a model with a longer context"
        raise RlhfError(Problem("DAT020", "--data", what, fix))
    kept = tuple(length for length, is_short in zip(prompts, fits, strict=True) if is_short)
    asked = tuple(row for row, is_short in zip(found.parts.ppo, fits, strict=True) if is_short)
    parts = replace(found.parts, ppo=asked)
    require(parts, with_preferences=True)
    return replace(found, parts=parts, lengths=found.lengths | {"ppo": Lengths(kept, kept, ())})


def rewrites_turns(records: Sequence[Demonstration], chat: ChatFormat) -> bool:
    """Whether the template writes an earlier turn of a conversation differently once the conversation goes on."""
    for record in records:
        try:
            chat.demonstration(record.messages, last_only=False)
        except RlhfError as error:
            if error.problems[0].code != "MOD012":
                raise
            return True
    return False


def lengths_of(parts: Parts, tokens: Mapping[str, Tokens]) -> dict[str, Lengths]:
    """Of each part's rows as its stage reads them: ``sft`` has the best response only, ``ppo`` the prompt only."""
    found = {name: [tokens[record.where] for record in getattr(parts, name)] for name in SHARES}
    whole = {
        "sft": [one.prompt + one.best for one in found["sft"]],
        "ppo": [one.prompt for one in found["ppo"]],
        **{name: [one.whole for one in found[name]] for name in ("reward", "eval")},
    }
    return {
        name: Lengths(tuple(whole[name]), tuple(one.prompt for one in rows), tuple(one.best for one in rows))
        for name, rows in found.items()
    }
