import pytest
import torch
import torch.nn.functional as F
from rounded import Rounded, rounded
from torch import nn

from compressor.quantization.bias_correction import correct_bias, mean_error
from compressor.quantization.float_graph import parameter
from compressor.quantization.layerwise import Layer
from networks import PlainNetwork, ResidualNetwork


def network(kind: type[nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return kind()


@pytest.fixture(scope="module")
def images(digits_task) -> torch.Tensor:
    return digits_task.calibration.inputs[0][:64]


@pytest.fixture(scope="module")
def plain(images) -> Rounded:
    return rounded(network(PlainNetwork), images, limit=7)


def test_mean_error_of_every_output_channel_is_gone(plain):
    errors: list[torch.Tensor] = []

    def note(layer: Layer) -> Layer:
        errors.append(mean_error(layer))
        return layer

    plain.refined(note, correct_bias, note)
    assert len(errors) == 8
    for wrong, right in zip(errors[::2], errors[1::2], strict=True):
        assert wrong.abs().max() > 1e-3
        torch.testing.assert_close(right, torch.zeros_like(right), rtol=0, atol=1e-6)  # float32 sums


def test_first_bias_changes_by_what_the_rounding_of_weights_and_image_adds_on_average(plain):
    layer = plain.layers()[0]
    scale, zero_point = plain.affines["x"]
    read = ((plain.images / scale + zero_point).round().clamp(0, 255) - zero_point) * scale
    error = F.conv2d(read, layer.codes.numbers(), padding=1) - F.conv2d(plain.images, layer.weight, padding=1)
    change = layer.bias - plain.refined(correct_bias).layers()[0].bias
    torch.testing.assert_close(change, error.mean((0, 2, 3)), rtol=1e-4, atol=1e-7)


def test_outputs_are_nearer_to_the_float_ones_on_other_images(images, digits_task):
    module = network(ResidualNetwork)
    before = rounded(module, images)
    others = digits_task.test.inputs[0]
    with torch.no_grad():
        wanted = module(others)
    errors = [(model.outputs(others) - wanted).norm() for model in (before, before.refined(correct_bias))]
    assert errors[1] < 0.9 * errors[0]


def test_codes_and_the_graph_given_stay(plain):
    before = {name: tensor.clone() for name, tensor in plain.graph.named_parameters()}
    after = plain.refined(correct_bias)
    assert all(after.weights[name].codes.equal(codes.codes) for name, codes in plain.weights.items())
    assert all(tensor.equal(before[name]) for name, tensor in plain.graph.named_parameters())


class SharedNetwork(nn.Module):
    """One layer used twice, and one without a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.twice = nn.Linear(64, 64)
        self.bare = nn.Linear(64, 10, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.bare(torch.relu(self.twice(torch.relu(self.twice(x.flatten(1))))))


def test_bias_that_two_layers_add_stays(images):
    before = rounded(network(SharedNetwork), images)
    after = before.refined(correct_bias)
    bias = next(node for node in after.graph.graph.nodes if node.target == "twice.bias")
    assert parameter(after.graph, bias).equal(before.graph.get_parameter("twice.bias"))
    assert [layer.bias for layer in after.layers()] == [None] * 3
