import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from compressor.errors import StageError
from compressor.pruning.dependency_graph import channel_groups
from compressor.pruning.groups import Group, without
from example_models import CifarResNet
from networks import (
    ConcatenatedNetwork,
    ConvNextNetwork,
    DecoderNetwork,
    FixedViewNetwork,
    GroupedNetwork,
    PlainNetwork,
    ResidualNetwork,
    SqueezeExciteNetwork,
    TenEverywhereNetwork,
)


class Wired(nn.Module):
    """Layers, buffers and parameters by name, and a forward."""

    def __init__(self, forward: Callable[..., Tensor], **parts: nn.Module | Tensor) -> None:
        super().__init__()
        self.wiring = forward
        for name, part in parts.items():
            if isinstance(part, nn.Parameter):
                self.register_parameter(name, part)
            elif isinstance(part, Tensor):
                self.register_buffer(name, part, persistent=False)
            else:
                self.add_module(name, part)

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.wiring(self, *inputs)


def groups_of(module, inputs, *, protect=()):
    return channel_groups(module, inputs, protect=protect).groups


def means(x: Tensor) -> Tensor:
    return x.mean((2, 3))


def conv(inputs: int, outputs: int, **settings: int) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, padding=1, **settings)


@dataclass(frozen=True)
class Reader:
    """Where the channels of a group stand among the inputs of a layer: each `span` long, the first at `offset`."""

    offset: int = 0
    span: int = 1
    copies: int = 1
    """How often the channels come, one copy after the other."""


@dataclass(frozen=True)
class Case:
    build: Callable[[], nn.Module]
    groups: Mapping[str, tuple[int, int]]
    """Units and channels in each, by path."""
    readers: Mapping[str, Mapping[str, Reader]]
    """By group, by layer: written down by hand, from the forward."""
    norms: tuple[str, ...] = ()
    """Normalizations that average over the channels of the first group."""


