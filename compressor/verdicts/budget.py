"""How much worse than in an earlier report of the same pipeline a delivered model may be, and whether it is."""

import math
from collections.abc import Iterator, Mapping
from fractions import Fraction
from typing import Any, NamedTuple, TypeAlias, final

from pydantic import BaseModel, ConfigDict, Field

from compressor.records.measurements import Interval, Latency, Measurement
from compressor.records.report import Level, Report, Verdict
from compressor.text.figures import share
from compressor.verdicts.limit import Limit, percent, points, undecidable

_STRICT = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False, use_attribute_docstrings=True)

_MACHINE = ("cpu", "cpu_flags", "cores", "usable_cores")
"""What an environment must say alike for milliseconds to be comparable, beside the version of ONNX Runtime."""

_Pair: TypeAlias = tuple[float, float] | str
"""A number of the earlier report and of the report, or why the two cannot be compared."""


_MOST_SHARE = 1e6
"""Of an earlier number; no limit means more, and a number times it is a number too."""


class _Timings(NamedTuple):
    """Latencies of the earlier report and of the report, and what differs between their sessions."""

    was: Latency
    now: Latency
    noise: tuple[Latency, Latency]
    """Of both sessions, the report's first."""
    drift: float
    """Time of the one float baseline in the report / in the earlier report: 2.0 means that all took twice as long."""


class _Allowance(BaseModel):
    model_config = _STRICT

    level: Level = "error"
    """What comes of a limit that is not met or cannot be decided: nothing, a warning, or exit code 3 or 4."""


@final
class MaxGrowth(_Allowance):
    """A number of bytes that may grow only so far."""

    max_increase: float = Field(default=0.02, ge=0, le=_MOST_SHARE)
    """Share of the earlier size; 0.02 allows 2 % more bytes."""


@final
class MaxSlowdown(_Allowance):
    """A ratio of times that may fall only so far."""

    max_decrease: float = Field(default=0.1, gt=0, lt=1)
    """Share of the earlier ratio, in (0, 1); not 0, as no two measurements of a time are equal."""


@final
class MaxDelay(_Allowance):
    """A time that may grow only so far."""

    max_increase: float = Field(default=0.1, gt=0, le=_MOST_SHARE)
    """Share of the earlier time, > 0, as no two measurements of a time are equal."""


@final
class MaxWorsening(_Allowance):
    """A metric that may become worse only so far."""

    max_drop: float = Field(default=0.01, ge=0)
    """In the metric's own unit: 0.01 is one point of accuracy. A rise where lower is better."""


@final
class Budget(BaseModel):
    """How much worse the last row of a report may be than that of an earlier one; better is always allowed."""

    model_config = _STRICT

    size_bytes: MaxGrowth = MaxGrowth()
    """Delivered file with its external data."""
    transfer_bytes: MaxGrowth = MaxGrowth()
    """Delivered file after gzip."""
    latency_ratio: MaxSlowdown = MaxSlowdown()
    """Speed over the float baseline that was timed beside it, of the same parameters and MACs in both reports; decided
    by the whole intervals."""
    latency_ms: MaxDelay = MaxDelay(level="off")
    """Median time of one inference; decidable only if one machine took both reports, and the float baseline took
    nearly the same time in both; off unless named."""
    agreement: MaxWorsening = MaxWorsening(level="off")
    """Share of test samples that get the class that the float baseline names; off unless named."""
    metrics: Mapping[str, MaxWorsening] = {}
    """Metrics of the task by name; one that is not named may drop by 0.01."""


def compare(budget: Budget, report: Report, earlier: Report) -> tuple[Verdict, ...]:
    """Compare the last row of `report` with that of `earlier`: one verdict for each limit that is not off.

    What one of them lacks, or what they did not measure alike, is undecidable, never met.
    """
    if report.pipeline != earlier.pipeline:
        return (incomparable(f"the baseline is of {earlier.pipeline!r} and the report of {report.pipeline!r}"),)
    return tuple(verdict for verdict in _verdicts(budget, report, earlier) if verdict.level != "off")


def incomparable(reason: str) -> Verdict:
    """The verdict where nothing can be compared, because of `reason`; no budget can make it a warning."""
    return undecidable("reports", "two of the same pipeline", reason)


def _verdicts(budget: Budget, report: Report, earlier: Report) -> Iterator[Verdict]:
    was, now = earlier.rows[-1].measurement, report.rows[-1].measurement
    yield _growth("size_bytes", budget.size_bytes, was.size_bytes, now.size_bytes)
    yield _growth("transfer_bytes", budget.transfer_bytes, was.transfer_bytes, now.transfer_bytes)
    timings = _timings(report, earlier)
    yield _slowdown(budget.latency_ratio, timings)
    yield _delay(budget.latency_ms, _differing_machines(report, earlier) or timings)
    yield _worsening("agreement", budget.agreement, _agreements(report, earlier), is_share=True)
    metrics = {metric.name: metric for metric in (*earlier.metrics, *report.metrics)}
    for name in dict.fromkeys([*metrics, *budget.metrics]):
        is_better = name not in metrics or metrics[name].higher_is_better
        allowed = budget.metrics.get(name, MaxWorsening())
        is_share = name in metrics and metrics[name].unit == "%"
        pair = _values(name, report, earlier)
        yield _worsening(name, allowed, pair, higher_is_better=is_better, is_share=is_share)


