"""Tokens by their names, and those that a model itself ends a text with, by the generation config in its files."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers.utils import cached_file

from rlhf.errors import Problem, RlhfError

log = logging.getLogger("rlhf")
FILE = "generation_config.json"


def of_model(path: str, tokenizer: Any, revision: str | None = None) -> tuple[str, ...]:
    """The end tokens of ``generation_config.json``, in its order; empty where the model has no such file.

    A model class writes an id of its own there when nobody names one, such as Llama's 2. Only a special or added token
    of this tokenizer can be an end; any other id is left out, and that is logged.

    Raises:
        RlhfError: MOD001 where the file cannot be fetched or read.
    """
    try:
        file = cached_file(path, FILE, revision=revision, _raise_exceptions_for_missing_entries=False)
        found = json.loads(Path(file).read_text("utf-8")).get("eos_token_id") if file else None
    except (OSError, ValueError, AttributeError) as error:
        raise RlhfError(
            Problem("MOD001", f"{path}: {FILE}", f"cannot be read: {error}.", "repair the file, or download it again")
        ) from None
    ids = found if isinstance(found, list) else [] if found is None else [found]
    if not all(type(index) is int for index in ids):
        what = f"eos_token_id is {found!r}, not a token id or a list of them."
        raise RlhfError(Problem("MOD001", f"{path}: {FILE}", what, "repair the file, or download it again"))
    control = {*tokenizer.all_special_ids, *tokenizer.get_added_vocab().values()}
    if ordinary := [index for index in ids if index not in control]:
        log.info(
            "%s: %s names %s as eos_token_id, which is not a special token of its tokenizer: left out.",
            path,
            FILE,
            ", ".join(map(str, ordinary)),
        )
    known = dict.fromkeys(index for index in ids if index in control)
    return tuple(str(tokenizer.convert_ids_to_tokens(index)) for index in known)


def token_ids(tokens: Sequence[str], tokenizer: Any, key: str) -> list[int]:
    """The ids of single tokens that the config's ``key`` names.

    Raises:
        RlhfError: MOD031 for tokens that the tokenizer does not have.
    """
    if not tokens:
        return []
    known = tokenizer.get_vocab()
    unknown = [token for token in tokens if token not in known]
    if unknown:
        what = f"not in the vocabulary: {', '.join(map(repr, unknown))}."
        raise RlhfError(Problem("MOD031", key, what, "write the token as the tokenizer has it"))
    return [known[token] for token in tokens]
