from pathlib import Path

import pytest
import torch
from pydantic import ValidationError
from torch import nn

from compressor.errors import InputError, StageError
from compressor.export.to_onnx import to_onnx
from compressor.models.artifact import TorchModel
from compressor.models.kept_zeros import zeros_of
from compressor.onnx_files.facts import read_facts
from compressor.references.reference import Reference
from compressor.stage import StageContext
from compressor.stages.distillation import Distillation
from compressor.stages.int8_ptq import Int8Ptq
from compressor.stages.training import Training
from compressor.stages.weight_pruning import WeightPruning
from compressor.task import evaluate
from compressor.testing import check_stage
from example_models import SeparableNetwork, SequenceNetwork, SignalNetwork
from networks import ConcatenatedNetwork, PlainNetwork, ResidualNetwork

PLAIN = Reference(factory="networks:PlainNetwork")
SCHEDULED = {
    "sparsity": 0.9,
    "schedule": {"steps": 2},
    "recovery": {"epochs": 3, "batch_size": 64, "optimizer": {"name": "sgd", "learning_rate": 0.05}},
}


def plain() -> TorchModel:
    return TorchModel.build(PLAIN, seed=0)


def context(model: TorchModel, directory: Path, lines: list[str] | None = None) -> StageContext:
    return StageContext(model, torch.device("cpu"), 0, directory, ([] if lines is None else lines).append)


def zeros(model: TorchModel) -> dict[str, int]:
    return {name: int((p == 0).sum()) for name, p in model.module.named_parameters() if p.ndim > 1}


def sparsity(model: TorchModel) -> float:
    sizes = [p.numel() for p in model.module.parameters() if p.ndim > 1]
    return sum(zeros(model).values()) / sum(sizes)


@pytest.mark.parametrize("allocation", [None, "uniform", "global", "erk", "lamp"])
def test_as_many_weights_as_asked_are_zero_and_promised(digits_task, tmp_path, allocation):
    model, lines = plain(), []
    stage = WeightPruning(sparsity=0.9, allocation=allocation)
    pruned = stage.apply(model, digits_task, context(model, tmp_path, lines))
    total = sum(p.numel() for p in model.module.parameters() if p.ndim > 1)
    assert sum(zeros(pruned).values()) == round(0.9 * total)
    assert zeros_of(pruned) == zeros(pruned)
    assert len(lines) == 1
    assert f"90.00% of {total} weights in 4 tensors are zero, asked 90.00%" in lines[0]


def test_without_a_name_the_allocation_is_lamp(digits_task, tmp_path):
    model = plain()
    unnamed, lamp = (
        WeightPruning(sparsity=0.9, allocation=allocation).apply(model, digits_task, context(model, tmp_path))
        for allocation in (None, "lamp")
    )
    assert zeros_of(unnamed) == zeros_of(lamp)


def test_recovery_after_a_cubic_schedule_keeps_the_zeros_and_regains_accuracy(digits_task, tmp_path):
    model, lines = plain(), []
    baseline = Training(epochs=8, batch_size=64).apply(model, digits_task, context(model, tmp_path))
    bare = WeightPruning(sparsity=0.95).apply(baseline, digits_task, context(baseline, tmp_path))
    stage = WeightPruning(sparsity=0.95, schedule={"steps": 3}, recovery={"epochs": 8, "batch_size": 64})
    recovered = stage.apply(baseline, digits_task, context(baseline, tmp_path, lines))
    assert zeros_of(recovered) == zeros(recovered)
    assert sparsity(recovered) == pytest.approx(0.95, abs=1e-4)
    pruned, whole = (
        evaluate(digits_task.metrics, one.predict, digits_task.test)["accuracy"] for one in (bare, recovered)
    )
    assert whole > max(0.9, pruned)
    asked = [line.partition("asked ")[2][:6] for line in lines if "asked" in line]
    assert asked == ["66.85%", "91.48%", "95.00%"]


