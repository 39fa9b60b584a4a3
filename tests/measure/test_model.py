"""Measurements of ONNX files against what PyTorch, NumPy, gzip and onnx say of the same models."""

import gzip
import os
import random
import subprocess
import sys
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import ModelProto, TensorProto, numpy_helper
from onnx.helper import make_graph, make_node, make_opsetid, make_tensor_value_info
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, quantize_dynamic, quantize_static
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.export import Dim
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from compressor.errors import InputError, StageError
from compressor.measure.model import measure
from compressor.onnx_files.facts import count_parameters, read_facts
from compressor.onnx_files.macs import count_macs
from compressor.task import Metric, Samples, Task, accuracy
from example_onnx import graph_model, linear_model, save_external


def export(module: nn.Module, inputs: tuple[Tensor, ...], path: Path, *, axes: dict[int, str] | None = None) -> Path:
    """Write `module` as ONNX with an open batch, independently of `compressor.export.to_onnx`."""
    shapes = tuple({axis: Dim(name) for axis, name in (axes or {0: "batch"}).items()} for _ in inputs)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's exporter warns about torch's own deprecated calls
        program = torch.onnx.export(module.eval(), inputs, dynamo=True, dynamic_shapes=shapes, opset_version=20)
    assert program is not None
    program.save(path)
    return path


def zeros(*shape: int) -> np.ndarray:
    return np.zeros(shape, np.float32)


@pytest.fixture(scope="module")
def digits() -> tuple[Tensor, Tensor]:
    features, labels = load_digits(return_X_y=True)
    return torch.from_numpy(features).float() / 16, torch.from_numpy(labels)


@pytest.fixture(scope="module")
def task(digits: tuple[Tensor, Tensor]) -> Task:
    features, labels = digits
    train = Samples((features[:1000],), labels[:1000])
    test = Samples((features[1000:],), labels[1000:])  # 797: three batches of 256 and a shorter one
    return Task(train=train, validation=train, test=test, calibration=train, example_inputs=(features[:2],))


