import pytest
import torch
import torch.nn.functional as F
from rounded import task_of
from torch import Tensor, nn

from compressor.quantization.equalization import equalize
from compressor.quantization.float_graph import float_graph, fold_batch_norms
from example_models import SeparableNetwork, SignalNetwork
from networks import ConcatenatedNetwork, GroupedNetwork, PlainNetwork, ResidualNetwork


def weights(graph: torch.fx.GraphModule) -> dict[str, Tensor]:
    return {name: tensor.detach() for name, tensor in graph.named_parameters() if tensor.ndim > 1}


def unequal(network: type[nn.Module]) -> nn.Module:
    """A network whose channels differ a thousandfold in size, as after training with BatchNorm."""
    torch.manual_seed(0)
    module = network().eval()
    with torch.no_grad():
        for layer in module.modules():
            if isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Linear):
                layer.weight.mul_(10 ** torch.empty(len(layer.weight), *[1] * (layer.weight.ndim - 1)).uniform_(-3, 0))
    return module


def changed(module: nn.Module) -> set[str]:
    """Layers to which equalization gives other weights; the outputs must be equal."""
    images = torch.rand(8, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    graph = fold_batch_norms(float_graph(module, task_of(images)))
    before = {name: tensor.clone() for name, tensor in weights(graph).items()}
    after = equalize(graph)
    with torch.no_grad():
        # float32 sums of up to 512 products
        torch.testing.assert_close(after(images), graph(images), rtol=1e-4, atol=1e-5)
    assert all(torch.equal(tensor, before[name]) for name, tensor in weights(graph).items())
    found = weights(after)
    return {name.split(".")[0].removesuffix("_weight_folded") for name in before if not found[name].equal(before[name])}


@pytest.mark.parametrize(
    ("network", "layers"),
    [
        (PlainNetwork, {"conv1", "conv2", "fc1", "fc2"}),
        (ResidualNetwork, {"depthwise", "pointwise"}),  # the others are added to one another
        (ConcatenatedNetwork, {"joined", "head"}),
        (GroupedNetwork, {"stem", "first", "second", "head"}),
        (SignalNetwork, {"conv1", "conv2", "head"}),
        (SeparableNetwork, set()),  # ReLU6 and Hardtanh have an upper end, and the attention is read with the image
    ],
)
def test_outputs_are_equal_and_layers_change_where_only_a_relu_pool_or_move_stands_between(network, layers):
    assert changed(unequal(network)) == layers


def test_channel_is_as_large_where_it_is_made_as_where_it_is_read():
    graph = fold_batch_norms(float_graph(unequal(PlainNetwork), task_of(torch.rand(8, 1, 8, 8))))
    after = weights(equalize(graph))
    made = after["conv2.weight"].abs().amax((1, 2, 3))
    read = after["fc1.weight"].abs().reshape(64, 32, 16).amax((0, 2))
    torch.testing.assert_close(made, read, rtol=0.03, atol=0)  # sweeps end at a hundredth


def test_zeros_stay_and_a_channel_without_weights_changes_nothing():
    module = unequal(PlainNetwork)
    with torch.no_grad():
        module.conv2.weight[3] = 0
        module.fc1.weight[:, :16] = 0  # what reads channel 0
        module.fc2.weight[::2, ::2] = 0
    graph = fold_batch_norms(float_graph(module, task_of(torch.rand(8, 1, 8, 8))))
    assert changed(module) == {"conv1", "conv2", "fc1", "fc2"}
    for name, tensor in weights(equalize(graph)).items():
        assert tensor.isfinite().all()
        assert tensor.eq(0).equal(weights(graph)[name].eq(0))


class ReadTwiceNetwork(nn.Module):
    """What the first layer gives is read by two, and one weight by two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(64, 16)
        self.second = nn.Linear(16, 16)
        self.third = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.first(x.flatten(1)))
        return self.third(F.relu(self.third(F.relu(self.second(x)) + x)))


def test_layers_that_share_an_output_or_a_weight_stay():
    assert changed(unequal(ReadTwiceNetwork)) == set()
