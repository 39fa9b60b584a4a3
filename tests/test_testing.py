import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from torch import nn

from compressor.config.chain import find_stage
from compressor.config.installed_stages import describe_stages, stage_names
from compressor.models.artifact import OnnxModel, TorchModel
from compressor.models.kept_zeros import KeptZeros
from compressor.references.reference import Reference
from compressor.stage import Stage, StageContext
from compressor.task import Task
from compressor.testing import check_stage
from processes import run_python

PLAIN = Reference(factory="networks:PlainNetwork")

PACKAGE = '''
"""A stage of somebody else."""

import copy
from typing import final

import torch
from pydantic import Field

from compressor import Stage, StageContext, Task, TorchModel


@final
class Rounding(Stage[TorchModel, TorchModel]):
    """Round every parameter to a grid."""

    step: float = Field(gt=0)

    def apply(self, model: TorchModel, task: Task, context: StageContext) -> TorchModel:
        rounded = copy.deepcopy(model.module)
        with torch.no_grad():
            for parameter in rounded.parameters():
                parameter.copy_((parameter / self.step).round() * self.step)
        return model.with_module(rounded)
'''

USE = """
from compressor.models.artifact import TorchModel
from compressor.references.reference import Reference
from compressor.testing import check_stage
from rounding_stage import Rounding
from conftest import digits_task
model = TorchModel.build(Reference(factory="networks:PlainNetwork"), seed=0)
check_stage(Rounding(step=0.5), model, digits_task.__wrapped__())
"""


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """A directory into which pip installed a package that offers a stage."""
    directory = tmp_path_factory.mktemp("third_party")
    wheel = directory / "rounding_stage-1.0-py3-none-any.whl"
    files = {
        "rounding_stage.py": PACKAGE,
        "rounding_stage-1.0.dist-info/METADATA": "Metadata-Version: 2.1\nName: rounding-stage\nVersion: 1.0\n",
        "rounding_stage-1.0.dist-info/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        "rounding_stage-1.0.dist-info/entry_points.txt": "[compressor.stages]\nrounding = rounding_stage:Rounding\n",
        "rounding_stage-1.0.dist-info/RECORD": "",
    }
    with zipfile.ZipFile(wheel, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    target = directory / "site"
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--target", str(target), str(wheel)]
    subprocess.run([*pip, "--disable-pip-version-check"], check=True)
    return target


def python(site: Path, *arguments: str | Path) -> subprocess.CompletedProcess:
    return run_python(*arguments, PYTHONPATH=os.pathsep.join([str(site), str(Path(__file__).parent)]))


def test_installed_stage_is_listed_and_accepted_in_a_pipeline(site, tmp_path):
    assert "Round every parameter to a grid." in python(site, "-m", "compressor", "stages").stdout
    pipeline = "name: a\nmodel: {factory: networks:PlainNetwork}\ntask: {factory: networks:not_a_module}\nstages:\n"
    (tmp_path / "good.yaml").write_text(pipeline + "  - {stage: rounding, step: 0.1}\n")
    (tmp_path / "bad.yaml").write_text(pipeline + "  - {stage: rounding, stp: 0.1}\n")
    good, bad = (
        python(site, "-m", "compressor", "check", tmp_path / name, "--runs", tmp_path)
        for name in ("good.yaml", "bad.yaml")
    )
    assert good.returncode == 0, good.stderr
    assert bad.returncode == 2
    assert "did you mean 'step'?" in bad.stderr


def test_installed_stage_keeps_the_contract(site, tmp_path):
    (tmp_path / "use.py").write_text(USE)
    used = python(site, tmp_path / "use.py")
    assert used.returncode == 0, used.stderr


EXAMPLES = {
    "training": [{"epochs": 1}],
    "soft_labels": [{}],
    "distillation": [
        {"student": {"factory": PLAIN.factory}, "epochs": 1},
        {"width": 0.5, "epochs": 1},
        {"epochs": 1, "generations": 2},
    ],
    "mutual_learning": [{"students": [{"factory": PLAIN.factory}, {"factory": PLAIN.factory}], "epochs": 1}],
    "sensitivity": [{"grid": [0.5], "samples": 64}],
    "magnitude_pruning": [{"pruning_ratio": 0.5, "round_to": 8}],
    "weight_pruning": [{"sparsity": 0.5}],
    "int8_ptq": [{"calibration_samples": 64}],
    "int8_qat": [{"calibration_samples": 64, "epochs": 2}],
    "weight_only": [{}],
    "onnx_export": [{}],
}
"""Settings of each stage of this package, by the name that pipeline files have for it."""


def test_every_stage_of_this_package_has_an_example():
    ours = {one.name for one in describe_stages() if one.origin.startswith("compressor ")}
    assert EXAMPLES.keys() == ours


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        pytest.param(name, settings, id="-".join([name, *settings]))
        for name, examples in EXAMPLES.items()
        for settings in examples
    ],
)
def test_built_in_stage_keeps_the_contract(name, settings, digits_task):
    stage = find_stage(name, stage_names()).model_validate_json(json.dumps(settings))
    check_stage(stage, TorchModel.build(PLAIN, seed=0), digits_task)


class ChangesItsInput(Stage[TorchModel, TorchModel]):
    def apply(self, model: TorchModel, task: Task, context: StageContext) -> TorchModel:
        nn.init.zeros_(model.module.fc2.weight)
        return model


class DiffersEachTime(Stage[TorchModel, TorchModel]):
    def apply(self, model: TorchModel, task: Task, context: StageContext) -> TorchModel:
        changed = TorchModel.build(PLAIN, seed=0).module
        nn.init.constant_(changed.fc2.bias, torch.rand(()).item())
        return model.with_module(changed)


class GivesAnotherType(Stage[TorchModel, OnnxModel]):
    def apply(self, model: TorchModel, task: Task, context: StageContext) -> OnnxModel:
        return model


class ForgetsToSayWhatItAttaches(Stage[TorchModel, TorchModel]):
    def apply(self, model: TorchModel, task: Task, context: StageContext) -> TorchModel:
        return model.with_attachment(KeptZeros.of(model.module, {}))


class BuildsWithCodeFromElsewhere(Stage[TorchModel, TorchModel]):
    def apply(self, model: TorchModel, task: Task, context: StageContext) -> TorchModel:
        layer = model.module.fc2
        arguments = {"in_features": layer.in_features, "out_features": layer.out_features}
        return model.with_submodule("fc2", nn.Linear, arguments, layer.state_dict())


@pytest.mark.parametrize(
    ("stage", "promise"),
    [
        pytest.param(ChangesItsInput(), "input model must not change", id="input"),
        pytest.param(DiffersEachTime(), "same seed must give the same model", id="seed"),
        pytest.param(GivesAnotherType(), "apply must return", id="type"),
        pytest.param(
            ForgetsToSayWhatItAttaches(), r"(?s)fresh process.* names its classes in `attaches`", id="attaches"
        ),
        pytest.param(BuildsWithCodeFromElsewhere(), "(?s)fresh process.* define it beside the stage", id="module"),
    ],
)
def test_broken_promise_is_named(stage, promise, digits_task):
    with pytest.raises(AssertionError, match=promise):
        check_stage(stage, TorchModel.build(PLAIN, seed=0), digits_task)