def _growth(metric: str, allowed: MaxGrowth, was: int, now: int) -> Verdict:
    bound = math.floor(was * (1 + Fraction(str(allowed.max_increase))))  # 100 * 1.15 is less than 115 in binary
    return Limit(metric, "<=", bound, "bytes", allowed.level).judge(now, f"{was} before")


def _slowdown(allowed: MaxSlowdown, timings: _Timings | str) -> Verdict:
    if isinstance(timings, str):
        wanted = f"at most {percent(allowed.max_decrease)} below the earlier"
        return undecidable("latency_ratio", wanted, timings, level=allowed.level)
    was, now = timings.was.interval, timings.now.interval
    limit = Limit("latency_ratio", ">=", was.value * (1 - allowed.max_decrease), "percent", allowed.level)
    return limit.judge_timing(now, timings.noise, was)


def _delay(allowed: MaxDelay, timings: _Timings | str) -> Verdict:
    if isinstance(timings, str):
        wanted = f"at most {percent(allowed.max_increase)} above the earlier"
        return undecidable("latency_ms", wanted, timings, level=allowed.level)
    was, now = timings.was.p50_ms, timings.now.p50_ms
    limit = Limit("latency_ms", "<=", was * (1 + allowed.max_increase), "percent", allowed.level)
    # no one knows how much of a drift the delivered model shares
    low, high = sorted((now, now / timings.drift))
    return limit.judge_timing(Interval(now, low, high), timings.noise, Interval(was, was, was))


def _worsening(
    metric: str, allowed: MaxWorsening, pair: _Pair, *, higher_is_better: bool = True, is_share: bool = False
) -> Verdict:
    if isinstance(pair, str):
        amount = points(f"{100 * allowed.max_drop:g}") if is_share else f"{allowed.max_drop:g}"
        return undecidable(metric, f"at most {amount} worse than the earlier", pair, level=allowed.level)
    was, now = pair
    bound = was - allowed.max_drop if higher_is_better else was + allowed.max_drop
    limit = Limit(metric, ">=" if higher_is_better else "<=", bound, "share" if is_share else "unit", allowed.level)
    return limit.judge(now, f"{share(was)} before" if is_share else f"{was:.4g} before")


def _timings(report: Report, earlier: Report) -> _Timings | str:
    """What each report says of its last row, or why the two cannot be compared."""
    was, now = earlier.rows[-1].latency, report.rows[-1].latency
    before, after = earlier.latency_session, report.latency_session
    if was is None or before is None:
        return "the earlier report has no latency"
    if now is None or after is None:
        return "the report has no latency"
    if (before.threads, before.batch_size) != (after.threads, after.batch_size):
        return (
            f"it was timed on {before.threads} threads with a batch of {before.batch_size} in the earlier report, on "
            f"{after.threads} with {after.batch_size} in the report"
        )
    first, first_now = earlier.rows[0], report.rows[0]
    if first.latency is None or first_now.latency is None:
        return "the float baseline was not timed"
    if apart := _differing_baselines(first.measurement, first_now.measurement):
        return apart
    drift = first_now.latency.p50_ms / first.latency.p50_ms
    return _Timings(was, now, (after.noise, before.noise), drift)


def _differing_baselines(was: Measurement, now: Measurement) -> str:
    """Say why speeds beside the two float baselines cannot be compared, as far as a report knows; empty if they can."""
    if (was.parameters, was.macs) == (now.parameters, now.macs):
        return ""
    return (
        f"the float baseline had {was.parameters:,} parameters and {was.macs:,} MACs and has {now.parameters:,} and "
        f"{now.macs:,}"
    )


def _agreements(report: Report, earlier: Report) -> _Pair:
    was, now = earlier.rows[-1].fidelity, report.rows[-1].fidelity
    if was is None or now is None:
        return f"{'the earlier report' if was is None else 'the report'} has none"
    return _differing_samples(report, earlier) or (was.agreement, now.agreement)


def _values(metric: str, report: Report, earlier: Report) -> _Pair:
    """Of a metric of the task."""
    was, now = ({one.name: one for one in found.metrics}.get(metric) for found in (earlier, report))
    if was is None or now is None:
        lacking = earlier if was is None else report
        names = ", ".join(one.name for one in lacking.metrics) or "none"
        return f"{'the earlier report' if was is None else 'the report'} has no such metric; its metrics are: {names}"
    if was != now:
        return "its unit or direction is not that of the earlier report"
    before, after = (found.rows[-1].measurement.metrics[metric] for found in (earlier, report))
    return _differing_samples(report, earlier) or (before, after)


def _differing_samples(report: Report, earlier: Report) -> str:
    """Say why accuracies cannot be compared, as far as a report knows; empty if they can."""
    was, now = (found.rows[-1].measurement.samples for found in (earlier, report))
    return "" if was == now else f"the test split had {was:,} samples and has {now:,}"


def _differing_machines(report: Report, earlier: Report) -> str:
    """Say why times of the two machines cannot be compared; empty if they can.

    Two machines are the same if all facts of `_MACHINE` are known and equal.
    """
    was, now = (_machine(found.environment) for found in (earlier, report))
    apart = [
        f"{name} was {was[name]!r} and is {now[name]!r}" for name in was if was[name] is None or was[name] != now[name]
    ]
    return f"the machines must be the same: {', '.join(apart)}" if apart else ""


def _machine(environment: Mapping[str, Any]) -> dict[str, Any]:
    versions = environment.get("versions")
    version = versions.get("onnxruntime") if isinstance(versions, Mapping) else None
    return {**{name: environment.get(name) for name in _MACHINE}, "onnxruntime": version}
