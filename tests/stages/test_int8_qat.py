"""Quantization-aware training to int8."""

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from pydantic import ValidationError
from torch import nn

from compressor import OnnxModel, Samples, Stage, StageContext, Task, TorchModel
from compressor.errors import InputError, StageError
from compressor.models.kept_zeros import zeros_of
from compressor.models.outputs import relative_error
from compressor.references.reference import Reference
from compressor.stages.int8_ptq import Int8Ptq
from compressor.stages.int8_qat import Int8Qat
from compressor.stages.magnitude_pruning import MagnitudePruning
from compressor.stages.training import Training
from compressor.stages.weight_pruning import WeightPruning
from compressor.task import accuracy, evaluate
from networks import PlainNetwork, ResidualNetwork
from processes import run_two
from stages.test_int8_ptq import optimized_operators, weights


class Int8(NamedTuple):
    """What a stage made, and what it said."""

    model: OnnxModel
    said: list[str]


@pytest.fixture(scope="module")
def trained(digits_task: Task, tmp_path_factory: pytest.TempPathFactory) -> Callable[[type[nn.Module]], TorchModel]:
    """Train a network on the digits for a second; each once."""
    done: dict[type[nn.Module], TorchModel] = {}

    def train(network: type[nn.Module]) -> TorchModel:
        if network not in done:
            fresh = TorchModel.build(Reference(factory=f"networks:{network.__name__}"), seed=0)
            stage = Training(epochs=8, batch_size=64, optimizer={"learning_rate": 1e-2})
            done[network] = apply(stage, fresh, digits_task, tmp_path_factory.mktemp("trained"))
        return done[network]

    return train


@pytest.fixture(scope="module")
def quantized(trained, digits_task: Task, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Int8]:
    """Quantize a trained network by a stage; each once."""
    done: dict[tuple[object, ...], Int8] = {}

    def quantize(network: type[nn.Module], stage: Int8Ptq | Int8Qat) -> Int8:
        key = network, type(stage), stage.model_dump_json()
        if key not in done:
            said: list[str] = []
            model = apply(stage, trained(network), digits_task, tmp_path_factory.mktemp("int8"), said=said)
            done[key] = Int8(model, said)
        return done[key]

    return quantize


def apply(
    stage: Stage, model: TorchModel, task: Task, work_dir: Path, *, reference: TorchModel | None = None, said=None
) -> TorchModel | OnnxModel:
    log = print if said is None else said.append
    work_dir.mkdir(exist_ok=True)
    return stage.apply(model, task, StageContext(reference or model, torch.device("cpu"), 0, work_dir, log))


def qat(**settings) -> Int8Qat:
    return Int8Qat(**{"epochs": 2, "batch_size": 64, **settings})


LONG = qat(epochs=6, freeze=1 / 3, losses={"logit_mse": {}})


def activation_scales(model: OnnxModel) -> list[float]:
    """Scales of the tensors that are uint8."""
    graph = onnx.load(model.path).graph
    tensors = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    quantized = [node for node in graph.node if node.op_type == "QuantizeLinear"]
    return [float(tensors[node.input[1]]) for node in quantized]


each_network = pytest.mark.parametrize(
    ("network", "stage"),
    [
        pytest.param(PlainNetwork, qat(epochs=1), id="PlainNetwork"),
        pytest.param(ResidualNetwork, LONG, id="ResidualNetwork"),
    ],
)


@each_network
def test_operators_and_weights_are_those_of_ptq(network, stage, quantized, tmp_path):
    by_ptq, by_qat = (quantized(network, one).model for one in (Int8Ptq(), stage))
    assert optimized_operators(by_qat, tmp_path) == optimized_operators(by_ptq, tmp_path)
    assert all(np.abs(array).max() == 63 for array in weights(by_qat))


@each_network
def test_accuracy_stays_within_a_point_of_the_float_model(network, stage, trained, quantized, digits_task):
    models = trained(network), quantized(network, stage).model
    before, after = (evaluate((accuracy,), model.predict, digits_task.test)["accuracy"] for model in models)
    assert after >= before - 0.012  # four of 360 images


def test_training_brings_outputs_closer_to_the_baseline_than_calibration_does(trained, quantized, digits_task):
    images = digits_task.test.inputs
    wanted = trained(ResidualNetwork).predict(images)
    stages = Int8Ptq(bias_correction=False), qat(epochs=6, losses={"logit_mse": {}})
    by_ptq, by_qat = (
        relative_error(quantized(ResidualNetwork, stage).model.predict(images), wanted) for stage in stages
    )
    assert by_qat < 0.8 * by_ptq


def test_last_third_of_the_epochs_is_frozen(quantized):
    _, *epochs, last = quantized(ResidualNetwork, LONG).said
    live, frozen = ([f"epoch {number}/{of}" for number in range(1, of + 1)] for of in (4, 2))
    assert [line.split(":")[0] for line in epochs] == [*live, *frozen]
    assert last.startswith("accuracy on 180 validation samples: float ")


