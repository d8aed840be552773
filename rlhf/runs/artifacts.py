"""What a finished run is on disk: its files, and the manifest that is written last and says what they are."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from rlhf import __version__
from rlhf.config import recorded
from rlhf.errors import Problem, RlhfError
from rlhf.runs import storage
from rlhf.runs.progress import waiting

FORMAT = 1
MANIFEST, CONFIG, STARTED = recorded.MANIFEST, recorded.CONFIG, recorded.STARTED
METRICS, LOG, LOCK = "metrics.jsonl", "run.log", ".lock"
ADAPTER, MODEL, HEAD, MEMBERS, TOKENIZER, CHECKPOINTS, SAMPLES, PLOTS = (
    "adapter",
    "model",
    "head",
    "members",
    "tokenizer",
    "checkpoints",
    "samples",
    "plots",
)
PREFERENCES, EXAMINATION, CONTRADICTED = "preferences.jsonl", "eval.json", "contradicted.jsonl"
FIGURES = "figures.txt"
ANNOTATORS, RUBRIC = "annotators.json", "rubric.yaml"
VERDICTS = ("verdict", "verdicts")
PARTS = (ADAPTER, MODEL, HEAD, MEMBERS, TOKENIZER, CHECKPOINTS, SAMPLES, PLOTS)
HASHED = (ADAPTER, MODEL, HEAD, MEMBERS, TOKENIZER, PREFERENCES, EXAMINATION, RUBRIC)
FAILED_GATES = "failed_gates"
PACKAGES = ("torch", "transformers", "trl", "peft", "datasets", "accelerate", "safetensors")


@dataclass(frozen=True)
class BaseIdentity:
    """The frozen model that an adapter belongs to.

    Args:
        end_tokens: that end a response besides the one that the template writes; None: a run of an older version, whose
            responses end with that one alone.
        template_date: YYYY-MM-DD, which its template prints for today; None: it prints no date, or an older version
            made the run.
    """

    source: str
    digest: str
    dtype: str
    revision: str | None = None
    chat_template: str | None = None
    attn_implementation: str | None = None
    trust_remote_code: bool = False
    quantize: str | None = None
    end_tokens: list[str] | None = None
    template_date: str | None = None
    thinking: str = "strip"
    template_kwargs: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Manifest:
    """Proof of what a run directory holds.

    Args:
        kind: policy, reward, preferences or examination.
        stage: the command that made it.
        identity: every input by name (config keys, data and parent digests); equal identity, equal run.
        base: the frozen model, for policies and rewards; of a run that trained every weight, its own MODEL.
        parents: role -> {"run_dir", "digest"} of the runs it was made from.
        metrics: the figures measured at the end.
        files: path inside the run -> {"sha256", "size"}.
        details: what the kind needs beyond (selected step, head names, dropped rows).
    """

    kind: str
    stage: str
    seed: int
    identity: dict[str, Any]
    metrics: dict[str, Any]
    seconds: float
    base: BaseIdentity | None = None
    parents: dict[str, dict[str, str]] = field(default_factory=dict)
    details: dict[str, Any] = field(default_factory=dict)
    files: dict[str, dict[str, Any]] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    created: str = ""
    format: int = FORMAT

    @property
    def digest(self) -> str:
        """Identity of the artifact: its kind, base and file contents, not when or where it was made."""
        contents = {path: _identity_of(entry) for path, entry in self.files.items()}
        base = self.base.digest if self.base else None
        return storage.sha256_json({"kind": self.kind, "base": base, "files": contents})


def write(run_dir: Path, manifest: Manifest) -> Manifest:
    """Hash the artifact's files and write ``manifest.json``, the last file of a run."""
    complete = Manifest(
        **{name: getattr(manifest, name) for name in _names() if name not in ("files", "versions", "created")},
        files=file_table(run_dir),
        versions={"rlhf": __version__, **{name: metadata.version(name) for name in PACKAGES}},
        created=datetime.now(UTC).isoformat(timespec="seconds"),
    )
    storage.write_json(run_dir / MANIFEST, asdict(complete))
    return complete


