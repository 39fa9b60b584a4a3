import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx.numpy_helper import to_array
from test_pipeline import CODE, CPU

from compressor.config.pipeline_file import load
from compressor.errors import StageError
from compressor.models.artifact import TorchModel
from compressor.models.kept_zeros import zeros_of
from compressor.references.reference import prefer_modules_in
from compressor.report.json import read_report
from compressor.report.remarks import remarks
from compressor.run.pipeline import run

STAGES = '''
import onnx
from onnx.numpy_helper import from_array, to_array

from compressor import Stage
from compressor.models.artifact import OnnxModel


class Refill(Stage[OnnxModel, OnnxModel]):
    """Give the zeros of a file another value, as a careless rewriting of weights might."""

    def apply(self, model: OnnxModel, task, context) -> OnnxModel:
        graph = onnx.load(model.path)
        for tensor in graph.graph.initializer:
            if len(tensor.dims) > 1:
                weights = to_array(tensor).copy()
                weights[weights == 0] = 1
                tensor.CopyFrom(from_array(weights, tensor.name))
        onnx.save(graph, context.work_dir / "model.onnx")
        return OnnxModel(context.work_dir / "model.onnx")
'''

PIPELINE = """
name: sparse
model: {factory: zeros_code:network}
task: {factory: zeros_code:task}
stages:
  - {stage: training, epochs: 4, batch_size: 32, optimizer: {learning_rate: 5.0e-3}}
  - stage: compressor.stages.weight_pruning:WeightPruning
    sparsity: 0.8
    schedule: {steps: 2}
    recovery: {epochs: 4, batch_size: 32, optimizer: {learning_rate: 5.0e-3}}
  - {stage: soft_labels}
  - {stage: training, epochs: 1, batch_size: 32}
  - {stage: magnitude_pruning, pruning_ratio: 0.25, round_to: 4, recovery: {epochs: 1, batch_size: 32}}
  - {stage: int8_ptq, calibration_samples: 64}
"""


def write(directory: Path, last: str) -> Path:
    (directory / "zeros_code.py").write_text(CODE + STAGES)
    (directory / "sparse.yaml").write_text(f"{PIPELINE}  - {{stage: {last}}}\n")
    return directory / "sparse.yaml"


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The run directory of a chain that prunes weights, trains, removes channels, quantizes and exports."""
    directory = tmp_path_factory.mktemp("sparse")
    run(load(write(directory, "onnx_export")), directory / "runs", device=CPU, max_seconds=0)
    return directory / "runs"


def stored(directory: Path, row) -> TorchModel:
    with prefer_modules_in(directory.parent):
        return TorchModel.load(directory / "stages" / row.key / "artifact")


def zeros(row) -> int:
    return row.measurement.parameters - row.measurement.nonzero


def test_zeros_of_the_module_are_in_the_files_of_all_later_stages(finished):
    _, sparse, trained, narrow, int8, exported = read_report(finished / "report.json").rows
    models = [stored(finished, row) for row in (sparse, trained, narrow)]
    promised = [sum(zeros_of(model).values()) for model in models]
    weights = sum(p.numel() for p in models[0].module.parameters() if p.ndim > 1)
    assert promised[0] == promised[1] == round(0.8 * weights)
    assert 0 < promised[2] < promised[1]
    for row, count in zip(
        (sparse, trained, narrow, int8, exported), [*promised, promised[2], promised[2]], strict=True
    ):
        assert zeros(row) >= count


def test_zeros_of_the_module_are_zero_points_in_the_int8_file(finished):
    """Folding BatchNorm scales the weights of a channel, and rounding a zero gives a zero."""
    narrow, *_, exported = read_report(finished / "report.json").rows[3:]
    model = stored(finished, narrow)
    graph = onnx.load(finished / exported.model_file).graph
    arrays = [to_array(tensor) for tensor in graph.initializer]
    integers = [array for array in arrays if array.dtype == np.int8 and array.ndim > 1]
    weights = [parameter.detach().numpy() for parameter in model.module.parameters() if parameter.ndim > 1]
    assert len(integers) == len(weights)
    for weight in weights:
        # a linear layer may be stored transposed
        alike = [one for array in integers for one in (array, array.T) if one.shape == weight.shape]
        assert any((array[weight == 0] == 0).all() for array in alike)


def test_the_report_says_what_zeros_bring_and_what_not(finished):
    report = read_report(finished / "report.json")
    told = [remark for remark in remarks(report) if "parameters" in remark and "zero" in remark]
    assert told
    assert "zeros are stored and multiplied like other numbers" in told[0]
    assert "(gzip). It is " in told[0]


def test_a_stage_that_fills_the_zeros_of_a_file_is_named(finished, tmp_path):
    shutil.copytree(finished, tmp_path / "runs")  # the stages before it are in the store
    file = write(tmp_path, "zeros_code:Refill")
    message = (
        r"zeros_code:Refill must keep the \d+ zeros that the model was pruned to, but its ONNX file has \d+, \d+ fewer"
    )
    with pytest.raises(StageError, match=message):
        run(load(file), tmp_path / "runs", device=torch.device("cpu"), max_seconds=0)
