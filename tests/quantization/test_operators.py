"""Which int8 kernels ONNX Runtime runs for each operator, and how far their outputs are from the float operators'."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import onnx
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from compressor import OnnxModel, Samples, Task
from compressor.export.to_onnx import to_unchecked_onnx
from compressor.models.outputs import relative_error
from compressor.quantization.calibration import calibrate
from compressor.quantization.conversion import affine_of, convert, round_weights
from compressor.quantization.float_graph import float_graph, fold_batch_norms
from compressor.quantization.int8_plan import plan_int8
from transformer_networks import bert, gpt2


class Written(nn.Module):
    """Layers, and a function of them and of the input as forward."""

    def __init__(self, forward: Callable[[nn.ModuleList, Tensor], Tensor], *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.written = forward

    def forward(self, x: Tensor) -> Tensor:
        return self.written(self.layers, x)


def conv(channels_in: int = 8, channels: int = 8, kernel: int = 3, **settings) -> nn.Conv2d:
    return nn.Conv2d(channels_in, channels, kernel, **{"padding": kernel // 2, **settings})


@dataclass(frozen=True)
class Case:
    """A network, its input without the batch, and the operators beside the first Q and those that only move."""

    network: Callable[[], nn.Module]
    shape: tuple[int, ...]
    operators: dict[str, int]


IMAGE = (8, 8, 8)


def squeeze_excite_with_linears() -> nn.Module:
    def forward(m: nn.ModuleList, x: Tensor) -> Tensor:
        y = m[0](x)
        weights = F.hardsigmoid(m[2](F.relu(m[1](y.mean((2, 3))))))
        return m[3](y * weights[:, :, None, None]).flatten(1)

    return Written(forward, conv(), nn.Linear(8, 8), nn.Linear(8, 8), conv())


def squeeze_excite_with_convolutions() -> nn.Module:
    def forward(m: nn.ModuleList, x: Tensor) -> Tensor:
        y = m[0](x)
        return m[3](y * F.hardsigmoid(m[2](F.relu(m[1](F.adaptive_avg_pool2d(y, 1))))))

    return Written(forward, conv(), conv(kernel=1), nn.Sequential(conv(kernel=1), nn.BatchNorm2d(8)), conv())


def normalized_first() -> nn.Module:
    def forward(m: nn.ModuleList, x: Tensor) -> Tensor:
        y = m[0](x)
        return m[3](F.relu(m[2](y + m[4](F.relu(m[1](y))))))

    return Written(forward, conv(), nn.BatchNorm2d(8), nn.BatchNorm2d(8), conv(), conv())


def arithmetic() -> nn.Module:
    def forward(m: nn.ModuleList, x: Tensor) -> Tensor:
        a, b = m[0](x), m[1](x)
        total = (a + b - 1.5) * 1.5 / 3
        return m[2](total * b[:, :1] * m[3].scale)

    scaled = nn.Module()
    scaled.scale = nn.Parameter(torch.linspace(0.5, 1.5, 8)[:, None, None])
    return Written(forward, conv(), conv(), conv(), scaled)


def movements() -> nn.Module:
    def forward(m: nn.ModuleList, x: Tensor) -> Tensor:
        left, right = m[0](x).chunk(2, dim=1)
        y = torch.cat([left, m[1](right)], dim=1).unflatten(1, (2, 4)).transpose(1, 2).flatten(1, 2)
        y = F.pad(F.interpolate(m[2](y), size=(16, 16)), (1, 1, 2, 2))
        return m[3](F.pixel_shuffle(y, 2)[:, :1].expand(-1, 4, -1, -1))

    return Written(forward, conv(), conv(4, 4), conv(), conv(4, 4))


def pools() -> nn.Module:
    def forward(m: nn.ModuleList, x: Tensor) -> Tensor:
        y = F.adaptive_max_pool2d(F.max_pool2d(m[0](x), 3, 1, 1), 4)
        z = F.adaptive_avg_pool2d(F.avg_pool2d(m[1](x), 3, 1, 1), 4)
        return m[2]((y + z).amax((2, 3), keepdim=True))

    return Written(forward, conv(), conv(), conv(kernel=1))


def attention() -> nn.Module:
    def forward(m: nn.ModuleList, x: Tensor) -> Tensor:
        x = m[0](x)
        x = x + m[1](x, x, x, need_weights=False)[0]
        return m[3](F.gelu(m[2](x)))

    return Written(
        forward,
        nn.Embedding(50, 16),
        nn.MultiheadAttention(16, 2, batch_first=True),
        nn.Sequential(nn.LayerNorm(16), nn.Linear(16, 32)),
        nn.Linear(32, 16),
    )


CASES = {
    "convolutions": Case(
        lambda: nn.Sequential(conv(padding="same"), conv(dilation=2, padding=2), conv(groups=4), conv(groups=8)),
        IMAGE,
        {"QLinearConv": 4, "DequantizeLinear": 1},
    ),
    "signals": Case(
        lambda: nn.Sequential(
            nn.Conv1d(8, 8, 3, padding="same"), nn.Conv1d(8, 8, 3, dilation=2, groups=4), nn.Conv1d(8, 8, 3, groups=8)
        ),
        (8, 16),
        {"QLinearConv": 3, "DequantizeLinear": 1},
    ),
    # ONNX Runtime has no int8 kernel for them; the clip keeps it from rounding their weight a second time
    "transposed convolutions": Case(
        lambda: nn.Sequential(
            conv(), nn.ConvTranspose2d(8, 12, 3, 2, groups=2, bias=False), nn.BatchNorm2d(12), nn.ReLU(), conv(12)
        ),
        IMAGE,
        {"QLinearConv": 2, "ConvTranspose": 1, "QuantizeLinear": 1, "DequantizeLinear": 2, "Clip": 1},
    ),
    "linear layers": Case(
        lambda: Written(
            lambda m, x: torch.mm(torch.addmm(m[2].bias, F.relu(m[1](m[0](x))), m[2].weight), m[3].weight),
            *(nn.Linear(16, 16), nn.BatchNorm1d(16), nn.Linear(16, 16), nn.Linear(16, 16)),
        ),
        (16,),
        {"QGemm": 2, "MatMulIntegerToFloat": 1},
    ),
    "BatchNorm before convolutions": Case(
        normalized_first, IMAGE, {"QLinearConv": 5, "QLinearAdd": 1, "DequantizeLinear": 1}
    ),
    "activations with a kernel": Case(
        lambda: nn.Sequential(
            *(conv(), nn.ReLU6(), conv(), nn.Hardswish(), conv(), nn.SiLU(), conv(), nn.Tanh()),
            *(conv(), nn.PReLU(), conv(), nn.LeakyReLU(), conv(), nn.Hardsigmoid(), conv(), nn.Hardtanh(), conv()),
        ),
        IMAGE,
        {
            "QLinearConv": 9,
            "QLinearAdd": 2,  # of Hardswish and of Tanh
            "QLinearMul": 2,  # of Hardswish and of SiLU
            "QLinearSigmoid": 2,  # of SiLU and of Tanh
            "QLinearLeakyRelu": 2,  # of PReLU with one slope too
            "DequantizeLinear": 1,
        },
    ),
    "activations without": Case(
        lambda: nn.Sequential(conv(), nn.GELU(), conv(), nn.PReLU(8), conv(), nn.ELU(), conv()),
        IMAGE,
        {"QLinearConv": 4, "Gelu": 1, "PRelu": 1, "Elu": 1, "QuantizeLinear": 3, "DequantizeLinear": 4, "Clip": 3},
    ),
    "arithmetic": Case(arithmetic, IMAGE, {"QLinearConv": 3, "QLinearAdd": 2, "QLinearMul": 2, "DequantizeLinear": 1}),
    "movements": Case(movements, IMAGE, {"QLinearConv": 4, "QLinearConcat": 1, "DequantizeLinear": 1}),
    "pools": Case(
        pools,
        IMAGE,
        {
            "QLinearConv": 3,
            "QLinearAveragePool": 2,
            "MaxPool": 2,
            "QLinearAdd": 1,
            "ReduceMax": 1,
            "DequantizeLinear": 1,
        },
    ),
    # Hardsigmoid is the end of the range
    "squeeze-excite with linears": Case(
        squeeze_excite_with_linears,
        IMAGE,
        {"QLinearConv": 2, "QLinearAveragePool": 1, "QGemm": 2, "QLinearMul": 1, "DequantizeLinear": 1},
    ),
    "squeeze-excite with convolutions": Case(
        squeeze_excite_with_convolutions,
        IMAGE,
        {"QLinearConv": 4, "QLinearAveragePool": 1, "QLinearMul": 1, "DequantizeLinear": 1},
    ),
    "GroupNorm and Softmax": Case(
        lambda: nn.Sequential(
            conv(), nn.GroupNorm(2, 8), nn.Flatten(2), nn.Softmax(dim=2), nn.Flatten(), nn.Linear(512, 4)
        ),
        IMAGE,
        {},
    ),
}
MOVES = {"Concat", "DepthToSpace", "Expand", "Gather", "Pad", "Reshape", "Resize", "Shape", "Slice", "Split", "Squeeze"}
MOVES |= {"Transpose", "Unsqueeze"}


def int8(module: nn.Module, inputs: Tensor, directory: Path) -> OnnxModel:
    split = Samples((inputs,), torch.zeros(len(inputs), dtype=torch.long))
    task = Task(split, split, split, split, (inputs[:2],))
    graph, plan = plan_int8(fold_batch_norms(float_graph(module, task)))
    affines = affine_of(plan, calibrate(graph, plan, split, range(len(inputs)), "minmax"))
    weights = round_weights(graph, plan, affines, 63)
    return to_unchecked_onnx(convert(graph, plan, affines, weights), task, directory / "model.onnx")


def optimized_operators(model: OnnxModel, directory: Path) -> Counter[str]:
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(directory / "optimized.onnx")
    options.log_severity_level = 3
    onnxruntime.InferenceSession(model.path, options, providers=["CPUExecutionProvider"])
    operators = Counter(node.op_type for node in onnx.load(directory / "optimized.onnx").graph.node)
    operators["MaxPool"] += operators.pop("NhwcMaxPool", 0)
    return +Counter({name: count for name, count in operators.items() if name not in MOVES})


def random_network(build: Callable[[], nn.Module]) -> nn.Module:
    """The network with random weights and statistics, so that a BatchNorm changes something."""
    torch.manual_seed(0)
    module = build().eval()
    for layer in module.modules():
        if isinstance(layer, nn.BatchNorm1d | nn.BatchNorm2d):
            for tensor in (layer.weight.data, layer.running_var):
                tensor.uniform_(0.5, 1.5)
            for tensor in (layer.bias.data, layer.running_mean):
                tensor.normal_()
    return module


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_operators_run_as_int8_kernels_that_are_close_to_float(case: Case, tmp_path: Path) -> None:
    module, inputs = random_network(case.network), torch.randn(16, *case.shape)
    model = int8(module, inputs, tmp_path)
    operators = optimized_operators(model, tmp_path)
    with torch.no_grad():
        error = relative_error(model.predict((inputs,)), module(inputs))
    if case.operators:
        assert operators == Counter(case.operators) + Counter(QuantizeLinear=1)
    # a rounding to one of 256 steps makes about 0.6 %, of weights to one of 127 about 1 %; up to ten of them in a row
    assert error < 0.08


def test_linear_layer_on_vectors_has_one_scale_if_its_channels_are_alike(tmp_path: Path) -> None:
    layers = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 8)).eval()
    with torch.no_grad():
        layers[2].weight *= torch.tensor([1.0, *[0.01] * 7])[:, None]
    model = int8(layers, torch.randn(16, 16), tmp_path)
    graph = onnx.load(model.path).graph
    sizes = {tensor.name: tuple(tensor.dims) for tensor in graph.initializer}
    weights = [
        node for node in graph.node if node.op_type == "DequantizeLinear" and len(sizes.get(node.input[0], ())) == 2
    ]
    assert [(sizes[node.input[1]], sizes[node.input[2]]) for node in weights] == [((), ()), ((8,), (8,))]
    assert optimized_operators(model, tmp_path)["QGemm"] == 2


def test_embeddings_are_stored_and_attention_multiplies_in_float(tmp_path: Path) -> None:
    module, tokens = random_network(attention), torch.randint(0, 50, (16, 5))
    model = int8(module, tokens, tmp_path)
    operators = optimized_operators(model, tmp_path)
    # the four linear layers: two of the attention, which flattens what the second reads
    assert operators["MatMulIntegerToFloat"] + operators["QGemm"] == 4
    assert operators["Softmax"] == operators["LayerNormalization"] == 1
    assert operators["MatMul"] + operators["FusedMatMul"] == 2
    stored = [t for t in onnx.load(model.path).graph.initializer if list(t.dims) == [50, 16]]
    assert [tensor.data_type for tensor in stored] == [onnx.TensorProto.INT8]
    with torch.no_grad():
        assert relative_error(model.predict((tokens,)), module(tokens)) < 0.05


def test_padding_with_another_number_than_zero_keeps_that_number(tmp_path: Path) -> None:
    module = random_network(lambda: Written(lambda m, x: m[1](F.pad(m[0](x), (1, 1, 1, 1), value=9.0)), conv(), conv()))
    inputs = torch.randn(16, *IMAGE)
    model = int8(module, inputs, tmp_path)
    with torch.no_grad():
        assert relative_error(model.predict((inputs,)), module(inputs)) < 0.05


@pytest.mark.parametrize(
    ("build", "linears"),
    [
        pytest.param(gpt2, 4 + 1, id="GPT-2, whose layers are Conv1D and whose last is its embedding"),
        pytest.param(bert, 6 + 2, id="BERT"),
    ],
)
def test_language_models_run_linear_layers_in_int8_and_attention_in_float(
    build: Callable[..., nn.Module], linears: int, tmp_path: Path
) -> None:
    module, tokens = random_network(lambda: build(layers=1)), torch.randint(0, 50, (16, 5))
    model = int8(module, tokens, tmp_path)
    operators = optimized_operators(model, tmp_path)
    assert operators["MatMulIntegerToFloat"] + operators["QGemm"] == linears
    assert operators["MatMul"] + operators["FusedMatMul"] == 2
    assert operators["Softmax"] == 1
    assert operators["Gemm"] + operators["QLinearMatMul"] == 0
    with torch.no_grad():
        assert relative_error(model.predict((tokens,)), module(tokens)) < 0.08
