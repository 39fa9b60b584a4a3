"""A limit on one number of a report: met, unmet, or undecidable where the number is not known well enough."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, final

from compressor.records.measurements import Interval, Latency
from compressor.records.report import Level, Verdict
from compressor.text.figures import factor

_BIAS_TOLERANCE = 0.02
"""How far the baseline timed against itself may surely lie from 1 before the session proves nothing."""

_CALMER = "time longer, or on a machine with less other work"


@final
@dataclass(frozen=True)
class Limit:
    """What `metric` must be: at least, or at most, `bound`."""

    metric: str
    sign: Literal[">=", "<="]
    bound: float
    miss: Literal["bytes", "percent", "unit"]
    """What a miss is told in: bytes, percent of the bound, or the metric's own unit."""
    level: Level = "error"

    def judge(self, found: float, context: str = "") -> Verdict:
        """Whether `found`, which is known exactly, keeps the limit; `context` stands behind it in the message."""
        if at_most(found, self.bound) if self.sign == "<=" else at_most(self.bound, found):
            return self._verdict("met", f"{self.metric} is {self._shown(found)}{_aside(context)}")
        return self._unmet(found, f"{self._shown(found, self._written)}{_aside(context)}")

    def judge_timing(self, found: Interval, noise: Sequence[Latency], before: Interval | None = None) -> Verdict:
        """Whether `found` keeps the limit, decided by its whole interval; bound and `found` are > 0.

        `noise` has the baseline against itself in each session that counts. `before` is the measured number that the
        bound is a share of: how uncertain it is counts like the uncertainty of `found`.
        """
        context = "" if before is None else _aside(f"{_interval(before)} before")
        shown = f"{_interval(found, self._written)}{context}"
        sides = [math.log(end / self.bound) * (1 if self.sign == ">=" else -1) for end in _ends(found, before)]
        worst, best = sorted(sides)  # > 0 where the limit is kept
        if max(map(_bias, noise)) > math.log1p(_BIAS_TOLERANCE):
            reason = f", but {_self_comparison(noise)}: the timing is not to be trusted; {_CALMER}"
        elif worst < 0 <= best:
            reason = f": the interval straddles the limit; {_CALMER}"
        elif sum(one.interval.distance for one in noise) > (worst if worst >= 0 else -best):
            reason = f", but {_self_comparison(noise)}: the limit is within the noise; {_CALMER}"
        elif worst >= 0:
            return self._verdict("met", f"{self.metric} is {_interval(found)}{context}")
        else:
            return self._unmet(found.value, shown)
        return self._verdict("undecidable", f"{self.metric} must be {self._wanted}, got {shown}{reason}")

    def undecidable(self, reason: str) -> Verdict:
        """The verdict where there is nothing to compare with the limit, because of `reason`."""
        return undecidable(self.metric, self._wanted, reason, level=self.level)

    @property
    def _written(self) -> str:
        return _exactly(self.bound)

    @property
    def _wanted(self) -> str:
        return f"{self.sign} {self._written}"

    def _shown(self, found: float, apart_from: str = "") -> str:
        if self.miss == "percent":
            return _ratio(found, apart_from)
        return _figure(found, apart_from, digits=4)  # a tenth of a point of accuracy counts

    def _unmet(self, found: float, shown: str) -> Verdict:
        beyond = abs(found - self.bound)
        if self.miss == "bytes":
            miss = f"{beyond:.0f} bytes ({percent(beyond / self.bound)}) too many"
        else:
            amount = percent(beyond / self.bound) if self.miss == "percent" else _figure(beyond)
            miss = f"{amount} {'short' if self.sign == '>=' else 'too much'}"
        return self._verdict("unmet", f"{self.metric} must be {self._wanted}, got {shown}: {miss}")

    def _verdict(self, status: Literal["met", "unmet", "undecidable"], message: str) -> Verdict:
        return Verdict(metric=self.metric, limit=self._wanted, status=status, message=message, level=self.level)


def at_most(found: float, bound: float) -> bool:
    """Whether `found` <= `bound`, or is above by a rounding: 0.99 - 0.98 is a little more than 0.01 in binary."""
    return found <= bound or math.isclose(found, bound, rel_tol=0, abs_tol=1e-12)


def undecidable(metric: str, wanted: str, reason: str, *, level: Level = "error") -> Verdict:
    """The verdict on a limit, in words `wanted`, that nothing can be compared with because of `reason`."""
    message = f"{metric} must be {wanted}, but {reason}"
    return Verdict(metric=metric, limit=wanted, status="undecidable", message=message, level=level)


def _ends(found: Interval, before: Interval | None) -> tuple[float, float]:
    """How low and how high `found` may lie, beside a `before` that is known exactly."""
    if before is None:
        return found.low, found.high
    return found.low * before.value / before.high, found.high * before.value / before.low


def _bias(noise: Latency) -> float:
    """How far from 1 noise surely moved a ratio, as a natural logarithm; 0 if the interval holds 1."""
    return max(0.0, math.log(noise.ratio_low), -math.log(noise.ratio_high))


def _self_comparison(noise: Sequence[Latency]) -> str:
    found = [_interval(one.interval) for one in noise]
    return f"the baseline against itself gave {' and, before, '.join(found)}"


def _interval(found: Interval, apart_from: str = "") -> str:
    value, low, high = (_ratio(one, apart_from) for one in (found.value, found.low, found.high))
    return value if found.low == found.high else f"{value} [{low}, {high}]"


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
