import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from compressor.errors import StageError
from compressor.pruning.schedule import Schedule, divide_epochs, list_levels


def test_the_cubic_ramp_is_that_of_zhu_and_gupta():
    assert list_levels(0.9, 4, "cubic") == pytest.approx((0.5203125, 0.7875, 0.8859375, 0.9), abs=1e-12)


def test_the_linear_ramp_takes_equal_steps():
    assert list_levels(0.8, 4, "linear") == pytest.approx((0.2, 0.4, 0.6, 0.8))


def test_one_step_goes_all_the_way():
    assert list_levels(0.9, 1, "cubic") == (0.9,)
    with pytest.raises(StageError, match="steps must be at least 1, got 0"):
        list_levels(0.9, 0, "cubic")


@given(st.floats(0, 1), st.floats(0, 1), st.integers(1, 50), st.sampled_from(["linear", "cubic"]))
def test_a_ramp_rises_from_its_start_to_exactly_its_end(one, other, steps, shape):
    start, final = sorted((one, other))
    reached = list_levels(final, steps, shape, start=start)
    assert len(reached) == steps
    assert reached[-1] == final
    assert all(a <= b + 1e-12 for a, b in zip((start, *reached), reached, strict=False))


def test_most_epochs_come_after_the_last_step():
    assert divide_epochs(12, 4) == (1, 1, 1, 9)
    assert divide_epochs(4, 4) == (1, 1, 1, 1)
    assert divide_epochs(7, 1) == (7,)


def test_fewer_epochs_than_steps_are_refused():
    with pytest.raises(ValueError, match="an epoch for each of 5 steps, got 4 epochs"):
        divide_epochs(4, 5)


def test_a_schedule_has_at_least_two_steps():
    with pytest.raises(ValidationError, match="greater than or equal to 2"):
        Schedule(steps=1)
