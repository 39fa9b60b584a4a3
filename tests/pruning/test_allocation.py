import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from compressor.pruning.allocation import allocate, by_ratios, multiples_of, multiples_that_fit, units_kept
from compressor.pruning.dependency_graph import channel_groups
from compressor.pruning.groups import Group, Member
from networks import StackedNetwork


def group(path: str, units: int, *, channels_per_unit: int = 1, kind="channels") -> Group:
    members = (Member(path, "weight", 0, tuple((unit,) for unit in range(units))),)
    return Group(path, units, members, (), kind=kind, channels_per_unit=channels_per_unit)


def module_of(groups) -> nn.Module:
    return nn.ModuleDict({group.path: nn.Linear(group.units, group.units) for group in groups})


def chosen(allocation, groups, scores, ratio, *, round_to=1, comparable=True, step_of=None):
    return allocate(
        allocation,
        module_of(groups),
        groups,
        scores,
        comparable=comparable,
        pruning_ratio=ratio,
        step_of=step_of or multiples_of(round_to),
    )


def ramp(start: float, units: int) -> torch.Tensor:
    return torch.arange(units, dtype=torch.float32) + start


ALLOCATIONS = ("uniform", "global", "isomorphic")

_ratios = st.floats(0.01, 0.99)
_pairs = st.tuples(_ratios, _ratios).map(sorted)


@st.composite
def networks(draw):
    """Groups of several sizes, and scores among which many are equal."""
    sizes = draw(st.lists(st.tuples(st.integers(2, 70), st.sampled_from([1, 1, 2, 4])), min_size=1, max_size=5))
    groups = [group(f"layer{i}", units, channels_per_unit=each) for i, (units, each) in enumerate(sizes)]
    seed, levels = draw(st.integers(0, 1000)), draw(st.sampled_from([1, 3, 1000]))
    generator = torch.Generator().manual_seed(seed)
    scores = {g.path: torch.randint(1, levels + 1, (g.units,), generator=generator).float() / 10 for g in groups}
    return groups, scores


@settings(max_examples=150, deadline=None)
@given(networks(), st.sampled_from(ALLOCATIONS), st.sampled_from([1, 2, 8, 16]), _pairs, st.booleans())
def test_larger_ratio_removes_the_same_units_and_more(network, allocation, round_to, ratios, comparable):
    smaller, larger = (
        chosen(allocation, *network, ratio, round_to=round_to, comparable=comparable) for ratio in ratios
    )
    assert all(set(units) <= set(larger[path]) for path, units in smaller.items())


@settings(max_examples=150, deadline=None)
@given(networks(), st.sampled_from(ALLOCATIONS), st.sampled_from([1, 2, 8, 16]), _ratios)
def test_what_stays_is_a_multiple_or_all_and_has_the_largest_scores(network, allocation, round_to, ratio):
    groups, scores = network
    removed = chosen(allocation, groups, scores, ratio, round_to=round_to)
    for g in groups:
        gone = set(removed[g.path])
        kept = g.units - len(gone)
        assert len(gone) == len(removed[g.path])
        assert kept >= 1
        assert kept * g.channels_per_unit % round_to == 0 or not gone
        staying = [float(scores[g.path][unit]) for unit in range(g.units) if unit not in gone]
        assert all(scores[g.path][unit] <= min(staying) for unit in gone)


@settings(max_examples=150, deadline=None)
@given(networks(), st.sampled_from(["global", "isomorphic"]), st.floats(0.05, 0.7))
def test_share_that_leaves_is_near_what_was_asked(network, allocation, ratio):
    groups, scores = network
    classes = {(g.units, g.channels_per_unit): [] for g in groups}
    for g in groups:
        classes[g.units, g.channels_per_unit].append(g)
    removed = chosen(allocation, groups, scores, ratio)
    for alike in classes.values() if allocation == "isomorphic" else [groups]:
        total = sum(g.units * g.channels_per_unit for g in alike)
        gone = sum(len(removed[g.path]) * g.channels_per_unit for g in alike)
        room = sum((g.units - max(1, math.ceil(g.units * 0.1))) * g.channels_per_unit for g in alike)
        largest = max(g.channels_per_unit for g in alike)
        assert abs(gone - min(ratio * total, room)) <= largest / 2 + 1e-6 or gone >= room - largest


@pytest.mark.parametrize(
    ("channels", "ratio", "round_to", "kept"),
    [
        pytest.param(16, 0.5, 1, 8, id="exact"),
        pytest.param(16, 0.5, 8, 8, id="multiple"),
        pytest.param(20, 0.5, 8, 8, id="nearest-multiple"),
        pytest.param(500, 0.5, 8, 248, id="ties-to-even"),
        pytest.param(16, 0.99, 8, 8, id="never-below-one-multiple"),
        pytest.param(6, 0.5, 8, 6, id="never-above-what-there-is"),
        pytest.param(16, 0.01, 1, 16, id="nothing-to-remove"),
    ],
)
def test_units_kept_is_the_nearest_multiple(channels, ratio, round_to, kept):
    assert units_kept(channels, pruning_ratio=ratio, step=round_to) == kept


