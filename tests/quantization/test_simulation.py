import copy
from collections.abc import Mapping
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import GraphModule

from compressor import Samples, Task
from compressor.models.outputs import relative_error
from compressor.quantization.calibration import calibrate
from compressor.quantization.codes import Range, WeightCodes
from compressor.quantization.conversion import affine_of, convert, round_weights
from compressor.quantization.float_graph import copy_graph, float_graph, fold_batch_norms
from compressor.quantization.int8_plan import Int8Plan, plan_int8
from compressor.quantization.simulation import follow_and_round, read_ranges, round_to_codes, round_weight, simulate
from example_models import SeparableNetwork, SequenceNetwork, SignalNetwork
from networks import (
    ConcatenatedNetwork,
    ConvNextNetwork,
    DecoderNetwork,
    PlainNetwork,
    ResidualNetwork,
    SqueezeExciteNetwork,
    TiedNetwork,
)

LIMIT = 63


class HardNetwork(nn.Module):
    """Activations that int8 spells out, a product with a number, and padding with a number that has no code."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 8, 3, bias=False)
        self.bn = nn.BatchNorm2d(8, momentum=None)
        self.last = nn.Conv2d(8, 8, 3)
        self.head = nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.hardswish(self.bn(self.conv(x))) * 0.7
        x = F.silu(self.last(F.pad(x, (1, 1, 1, 1), value=0.123)))
        return self.head(x.mean((2, 3)))


class NormalizedVectors(nn.Sequential):
    """A BatchNorm after a linear layer whose channels are alike until it is folded, and not after that."""

    def __init__(self) -> None:
        super().__init__(nn.Flatten(), nn.Linear(64, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 10))


NETWORKS = [
    PlainNetwork,
    ResidualNetwork,
    ConcatenatedNetwork,
    ConvNextNetwork,
    DecoderNetwork,
    HardNetwork,
    NormalizedVectors,
    SeparableNetwork,
    SequenceNetwork,
    SignalNetwork,
    SqueezeExciteNetwork,
    TiedNetwork,
]


class Trained(NamedTuple):
    """A graph before BatchNorm is folded, trained for some steps in a live simulation, and its ranges then."""

    images: Tensor
    graph: GraphModule
    plan: Int8Plan
    ranges: Mapping[str, Range]


def task_of(images: Tensor) -> Task:
    split = Samples((images,), torch.zeros(len(images), dtype=torch.long))
    return Task(split, split, split, split, (images[:2],))


def planned(network: type[nn.Module]) -> Trained:
    torch.manual_seed(0)
    module, images = network().eval(), torch.rand(64, 1, 8, 8)
    for layer in module.modules():
        if isinstance(layer, nn.BatchNorm1d | nn.BatchNorm2d) and layer.affine:
            nn.init.normal_(layer.weight)  # factors of both signs
            nn.init.normal_(layer.bias)
    task = task_of(images)
    graph, plan = plan_int8(float_graph(module, task))
    return Trained(images, graph, plan, calibrate(graph, plan, task.calibration, range(64), "minmax"))


def live(of: Trained) -> GraphModule:
    return copy.deepcopy(simulate(of.graph, of.plan, of.ranges, LIMIT, live=True)).train()


def train(simulation: GraphModule, images: Tensor, steps: int = 10) -> None:
    optimizer = torch.optim.Adam(simulation.parameters(), lr=0.01)
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(simulation(images), torch.arange(len(images)) % 10).backward()
        optimizer.step()


@pytest.fixture(scope="module", params=NETWORKS, ids=lambda network: network.__name__)
def trained(request: pytest.FixtureRequest) -> Trained:
    before = planned(request.param)
    simulation = live(before)
    train(simulation, before.images)
    return Trained(before.images, copy_graph(before.graph, simulation), before.plan, read_ranges(simulation))


def int8(trained: Trained) -> tuple[GraphModule, Int8Plan, Mapping[str, WeightCodes]]:
    graph, plan = plan_int8(fold_batch_norms(trained.graph))
    return graph, plan, round_weights(graph, plan, affine_of(plan, trained.ranges), LIMIT)


def test_frozen_simulation_gives_what_the_int8_graph_gives(trained: Trained) -> None:
    graph, plan, weights = int8(trained)
    result = convert(graph, plan, affine_of(plan, trained.ranges), weights)
    simulation = simulate(trained.graph, trained.plan, trained.ranges, LIMIT, live=False).eval()
    with torch.no_grad():
        found, wanted, floats = (module(trained.images) for module in (simulation, result, trained.graph))
    # The file's biases are whole numbers, which moves a sum by up to half a step of them, and processors add in
    # different orders. So a number near the middle between two codes may round to the other one: 1 number in 64 at
    # most. A step is 1/255 of a range of about six standard deviations: ten tensors in a row differ by
    # sqrt(10 / 64) * 6 / 255 = 0.9 %. What is rounded at a wrong place differs as the float graph does.
    assert relative_error(found, wanted) < 1e-2
    assert relative_error(found, wanted) < 0.3 * relative_error(floats, wanted)


def test_codes_of_weights_are_those_that_were_trained(trained: Trained) -> None:
    _, _, weights = int8(trained)
    affines = affine_of(trained.plan, trained.ranges)
    unfolded = round_weights(trained.graph, trained.plan, affines, LIMIT)
    for found, wanted in zip(weights.values(), unfolded.values(), strict=True):
        assert torch.equal(found.codes.abs(), wanted.codes.abs())  # a factor of BatchNorm may be negative


def test_folding_changes_the_name_of_no_tensor(trained: Trained) -> None:
    _, plan, _ = int8(trained)
    assert plan.activations == trained.plan.activations
    assert trained.ranges.keys() == set(plan.tensors_with_range)


def test_every_parameter_learns_under_its_own_name(trained: Trained) -> None:
    simulation = live(trained)
    simulation(trained.images).square().sum().backward()
    names = dict(trained.graph.named_parameters())
    assert dict(simulation.named_parameters()).keys() == names.keys()
    assert all(parameter.grad is not None for parameter in simulation.parameters())


def test_activations_round_and_learn_as_torch_fakes_it() -> None:
    x = torch.linspace(-4, 4, 1001, requires_grad=True)
    scale, zero_point = torch.tensor(0.0123), torch.tensor(100, dtype=torch.int32)
    round_to_codes(x, scale, zero_point).square().sum().backward()
    found, x.grad = x.grad, None
    fake = torch.fake_quantize_per_tensor_affine(x, scale, zero_point, 0, 255)
    fake.square().sum().backward()
    torch.testing.assert_close(round_to_codes(x, scale, zero_point), fake, rtol=1e-6, atol=0)
    torch.testing.assert_close(found, x.grad, rtol=1e-6, atol=0)
    assert (found == 0).any()  # some were clipped


@pytest.mark.parametrize("axis", [0, 1])
def test_weights_round_and_learn_as_torch_fakes_it(axis: int) -> None:
    weight = torch.randn(5, 4, 3, generator=torch.Generator().manual_seed(0)).requires_grad_()
    round_weight(weight, axis, LIMIT).square().sum().backward()
    found, weight.grad = weight.grad, None
    scale = weight.detach().abs().amax([1 - axis, 2]) / LIMIT
    fake = torch.fake_quantize_per_channel_affine(
        weight, scale, torch.zeros(len(scale), dtype=torch.int32), axis, -LIMIT, LIMIT
    )
    fake.square().sum().backward()
    torch.testing.assert_close(round_weight(weight, axis, LIMIT), fake, rtol=1e-6, atol=0)
    torch.testing.assert_close(found, weight.grad, rtol=1e-6, atol=0)


def test_zeros_of_weights_and_whole_channels_of_them_stay_zero() -> None:
    weight = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))
    weight[:, ::2] = 0
    weight[3] = 0
    assert torch.equal(round_weight(weight, 0, LIMIT)[weight == 0], torch.zeros(20))


def test_range_moves_a_hundredth_of_the_way_to_that_of_each_batch() -> None:
    low, high = torch.tensor(-1.0), torch.tensor(3.0)
    follow_and_round(torch.tensor([-2.0, 0.0, 4.0]), low, high)
    torch.testing.assert_close(torch.stack([low, high]), torch.tensor([-1.01, 3.01]))


@pytest.mark.parametrize("ends", [(0.5, 2.0), (-2.0, -0.5), (0.0, 0.0)], ids=["above", "below", "nothing"])
def test_zero_has_a_code_whatever_the_range(ends: tuple[float, float]) -> None:
    x = torch.tensor([*ends, 0.0])
    assert follow_and_round(x, *map(torch.tensor, ends))[2] == 0


def test_statistics_of_batch_norm_follow_the_batches_if_live_and_stand_still_if_not() -> None:
    before = planned(PlainNetwork)
    moving, frozen = (
        copy.deepcopy(simulate(before.graph, before.plan, before.ranges, LIMIT, live=is_live)).train()
        for is_live in (True, False)
    )
    module = PlainNetwork().train()
    module.load_state_dict(before.graph.state_dict(), strict=False)
    for run in (moving, frozen, module):
        run(before.images)
    for name, statistics in before.graph.named_buffers():
        assert torch.equal(frozen.get_buffer(name), statistics)
        # those of the module, but for 7 bits of the weights and 8 of the input before them
        torch.testing.assert_close(moving.get_buffer(name), module.get_buffer(name), rtol=0.01, atol=1e-3)
        assert not torch.allclose(moving.get_buffer(name), statistics, rtol=0.01, atol=1e-3)


def test_batch_norm_with_a_cumulative_mean_follows_as_well() -> None:
    before = planned(HardNetwork)
    simulation = live(before)
    simulation(before.images)
    assert not torch.equal(simulation.get_buffer("bn.running_mean"), before.graph.get_buffer("bn.running_mean"))


def test_mixed_precision_rounds_in_float32() -> None:
    before = planned(ResidualNetwork)
    simulation = live(before)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = simulation(before.images)
        x = torch.rand(100, dtype=torch.bfloat16)
        codes = round_to_codes(x, torch.tensor(1 / 255), torch.tensor(0.0)) * 255
    logits.float().square().sum().backward()
    assert codes.dtype == torch.float32
    torch.testing.assert_close(codes, codes.round(), rtol=0, atol=1e-4)  # bfloat16 would be off by up to 0.5
    assert all(parameter.grad.isfinite().all() for parameter in simulation.parameters() if parameter.grad is not None)
    assert all(parameter.dtype == torch.float32 for parameter in simulation.state_dict().values())
