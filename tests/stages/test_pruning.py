import pytest
import torch
from torch import nn

from compressor.artifact import TorchModel
from compressor.errors import InputError, StageError
from compressor.plugins import Reference
from compressor.pruning.allocation import multiples_of, uniform, units_kept
from compressor.pruning.channels import Pruned, prunable_groups, prune_channels
from compressor.pruning.criteria import magnitude
from compressor.stage import StageContext
from compressor.stages.pruning.stage import MagnitudePruning
from compressor.stages.training import Training
from compressor.task import evaluate
from compressor.testing import check_stage
from networks import (
    ConcatenatedNetwork,
    FixedViewNetwork,
    PlainNetwork,
    ResidualNetwork,
    TenEverywhereNetwork,
)


def test_recovery_distils_from_the_baseline_and_regains_accuracy(digits_task, tmp_path):
    model = TorchModel.build(Reference(factory="networks:PlainNetwork"), seed=0)
    lines: list[str] = []
    context = StageContext(model, torch.device("cpu"), 0, tmp_path, lines.append)
    baseline = Training(epochs=10, batch_size=64).apply(model, digits_task, context)
    context = StageContext(baseline, torch.device("cpu"), 0, tmp_path, lines.append)
    recovery = {"epochs": 4, "batch_size": 64}
    bare = MagnitudePruning(pruning_ratio=0.5).apply(baseline, digits_task, context)
    recovered = MagnitudePruning(pruning_ratio=0.5, recovery=recovery).apply(baseline, digits_task, context)
    accuracies = [
        evaluate(digits_task.metrics, artifact.predict, digits_task.test)["accuracy"]
        for artifact in (baseline, bare, recovered)
    ]
    assert accuracies[0] > 0.95
    assert accuracies[1] < accuracies[2] - 0.05
    assert accuracies[2] > 0.9
    assert any("removed 56 of 112 channels (50%) in 3 groups" in line for line in lines)
    assert any("kd" in line for line in lines)


def test_magnitude_pruning_keeps_the_contract_of_a_stage(digits_task):
    model = TorchModel.build(Reference(factory="networks:PlainNetwork"), seed=0)
    check_stage(MagnitudePruning(pruning_ratio=0.5, recovery={"epochs": 1}), model, digits_task)


def test_recovery_that_does_not_fit_the_models_is_refused_in_the_rehearsal(digits_task):
    model = TorchModel.build(Reference(factory="networks:PlainNetwork"), seed=0)
    recovery = {"epochs": 1, "losses": {"hint": {"layers": {"conv2": "conv3"}}}}
    stage = MagnitudePruning.model_validate({"pruning_ratio": 0.5, "recovery": recovery})
    with pytest.raises(InputError, match=r"a layer 'conv3', but has none; did you mean 'conv"):
        stage.rehearse(model, model, digits_task)


def test_rehearsal_gives_a_model_of_the_size_that_will_leave(digits_task, tmp_path):
    model = TorchModel.build(Reference(factory="networks:PlainNetwork"), seed=0)
    stage = MagnitudePruning(pruning_ratio=0.5)
    rehearsed = stage.rehearse(model, model, digits_task)
    pruned = stage.apply(model, digits_task, StageContext(model, torch.device("cpu"), 0, tmp_path, print))
    assert rehearsed.edits == pruned.edits
