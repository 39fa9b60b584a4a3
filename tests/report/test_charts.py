import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from compressor.report.page.charts import (
    NARROWEST,
    Scale,
    front,
    labels,
    path,
    runs,
    spanning,
    spans_orders,
    staircase,
    thin,
)


@pytest.mark.parametrize(("value", "percent"), [(2, 0.0), (3, 25.0), (6, 100.0), (1, 0.0), (7, 100.0)])
def test_linear_scale_puts_values_in_proportion_and_keeps_them_within(value, percent):
    assert Scale(2, 6).at(value) == percent


@pytest.mark.parametrize(("value", "percent"), [(1, 0.0), (10, 50.0), (100, 100.0), (0, 0.0), (-1, 0.0)])
def test_logarithmic_scale_puts_factors_in_proportion_and_what_has_no_logarithm_at_its_start(value, percent):
    assert Scale(1, 100, logarithmic=True).at(value) == percent


@pytest.mark.parametrize(
    ("scale", "ticks"),
    [
        (Scale(0, 1), (0, 0.25, 0.5, 0.75, 1)),
        (Scale(0.975, 0.9995), (0.975, 0.98, 0.985, 0.99, 0.995)),
        (Scale(1, 40), (10, 20, 30, 40)),
        (Scale(-0.35, 0.35), (-0.2, 0, 0.2)),
        (Scale(0.9, 7, logarithmic=True), (1, 2, 5)),
        (Scale(0.009, 12, logarithmic=True), (0.01, 0.1, 1, 10)),
        (Scale(1e-9, 10, logarithmic=True), (1e-9, 1e-6, 1e-3, 1)),
        (Scale(3, 4.5, logarithmic=True), (3, 3.5, 4, 4.5)),
    ],
)
def test_ticks_are_few_round_numbers(scale, ticks):
    assert scale.ticks(5) == ticks


@given(
    st.lists(st.floats(-1e12, 1e12), min_size=1, max_size=20),
    st.booleans(),
)
def test_every_scale_has_its_values_and_two_to_five_ticks_within(values, logarithmic):
    if logarithmic:
        values = [abs(value) + 1e-9 for value in values]
    scale = spanning(values, logarithmic=logarithmic)
    assert scale.low < min(values) <= max(values) < scale.high
    for most in (3, 4, 5):
        ticks = scale.ticks(most)
        assert 2 <= len(ticks) <= most
        assert all(scale.low <= tick <= scale.high for tick in ticks)


@pytest.mark.parametrize("logarithmic", [False, True])
def test_the_largest_and_the_smallest_floats_have_a_scale_too(logarithmic):
    smallest = 5e-324 if logarithmic else -sys.float_info.max
    for values in ([smallest, sys.float_info.max], [smallest], [sys.float_info.max]):
        scale = spanning(values, logarithmic=logarithmic)
        assert scale.at(values[0]) <= scale.at(values[-1])
        assert 1 <= len(scale.ticks(5)) <= 5


def test_least_span_keeps_the_noise_of_equal_values_small():
    scale = spanning([0.99, 0.9901], least=0.004)
    assert scale.high - scale.low == pytest.approx(0.004 * 1.12)
    assert scale.at(0.9901) - scale.at(0.99) < 3


@given(st.lists(st.floats(-1e12, 1e12), min_size=1, max_size=5), st.sampled_from([1.0, 1e-3, 1e-9]))
def test_four_digits_tell_ticks_apart(values, spread):
    nearly_equal = [values[0] + spread * (value - values[0]) for value in values]
    ticks = spanning(nearly_equal).ticks(5)
    assert len({f"{tick:.4g}" for tick in ticks}) == len(ticks)


def test_values_span_orders_only_if_all_are_positive():
    assert spans_orders([0.1, 2.0], factor=20)
    assert not spans_orders([0.11, 2.0], factor=20)
    assert not spans_orders([0.0, 2.0], factor=20)


def exact(values):
    """Points whose x is known exactly."""
    return [(x, x, y) for x, y in values]


def test_front_holds_what_nothing_else_is_better_than():
    assert front(exact([(1, 5), (2, 4), (2, 3), (3, 1), (1, 4)])) == (0, 1, 3)


