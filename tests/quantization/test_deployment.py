"""Whether the file does under ONNX Runtime what its graph does in PyTorch."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from compressor import Samples, Task, TorchModel
from compressor.errors import StageError
from compressor.quantization.calibration import calibrate
from compressor.quantization.conversion import affine_of, round_weights
from compressor.quantization.deployment import compare, deploy, output_quantum, rounding_difference
from compressor.quantization.float_graph import float_graph, fold_batch_norms
from compressor.quantization.int8_model import Int8Model
from compressor.quantization.int8_plan import plan_int8
from compressor.references.reference import Reference
from compressor.task import Metric, accuracy, evaluate, evenly_spaced


class Dropping(nn.Module):
    """Its dropout is on in evaluation mode as well."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 8, 3)
        self.second = nn.Conv2d(8, 8, 3)
        self.head = nn.Linear(128, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.dropout(F.relu(self.stem(x)), 0.5, training=True)
        return self.head(F.relu(self.second(x)).flatten(1))


def int8_of(module: nn.Module, task: Task) -> Int8Model:
    graph, plan = plan_int8(fold_batch_norms(float_graph(module.eval(), task)))
    affines = affine_of(plan, calibrate(graph, plan, task.calibration, range(256), "minmax"))
    return Int8Model(graph, plan, affines, round_weights(graph, plan, affines, 63))


def test_file_gives_what_pytorch_gives_and_each_has_its_metric(
    plain: TorchModel, digits_task: Task, tmp_path: Path
) -> None:
    int8 = int8_of(plain.module, digits_task)
    deployed, found = deploy(int8, plain.predict, digits_task, tmp_path / "model.onnx", range(180))
    x = digits_task.validation.inputs
    ours, theirs = int8.int8_graph(*x), deployed.predict(x)
    # with biases rounded as ONNX Runtime rounds them, but for its sums of floats in another order
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)
    assert (found.samples, found.agreement, found.departures) == (180, 1.0, 0.0)
    assert found.difference < 1e-4 < found.tolerance
    for value, outputs in (
        (found.float_value, plain.predict(x)),
        (found.simulated_value, ours),
        (found.deployed_value, theirs),
    ):
        assert value == evaluate((accuracy,), lambda _, given=outputs: given, digits_task.validation)["accuracy"]


def test_quantum_of_uint8_outputs_is_their_scale(digits_task: Task) -> None:
    torch.manual_seed(0)
    int8 = int8_of(nn.Conv2d(1, 8, 3), digits_task)
    (unit,) = int8.plan.units
    assert unit.output is not None
    quantum = output_quantum(int8.int8_graph, digits_task.validation.inputs)
    assert quantum == pytest.approx(int8.affines[unit.output].scale, rel=1e-5)


def test_quantum_of_float_logits_is_that_of_the_last_codes_times_the_weights(digits_task: Task) -> None:
    torch.manual_seed(0)
    int8 = int8_of(nn.Sequential(nn.Flatten(), nn.Linear(64, 10)), digits_task)
    weight = next(iter(int8.weights.values())).numbers()
    scale = next(iter(int8.affines.values())).scale
    expected = scale * float(weight.square().sum(1).mean().sqrt())  # independent steps of one code
    # white pixels beside each other step down together, as codes at an end have one way only
    assert output_quantum(int8.int8_graph, digits_task.validation.inputs) == pytest.approx(expected, rel=0.5)


def test_random_layer_is_named_as_the_first_to_depart(digits_task: Task, tmp_path: Path) -> None:
    torch.manual_seed(0)
    int8 = int8_of(Dropping(), digits_task)
    with pytest.raises(
        StageError, match=r"the first to depart on equal inputs is layer '\w*dropout\w*', whose codes differ by \d+"
    ):
        deploy(int8, lambda inputs: int8.graph(*inputs), digits_task, tmp_path / "model.onnx", range(64))


def test_randomness_before_the_last_layer_does_not_widen_the_tolerance(digits_task: Task, tmp_path: Path) -> None:
    class Last(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.hidden, self.head = nn.Linear(64, 32), nn.Linear(32, 10)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(F.dropout(F.relu(self.hidden(x.flatten(1))), 0.5, training=True))

    torch.manual_seed(0)
    int8 = int8_of(Last(), digits_task)
    with pytest.raises(StageError, match="look in forward for randomness"):
        deploy(int8, lambda inputs: int8.graph(*inputs), digits_task, tmp_path / "model.onnx", range(64))


def test_outputs_beyond_tolerance_are_refused_also_where_no_layer_departs(digits_task: Task, tmp_path: Path) -> None:
    class Blurred(nn.Module):
        """Each layer gives its inputs, off by less than one code."""

        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Conv2d(1, 1, 1, bias=False) for _ in range(12))
            for layer in self.layers:
                nn.init.ones_(layer.weight)

        def forward(self, x: Tensor) -> Tensor:
            for layer in self.layers:
                x = layer(x + torch.randn_like(x) / 700)
            return x

    torch.manual_seed(0)
    int8 = int8_of(Blurred(), digits_task)
    regression = replace(digits_task, validation=Samples(digits_task.validation.inputs, torch.zeros(180)))
    regression = replace(regression, metrics=(Metric("mean", mean_and_count, lambda sums: float(sums[0] / sums[1])),))
    with pytest.raises(StageError, match=r"on equal inputs no layer departs by more than one code \(RMS\), layer '"):
        deploy(int8, lambda inputs: int8.graph(*inputs).detach(), regression, tmp_path / "model.onnx", range(64))


