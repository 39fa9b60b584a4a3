"""Post-training quantization to int8."""

import copy
import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from onnx import TensorProto, numpy_helper
from safetensors.torch import load_file
from torch import Tensor, nn

from compressor import OnnxModel, Samples, StageContext, Task, TorchModel
from compressor.errors import InputError, StageError
from compressor.models.outputs import relative_error
from compressor.records.environment import environment
from compressor.references.reference import Reference
from compressor.stages.int8_ptq import Int8Ptq
from compressor.task import accuracy, evaluate
from tests.example_models import CifarResNet, SeparableNetwork, SequenceNetwork, SignalNetwork
from tests.networks import ConcatenatedNetwork, PlainNetwork, ResidualNetwork

WEIGHTS = Path(__file__).parents[2] / "../shared/data/weights/resnet20_cifar10.safetensors"

INT8_KERNELS = {
    PlainNetwork: {"QLinearConv": 2, "MaxPool": 1, "QGemm": 2},
    ResidualNetwork: {"QLinearConv": 3, "QLinearAdd": 1, "QLinearAveragePool": 1, "QGemm": 1},
    ConcatenatedNetwork: {"QLinearConv": 3, "QLinearConcat": 1, "QGemm": 1},
    SeparableNetwork: {
        "QLinearConv": 4,
        "QLinearAveragePool": 2,
        "QLinearSigmoid": 1,
        "QLinearMul": 1,
        "QLinearLeakyRelu": 1,
        "QGemm": 1,
    },
    SignalNetwork: {"QLinearConv": 2, "MaxPool": 1, "QLinearAveragePool": 1, "QGemm": 1},
}
MOVES = {"Reshape", "Transpose", "Slice", "Pad"}


@dataclass(frozen=True)
class Pair:
    """A trained network and what int8_ptq makes of it, with what it said."""

    float_model: TorchModel
    int8_model: OnnxModel
    said: tuple[str, ...]


@pytest.fixture(scope="module")
def trained(digits_task: Task) -> Callable[[type[nn.Module]], TorchModel]:
    """Train a network on the digits for a second; each once."""
    done: dict[type[nn.Module], TorchModel] = {}

    def train(network: type[nn.Module]) -> TorchModel:
        if network not in done:
            torch.manual_seed(0)
            module = network()
            optimizer = torch.optim.Adam(module.parameters(), lr=0.01)
            images, targets = digits_task.train.inputs[0], digits_task.train.targets
            for _ in range(8):
                for rows in torch.randperm(len(targets)).split(64):
                    optimizer.zero_grad()
                    F.cross_entropy(module(images[rows]), targets[rows]).backward()
                    optimizer.step()
            done[network] = wrap(module)
        return done[network]

    return train


@pytest.fixture(scope="module")
def pair(
    request: pytest.FixtureRequest,
    trained: Callable[[type[nn.Module]], TorchModel],
    digits_task: Task,
    tmp_path_factory: pytest.TempPathFactory,
) -> Pair:
    model = trained(request.param)
    said: list[str] = []
    int8 = apply(Int8Ptq(), model, digits_task, tmp_path_factory.mktemp("int8"), said.append)
    return Pair(model, int8, tuple(said))


def wrap(module: nn.Module) -> TorchModel:
    return TorchModel(module.eval(), Reference(factory="tests.networks:PlainNetwork"))


def apply(
    stage: Int8Ptq, model: TorchModel, task: Task, work_dir: Path, log: Callable[[str], None] = print
) -> OnnxModel:
    return stage.apply(model, task, StageContext(model, torch.device("cpu"), 0, work_dir, log))


def optimized_operators(model: OnnxModel, directory: Path) -> Counter[str]:
    """Operators that ONNX Runtime runs, on one thread."""
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(directory / "optimized.onnx")
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    onnxruntime.InferenceSession(model.path, options, providers=["CPUExecutionProvider"])
    operators = Counter(node.op_type for node in onnx.load(directory / "optimized.onnx").graph.node)
    operators["MaxPool"] += operators.pop("NhwcMaxPool", 0)
    return +operators


def weights(model: OnnxModel) -> list[np.ndarray]:
    """The int8 tensors that are no zero points."""
    tensors = [t for t in onnx.load(model.path).graph.initializer if t.data_type == TensorProto.INT8]
    return [array for array in map(numpy_helper.to_array, tensors) if array.ndim > 1]


every_network = pytest.mark.parametrize("pair", INT8_KERNELS, indirect=True, ids=lambda network: network.__name__)
plain_network = pytest.mark.parametrize("pair", [PlainNetwork], indirect=True, ids=["PlainNetwork"])


@every_network
def test_all_layers_run_as_int8_kernels_between_one_q_and_float_logits(pair: Pair, tmp_path: Path) -> None:
    operators = optimized_operators(pair.int8_model, tmp_path)
    assert {name: count for name, count in operators.items() if name not in MOVES} == {
        "QuantizeLinear": 1,
        **INT8_KERNELS[type(pair.float_model.module)],
    }


