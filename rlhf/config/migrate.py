"""A TRL or LlamaFactory config as one of ours, with every key that has no counterpart named."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from rlhf.config import migrate_steps as steps
from rlhf.config.migration import Migration, nested, plain
from rlhf.config.migrations import COUNTED, DEFAULTS, GONE, IN_STAGE, LLAMAFACTORY, SAME, TRL
from rlhf.config.sections import Section
from rlhf.config.yaml_reader import shown
from rlhf.errors import Problem, RlhfError

STAGES = {"sft": "sft", "rm": "train-rm", "ppo": "ppo"}
TELLING = {
    "ppo": (
        "num_ppo_epochs",
        "kl_coef",
        "cliprange",
        "response_length",
        "missing_eos_penalty",
        "reward_model_path",
        "sft_model_path",
        "total_episodes",
        "vf_coef",
    ),
    "train-rm": ("center_rewards_coefficient",),
    "sft": ("packing", "assistant_only_loss", "completion_only_loss", "dataset_text_field", "chat_template_path"),
}


def migrate(
    old: Mapping[str, Any],
    config_classes: Mapping[str, type[Section]],
    stage: str | None,
    where: str,
    data_sets: Mapping[str, Any] | None = None,
) -> Migration:
    """Translate ``old``, whose keys are TRL's script arguments or LlamaFactory's.

    Args:
        stage: ours, where the file does not tell.
        data_sets: LlamaFactory's dataset_info.json, if there is one.

    Raises:
        RlhfError: CFG030 where the stage cannot be told or none here does its work.
    """
    tool = LLAMAFACTORY if {"finetuning_type", "stage"} & old.keys() else TRL
    ours = _stage_of(old, stage, where)
    found = Migration(tool, ours, config_classes[ours], dict(old))
    left = {key: value for key, value in DEFAULTS[tool, ours].items() if found.old.get(key) is None}
    found.old |= left
    for step in (
        steps.runs,
        steps.batch,
        steps.length,
        steps.schedule,
        steps.precision,
        steps.quantised,
        steps.lora,
        steps.ppo,
        steps.others,
    ):
        step(found)
    steps.data(found, data_sets or {})
    for key in list(found.old):
        value = found.take(key)
        if key not in SAME:
            found.gone[shown(key)] = GONE.get(key, f"not known as a key of {tool}, nor here")
        elif value is not None:
            found.put(key, SAME[key], value)
    names = [IN_STAGE[ours].get(name, name) for name in ((SAME | COUNTED).get(key, key) for key in left)]
    found.written += [name for name in names if name in found.config]
    steps.whole(found)
    _refuse_bad_values(found)
    return found


def _stage_of(old: Mapping[str, Any], told: str | None, where: str) -> str:
    fix = f"--stage with one of {', '.join(STAGES.values())}"
    named = old.get("stage")
    if named is not None and str(named) not in STAGES:
        raise RlhfError(Problem("CFG030", f"{where}: stage", f"{named!r} has no counterpart here.", fix))
    kind = old.get("finetuning_type")
    if kind not in (None, "lora", "full", "freeze"):
        raise RlhfError(Problem("CFG030", f"{where}: finetuning_type", f"{kind!r} has no counterpart here.", "lora"))
    if told and told not in STAGES.values():
        raise RlhfError(Problem("CFG030", "--stage", f"no stage to migrate to is called '{told}'.", fix))
    likely = [stage for stage, keys in TELLING.items() if any(key in old for key in keys)]
    if told or named or len(likely) == 1:
        return told or STAGES.get(str(named)) or likely[0]
    what = f"has keys of {' and of '.join(likely)}" if likely else "the keys do not tell which stage it is for"
    raise RlhfError(Problem("CFG030", where, f"{what}.", fix))


def _refuse_bad_values(found: Migration) -> None:
    """What our bounds refuse is left out, and said."""
    while errors := _errors(found):
        for entry in errors:
            path = ".".join(map(str, entry["loc"]))
            held = [key for key in found.config if f"{path}.".startswith(f"{key}.") or f"{key}.".startswith(f"{path}.")]
            if not path or not held:
                raise RlhfError(Problem("CFG030", path or "config", f"{entry['msg']}.", "mend the old file"))
            for key in held:
                found.undecided[key] = f"{plain(found.config.pop(key))} is not possible here: {entry['msg']}"


def _errors(found: Migration) -> list[Any]:
    try:
        found.config_class.model_validate(nested(found.config))
    except ValidationError as error:
        return list(error.errors())
    return []