def file_table(run_dir: Path) -> dict[str, dict[str, Any]]:
    """Size and SHA-256 of every file that makes up the artifact, and of an examination the digest of its figures."""
    paths = [path for name in HASHED if (top := run_dir / name).exists() for path in (sorted(top.rglob("*")) or [top])]
    return {path.relative_to(run_dir).as_posix(): _entry(path) for path in paths if path.is_file()}


def _entry(path: Path) -> dict[str, Any]:
    figures = {"figures": figures_digest(json.loads(path.read_text("utf-8")))} if path.name == EXAMINATION else {}
    return {"sha256": storage.sha256(path), "size": path.stat().st_size, **figures}


def _identity_of(entry: Mapping[str, Any]) -> str:
    """What a file counts as in the artifact's digest. The verdicts of an examination do not count: it may be judged
    again by other thresholds, and is the same examination then."""
    return str(entry.get("made_as") or entry.get("figures") or entry["sha256"])


def figures_digest(report: Mapping[str, Any]) -> str:
    """Digest of an examination without its verdicts."""
    return storage.sha256_json({key: value for key, value in report.items() if key not in VERDICTS})


def judged_again(run_dir: Path, manifest: Manifest, report: Mapping[str, Any]) -> Manifest:
    """Write an examination's report with other verdicts; the manifest that comes back is still to be written.

    Manifest and report fit together at every moment in between: the figures are what is verified. In a manifest that
    has no digest of them, of an older version, the digest of the file as it was made is kept as what it counts as.
    """
    entry = manifest.files[EXAMINATION]
    if "figures" not in entry:
        entry = {**entry, "made_as": entry["sha256"], "figures": figures_digest(report)}
        rewrite(run_dir, replace(manifest, files={**manifest.files, EXAMINATION: entry}))
    storage.write_json(run_dir / EXAMINATION, report)
    entry = {**entry, **_entry(run_dir / EXAMINATION)}
    return replace(manifest, files={**manifest.files, EXAMINATION: entry})


def write_config(run_dir: Path, text: str) -> None:
    """The config that a run keeps of itself."""
    storage.write_text(run_dir / CONFIG, text)


def rewrite(run_dir: Path, manifest: Manifest) -> None:
    """Replace the manifest of a finished run whose files stay what they are."""
    storage.write_json(run_dir / MANIFEST, asdict(manifest))


def adapter_of(run_dir: str | Path) -> Path | None:
    """A policy's or reward model's adapter on its base (of an ensemble the first member's); None where the run is a
    whole model, its own base."""
    return None if (Path(run_dir) / MODEL).is_dir() else members_of(run_dir)[0] / ADAPTER


def head_of(run_dir: str | Path) -> Path:
    """A reward model's head; of an ensemble the first member's."""
    return members_of(run_dir)[0] / HEAD


def members_of(run_dir: str | Path) -> list[Path]:
    """What holds adapter and head of each member of a reward run: the run itself, where it is no ensemble."""
    found = (Path(run_dir) / MEMBERS).glob("[0-9]*")
    return sorted(found, key=lambda path: int(path.name)) or [Path(run_dir)]


def rubric_of(run_dir: str | Path) -> Path | None:
    """The labelling rubric that a run carries; None where it has none."""
    path = Path(run_dir) / RUBRIC
    return path if path.is_file() else None


def member_directory(run_dir: Path, index: int, count: int) -> Path:
    """Where member ``index`` of ``count`` is written."""
    return run_dir if count == 1 else run_dir / MEMBERS / str(index)


def is_finished(run_dir: Path) -> bool:
    return storage.is_file(run_dir / MANIFEST)


