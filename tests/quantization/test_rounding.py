import itertools
from dataclasses import replace
from functools import partial

import pytest
import torch
from rounded import Rounded, rounded
from torch import Tensor, nn

from compressor.onnx_files.qdq import along_axis
from compressor.quantization.layerwise import Layer
from compressor.quantization.rounding import learn_rounding
from example_models import SequenceNetwork, SignalNetwork
from networks import GroupedNetwork, PlainNetwork


def learned(iterations: int, limit: int = 63, seed: int = 0) -> partial[Layer]:
    generator = torch.Generator().manual_seed(seed)
    return partial(learn_rounding, limit=limit, generator=generator, iterations=iterations)


def single_layer(*, clipped: bool) -> Rounded:
    """A linear layer with eight weights and correlated inputs, at three bits, so that rounding matters."""
    torch.manual_seed(2)  # with other seeds the nearest are the best
    layer = nn.Linear(8, 1)
    module = nn.Sequential(layer, nn.ReLU()) if clipped else layer
    inputs = torch.rand(256, 1) + 0.3 * torch.rand(256, 8)
    return rounded(module, inputs, limit=3)


def error(layer: Layer, *, clipped: bool) -> float:
    outputs, wanted = layer.compute(), layer.outputs
    if clipped:
        outputs, wanted = outputs.relu(), wanted.relu()
    return float((outputs - wanted).square().mean())


@pytest.mark.parametrize("clipped", [False, True], ids=["linear", "with a ReLU"])
def test_learned_rounding_comes_close_to_the_best_of_all_256(clipped):
    (layer,) = single_layer(clipped=clipped).layers()
    ratio = layer.weight / layer.codes.scale
    choices = itertools.product((0, 1), repeat=8)
    candidates = [torch.minimum(ratio.floor() + torch.tensor(up), ratio.ceil()) for up in choices]
    errors = [
        error(replace(layer, codes=layer.codes._replace(codes=codes.to(torch.int8))), clipped=clipped)
        for codes in candidates
    ]
    nearest = error(layer, clipped=clipped)
    found = error(learned(200, limit=3)(layer), clipped=clipped)
    assert nearest > 2 * min(errors)  # so that there is something to learn
    assert found <= min(errors) + 0.2 * (nearest - min(errors))


@pytest.fixture(scope="module")
def images(digits_task) -> Tensor:
    return digits_task.calibration.inputs[0][:128]


@pytest.mark.parametrize("network", [PlainNetwork, GroupedNetwork, SignalNetwork, SequenceNetwork])
def test_outputs_come_nearer_to_the_float_ones_on_other_images(network, images, digits_task):
    torch.manual_seed(0)
    module = network()
    before = rounded(module, images, limit=7)
    after = before.refined(learned(150, limit=7))
    others = digits_task.test.inputs[0]
    with torch.no_grad():
        wanted = module(others)
    errors = [float((model.outputs(others) - wanted).norm()) for model in (before, after)]
    assert errors[1] < 0.9 * errors[0]
    for layer in after.layers():
        codes = layer.codes.codes
        assert codes.dtype == torch.int8
        assert codes.abs().max() <= 7
        ratio = layer.weight / layer.codes.scale.reshape(along_axis(layer.codes.channel_axis, codes.ndim))
        assert (codes - ratio).abs().max() < 1 + 1e-4  # one of the two neighbours; the division rounds
        assert codes.shape == layer.weight.shape


@pytest.fixture(scope="module")
def pruned(images) -> Rounded:
    torch.manual_seed(0)
    module = PlainNetwork()
    with torch.no_grad():
        for layer in (module.conv2, module.fc1):
            layer.weight[torch.rand_like(layer.weight) < 0.5] = 0
    return rounded(module, images)


def test_weights_that_pruning_set_to_zero_stay_zero(pruned):
    for layer in pruned.refined(learned(20)).layers():
        assert not layer.codes.codes[layer.weight == 0].any()


def test_equal_seeds_give_equal_codes_and_what_was_given_stays(pruned):
    before = {name: codes.codes.clone() for name, codes in pruned.weights.items()}
    first, second, other = (pruned.refined(learned(20, seed=seed)).weights for seed in (0, 0, 1))
    assert all(first[name].codes.equal(second[name].codes) for name in first)
    assert any(not first[name].codes.equal(other[name].codes) for name in first)
    assert all(codes.codes.equal(before[name]) for name, codes in pruned.weights.items())


CONVOLUTIONS = [
    nn.Conv2d(4, 6, (3, 2), stride=(2, 1), padding=(1, 2), dilation=(1, 2)),
    nn.Conv2d(4, 8, 4, padding="same", groups=4),
    nn.Conv2d(4, 6, 3, padding="valid", bias=False),
    nn.Conv1d(4, 6, 5, stride=2, padding=1, dilation=2, groups=2),
]


@pytest.mark.parametrize("convolution", CONVOLUTIONS, ids=str)
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
def test_error_of_no_channel_grows_for_any_form_of_convolution(convolution):
    """Its products are written anew; a wrong one would choose codes that are wrong for the layer itself."""
    torch.manual_seed(0)
    convolution.reset_parameters()  # pytest made it without a seed
    (before,) = rounded(convolution, torch.rand(32, 4, *[9] * (convolution.weight.ndim - 2)), limit=3).layers()
    after = learned(150, limit=3)(before)
    errors = [(layer.compute() - layer.outputs).square().movedim(1, 0).flatten(1).mean(1) for layer in (before, after)]
    assert (errors[1] <= errors[0] * (1 + 1e-5)).all()  # sums in another order
    assert errors[1].sum() < 0.9 * errors[0].sum()


class SharedNetwork(nn.Module):
    """One layer used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.twice = nn.Linear(64, 64)
        nn.init.uniform_(self.twice.bias, -2, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.twice(torch.relu(self.twice(x.flatten(1))))


def test_bias_that_two_layers_add_is_counted(images):
    torch.manual_seed(0)
    for before in rounded(SharedNetwork(), images, limit=3).layers():
        layers = (before, learned(100, limit=3)(before))
        pairs = [(layer.compute(), layer.outputs) for layer in layers]
        clipped = len(before.node.users) == 1 and "relu" in str(next(iter(before.node.users)).target)
        errors = [((a.relu() - b.relu()) if clipped else a - b).square().sum() for a, b in pairs]
        assert errors[1] < 0.9 * errors[0]
