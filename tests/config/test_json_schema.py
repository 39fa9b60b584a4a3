import json
from pathlib import Path

import pytest
from example_pipeline import PIPELINE, with_stages
from jsonschema import Draft7Validator

from compressor.config.pipeline_file import json_schema
from compressor.config.yaml_source import parse

DESIGN_EXAMPLE = """\
# yaml-language-server: $schema=pipeline.schema.json
name: digits
seed: 0
model: {factory: digits:teacher}
task:  {factory: digits:task}
stages:
  - stage: training
    epochs: 20
  - stage: distillation
    student: {factory: digits:student}
    losses: {kd: {temperature: 4.0, weight: 0.9}, hard: {weight: 0.1}}
    epochs: 30
  - stage: magnitude_pruning
    pruning_ratio: 0.5
    recovery: {epochs: 10}
  - stage: int8_ptq
    target: portable
  - stage: onnx_export
gate: {size_ratio: {min: 10}, accuracy_drop: {max: 0.01}}
"""


@pytest.fixture(scope="module")
def schema() -> Draft7Validator:
    found = json_schema()
    Draft7Validator.check_schema(found)
    return Draft7Validator(found)


def faults(schema: Draft7Validator, text: str) -> list[str]:
    node, _ = parse(text, Path("p.yaml"))
    assert node is not None
    return [error.message for error in schema.iter_errors(node.plain())]


def test_the_schema_accepts_the_pipeline_of_the_design(schema: Draft7Validator):
    assert faults(schema, DESIGN_EXAMPLE) == []
    assert faults(schema, PIPELINE) == []


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("seed: 0", "sead: 0"),
        ("pruning_ratio: 0.5", "pruning_ratio: 1.5"),
        ("pruning_ratio: 0.5", "prunning_ratio: 0.5"),
        ("temperature", "temprature"),
        ("stage: onnx_export", "stage: onx_export"),
        ("    epochs: 20\n", ""),
        ("name: digits\n", "name: dig/its\n"),
        ("factory: digits:task", "factory: digits"),
        ("size_ratio", "size_ration"),
    ],
)
def test_the_schema_refuses_what_loading_refuses(schema: Draft7Validator, old: str, new: str):
    assert DESIGN_EXAMPLE.count(old) == 1

    assert faults(schema, DESIGN_EXAMPLE.replace(old, new)) != []


def test_the_schema_knows_installed_stages_and_admits_classes_by_name(schema: Draft7Validator):
    assert faults(schema, with_stages("{stage: train, epochs: 1}")) == []
    assert faults(schema, with_stages("{stage: train, epoch: 1}")) != []
    assert faults(schema, with_stages("{stage: my_module:LowRank, rank: 4}")) == []


def test_the_schema_uses_no_word_newer_than_draft_7(schema: Draft7Validator):
    text = json.dumps(schema.schema)

    assert "prefixItems" not in text
    assert "$defs" not in text
