"""Whether the rewards that a policy is to be optimised against were examined, and what the examination is used for."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf.config.rewards import ModelReward, RewardSource, RunReward
from rlhf.errors import Problem, RlhfError
from rlhf.findings import Findings
from rlhf.preflight.neighbours import Nearby
from rlhf.runs import artifacts
from rlhf.runs.artifacts import Manifest

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


@dataclass(frozen=True)
class Rewards:
    """The rewards of a config by their keys, and what stands behind them.

    Args:
        parents: manifests of runs and of examinations (KEY.examination).
        digests: of models from elsewhere (KEY.model).
    """

    sources: Mapping[str, RewardSource]
    parents: Mapping[str, Manifest]
    digests: Mapping[str, str | None]


def source_of(run_dir: str) -> RunReward:
    """A reward run as it is; of an examination the reward run that it is of, with the length calibration fitted there.

    Raises:
        RlhfError: CKP011 where that run is not what was examined any more, or was a model from elsewhere.
    """
    manifest = artifacts.read(run_dir, "reward", "examination")
    artifacts.verify(Path(run_dir), manifest)
    if manifest.kind == "reward":
        return RunReward(run=run_dir)
    if "reward" not in manifest.parents:
        fix = "rewards: [{model: ..., length_calibration: ...}] in a config"
        raise RlhfError(
            Problem("CKP011", run_dir, "is of a model from elsewhere or of several runs, and of no single one.", fix)
        )
    source = RunReward(
        run=manifest.parents["reward"]["run_dir"], head=manifest.identity.get("head"), length_calibration=run_dir
    )
    reward = artifacts.read(source.run, "reward", where=run_dir)
    artifacts.verify(Path(source.run), reward)
    findings = Findings()
    _refuse_another("reward", manifest, Rewards({"reward": source}, {"reward": reward}, {}), findings, run_dir)
    findings.refuse()
    length_calibration(run_dir)
    return source


def check(rewards: Rewards, findings: Findings, nearby: Nearby) -> dict[str, dict[str, Manifest]]:
    """The examinations that no config names. An examination of something else, and one that failed, is a problem; a
    reward that was not examined, or not with success, a note.

    Args:
        nearby: configs of which some may make an examination.
    """
    unnamed = _unnamed(rewards, nearby)
    findings.note(*_unexamined({key: one for key, one in rewards.sources.items() if key not in unnamed}))
    for key, found in unnamed.items():
        for run_dir, examination in found.items():
            was = f"{key} ({rewards.sources[key].name}) was examined in {run_dir} ({_verdict(examination)})"
            names_it = f"name that: {key}.examination: {run_dir} makes it count"
            findings.note(f"{was}, and this config does not {names_it if key.startswith('rewards.') else 'name it'}")
    for key, source in rewards.sources.items():
        manifest = rewards.parents.get(f"{key}.examination")
        place = f"{key}.examination: {source.examination}"
        if manifest and not _refuse_another(key, manifest, rewards, findings, place):
            findings.add(_failed(key, source, manifest, findings))
        if source.length_calibration and (manifest := rewards.parents.get(f"{key}.length_calibration")):
            _refuse_another(key, manifest, rewards, findings, f"{key}.length_calibration: {source.length_calibration}")
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
    unknown = [f"{key} ({one.name})" for key, one in rewards.items() if one.is_learned and not one.examination]
    if not unknown:
        return []
    what = "has not been examined" if len(unknown) == 1 else "have not been examined"
    return [f"{', '.join(unknown)} {what}: rlhf eval-rm says whether it can be optimised against"]


def _unnamed(rewards: Rewards, nearby: Nearby) -> dict[str, dict[str, Manifest]]:
    """For each reward whose config names no examination: run directory -> examination with a verdict on it."""
    silent = {key: one for key, one in rewards.sources.items() if type(one) in MATCHES and not one.examination}
    if not silent:
        return {}
    runs = [Path(run) for one in silent.values() for run in one.named_runs]
    places = {str(path.parent) for run in runs for path in run.parent.glob(MANIFESTS)}
    places |= {one.run_dir for one in nearby() if one.makes == "examination"}
    known = {run_dir: found for run_dir in sorted(places) if (found := _examination(run_dir))}
    matching = {
        key: {run_dir: found for run_dir, found in known.items() if _match(key, found, rewards).same} for key in silent
    }
    return {key: found for key, found in matching.items() if found}


def _examination(run_dir: str) -> Manifest | None:
    """The manifest of a finished examination with a verdict; None for anything else, also for what cannot be read."""
    try:
        manifest = artifacts.read(run_dir, "examination")
    except RlhfError:
        return None
    return manifest if manifest.details.get("verdict") else None


@dataclass(frozen=True)
class Match:
    """Whether an examination is of a certain reward as it is now; if not, what is wrong, or what cannot be checked."""

    same: bool
    what: str = ""
    unchecked: str = ""


def _match_run(key: str, source: RunReward, examination: Manifest, rewards: Rewards) -> Match:
    run, examined = rewards.parents.get(key), examination.parents.get("reward", {})
    if run is None:
        return Match(False)
    if examined.get("digest") != run.digest:
        other = examined.get("run_dir", "a model from elsewhere")
        return Match(False, f"is of another reward model ({other}) than {source.run} as it is now.")
    head = examination.identity.get("head")
    if head != source.head:
        return Match(False, f"is of the head {head or 'score'}, not of {source.head or 'score'}.")
    return Match(True)


def _match_model(key: str, source: ModelReward, examination: Manifest, rewards: Rewards) -> Match:
    digest, examined = rewards.digests.get(f"{key}.model"), examination.identity
    if digest is None:
        return Match(False, unchecked=f"whether it is of {source.model.path}, which is not a local directory")
    if (examined.get("model.files"), examined.get("model.label")) != (digest, source.model.label):
        return Match(False, f"is of another model than {source.model.path} as it is now.")
    return Match(True)


MATCHES: dict[type[RewardSource], Callable[[str, Any, Manifest, Rewards], Match]] = {
    RunReward: _match_run,
    ModelReward: _match_model,
}
"""The kinds of rewards that can be examined, and how an examination is compared with each."""


def _match(key: str, examination: Manifest, rewards: Rewards) -> Match:
    source = rewards.sources[key]
    return MATCHES[type(source)](key, source, examination, rewards)


def _refuse_another(key: str, examination: Manifest, rewards: Rewards, findings: Findings, place: str) -> bool:
    """Whether an examination is of something else, which is a problem."""
    match = _match(key, examination, rewards)
    if match.unchecked:
        findings.not_checked(f"{place}: {match.unchecked}")
    if match.what:
        fix = "examine this one with rlhf eval-rm, and name that run"
        findings.add(Problem("CKP011", place, match.what, fix))
    return bool(match.what)


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
