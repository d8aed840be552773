"""The models that a stage starts from, by their files: which they are, and whether they belong together."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from rlhf.config.rewards import ClassifierSection, RewardSource
from rlhf.config.sections import ModelSection
from rlhf.demo import catalogue as demo
from rlhf.errors import Problem, RlhfError
from rlhf.findings import Findings
from rlhf.hub import connection, model_files, names
from rlhf.preflight import resources
from rlhf.runs import artifacts
from rlhf.runs.artifacts import Manifest

START = "init_from"
CONSENT = "RLHF_TRUST_REMOTE_CODE"


def check_other_bases(parents: Mapping[str, Manifest], findings: Findings) -> None:
    """A parent on another base than the first one's gets a model of its own, which must be what it was made on."""
    bases = [(key, manifest.base) for key, manifest in parents.items() if manifest.base]
    for key, base in bases[1:]:
        if base.digest == bases[0][1].digest or demo.is_demo(base.source):
            continue
        if not names.exists(base.source):
            findings.not_checked(f"{key}: its base {base.source} is not a local directory, taken for a hub id")
        elif (found := artifacts.model_digest(Path(base.source))) != base.digest:
            what = f"{base.source} is not the base of this run: digest {found[:12]}, made on {base.digest[:12]}."
            findings.add(Problem("MOD020", key, what, "restore the model, or make the run again"))


def libraries(model: ModelSection | None, parents: Mapping[str, Manifest]) -> list[Problem]:
    """What reads a quantised base; said once."""
    wanted: list[tuple[str, str | None]] = [("model.quantize", model.quantize)] if model else []
    wanted += [(f"{key}: base", manifest.base.quantize) for key, manifest in parents.items() if manifest.base]
    found = [resources.library_problem(quantize, where) for where, quantize in wanted]
    return [problem for problem in found if problem][:1]


def adapter_of_another(model: ModelSection | None, parents: Mapping[str, Manifest]) -> list[Problem]:
    """MOD021 for an adapter to start from that was made on another model, or with another template."""
    base = parents["adapter"].base if "adapter" in parents else None
    if base is None or model is None or not (demo.is_demo(model.path) or names.exists(model.path)):
        return []
    directory = demo.resolve_model(model.path) if demo.is_demo(model.path) else Path(model.path)
    if (artifacts.model_digest(directory), model.chat_template) == (base.digest, base.chat_template):
        return []
    what = f"made on another model or template ({base.source}) than model.path ({model.path})."
    return [Problem("MOD021", "adapter", what, f"model.path: {base.source}")]


def start_of_another(
    parents: Mapping[str, Manifest], members: int, trains_whole: bool, heads: Sequence[str]
) -> list[Problem]:
    """MOD021 for a reward run to start from on another base than the policy's, CFG032 for one with other members or
    heads.

    A model whose every weight is trained may start from any run with the same template; whether it has the same tokens
    is seen when it is loaded.
    """
    if START not in parents or "policy" not in parents:
        return []
    start, policy = parents[START], parents["policy"].base
    if start.base is None or policy is None:
        return []
    problems = []
    same = trains_whole or start.base.digest == policy.digest
    if not same or start.base.chat_template != policy.chat_template:
        what = f"made on another base or template ({start.base.source}) than the policy's ({policy.source})."
        problems.append(Problem("MOD021", START, what, "a reward run on the same base"))
    count = start.details.get("members", 1)
    if count not in (1, members):
        what = f"has {count} members, and members is {members}."
        problems.append(Problem("CFG032", START, what, f"members: {count}, or a run with one member"))
    problems += missing_heads(START, start, heads)
    return problems


def heads(sources: Mapping[str, RewardSource], parents: Mapping[str, Manifest]) -> list[Problem]:
    """CFG032 where a reward is to be a head that its run has not."""
    return [
        problem
        for key, source in sources.items()
        if source.head is not None
        for place in source.runs_below(key)
        if place in parents
        for problem in missing_heads(f"{place}.head", parents[place], (source.head,))
    ]


