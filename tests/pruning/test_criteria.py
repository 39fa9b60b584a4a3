from dataclasses import replace

import pytest
import torch
import torch_pruning as tp
from torch import nn

from compressor import Samples
from compressor.errors import StageError
from compressor.pruning.criteria import scores
from compressor.pruning.dependency_graph import channel_groups
from compressor.pruning.groups import silence
from networks import ConcatenatedNetwork, ConvNextNetwork, PlainNetwork, ResidualNetwork, StackedNetwork


@pytest.fixture
def plain() -> nn.Module:
    torch.manual_seed(0)
    module = PlainNetwork()
    nn.init.uniform_(module.bn1.weight, -1, 1)
    return module


def small(task, count: int = 64):
    """The first `count` training samples alone: one batch of the Taylor criterion."""
    return replace(task, train=Samples((task.train.inputs[0][:count],), task.train.targets[:count]))


@pytest.mark.parametrize(("criterion", "order"), [("l1", 1), ("l2", 2)])
def test_magnitude_is_the_norm_of_every_weight_that_leaves_with_a_channel(criterion, order, plain, digits_task):
    groups = channel_groups(plain, digits_task.example_inputs).groups
    found = scores(criterion, plain, groups, digits_task)
    for channel in range(16):
        weights = [plain.conv1.weight[channel], plain.bn1.weight[channel], plain.conv2.weight[:, channel]]
        wanted = torch.cat([weight.flatten() for weight in weights]).norm(p=order)
        torch.testing.assert_close(found["conv1"][channel], wanted)
    for channel in range(32):  # behind the flattening, 16 columns for each channel
        weights = [plain.conv2.weight[channel], plain.fc1.weight[:, channel * 16 : (channel + 1) * 16]]
        wanted = torch.cat([weight.flatten() for weight in weights]).norm(p=order)
        torch.testing.assert_close(found["conv2"][channel], wanted)


@pytest.mark.parametrize("network", [PlainNetwork, StackedNetwork, ConcatenatedNetwork])
@pytest.mark.parametrize(("criterion", "order"), [("l1", 1), ("l2", 2)])
def test_magnitude_is_that_of_torch_pruning(network, criterion, order, digits_task):
    torch.manual_seed(0)
    module = network().eval()
    groups = channel_groups(module, digits_task.example_inputs).groups
    found = scores(criterion, module, groups, digits_task)
    graph = tp.DependencyGraph().build_dependency(module, digits_task.example_inputs)
    importance = tp.importance.GroupMagnitudeImportance(p=order, group_reduction="sum", normalizer=None)
    for group in groups:
        layer = module.get_submodule(group.path)
        cut = tp.prune_linear_out_channels if isinstance(layer, nn.Linear) else tp.prune_conv_out_channels
        theirs = importance(graph.get_pruning_group(layer, cut, list(range(group.units))))
        torch.testing.assert_close(found[group.path] ** order, theirs.detach())


def test_bn_scale_is_the_sum_of_the_absolute_scales_of_a_channel(digits_task):
    module = ResidualNetwork()
    for layer in (module.bn1, module.bn2, module.bn3):
        nn.init.uniform_(layer.weight, -1, 1)
    groups = channel_groups(module, digits_task.example_inputs).groups
    wanted = module.bn1.weight.abs() + module.bn2.weight.abs() + module.bn3.weight.abs()
    torch.testing.assert_close(scores("bn_scale", module, groups, digits_task)["stem"], wanted.detach())


def test_bn_scale_without_batch_normalization_is_refused(plain, digits_task):
    groups = channel_groups(plain, digits_task.example_inputs).groups
    with pytest.raises(StageError, match="in every group, but conv2 has none; choose l2, or protect it"):
        scores("bn_scale", plain, groups, digits_task)


@pytest.mark.parametrize("network", [PlainNetwork, ResidualNetwork, ConvNextNetwork])
def test_taylor_is_the_squared_change_of_the_loss_as_a_unit_begins_to_fade(network, digits_task):
    torch.manual_seed(0)
    module = network().double().eval()
    images, targets = digits_task.train.inputs[0][:64].double(), digits_task.train.targets[:64]
    task = replace(digits_task, train=Samples((images,), targets), example_inputs=(images[:2],))
    groups = channel_groups(module, task.example_inputs).groups
    found = scores("taylor", module, groups, task)

    def loss(group, unit, share) -> float:
        """With the weights that read the unit smaller by a `share`."""
        faded, gone = silence(module, [group], {}), silence(module, [group], {group.path: (unit,)})
        with torch.no_grad():
            for parameter, zeroed in zip(faded.parameters(), gone.parameters(), strict=True):
                parameter.lerp_(zeroed, share)
            return float(task.loss(faded(images), targets).mean())

    for group in groups:
        for unit in (0, group.units // 2, group.units - 1):
            change = (loss(group, unit, 1e-7) - loss(group, unit, -1e-7)) / 2e-7
            # rectifiers that open or close within the step bend the loss
            assert float(found[group.path][unit]) == pytest.approx(change**2, rel=1e-3, abs=1e-14)


def test_taylor_is_the_mean_over_batches_of_the_first_training_samples(plain, digits_task):
    groups = channel_groups(plain, digits_task.example_inputs).groups
    images, targets = digits_task.train.inputs[0], digits_task.train.targets
    halves = [
        scores("taylor", plain, groups, replace(digits_task, train=Samples((images[part],), targets[part])))
        for part in (slice(0, 64), slice(64, 128))
    ]
    both = scores("taylor", plain, groups, small(digits_task, 128))
    for path in both:
        torch.testing.assert_close(both[path], (halves[0][path] + halves[1][path]) / 2)


def test_channel_with_large_weights_that_the_loss_does_not_feel_is_least_by_taylor_alone(plain, digits_task):
    with torch.no_grad():
        plain.conv2.weight[7] = 10
        plain.conv2.bias[7] = -1e4  # its rectifier never opens
    groups = channel_groups(plain, digits_task.example_inputs).groups
    assert scores("l2", plain, groups, digits_task)["conv2"].argmax() == 7
    taylor = scores("taylor", plain, groups, small(digits_task))["conv2"]
    assert taylor[7] == 0
    assert (taylor > 0).sum() > 16


@pytest.mark.parametrize("criterion", ["l1", "l2", "bn_scale", "taylor"])
def test_scoring_leaves_the_module_as_it_was(criterion, digits_task):
    module = ResidualNetwork().train()
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    groups = channel_groups(module, digits_task.example_inputs).groups
    found = scores(criterion, module, groups, small(digits_task))
    assert all(score.dtype == torch.float32 and (score >= 0).all() for score in found.values())
    assert module.training
    assert all(parameter.grad is None for parameter in module.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())
