import math

import pytest
from pydantic import TypeAdapter, ValidationError

from compressor.distillation.course import Course, Temperature, Weight, value_at

TEMPERATURE, WEIGHT = TypeAdapter(Temperature), TypeAdapter(Weight)


def course(start, end, shape="linear"):
    return Course(start=start, end=end, shape=shape)


@pytest.mark.parametrize("progress", [0.0, 0.3, 1.0])
def test_number_is_constant(progress):
    assert value_at(4.0, progress) == 4.0


@pytest.mark.parametrize("progress", [0.0, 0.25, 0.5, 0.8, 1.0])
def test_linear_course_is_a_straight_line(progress):
    assert value_at(course(4, 1), progress) == pytest.approx(4 - 3 * progress)


@pytest.mark.parametrize(("progress", "expected"), [(0, 4), (1 / 3, 3.25), (1 / 2, 2.5), (2 / 3, 1.75), (1, 1)])
def test_cosine_course_is_slow_at_both_ends(progress, expected):
    # (1 - cos(π/3)) / 2 = 1/4 and (1 - cos(2π/3)) / 2 = 3/4
    assert value_at(course(4, 1, "cosine"), progress) == pytest.approx(expected)
    assert math.isclose(value_at(course(0, 1, "cosine"), 1e-3), 1e-6 * math.pi**2 / 4, rel_tol=1e-5)


@pytest.mark.parametrize("shape", ["linear", "cosine"])
@pytest.mark.parametrize(("start", "end"), [(0.9, 0.1), (0.1, 0.7), (3.3, 1.1), (0.0, 1e-3), (20.0, 0.0)])
def test_ends_are_reached_exactly(start, end, shape):
    assert value_at(course(start, end, shape), 0.0) == start
    assert value_at(course(start, end, shape), 1.0) == end


@pytest.mark.parametrize("shape", ["linear", "cosine"])
def test_course_never_leaves_its_ends_nor_turns_back(shape):
    values = [value_at(course(0.9, 0.1, shape), step / 997) for step in range(998)]
    assert values == sorted(values, reverse=True)


@pytest.mark.parametrize("shape", ["linear", "cosine"])
def test_course_from_a_value_to_itself_is_that_value(shape):
    assert all(value_at(course(0.3, 0.3, shape), step / 997) == 0.3 for step in range(998))


@pytest.mark.parametrize("setting", ["2", "4.5", '{"start": 8, "end": 1}', '{"start": 1, "end": 2, "shape": "cosine"}'])
@pytest.mark.parametrize("kind", [TEMPERATURE, WEIGHT], ids=["temperature", "weight"])
def test_numbers_and_courses_are_read_from_json(kind, setting):
    read = kind.validate_json(setting)
    assert kind.validate_json(kind.dump_json(read)) == read


@pytest.mark.parametrize(
    ("setting", "complaint"),
    [
        pytest.param('{"start": 1}', "Field required", id="no-end"),
        pytest.param('{"start": 1, "end": 2, "shape": "step"}', "'linear' or 'cosine'", id="unknown-shape"),
        pytest.param('{"start": 1, "end": 2, "steps": 3}', "Extra inputs", id="unknown-key"),
        pytest.param('{"start": -1, "end": 2}', "greater than or equal to 0", id="negative-start"),
        pytest.param('{"start": 1, "end": -2}', "greater than or equal to 0", id="negative-end"),
        pytest.param('{"start": 1, "end": "2"}', "valid number", id="text"),
        pytest.param("0", "greater than 0", id="zero"),
        pytest.param("-1", "greater than 0", id="negative"),
    ],
)
@pytest.mark.parametrize("kind", [TEMPERATURE, WEIGHT], ids=["temperature", "weight"])
def test_wrong_settings_are_refused(kind, setting, complaint):
    with pytest.raises(ValidationError, match=complaint):
        kind.validate_json(setting)


def test_infinite_ends_are_refused():
    with pytest.raises(ValidationError, match="finite"):
        course(1.0, math.inf)


def test_temperature_may_not_reach_zero():
    with pytest.raises(ValidationError, match=r"must be greater than 0, got 4\.0 and 0\.0"):
        TEMPERATURE.validate_json('{"start": 4, "end": 0}')


def test_weight_may_fade_in_or_out_but_must_count_somewhere():
    assert WEIGHT.validate_json('{"start": 1, "end": 0}') == course(1, 0)
    assert WEIGHT.validate_json('{"start": 0, "end": 1}') == course(0, 1)
    with pytest.raises(ValidationError, match="start or end must be greater than 0"):
        WEIGHT.validate_json('{"start": 0, "end": 0}')
