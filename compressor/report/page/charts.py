"""Geometry of charts: numbers in, coordinates out, in percent of the drawing; draws nothing and knows no report."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, TypeAlias, TypeVar

Point: TypeAlias = tuple[float, float]
"""x to the right and y downwards, each in percent of the drawing."""
_Item = TypeVar("_Item")

NARROWEST = 240
"""Width in pixels of a drawing on a phone of 360: labels that do not meet there meet nowhere."""
_DIGIT, _LINE, _RAISED = 8, 16, 8
"""Pixels: the width of a digit, the height of a label, and how far above its point it stands."""
_PADDING = 0.06
"""By how much a scale is longer than its values at either end, as a share."""
_EXTREME = 1e150
"""Numbers larger than this, or closer to 0 than its inverse, are drawn as this: spans and ratios stay finite."""


@dataclass(frozen=True)
class Scale:
    """Places numbers between `low` and `high`, low < high; 0 < low if `logarithmic`."""

    low: float
    high: float
    logarithmic: bool = False

    def at(self, value: float) -> float:
        """How far from `low` to `high` a value lies, in percent; what lies beyond an end is put there."""
        share = (self._length(value) - self._length(self.low)) / (self._length(self.high) - self._length(self.low))
        return round(100 * min(max(share, 0.0), 1.0), 2)

    def ticks(self, most: int) -> tuple[float, ...]:
        """Up to `most`, at least two, round numbers within the scale."""
        if self.logarithmic:
            for steps in ((1.0, 2.0, 5.0), (1.0,)):
                found = self._powers(steps)
                if 2 <= len(found) <= most:
                    return found
            if len(found) > most:
                return found[:: math.ceil(len(found) / most)]
        return self._multiples(most)

    def _length(self, value: float) -> float:
        if self.logarithmic:
            return math.log(value) if value > 0 else -math.inf
        return value

    def _powers(self, steps: Sequence[float]) -> tuple[float, ...]:
        """Those of `steps` times powers of ten that lie within."""
        exponents = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
        numbers = (float(f"{step:g}e{exponent}") for exponent in exponents for step in steps)
        return tuple(number for number in numbers if self.low <= number <= self.high)

    def _multiples(self, most: int) -> tuple[float, ...]:
        """Multiples of the smallest round step of which at most `most` lie within."""
        exponent = math.floor(math.log10((self.high - self.low) / most))
        steps = (float(f"{step}e{exponent + higher}") for higher in (0, 1) for step in (1, 2, 2.5, 5))
        for step in steps:
            first, last = math.ceil(self.low / step), math.floor(self.high / step)
            if last - first < most:
                # the nearest short decimal: 3 * 0.1 is a little more than 0.3
                return tuple(float(f"{number * step:.12g}") for number in range(first, last + 1))
        return ()


def spanning(values: Sequence[float], *, least: float | None = None, logarithmic: bool = False) -> Scale:
    """Fit a scale to `values`, at least one, with some room at its ends.

    `least` is the least span of a linear scale. Unless given, the span is at least so long that four digits are enough
    to tell ticks apart.
    """
    smallest = 1 / _EXTREME if logarithmic else -_EXTREME
    low, high = (min(max(value, smallest), _EXTREME) for value in (min(values), max(values)))
    if logarithmic:
        room = max((high / low) ** _PADDING, 1.05)
        return Scale(low / room, high * room, logarithmic=True)
    largest = max(abs(low), abs(high))
    # a span too small for the digits of the values has no ticks
    span = max(high - low, 0.01 * largest if least is None else least, 1e-6 * largest) or 1.0
    room = (span - (high - low)) / 2 + _PADDING * span
    return Scale(low - room, high + room)


def spans_orders(values: Sequence[float], *, factor: float) -> bool:
    """Whether all of `values`, at least one, are positive and the largest is `factor` times the smallest or more."""
    return min(values) > 0 and max(values) >= factor * min(values)


def front(values: Sequence[tuple[float, float, float]]) -> tuple[int, ...]:
    """Indices of the Pareto front of `values`, each (lower end of x, upper end of x, y); more is better in x and in y.

    An x is surely larger than another if their intervals do not meet. A value beats another in two cases: its y is
    larger and its x is not surely smaller; or its y is equal and its x is surely larger. The front holds the values
    that no value on the front beats. A beaten value beats nothing: intervals may meet in a chain whose ends lie far
    apart.
    """

    def is_beaten(one: tuple[float, float, float], other: tuple[float, float, float]) -> bool:
        (low, high, y), (other_low, other_high, other_y) = one, other
        return (other_y > y and other_high >= low) or (other_y == y and other_low > high)

    found: list[int] = []
    for index in sorted(range(len(values)), key=lambda index: (values[index][2], values[index][0]), reverse=True):
        # what could beat it comes before it
        if not any(is_beaten(values[index], values[other]) for other in found):
            found.append(index)
    return tuple(sorted(found))


def staircase(points: Sequence[Point]) -> tuple[Point, ...]:
    """The border of the area below a front: from point to point, left to right, first along y and then along x."""
    ordered = sorted(set(points))
    corners = pairwise(ordered)
    return (*ordered[:1], *(step for (x, _), after in corners for step in ((x, after[1]), after)))


@dataclass(frozen=True)
class Label:
    """A text that stands above a point: it begins, has its middle or ends there."""

    x: float
    y: float
    anchor: Literal["start", "middle", "end"]
    text: str


def labels(points: Sequence[Point], numbers: Sequence[int], *, height: int) -> tuple[Label, ...]:
    """Labels above `points`: of each the number, counted from 1, if it is among `numbers`.

    Labels that would meet in a drawing `height` pixels high become one.
    """
    groups = [[number] for number in numbers]
    placed = [_label(group, points) for group in groups]
    while meeting := _first_meeting(placed, height):
        first, second = meeting
        groups[first] = sorted(groups[first] + groups.pop(second))
        placed = [_label(group, points) for group in groups]
    return tuple(placed)


def runs(numbers: Sequence[int]) -> str:
    """Rising whole numbers in short: `1, 3-5` for 1, 3, 4, 5."""
    found: list[list[int]] = []
    for number in numbers:
        if found and number == found[-1][-1] + 1:
            found[-1].append(number)
        else:
            found.append([number])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in found)


def thin(items: Sequence[_Item], most: int) -> list[_Item]:
    """Up to `most`, at least two, of `items` in even steps, the first and the last among them."""
    if len(items) <= most:
        return list(items)
    return [items[round(number * (len(items) - 1) / (most - 1))] for number in range(most)]


def path(points: Sequence[Point]) -> str:
    """Write `points` as the attribute `points` of a polyline."""
    return " ".join(f"{x:g},{y:g}" for x, y in points)


def _label(numbers: Sequence[int], points: Sequence[Point]) -> Label:
    chosen = [points[number - 1] for number in numbers]
    x = round(sum(x for x, _ in chosen) / len(chosen), 2)
    anchor: Literal["start", "middle", "end"] = "start" if x < 25 else "end" if x > 75 else "middle"
    return Label(x, min(y for _, y in chosen), anchor, runs(numbers))


def _first_meeting(placed: Sequence[Label], height: int) -> tuple[int, int] | None:
    boxes = [_box(label, height) for label in placed]
    for second, (left, top, right, bottom) in enumerate(boxes):
        for first, (other_left, other_top, other_right, other_bottom) in enumerate(boxes[:second]):
            if left < other_right and other_left < right and top < other_bottom and other_top < bottom:
                return first, second
    return None


def _box(label: Label, height: int) -> tuple[float, float, float, float]:
    """Left, top, right and bottom in pixels, where the drawing is narrowest."""
    width = _DIGIT * len(label.text) + _DIGIT
    left = label.x / 100 * NARROWEST - {"start": 0.0, "middle": width / 2, "end": float(width)}[label.anchor]
    bottom = label.y / 100 * height - _RAISED
    return left, bottom - _LINE, left + width, bottom
