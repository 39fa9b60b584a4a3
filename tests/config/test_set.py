from pathlib import Path

import pytest
from example_pipeline import PIPELINE, changed, problems

from compressor.config.pipeline_file import load
from compressor.references.reference import Reference


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("stages.2.pruning_ratio=1.5", "stages.2.pruning_ratio must be less than 1, got 1.5"),
        ("stages.2.prunning_ratio=0.7", "unknown key 'prunning_ratio' in stages.2; did you mean 'pruning_ratio'?"),
        ("stage.2.pruning_ratio=0.7", "unknown key 'stage'; did you mean 'stages'?"),
        ("gate.size_ration.min=2", "unknown key 'size_ration' in gate; did you mean 'size_ratio'?"),
        (
            "stages.9.epochs=2",
            "the place in stages must be a number from 0 to 4, got '9'; there are 5 stages: 0 (train), 1 (distill), ",
        ),
        (
            "stages.prune.epochs=2",
            "the place in stages must be a number from 0 to 4, got 'prune'; there are 5 stages: 0 (train), ",
        ),
        ("model.factory.x=2", "model.factory is 'digits:teacher', so it has no 'x'"),
        ("model.widht=2", "digits:teacher (digits.py:2) has no argument 'widht'; did you mean 'width'?"),
        ("task.data_dir=none", "task.data_dir must exist, but "),
        ("seed='1'", "seed must be an integer, got '1'"),
        ("seed=!!int 1", "tags are not allowed, got 'tag:yaml.org,2002:int'; write the plain value"),
        ("stages.2.pruning_ratio=.inf", "a number must be finite, got .inf"),
        ("stages.2={stage: prune, pruning_ratio: 0.5, x: 1}", "unknown key 'x' in stages.2; known are "),
        ("stages.2=[1", "while parsing a flow sequence, "),
        ("seed=", "must hold a value, got nothing"),
        ("seed", "must be path=value, such as seed=1"),
    ],
)
def test_a_fault_in_set_is_told_with_the_argument_itself(directory: Path, override: str, told: str):
    (found,) = problems(directory, PIPELINE, override)

    assert found.startswith(f"--set {override!r}: {told}")


def test_set_changes_and_adds_values_with_their_types(directory: Path):
    overrides = [
        "stages.2.pruning_ratio=0.7",
        "stages.2.recovery={epochs: 3}",
        "gate.latency_ratio.min=2",
        "model.width=32",
        "seed=1",
        "seed=2",
    ]

    pipeline = load(directory / "p.yaml", overrides)

    assert pipeline.stages[2].stage.pruning_ratio == 0.7
    assert pipeline.stages[2].stage.recovery.epochs == 3
    assert pipeline.gate is not None
    assert pipeline.gate.latency_ratio.min == 2
    assert pipeline.model == Reference(factory="digits:teacher", width=32)
    assert pipeline.seed == 2
    assert pipeline.overrides == tuple(overrides)


def test_set_can_mend_what_the_file_has_wrong(directory: Path):
    (directory / "p.yaml").write_text(changed("0.5", "1.5"))

    assert load(directory / "p.yaml", ["stages.2.pruning_ratio=0.5"]).stages[2].stage.pruning_ratio == 0.5