@pytest.fixture(scope="module")
def classifier(digits: tuple[Tensor, Tensor], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Linear least squares on the first 1,000 digits."""
    features, labels = digits
    targets = nn.functional.one_hot(labels[:1000], 10).double()
    with_ones = torch.cat([features[:1000], torch.ones(1000, 1)], dim=1).double()
    solution = torch.linalg.lstsq(with_ones, targets, driver="gelsd").solution
    module = nn.Linear(64, 10)
    with torch.no_grad():
        module.weight.copy_(solution[:64].T)
        module.bias.copy_(solution[64])
    return export(module, (features[:2],), tmp_path_factory.mktemp("classifier") / "model.onnx")


def test_accuracy_and_size_of_a_classifier_are_those_of_the_file_on_the_test_split(
    classifier: Path, task: Task, digits: tuple[Tensor, Tensor]
):
    weight, bias = sorted(
        map(numpy_helper.to_array, onnx.load(classifier).graph.initializer), key=np.ndim, reverse=True
    )
    features, labels = digits[0][1000:].numpy(), digits[1][1000:].numpy()
    hits = (features @ weight.T + bias).argmax(axis=1) == labels
    measured = measure(classifier, task).measurement
    assert measured.metrics == {"accuracy": hits.mean()}
    assert hits.mean() > 0.8  # it learned: an order mixed up would show
    assert measured.samples == 797
    assert measured.size_bytes == len(classifier.read_bytes())
    assert measured.transfer_bytes == len(gzip.compress(classifier.read_bytes(), compresslevel=9, mtime=0))
    assert measured.parameters == 64 * 10 + 10
    assert measured.nonzero == np.count_nonzero(weight) + 10
    assert measured.macs == 64 * 10


def test_outputs_that_are_not_finite_are_refused_with_the_samples_that_gave_them(classifier: Path, task: Task):
    features = task.test.inputs[0].clone()
    features[600, 3] = torch.nan
    spoiled = replace(task, test=Samples((features,), task.test.targets))
    with pytest.raises(StageError, match="NaN or infinity on test samples 512 to 767"):
        measure(classifier, spoiled)


def test_metric_that_is_not_finite_is_refused(classifier: Path, task: Task):
    undefined = Metric("F1", accuracy.statistics, lambda _: float("nan"))
    with pytest.raises(StageError, match="'F1' must be a finite number, got nan on test samples 0 to 796"):
        measure(classifier, replace(task, metrics=(accuracy, undefined)))


def test_measuring_twice_gives_the_same(classifier: Path, task: Task):
    first, second = measure(classifier, task), measure(classifier, task)
    assert first.measurement == second.measurement
    np.testing.assert_equal(first.predictions, second.predictions)


def test_what_a_classifier_says_of_each_test_sample_is_kept_in_order(
    classifier: Path, task: Task, digits: tuple[Tensor, Tensor]
):
    weight, bias = sorted(
        map(numpy_helper.to_array, onnx.load(classifier).graph.initializer), key=np.ndim, reverse=True
    )
    predictions = measure(classifier, task).predictions
    assert predictions is not None
    assert predictions.logits.dtype == np.float32
    # float32 sums of 64 products in another order
    np.testing.assert_allclose(predictions.logits, digits[0][1000:].numpy() @ weight.T + bias, atol=1e-4)
    np.testing.assert_array_equal(predictions.targets, digits[1][1000:])


class Counting(torch.utils.data.Dataset[tuple[Tensor, Tensor]]):
    """Samples read one at a time, and how often each was."""

    def __init__(self, samples: Samples) -> None:
        self.samples = samples
        self.read = [0] * len(samples)

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        self.read[index] += 1
        return self.samples.inputs[0][index], self.samples.targets[index]


def test_each_test_sample_is_read_and_run_once(classifier: Path, task: Task):
    counting = Counting(task.test)
    predictions = measure(classifier, replace(task, test=counting)).predictions
    assert predictions is not None
    np.testing.assert_array_equal(predictions.targets, task.test.targets)
    assert counting.read == [1] * 797


MEAN = Metric("mean", lambda outputs, _: outputs.double().mean().reshape(1), lambda sums: float(sums[0]))


@pytest.mark.parametrize(
    "targets",
    [
        pytest.param(torch.linspace(0, 1, 797), id="real"),
        pytest.param(torch.arange(797), id="beyond-the-classes"),
        pytest.param(torch.zeros(797, 10, dtype=torch.int64), id="several-labels"),
        pytest.param(torch.zeros(797, dtype=torch.bool), id="truth-values"),
    ],
)
def test_nothing_is_kept_for_a_task_that_is_no_classification(classifier: Path, task: Task, targets: Tensor):
    other = replace(task, test=Samples(task.test.inputs, targets), metrics=(MEAN,))
    measured = measure(classifier, other)
    assert measured.predictions is None
    assert measured.measurement.samples == 797


def test_empty_test_split_is_refused(classifier: Path, task: Task):
    empty = Samples((task.test.inputs[0][:0],), task.test.targets[:0])
    with pytest.raises(InputError, match="must have samples, got 0"):
        measure(classifier, replace(task, test=empty))


class Convolutions(nn.Module):
    """Every form of a convolution: strided, dilated, grouped, depthwise, pointwise, transposed, normalised."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(3, 16, 3, padding=1, bias=False),
            nn.BatchNorm2d(16),
            nn.ReLU(),
            nn.Conv2d(16, 16, 3, stride=2, padding=1, groups=16),
            nn.Conv2d(16, 24, 1),
            nn.Hardswish(),
            nn.Conv2d(24, 12, (3, 2), dilation=(1, 3), groups=4),
            nn.ConvTranspose2d(12, 8, 3, stride=2, output_padding=1, groups=2),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(8, 10),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


class Signal(nn.Module):
    """Convolutions over one and three dimensions."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Conv1d(4, 6, 5, groups=2)
        self.three = nn.Conv3d(2, 4, 2)

    def forward(self, x: Tensor) -> Tensor:
        narrow = self.one(x)
        return self.three(narrow.reshape(-1, 2, 3, 4, 5)).flatten(1)


class Attention(nn.Module):
    """A transformer layer, whose products of activations no weight shows."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(16, 4, 32, dropout=0.0, batch_first=True, activation="gelu")
        self.head = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(x).mean(dim=1))


