"""Whether the rewards that a policy is to be optimised against were examined, and what the examination is used for."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf import artifacts
from rlhf.artifacts import Manifest
from rlhf.config.rewards import RewardSource
from rlhf.errors import Problem, RlhfError
from rlhf.findings import Findings
from rlhf.neighbours import Nearby

FAIL = "fail"
ACCEPTED = "accepted"
MANIFESTS = f"*/{artifacts.MANIFEST}"
Mark = dict[str, Any]


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
    if other := _of_another("reward", source, manifest, {"reward": reward}, {}, Findings(), run_dir):
        raise RlhfError(other)
    length_calibration(run_dir)
    return source


def check(
    rewards: Mapping[str, RewardSource],
    parents: Mapping[str, Manifest],
    digests: Mapping[str, str | None],
    findings: Findings,
    nearby: Nearby,
) -> dict[str, dict[str, Manifest]]:
    """The examinations that no config names. An examination of something else, and one that failed, is a problem; a
    reward that was not examined, or not with success, a note.

    Args:
        rewards: by their key; ``parents`` has runs and examinations (KEY.examination), ``digests`` models (KEY.model).
        nearby: configs of which some may make an examination.
    """
    unnamed = _unnamed(rewards, parents, digests, nearby)
    findings.note(*_unexamined({key: one for key, one in rewards.items() if key not in unnamed}))
    findings.note(
        *(
            f"{key} ({rewards[key].name}) was examined in {run_dir} ({_verdict(manifest)}), and this config does not "
            + (f"name that: {key}.examination: {run_dir} makes it count" if key.startswith("rewards.") else "name it")
            for key, found in unnamed.items()
            for run_dir, manifest in found.items()
        )
    )
    for key, source in rewards.items():
        if manifest := parents.get(f"{key}.examination"):
            place = f"{key}.examination: {source.examination}"
            other = _of_another(key, source, manifest, parents, digests, findings, place)
            findings.add(other or _failed(key, source, manifest, findings))
        if manifest := parents.get(f"{key}.length_calibration"):
            assert source.length_calibration
            place = f"{key}.length_calibration: {source.length_calibration}"
            findings.add(_of_another(key, source, manifest, parents, digests, findings, place))
            with findings.gathering():
                length_calibration(source.length_calibration)
    return unnamed


def accepted(rewards: Mapping[str, RewardSource], parents: Mapping[str, Manifest], run_dir: str) -> list[Mark]:
    """What a manifest says of rewards that failed their examination and are used nonetheless."""
    return [
        {"run": run_dir, "reward": source.name, "examination": source.examination, "failed": manifest.details["failed"]}
        for key, source in rewards.items()
        if source.accept and (manifest := parents.get(f"{key}.examination"))
        if manifest.details.get("verdict") == FAIL
    ]


def inherited(manifests: Iterable[Manifest]) -> list[Mark]:
    """The same of the runs that a run is made from, each reward once."""
    found: list[Mark] = []
    for manifest in manifests:
        found += [mark for mark in manifest.details.get(ACCEPTED, []) if mark not in found]
    return found


def marks(manifest: Manifest) -> list[str]:
    """What every table about a run says, where a reward behind it failed its examination."""
    return [
        f"{mark['run']} was optimised against {mark['reward']}, which failed its examination {mark['examination']} "
        f"({', '.join(mark['failed'])}); accept: failed let it go on"
        for mark in manifest.details.get(ACCEPTED, [])
    ]


def marks_of(sources: Iterable[str]) -> list[str]:
    """The same for whatever of ``sources`` is a finished run, each sentence once."""
    found = [one for source in sources if artifacts.is_finished(Path(source)) for one in marks(artifacts.read(source))]
    return list(dict.fromkeys(found))


def _unexamined(rewards: Mapping[str, RewardSource]) -> list[str]:
    unknown = [
        f"{key} ({one.name})" for key, one in rewards.items() if not (one.function or one.url or one.examination)
    ]
    if not unknown:
        return []
    what = "has not been examined" if len(unknown) == 1 else "have not been examined"
    return [f"{', '.join(unknown)} {what}: rlhf eval-rm says whether it can be optimised against"]


def _unnamed(
    rewards: Mapping[str, RewardSource], parents: Mapping[str, Manifest], digests: Mapping[str, str | None],
    nearby: Nearby,
) -> dict[str, dict[str, Manifest]]:  # fmt: skip
    """For each reward whose config names no examination: run directory -> examination with a verdict on it."""
    silent = {key: one for key, one in rewards.items() if (one.run or one.model) and not one.examination}
    if not silent:
        return {}
    places = {str(path.parent) for one in silent.values() if one.run for path in Path(one.run).parent.glob(MANIFESTS)}
    places |= {one.run_dir for one in nearby() if one.makes == "examination"}
    known = {run_dir: found for run_dir in sorted(places) if (found := _examination(run_dir))}
    matching = {
        key: {run_dir: found for run_dir, found in known.items() if _is_of(key, source, found, parents, digests)}
        for key, source in silent.items()
    }
    return {key: found for key, found in matching.items() if found}


def _examination(run_dir: str) -> Manifest | None:
    """The manifest of a finished examination with a verdict; None for anything else, also for what cannot be read."""
    try:
        manifest = artifacts.read(run_dir, "examination")
    except RlhfError:
        return None
    return manifest if manifest.details.get("verdict") else None


def _is_of(
    key: str, source: RewardSource, manifest: Manifest, parents: Mapping[str, Manifest],
    digests: Mapping[str, str | None],
) -> bool:  # fmt: skip
    """Whether the examination is of this very reward as it is now."""
    if source.run:
        same = key in parents and manifest.parents.get("reward", {}).get("digest") == parents[key].digest
        return same and manifest.identity.get("head") == source.head
    ours = digests.get(f"{key}.model")
    assert source.model
    same = ours is not None and manifest.identity.get("model.files") == ours
    return same and manifest.identity.get("model.label") == source.model.label


def _of_another(
    key: str, source: RewardSource, manifest: Manifest, parents: Mapping[str, Manifest],
    digests: Mapping[str, str | None], findings: Findings, place: str,
) -> Problem | None:  # fmt: skip
    fix = "examine this one with rlhf eval-rm, and name that run"
    if _is_of(key, source, manifest, parents, digests) or (source.run and key not in parents):
        return None
    if source.run:
        if manifest.parents.get("reward", {}).get("digest") == parents[key].digest:
            what = f"is of the head {manifest.identity.get('head') or 'score'}, not of {source.head or 'score'}."
            return Problem("CKP011", place, what, fix)
        found = manifest.parents.get("reward", {}).get("run_dir", "a model from elsewhere")
        return Problem("CKP011", place, f"is of another reward model ({found}) than {source.run} as it is now.", fix)
    assert source.model
    if digests.get(f"{key}.model") is None:
        findings.not_checked(f"{place}: whether it is of {source.model.path}, which is not a local directory")
        return None
    return Problem("CKP011", place, f"is of another model than {source.model.path} as it is now.", fix)


def failure(key: str, reward: str, run_dir: str, manifest: Manifest) -> Problem:
    """GRD030: what failed, and the three ways on."""
    fix = (
        f"improve the reward model as {run_dir} says for each figure; or judge by other thresholds (rlhf eval-rm "
        f"scores nothing again for that); or go on knowingly with {key}.accept: failed"
    )
    what = f"the reward model {reward} failed: {', '.join(manifest.details.get('failed', []))}."
    return Problem("GRD030", f"{key}.examination: {run_dir}", what, fix)


def _failed(key: str, source: RewardSource, manifest: Manifest, findings: Findings) -> Problem | None:
    assert source.examination
    place = f"{key}.examination: {source.examination}"
    verdict = manifest.details.get("verdict")
    if verdict is None:
        what = "has no verdict: it is of a benchmark, or was made before there were verdicts."
        return Problem("CKP003", place, what, "an examination on comparisons")
    if verdict == FAIL and not source.accept:
        return failure(key, source.name, source.examination, manifest)
    if verdict == FAIL:
        findings.note(f"{place}: accepted though it failed, {', '.join(manifest.details.get('failed', []))}")
    elif verdict != "pass":
        findings.note(f"{place}: {verdict}")
    return None


def _verdict(manifest: Manifest) -> str:
    failed = ", ".join(manifest.details.get("failed", []))
    return f"verdict: {manifest.details['verdict']}{f', by {failed}' if failed else ''}"
