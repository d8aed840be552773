"""Whether the rewards that a policy is to be optimised against were examined, and passed."""

from __future__ import annotations

from collections.abc import Mapping

from rlhf.artifacts import Manifest
from rlhf.config.rewards import RewardSource
from rlhf.errors import Problem


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
            other = _of_another(key, source, manifest, parents, digests, unchecked)
            problems += [other] if other else _failed(key, source, manifest, warnings)
    return warnings


def _of_another(
    key: str, source: RewardSource, manifest: Manifest, parents: Mapping[str, Manifest],
    digests: Mapping[str, str | None], unchecked: list[str],
) -> Problem | None:  # fmt: skip
    place = f"{key}.examination: {source.examination}"
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
        unchecked.append(f"{key}.examination: whether it is of {source.model.path}, which is not a local directory")
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
    if verdict == "fail" and not source.accept_failed:
        fix = "mend the reward model (the examination says how), or accept_failed: true"
        return [Problem("GRD030", place, f"the reward model failed: {failed}.", fix)]
    if verdict != "pass":
        warnings.append(f"{place}: {'accepted though it failed, ' + failed if verdict == 'fail' else verdict}")
    return []
