"""Scores by a Python function: rules, checkers, programs."""

from __future__ import annotations

import importlib
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from rlhf.errors import Problem, RlhfError
from rlhf.records import plain_text
from rlhf.scoring.scorer import Sample, Scores

Function = Callable[[list[str], list[str]], Sequence[float]]


class FunctionScorer:
    """Calls ``module:function`` with B prompts and B responses (texts) and takes B floats back."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.function = load(name)

    def score(self, samples: Sequence[Sample]) -> Scores:
        """[B] the function's numbers.

        Raises:
            RlhfError: GRD010 if they are not B finite numbers.
        """
        prompts = [plain_text(sample.prompt) for sample in samples]
        found = self.function(prompts, [sample.response for sample in samples])
        try:
            values = list(found)
        except TypeError:
            what = f"gave {type(found).__name__} instead of a list."
            raise RlhfError(Problem("GRD010", self.name, what, "a list with one float a response")) from None
        if len(values) != len(samples):
            what = f"gave {len(values)} numbers for {len(samples)} responses."
            raise RlhfError(Problem("GRD010", self.name, what, "one float a response"))
        for index, value in enumerate(values):
            if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
                raise RlhfError(Problem("GRD010", self.name, f"gave {value!r} for response {index}.", "finite floats"))
        return Scores(torch.tensor([float(value) for value in values]))


def load(name: str) -> Function:
    """The function that ``module:function`` names; modules of the working directory are found.

    Raises:
        RlhfError: CFG030 if there is none.
    """
    module_name, colon, attribute = name.partition(":")
    if not colon or not module_name or not attribute:
        raise RlhfError(Problem("CFG030", name, "not of the form module:function."))
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.append(here)
    try:
        found = getattr(importlib.import_module(module_name), attribute)
    except (ImportError, AttributeError, SyntaxError) as error:
        raise RlhfError(Problem("CFG030", name, f"cannot be imported: {error}.", "check module and name")) from None
    if not callable(found):
        raise RlhfError(Problem("CFG030", name, "is not a function."))
    return found  # type: ignore[no-any-return]
