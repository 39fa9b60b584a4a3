import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.utils import prune
from torch.nn.utils import weight_norm as legacy_weight_norm
from torch.nn.utils.parametrizations import weight_norm

from compressor.errors import InputError, StageError
from compressor.export.parity import FLOAT_TOLERANCE
from compressor.export.to_onnx import to_onnx
from compressor.models.artifact import TorchModel
from compressor.models.edits import structural_edits
from compressor.models.outputs import relative_error
from compressor.pruning.allocation import multiples_of, uniform
from compressor.pruning.channels import Pruned, prunable_groups, prune_channels
from compressor.pruning.criteria import magnitude
from compressor.pruning.groups import run, without
from compressor.references.reference import Reference
from networks import ConcatenatedNetwork, PlainNetwork, ResidualNetwork, StackedNetwork, TiedNetwork
from processes import run_python

TESTS = Path(__file__).parents[1]

RELOAD = """
import sys, torch
from pathlib import Path
from safetensors.torch import load_file, save_file
from compressor import TorchModel
images = load_file(sys.argv[1])["images"]
for directory in map(Path, sys.argv[2:]):
    save_file({"logits": TorchModel.load(directory).predict((images,))}, directory / "logits.safetensors")
"""


def pruned(module: nn.Module, inputs, *, pruning_ratio: float = 0.5, round_to: int = 4) -> Pruned:
    groups = prunable_groups(module, inputs)
    scores = {group.path: magnitude(module, group, order=2) for group in groups}
    chosen = uniform(groups, scores, pruning_ratio=pruning_ratio, step_of=multiples_of(round_to))
    return prune_channels(module, inputs, groups, chosen)


def half(module: nn.Module, task, round_to: int = 4) -> nn.Module:
    return pruned(module, task.example_inputs, round_to=round_to).module


def paths(module: nn.Module, task, **settings) -> list[str]:
    return [group.path for group in prunable_groups(module, task.example_inputs, **settings)]


@pytest.mark.parametrize("network", [PlainNetwork, ResidualNetwork, ConcatenatedNetwork])
def test_pruned_network_has_half_the_channels_in_every_group_and_all_classes(network, digits_task):
    found = pruned(network(), digits_task.example_inputs)
    assert all(kept * 2 == had for kept, had in found.channels.values())
    assert found.pruning_ratio == 0.5
    assert found.module(*digits_task.example_inputs).shape == (2, 10)


def test_channels_of_units_with_several_are_counted(digits_task):
    module = nn.Sequential(nn.Conv2d(1, 8, 3), nn.Conv2d(8, 8, 3, groups=2), nn.Flatten(), nn.Linear(128, 10))
    groups = prunable_groups(module, digits_task.example_inputs)
    found = prune_channels(module, digits_task.example_inputs, groups, {"0": (1,), "1": (0, 2)})
    assert found.channels == {"0": (6, 8), "1": (4, 8)}
    assert (found.channels_removed, found.pruning_ratio) == (6, 6 / 16)


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


KINDS = ["ConcatenatedNetwork", "GroupedNetwork", "SqueezeExciteNetwork", "ConvNextNetwork", "DecoderNetwork"]


def test_pruned_models_are_saved_reloaded_in_a_fresh_process_and_exported_with_the_same_logits(tmp_path, digits_task):
    images = digits_task.test.inputs[0][:16]
    save_file({"images": images.contiguous()}, tmp_path / "images.safetensors")
    logits = {}
    for kind in KINDS:
        model = TorchModel.build(Reference(factory=f"networks:{kind}"), seed=0)
        smaller = pruned(model.module, digits_task.example_inputs, round_to=1).module
        smaller = model.with_module(smaller, *structural_edits(model.module, smaller))
        (tmp_path / kind).mkdir()
        smaller.save(tmp_path / kind)
        logits[kind] = smaller.predict((images,))
        exported = to_onnx(smaller.module, digits_task, tmp_path / f"{kind}.onnx")
        assert relative_error(exported.predict((images,)), logits[kind]) <= FLOAT_TOLERANCE
    arguments = (tmp_path / "images.safetensors", *(tmp_path / kind for kind in KINDS))
    run_python("-c", RELOAD, *arguments, PYTHONPATH=str(TESTS)).check_returncode()
    for kind in KINDS:
        assert torch.equal(load_file(tmp_path / kind / "logits.safetensors")["logits"], logits[kind]), kind


@pytest.mark.parametrize("training", [True, False])
def test_pruning_does_not_change_the_given_module(training, digits_task):
    module = PlainNetwork().train(training)
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    smaller = half(module, digits_task)
    assert all(layer.training == training for layer in module.modules())
    assert not smaller.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())


