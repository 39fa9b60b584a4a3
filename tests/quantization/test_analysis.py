"""What each layer does in int8, against quantization by hand."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from compressor import Task, TorchModel
from compressor.quantization.analysis import analyse
from compressor.quantization.calibration import calibrate
from compressor.quantization.conversion import affine_of, round_weights
from compressor.quantization.float_graph import float_graph, fold_batch_norms
from compressor.quantization.int8_model import Int8Model
from compressor.quantization.int8_plan import plan_int8
from compressor.records.int8 import LayerNoise, worst_first
from compressor.task import accuracy, evaluate


def int8_of(model: TorchModel, task: Task) -> Int8Model:
    graph, plan = plan_int8(fold_batch_norms(float_graph(model.module, task)))
    affines = affine_of(plan, calibrate(graph, plan, task.calibration, range(256), "minmax"))
    return Int8Model(graph, plan, affines, round_weights(graph, plan, affines, 63))


def analysed(model: TorchModel, task: Task) -> tuple[Int8Model, dict[str, LayerNoise]]:
    int8 = int8_of(model, task)
    layers, samples = analyse(int8, task)
    assert samples == len(task.validation)
    return int8, {found.layer: found for found in layers}


@pytest.fixture(scope="module")
def even(plain: TorchModel, digits_task: Task) -> tuple[Int8Model, dict[str, LayerNoise]]:
    return analysed(plain, digits_task)


@pytest.fixture(scope="module")
def uneven(lopsided: TorchModel, digits_task: Task) -> tuple[Int8Model, dict[str, LayerNoise]]:
    return analysed(lopsided, digits_task)


def sqnr(found: Tensor, wanted: Tensor) -> float:
    return 20 * math.log10(float(wanted.norm() / (found - wanted).norm()))


def test_layers_that_round_are_measured_and_those_that_only_move_codes_are_not(
    even: tuple[Int8Model, dict[str, LayerNoise]],
) -> None:
    int8, found = even
    assert list(found) == ["conv1", "conv2", "fc1", "fc2"]
    assert set(int8.plan.layers) > set(found)  # a pooling and a reshape


def test_one_layer_alone_is_what_rounding_its_input_and_weight_by_hand_gives(
    even: tuple[Int8Model, dict[str, LayerNoise]], plain: TorchModel, digits_task: Task
) -> None:
    int8, found = even
    module, x = plain.module, digits_task.validation.inputs[0]
    with torch.no_grad():
        hidden = F.relu(module.bn1(module.conv1(x)))
        hidden = F.relu(module.fc1(F.max_pool2d(F.relu(module.conv2(hidden)), 2).flatten(1)))
        (unit,) = (unit for unit in int8.plan.units if unit.layer == "fc2")
        affine = int8.affines[unit.inputs[0]]
        step = torch.tensor(affine.scale)
        rounded = torch.fake_quantize_per_tensor_affine(hidden, step, torch.tensor(affine.zero_point), 0, 255)
        scale = module.fc2.weight.abs().max() / 63  # one, as the channels are alike
        logits = F.linear(rounded, torch.round(module.fc2.weight / scale) * scale, module.fc2.bias)
        expected = sqnr(logits, plain.predict((x,)))
    assert found["fc2"].alone_sqnr_db == pytest.approx(expected, abs=0.1)  # its bias is rounded too
    assert found["fc2"].alone_value == evaluate((accuracy,), lambda _: logits, digits_task.validation)["accuracy"]


def test_noise_of_the_last_layer_is_that_of_the_whole_model(
    even: tuple[Int8Model, dict[str, LayerNoise]], plain: TorchModel, digits_task: Task
) -> None:
    int8, found = even
    x = digits_task.validation.inputs
    with torch.no_grad():
        assert found["fc2"].sqnr_db == pytest.approx(sqnr(int8.int8_graph(*x), plain.predict(x)), abs=1e-3)


def test_histogram_counts_every_value_of_the_float_activation(
    even: tuple[Int8Model, dict[str, LayerNoise]], plain: TorchModel, digits_task: Task
) -> None:
    int8, found = even
    module = plain.module
    with torch.no_grad():
        values = F.relu(module.bn1(module.conv1(digits_task.validation.inputs[0])))
    histogram = found["conv1"].histogram
    assert histogram is not None
    affine = next(int8.affines[unit.output] for unit in int8.plan.units if unit.layer == "conv1" and unit.output)
    assert (histogram.low, histogram.high) == pytest.approx((0, 255 * affine.scale))
    beyond = (values > histogram.high + affine.scale / 2).float().mean()
    assert histogram.above == pytest.approx(float(beyond), abs=1e-7)
    assert histogram.below == 0
    assert sum(histogram.counts) == round(values.numel() * (1 - histogram.above))
    reference = torch.histc(values, len(histogram.counts), 0, histogram.high)
    assert torch.tensor(histogram.counts).sub(reference).abs().max() <= 0.001 * values.numel()  # values on an edge
    assert found["fc1"].histogram is None  # its outputs are float


def test_layers_on_both_sides_of_an_activation_that_does_not_fit_are_the_worst(
    even: tuple[Int8Model, dict[str, LayerNoise]], uneven: tuple[Int8Model, dict[str, LayerNoise]]
) -> None:
    _, good = even
    _, bad = uneven
    assert {found.layer for found in worst_first(list(bad.values()))[:2]} == {"conv2", "fc1"}
    for layer in ("conv2", "fc1"):
        assert bad[layer].alone_value < good[layer].alone_value - 0.3
        assert (bad[layer].alone_sqnr_db or 0) < 3
    for layer in ("conv1", "fc2"):
        assert bad[layer].alone_value > good[layer].alone_value - 0.02  # three of 180 images