@every_network
def test_accuracy_stays_within_a_point_of_the_float_model(pair: Pair, digits_task: Task) -> None:
    before, after = (
        evaluate((accuracy,), model.predict, digits_task.test)["accuracy"]
        for model in (pair.float_model, pair.int8_model)
    )
    assert before > 0.9
    assert after >= before - 0.012  # four of 360 images


@every_network
def test_weights_are_stored_once_as_7_bit_integers_that_use_their_range(pair: Pair) -> None:
    stored = weights(pair.int8_model)
    floats = [p for p in pair.float_model.module.parameters() if p.ndim > 1]
    assert sorted(array.size for array in stored) == sorted(parameter.numel() for parameter in floats)
    assert all(np.abs(array).max() == 63 for array in stored)


@every_network
def test_file_is_the_weights_and_little_more(pair: Pair) -> None:
    stored = weights(pair.int8_model)
    weight_bytes = sum(array.size for array in stored)
    # float32 bias and scale, int8 zero point, and for the last layer int32 zero points and a second scale
    channel_bytes = sum(9 * array.shape[0] for array in stored) + 8 * 10
    operators = sum(INT8_KERNELS[type(pair.float_model.module)].values())
    assert pair.int8_model.path.stat().st_size < weight_bytes + channel_bytes + 220 * operators + 400


@plain_network
def test_ranges_come_from_samples_spread_over_the_calibration_split(
    pair: Pair, digits_task: Task, tmp_path: Path
) -> None:
    seen: list[int] = []

    class Watched:
        def __len__(self) -> int:
            return len(digits_task.calibration)

        def __getitem__(self, index: int) -> tuple[tuple[Tensor, ...], Tensor]:
            seen.append(index)
            return digits_task.calibration[index]

    said: list[str] = []
    task = replace(digits_task, calibration=Watched())
    apply(Int8Ptq(calibration_samples=8), pair.float_model, task, tmp_path, said.append)
    assert sorted(set(seen)) == list(range(0, 256, 32))
    assert said[0] == "calibrated on 8 samples, fewer than 64: ranges may be too small"
    assert pair.said[0] == "calibrated on 256 samples"  # all there are


@plain_network
def test_result_is_byte_identical_and_the_input_model_as_before(pair: Pair, digits_task: Task, tmp_path: Path) -> None:
    module = pair.float_model.module
    before = copy.deepcopy(module.state_dict())
    again = apply(Int8Ptq(), pair.float_model, digits_task, tmp_path)
    assert again.path.read_bytes() == pair.int8_model.path.read_bytes()
    assert not module.training
    for name, tensor in module.state_dict().items():
        torch.testing.assert_close(tensor, before[name], rtol=0, atol=0)


@pytest.mark.skipif(
    environment()["architecture"] == "x86_64" and not {"avx_vnni", "avx512_vnni"} & set(environment()["cpu_flags"]),
    reason="sums of an x86-vnni file overflow on an x86 processor without VNNI, so the stage refuses it",
)
@plain_network
def test_vnni_target_has_8_bit_weights_and_is_closer_to_float(pair: Pair, digits_task: Task, tmp_path: Path) -> None:
    vnni = apply(Int8Ptq(target="x86-vnni"), pair.float_model, digits_task, tmp_path)
    assert all(np.abs(array).max() == 127 for array in weights(vnni))
    images = digits_task.test.inputs
    expected = pair.float_model.predict(images)
    assert relative_error(vnni.predict(images), expected) < relative_error(pair.int8_model.predict(images), expected)


@pytest.mark.parametrize("pair", [ResidualNetwork], indirect=True, ids=["ResidualNetwork"])
def test_channels_that_pruning_set_to_zero_keep_their_bias(pair: Pair, digits_task: Task, tmp_path: Path) -> None:
    module = copy.deepcopy(pair.float_model.module)
    with torch.no_grad():
        module.pointwise.weight[:8] = 0
        module.bn3.bias[:8] = 3.0  # alone in its channel: the weights' scale must not push it out of int32
    model = wrap(module)
    int8 = apply(Int8Ptq(), model, digits_task, tmp_path)
    images = digits_task.test.inputs
    assert relative_error(int8.predict(images), model.predict(images)) < 0.05  # seven bits, five layers


def test_float_stream_of_a_transformer_stays_float(
    trained: Callable[[type[nn.Module]], TorchModel], digits_task: Task, tmp_path: Path
) -> None:
    model = trained(SequenceNetwork)
    int8 = apply(Int8Ptq(), model, digits_task, tmp_path)
    operators = optimized_operators(int8, tmp_path)
    assert operators["MatMulIntegerToFloat"] + operators["QGemm"] == 4  # all linear layers
    assert not operators["QLinearAdd"]
    images = digits_task.test.inputs
    assert relative_error(int8.predict(images), model.predict(images)) < 0.05


