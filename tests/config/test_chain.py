import sys
from pathlib import Path

import pytest
from example_pipeline import problems, with_stages

from compressor.config.pipeline_file import load


@pytest.mark.parametrize(
    ("stages", "told"),
    [
        (
            ["stage: export", "{stage: prune, pruning_ratio: 0.5}"],
            ["6:13: prune takes TorchModel, but export gives OnnxModel; move it before export"],
        ),
        (
            ["{stage: prune, pruning_ratio: 0.5}", "stage: quantize", "stage: export", "stage: quantize"],
            ["8:12: quantize takes TorchModel, but export gives OnnxModel; move it before quantize"],
        ),
        (
            ["stage: quantize", "{stage: prune, pruning_ratio: 2}"],
            [
                "6:13: prune takes TorchModel, but quantize gives OnnxModel; move it before quantize",
                "6:35: stages.1.pruning_ratio must be less than 1, got 2",
            ],
        ),
        (
            ["stage: exprt", "{stage: prune, pruning_ratio: 0.5}"],
            ["5:12: unknown stage 'exprt'; did you mean 'export'?"],
        ),
    ],
)
def test_a_stage_in_an_impossible_place_is_told(directory: Path, stages: list[str], told: list[str]):
    assert problems(directory, with_stages(*stages)) == told


def test_two_prunings_and_an_export_of_an_exported_model_are_possible(directory: Path):
    prune = "{stage: prune, pruning_ratio: 0.5}"
    (directory / "p.yaml").write_text(with_stages(prune, prune, "stage: export", "stage: export"))

    assert len(load(directory / "p.yaml").stages) == 4


OWN_STAGE = """\
from __future__ import annotations
from compressor.models.artifact import Artifact, TorchModel
from compressor.stage import Stage, StageContext
from compressor.task import Task
class LowRank(Stage[TorchModel, TorchModel]):
    rank: int
    def apply(self, model: TorchModel, task: Task, context: StageContext) -> TorchModel: ...
class Bare(Stage[TorchModel, TorchModel]):
    pass
class Untyped(Stage[TorchModel, TorchModel]):
    def apply(self, model, task, context): ...
class Mistyped(Stage[TorchModel, TorchModel]):
    def apply(self, model: Tensor, task, context) -> TorchModel: ...
class Either(Stage[TorchModel, Artifact]):
    def apply(self, model: TorchModel, task: Task, context: StageContext) -> Artifact: ...
def function(): ...
"""


def test_a_stage_beside_the_file_is_used_under_its_own_name(directory: Path):
    (directory / "own.py").write_text(OWN_STAGE)
    (directory / "p.yaml").write_text(with_stages("{stage: own:LowRank, rank: 4}"))

    (planned,) = load(directory / "p.yaml").stages

    assert planned.name == "own:LowRank"
    assert planned.stage.rank == 4
    assert "own" not in sys.modules


@pytest.mark.parametrize(
    ("stage", "told"),
    [
        ("own:LowRnk", "own:LowRnk must exist, but own has no 'LowRnk'; did you mean 'LowRank'?"),
        ("own:Bare", "own:Bare must define apply"),
        ("own:Untyped", "Untyped.apply must be annotated like apply(self, model: TorchModel, …) -> TorchModel"),
        ("own:Mistyped", "the annotations of Mistyped.apply must be types that its module imports, but: name 'Tensor'"),
        ("own:function", "own:function must be a subclass of compressor.stage.Stage, got a function"),
        ("own:Task", "own:Task must be a subclass of compressor.stage.Stage, got the class Task"),
        ("onw:LowRank", "there is no module 'onw' in "),
        ("broken:X", "importing broken raised ZeroDivisionError: division by zero ("),
        ("needy:X", "importing needy needs the module 'no_such_package', which must be installed where compressor "),
        ("own:", "must be module:attribute, such as digits:teacher, got 'own:'"),
    ],
)
def test_a_stage_beside_the_file_that_cannot_be_used_is_told(directory: Path, stage: str, told: str):
    (directory / "own.py").write_text(OWN_STAGE)
    (directory / "broken.py").write_text("1 / 0")
    (directory / "needy.py").write_text("import no_such_package")

    (found,) = problems(directory, with_stages(f"stage: '{stage}'"))

    assert found.startswith(f"5:12: {told}")


def test_a_stage_that_may_give_either_artifact_is_followed_only_by_one_that_takes_both(directory: Path):
    (directory / "own.py").write_text(OWN_STAGE)

    assert problems(directory, with_stages("stage: own:Either", "{stage: prune, pruning_ratio: 0.5}")) == [
        "6:13: prune takes TorchModel, but own:Either gives OnnxModel or TorchModel; move it before own:Either"
    ]
    (directory / "p.yaml").write_text(with_stages("stage: own:Either", "stage: export"))
    assert len(load(directory / "p.yaml").stages) == 2
