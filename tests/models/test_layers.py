import copy
from collections import OrderedDict

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from compressor.errors import InputError
from compressor.models.layers import (
    capture_outputs,
    check_fires,
    layer_outputs,
    layer_paths,
    output_channels,
    pair_paths,
    paths_matching,
)
from example_models import CifarResNet, SequenceNetwork, SignalNetwork

IMAGES = (torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)),)
DIGITS = (torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0)),)


class TupleBlock(nn.Module):
    """A transformer block whose output is a tuple, as Hugging Face's are: hidden states, then attention."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
        self.norm = nn.LayerNorm(16)
        self.unused = nn.Linear(16, 16)

    def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        attended, weights = self.attention(hidden, hidden, hidden)
        return self.norm(hidden + attended), weights


class LastState(nn.Module):
    """Gives a mapping, as Hugging Face's models do: first something that is no tensor, then a tuple of tensors."""

    def forward(self, hidden: Tensor) -> OrderedDict[str, object]:
        return OrderedDict(loss=None, states=(hidden, hidden * 2))


class WordNetwork(nn.Module):
    """Blocks in a list that is never called itself, over (N, L) token numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(50, 16)
        self.blocks = nn.ModuleList(TupleBlock() for _ in range(2))
        self.last = LastState()
        self.nothing = Nothing()

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.embedding(tokens)
        for block in self.blocks:
            hidden, _ = block(hidden)
        self.nothing(hidden)
        return self.last(hidden)["states"][0].mean(1)


class Nothing(nn.Module):
    """Runs and gives no tensor."""

    def forward(self, _x: Tensor) -> None:
        return None


WORDS = (torch.arange(2 * 5).reshape(2, 5),)


class InPlaceNetwork(nn.Module):
    """What the convolution gives is changed in place by the activation; one layer runs twice, under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3, padding=1)
        self.act = nn.ReLU(inplace=True)
        self.shared = nn.Conv2d(4, 4, 1)
        self.alias = self.shared

    def forward(self, x: Tensor) -> Tensor:
        return self.alias(self.shared(self.act(self.conv(x))))


def test_layers_are_listed_in_the_order_of_the_run_with_shape_and_parameters():
    outputs = layer_outputs(CifarResNet(1), IMAGES)
    assert [(output.path, output.kind, output.shape, output.parameters) for output in outputs[:4]] == [
        ("conv1", "Conv2d", (2, 16, 32, 32), 432),
        ("bn1", "BatchNorm2d", (2, 16, 32, 32), 32),
        ("layer1.0.conv1", "Conv2d", (2, 16, 32, 32), 2304),
        ("layer1.0.bn1", "BatchNorm2d", (2, 16, 32, 32), 32),
    ]
    by_path = {output.path: output for output in outputs}
    assert list(by_path).index("layer2.0.bn2") < list(by_path).index("layer2.0") < list(by_path).index("layer2")
    assert by_path["layer2"].shape == (2, 32, 16, 16)
    assert by_path["layer2"].parameters == 9 * 16 * 32 + 9 * 32 * 32 + 4 * 32  # two kernels, two normalizations
    assert by_path["linear"].shape == (2, 10)
    assert set(by_path) == set(layer_paths(CifarResNet(1)))


def test_dry_run_leaves_the_module_as_it_was():
    module = CifarResNet(1).train()
    module.bn1.eval()
    state, flags = copy.deepcopy(module.state_dict()), [layer.training for layer in module.modules()]
    layer_outputs(module, IMAGES)
    assert [layer.training for layer in module.modules()] == flags
    assert not any(layer._forward_hooks for layer in module.modules())
    torch.testing.assert_close(module.state_dict(), state, rtol=0, atol=0)


def test_dry_run_that_fails_is_an_input_error_and_leaves_no_hooks():
    module = CifarResNet(1).train()
    with pytest.raises(InputError, match="CifarResNet must run on example_inputs, but: RuntimeError"):
        layer_outputs(module, DIGITS)
    assert all(layer.training and not layer._forward_hooks for layer in module.modules())


def test_first_tensor_of_tuples_and_mappings_is_the_output():
    shapes = {output.path: output.shape for output in layer_outputs(WordNetwork(), WORDS)}
    assert shapes["blocks.1"] == (2, 5, 16)
    assert shapes["last"] == (2, 5, 16)
    with capture_outputs(module := WordNetwork().eval(), ["blocks.1", "last"]) as outputs:
        module(*WORDS)
    torch.testing.assert_close(outputs["blocks.1"], outputs["last"], rtol=0, atol=0)


def test_layers_that_give_no_tensor_are_not_listed():
    module = WordNetwork()
    silent = set(layer_paths(module)) - {output.path for output in layer_outputs(module, WORDS)}
    # attention reads the weights of its out_proj without calling it
    assert silent == {"nothing", "blocks"} | {
        f"blocks.{i}.{name}" for i in "01" for name in ("unused", "attention.out_proj")
    }