def test_momentum_and_weight_decay_leave_the_pattern_as_it_is(digits_task, tmp_path):
    model, lines = plain(), []
    optimizer = {"name": "sgd", "learning_rate": 0.05, "momentum": 0.9, "weight_decay": 0.01}
    stage = WeightPruning(pattern="2:4", recovery={"epochs": 2, "batch_size": 64, "optimizer": optimizer})
    pruned = stage.apply(model, digits_task, context(model, tmp_path, lines))
    module = pruned.module
    for weight in (module.conv2.weight.movedim(1, -1), module.fc1.weight, module.fc2.weight):
        assert ((weight.reshape(-1, 4) != 0).sum(dim=1) == 2).all()
    assert not torch.equal(module.fc1.weight[module.fc1.weight != 0], model.module.fc1.weight[module.fc1.weight != 0])
    assert pruned.module.conv1.weight.all()
    assert "stay dense, for their input channels are no multiple of 4: conv1.weight (1)" in lines[0]


def test_a_model_that_is_sparse_already_goes_on_from_there(digits_task, tmp_path):
    model, lines = plain(), []
    half = WeightPruning(sparsity=0.5).apply(model, digits_task, context(model, tmp_path))
    stage = WeightPruning(sparsity=0.9, schedule={"shape": "linear", "steps": 2}, recovery={"epochs": 2})
    sparse = stage.apply(half, digits_task, context(half, tmp_path, lines))
    assert [line.partition("asked ")[2][:6] for line in lines if "asked" in line] == ["70.00%", "90.00%"]
    for name in zeros_of(half):
        assert (sparse.module.get_parameter(name)[half.module.get_parameter(name) == 0] == 0).all()
    with pytest.raises(StageError, match=r"at least 0\.9000, what the weights have already, got 0\.5"):
        WeightPruning(sparsity=0.5).apply(sparse, digits_task, context(half, tmp_path))


@pytest.mark.parametrize("stage", [Training(epochs=1), Distillation(epochs=1, teacher=PLAIN)])
def test_later_training_keeps_the_zeros(digits_task, tmp_path, stage):
    model = plain()
    sparse = WeightPruning(sparsity=0.9).apply(model, digits_task, context(model, tmp_path))
    trained = stage.apply(sparse, digits_task, context(model, tmp_path))
    assert zeros_of(trained) == zeros_of(sparse) == zeros(trained)
    assert not torch.equal(trained.module.fc1.weight, sparse.module.fc1.weight)


def test_a_new_student_of_a_sparse_model_is_dense_and_that_is_said(digits_task, tmp_path):
    model, lines = plain(), []
    sparse = WeightPruning(sparsity=0.9).apply(model, digits_task, context(model, tmp_path))
    student = Distillation(epochs=1).apply(sparse, digits_task, context(model, tmp_path, lines))
    assert not zeros_of(student)
    assert lines[0] == "the student is dense: the zeros of the model that enters stay behind with its weights"


@pytest.mark.parametrize("cut", [{"width": 0.5}, {"depth": {"stack1": 3, "stack2": 2}}])
def test_a_student_cut_from_a_sparse_model_keeps_the_zeros_that_are_left(digits_task, tmp_path, cut):
    model = TorchModel.build(Reference(factory="networks:StackedNetwork"), seed=0)
    sparse = WeightPruning(sparsity=0.9).apply(model, digits_task, context(model, tmp_path))
    student = Distillation(epochs=1, **cut).apply(sparse, digits_task, context(model, tmp_path))
    assert sum(zeros(student).values()) < sum(zeros(sparse).values())
    assert zeros_of(student) == zeros(student)


def test_protected_layers_stay_as_they_are(digits_task, tmp_path):
    model = TorchModel.build(Reference(factory="networks:StackedNetwork"), seed=0)
    stage = WeightPruning(sparsity=0.9, protect=("stack1", "head", "stack2.[0-2].conv"))
    pruned = stage.apply(model, digits_task, context(model, tmp_path))
    assert set(zeros_of(pruned)) == {"stem.weight", *(f"stack2.{i}.conv.weight" for i in (3, 4, 5))}
    assert set(zeros_of(pruned)) == {name for name, count in zeros(pruned).items() if count}