@pytest.mark.parametrize(
    ("protect", "left"),
    [
        (("conv1",), ["conv2", "fc1"]),
        (("conv*",), ["fc1"]),
        (("conv?", "bn1"), ["fc1"]),
        (("bn1",), ["conv2", "fc1"]),
        (("fc2",), ["conv1", "conv2", "fc1"]),  # what makes the output cannot go, what it reads can
    ],
)
def test_protected_layers_keep_their_channels(protect, left, digits_task):
    assert paths(PlainNetwork(), digits_task, protect=protect) == left


def test_what_a_protected_layer_holds_is_protected_with_all_that_is_coupled(digits_task):
    module = nn.Sequential(StackedNetwork(), nn.Linear(10, 16), nn.ReLU(), nn.Linear(16, 10))
    assert paths(module, digits_task) == ["0.stem", "0.head", "1"]
    assert paths(module, digits_task, protect=["0.stack1.3"]) == ["0.head", "1"]
    assert paths(module, digits_task, protect=["0.**.bn"]) == ["0.head", "1"]
    assert paths(module, digits_task, protect=["0"]) == ["1"]


def test_pattern_that_matches_nothing_is_refused_with_the_nearest_paths(digits_task):
    with pytest.raises(InputError, match=r"must have a layer 'conv3', but has none; did you mean 'conv[12]'"):
        prunable_groups(PlainNetwork(), digits_task.example_inputs, protect=["conv3"])


def test_protecting_everything_is_refused(digits_task):
    with pytest.raises(StageError, match=r"something to remove, but PlainNetwork .*; protect leaves out conv\*, fc1"):
        prunable_groups(PlainNetwork(), digits_task.example_inputs, protect=["conv*", "fc1"])


def lines_and_paths(module: nn.Module, task, **settings) -> tuple[list[str], list[str]]:
    lines: list[str] = []
    return lines, paths(module, task, log=lines.append, **settings)


def freeze(module: PlainNetwork) -> None:
    module.conv2.requires_grad_(False)


@pytest.mark.parametrize(
    ("change", "line", "left"),
    [
        # what a frozen layer makes, or would have to read less of
        (freeze, r"kept whole: conv2: its weight is frozen: it has requires_grad=False", ["fc1"]),
        (lambda m: weight_norm(m.conv2), r"conv2.weight is computed .*utils\.parametrize\.remove_param", ["fc1"]),
        (lambda m: legacy_weight_norm(m.conv2), r"conv2.weight is computed .*utils\.remove_weight_norm on", ["fc1"]),
        (
            lambda m: prune.l1_unstructured(m.fc1, "weight", 0.5),
            r"fc1.weight is computed .*utils\.prune\.rem",
            ["conv1"],
        ),
    ],
    ids=["frozen", "parametrized", "legacy-weight-norm", "torch-pruned"],
)
@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated")
def test_weights_that_cannot_be_cut_are_kept_and_the_rest_is_pruned(change, line, left, digits_task):
    module = PlainNetwork()
    change(module)
    lines, found = lines_and_paths(module, digits_task)
    assert found == left
    assert re.search(line, "\n".join(lines)), lines
    kept = [path for path in ("conv1", "conv2", "fc1") if path not in left]
    assert lines_and_paths(module, digits_task, protect=kept) == ([], left)


def test_layers_kept_for_one_reason_are_told_in_one_line_with_a_pattern_that_can_be_protected(digits_task):
    module = nn.Sequential(*(ShuffledBlock() for _ in range(3)), nn.Flatten(), nn.Linear(64, 32), nn.Linear(32, 10))
    lines, found = lines_and_paths(module, digits_task)
    assert found == ["4"]
    (line,) = lines
    assert line.startswith("kept whole: *.shuffled: its outputs") or "*.shuffled" in line
    quiet, found = lines_and_paths(module, digits_task, protect=["*.shuffled"])
    assert (quiet, found) == ([], ["4"])


def test_weights_shared_between_modules_are_kept(digits_task):
    with pytest.raises(
        StageError, match=r"something to remove, .*first\.weight and second\.weight are one and the same"
    ):
        prunable_groups(TiedNetwork(), digits_task.example_inputs)
    module = nn.Sequential(TiedNetwork(), nn.Linear(10, 16), nn.ReLU(), nn.Linear(16, 10))
    assert paths(module, digits_task) == ["0.head", "1"]


def test_one_module_in_two_places_is_one_layer(digits_task):
    module = StackedNetwork()
    module.alias = module.stack1[0]
    assert paths(module, digits_task) == ["stem"]


def test_removal_of_nothing_is_refused(digits_task):
    with pytest.raises(StageError, match=r"leaves groups of \[16, 32, 64\] whole; lower round_to"):
        pruned(PlainNetwork(), digits_task.example_inputs, pruning_ratio=0.1, round_to=64)