def test_layers_of_a_fused_transformer_are_listed():
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    outputs = layer_outputs(encoder, (torch.zeros(2, 5, 16),))
    assert {"layers.0.linear1", "layers.1.norm2", "layers.1"} <= {output.path for output in outputs}


def channel_dimensions(module: nn.Module, inputs: tuple[Tensor, ...]) -> dict[str, int]:
    return {output.path: output.channel_dimension for output in layer_outputs(module, inputs)}


def test_channels_of_images_and_vectors_are_in_dimension_1():
    assert set(channel_dimensions(CifarResNet(1), IMAGES).values()) == {1}


def test_channels_of_tokens_are_in_the_last_dimension():
    found = channel_dimensions(SequenceNetwork(), DIGITS)
    assert found == {"embedding": 2, "norm": 2, "query_key_value": 2, "projection": 2, "head": 1}
    assert channel_dimensions(WordNetwork(), WORDS)["blocks.0"] == 2


def test_channels_of_signals_are_in_dimension_1():
    assert channel_dimensions(SignalNetwork(), DIGITS)["conv2"] == 1
    signals = nn.Sequential(nn.Sequential(nn.Conv1d(3, 8, 3), nn.BatchNorm1d(8), nn.GELU()), nn.AdaptiveAvgPool1d(5))
    assert set(channel_dimensions(signals, (torch.zeros(2, 3, 20),)).values()) == {1}


