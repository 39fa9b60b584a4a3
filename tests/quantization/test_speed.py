"""Int8 only where it is faster than float."""

import re
from collections.abc import Sequence
from pathlib import Path

import onnx
import pytest
import torch

from compressor import Samples, StageContext, Task, TorchModel
from compressor.export.to_onnx import to_onnx
from compressor.models.outputs import relative_error
from compressor.quantization.calibration import calibrate
from compressor.quantization.conversion import affine_of, convert, round_weights
from compressor.quantization.float_graph import float_graph, fold_batch_norms
from compressor.quantization.int8_plan import Int8Plan, plan_int8
from compressor.quantization.kernels import Kernel, profile_kernels, traceable
from compressor.quantization.speed import Choice, index_of_fastest, islands
from compressor.records.measurements import Latency
from compressor.references.reference import Reference
from compressor.stages.int8_ptq import Int8Ptq
from tests.example_models import SequenceNetwork
from tests.networks import PlainNetwork, ResidualNetwork


@pytest.fixture(scope="module")
def task() -> Task:
    images = torch.rand(64, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    split = Samples((images,), torch.zeros(64, dtype=torch.long))
    return Task(split, split, split, split, (images[:2],))


@pytest.fixture(scope="module")
def model() -> TorchModel:
    torch.manual_seed(0)
    return TorchModel(ResidualNetwork().eval(), Reference(factory="tests.networks:ResidualNetwork"))


@pytest.fixture(scope="module")
def planned_and_kernels(
    model: TorchModel, task: Task, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Int8Plan, Sequence[Kernel]]:
    graph, plan = plan_int8(fold_batch_norms(float_graph(model.module, task)))
    affines = affine_of(plan, calibrate(graph, plan, task.calibration, range(8), "minmax"))
    path = tmp_path_factory.mktemp("kernels") / "int8.onnx"
    onnx.save(traceable(convert(graph, plan, affines, round_weights(graph, plan, affines, 63)), task), path)
    return plan, profile_kernels(path, [task.example_inputs[0][:1].numpy()])


def latency(ratio: float, half_width: float = 0.01) -> Latency:
    return Latency(p50_ms=1 / ratio, ratio=ratio, ratio_low=ratio - half_width, ratio_high=ratio + half_width)


def test_each_int8_kernel_is_traced_to_the_operator_that_it_stands_for(
    planned_and_kernels: tuple[Int8Plan, Sequence[Kernel]],
) -> None:
    plan, found = planned_and_kernels
    operators = {kernel.node: kernel.operator for kernel in found if kernel.node is not None}
    fused = {unit.output or unit.node: unit for unit in plan.units}
    int8 = {node: operator for node, operator in operators.items() if operator.startswith("Q")}
    assert sorted(int8.values()) == ["QGemm", "QLinearAdd", "QLinearAveragePool", *["QLinearConv"] * 3]
    # a kernel has the name of its first or its last operator
    assert set(int8) <= {*fused, *(unit.node for unit in plan.units)}


def test_kernels_tell_their_time_and_how_much_they_give(planned_and_kernels: tuple[Int8Plan, Sequence[Kernel]]) -> None:
    _, found = planned_and_kernels
    assert all(0 <= kernel.seconds < 1 for kernel in found)  # their microseconds are above 1
    (quantize,) = (kernel for kernel in found if kernel.operator == "QuantizeLinear")
    assert quantize.node is None
    assert quantize.elements == 64
    assert [kernel.elements for kernel in found if kernel.operator == "QLinearConv"] == [16 * 64] * 3


def test_int8_that_is_not_surely_faster_is_not_taken() -> None:
    assert index_of_fastest([latency(1.0, 0), latency(0.9)]) == 0
    assert index_of_fastest([latency(1.0, 0), latency(0.97), latency(0.9)]) == 0
    assert index_of_fastest([latency(1.0, 0), latency(1.005)]) == 0


def test_fastest_is_taken_and_of_equals_the_one_with_more_int8() -> None:
    assert index_of_fastest([latency(1.0, 0), latency(1.2), latency(0.9)]) == 1
    assert index_of_fastest([latency(1.0, 0), latency(1.2), latency(2.0)]) == 2
    assert index_of_fastest([latency(1.0, 0), latency(2.01), latency(2.0)]) == 2
    assert index_of_fastest([latency(1.0, 0), latency(1.02), latency(1.005)]) == 1


def test_float_operators_between_int8_layers_are_islands(task: Task) -> None:
    graph, plan = plan_int8(fold_batch_norms(float_graph(SequenceNetwork().eval(), task)))
    expected = ("norm", "transpose", "matmul", "div", "softmax", "matmul:2", "add", "mean")
    assert islands(graph, plan) == expected


def test_network_wholly_in_int8_has_no_islands(model: TorchModel, task: Task) -> None:
    assert islands(*plan_int8(fold_batch_norms(float_graph(model.module, task)))) == ()


def test_relu_whose_codes_end_where_it_clips_is_no_island(task: Task) -> None:
    assert islands(*plan_int8(fold_batch_norms(float_graph(PlainNetwork().eval(), task)))) == ()


def test_choice_says_what_computes_in_float_and_how_fast_that_is() -> None:
    some = Choice(("a", "b"), 3, latency(1.2), latency(0.9))
    assert str(some) == (
        "a, b compute in float: all in int8 would be 0.90 [0.89, 0.91] times as fast as float here, "
        "this is 1.20 [1.19, 1.21]"
    )
    every = Choice(("a", "b", "c"), 3, latency(1.0, 0), latency(0.9))
    assert str(every) == (
        "all layers compute in float, with weights stored as int8: "
        "all in int8 would be 0.90 [0.89, 0.91] times as fast as float here"
    )
    assert str(Choice((), 3, latency(2.0), latency(2.0))).startswith("int8 is 2.00 [1.99, 2.01] times as fast")


def test_file_is_smaller_than_float_and_int8_only_as_far_as_that_was_faster(
    model: TorchModel, task: Task, tmp_path: Path
) -> None:
    said: list[str] = []
    context = StageContext(model, torch.device("cpu"), 0, tmp_path, said.append)
    int8 = Int8Ptq(keep_float="auto").apply(model, task, context)
    whole = to_onnx(model.module, task, tmp_path / "float.onnx")
    assert int8.path.stat().st_size < whole.path.stat().st_size
    (choice,) = [line for line in said if "times as fast as float here" in line]
    all_in_float, measured = "all layers compute in float" in choice, re.findall(r"\d\.\d\d", choice)
    operators = {node.op_type for node in onnx.load(int8.path).graph.node}
    assert ("QuantizeLinear" in operators) != all_in_float
    assert all_in_float or float(measured[-3]) >= 1  # what it says last is the speed of what it chose
    images = task.test.inputs
    assert relative_error(int8.predict(images), model.predict(images)) < 0.1
