"""The reference of all config keys: complete, true to the fields, current on disk, and as JSON schema for editors."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Annotated, Literal

import pytest
from pydantic import Field

from rlhf.commands import inspection
from rlhf.config import keys, load, reference, stages, yaml_reader
from rlhf.config.sections import Section
from rlhf.errors import RlhfError
from rlhf.stages.registry import STAGES

CONFIGS = Path(__file__).parents[1] / "configs"


class Inner(Section):
    """What is inside. And more."""

    size: Annotated[int, Field(ge=1, le=9)] = Field(3, description="of it")


class Base(Section):
    name: str = Field(description="what it is called")


class Outer(Base):
    name: str = "x"
    share: Annotated[float, Field(gt=0, lt=1)] | None = Field(None, description="of the whole")
    kind: Literal["a", "b", "c"] = Field("b", description="which")
    inner: Inner = Field(default_factory=lambda: Inner(size=7))
    rest: Annotated[list[Inner], Field(min_length=2)] = Field(description="more of them")


def test_an_entry_has_the_type_bounds_default_and_meaning_of_its_field():
    found = [(entry.key, entry.kind, entry.default, entry.meaning) for entry in reference.entries(Outer)]
    assert found == [
        ("name", "text", "x", "what it is called"),
        ("share", "number > 0 and < 1, or null", "null", "of the whole"),
        ("kind", "a, b or c", "b", "which"),
        ("inner", "section", "", "What is inside. And more."),
        ("inner.size", "whole number >= 1 and <= 9", "7", "of it"),
        ("rest", "list of sections at least 2", "required", "more of them"),
        ("rest[].size", "whole number >= 1 and <= 9", "3", "of it"),
    ]


@pytest.mark.parametrize("stage", [*STAGES, "pipeline"])
def test_every_key_stands_in_the_reference_and_says_what_it_means(stage):
    config_class = STAGES[stage].config_class if stage in STAGES else stages.PipelineConfig
    found = {entry.key.replace("[]", ""): entry for entry in reference.entries(config_class)}
    assert set(found) == set(load.keys_of(config_class))
    silent = [key for key, entry in found.items() if not entry.meaning and entry.kind != "section"]
    assert silent == [] and not any("|" in entry.meaning + entry.kind for entry in found.values())


def test_the_defaults_are_those_of_a_config_that_sets_nothing():
    config = keys.flatten(stages.PpoConfig.model_validate({"prompts": {"path": "p"}}))
    entries = {entry.key: entry.default for entry in reference.entries(stages.PpoConfig)}
    for key in ("optim.learning_rate", "guards.kl_nats.warn", "kl.coef", "steps", "update.normalise_advantages"):
        assert json.loads(entries[key]) == config[key]
    assert entries["run_dir"] == config["run_dir"] and entries["report_to"] == config["report_to"]


def test_the_document_on_disk_is_current():
    assert (CONFIGS / "REFERENCE.md").read_text() == inspection.reference_of(None, False), (
        "run: rlhf config > configs/REFERENCE.md"
    )


def fits(value, schema, root):
    """A JSON schema's verdict, as far as these schemas go."""
    if "$ref" in schema:
        return fits(value, root["$defs"][schema["$ref"].rpartition("/")[2]], root)
    for word in ("anyOf", "oneOf"):
        if word in schema and not any(fits(value, one, root) for one in schema[word]):
            return False
    if ("enum" in schema and value not in schema["enum"]) or ("const" in schema and value != schema["const"]):
        return False
    number = isinstance(value, int | float) and not isinstance(value, bool)
    kinds = {
        "object": isinstance(value, dict),
        "array": isinstance(value, list),
        "string": isinstance(value, str),
        "boolean": isinstance(value, bool),
        "null": value is None,
        "number": number,
        "integer": number and not isinstance(value, float),
    }
    if not kinds[schema.get("type", next(kind for kind, is_it in kinds.items() if is_it))]:
        return False
    if number and not (
        schema.get("minimum", value) <= value <= schema.get("maximum", value)
        and schema.get("exclusiveMinimum", value - 1) < value < schema.get("exclusiveMaximum", value + 1)
    ):
        return False
    if isinstance(value, list):
        return len(value) >= schema.get("minItems", 0) and all(
            fits(item, schema.get("items", {}), root) for item in value
        )
    if isinstance(value, dict) and "properties" in schema:
        known = schema["properties"]
        return set(schema.get("required", ())) <= set(value) <= set(known) and all(
            fits(item, known[key], root) for key, item in value.items()
        )
    return True


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_the_schema_takes_the_shipped_configs_and_no_wrong_ones(path):
    schema = json.loads(inspection.reference_of(path.stem, True))
    value, _ = yaml_reader.read_file(path)
    assert schema["$schema"] == reference.SCHEMA and fits(value, schema, schema)
    assert not fits({**value, "stps": 1}, schema, schema) and not fits({**value, "seed": "x"}, schema, schema)


@pytest.mark.parametrize(
    ("change", "good"),
    [
        ({"kl": {"coef": 0.0}}, True),
        ({"kl": {"coef": -0.1}}, False),
        ({"report_to": ["wandb"]}, True),
        ({"report_to": ["none"]}, False),
        ({"update": {"clip_range": 1.0}}, False),
        ({"rewards": []}, False),
        ({"prompts": {"mixture": [{"path": "a", "weight": 0.5}]}}, True),
        ({"prompts": {"mixture": [{}]}}, False),
    ],
)
def test_the_schema_and_the_loader_agree(tmp_path, change, good):
    schema = reference.schema(stages.PpoConfig)
    value = {"prompts": {"path": "p"}, **change}
    assert fits(value, schema, schema) is good
    path = tmp_path / "ppo.yaml"
    path.write_text(json.dumps(value))
    if good:
        load.load(stages.PpoConfig, path)
    else:
        with pytest.raises(RlhfError):
            load.load(stages.PpoConfig, path)


def test_the_command_prints_a_stage_and_refuses_what_is_none_without_importing_torch():
    code = (
        "import sys; sys.argv = ['rlhf', 'config', *sys.argv[1:]]\n"
        "from rlhf.cli import main\n"
        "try: main()\n"
        "except SystemExit as stop: print(stop.code, 'torch' in sys.modules)\n"
    )
    for arguments, last in ((["ppo"], "0 False"), (["ppo", "--schema"], "0 False"), (["pppo"], "2 False")):
        found = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True)
        assert found.stdout.splitlines()[-1] == last, found.stderr
        assert ("kl.coef" in found.stdout) == (arguments == ["ppo"])
