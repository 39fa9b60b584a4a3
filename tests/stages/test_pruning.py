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


def pruned(module: nn.Module, inputs, *, pruning_ratio: float = 0.5, round_to: int = 4) -> Pruned:
    groups = prunable_groups(module, inputs)
    scores = {group.path: magnitude(module, group, order=2) for group in groups}
    chosen = uniform(groups, scores, pruning_ratio=pruning_ratio, step_of=multiples_of(round_to))
    return prune_channels(module, inputs, groups, chosen)


def half(module: nn.Module, task, round_to: int = 4) -> nn.Module:
    return pruned(module, task.example_inputs, round_to=round_to).module


@pytest.mark.parametrize(
    ("channels", "ratio", "round_to", "kept"),
    [
        pytest.param(16, 0.5, 1, 8, id="exact"),
        pytest.param(16, 0.5, 8, 8, id="multiple"),
        pytest.param(20, 0.5, 8, 8, id="nearest-multiple"),
        pytest.param(500, 0.5, 8, 248, id="ties-to-even"),
        pytest.param(16, 0.99, 8, 8, id="never-below-one-multiple"),
        pytest.param(6, 0.5, 8, 6, id="never-above-what-there-is"),
        pytest.param(16, 0.01, 1, 16, id="nothing-to-remove"),
    ],
)
def test_units_kept_is_the_nearest_multiple(channels, ratio, round_to, kept):
    assert units_kept(channels, pruning_ratio=ratio, step=round_to) == kept


@pytest.mark.parametrize("network", [PlainNetwork, ResidualNetwork, ConcatenatedNetwork])
def test_pruned_network_has_half_the_channels_in_every_group_and_all_classes(network, digits_task):
    found = pruned(network(), digits_task.example_inputs)
    assert all(kept * 2 == had for kept, had in found.channels.values())
    assert found.module(*digits_task.example_inputs).shape == (2, 10)


def test_layers_coupled_by_an_addition_keep_the_same_channels(digits_task):
    module = half(ResidualNetwork(), digits_task)
    assert module.stem.out_channels == module.depthwise.groups == module.pointwise.out_channels == 8
    assert module.bn1.num_features == module.bn3.num_features == module.head.in_features == 8


def test_channels_of_smallest_magnitude_are_the_ones_removed(digits_task):
    module = PlainNetwork()
    with torch.no_grad():
        for layer in (module.conv1, module.bn1):
            layer.weight[::2] *= 1e-3
        module.conv2.weight[:, ::2] *= 1e-3
    smaller = half(module, digits_task)
    assert torch.equal(smaller.conv1.weight, module.conv1.weight[1::2])
    # the linear layer behind the flattening loses the columns of whole channels
    assert smaller.fc1.in_features == 16 * 4 * 4


def test_channels_without_effect_are_removed_without_changing_the_logits(digits_task):
    module = PlainNetwork().eval()
    with torch.no_grad():
        module.conv1.weight[:8], module.bn1.weight[:8], module.bn1.bias[:8] = 0, 0, 0
        module.conv2.weight[16:], module.conv2.bias[16:], module.fc1.weight[32:], module.fc1.bias[32:] = 0, 0, 0, 0
        module.conv2.weight[:, :8] = 0
        module.fc1.weight[:, 16 * 16 :] = 0
        module.fc2.weight[:, 32:] = 0
    images = digits_task.test.inputs[0]
    # sums over fewer terms round differently
    torch.testing.assert_close(half(module, digits_task)(images), module(images), rtol=0, atol=1e-6)


def test_output_layer_is_told_from_a_hidden_layer_of_its_width(digits_task):
    module = half(TenEverywhereNetwork(), digits_task, round_to=1)
    assert (module.hidden.out_features, module.head.out_features) == (5, 10)


@pytest.mark.parametrize(
    "head",
    [
        pytest.param(nn.ConvTranspose2d(16, 3, 2), id="transposed"),
        pytest.param(nn.Conv2d(16, 1, 1), id="one-channel"),
    ],
)
def test_convolution_that_makes_the_output_keeps_its_channels(digits_task, head):
    module = half(nn.Sequential(nn.Conv2d(1, 16, 3), nn.ReLU(), head), digits_task)
    assert module[0].out_channels == 8
    assert module[2].out_channels == head.out_channels


def test_frozen_parameters_are_refused(digits_task):
    module = PlainNetwork()
    module.conv2.requires_grad_(False)
    with pytest.raises(StageError, match=r"conv2\.weight, conv2\.bias are frozen"):
        half(module, digits_task)


def test_size_written_in_forward_is_explained(digits_task):
    with pytest.raises(StageError, match="is a size written in its forward"):
        half(FixedViewNetwork(), digits_task)


def test_layer_that_takes_no_part_is_named(digits_task):
    module = PlainNetwork()
    module.forgotten = nn.Linear(3, 3)
    with pytest.raises(StageError, match="forgotten did not"):
        half(module, digits_task)


def test_grouped_convolution_loses_as_many_channels_in_each_group(digits_task):
    module = nn.Sequential(nn.Conv2d(1, 8, 3), nn.Conv2d(8, 8, 3, groups=2), nn.Flatten(), nn.Linear(128, 10))
    smaller = half(module, digits_task)
    assert smaller[1].weight.shape == (4, 2, 3, 3)
    assert (smaller[1].in_channels, smaller[1].out_channels, smaller[1].groups) == (4, 4, 2)


def test_ratio_that_removes_nothing_is_refused(digits_task):
    with pytest.raises(StageError, match=r"leaves groups of \[16, 32, 64\] whole; lower round_to"):
        pruned(PlainNetwork(), digits_task.example_inputs, pruning_ratio=0.1, round_to=64)


def test_pruning_does_not_change_the_given_module(digits_task):
    module = PlainNetwork()
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    half(module, digits_task)
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())


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