def test_a_path_to_protect_that_matches_nothing_is_refused(digits_task):
    with pytest.raises(InputError, match=r"must have a layer 'fc3', but has none; did you mean 'fc"):
        WeightPruning(sparsity=0.5, protect=("fc3",)).rehearse(plain(), plain(), digits_task)


def test_a_pattern_that_fits_no_layer_is_refused(digits_task):
    model = TorchModel(nn.Sequential(nn.Conv2d(1, 10, 8), nn.Flatten()).eval(), PLAIN)
    with pytest.raises(
        StageError, match=r"2:4 needs a layer whose input channels are a multiple of 4, got 0\.weight \(1"
    ):
        WeightPruning(pattern="2:4").rehearse(model, model, digits_task)


class AttentionNetwork(nn.Module):
    """A transformer encoder of torch over the rows of (N, 1, 8, 8)."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.TransformerEncoderLayer(8, 2, 32, batch_first=True)
        self.head = nn.Linear(8, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.encoder(x.squeeze(1)).mean(1))


def zeros_in_the_file(path: Path, inputs) -> int:
    facts = read_facts(path, [tensor[:1].numpy() for tensor in inputs])
    return facts.parameters - facts.nonzero


@pytest.mark.parametrize(
    "network",
    [
        PlainNetwork,
        ResidualNetwork,
        ConcatenatedNetwork,
        SeparableNetwork,
        SignalNetwork,
        SequenceNetwork,
        AttentionNetwork,
    ],
)
def test_zeros_survive_the_export_and_int8(digits_task, tmp_path, network):
    torch.manual_seed(0)
    model = TorchModel(network().eval(), PLAIN)
    sparse = WeightPruning(sparsity=0.8).apply(model, digits_task, context(model, tmp_path))
    promised = sum(zeros_of(sparse).values())
    exported = to_onnx(sparse.module, digits_task, tmp_path / "float.onnx")
    quantized = Int8Ptq(calibration_samples=32).apply(sparse, digits_task, context(model, tmp_path))
    for model_file in (exported, quantized):
        assert zeros_in_the_file(model_file.path, digits_task.example_inputs) >= promised


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "either sparsity or pattern, got neither"),
        ({"sparsity": 0.5, "pattern": "2:4"}, "either sparsity or pattern, got both"),
        ({"sparsity": 1.0}, "less than 1"),
        ({"pattern": "3:4"}, "'2:4' or '4:8'"),
        ({"pattern": "2:4", "allocation": "erk"}, "allocation and schedule go with sparsity"),
        ({"pattern": "2:4", "schedule": {"steps": 2}}, "allocation and schedule go with sparsity"),
        ({"sparsity": 0.5, "schedule": {"steps": 2}}, "schedule needs a recovery"),
        ({**SCHEDULED, "schedule": {"steps": 4}}, "an epoch for each of 4 steps, got 3 epochs"),
    ],
)
def test_settings_that_do_not_fit_together_are_refused(settings, message):
    with pytest.raises(ValidationError, match=message):
        WeightPruning.model_validate(settings)


@pytest.mark.parametrize("settings", [SCHEDULED, {"pattern": "4:8"}])
def test_weight_pruning_keeps_the_contract_of_a_stage(digits_task, settings):
    check_stage(WeightPruning.model_validate(settings), plain(), digits_task)


def test_rehearsal_gives_a_model_with_as_many_zeros_as_will_leave(digits_task):
    rehearsed = WeightPruning.model_validate(SCHEDULED).rehearse(plain(), plain(), digits_task)
    assert sparsity(rehearsed) == pytest.approx(0.9, abs=1e-4)


def test_a_recovery_that_does_not_fit_the_models_is_refused_in_the_rehearsal(digits_task):
    recovery = {"epochs": 1, "losses": {"hint": {"layers": {"conv2": "conv3"}}}}
    stage = WeightPruning.model_validate({"sparsity": 0.5, "recovery": recovery})
    with pytest.raises(InputError, match="a layer 'conv3', but has none"):
        stage.rehearse(plain(), plain(), digits_task)