def read(run_dir: str | Path, *kinds: str, where: str = "") -> Manifest:
    """The manifest of a finished run of one of ``kinds`` (any, if none is named).

    Raises:
        RlhfError: CKP001 no such run, CKP002 unfinished, CKP003 unreadable or of another format, CKP004 wrong kind.
    """
    run_dir = Path(run_dir)
    place = f"{where}: {run_dir}" if where else str(run_dir)
    if not os.path.isdir(run_dir):  # noqa: PTH112
        raise RlhfError(Problem("CKP001", place, "no such run directory.", "run the stage that makes it first"))
    if not is_finished(run_dir):
        raise RlhfError(Problem("CKP002", place, f"unfinished: it has no {MANIFEST}.", "run its stage to the end"))
    try:
        value = json.loads((run_dir / MANIFEST).read_text("utf-8"))
        if value["format"] != FORMAT:
            what = f"manifest format {value['format']}, this version reads {FORMAT}."
            raise RlhfError(Problem("CKP003", place, what, "use the rlhf version that wrote it"))
        base = BaseIdentity(**value.pop("base")) if value.get("base") else value.pop("base", None)
        manifest = Manifest(**value, base=base)
    except (ValueError, KeyError, TypeError) as error:
        raise RlhfError(
            Problem("CKP003", place, f"{MANIFEST} is not readable: {error}.", "make the run again")
        ) from None
    if kinds and manifest.kind not in kinds:
        what = f"is a {manifest.kind} run (made by rlhf {manifest.stage}), needed: {' or '.join(kinds)}."
        raise RlhfError(Problem("CKP004", place, what, "name another run"))
    return manifest


def failed_gates(manifest: Manifest, where: str = "") -> list[Problem]:
    """The gates that a finished run did not pass when it was last judged; ``where`` replaces the place."""
    return [Problem(**{**one, "where": where or one["where"]}) for one in manifest.details.get(FAILED_GATES, [])]


@waiting("Comparing the files of a run with its manifest")
def verify(run_dir: Path, manifest: Manifest) -> None:
    """Raise CKP005 naming every file that is missing or differs from the manifest.

    A run is what stands in its directory (which may itself be reached through a link): a listed name or a symbolic
    link that leads out of it is SEC009, and is not followed.
    """
    problems = _leading_out(run_dir, manifest)
    if problems:
        raise RlhfError(*problems)
    for name, entry in manifest.files.items():
        path = run_dir / name
        if not path.is_file():
            problems.append(
                Problem("CKP005", str(path), "missing, though the manifest lists it.", "make the run again")
            )
        elif _differs(path, entry):
            what = "differs from what the manifest says (size or SHA-256)."
            problems.append(Problem("CKP005", str(path), what, "restore the file, or make the run again"))
    if problems:
        raise RlhfError(*problems)


def _differs(path: Path, entry: Mapping[str, Any]) -> bool:
    if "figures" not in entry:
        return bool(path.stat().st_size != entry["size"] or storage.sha256(path) != entry["sha256"])
    try:
        return bool(figures_digest(json.loads(path.read_text("utf-8"))) != entry["figures"])
    except (ValueError, AttributeError):
        return True


def _leading_out(run_dir: Path, manifest: Manifest) -> list[Problem]:
    home = Path(os.path.realpath(run_dir))
    tops = [run_dir / name for name in (MANIFEST, CONFIG, *HASHED)]
    held = [path for top in tops for path in (top, *(top.rglob("*") if not top.is_symlink() else ()))]
    paths = sorted({*held, *(run_dir / name for name in manifest.files)})
    return [
        Problem("SEC009", str(path), "leads out of the run directory.", "put the file itself there")
        for path in paths
        if not Path(os.path.realpath(path)).is_relative_to(home)
    ]


def model_digest(directory: Path) -> str:
    """Digest of a model directory: its weights, config, tokenizer and chat template, by content."""
    names = ("config.json", "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "chat_template.jinja")
    files = [directory / name for name in names] + sorted(directory.glob("*.safetensors"))
    return storage.sha256_json({path.name: storage.sha256(path) for path in files if path.is_file()})


def directory_digest(directory: Path) -> str:
    """Digest of every file of a directory, by name and content; of a file, its own."""
    if directory.is_file():
        return storage.sha256(directory)
    files = sorted(path for path in directory.rglob("*") if path.is_file())
    return storage.sha256_json({path.relative_to(directory).as_posix(): storage.sha256(path) for path in files})


def is_plain_adapter(directory: str) -> bool:
    """Whether it is an adapter as PEFT writes it, and no run."""
    return storage.is_file(Path(directory) / "adapter_config.json")


def _names() -> list[str]:
    return [item.name for item in fields(Manifest)]