def test_calibration_is_told_as_by_ptq(quantized):
    said = quantized(PlainNetwork, qat(epochs=1, calibration_samples=8)).said
    assert said[0] == "calibrated on 8 samples, fewer than 64: ranges may be too small"


def test_frozen_epochs_leave_ranges_as_they_were_calibrated_and_live_ones_do_not(quantized):
    stages = Int8Ptq(), qat(epochs=1), qat(epochs=1, freeze=0.0)
    by_ptq, frozen, live = (activation_scales(quantized(PlainNetwork, stage).model) for stage in stages)
    # BatchNorm is not folded yet when QAT calibrates
    assert frozen == pytest.approx(by_ptq, rel=1e-5)
    assert live != pytest.approx(by_ptq, rel=1e-2)


def test_baseline_teaches_a_model_whose_channels_were_removed(trained, quantized, digits_task, tmp_path):
    baseline, images = trained(ResidualNetwork), digits_task.test.inputs
    pruned = apply(MagnitudePruning(pruning_ratio=0.25, round_to=1), baseline, digits_task, tmp_path / "pruned")
    stage = qat(losses={"logit_mse": {}}, optimizer={"learning_rate": 1e-2})
    int8 = apply(stage, pruned, digits_task, tmp_path / "int8", reference=baseline)
    before, after = (relative_error(one.predict(images), baseline.predict(images)) for one in (pruned, int8))
    assert after < 0.5 * before
    whole = quantized(ResidualNetwork, Int8Ptq()).model
    assert optimized_operators(int8, tmp_path) == optimized_operators(whole, tmp_path)


def test_promised_zeros_stay(trained, digits_task, tmp_path):
    sparse = apply(WeightPruning(sparsity=0.8), trained(PlainNetwork), digits_task, tmp_path / "sparse")
    int8 = apply(qat(optimizer={"learning_rate": 1e-2}), sparse, digits_task, tmp_path / "int8")
    floats = {p.numel(): p.detach().numpy() for p in sparse.module.parameters() if p.ndim > 1}
    for codes in weights(int8):
        weight = floats[codes.size]  # no two are of one size
        weight = weight if weight.shape == codes.shape else weight.T
        assert zeros_of(sparse)
        assert not codes[weight == 0].any()
        assert codes[weight != 0].any()


def test_losses_that_look_into_layers_are_refused_when_settings_are_read():
    with pytest.raises(ValidationError, match="losses must compare outputs, got hint, which look into layers"):
        qat(losses={"kd": {}, "hint": {"layers": {"conv1": "conv1"}}})


def test_rehearsal_refuses_what_would_fail_later(trained, digits_task):
    model = trained(PlainNetwork)
    assert qat().rehearse(model, model, digits_task) is None
    narrow = TorchModel(nn.Sequential(nn.Flatten(), nn.Linear(64, 5)), Reference(factory="networks:PlainNetwork"))
    with pytest.raises(InputError, match="outputs of one shape"):
        qat().rehearse(narrow, model, digits_task)
    bare = TorchModel(nn.Sequential(nn.Flatten(), nn.Softmax(dim=1)), Reference(factory="networks:PlainNetwork"))
    with pytest.raises(StageError, match="the model has none"):
        qat().rehearse(bare, model, digits_task)
    with pytest.raises(InputError, match=r"unlabeled_share is 0\.5"):
        qat(unlabeled_share=0.5).rehearse(model, model, digits_task)
    empty = Samples((torch.zeros(0, 1, 8, 8),), torch.zeros(0, dtype=torch.long))
    with pytest.raises(InputError, match="calibration split must have at least 8 samples, got 0"):
        qat().rehearse(model, model, replace(digits_task, calibration=empty))


def test_two_processes_have_equal_ranges_and_write_equal_files(tmp_path):
    (tmp_path / "train.py").write_text(
        "import os, sys\n"
        "from pathlib import Path\n"
        "from conftest import digits_task\n"
        "from compressor import TorchModel\n"
        "from compressor.references.reference import Reference\n"
        "from stages.test_int8_qat import apply, qat\n"
        "model = TorchModel.build(Reference(factory='networks:ResidualNetwork'), seed=0)\n"
        "apply(qat(), model, digits_task.__wrapped__(), Path(sys.argv[1]) / os.environ['RANK'])\n"
    )
    tests = os.pathsep.join(map(str, Path(__file__).parents[1:3]))
    for ended in run_two(tmp_path / "train.py", tmp_path, cwd=tmp_path, PYTHONPATH=tests):
        assert ended.returncode == 0, ended.stderr
    first, second = (OnnxModel(tmp_path / rank / "model.onnx") for rank in ("0", "1"))
    assert activation_scales(first)
    assert first.path.read_bytes() == second.path.read_bytes()
