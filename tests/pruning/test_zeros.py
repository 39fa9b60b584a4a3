import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import prune

from compressor.errors import StageError
from compressor.pruning.zeros import erk_densities, lamp_scores, pattern_mask, smallest, zero_masks

ALLOCATIONS = ["uniform", "global", "erk", "lamp"]
SHAPES = {"conv1": (6, 1, 5, 5), "conv2": (16, 6, 5, 5), "fc1": (120, 400), "fc2": (84, 120), "fc3": (10, 84)}


def weights(seed: int = 0) -> dict[str, torch.Tensor]:
    """Weights of the shapes of LeNet-5, as torch initializes them: smaller in wider layers."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: (torch.rand(shape, generator=generator) * 2 - 1) / np.sqrt(np.prod(shape[1:]))
        for name, shape in SHAPES.items()
    }


def zeros_of(masks: dict[str, torch.Tensor]) -> int:
    return sum(int(mask.sum()) for mask in masks.values())


@given(st.lists(st.integers(-3, 3), min_size=1, max_size=40), st.data())
def test_exactly_as_many_as_asked_are_chosen_and_ties_go_in_order(values, data):
    count = data.draw(st.integers(0, len(values)))
    mask = smallest(torch.tensor(values, dtype=torch.float32), count).tolist()
    first = sorted(range(len(values)), key=lambda i: (values[i], i))[:count]
    assert [i for i, chosen in enumerate(mask) if chosen] == sorted(first)


def test_all_and_none_can_be_chosen_of_any_shape():
    scores = torch.ones(2, 3, 4)
    assert not smallest(scores, 0).any()
    assert smallest(scores, 24).all()
    assert smallest(scores, 5).shape == scores.shape


@pytest.mark.parametrize("count", [-1, 4])
def test_a_count_out_of_range_is_refused(count):
    with pytest.raises(StageError, match=rf"in \[0, 3\], the number of scores, got {count}"):
        smallest(torch.ones(3), count)


def test_lamp_scores_are_those_of_the_paper():
    expected = torch.tensor([1 / 30, 4 / 29, 9 / 25, 1], dtype=torch.float64)
    torch.testing.assert_close(lamp_scores(torch.tensor([0.1, -0.2, 0.3, 0.4], dtype=torch.float64)), expected)


@given(st.lists(st.integers(-4, 4), min_size=1, max_size=30))
def test_lamp_scores_equal_the_formula_written_plainly(values):
    squares = [float(value) ** 2 for value in values]
    expected = [one / sum(s for s in squares if s >= one) if one else 0.0 for one in squares]
    found = lamp_scores(torch.tensor(values, dtype=torch.float32))
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64))


def test_erk_densities_equal_the_published_procedure():
    sparsity, shapes = 0.7, list(SHAPES.values())
    sizes = [int(np.prod(shape)) for shape in shapes]
    raw = [sum(shape) / size for shape, size in zip(shapes, sizes, strict=True)]
    dense: set[int] = set()
    while True:
        rest = [i for i in range(len(shapes)) if i not in dense]
        left = (1 - sparsity) * sum(sizes) - sum(sizes[i] for i in dense)
        level = left / sum(raw[i] * sizes[i] for i in rest)
        over = {i for i in rest if level * raw[i] > 1}
        if not over:
            break
        dense.add(max(over, key=lambda i: raw[i]))
    expected = [1.0 if i in dense else level * raw[i] for i in range(len(shapes))]
    assert len(dense) >= 2
    assert erk_densities(shapes, sparsity) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(("sparsity", "density"), [(0.0, 1.0), (1.0, 0.0)])
def test_erk_densities_reach_both_ends(sparsity, density):
    assert erk_densities(list(SHAPES.values()), sparsity) == pytest.approx([density] * 5)


@pytest.mark.parametrize("allocation", ALLOCATIONS)
@pytest.mark.parametrize("sparsity", [0.0, 0.1, 0.5, 0.9, 0.97, 0.999])
def test_every_allocation_gives_exactly_the_zeros_asked_and_empties_no_layer(allocation, sparsity):
    masks = zero_masks(weights(), sparsity, allocation)
    assert zeros_of(masks) == round(sparsity * sum(mask.numel() for mask in masks.values()))
    assert not any(mask.all() for mask in masks.values())


@pytest.mark.parametrize("allocation", ALLOCATIONS)
def test_a_sparsity_of_one_keeps_the_largest_weight_of_each_tensor(allocation):
    masks = zero_masks(weights(), 1.0, allocation)
    for name, weight in weights().items():
        assert weight[~masks[name]].tolist() == [weight.flatten()[weight.abs().argmax()]]


@pytest.mark.parametrize("allocation", ALLOCATIONS)
def test_within_a_tensor_the_smallest_weights_go(allocation):
    for name, mask in zero_masks(weights(), 0.8, allocation).items():
        magnitudes = weights()[name].abs()
        assert torch.equal(magnitudes[mask].sort().values, magnitudes.flatten().sort().values[: int(mask.sum())])


def test_uniform_takes_the_same_share_of_each_layer():
    for mask in zero_masks(weights(), 0.8, "uniform").values():
        assert abs(int(mask.sum()) - 0.8 * mask.numel()) < 1


def test_erk_takes_the_shares_of_its_densities():
    densities = erk_densities(list(SHAPES.values()), 0.8)
    for mask, density in zip(zero_masks(weights(), 0.8, "erk").values(), densities, strict=True):
        assert abs(int((~mask).sum()) - density * mask.numel()) < 1


def test_global_equals_the_global_pruning_of_torch():
    layers = {name: nn.Module() for name in SHAPES}
    for name, layer in layers.items():
        layer.weight = nn.Parameter(weights()[name])
    pairs = [(layer, "weight") for layer in layers.values()]
    prune.global_unstructured(pairs, pruning_method=prune.L1Unstructured, amount=0.8)
    for name, mask in zero_masks(weights(), 0.8, "global").items():
        assert torch.equal(mask, layers[name].weight_mask == 0)


def test_lamp_takes_the_smallest_scores_of_all_layers():
    scores = {}
    for name, weight in weights().items():
        squares = weight.double().numpy().ravel() ** 2
        order = np.argsort(squares)
        scores[name] = np.empty_like(squares)
        scores[name][order] = squares[order] / np.cumsum(squares[order][::-1])[::-1]
    together = np.concatenate(list(scores.values()))
    limit = np.sort(together)[round(0.9 * len(together)) - 1]
    for name, mask in zero_masks(weights(), 0.9, "lamp").items():
        np.testing.assert_array_equal(mask.numpy().ravel(), scores[name] <= limit)


@pytest.mark.parametrize("allocation", ALLOCATIONS)
def test_equal_weights_are_pruned_to_the_count_in_order(allocation):
    masks = zero_masks({"a": torch.ones(4), "b": torch.ones(4)}, 0.5, allocation)
    assert zeros_of(masks) == 4
    again = zero_masks({"a": torch.ones(4), "b": torch.ones(4)}, 0.5, allocation)
    assert all(torch.equal(mask, again[name]) for name, mask in masks.items())


@pytest.mark.parametrize("allocation", ALLOCATIONS)
def test_zeros_that_are_there_already_count_and_stay(allocation):
    sparse = weights()
    sparse["fc1"][:110] = 0
    sparse["fc2"].masked_fill_(zero_masks({"w": sparse["fc2"]}, 0.5, "global")["w"], 0)
    masks = zero_masks(sparse, 0.9, allocation)
    assert zeros_of(masks) == round(0.9 * sum(mask.numel() for mask in masks.values()))
    assert all(masks[name][sparse[name] == 0].all() for name in sparse)


@pytest.mark.parametrize("allocation", ALLOCATIONS)
def test_fewer_zeros_than_there_are_is_refused(allocation):
    with pytest.raises(StageError, match=r"at least 0\.5000, what the weights have already, got 0\.25"):
        zero_masks({"w": torch.tensor([0.0, 0.0, 1.0, 2.0])}, 0.25, allocation)


@pytest.mark.parametrize("allocation", ALLOCATIONS)
def test_a_layer_that_is_all_zero_stays_so_and_costs_no_other_layer_its_last_weight(allocation):
    masks = zero_masks({"empty": torch.zeros(4), "full": torch.arange(1.0, 5.0)}, 1.0, allocation)
    assert masks["empty"].all()
    assert masks["full"].tolist() == [True, True, True, False]


@pytest.mark.parametrize(("n", "m"), [(2, 4), (4, 8), (1, 4)])
@pytest.mark.parametrize("shape", [(5, 16), (3, 8, 3, 3), (4, 24, 2)])
def test_a_pattern_keeps_the_largest_of_each_group_of_input_channels(n, m, shape):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    mask = pattern_mask(weight, n, m).numpy()
    magnitude = np.abs(weight.numpy())
    for index in np.ndindex(shape[0], shape[1] // m, *shape[2:]):
        group = (index[0], slice(m * index[1], m * (index[1] + 1)), *index[2:])
        assert set(np.flatnonzero(mask[group])) == set(np.argsort(magnitude[group])[: m - n])


def test_the_pattern_of_a_transposed_convolution_runs_along_its_first_dimension():
    weight = torch.randn(8, 3, 2, 2, generator=torch.Generator().manual_seed(0))
    expected = pattern_mask(weight.transpose(0, 1), 2, 4).transpose(0, 1)
    assert torch.equal(pattern_mask(weight, 2, 4, input_dimension=0), expected)


def test_of_equal_weights_in_a_group_the_first_go():
    assert pattern_mask(torch.ones(1, 4), 2, 4).tolist() == [[True, True, False, False]]


def test_a_pattern_that_does_not_divide_the_input_channels_is_refused():
    with pytest.raises(StageError, match="input channels be a multiple of it, got 6"):
        pattern_mask(torch.ones(4, 6), 2, 4)