def missing_heads(key: str, manifest: Manifest, wanted: Sequence[str]) -> list[Problem]:
    """CFG032 for heads that a reward run has not."""
    known = manifest.details.get("heads", ["score"])
    missing = ", ".join(repr(name) for name in wanted if name not in known)
    return [Problem("CFG032", key, f"the run has no head {missing}.", f"one of {', '.join(known)}")] if missing else []


def aggregates(sources: Mapping[str, RewardSource], parents: Mapping[str, Manifest]) -> list[Problem]:
    """CFG031 where the members of a reward run are to be aggregated, and it has one."""
    return [
        Problem(
            "CFG031",
            f"{key}.aggregate",
            f"{source.aggregate} needs several members, and {source.name} has one.",
            "a reward run with members: 3 or more, or runs: several of them",
        )
        for key, source in sources.items()
        if source.aggregate != "mean" and key in parents and parents[key].details.get("members", 1) == 1
    ]


def base_digest(key: str, model: ModelSection, findings: Findings) -> str | None:
    """Of the files of a base that is here; None for one that is not, or that is refused."""
    if demo.is_demo(model.path):
        return artifacts.model_digest(demo.resolve_model(model.path))
    return _digest(key, model, findings)


def classifier_digest(key: str, model: ClassifierSection, findings: Findings) -> str | None:
    """The same for a model from elsewhere."""
    digest = _digest(key, model, findings)
    if digest is not None:
        findings.add(model_files.no_classifier(Path(model.path), key))
    return digest


def _digest(key: str, model: ModelSection | ClassifierSection, findings: Findings) -> str | None:
    refused = [
        names.refused(model.path, f"{key}.path", "MOD001"),
        names.refused_revision(model.revision, f"{key}.revision"),
        names.unpinned_code(model.trust_remote_code, model.revision, f"{key}.trust_remote_code"),
    ]
    findings.add(*refused)
    if any(refused):
        return None
    if names.exists(model.path):
        return artifacts.model_digest(Path(model.path))
    findings.not_checked(f"{key} {model.path}: not a local directory, taken for a hub id")
    return None


def model_of(manifest: Manifest) -> ModelSection:
    """The model section that a finished run was made with.

    Raises:
        RlhfError: SEC010 where the run says that its base's own code is to be run, and this machine does not.
    """
    base = manifest.base
    assert base is not None, "policies and rewards have a base"
    if base.trust_remote_code and os.environ.get(CONSENT) != "1":
        what = "the run was made on a model with Python code of its own."
        raise RlhfError(Problem("SEC010", base.source, what, f"{CONSENT}=1 in the environment, if you trust that code"))
    return ModelSection.model_validate(
        {
            "path": base.source,
            "revision": base.revision,
            "dtype": base.dtype,
            "chat_template": base.chat_template,
            "attn_implementation": base.attn_implementation,
            "trust_remote_code": base.trust_remote_code,
            "quantize": base.quantize,
            "end_tokens": base.end_tokens or [],
            "template_date": base.template_date,
            "thinking": base.thinking,
            "template_kwargs": base.template_kwargs,
        }
    )


def not_reached(
    models: Sequence[tuple[str, ModelSection | ClassifierSection]], parents: Mapping[str, Manifest]
) -> list[Problem]:
    """MOD001 for each hub model, of the config or of a run that it starts from, that neither hub nor cache gives."""
    wanted = [(f"{key}.path", model.path, model.revision) for key, model in models]
    wanted += [(f"{key}: base", run.base.source, run.base.revision) for key, run in parents.items() if run.base]
    found = [
        connection.model_problem(f"{where}: {name}", name, revision)
        for where, name, revision in wanted
        if not (demo.is_demo(name) or names.exists(name))
        if not (names.refused(name, where, "MOD001") or names.refused_revision(revision, where))
    ]
    return [problem for problem in found if problem]


def directory_digest(key: str, path: str, findings: Findings) -> str | None:
    """Of all files of a directory; None where one cannot be read."""
    try:
        return artifacts.directory_digest(Path(path))
    except OSError as error:
        findings.add(Problem("CKP001", f"{key}: {path}", f"cannot be read: {error.strerror}.", "name a directory"))
        return None
