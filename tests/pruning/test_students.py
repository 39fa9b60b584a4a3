import subprocess
import sys

import pytest
import torch
from torch import nn

from compressor.errors import InputError, StageError
from compressor.models.artifact import TorchModel
from compressor.models.edits import Edit, apply_edits, structural_edits
from compressor.models.trusted import Trusted
from compressor.pruning.students import layers_kept, narrower, reborn, shallower
from compressor.references.reference import Reference
from example_models import CifarResNet
from networks import PlainNetwork

RESNET = Reference(factory="example_models:CifarResNet", blocks=9)
STACKED = Reference(factory="networks:StackedNetwork")
IMAGES = (torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)),)
DIGITS = (torch.rand(2, 1, 8, 8, generator=torch.Generator().manual_seed(0)),)


@pytest.fixture(scope="module")
def teacher() -> TorchModel:
    return TorchModel.build(RESNET, seed=0)


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(8, 8) for _ in range(4))

    def forward(self, x):
        for block in self.blocks:
            x = x + block(x)
        return x


class Encoder(nn.Module):
    """Stacks within a stack."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer() for _ in range(4))
        self.head = nn.Linear(8, 10)

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return self.head(x.flatten(1))


class NumberedNetwork(nn.Module):
    """Its forward names a layer of the stack by its number."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(64, 64) for _ in range(3))

    def forward(self, x):
        return self.layers[2](self.layers[1](self.layers[0](x.flatten(1))))