def test_layer_emptied_is_refused(digits_task):
    module = PlainNetwork()
    groups = prunable_groups(module, digits_task.example_inputs)
    with pytest.raises(StageError, match="conv2 must keep one of its 32 channels, but all are to be removed"):
        prune_channels(module, digits_task.example_inputs, groups, {"conv2": tuple(range(32))})


def test_output_layer_that_would_lose_classes_is_refused(digits_task):
    module = PlainNetwork()
    groups = prunable_groups(module, digits_task.example_inputs)
    members = tuple(member for member in groups[-1].members if not member.reads)
    careless = replace(
        groups[-1],
        path="fc2",
        units=10,
        members=tuple(replace(m, path="fc2", index=m.index[:10]) for m in members),
        sizes=tuple(replace(size, path="fc2") for size in groups[-1].sizes if size.path == "fc1"),
    )
    with pytest.raises(StageError, match=r"outputs must keep the shape \(2, 10\), got \(2, 9\) after pruning"):
        prune_channels(module, digits_task.example_inputs, [careless], {"fc2": (3,)})


def test_model_in_which_something_is_left_uncut_is_refused(digits_task):
    module = PlainNetwork()
    groups = prunable_groups(module, digits_task.example_inputs)
    forgetful = replace(groups[0], members=tuple(m for m in groups[0].members if m.name != "running_var"))
    with pytest.raises(StageError, match=r"PlainNetwork must run after pruning, but: .*running_var"):
        prune_channels(module, digits_task.example_inputs, [forgetful], {"conv1": (3,)})


def test_entries_cut_at_another_place_are_found_out(digits_task):
    module = PlainNetwork()
    groups = prunable_groups(module, digits_task.example_inputs)
    shifted = tuple(replace(m, index=(*m.index[1:], m.index[0])) if m.path == "bn1" else m for m in groups[0].members)
    nn.init.uniform_(module.bn1.weight)
    with pytest.raises(StageError, match=r"its outputs differ by .* in a way that cannot be followed"):
        prune_channels(module, digits_task.example_inputs, [replace(groups[0], members=shifted)], {"conv1": (3,)})


class ShuffledBlock(nn.Module):
    """A convolution whose channels change places."""

    def __init__(self) -> None:
        super().__init__()
        self.shuffled, self.last = nn.Conv2d(1, 8, 1), nn.Conv2d(8, 1, 1)

    def forward(self, x):
        return self.last(F.channel_shuffle(self.shuffled(x), 2))


class SplitByAttribute(nn.Module):
    """Channels in four parts, of a width that the constructor wrote down; each part gives its largest."""

    def __init__(self, *, fresh: bool) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 16, 3)
        self.fresh, self.parts = fresh, 4
        self.head = nn.Linear(16, 10)

    def forward(self, x):
        x = self.conv(x).mean((2, 3))
        parts = self.parts if self.fresh else x.shape[1] // 4
        return self.head((x.unflatten(1, (-1, parts)) * torch.arange(1, parts + 1)).flatten(1))


@pytest.mark.parametrize("fresh", [True, False])
def test_attribute_that_goes_stale_and_gives_other_numbers_is_refused(fresh, digits_task):
    with pytest.raises(StageError, match=r"something to remove, .*; conv: .* its outputs differ by"):
        prunable_groups(SplitByAttribute(fresh=fresh), digits_task.example_inputs)


class WidthWrittenDown(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 16, 3)
        self.features = 16 * 36
        self.head = nn.Linear(self.features, 10)

    def forward(self, x):
        return self.head(self.conv(x).view(-1, self.features))


def test_attribute_that_goes_stale_and_stops_the_model_is_refused(digits_task):
    with pytest.raises(StageError, match=r"WidthWrittenDown must run after pruning, but: .*is a size written in its"):
        prunable_groups(WidthWrittenDown(), digits_task.example_inputs)


def test_attributes_of_layers_follow_every_cut(digits_task):
    module = half(ResidualNetwork(), digits_task)
    assert module.stem.out_channels == module.depthwise.groups == module.pointwise.out_channels == 8
    assert module.bn1.num_features == module.bn3.num_features == module.head.in_features == 8


def test_cuts_of_a_module_in_float64_stay_in_float64(digits_task):
    module, inputs = ResidualNetwork().double(), (digits_task.example_inputs[0].double(),)
    smaller = pruned(module, inputs).module
    assert {parameter.dtype for parameter in smaller.parameters()} == {torch.float64}
    assert run(smaller, inputs).dtype == torch.float64


def test_gradient_flags_survive_the_cut(digits_task):
    module = PlainNetwork()
    groups = prunable_groups(module, digits_task.example_inputs)
    module.conv2.requires_grad_(False)
    smaller = without(module, groups, {"conv1": (0,)})
    assert [name for name, p in smaller.named_parameters() if not p.requires_grad] == ["conv2.weight", "conv2.bias"]
