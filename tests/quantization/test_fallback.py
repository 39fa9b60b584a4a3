"""What int8_ptq does where accuracy falls, and which models it refuses."""

import re
from dataclasses import dataclass
from pathlib import Path

import onnx
import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn

from compressor import OnnxModel, StageContext, Task, TorchModel
from compressor.errors import InputError, StageError
from compressor.records.int8 import Quantization
from compressor.references.reference import Reference
from compressor.stages.int8_ptq import Int8Ptq
from compressor.task import accuracy, evaluate
from tests.example_models import BranchingNetwork, SingularNetwork


@dataclass(frozen=True)
class Outcome:
    """What the stage made of a model, told the report and said."""

    int8_model: OnnxModel
    quantization: Quantization
    said: tuple[str, ...]


def quantize(stage: Int8Ptq, model: TorchModel, task: Task, work_dir: Path) -> Outcome:
    found: list[Quantization] = []
    said: list[str] = []
    context = StageContext(model, torch.device("cpu"), 0, work_dir, said.append, found.append)
    int8_model = stage.apply(model, task, context)
    return Outcome(int8_model, found[-1], tuple(said))


def wrap(module: nn.Module) -> TorchModel:
    return TorchModel(module.eval(), Reference(factory="tests.example_models:BranchingNetwork"))


def int8_bytes(model: OnnxModel) -> int:
    tensors = [tensor for tensor in onnx.load(model.path).graph.initializer if len(tensor.dims) > 1]
    return sum(len(tensor.raw_data) for tensor in tensors if tensor.data_type == onnx.TensorProto.INT8)


@pytest.fixture(scope="module")
def restored(lopsided: TorchModel, digits_task: Task, tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    return quantize(Int8Ptq(max_drop=0.01), lopsided, digits_task, tmp_path_factory.mktemp("restored"))


def test_layers_go_back_to_float_until_the_fall_is_within_max_drop(restored: Outcome, digits_task: Task) -> None:
    found = restored.quantization
    assert found.fallback is not None
    assert found.fallback.before.deployed_value < 0.5
    assert found.fallback.stopped == "reached"
    assert {step.layer for step in found.fallback.steps} == {"conv2", "fc1"}
    assert found.deployment.drop <= 0.01
    measured = evaluate((accuracy,), restored.int8_model.predict, digits_task.validation)["accuracy"]
    assert measured == found.deployment.deployed_value


def test_layers_that_compute_in_float_keep_int8_weights_where_those_are_not_at_fault(
    restored: Outcome, lopsided: TorchModel
) -> None:
    assert restored.quantization.fallback is not None
    assert all(step.weights == "int8" for step in restored.quantization.fallback.steps)
    weights = sum(parameter.numel() for parameter in lopsided.module.parameters() if parameter.ndim > 1)
    assert int8_bytes(restored.int8_model) == weights


def test_price_in_bytes_and_time_and_what_ended_it_are_logged(restored: Outcome) -> None:
    (line,) = [line for line in restored.said if line.startswith("max_drop 0.01: the limit holds; back in float: ")]
    assert re.search(r"accuracy 9\d\.\d\d % \(\+\d\d\.\d\d points\) with [+-]\d+ bytes, [\d.]+x (faster|slower)", line)


def test_best_model_so_far_is_kept_when_time_is_over(
    restored: Outcome, lopsided: TorchModel, digits_task: Task, tmp_path: Path
) -> None:
    stage = Int8Ptq(max_drop=0.01, max_minutes=1e-6)
    found = quantize(stage, lopsided, digits_task, tmp_path).quantization
    assert found.fallback is not None
    assert found.fallback.stopped == "time"
    assert len(found.fallback.steps) == 1
    assert found.deployment.deployed_value >= found.fallback.before.deployed_value
    assert restored.quantization.fallback is not None
    assert found.fallback.steps[0] == restored.quantization.fallback.steps[0]


def test_keep_float_leaves_a_layer_and_reports_the_others(
    lopsided: TorchModel, digits_task: Task, tmp_path: Path
) -> None:
    stage = Int8Ptq(keep_float=("conv2", "fc*"), analysis=True)
    found = quantize(stage, lopsided, digits_task, tmp_path)
    assert [one.layer for one in found.quantization.layers] == ["conv1"]
    assert found.said[1] == "stays in float: conv2, fc1, fc2"
    assert found.quantization.deployment.drop <= 0.01
    assert found.quantization.fallback is None


def test_keep_float_that_names_no_layer_is_refused(lopsided: TorchModel, digits_task: Task, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"'conv3' names none; did you mean 'conv\d'\?; they are conv1, conv2, .*fc2"):
        quantize(Int8Ptq(keep_float=("conv3",)), lopsided, digits_task, tmp_path)


class Tripled(nn.Module):
    """A layer whose weight is stored as integers."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("weight", torch.ones(10, 64, dtype=torch.int8))

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1) @ self.weight.float().T


def test_model_with_integer_weights_is_refused_by_name(digits_task: Task, tmp_path: Path) -> None:
    with pytest.raises(StageError, match=r"from a float32 model, but '1\.weight' holds torch\.int8"):
        quantize(Int8Ptq(), wrap(nn.Sequential(nn.Identity(), Tripled())), digits_task, tmp_path)


def test_model_with_fake_quantization_is_refused_by_name(digits_task: Task, tmp_path: Path) -> None:
    faked = torch.ao.quantization.FakeQuantize()
    with pytest.raises(StageError, match=r"from a float32 model, but layer '1' is a torch\.ao\.quantization"):
        quantize(Int8Ptq(), wrap(nn.Sequential(nn.Conv2d(1, 4, 3), faked)), digits_task, tmp_path)


def test_branch_on_values_is_refused_with_its_line(digits_task: Task, tmp_path: Path) -> None:
    with pytest.raises(StageError, match=r"models\.py:\d+ `return logits \* 2 if .*must not branch on the values"):
        quantize(Int8Ptq(), wrap(BranchingNetwork()), digits_task, tmp_path)


class Doubled(nn.Module):
    """It computes in 64 bits what ONNX Runtime can compute in 32 bits only."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        return torch.erf(self.head(x.flatten(1)).double()).float()


def test_operator_that_onnx_runtime_lacks_is_named(digits_task: Task, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"a model that ONNX Runtime can run: .*implementation for Erf"):
        quantize(Int8Ptq(), wrap(Doubled()), digits_task, tmp_path)


class Singular(nn.Module):
    """A convolution, and an operator that ONNX does not have."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 1, 3)
        self.values = SingularNetwork()

    def forward(self, x: Tensor) -> Tensor:
        return self.values(self.stem(x))


def test_operator_that_onnx_lacks_is_named(digits_task: Task, tmp_path: Path) -> None:
    with pytest.raises(StageError, match=r"must have a form in ONNX opset 20, but .*aten\._linalg_svd"):
        quantize(Int8Ptq(), wrap(Singular()), digits_task, tmp_path)


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"max_minutes": 1.0}, "there is no max_drop"), ({"max_drop": -0.1}, "greater than or equal to 0")],
)
def test_limits_that_limit_nothing_are_refused(settings, message) -> None:
    with pytest.raises(ValidationError, match=message):
        Int8Ptq.model_validate(settings)


def test_keep_float_that_leaves_nothing_is_refused(lopsided: TorchModel, digits_task: Task, tmp_path: Path) -> None:
    with pytest.raises(StageError, match="the model has none that keep_float leaves"):
        quantize(Int8Ptq(keep_float=("**",)), lopsided, digits_task, tmp_path)