class ScaledNetwork(nn.Module):
    """It has a parameter of its own, which no `reset_parameters` initialises."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(64))

    def forward(self, x):
        return x.flatten(1) * self.scale


def state(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


@pytest.mark.parametrize(
    ("layers", "depth", "kept"),
    [
        pytest.param(12, 6, (0, 2, 4, 7, 9, 11), id="as-distilbert"),
        pytest.param(12, 1, (0,), id="one-keeps-the-first"),
        pytest.param(12, 2, (0, 11), id="two-keep-the-ends"),
        pytest.param(3, 2, (0, 2), id="three-to-two"),
        pytest.param(9, 8, (0, 1, 2, 3, 5, 6, 7, 8), id="all-but-one"),
    ],
)
def test_layers_kept_are_evenly_spaced(layers, depth, kept):
    assert layers_kept(layers, depth=depth) == kept


def test_layers_kept_are_different_layers_for_every_depth():
    for layers in range(2, 40):
        for depth in range(1, layers):
            kept = layers_kept(layers, depth=depth)
            assert len(kept) == depth
            assert list(kept) == sorted(set(kept))
            assert kept[0] == 0
            assert depth == 1 or kept[-1] == layers - 1


def test_shallower_network_computes_what_the_kept_blocks_of_the_teacher_compute(teacher):
    before = state(teacher.module)
    student = shallower(teacher, IMAGES, depth={"layer1": 4, "layer[23]": 1})
    expected = CifarResNet(9).eval()
    expected.load_state_dict(before)
    expected.layer1 = nn.Sequential(*(expected.layer1[position] for position in (0, 3, 5, 8)))
    expected.layer2, expected.layer3 = expected.layer2[:1], expected.layer3[:1]
    assert torch.equal(student.predict(IMAGES), expected(*IMAGES))
    assert list(student.module.state_dict()) == list(expected.state_dict())
    assert not student.module.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in teacher.module.state_dict().items())


def test_student_made_shallower_narrower_and_shallower_reloads_with_equal_logits(tmp_path):
    student = shallower(TorchModel.build(STACKED, seed=0), DIGITS, depth={"stack*": 4})
    student = narrower(student, DIGITS, width=0.5)
    student = shallower(student, DIGITS, depth={"stack2": 2})
    student.save(tmp_path)
    loaded = TorchModel.load(tmp_path, trusted=Trusted((STACKED,)))
    assert (len(loaded.module.stack1), len(loaded.module.stack2), loaded.module.stem.out_channels) == (4, 2, 8)
    assert torch.equal(loaded.predict(DIGITS), student.predict(DIGITS))


def test_star_does_not_cross_a_dot_and_stacks_within_stacks_are_shortened():
    model = TorchModel(Encoder().eval(), Reference(factory="test_students:Encoder"))
    inputs = (torch.ones(2, 8),)
    inner = shallower(model, inputs, depth={"layers.*.blocks": 2}).module
    assert [len(layer.blocks) for layer in inner.layers] == [2, 2, 2, 2]
    student = shallower(model, inputs, depth={"layers": 2, "layers.3.blocks": 1})
    assert [len(layer.blocks) for layer in student.module.layers] == [4, 1]
    rebuilt = apply_edits(model.module, student.edits)
    assert torch.equal(rebuilt(*inputs), student.predict(inputs))


def test_model_that_is_itself_a_stack_is_shortened_under_the_empty_path():
    stack = nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64)).eval()
    student = shallower(TorchModel(stack, Reference(factory="torch.nn:Sequential")), DIGITS, depth={"": 3})
    assert [type(layer) for layer in student.module] == [nn.Flatten, nn.ReLU, nn.Linear]


@pytest.mark.parametrize(
    ("depth", "message"),
    [
        pytest.param({}, "at least one stack", id="none"),
        pytest.param({"layr1": 2}, "a layer 'layr1', but has none; did you mean 'layer1'", id="misspelt"),
        pytest.param({"*.conv": 2}, r"a layer '\*.conv', but has none", id="nothing-close"),
        pytest.param({"layer1.*": 2}, r"layer1\.0 is a CifarBlock", id="no-stack"),
        pytest.param({"layer1": 9}, "less than its 9 layers, got 9", id="nothing-to-drop"),
        pytest.param({"layer1": 0}, "at least 1 and less than its 9 layers, got 0", id="no-layer-left"),
        pytest.param({"layer*": 2, "layer1": 3}, "one number for layer1, got 2 and 3", id="two-depths"),
    ],
)
def test_depth_that_does_not_fit_the_model_is_explained(teacher, depth, message):
    with pytest.raises(InputError, match=message):
        shallower(teacher, IMAGES, depth=depth)


def test_shorter_network_that_does_not_run_is_refused():
    model = TorchModel(NumberedNetwork().eval(), Reference(factory="test_students:NumberedNetwork"))
    with pytest.raises(InputError, match="with fewer layers in layers must run on example_inputs, but: IndexError"):
        shallower(model, DIGITS, depth={"layers": 2})


def test_shorter_network_with_other_outputs_is_refused():
    stack = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.Linear(32, 10)).eval()
    model = TorchModel(stack, Reference(factory="torch.nn:Sequential"))
    with pytest.raises(InputError, match=r"in the model itself outputs must keep the shape \(2, 10\), got \(2, 64\)"):
        shallower(model, DIGITS, depth={"": 1})


def test_narrower_network_keeps_the_channels_of_largest_magnitude():
    model = TorchModel.build(Reference(factory="networks:PlainNetwork"), seed=0)
    before = state(model.module)
    with torch.no_grad():
        for layer in (model.module.conv1, model.module.bn1):
            layer.weight[::2] *= 1e-3
        model.module.conv2.weight[:, ::2] *= 1e-3
    student = narrower(model, DIGITS, width=0.5, round_to=4)
    assert torch.equal(student.module.conv1.weight, before["conv1.weight"][1::2])
    assert model.module.conv1.out_channels == 16
    assert student.module.fc1.out_features == 32


def test_students_are_at_hand_without_the_graph_tools_that_only_cutting_channels_needs():
    code = "import sys, compressor.pruning.students; sys.exit('torch_pruning' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("width", [0.0, 1.0, -1.0, float("nan")])
def test_width_is_a_share(teacher, width):
    with pytest.raises(InputError, match=r"width must be in \(0, 1\)"):
        narrower(teacher, IMAGES, width=width)


def test_reborn_network_has_the_architecture_and_other_weights_that_the_seed_decides():
    student = narrower(shallower(TorchModel.build(STACKED, seed=0), DIGITS, depth={"stack*": 3}), DIGITS, width=0.5)
    student = shallower(student, DIGITS, depth={"stack1": 2})
    one, again, other = (reborn(student, seed=seed) for seed in (1, 1, 2))
    shapes = [{name: tensor.shape for name, tensor in model.module.state_dict().items()} for model in (student, one)]
    assert shapes[0] == shapes[1]
    assert one.edits == student.edits
    assert torch.equal(one.predict(DIGITS), again.predict(DIGITS))
    for name, parameter in one.module.named_parameters():
        if ".bn." in name:
            assert torch.equal(parameter, torch.full_like(parameter, float(name.endswith("weight"))))
        else:
            assert not torch.equal(parameter, other.module.get_parameter(name))
            assert not torch.equal(parameter, student.module.get_parameter(name))


def test_reborn_layer_of_a_cut_network_is_initialised_as_a_new_layer_of_its_size():
    model = TorchModel.build(Reference(factory="networks:PlainNetwork"), seed=0)
    weight = reborn(narrower(model, DIGITS, width=0.5), seed=0).module.fc1.weight
    # torch draws from ±1/√(features in): the largest of 16 * 16 * 32 draws is within 0.1 % of the bound
    torch.testing.assert_close(weight.abs().max().item(), weight.shape[1] ** -0.5, rtol=1e-3, atol=0)


def test_statistics_of_batch_norm_are_fresh_in_a_reborn_network():
    model = TorchModel.build(Reference(factory="networks:PlainNetwork"), seed=0)
    trained = model.with_module(PlainNetwork())
    trained.module.bn1.running_mean += 3
    for made in (trained, narrower(trained, DIGITS, width=0.5)):
        fresh = reborn(made, seed=0).module.bn1
        assert torch.equal(fresh.running_mean, torch.zeros(made.module.bn1.num_features))
        assert torch.equal(fresh.running_var, torch.ones(made.module.bn1.num_features))


def test_reborn_network_that_was_never_cut_is_what_its_factory_builds(teacher):
    assert torch.equal(reborn(teacher, seed=5).predict(IMAGES), TorchModel.build(RESNET, seed=5).predict(IMAGES))


def test_making_a_reborn_network_leaves_the_random_numbers_of_the_process_alone(teacher):
    before = torch.random.get_rng_state()
    reborn(teacher, seed=0)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_resized_submodule_that_cannot_initialise_itself_is_named():
    model = TorchModel.build(Reference(factory="test_students:ScaledNetwork"), seed=0)
    edit = Edit(path="", shapes={"scale": (32,)})
    cut = model.with_module(apply_edits(model.module, (edit,)), edit)
    assert structural_edits(model.module, cut.module) == (edit,)
    with pytest.raises(StageError, match=r"must have reset_parameters .* \(ScaledNetwork\) has none"):
        reborn(cut, seed=0)