R = Reader()
CASES = {
    "plain-with-flattening": Case(
        PlainNetwork,
        {"conv1": (16, 1), "conv2": (32, 1), "fc1": (64, 1)},
        {"conv1": {"conv2": R}, "conv2": {"fc1": Reader(span=16)}, "fc1": {"fc2": R}},
    ),
    "residual-and-depthwise": Case(ResidualNetwork, {"stem": (16, 1)}, {"stem": {"pointwise": R, "head": R}}),
    "concatenation": Case(
        ConcatenatedNetwork,
        {"left": (16, 1), "right": (16, 1), "joined": (16, 1)},
        {"left": {"joined": R}, "right": {"joined": Reader(offset=16)}, "joined": {"head": Reader(span=36)}},
    ),
    "concatenation-with-itself": Case(
        lambda: Wired(
            lambda s, x: s.head(means(s.bn(torch.cat([y := s.stem(x), y], 1)))),
            stem=conv(1, 8),
            bn=nn.BatchNorm2d(16),
            head=nn.Linear(16, 10),
        ),
        {"stem": (8, 1)},
        {"stem": {"head": Reader(copies=2)}},
    ),
    "concatenation-then-addition": Case(
        lambda: Wired(
            lambda s, x: s.head(means(torch.cat([s.left(x), s.right(x)], 1) + s.wide(x))),
            left=conv(1, 4),
            right=conv(1, 12),
            wide=conv(1, 16),
            head=nn.Linear(16, 10),
        ),
        {"left": (4, 1), "right": (12, 1)},
        {"left": {"head": R}, "right": {"head": Reader(offset=4)}},
    ),
    "dense-block": Case(
        lambda: Wired(
            lambda s, x: s.head(
                means(torch.cat([y := torch.cat([z := s.stem(x), s.first(z)], 1), s.second(s.bn(y))], 1))
            ),
            stem=conv(1, 8),
            first=conv(8, 4),
            bn=nn.BatchNorm2d(12),
            second=conv(12, 4),
            head=nn.Linear(16, 10),
        ),
        {"stem": (8, 1), "first": (4, 1), "second": (4, 1)},
        {
            "stem": {"first": R, "second": R, "head": R},
            "first": {"second": Reader(offset=8), "head": Reader(offset=8)},
            "second": {"head": Reader(offset=12)},
        },
    ),
    "squeeze-and-excitation": Case(
        SqueezeExciteNetwork,
        {"conv": (16, 1), "squeeze": (8, 1)},
        {"conv": {"squeeze": R, "map": R, "head": R}, "squeeze": {"excite": R}},
    ),
    "transposed-and-groupnorm": Case(
        DecoderNetwork,
        {"down": (4, 4), "up": (12, 1)},
        {"down": {"up": R}, "up": {"head": R}},
        norms=("norm",),
    ),
    "layernorm-and-scale": Case(
        ConvNextNetwork,
        {"stem": (16, 1), "widen": (64, 1)},
        {"stem": {"widen": R, "head": R}, "widen": {"narrow": R}},
        norms=("norm", "last_norm"),
    ),
    "groupnorm-of-each-channel": Case(
        lambda: Wired(
            lambda s, x: s.head(means(F.relu(s.norm(s.stem(x))))),
            stem=conv(1, 8),
            norm=nn.GroupNorm(8, 8),
            head=nn.Linear(8, 10),
        ),
        {"stem": (8, 1)},
        {"stem": {"head": R}},
    ),
    "depthwise-transposed": Case(
        lambda: Wired(
            lambda s, x: s.head(means(s.up(s.stem(x)))),
            stem=conv(1, 8),
            up=nn.ConvTranspose2d(8, 8, 2, groups=8),
            head=nn.Linear(8, 10),
        ),
        {"stem": (8, 1)},
        {"stem": {"head": R}},
    ),
    "scale-in-front": Case(
        lambda: Wired(
            lambda s, x: s.head(means(s.gain * s.scale * s.stem(x))),
            stem=conv(1, 8),
            scale=nn.Parameter(torch.rand(1, 8, 1, 1)),
            gain=nn.Parameter(torch.tensor(2.0)),
            head=nn.Linear(8, 10),
        ),
        {"stem": (8, 1)},
        {"stem": {"head": R}},
    ),
    "one-layer-run-twice": Case(
        lambda: Wired(
            lambda s, x: s.head(means(s.twice(s.twice(s.stem(x))))),
            stem=conv(1, 8),
            twice=conv(8, 8),
            head=nn.Linear(8, 10),
        ),
        {"stem": (8, 1)},
        {"stem": {"twice": R, "head": R}},
    ),
    "more-channels-in-each-group": Case(
        lambda: Wired(
            lambda s, x: s.head(means((y := s.stem(x)) + s.grouped(y))),
            stem=conv(1, 12),
            grouped=conv(12, 12, groups=3),
            head=nn.Linear(12, 10),
        ),
        {"stem": (4, 3)},
        {"stem": {"grouped": R, "head": R}},
    ),
}
for _first, _second, _groups in [
    (2, 2, {"stem": (12, 2), "first": (24, 2), "second": (12, 2)}),
    (2, 4, {"stem": (12, 2), "first": (12, 4), "second": (6, 4)}),
    (4, 2, {"stem": (6, 4), "first": (12, 4), "second": (12, 2)}),
    (2, 3, {"stem": (12, 2), "first": (8, 6), "second": (8, 3)}),
    (1, 8, {"stem": (24, 1), "first": (6, 8), "second": (3, 8)}),
]:
    CASES[f"groups-{_first}-then-{_second}"] = Case(
        lambda first=_first, second=_second: GroupedNetwork(first, second),
        _groups,
        {"stem": {"first": R}, "first": {"second": R}, "second": {"head": R}},
    )


def randomized(module: nn.Module) -> nn.Module:
    """In evaluation mode, float64, with statistics and scales that make a wrong entry show."""
    for layer in module.modules():
        if isinstance(layer, nn.modules.batchnorm._BatchNorm):
            layer.running_mean.normal_()
            layer.running_var.uniform_(0.5, 2)
        if isinstance(layer, nn.BatchNorm2d | nn.LayerNorm | nn.GroupNorm | nn.PReLU):
            for parameter in layer.parameters():
                parameter.data.uniform_(0.5, 2)
    return module.double().eval()


def some_of(group: Group) -> tuple[int, ...]:
    """About 40 % of the units, without a pattern."""
    return tuple(sorted(torch.randperm(group.units)[: max(1, int(group.units * 0.4))].tolist()))


def positions(group: Group, removed: tuple[int, ...], reader: Reader = R) -> list[int]:
    """Inputs of a reader that come from the `removed` units: a unit is a channel from each block of channels."""
    width = group.units * group.channels_per_unit
    channels = [block * group.units + unit for unit in removed for block in range(group.channels_per_unit)]
    return [
        reader.offset + (copy * width + channel) * reader.span + place
        for channel in channels
        for copy in range(reader.copies)
        for place in range(reader.span)
    ]