def test_layers_that_stay_in_float_are_named(digits_task: Task, tmp_path: Path) -> None:
    module = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten(), nn.Bilinear(144, 144, 10))
    module.forward = lambda x: module[2](*[module[1](module[0](x))] * 2)  # type: ignore[method-assign]
    said: list[str] = []
    apply(Int8Ptq(), wrap(module), digits_task, tmp_path, said.append)
    assert said[1] == "stays in float: 2"


def test_model_without_a_layer_for_int8_is_refused(digits_task: Task, tmp_path: Path) -> None:
    with pytest.raises(StageError, match="the model has none"):
        apply(Int8Ptq(), wrap(nn.Sequential(nn.Flatten(), nn.Softmax(dim=1))), digits_task, tmp_path)


@plain_network
def test_weight_that_is_not_finite_is_refused_by_name(pair: Pair, digits_task: Task, tmp_path: Path) -> None:
    module = copy.deepcopy(pair.float_model.module)
    with torch.no_grad():
        module.fc1.weight[0, 0] = math.inf
    with pytest.raises(InputError, match=r"NaN or infinity in the parameter 'fc1\.weight'"):
        apply(Int8Ptq(), wrap(module), digits_task, tmp_path)


@plain_network
def test_layer_that_overflows_is_refused_by_name(pair: Pair, digits_task: Task, tmp_path: Path) -> None:
    module = copy.deepcopy(pair.float_model.module)
    with torch.no_grad():
        module.conv2.weight.mul_(1e38)
    with pytest.raises(InputError, match=r"NaN or infinity in the outputs of 'conv2'"):
        apply(Int8Ptq(), wrap(module), digits_task, tmp_path)


@plain_network
def test_calibration_sample_that_is_not_finite_is_refused(pair: Pair, digits_task: Task, tmp_path: Path) -> None:
    images = digits_task.calibration.inputs[0].clone()
    images[7, 0, 0, 0] = math.nan
    task = replace(digits_task, calibration=Samples((images,), digits_task.calibration.targets))
    with pytest.raises(InputError, match=r"NaN or infinity in the input 'x'"):
        apply(Int8Ptq(), pair.float_model, task, tmp_path)


class MaskedAttention(nn.Module):
    """Rows of an image attend to those above them; a buffer holds minus infinity for the others."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.value, self.head = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 10)
        self.register_buffer("mask", torch.full((8, 8), -math.inf).triu(1))

    def forward(self, x: Tensor) -> Tensor:
        rows = x[:, 0]
        weights = (self.query(rows) @ rows.transpose(1, 2) + self.mask).softmax(dim=-1)
        return self.head((weights @ self.value(rows)).mean(dim=1))


def test_mask_of_minus_infinity_is_no_fault(digits_task: Task, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = wrap(MaskedAttention().eval())
    exported = apply(Int8Ptq(), model, digits_task, tmp_path)
    inputs = digits_task.validation.inputs
    # a product of vectors of 8 takes two of 256 codes in a row
    assert relative_error(exported.predict(inputs), model.predict(inputs)) < 0.05


def test_empty_calibration_split_is_refused(digits_task: Task, tmp_path: Path) -> None:
    empty = Samples((torch.zeros(0, 1, 8, 8),), torch.zeros(0, dtype=torch.long))
    with pytest.raises(InputError, match="calibration split must have at least 8 samples, got 0"):
        apply(Int8Ptq(), wrap(nn.Flatten()), replace(digits_task, calibration=empty), tmp_path)


@pytest.mark.slow
def test_real_resnet_runs_wholly_in_int8(tmp_path: Path) -> None:
    if not WEIGHTS.exists():
        pytest.skip(f"needs {WEIGHTS}")
    module = CifarResNet(blocks=3)
    module.load_state_dict(load_file(WEIGHTS))
    coarse = torch.randn(300, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    images = F.interpolate(coarse, size=32, mode="bicubic")  # smooth, as photographs are
    split = Samples((images,), torch.zeros(300, dtype=torch.long))
    model = wrap(module)
    int8 = apply(Int8Ptq(), model, Task(split, split, split, split, (images[:2],)), tmp_path)
    operators = optimized_operators(int8, tmp_path)
    assert {name: count for name, count in operators.items() if name not in MOVES} == {
        "QuantizeLinear": 1,
        "QLinearConv": 19,
        "QLinearAdd": 9,
        "QLinearAveragePool": 1,
        "QGemm": 1,
    }
    assert relative_error(int8.predict((images,)), model.predict((images,))) < 0.1
    assert int8.path.stat().st_size < 1.05 * sum(parameter.numel() for parameter in module.parameters())
