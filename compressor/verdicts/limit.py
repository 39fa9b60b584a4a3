"""A limit on one number of a report: met, unmet, or undecidable where the number is not known well enough."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, final

from compressor.records.measurements import Interval, Latency
from compressor.records.report import Level, Verdict
from compressor.text.figures import factor

_BIAS_TOLERANCE = 0.02
"""How far from 1 the whole interval of the baseline against itself may lie; beyond, the session proves nothing."""

_SHARES = ("share", "points")

_CALMER = "time longer, or on a machine with less other work"


@final
@dataclass(frozen=True)
class Limit:
    """What `metric` must be: at least, or at most, `bound`."""

    metric: str
    sign: Literal[">=", "<="]
    bound: float
    miss: Literal["bytes", "percent", "unit", "share", "points"]
    """What a miss is told in: bytes, percent of the bound, the metric's own unit, or, of a share or of a difference of
    shares, percentage points, as tables have it."""
    level: Level = "error"

    def judge(self, value: float, context: str = "") -> Verdict:
        """Whether `value`, which is known exactly, keeps the limit; `context` stands behind it in the message."""
        if at_most(value, self.bound) if self.sign == "<=" else at_most(self.bound, value):
            return self._verdict("met", f"{self.metric} is {self._write_value(value)}{_aside(context)}")
        return self._unmet(value, f"{self._write_value(value, self._bound_text)}{_aside(context)}")

    def judge_timing(self, interval: Interval, noise: Sequence[Latency], before: Interval | None = None) -> Verdict:
        """Whether `interval` keeps the limit, decided by its whole interval; bound and `interval` are > 0.

        `noise` has the baseline against itself, for each session that counts. `before` is the measured number of which
        the bound is a share: its uncertainty adds to that of `interval`.
        """
        context = "" if before is None else _aside(f"{_interval(before)} before")
        shown = f"{_interval(interval, self._bound_text)}{context}"
        sides = [math.log(end / self.bound) * (1 if self.sign == ">=" else -1) for end in _ends(interval, before)]
        worst, best = sorted(sides)  # > 0 where the limit is kept
        if max(map(_bias, noise)) > math.log1p(_BIAS_TOLERANCE):
            reason = f", but {_self_comparison(noise)}: the timing is not to be trusted; {_CALMER}"
        elif worst < 0 <= best:
            reason = f": the interval straddles the limit; {_CALMER}"
        elif sum(one.interval.distance for one in noise) > (worst if worst >= 0 else -best):
            reason = f", but {_self_comparison(noise)}: the limit is within the noise; {_CALMER}"
        elif worst >= 0:
            return self._verdict("met", f"{self.metric} is {_interval(interval)}{context}")
        else:
            return self._unmet(interval.value, shown)
        return self._verdict("undecidable", f"{self.metric} must be {self._rule}, got {shown}{reason}")

    def undecidable(self, reason: str) -> Verdict:
        """The verdict where there is nothing to compare with the limit, because of `reason`."""
        return undecidable(self.metric, self._rule, reason, level=self.level)

    @property
    def _bound_text(self) -> str:
        return _exactly(self.bound * 100) if self.miss in _SHARES else _exactly(self.bound)

    @property
    def _rule(self) -> str:
        return f"{self.sign} {self._with_unit(self._bound_text)}"

    def _write_value(self, value: float, apart_from: str = "") -> str:
        if self.miss == "percent":
            return _ratio(value, apart_from)
        if self.miss in _SHARES:
            return self._with_unit(_figure(value * 100, apart_from, digits=4))
        return _figure(value, apart_from, digits=4)  # a tenth of a point of accuracy counts

    def _with_unit(self, figure: str) -> str:
        """Of a share its number in the unit of the tables; all else has none."""
        return points(figure) if self.miss == "points" else f"{figure} %" if self.miss == "share" else figure

    def _unmet(self, value: float, shown: str) -> Verdict:
        beyond = abs(value - self.bound)
        if self.miss == "bytes":
            miss = f"{beyond:.0f} bytes ({percent(beyond / self.bound)}) too many"
        else:
            amount = percent(beyond / self.bound) if self.miss == "percent" else _figure(beyond)
            amount = points(_figure(beyond * 100)) if self.miss in _SHARES else amount
            miss = f"{amount} {'short' if self.sign == '>=' else 'too much'}"
        return self._verdict("unmet", f"{self.metric} must be {self._rule}, got {shown}: {miss}")

    def _verdict(self, status: Literal["met", "unmet", "undecidable"], message: str) -> Verdict:
        return Verdict(metric=self.metric, limit=self._rule, status=status, message=message, level=self.level)


def at_most(number: float, bound: float) -> bool:
    """Whether `number` <= `bound`, or is above by a rounding: 0.99 - 0.98 is a little more than 0.01 in binary."""
    return number <= bound or math.isclose(number, bound, rel_tol=0, abs_tol=1e-12)


def undecidable(metric: str, wanted: str, reason: str, *, level: Level = "error") -> Verdict:
    """The verdict on a limit, in words `wanted`, that nothing can be compared with because of `reason`."""
    message = f"{metric} must be {wanted}, but {reason}"
    return Verdict(metric=metric, limit=wanted, status="undecidable", message=message, level=level)


def _ends(interval: Interval, before: Interval | None) -> tuple[float, float]:
    """The ends of `interval`, moved apart by what is uncertain in `before`."""
    if before is None:
        return interval.low, interval.high
    return interval.low * before.value / before.high, interval.high * before.value / before.low


def _bias(noise: Latency) -> float:
    """How far the whole interval lies from 1, as a natural logarithm; 0 if it holds 1."""
    return max(0.0, math.log(noise.ratio_low), -math.log(noise.ratio_high))


def _self_comparison(noise: Sequence[Latency]) -> str:
    intervals = [_interval(one.interval) for one in noise]
    return f"the baseline against itself gave {' and, before, '.join(intervals)}"


def _interval(interval: Interval, apart_from: str = "") -> str:
    value, low, high = (_ratio(one, apart_from) for one in (interval.value, interval.low, interval.high))
    return value if interval.low == interval.high else f"{value} [{low}, {high}]"


def _aside(text: str) -> str:
    return f" ({text})" if text else ""


def _exactly(bound: float) -> str:
    """A bound as it was written; one that was computed, to six digits."""
    return str(bound) if isinstance(bound, int) else f"{bound:.6g}"


def _ratio(value: float, apart_from: str) -> str:
    """As tables show it, or with as many more digits as it takes to differ from another text."""
    text = factor(value)
    return _figure(value, apart_from) if apart_from and float(text) == float(apart_from) else text


def _figure(value: float, apart_from: str = "", *, digits: int = 3) -> str:
    """So many significant digits, or as many more as it takes to differ from another text; integers are exact."""
    if isinstance(value, int):
        return str(value)
    for count in range(digits, 18):
        text = f"{float(f'{value:.{count}g}'):.15g}"
        if text != apart_from:
            break
    return text


def percent(share: float) -> str:
    """A share in words, two digits or more: 2 %, 0.25 %, 17 %."""
    return f"{100 * share:.0f} %" if share >= 0.1 else f"{100 * share:.2g} %"


def points(figure: str) -> str:
    """Percentage points in words: 1 point, 0.6 points."""
    return f"{figure} point{'' if figure == '1' else 's'}"