def answers_with_zeros(module: nn.Module, case: Case, groups, removal, images: Tensor) -> Tensor:
    """What `module` gives when the inputs of every reader that come from removed units are set to zero."""
    hooks = []

    def zero(gone, dim):
        return lambda _layer, inputs: inputs[0].index_fill(dim, torch.tensor(gone), 0)

    def over_kept(kept):
        def norm(layer, inputs, _outputs):
            (x,) = inputs
            outputs = torch.zeros_like(x)
            if isinstance(layer, nn.LayerNorm):
                some = F.layer_norm(x[..., kept], [len(kept)], layer.weight[kept], layer.bias[kept])
                outputs[..., kept] = some
            else:
                outputs[:, kept] = F.group_norm(x[:, kept], layer.num_groups, layer.weight[kept], layer.bias[kept])
            return outputs

        return norm

    for group in groups:
        for path, reader in case.readers[group.path].items():
            layer = module.get_submodule(path)
            gone = positions(group, removal[group.path], reader)
            dim = -1 if isinstance(layer, nn.Linear) else 1
            hooks.append(layer.register_forward_pre_hook(zero(gone, dim)))
    first = groups[0]
    kept = sorted(set(range(first.units * first.channels_per_unit)) - set(positions(first, removal[first.path])))
    hooks += [module.get_submodule(path).register_forward_hook(over_kept(kept)) for path in case.norms]
    with torch.no_grad():
        answers = module(images)
    for hook in hooks:
        hook.remove()
    return answers