def test_equal_points_are_all_on_the_front():
    assert front(exact([(1, 1), (1, 1), (0, 1)])) == (0, 1)


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=1, max_size=12))
def test_front_of_exact_points_is_what_no_other_is_as_good_as_in_both_and_better_in_one(values):
    def dominated(one):
        return any(other[0] >= one[0] and other[1] >= one[1] and other != one for other in values)

    assert front(exact(values)) == tuple(index for index, one in enumerate(values) if not dominated(one))


@pytest.mark.parametrize(
    ("values", "on_the_front"),
    [
        ([(1.0, 1.2, 5), (1.1, 1.3, 5)], (0, 1)),  # as good, and no faster that is known
        ([(1.0, 1.2, 5), (1.3, 1.4, 5)], (1,)),  # as good, and surely faster
        ([(1.0, 1.2, 6), (1.1, 1.3, 5)], (0,)),  # worse, and no faster that is known
        ([(1.0, 1.2, 6), (1.3, 1.4, 5)], (0, 1)),  # worse, and surely faster
        ([(1.0, 1.2, 6), (1.1, 1.4, 5), (1.3, 1.5, 4)], (0, 2)),  # only what is beaten meets the fastest
    ],
)
def test_front_is_decided_beyond_the_intervals(values, on_the_front):
    assert front(values) == on_the_front


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9), st.integers(0, 9)), min_size=1, max_size=12))
def test_none_on_the_front_beats_another_and_every_other_is_beaten_by_one_on_it(values):
    values = [(min(ends), max(ends), y) for *ends, y in values]
    found = front(values)

    def beaten(index):
        low, high, y = values[index]
        better = ((values[other][0], values[other][1], values[other][2]) for other in found)
        return any((top >= low and level > y) or (bottom > high and level == y) for bottom, top, level in better)

    assert [index for index in range(len(values)) if not beaten(index)] == list(found)


def test_staircase_goes_along_y_and_then_along_x():
    assert staircase([(50.0, 40.0), (10.0, 5.0)]) == ((10, 5), (10, 40), (50, 40))
    assert staircase([(10.0, 5.0), (10.0, 5.0)]) == ((10, 5),)


def boxes(placed, height, width):
    """Left, top, right, bottom of each label at 12 pixels, whose digits are up to 8 wide and lines up to 16 high."""
    for label in placed:
        length = 8 * len(label.text)
        left = label.x / 100 * width - {"start": 0, "middle": length / 2, "end": length}[label.anchor]
        yield left, label.y / 100 * height - 24, left + length, label.y / 100 * height - 8


@given(
    st.lists(st.tuples(st.floats(0, 100), st.floats(0, 100)), min_size=1, max_size=30),
    st.sampled_from([NARROWEST, 600, 1200]),
)
def test_labels_name_every_point_once_and_never_meet(points, width):
    placed = labels(points, range(1, len(points) + 1), height=260)
    named = []
    for label in placed:
        for run in label.text.split(", "):
            first, _, last = run.partition("-")
            named += range(int(first), int(last or first) + 1)
    assert sorted(named) == list(range(1, len(points) + 1))
    found = list(boxes(placed, 260, width))
    for index, (left, top, right, bottom) in enumerate(found):
        for other in found[:index]:
            assert left >= other[2] or other[0] >= right or top >= other[3] or other[1] >= bottom


def test_only_the_numbers_that_are_asked_for_are_placed():
    placed = labels([(10.0, 50.0), (50.0, 50.0), (90.0, 50.0)], [1, 3], height=260)
    assert [(label.text, label.x) for label in placed] == [("1", 10.0), ("3", 90.0)]


def test_numbers_in_a_row_are_written_as_a_range():
    assert runs([1, 3, 4, 5, 7]) == "1, 3-5, 7"


def test_thinned_items_keep_their_order_and_both_ends():
    assert thin(list(range(500)), 5) == [0, 125, 250, 374, 499]
    assert thin([1, 2], 5) == [1, 2]


def test_path_is_short_and_exact_to_the_hundredth():
    assert path([(0.0, 99.37), (100.0, 12.3)]) == "0,99.37 100,12.3"