class Products(nn.Module):
    """Matrix products written by hand: batched, as a sum over indices, on three dimensions."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 12))
        self.linear = nn.Linear(12, 7)

    def forward(self, x: Tensor) -> Tensor:
        rows = torch.einsum("bij,jk->bik", x, self.weight)
        return (rows @ rows.transpose(1, 2)) @ self.linear(rows)


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], dict[int, str]]] = {
    "convolutions": (Convolutions, (3, 16, 16), {0: "batch"}),
    "one and three dimensions": (Signal, (4, 24), {0: "batch"}),
    "attention": (Attention, (6, 16), {0: "batch"}),
    "attention with an open length": (Attention, (6, 16), {0: "batch", 1: "length"}),
    "products": (Products, (5, 8), {0: "batch"}),
}


def flops(module: nn.Module, *inputs: Tensor) -> int:
    # the fused kernels for inference and attention are opaque to torch's counter
    module.train()
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        module(*inputs)
    return counter.get_total_flops()


@pytest.mark.parametrize(("build", "shape", "axes"), MODELS.values(), ids=MODELS.keys())
def test_macs_and_parameters_of_a_file_are_those_that_torch_counts(
    build: Callable[[], nn.Module], shape: tuple[int, ...], axes: dict[int, str], tmp_path: Path
):
    torch.manual_seed(0)
    module = build()
    for parameter in module.parameters():
        nn.init.normal_(parameter)  # the exporter stores equal tensors, such as biases of zero, once
    path = export(module, (torch.randn(2, *shape),), tmp_path / "model.onnx", axes=axes)
    facts = read_facts(path, [zeros(1, *shape)])
    normalisation = {id(p) for m in module.modules() if isinstance(m, nn.BatchNorm2d) for p in m.parameters()}
    parameters = [p for p in module.parameters() if id(p) not in normalisation]
    folded_biases = 16 if normalisation else 0  # the exporter folds normalisation into the convolution, as its bias
    assert facts.parameters == sum(p.numel() for p in parameters) + folded_biases
    assert facts.macs * 2 == flops(module, torch.randn(1, *shape)) > 0


def test_recurrent_layer_costs_what_its_steps_written_as_linear_layers_cost():
    class Unrolled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.of_input, self.of_state = nn.Linear(8, 4 * 12), nn.Linear(12, 4 * 12)

        def forward(self, x: Tensor) -> Tensor:
            state = memory = x.new_zeros(len(x), 12)
            for step in x.unbind(1):
                gate, keep, new, out = (self.of_input(step) + self.of_state(state)).chunk(4, dim=1)
                memory = keep.sigmoid() * memory + gate.sigmoid() * new.tanh()
                state = out.sigmoid() * memory.tanh()
            return state

    lstm = make_node("LSTM", ["x", "w", "r"], ["y"], hidden_size=12)
    weights = {"w": np.ones((1, 48, 8), np.float32), "r": np.ones((1, 48, 12), np.float32)}
    model = graph_model(lstm, weights=weights, shape=(6, "n", 8), rank=4)
    assert count_macs(model, [zeros(6, 1, 8)], Path()) * 2 == flops(Unrolled(), torch.randn(1, 6, 8))


def test_product_with_a_vector_costs_its_length_per_row():
    model = graph_model(
        make_node("MatMul", ["x", "w"], ["y"]), weights={"w": np.ones(12, np.float32)}, shape=("n", 5, 12)
    )
    assert count_macs(model, [zeros(1, 5, 12)], Path()) == 5 * 12


def test_shape_that_only_a_run_shows_is_counted():
    nodes = [
        make_node("NonZero", ["x"], ["columns"]),  # one column per number that is not zero
        make_node("Transpose", ["columns"], ["rows"]),
        make_node("Cast", ["rows"], ["numbers"], to=TensorProto.FLOAT),
        make_node("MatMul", ["numbers", "w"], ["y"]),
    ]
    model = graph_model(*nodes, weights={"w": np.ones((2, 3), np.float32)}, shape=("n", 4))
    assert count_macs(model, [np.array([[1, 0, 1, 1]], np.float32)], Path()) == 3 * 2 * 3


class RandomImages(CalibrationDataReader):
    def __init__(self) -> None:
        self.rest = iter(np.random.default_rng(0).random((4, 1, 1, 8, 8), np.float32))

    def get_next(self) -> dict[str, np.ndarray] | None:
        image = next(self.rest, None)
        return None if image is None else {"x": image}


def quantize_with_operators(before: Path, after: Path) -> None:
    quantize_static(before, after, RandomImages(), quant_format=QuantFormat.QOperator)


def quantize_weights(before: Path, after: Path) -> None:
    quantize_dynamic(before, after)


@pytest.mark.filterwarnings("ignore")  # what onnxruntime's quantizer says of itself
@pytest.mark.parametrize(
    ("quantize", "operators"),
    [
        (quantize_with_operators, {"QLinearConv", "QGemm", "QLinearMatMul"}),
        (quantize_weights, {"ConvInteger", "MatMulInteger"}),
    ],
)
def test_quantized_operators_have_the_macs_and_weights_of_their_float_forms(
    quantize: Callable[[Path, Path], None], operators: set[str], tmp_path: Path
):
    rng = np.random.default_rng(0)
    shapes = {"w": (4, 1, 3, 3), "a": (256, 8), "b": (8, 6)}
    weights = {name: rng.random(shape, np.float32) + np.float32(0.1) for name, shape in shapes.items()}
    nodes = [
        make_node("Conv", ["x", "w"], ["c"], pads=[1] * 4),
        make_node("Flatten", ["c"], ["f"]),
        make_node("Gemm", ["f", "a"], ["g"]),
        make_node("MatMul", ["g", "b"], ["y"]),
    ]
    before, after = tmp_path / "float.onnx", tmp_path / "int8.onnx"
    onnx.save(graph_model(*nodes, weights=weights, shape=(1, 1, 8, 8)), before)
    quantize(before, after)
    assert operators <= {node.op_type for node in onnx.load(after).graph.node}
    facts, wanted = (read_facts(path, [zeros(1, 1, 8, 8)]) for path in (after, before))
    assert wanted.macs == 8 * 8 * 4 * 9 + 256 * 8 + 8 * 6
    assert (facts.macs, facts.parameters) == (wanted.macs, wanted.parameters)


def test_model_without_products_has_no_macs():
    assert (
        count_macs(graph_model(make_node("Relu", ["x"], ["y"]), weights={}, shape=("n", 4)), [zeros(1, 4)], Path()) == 0
    )


def test_macs_that_depend_on_the_data_are_refused():
    branch = make_graph(
        [make_node("MatMul", ["x", "w"], ["z"])],
        "branch",
        [],
        [make_tensor_value_info("z", TensorProto.FLOAT, ["n", 4])],
    )
    nodes = [
        make_node("ReduceSum", ["x"], ["sum"], keepdims=0),
        make_node("Cast", ["sum"], ["positive"], to=TensorProto.BOOL),
        make_node("If", ["positive"], ["y"], then_branch=branch, else_branch=branch),
    ]
    model = graph_model(*nodes, weights={"w": np.ones((4, 4), np.float32)}, shape=("n", 4))
    onnx.checker.check_model(model)
    with pytest.raises(ValueError, match=r"gives 'z' .ai.onnx.MatMul. runs only as often as the data decide"):
        count_macs(model, [zeros(1, 4)], Path())


@pytest.mark.parametrize(("operator", "domain"), [("FusedGemm", "com.microsoft"), ("DeformConv", "")])
def test_operator_whose_products_are_not_known_is_refused_by_name(operator: str, domain: str):
    node = make_node(operator, ["x", "w"], ["y"], domain=domain)
    model = graph_model(node, weights={"w": np.ones((4, 4), np.float32)}, shape=("n", 4))
    with pytest.raises(ValueError, match=rf"'y' .*{operator}. are not known"):
        count_macs(model, [zeros(1, 4)], Path())


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ([zeros(2, 4)], r"does not run on inputs of \[\(2, 4\)\]"),
        ([zeros(1, 4, 1)], "does not run"),
        ([zeros(1, 4).astype(np.float64)], "does not run"),
        ([], "takes 1 inputs, got 0"),
    ],
)
def test_inputs_that_the_file_does_not_take_are_refused(inputs: list[np.ndarray], message: str):
    node = make_node("MatMul", ["x", "w"], ["y"])
    model = graph_model(node, weights={"w": np.ones((4, 4), np.float32)}, shape=(1, 4))
    with pytest.raises(ValueError, match=message):
        count_macs(model, inputs, Path())


def test_products_of_an_axis_that_is_broadcast_are_those_of_its_larger_size():
    node = make_node("Einsum", ["w", "x"], ["y"], equation="ij,bi->bj")
    model = graph_model(node, weights={"w": np.ones((4, 6), np.float32)}, shape=("n", 1))
    assert count_macs(model, [zeros(3, 1)], Path()) == 3 * 4 * 6


def test_counting_macs_leaves_the_model_as_it_was():
    model = linear_model(np.ones((4, 4), np.float32))
    before = model.SerializeToString(deterministic=True)
    count_macs(model, [zeros(1, 4)], Path())
    assert model.SerializeToString(deterministic=True) == before


def counted(model: ModelProto) -> tuple[int, int]:
    return count_parameters(model, Path())


def test_zero_weights_are_not_counted_as_nonzero():
    weight = np.arange(12, dtype=np.float32).reshape(3, 4) % 3
    for dtype in (np.float32, np.float16, np.float64):
        assert counted(linear_model(weight.astype(dtype))) == (12, 8)


def test_weight_that_two_layers_share_is_counted_once():
    nodes = [make_node("MatMul", ["x", "w"], ["h"]), make_node("MatMul", ["h", "w"], ["y"])]
    assert counted(graph_model(*nodes, weights={"w": np.ones((4, 4), np.float32)}, shape=("n", 4))) == (16, 16)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ({"value": numpy_helper.from_array(np.eye(4, dtype=np.float32))}, (16, 4)),
        ({"value_floats": [1.0, 0.0, 2.0, 3.0]}, (4, 3)),
    ],
    ids=["tensor", "floats"],
)
def test_weight_in_a_constant_node_is_counted(value: dict[str, object], expected: tuple[int, int]):
    nodes = [make_node("Constant", [], ["w"], **value), make_node("MatMul", ["x", "w"], ["y"])]
    assert counted(graph_model(*nodes, weights={}, shape=("n", 4))) == expected


def test_weights_inside_control_flow_are_counted():
    weight = numpy_helper.from_array(np.ones((4, 4), np.float32), "inner")
    add = make_node("Add", ["x", "inner"], ["z"])
    branch = make_graph([add], "branch", [], [make_tensor_value_info("z", TensorProto.FLOAT, ["n", 4])], [weight])
    node = make_node("If", ["yes"], ["y"], then_branch=branch, else_branch=branch)
    model = graph_model(node, weights={"yes": np.array(True)}, shape=(4, 4))
    assert counted(model) == (16, 16)


def test_branches_with_one_name_for_two_weights_are_not_counted():
    def branch(rows: int) -> onnx.GraphProto:
        weight = numpy_helper.from_array(np.ones((rows, 4), np.float32), "inner")
        value = make_tensor_value_info("z", TensorProto.FLOAT, None)
        return make_graph([make_node("Add", ["x", "inner"], ["z"])], "branch", [], [value], [weight])

    node = make_node("If", ["yes"], ["y"], then_branch=branch(1), else_branch=branch(4))
    with pytest.raises(ValueError, match="two of its graphs hold tensors of one name, 'inner'"):
        counted(graph_model(node, weights={"yes": np.array(True)}, shape=(4, 4)))


def test_branches_with_one_name_for_two_shapes_are_counted():
    def branch(*shape: int) -> onnx.GraphProto:
        constant = make_node("Constant", [], ["shape"], value=numpy_helper.from_array(np.array(shape)))
        value = make_tensor_value_info("z", TensorProto.FLOAT, None)
        return make_graph([constant, make_node("Reshape", ["w", "shape"], ["z"])], "branch", [], [value])

    node = make_node("If", ["yes"], ["y"], then_branch=branch(4, 1), else_branch=branch(2, 2))
    weights = {"yes": np.array(True), "w": np.ones((1, 4), np.float32)}
    assert counted(graph_model(node, weights=weights, shape=(4, 4))) == (4, 4)


def test_shape_constants_and_literals_are_no_parameters():
    nodes = [
        make_node("Reshape", ["x", "shape"], ["a"]),
        make_node("Mul", ["a", "half"], ["b"]),
        make_node("Resize", ["b", "", "scales"], ["c"]),
        make_node("Conv", ["c", "w", "bias"], ["y"]),
    ]
    weights = {
        "shape": np.array([-1, 1, 4, 4], np.int64),
        "half": np.array([0.5], np.float32),
        "scales": np.array([1, 1, 2, 2], np.float32),
        "w": np.ones((1, 1, 3, 3), np.float32),
        "bias": np.ones(1, np.float32),
    }
    assert counted(graph_model(*nodes, weights=weights, shape=("n", 16))) == (10, 10)


def dequantized_linear(
    weight: np.ndarray, scale: np.ndarray, zero_point: np.ndarray | None, **attributes: int
) -> ModelProto:
    names = ["w8", "scale"] + (["zero_point"] if zero_point is not None else [])
    nodes = [make_node("DequantizeLinear", names, ["w"], **attributes), make_node("MatMul", ["x", "w"], ["y"])]
    weights = {"w8": weight, "scale": scale} | ({} if zero_point is None else {"zero_point": zero_point})
    model = graph_model(*nodes, weights=weights, shape=("n", weight.shape[0]))
    onnx.checker.check_model(model)
    return model


QUANTIZED = {
    "symmetric": ((np.ones((), np.float32), np.zeros((), np.int8)), {}),
    "without zero point": ((np.ones((), np.float32), None), {}),
    "asymmetric": ((np.ones((), np.float32), np.array(2, np.int8)), {}),
    "per column": ((np.ones(4, np.float32), np.array([0, 1, -1, 2], np.int8)), {"axis": 1}),
    "per row": ((np.ones(6, np.float32), np.arange(6, dtype=np.int8)), {"axis": -2}),
    "in blocks": (
        (np.ones((3, 4), np.float32), np.arange(12, dtype=np.int8).reshape(3, 4) % 3),
        {"axis": 0, "block_size": 2},
    ),
}


@pytest.mark.parametrize(("parameters", "attributes"), QUANTIZED.values(), ids=QUANTIZED.keys())
def test_quantized_weight_is_zero_where_onnx_dequantizes_it_to_zero(
    parameters: tuple[np.ndarray, np.ndarray | None], attributes: dict[str, int]
):
    weight = np.random.default_rng(0).integers(-1, 3, (6, 4), dtype=np.int8)
    model = dequantized_linear(weight, *parameters, **attributes)
    # the identity matrix brings the dequantized weight out
    (dequantized,) = onnx.reference.ReferenceEvaluator(model).run(None, {"x": np.eye(6, dtype=np.float32)})
    assert 0 < np.count_nonzero(dequantized) < 24
    assert counted(model) == (24, np.count_nonzero(dequantized))
    assert count_macs(model, [zeros(1, 6)], Path()) == 24


@pytest.mark.parametrize(
    ("attributes", "message"),
    [({"axis": 0}, r"got \(3, 4\) for blocks of 1 along axis 0 of \(6, 4\)"), ({"axis": 2}, "got .* along axis 2 of")],
    ids=["too few", "no such axis"],
)
def test_quantized_weight_with_zero_points_that_do_not_fit_it_is_not_counted(attributes: dict[str, int], message: str):
    weight, zero_point = np.ones((6, 4), np.int8), np.ones((3, 4), np.int8)
    model = dequantized_linear(weight, np.ones((3, 4), np.float32), zero_point, **attributes)
    with pytest.raises(ValueError, match=f"weight 'w8' must have a zero point for each block, {message}"):
        counted(model)


def test_quantized_bias_is_counted_and_four_bit_weights_are():
    weight = numpy_helper.from_array(np.zeros((4, 4), np.int8), "w8")
    packed = onnx.helper.make_tensor("w4", TensorProto.INT4, (4, 4), [0, 1] * 8)
    bias = numpy_helper.from_array(np.array([5, 0, 5, 5], np.int32), "b32")
    scale = numpy_helper.from_array(np.ones((), np.float32), "scale")
    nodes = [
        *(make_node("DequantizeLinear", [name, "scale"], [name + "f"]) for name in ("w8", "w4", "b32")),
        make_node("Gemm", ["x", "w8f", "b32f"], ["h"]),
        make_node("MatMul", ["h", "w4f"], ["y"]),
    ]
    model = graph_model(*nodes, weights={}, shape=("n", 4))
    model.graph.initializer.extend([weight, packed, bias, scale])
    onnx.checker.check_model(model)
    assert counted(model) == (36, 11)


@pytest.mark.parametrize(
    ("zero_points", "nonzero"),
    [
        pytest.param(None, 5, id="eight stands for zero"),
        pytest.param([0x21, 0x03], 4, id="each block has a number that stands for zero"),
    ],
)
def test_weights_in_blocks_are_counted_one_by_one(zero_points: list[int] | None, nonzero: int):
    # one output of 40 inputs of 4 bits, in blocks of 16
    codes = np.full(40, 8, np.uint8)
    codes[:3], codes[20], codes[39] = 1, 2, 3
    if zero_points is not None:
        codes[3:16], codes[16:20], codes[21:32], codes[32:39] = 1, 2, 2, 3
        codes[[0, 17, 30, 35]] = 9
    codes = np.concatenate([codes, np.zeros(8, np.uint8)])  # the last block is full
    weights = {"b": codes[::2] | codes[1::2] << 4, "scales": np.ones(3, np.float32)}
    if zero_points is not None:
        weights["zeros"] = np.array(zero_points, np.uint8)
    weights["b"] = weights["b"].reshape(1, 3, 8)
    names = ["x", "b", "scales"] + ["zeros"] * (zero_points is not None)
    node = make_node("MatMulNBits", names, ["y"], domain="com.microsoft", K=40, N=1, bits=4, block_size=16)
    model = graph_model(node, weights=weights, shape=("n", 40))
    assert count_parameters(model, Path()) == (40, nonzero)


def test_weights_in_blocks_without_a_zero_point_for_each_are_not_counted():
    weights = {"b": np.zeros((1, 3, 8), np.uint8), "scales": np.ones(3, np.float32), "zeros": np.zeros(1, np.uint8)}
    node = make_node("MatMulNBits", ["x", *weights], ["y"], domain="com.microsoft", K=40, N=1, bits=4, block_size=16)
    with pytest.raises(ValueError, match=r"weight 'b' must have a zero point for each block, got \(1, 2\)"):
        counted(graph_model(node, weights=weights, shape=("n", 40)))


def test_weights_and_products_inside_a_function_of_the_file_are_counted(tmp_path: Path):
    weight = numpy_helper.from_array(np.eye(4, dtype=np.float32))
    body = [make_node("Constant", [], ["w"], value=weight), make_node("MatMul", ["a", "w"], ["b"])]
    opsets = [make_opsetid("", 21), make_opsetid("mine", 1)]
    model = graph_model(make_node("Product", ["x"], ["y"], domain="mine"), weights={}, shape=("n", 4))
    model.functions.append(onnx.helper.make_function("mine", "Product", ["a"], ["b"], body, opsets))
    model.opset_import.append(opsets[1])
    path = tmp_path / "model.onnx"
    onnx.save(model, path)
    facts = read_facts(path, [zeros(1, 4)])
    assert (facts.parameters, facts.nonzero, facts.macs) == (16, 4, 16)


def test_sparse_tensors_are_refused():
    values = numpy_helper.from_array(np.ones(2, np.float32), "w")
    indices = numpy_helper.from_array(np.array([0, 5]), "indices")
    model = graph_model(make_node("MatMul", ["x", "w"], ["y"]), weights={}, shape=("n", 4))
    model.graph.sparse_initializer.append(onnx.helper.make_sparse_tensor(values, indices, [4, 4]))
    with pytest.raises(ValueError, match="sparse"):
        counted(model)


def test_external_data_counts_as_part_of_the_model(tmp_path: Path):
    weight = np.random.default_rng(0).integers(1, 9, (64, 64)).astype(np.float32)
    weight[:, 0] = 0
    path = save_external(tmp_path, weight)
    facts = read_facts(path, [zeros(1, 64)])
    contents = [path.read_bytes(), (tmp_path / "model.onnx.data").read_bytes()]
    assert len(contents[1]) == weight.nbytes
    assert facts.size_bytes == sum(map(len, contents))
    assert facts.transfer_bytes == sum(len(gzip.compress(content, mtime=0)) for content in contents)
    assert (facts.parameters, facts.nonzero, facts.macs) == (4096, 4032, 4096)


@pytest.mark.parametrize(
    "location",
    ["", ".", "..", "/etc/hostname", "../secret", "sub/secret", "sub/../secret", "a\0b"],
)
def test_external_data_outside_the_directory_of_the_model_is_not_read(tmp_path: Path, location: str):
    directory = tmp_path / "model"
    (directory / "sub").mkdir(parents=True)
    for secret in (tmp_path / "secret", directory / "sub" / "secret"):
        secret.write_bytes(bytes(64))
    path = save_external(directory, np.ones((4, 4), np.float32))
    model = onnx.load(path, load_external_data=False)
    (entry,) = (entry for entry in model.graph.initializer[0].external_data if entry.key == "location")
    entry.value = location
    path.write_bytes(model.SerializeToString())
    with pytest.raises(InputError, match=r"model\.onnx must be a complete ONNX model"):
        read_facts(path, [zeros(1, 4)])


@pytest.mark.parametrize("replace_data", [
    lambda data, other: data.symlink_to(other),
    lambda data, other: data.hardlink_to(other),
    lambda data, _: os.mkfifo(data),
    lambda data, _: data.mkdir(),
    lambda data, _: data.write_bytes(bytes(10)),
    lambda _data, _: None,
], ids=["link", "hard link", "pipe", "directory", "short", "missing"])  # fmt: skip
def test_external_data_that_is_no_whole_file_of_its_own_is_refused(
    tmp_path: Path, replace_data: Callable[[Path, Path], object]
):
    path = save_external(tmp_path, np.ones((4, 4), np.float32))
    data = tmp_path / "model.onnx.data"
    data.rename(tmp_path / "elsewhere")
    replace_data(data, tmp_path / "elsewhere")
    with pytest.raises(InputError):
        read_facts(path, [zeros(1, 4)])


@pytest.mark.parametrize("content", [b"", b"garbage", b"\x08\x0a", b'{"graph": {}}'])
def test_file_that_is_no_model_is_refused(tmp_path: Path, content: bytes):
    path = tmp_path / "model.onnx"
    path.write_bytes(content)
    for file in (path, tmp_path, tmp_path / "missing.onnx"):
        with pytest.raises(InputError, match=str(file)):
            read_facts(file, [zeros(1, 4)])


def test_node_that_lacks_an_input_is_refused(tmp_path: Path):
    model = linear_model(np.ones((4, 4), np.float32))
    del model.graph.node[0].input[1]
    path = tmp_path / "model.onnx"
    path.write_bytes(model.SerializeToString())
    with pytest.raises(InputError, match="MatMul"):
        read_facts(path, [zeros(1, 4)])


def test_damaged_file_gives_facts_or_an_input_error_and_nothing_else(classifier: Path, tmp_path: Path):
    content = classifier.read_bytes()
    choices = random.Random(0)
    damaged = [content[: choices.randrange(len(content))] for _ in range(50)]
    for _ in range(300):
        flipped = bytearray(content)
        for _ in range(choices.choice([1, 3])):
            # the weights are most of the file; damage in them is only another weight
            flipped[choices.choice([choices.randrange(300), choices.randrange(len(content))])] ^= choices.randrange(
                1, 256
            )
        damaged.append(bytes(flipped))
    refused = 0
    for number, changed in enumerate(damaged):
        path = tmp_path / f"{number}.onnx"
        path.write_bytes(changed)
        try:
            assert read_facts(path, [zeros(1, 64)]).size_bytes == len(changed)
        except InputError:
            refused += 1
    assert refused > 50


def test_facts_of_a_file_need_no_torch(classifier: Path):
    code = (
        "import sys; import numpy as np; from pathlib import Path; from compressor.onnx_files.facts import read_facts\n"
        "assert read_facts(Path(sys.argv[1]), [np.zeros((1, 64), np.float32)]).macs == 640\n"
        "assert 'torch' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code, classifier], check=True)