def mean_and_count(outputs: Tensor, _: Tensor) -> Tensor:
    return torch.tensor([float(outputs.sum()), float(outputs.numel())], dtype=torch.float64)


def test_sums_in_another_order_make_what_onnx_runtime_makes(digits_task: Task, tmp_path: Path) -> None:
    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Conv2d(1, 8, 3, padding=1)
            self.blocks = nn.ModuleList(nn.Conv2d(8, 8, 3, padding=1) for _ in range(16))
            self.head = nn.Linear(8, 10)

        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x)
            for block in self.blocks:
                x = F.relu(x + block(x))
            return self.head(x.mean((2, 3)))

    torch.manual_seed(0)
    int8, inputs = int8_of(Residual(), digits_task), digits_task.validation.inputs
    _, found = deploy(int8, lambda x: int8.graph(*x).detach(), digits_task, tmp_path / "model.onnx", range(180))
    expected = rounding_difference(int8.int8_graph, inputs)
    # which codes lie on an edge is chance: a third and three times are far from a code in every tensor, which is 100
    assert expected / 10 < found.difference < 2 * expected


def test_another_class_among_equal_logits_is_no_departure(digits_task: Task, tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Flatten(), nn.Linear(64, 2))
    with torch.no_grad():
        module[1].weight[1] = module[1].weight[0]
        module[1].bias.copy_(torch.tensor([0.0, 0.001]))
    path = tmp_path / "model.onnx"
    deployed, found = deploy(int8_of(module, digits_task), lambda x: module(*x).detach(), digits_task, path, range(64))
    with torch.no_grad():
        module[1].bias.copy_(torch.tensor([0.001, 0.0]))
    other = compare(
        lambda x: module(*x).detach(),
        int8_of(module, digits_task).int8_graph,
        deployed,
        digits_task,
        range(64),
        tolerance=found.tolerance,
    )
    assert found.agreement == 1
    assert other.agreement == 0
    assert other.departures == 0
    assert other.difference == pytest.approx(0.001, rel=0.01)


@pytest.mark.parametrize("number", [math.nan, math.inf])
def test_sample_that_makes_outputs_not_finite_is_told(
    number: float, plain: TorchModel, digits_task: Task, tmp_path: Path
) -> None:
    images = digits_task.validation.inputs[0].clone()
    images[5] = number
    task = replace(digits_task, validation=Samples((images,), digits_task.validation.targets))
    int8 = int8_of(plain.module, digits_task)
    with pytest.raises(StageError, match=r"of the float model must be finite numbers, .* samples 3 to 179"):
        deploy(int8, plain.predict, task, tmp_path / "model.onnx", range(180))


def test_regression_is_compared_without_classes(digits_task: Task, tmp_path: Path) -> None:
    def squares(outputs: Tensor, targets: Tensor) -> Tensor:
        return torch.stack([(outputs - targets).square().sum(), torch.tensor(float(len(targets)))]).double()

    torch.manual_seed(0)
    error = Metric("error", squares, lambda sums: float(sums[0] / sums[1]), higher_is_better=False)
    inputs = digits_task.validation.inputs
    split = Samples(inputs, inputs[0].mean((1, 2, 3))[:, None])
    task = replace(digits_task, validation=split, metrics=(error,))
    model = TorchModel(nn.Sequential(nn.Flatten(), nn.Linear(64, 1)), Reference(factory="torch.nn:Sequential"))
    int8, rows = int8_of(model.module, task), evenly_spaced(split, 50)
    _, found = deploy(int8, model.predict, task, tmp_path / "model.onnx", rows)
    assert (found.agreement, found.departures, found.samples) == (None, None, 50)
    assert found.drop == found.deployed_value - found.float_value


def test_a_metric_of_samples_without_labels_is_no_number_to_report(
    plain: TorchModel, digits_task: Task, tmp_path: Path
) -> None:
    inputs = digits_task.validation.inputs
    task = replace(digits_task, validation=Samples(inputs, torch.full((180,), -100)))
    with pytest.raises(StageError, match="'accuracy' must be finite on 180 validation samples, got nan, nan, nan"):
        deploy(int8_of(plain.module, digits_task), plain.predict, task, tmp_path / "model.onnx", range(180))