@pytest.mark.parametrize("allocation", ALLOCATIONS)
def test_equal_scores_leave_in_the_order_of_units(allocation):
    groups = [group("a", 9)]
    assert chosen(allocation, groups, {"a": torch.full((9,), 0.1)}, 0.5, round_to=4)["a"] == (0, 1, 2, 3, 4)


def test_slices_of_equal_scores_leave_in_their_order_whatever_their_means_round_to():
    groups = [group("a", 67)]
    kept = 67 - len(chosen("global", groups, {"a": torch.full((67,), 0.1)}, 0.2, round_to=8)["a"])
    assert kept == 56


SCORES = {"a": ramp(1, 8), "b": ramp(11, 8), "c": ramp(5, 4)}
GROUPS = [group("a", 8), group("b", 8), group("c", 4)]


def kept(removed) -> dict:
    return {g.path: g.units - len(removed[g.path]) for g in GROUPS}


def test_uniform_takes_the_same_share_of_each_group():
    assert kept(chosen("uniform", GROUPS, SCORES, 0.5)) == {"a": 4, "b": 4, "c": 2}


def test_global_takes_the_smallest_scores_of_all():
    # of 1 … 8, 11 … 18 and 5 … 8 the ten smallest: 1 to 7 of a, 5 to 7 of c; equal ones in the order of groups
    assert kept(chosen("global", GROUPS, SCORES, 0.5)) == {"a": 1, "b": 8, "c": 1}


def test_isomorphic_ranks_groups_built_alike_together_and_takes_the_same_share_of_each_class():
    assert kept(chosen("isomorphic", GROUPS, SCORES, 0.5)) == {"a": 1, "b": 7, "c": 2}


def test_global_compares_scores_that_say_nothing_between_groups_by_their_share_of_the_mean():
    scores = {path: score * (1000 if path == "b" else 1) for path, score in SCORES.items()}
    comparable, relative = (
        kept(chosen("global", GROUPS, scores, 0.4, comparable=comparable)) for comparable in (True, False)
    )
    plain = kept(chosen("global", GROUPS, SCORES, 0.4, comparable=False))
    assert comparable["b"] == 8
    assert relative == plain
    assert relative["b"] < 8


def test_no_group_falls_below_a_tenth_whatever_its_scores():
    groups = [group("a", 40), group("b", 40)]
    removed = chosen("global", groups, {"a": torch.full((40,), 1e-9), "b": ramp(1, 40)}, 0.5)
    assert (len(removed["a"]), len(removed["b"])) == (36, 4)


def test_blocks_of_a_real_network_are_one_class(digits_task):
    module = StackedNetwork()
    (stack,) = channel_groups(module, digits_task.example_inputs).groups
    scores = {stack.path: ramp(1, 16)}
    removed = allocate(
        "isomorphic", module, [stack], scores, comparable=False, pruning_ratio=0.25, step_of=multiples_of(1)
    )
    assert removed == {stack.path: (0, 1, 2, 3)}


def test_heads_leave_one_at_a_time_and_channels_in_steps():
    groups = [group("heads", 6, channels_per_unit=8, kind="heads"), group("hidden", 64)]
    removed = chosen("uniform", groups, {"heads": ramp(0, 6), "hidden": ramp(0, 64)}, 0.5, round_to=16)
    assert (len(removed["heads"]), len(removed["hidden"])) == (3, 32)


@pytest.mark.parametrize(
    ("units", "channels_per_unit", "step"), [(64, 1, 16), (32, 2, 8), (8, 16, 1), (12, 12, 4), (10, 3, 16)]
)
def test_units_of_several_channels_leave_so_that_channels_are_multiples(units, channels_per_unit, step):
    assert multiples_of(16)(group("a", units, channels_per_unit=channels_per_unit)) == step


@pytest.mark.parametrize(
    ("channels", "step"), [(64, 16), (32, 16), (31, 8), (16, 8), (15, 4), (8, 4), (6, 2), (3, 1), (1, 1)]
)
def test_steps_that_fit_leave_room_for_two(channels, step):
    assert multiples_that_fit(16)(group("a", channels)) == step


def test_steps_that_fit_count_the_channels_of_units():
    assert multiples_that_fit(16)(group("a", 8, channels_per_unit=4)) == 4
    assert multiples_that_fit(16)(group("a", 6, channels_per_unit=8, kind="heads")) == 1


def test_shares_of_each_group_are_its_own():
    removed = by_ratios({"a": 0.25, "b": 0.5, "c": 0}, GROUPS, SCORES, step_of=multiples_of(2))
    assert removed == {"a": (0, 1), "b": (0, 1, 2, 3), "c": ()}
