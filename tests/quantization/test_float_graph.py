"""The float graph that int8 is planned on."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from compressor.errors import StageError
from compressor.quantization.float_graph import BATCH_NORM, SPELLED_OUT, aten, float_graph, fold_batch_norms, spell_out
from compressor.quantization.int8_plan import plan_int8
from example_models import SeparableNetwork
from networks import ResidualNetwork


class MutatingNetwork(nn.Module):
    """Writes into a view of its activations, and reads a tensor that it changed in place."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3)
        self.head = nn.Linear(4 * 36, 10)

    def forward(self, x):
        x = self.conv(x)
        F.relu(x, inplace=True)
        x[:, 0] += 1.0
        return self.head(x.flatten(1))


class NormalizedNetwork(nn.Module):
    """BatchNorm after each kind of layer, also one without gain, and one whose input has a second reader."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Sequential(nn.Conv2d(1, 4, 3, groups=1), nn.BatchNorm2d(4))
        self.up = nn.Sequential(nn.ConvTranspose2d(4, 6, 3, bias=False), nn.BatchNorm2d(6, affine=False))
        self.plain = nn.Conv2d(6, 6, 1)
        self.norm = nn.BatchNorm2d(6)
        self.head = nn.Sequential(nn.Linear(6 * 64, 10), nn.BatchNorm1d(10))

    def forward(self, x):
        x = self.plain(self.up(self.conv(x)))
        return self.head((x + self.norm(x)).flatten(1))


def with_statistics(module: nn.Module) -> nn.Module:
    """Give BatchNorm statistics and gains that a training could have left."""
    torch.manual_seed(0)
    for layer in module.modules():
        if isinstance(layer, nn.modules.batchnorm._BatchNorm):
            layer.running_mean.normal_()
            layer.running_var.uniform_(0.5, 2)
            if layer.affine:
                layer.weight.data.normal_()
                layer.bias.data.normal_()
    return module.eval()


@pytest.fixture
def images():
    return torch.rand(5, 1, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("network", [MutatingNetwork, NormalizedNetwork, ResidualNetwork, SeparableNetwork])
def test_graph_and_folded_graph_answer_as_the_module_does(network, digits_task, images):
    module = with_statistics(network())
    before = copy.deepcopy(module.state_dict())
    graph = float_graph(module, digits_task)
    with torch.no_grad():
        expected = module(images)
        torch.testing.assert_close(graph(images), expected)
        torch.testing.assert_close(
            fold_batch_norms(graph)(images), expected, rtol=1e-4, atol=1e-4
        )  # sums in another order
    assert all(torch.equal(before[name], tensor) for name, tensor in module.state_dict().items())


def test_no_operator_changes_its_input(digits_task):
    graph = float_graph(MutatingNetwork().eval(), digits_task)
    calls = [node.target for node in graph.graph.nodes if node.op == "call_function"]
    assert not [str(call) for call in calls if getattr(call, "_schema", None) and call._schema.is_mutable]


def test_batch_norm_is_folded_or_else_a_depthwise_convolution(digits_task):
    graph = float_graph(with_statistics(NormalizedNetwork()), digits_task)
    assert [node.meta["layer"] for node in graph.graph.nodes if node.target is BATCH_NORM] == [
        "conv.1",
        "up.1",
        "norm",
        "head.1",
    ]
    names = [node.name for node in graph.graph.nodes if node.target is BATCH_NORM]
    after = fold_batch_norms(graph)
    assert not [node for node in after.graph.nodes if node.target is BATCH_NORM]
    (alone,) = [node for node in after.graph.nodes if node.meta.get("layer") == "norm"]
    assert alone.target is aten.conv2d.default  # its layer has another reader
    layers = {node.name: node.meta["layer"] for node in after.graph.nodes if node.name in names}
    assert sorted(layers.values()) == ["conv.0", "head.0", "norm", "up.0"]  # each under the name of its BatchNorm


def test_parts_of_a_fused_projection_are_weights_of_their_own(digits_task):
    class Rows(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
            self.head = nn.Linear(8, 10)

        def forward(self, x):
            x = x.squeeze(1)
            other = x.flip(1)
            return self.head(self.attention(x, other, other)[0].mean(1))

    graph = float_graph(Rows().eval(), digits_task)
    linears = [node for node in graph.graph.nodes if node.target is aten.linear.default]
    assert len(linears) == 4  # the query, key and value together, their projection, the head
    assert {node.args[1].op for node in linears} == {"get_attr"}


class Masked(nn.Module):
    """A linear layer, of which a part is used, and a mask, of which a part is used."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(64, 20)
        self.register_buffer("mask", torch.full((20,), -1e9))

    def forward(self, x):
        return F.linear(x.flatten(1), self.head.weight[:10], self.head.bias[:10]) + self.mask[:10]


@pytest.mark.parametrize("frozen", [False, True])
def test_constants_train_if_they_come_from_what_trains(frozen, digits_task):
    module = Masked().requires_grad_(not frozen)
    graph = float_graph(module.eval(), digits_task)
    trains = sorted((p.ndim, p.requires_grad) for p in graph.parameters())
    assert trains == [(1, False), (1, not frozen), (2, not frozen)]


def test_layers_have_paths_and_functions_their_name_below_the_path(digits_task):
    graph = float_graph(ResidualNetwork().eval(), digits_task)
    layers = [node.meta["layer"] for node in graph.graph.nodes if node.op == "call_function"]
    assert {"stem", "depthwise", "pointwise", "add", "head"} <= set(layers)
    assert len(set(layers)) == len(layers)


def test_dropout_is_gone_so_that_layer_and_relu_are_one_kernel(digits_task):
    module = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.Dropout2d(), nn.ReLU(), nn.Flatten(), nn.Dropout(), nn.Linear(144, 10)
    )
    graph = float_graph(module.eval(), digits_task)
    _, plan = plan_int8(graph)
    assert not [node.name for node in graph.graph.nodes if "dropout" in node.name]
    assert next(unit.output for unit in plan.units if unit.weight) == "relu"


def test_spelled_out_activations_give_equal_outputs(digits_task, images):
    module = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.Hardswish(), nn.SiLU(), nn.Hardsigmoid(), nn.Flatten(), nn.Linear(144, 10)
    ).eval()
    graph = float_graph(module, digits_task)
    names = {node.name for node in graph.graph.nodes if node.target in SPELLED_OUT}
    spelled = spell_out(graph, names)
    assert len(names) == 3
    assert not [node for node in spelled.graph.nodes if node.target in SPELLED_OUT]
    with torch.no_grad():
        torch.testing.assert_close(spelled(images), module(images), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_model_of_another_float_type_is_refused_by_its_first_parameter(dtype, digits_task):
    module = nn.Sequential(nn.Flatten(), nn.Linear(64, 10)).to(dtype).eval()
    with pytest.raises(StageError, match=rf"float32 model, but '1\.weight' holds {dtype}; convert it with \.float\(\)"):
        float_graph(module, digits_task)


def test_model_with_a_tensor_of_codes_is_refused_by_its_name(digits_task):
    module = nn.Sequential(nn.Flatten(), nn.Linear(64, 10)).eval()
    module.register_buffer("codes", torch.zeros(10, 64, dtype=torch.int8))
    with pytest.raises(StageError, match=r"but 'codes' holds torch\.int8; give the model as it was before"):
        float_graph(module, digits_task)
