"""What is written as float runs as float under ONNX Runtime, at each level of its optimizer."""

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from onnx import ModelProto, numpy_helper
from torch import Tensor, nn
from torch.fx import GraphModule

from compressor import Samples, Task
from compressor.export.to_onnx import to_unchecked_onnx
from compressor.quantization.deployment import output_quantum
from compressor.quantization.float_graph import float_graph, fold_batch_norms
from compressor.quantization.int8_model import Int8Model, predict
from compressor.quantization.recipe import Recipe, int8_model

LEVELS = ("ORT_DISABLE_ALL", "ORT_ENABLE_BASIC", "ORT_ENABLE_EXTENDED", "ORT_ENABLE_LAYOUT", "ORT_ENABLE_ALL")


class Images(nn.Module):
    """Convolutions in int8, and after each something in float whose output the next one reads as uint8."""

    floats = ("conv", "normalized", "pooled", "transposed", "sigmoid", "leaky", "average", "sum", "matmul", "volume")

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 8, 3, padding=1)
        self.int8 = nn.ModuleList(nn.Conv2d(8, 8, 3, padding=1) for _ in range(11))
        self.conv = nn.Conv2d(8, 8, 3, padding=1)
        self.normalized, self.bn = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.pooled = nn.Conv2d(8, 8, 5, padding=2)
        self.transposed = nn.ConvTranspose2d(8, 8, 2, stride=2)
        self.sigmoid, self.leaky, self.average = nn.Sigmoid(), nn.LeakyReLU(), nn.AvgPool2d(2)
        self.slopes = nn.PReLU(8)
        self.volume = nn.Conv3d(8, 8, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.int8[0](self.conv(F.relu(self.stem(x))))
        x = self.int8[1](F.relu(self.bn(self.normalized(x))))
        x = self.int8[2](F.max_pool2d(self.pooled(x), 2))
        x = self.int8[3](self.transposed(x))
        x = self.int8[4](self.sigmoid(x))
        x = self.int8[5](self.leaky(x))
        x = self.int8[6](self.slopes(x))
        x = self.int8[7](self.average(x))
        x = self.int8[8](torch.add(x, torch.roll(x, 1, 1)))
        x = self.int8[9](torch.matmul(x, x.transpose(2, 3)))
        return self.int8[10](self.volume(x.unsqueeze(2)).squeeze(2))


class Vectors(nn.Module):
    """Linear layers behind a convolution; the first is kept and has one output that is a hundred times as large."""

    floats = ("kept",)

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.kept, self.last = nn.Conv2d(1, 4, 3, padding=1), nn.Linear(16, 16), nn.Linear(16, 10)
        with torch.no_grad():
            self.kept.weight[0] *= 100

    def forward(self, x: Tensor) -> Tensor:
        x = F.adaptive_avg_pool2d(F.relu(self.stem(x)), 2).flatten(1)
        return self.last(F.relu(self.kept(x)))


def int8_of(module: nn.Module, task: Task, keep_float: tuple[str, ...]) -> Int8Model:
    return quantize(fold_batch_norms(float_graph(module.eval(), task)), task, keep_float)


def quantize(graph: GraphModule, task: Task, keep_float: tuple[str, ...]) -> Int8Model:
    recipe = Recipe("portable", "minmax", "nearest", bias_correction=False, seed=0)
    return int8_model(graph, task.calibration, range(16), recipe, keep_float=keep_float)


def images() -> Task:
    inputs = torch.rand(16, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    split = Samples((inputs,), torch.zeros(16))
    return Task(train=split, validation=split, test=split, calibration=split, example_inputs=(inputs[:2],))


def optimize(path: Path, level: str) -> tuple[ModelProto, onnxruntime.InferenceSession]:
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = getattr(onnxruntime.GraphOptimizationLevel, level)
    options.optimized_model_filepath = str(path.with_suffix(f".{level}.onnx"))
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return onnx.load(options.optimized_model_filepath), session


@pytest.fixture(scope="module", params=[Images, Vectors], ids=["images", "vectors"])
def written(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Int8Model, Task, Path]:
    torch.manual_seed(0)
    task = images()
    int8 = int8_of(request.param(), task, request.param.floats)
    path = tmp_path_factory.mktemp("shielded") / "model.onnx"
    return int8, task, to_unchecked_onnx(int8.int8_graph, task, path).path


@pytest.mark.parametrize("level", LEVELS)
def test_kept_layers_have_float_kernels_and_float_weights(level: str, written: tuple[Int8Model, Task, Path]) -> None:
    int8, task, path = written
    model, session = optimize(path, level)
    kinds = Counter(node.op_type for node in model.graph.node)
    convolutions = sum(unit.weight is not None and bool(unit.inputs) for unit in int8.plan.units)
    if level not in {"ORT_DISABLE_ALL", "ORT_ENABLE_BASIC"}:
        assert kinds["QLinearConv"] + kinds["QGemm"] == convolutions
    if convolutions > 2:
        for operator in (
            "QLinearSigmoid",
            "QLinearLeakyRelu",
            "QLinearAdd",
            "QLinearAveragePool",
            "MatMulIntegerToFloat",
        ):
            assert kinds[operator] == 0
        floats = ("ConvTranspose", "Sigmoid", "LeakyRelu", "PRelu", "AveragePool", "Add")
        assert {operator: kinds[operator] for operator in floats} == dict.fromkeys(floats, 1)
        assert kinds["MatMul"] + kinds["FusedMatMul"] == 1
    inputs = task.validation.inputs
    (theirs,) = session.run(None, {session.get_inputs()[0].name: inputs[0].numpy()})
    difference = (predict(int8.int8_graph, inputs) - torch.from_numpy(theirs)).square().mean().sqrt()
    # a code on the edge between two may be the other one; weights that were rounded again make 2 to 60 quanta
    assert difference < 0.5 * output_quantum(int8.int8_graph, inputs)


def test_every_weight_of_a_kept_layer_is_in_the_optimized_file_as_it_was(
    written: tuple[Int8Model, Task, Path],
) -> None:
    int8, _, path = written
    model, _ = optimize(path, "ORT_ENABLE_EXTENDED")  # the next level reorders weights
    stored = [numpy_helper.to_array(tensor) for tensor in model.graph.initializer]
    kept = [tensor for name, tensor in int8.graph.named_parameters() if is_kept(name)]
    assert kept
    for weight in kept:
        numbers = weight.detach().numpy()
        assert any(np.array_equal(numbers, one) or np.array_equal(numbers.T, one) for one in stored)


def is_kept(name: str) -> bool:
    return name in {"conv.weight", "pooled.weight", "volume.weight", "kept.weight"}


def test_layers_in_the_chain_of_a_gate_may_be_kept_one_by_one(digits_task: Task) -> None:
    class Gate(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.squeeze, self.excite = nn.Conv2d(1, 8, 3), nn.Linear(8, 4), nn.Linear(4, 8)
            self.head = nn.Linear(8, 10)

        def forward(self, x: Tensor) -> Tensor:
            x = F.relu(self.conv(x))
            gate = self.excite(F.relu(self.squeeze(x.mean((2, 3))))).sigmoid()
            return self.head((x * gate[:, :, None, None]).mean((2, 3)))

    torch.manual_seed(0)
    graph = fold_batch_norms(float_graph(Gate().eval(), digits_task))
    x = digits_task.example_inputs
    for layer in quantize(graph, digits_task, ()).plan.layers:
        int8 = quantize(graph, digits_task, (layer,))
        assert layer not in int8.plan.layers
        assert set(int8.plan.activations) == {
            name for unit in int8.plan.units for name in (*unit.inputs, unit.output) if name is not None
        }
        assert predict(int8.int8_graph, x).isfinite().all()