def assert_sizes_are_those_of_the_tensors(module: nn.Module) -> None:
    for layer in module.modules():
        shape = tuple(layer.weight.shape) if getattr(layer, "weight", None) is not None else None
        match layer:
            case nn.ConvTranspose2d():
                assert shape[:2] == (layer.in_channels, layer.out_channels // layer.groups)
            case nn.Conv2d():
                assert shape[:2] == (layer.out_channels, layer.in_channels // layer.groups)
            case nn.Linear():
                assert shape == (layer.out_features, layer.in_features)
            case nn.BatchNorm2d():
                assert tuple(layer.running_mean.shape) == tuple(layer.running_var.shape) == (layer.num_features,)
                assert shape in {None, (layer.num_features,)}
            case nn.GroupNorm():
                assert shape == (layer.num_channels,)
                assert layer.num_channels % layer.num_groups == 0
            case nn.LayerNorm():
                assert shape == layer.normalized_shape
            case nn.PReLU():
                assert shape == (layer.num_parameters,)
        if getattr(layer, "bias", None) is not None and not isinstance(layer, nn.ConvTranspose2d):
            assert len(layer.bias) == (shape[0] if len(shape) > 1 else shape[-1])


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_cut_network_answers_like_one_whose_readers_get_zeros(case, digits_task):
    torch.manual_seed(0)
    module = randomized(case.build())
    images = digits_task.test.inputs[0][:8].double()
    groups = groups_of(module, (images[:2],))
    assert {group.path: (group.units, group.channels_per_unit) for group in groups} == case.groups
    removal = {group.path: some_of(group) for group in groups}
    smaller = without(module, groups, removal)
    with torch.no_grad():
        found = smaller(images)
    wanted = answers_with_zeros(module, case, groups, removal, images)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-10)  # float64 sums in another order
    assert (wanted - module(images)).abs().max() > 1e-3  # what left did something
    assert_sizes_are_those_of_the_tensors(smaller)


def flattened_into_heads(s, x):
    return s.head(means(s.conv(s.stem(x))).view(-1, 4, 10).mean(1))


def halves_apart(s, x):
    one, other = s.stem(x).chunk(2, 1)
    return s.head(means(s.left(one) + s.right(other)))


UNFOLLOWED = {
    "parameter-in-a-product": (
        lambda: Wired(
            lambda s, x: s.head(means(s.conv(s.stem(x))) @ s.mix),
            stem=conv(1, 8),
            conv=conv(8, 8),
            mix=nn.Parameter(torch.rand(8, 16)),
            head=nn.Linear(16, 10),
        ),
        "which of its channels mix uses for those of conv is not known",
        ["conv"],
        ["stem"],
    ),
    "pixel-shuffle": (
        lambda: Wired(
            lambda s, x: s.head(means(s.conv(F.pixel_shuffle(s.stem(x), 2)))),
            stem=conv(1, 16),
            conv=conv(4, 8),
            head=nn.Linear(8, 10),
        ),
        "conv has fewer channels than come to it from stem: something in between rearranges them",
        ["stem"],
        ["conv"],
    ),
    "view-with-sizes": (
        lambda: Wired(flattened_into_heads, stem=conv(1, 8), conv=conv(8, 40), head=nn.Linear(10, 10)),
        "is a size written in its forward",
        ["conv"],
        ["stem"],
    ),
    "channel-shuffle": (
        lambda: Wired(
            lambda s, x: s.head(means(s.conv(F.channel_shuffle(s.stem(x), 2)))),
            stem=conv(1, 16),
            conv=conv(16, 8),
            head=nn.Linear(8, 10),
        ),
        "its outputs differ by .* in a way that cannot be followed",
        ["stem"],
        ["conv"],
    ),
    "shuffle-before-layernorm": (  # a normalization over channels must not hide it
        lambda: Wired(
            lambda s, x: s.head(F.gelu(s.wide(s.norm(means(F.channel_shuffle(s.stem(x), 2)))))),
            stem=conv(1, 16),
            norm=nn.LayerNorm(16),
            wide=nn.Linear(16, 32),
            head=nn.Linear(32, 10),
        ),
        "its outputs differ by",
        ["stem"],
        ["wide"],
    ),
    "gated-halves": (
        lambda: Wired(
            lambda s, x: s.head(means(s.conv(F.glu(s.stem(x), 1)))),
            stem=conv(1, 16),
            conv=conv(8, 8),
            head=nn.Linear(8, 10),
        ),
        "conv has fewer channels than come to it from stem",
        ["stem"],
        ["conv"],
    ),
    "halves": (
        lambda: Wired(
            halves_apart,
            stem=conv(1, 16),
            left=conv(8, 8),
            right=conv(8, 8),
            head=nn.Linear(8, 10),
        ),
        "stem: Wired must run after pruning",
        ["stem"],
        ["left"],
    ),
    "groups-behind-a-concatenation": (
        lambda: Wired(
            lambda s, x: s.head(means(s.grouped(torch.cat([s.left(x), s.right(x)], 1)))),
            left=conv(1, 8),
            right=conv(1, 8),
            grouped=conv(16, 8, groups=2),
            head=nn.Linear(8, 10),
        ),
        "which of its channels grouped uses for those of left is not known; right: which of",
        ["left", "right"],
        ["grouped"],
    ),
    "transposed-in-groups": (
        lambda: Wired(
            lambda s, x: s.head(means(s.conv(s.up(s.stem(x))))),
            stem=conv(1, 8),
            up=nn.ConvTranspose2d(8, 8, 2, groups=2),
            conv=conv(8, 8),
            head=nn.Linear(8, 10),
        ),
        "a transposed convolution with groups must have one per channel",
        ["up", "stem"],
        ["conv"],
    ),
    "softmax-over-channels": (
        lambda: Wired(
            lambda s, x: s.head(means(s.conv(s.stem(x)).softmax(1))),
            stem=conv(1, 8),
            conv=conv(8, 8),
            head=nn.Linear(8, 10),
        ),
        "its outputs differ by",
        ["conv"],
        ["stem"],
    ),
    "buffer-for-each-channel": (
        lambda: Wired(
            lambda s, x: s.head(means(s.conv(s.stem(x)) * s.gain)),
            stem=conv(1, 8),
            conv=conv(8, 8),
            gain=torch.rand(8, 1, 1),
            head=nn.Linear(8, 10),
        ),
        "is a size written in its forward or held by a buffer",
        ["conv"],
        ["stem"],
    ),
}


@pytest.mark.parametrize(("build", "message", "protect", "left"), UNFOLLOWED.values(), ids=UNFOLLOWED)
def test_layers_that_cannot_be_followed_are_kept_with_a_reason_and_the_rest_is_found(
    build, message, protect, left, digits_task
):
    torch.manual_seed(0)
    module = build()
    found = channel_groups(module, digits_task.example_inputs)
    assert [group.path for group in found.groups] == left
    assert list(found.kept) == protect
    assert re.search(message, "; ".join(f"{path}: {reason}" for path, reason in found.kept.items()))
    told = channel_groups(module, digits_task.example_inputs, protect=protect)
    assert ([group.path for group in told.groups], told.kept) == (left, {})


def test_shortcut_that_adds_zero_channels_is_kept_and_the_rest_can_be_pruned():
    found = channel_groups(CifarResNet(blocks=1), (torch.rand(2, 3, 8, 8),))
    assert found.kept
    # within a block no shortcut passes
    assert {f"layer{stack}.0.conv1" for stack in (1, 2, 3)} <= {group.path for group in found.groups}


def test_output_layer_is_told_from_a_hidden_layer_of_its_width(digits_task):
    groups = groups_of(TenEverywhereNetwork(), digits_task.example_inputs)
    assert [(group.path, group.units) for group in groups] == [("hidden", 10)]


@pytest.mark.parametrize(
    "head",
    [
        pytest.param(nn.ConvTranspose2d(16, 3, 2), id="transposed"),
        pytest.param(nn.Conv2d(16, 1, 1), id="one-channel"),
        pytest.param(nn.Sequential(nn.Conv2d(16, 10, 1), nn.BatchNorm2d(10), nn.AvgPool2d(2)), id="pooled-logits"),
    ],
)
def test_convolution_that_makes_the_output_keeps_its_channels(digits_task, head):
    module = nn.Sequential(nn.Conv2d(1, 16, 3), nn.ReLU(), head)
    assert [group.path for group in groups_of(module, digits_task.example_inputs)] == ["0"]


def test_outputs_that_layers_share_keep_their_channels(digits_task):
    module = Wired(
        lambda s, x: torch.cat([s.one(y := means(s.stem(x))), s.other(y)], 1),
        stem=conv(1, 8),
        one=nn.Linear(8, 4),
        other=nn.Linear(8, 6),
    )
    assert [group.path for group in groups_of(module, digits_task.example_inputs)] == ["stem"]


def test_size_written_in_forward_is_explained(digits_task):
    found = channel_groups(FixedViewNetwork(), digits_task.example_inputs)
    assert found.groups == ()
    assert "is a size written in its forward" in found.kept["conv"]


def test_layer_that_takes_no_part_is_named(digits_task):
    module = PlainNetwork()
    module.forgotten = nn.Linear(3, 3)
    found = channel_groups(module, digits_task.example_inputs)
    assert found.kept == {"forgotten": "it takes no part in the forward pass in evaluation mode"}
    assert [group.path for group in found.groups] == ["conv1", "conv2", "fc1"]


def test_channels_that_another_layer_reads_in_training_are_kept(digits_task):
    module = Wired(
        lambda s, x: s.head(means(y := s.last(s.stem(x)))) + (s.aid(means(y)) if s.training else 0),
        stem=conv(1, 8),
        last=conv(8, 8),
        aid=nn.Linear(8, 10),
        head=nn.Linear(8, 10),
    )
    found = channel_groups(module, digits_task.example_inputs)
    assert [group.path for group in found.groups] == ["stem"]
    assert found.kept["last"] == "layers that run in training alone use its channels"


@pytest.mark.parametrize(
    ("outputs", "kind"), [(lambda y: (y, y), "tuple"), (lambda y: {"logits": y}, "dict")], ids=["two", "named"]
)
def test_more_than_one_output_is_refused(digits_task, outputs, kind):
    module = Wired(lambda s, x: outputs(s.head(means(s.stem(x)))), stem=conv(1, 8), head=nn.Linear(8, 10))
    with pytest.raises(StageError, match=f"Wired must give one tensor to be pruned, got {kind}"):
        groups_of(module, digits_task.example_inputs)


def test_numbers_of_tokens_and_several_inputs_are_followed():
    module = Wired(
        lambda s, tokens, mask: s.head(F.relu(s.hidden((s.embedding(tokens) * mask[..., None]).sum(1)))),
        embedding=nn.Embedding(50, 16),
        hidden=nn.Linear(16, 32),
        head=nn.Linear(32, 4),
    )
    groups = groups_of(module, (torch.arange(7)[None], torch.ones(1, 7)))
    assert [(group.path, group.units) for group in groups] == [("hidden", 32)]


@pytest.mark.parametrize("network", [PlainNetwork, ResidualNetwork, SqueezeExciteNetwork, ConvNextNetwork])
def test_one_example_is_enough(network, digits_task):
    module, images = network(), digits_task.example_inputs[0]
    assert groups_of(module, (images[:1],)) == groups_of(module, (images,))


@pytest.mark.parametrize("training", [True, False])
def test_module_is_left_as_it_was(training, digits_task):
    module = nn.Sequential(PlainNetwork(), nn.Dropout(0.5)).train(training)
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    groups_of(module, digits_task.example_inputs)
    assert all(layer.training == training for layer in module.modules())
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())
    assert not any(layer._forward_hooks for layer in module.modules())
