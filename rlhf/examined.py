"""Whether the rewards that a policy is to be optimised against were examined, and what the examination is used for."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from rlhf import artifacts
from rlhf.artifacts import Manifest
from rlhf.config.rewards import RewardSource
from rlhf.errors import Problem, RlhfError


@dataclass(frozen=True)
class LengthCalibration:
    """score - coef * (tokens of the response - mean_length); coef is in the score of ``rlhf score``, a token."""

    coef: float
    mean_length: float


def length_calibration(run_dir: str) -> LengthCalibration:
    """What an examination fitted.

    Raises:
        RlhfError: CKP013 where it fitted none.
    """
    try:
        found = json.loads((Path(run_dir) / artifacts.EXAMINATION).read_text("utf-8")).get("length_calibration")
    except (OSError, ValueError) as error:
        raise RlhfError(Problem("CKP003", run_dir, f"{artifacts.EXAMINATION} is not readable: {error}.")) from None
    if not found:
        what = "has no length calibration: of a benchmark, made before there were any, or nothing to fit."
        raise RlhfError(Problem("CKP013", run_dir, what, "examine it on comparisons with rlhf eval-rm"))
    return LengthCalibration(float(found["coef"]), float(found["mean_length"]))


def source_of(run_dir: str) -> RewardSource:
    """A reward run as it is; of an examination the reward run that it is of, with the length calibration fitted there.

    Raises:
        RlhfError: CKP011 where that run is not what was examined any more, or was a model from elsewhere.
    """
    manifest = artifacts.read(run_dir, "reward", "examination")
    artifacts.verify(Path(run_dir), manifest)
    if manifest.kind == "reward":
        return RewardSource(run=run_dir)
    if "reward" not in manifest.parents:
        fix = "rewards: [{model: ..., length_calibration: ...}] in a config"
        raise RlhfError(
            Problem("CKP011", run_dir, "is of a model from elsewhere or of several runs, and of no single one.", fix)
        )
    source = RewardSource(
        run=manifest.parents["reward"]["run_dir"], head=manifest.identity.get("head"), length_calibration=run_dir
    )
    assert source.run
    reward = artifacts.read(source.run, "reward", where=run_dir)
    artifacts.verify(Path(source.run), reward)
    if other := _of_another("reward", source, manifest, {"reward": reward}, {}, [], run_dir):
        raise RlhfError(other)
    length_calibration(run_dir)
    return source


def check(
    rewards: Mapping[str, RewardSource], parents: Mapping[str, Manifest], digests: Mapping[str, str | None],
    problems: list[Problem], unchecked: list[str],
) -> list[str]:  # fmt: skip
    """What is to be warned of. An examination of something else, and one that failed, goes to ``problems``.

    Args:
        rewards: by their key; ``parents`` has runs and examinations (KEY.examination), ``digests`` models (KEY.model).
    """
    warnings: list[str] = []
    unknown = [
        f"{key} ({one.name})" for key, one in rewards.items() if not (one.function or one.url or one.examination)
    ]
    if unknown:
        what = "has not been examined" if len(unknown) == 1 else "have not been examined"
        warnings.append(f"{', '.join(unknown)} {what}: rlhf eval-rm says whether it can be optimised against")
    for key, source in rewards.items():
        if manifest := parents.get(f"{key}.examination"):
            place = f"{key}.examination: {source.examination}"
            other = _of_another(key, source, manifest, parents, digests, unchecked, place)
            problems += [other] if other else _failed(key, source, manifest, warnings)
        if manifest := parents.get(f"{key}.length_calibration"):
            assert source.length_calibration
            place = f"{key}.length_calibration: {source.length_calibration}"
            other = _of_another(key, source, manifest, parents, digests, unchecked, place)
            problems += [other] if other else []
            try:
                length_calibration(source.length_calibration)
            except RlhfError as error:
                problems += error.problems
    return warnings


def _of_another(
    key: str, source: RewardSource, manifest: Manifest, parents: Mapping[str, Manifest],
    digests: Mapping[str, str | None], unchecked: list[str], place: str,
) -> Problem | None:  # fmt: skip
    fix = "examine this one with rlhf eval-rm, and name that run"
    if source.run:
        if f"{key}" not in parents or manifest.parents.get("reward", {}).get("digest") == parents[key].digest:
            if manifest.identity.get("head") == source.head:
                return None
            what = f"is of the head {manifest.identity.get('head') or 'score'}, not of {source.head or 'score'}."
            return Problem("CKP011", place, what, fix)
        found = manifest.parents.get("reward", {}).get("run_dir", "a model from elsewhere")
        return Problem("CKP011", place, f"is of another reward model ({found}) than {source.run} as it is now.", fix)
    assert source.model
    theirs, ours = manifest.identity.get("model.files"), digests.get(f"{key}.model")
    if ours is None:
        unchecked.append(f"{place}: whether it is of {source.model.path}, which is not a local directory")
        return None
    same = theirs == ours and manifest.identity.get("model.label") == source.model.label
    return (
        None if same else Problem("CKP011", place, f"is of another model than {source.model.path} as it is now.", fix)
    )


def _failed(key: str, source: RewardSource, manifest: Manifest, warnings: list[str]) -> list[Problem]:
    place = f"{key}.examination: {source.examination}"
    verdict, failed = manifest.details.get("verdict"), ", ".join(manifest.details.get("failed", []))
    if verdict is None:
        what = "has no verdict: it is of a benchmark, or was made before there were verdicts."
        return [Problem("CKP003", place, what, "an examination on comparisons")]
    if verdict == "fail" and not source.accept:
        fix = "mend the reward model (the examination says how), or accept: failed"
        return [Problem("GRD030", place, f"the reward model failed: {failed}.", fix)]
    if verdict != "pass":
        warnings.append(f"{place}: {'accepted though it failed, ' + failed if verdict == 'fail' else verdict}")
    return []