class Turned(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.movedim(-1, 1)


def test_channels_are_followed_where_dimensions_are_swapped():
    # the layers of ConvNeXt and wav2vec 2.0: normalized with channels last, given with channels first
    images = nn.Sequential(nn.Linear(3, 8), Turned(), nn.Conv2d(8, 6, 1), nn.ReLU())
    assert list(channel_dimensions(images, (torch.zeros(2, 4, 4, 3),)).values()) == [3, 1, 1, 1]
    signals = nn.Sequential(nn.Linear(3, 8), Turned(), nn.ReLU())
    assert list(channel_dimensions(signals, (torch.zeros(2, 5, 3),)).values()) == [2, 1, 1]


@pytest.mark.parametrize(
    ("pattern", "found"),
    [
        ("layer2", ["layer2"]),
        ("layer2.0.bn1", ["layer2.0.bn1"]),
        ("layer?", ["layer1", "layer2", "layer3"]),
        ("layer[1-2].*", ["layer1.0", "layer1.1", "layer2.0", "layer2.1"]),
        ("*.0.conv1", ["layer1.0.conv1", "layer2.0.conv1", "layer3.0.conv1"]),
        ("*", ["conv1", "bn1", "layer1", "layer2", "layer3", "linear"]),
        ("layer1.0.**", ["layer1.0.conv1", "layer1.0.bn1", "layer1.0.conv2", "layer1.0.bn2"]),
        ("**.bn1", ["bn1"] + [f"layer{i}.{j}.bn1" for i in (1, 2, 3) for j in (0, 1)]),
        ("layer3.**.bn2", ["layer3.0.bn2", "layer3.1.bn2"]),
        ("**.layer3", ["layer3"]),
    ],
)
def test_pattern_names_layers_in_the_order_of_the_module(pattern, found):
    assert paths_matching(CifarResNet(2), pattern) == tuple(found)


def test_two_stars_alone_name_every_layer():
    assert paths_matching(CifarResNet(1), "**") == layer_paths(CifarResNet(1))


def test_path_that_looks_like_a_pattern_names_itself():
    module = nn.ModuleDict({"a[1]": nn.ReLU(), "a1": nn.ReLU()})
    assert paths_matching(module, "a[1]") == ("a[1]",)


def test_pattern_without_a_layer_is_refused_with_the_closest_path():
    with pytest.raises(
        InputError, match=r"CifarResNet must have a layer 'layer1.0.con1', .*mean 'layer1.0.conv1'.*`com"
    ):
        paths_matching(CifarResNet(1), "layer1.0.con1")
    with pytest.raises(InputError, match="must have a layer ''"):
        paths_matching(CifarResNet(1), "")


def test_two_stars_beside_other_characters_are_refused():
    with pytest.raises(InputError, match=r"`\*\*` must stand alone .* got 'layer\*\*'"):
        paths_matching(CifarResNet(1), "layer**")


def test_patterns_are_paired_layer_by_layer():
    pairs = pair_paths(CifarResNet(1), CifarResNet(2), {"layer[1-2].0": "layer[2-3].1", "conv1": "conv1"})
    assert pairs == (("layer1.0", "layer2.1"), ("layer2.0", "layer3.1"), ("conv1", "conv1"))


def test_student_layers_may_share_a_teacher_layer():
    student, teacher = CifarResNet(1), CifarResNet(2)
    assert pair_paths(student, teacher, {"layer2": "layer3", "layer3": "layer3"})[1] == ("layer3", "layer3")


def test_patterns_for_unequally_many_layers_are_refused_with_both_lists():
    wanted = r"'layer\?\.\*' .* has 3, layer1.0, layer2.0, layer3.0, and the teacher 2, layer1.0, layer1.1$"
    with pytest.raises(InputError, match=wanted):
        pair_paths(CifarResNet(1), CifarResNet(2), {"layer?.*": "layer1.*"})


def test_student_layer_named_by_two_patterns_is_refused():
    with pytest.raises(InputError, match=r"'layer2' has 'layer2' and, by 'layer\[2\]', 'layer3'"):
        pair_paths(CifarResNet(1), CifarResNet(1), {"layer2": "layer2", "layer[2]": "layer3"})


def test_captured_outputs_are_those_of_the_layers():
    torch.manual_seed(0)
    module = CifarResNet(1).eval()
    plain = module(*IMAGES)
    with capture_outputs(module, ["layer1", "linear"]) as outputs:
        logits = module(*IMAGES)
    (images,) = IMAGES
    torch.testing.assert_close(
        outputs["layer1"], module.layer1(F.relu(module.bn1(module.conv1(images)))), rtol=0, atol=0
    )
    torch.testing.assert_close(outputs["linear"], logits, rtol=0, atol=0)
    torch.testing.assert_close(logits, plain, rtol=0, atol=0)


def test_captured_outputs_carry_the_gradient():
    torch.manual_seed(0)
    module = CifarResNet(1).train()
    with capture_outputs(module, ["layer1"]) as outputs:
        module(*IMAGES)
    outputs["layer1"].square().mean().backward()
    assert module.conv1.weight.grad.abs().max() > 0
    assert module.layer2[0].conv1.weight.grad is None


def test_captured_output_is_what_the_layer_gave_before_it_was_changed_in_place():
    torch.manual_seed(0)
    module = InPlaceNetwork()
    with capture_outputs(module, ["conv", "act"]) as outputs:
        module(*DIGITS).sum().backward()
    torch.testing.assert_close(outputs["conv"], module.conv(*DIGITS), rtol=0, atol=0)
    assert outputs["conv"].min() < 0 <= outputs["act"].min()


def test_layer_that_runs_twice_keeps_its_last_output_under_each_of_its_names():
    torch.manual_seed(0)
    module = InPlaceNetwork()
    with capture_outputs(module, ["shared", "alias"]) as outputs:
        last = module(*DIGITS)
    assert outputs.keys() == {"shared", "alias"}
    torch.testing.assert_close(outputs["shared"], last, rtol=0, atol=0)
    torch.testing.assert_close(outputs["alias"], last, rtol=0, atol=0)


def test_hooks_go_when_the_block_is_left_by_an_error():
    module = CifarResNet(1)
    with pytest.raises(RuntimeError, match="channels"), capture_outputs(module, ["layer1", "layer2"]):
        module(*DIGITS)
    with pytest.raises(AttributeError), capture_outputs(module, ["layer1", "layer9"]):
        raise AssertionError
    assert not any(layer._forward_hooks for layer in module.modules())


def test_channels_are_those_that_layers_with_weights_give():
    network = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ConvTranspose2d(8, 6, 2, groups=2), nn.ReLU(), nn.Flatten(),
        nn.Linear(6 * 5 * 5, 10),
    )  # fmt: skip
    assert output_channels(network, (torch.zeros(2, 3, 6, 6),)) == {"0": 8, "2": 6, "5": 10}


def test_channels_of_tokens_are_their_last_dimension():
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    network = nn.Sequential(nn.Embedding(50, 16), layer, nn.Linear(16, 4))
    assert output_channels(network, WORDS) == {"0": 16, "1.linear1": 32, "1.linear2": 16, "2": 4}


def test_layers_that_fire_are_given_in_the_order_asked_for():
    found = check_fires(CifarResNet(1), ["linear", "layer1"], IMAGES)
    assert [(output.path, output.shape) for output in found] == [("linear", (2, 10)), ("layer1", (2, 16, 32, 32))]


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("blocks", "layer 'blocks' of WordNetwork must give a tensor, but it is never called"),
        ("blocks.0.unused", "'blocks.0.unused' .* never called"),
        ("nothing", "layer 'nothing' of WordNetwork must give a tensor, but it gives none"),
        ("blocks.0.nrom", "must have a layer 'blocks.0.nrom', .* did you mean 'blocks.0.norm'"),
    ],
)
def test_layer_that_gives_nothing_is_refused_before_training(path, message):
    with pytest.raises(InputError, match=message):
        check_fires(WordNetwork(), ["blocks.1", path], WORDS)
