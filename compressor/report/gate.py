"""Limits on what a run delivers, and whether a report keeps them."""

import math
from collections.abc import Sequence
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from compressor.report.records import Latency, Report, Verdict

_STRICT = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False, use_attribute_docstrings=True)

_BIAS_TOLERANCE = 0.02
"""How far the baseline timed against itself may surely lie from 1 before the session proves nothing."""

_CALMER = "time longer, or on a machine with less other work"


class MinRatio(BaseModel):
    """A ratio baseline / delivered that must be reached."""

    model_config = _STRICT

    min: float = Field(gt=0)
    """Smallest ratio that passes, > 0; 2.0 means twice as small or twice as fast."""


class MaxDrop(BaseModel):
    """A loss of the task's first metric that must not be exceeded."""

    model_config = _STRICT

    max: float
    """Largest loss that passes, in the metric's own unit: 0.01 is one point of accuracy; below 0 asks for a gain."""


class MaxBytes(BaseModel):
    """A number of bytes that must not be exceeded."""

    model_config = _STRICT

    max: int = Field(gt=0)
    """Largest size that passes, in bytes, > 0."""


class MinShare(BaseModel):
    """A share that must be reached."""

    model_config = _STRICT

    min: float = Field(gt=0, le=1)
    """Smallest share that passes, in (0, 1]; 0.98 means 98 % of the test samples."""


class Gate(BaseModel):
    """Limits that the last row of a report must keep. Each has one direction, so an improvement never fails."""

    model_config = _STRICT

    size_ratio: MinRatio | None = None
    """File size, baseline / delivered."""
    latency_ratio: MinRatio | None = None
    """Time of one inference, baseline / delivered; decided by its whole 95 % interval."""
    accuracy_drop: MaxDrop | None = None
    """Loss of the task's first metric from the baseline, positive = worse whatever the metric's direction."""
    transfer_bytes: MaxBytes | None = None
    """Delivered file after gzip, in bytes."""
    size_bytes: MaxBytes | None = None
    """Delivered file with its external data, in bytes."""
    agreement: MinShare | None = None
    """Share of test samples for which the delivered classifier names the same class as the baseline."""

    @model_validator(mode="after")
    def _has_a_limit(self) -> "Gate":
        if not self.model_fields_set or all(getattr(self, name) is None for name in type(self).model_fields):
            msg = f"a gate must have at least one limit of {', '.join(type(self).model_fields)}"
            raise ValueError(msg)
        return self


def judge(gate: Gate, report: Report) -> tuple[Verdict, ...]:
    """Compare the last row of `report` with each limit of `gate`, in the order of the gate's fields.

    What was not measured is undecidable, never met.
    """
    verdicts = []
    if gate.size_ratio:
        verdicts.append(_judge_size_ratio(gate.size_ratio.min, report))
    if gate.latency_ratio:
        verdicts.append(_judge_latency_ratio(gate.latency_ratio.min, report))
    if gate.accuracy_drop:
        verdicts.append(_judge_accuracy_drop(gate.accuracy_drop.max, report))
    if gate.transfer_bytes:
        found = report.rows[-1].measurement.transfer_bytes if report.rows else None
        verdicts.append(_judge_bytes("transfer_bytes", gate.transfer_bytes.max, found))
    if gate.size_bytes:
        found = report.rows[-1].measurement.size_bytes if report.rows else None
        verdicts.append(_judge_bytes("size_bytes", gate.size_bytes.max, found))
    if gate.agreement:
        verdicts.append(_judge_agreement(gate.agreement.min, report))
    return tuple(verdicts)


def exit_code(verdicts: Sequence[Verdict]) -> Literal[0, 3, 4]:
    """0 if every limit is met, 3 if one is unmet, else 4 if one is undecidable."""
    found = {verdict.status for verdict in verdicts}
    if "unmet" in found:
        return 3
    return 4 if "undecidable" in found else 0


def _judge_size_ratio(limit: float, report: Report) -> Verdict:
    wanted = f">= {_figure(limit)}"
    if not report.rows:
        return _not_measured("size_ratio", wanted, "no model")
    ratio = report.rows[0].measurement.size_bytes / report.rows[-1].measurement.size_bytes
    if ratio >= limit:
        return Verdict(metric="size_ratio", limit=wanted, status="met", message=f"size_ratio is {_figure(ratio)}")
    message = f"size_ratio must be {wanted}, got {_figure(ratio, limit)}: {_percent(1 - ratio / limit)} short"
    return Verdict(metric="size_ratio", limit=wanted, status="unmet", message=message)


def _judge_bytes(metric: str, limit: int, found: int | None) -> Verdict:
    wanted = f"<= {limit}"
    if found is None:
        return _not_measured(metric, wanted, "no model")
    if found <= limit:
        return Verdict(metric=metric, limit=wanted, status="met", message=f"{metric} is {found}")
    over = f"{found - limit} bytes ({_percent(found / limit - 1)}) too many"
    return Verdict(
        metric=metric, limit=wanted, status="unmet", message=f"{metric} must be {wanted}, got {found}: {over}"
    )


def _judge_agreement(limit: float, report: Report) -> Verdict:
    wanted = f">= {_figure(limit)}"
    fidelity = report.rows[-1].fidelity if report.rows else None
    if fidelity is None:
        return _not_measured("agreement", wanted, "no agreement")
    found = fidelity.agreement
    if found >= limit:
        return Verdict(metric="agreement", limit=wanted, status="met", message=f"agreement is {_figure(found)}")
    message = f"agreement must be {wanted}, got {_figure(found, limit)}: {_figure(limit - found)} short"
    return Verdict(metric="agreement", limit=wanted, status="unmet", message=message)


def _judge_accuracy_drop(limit: float, report: Report) -> Verdict:
    wanted = f"<= {_figure(limit)}"
    first = report.metrics[0] if report.metrics else None
    values = [row.measurement.metrics.get(first.name, math.nan) for row in report.rows] if first else []
    if first is None or not values or not math.isfinite(values[0]) or not math.isfinite(values[-1]):
        return _not_measured("accuracy_drop", wanted, f"no finite {first.name if first else 'metric'}")
    drop = values[0] - values[-1] if first.higher_is_better else values[-1] - values[0]
    change = f"{first.name} {values[0]:.4g} to {values[-1]:.4g}"
    # 0.99 - 0.98 is a little more than 0.01 in binary, and a limit kept exactly is kept
    if drop <= limit or math.isclose(drop, limit, abs_tol=1e-12):
        message = f"accuracy_drop is {_figure(drop)} ({change})"
        return Verdict(metric="accuracy_drop", limit=wanted, status="met", message=message)
    over = f"{_figure(drop - limit)} too much"
    message = f"accuracy_drop must be {wanted}, got {_figure(drop, limit)} ({change}): {over}"
    return Verdict(metric="accuracy_drop", limit=wanted, status="unmet", message=message)


def _judge_latency_ratio(limit: float, report: Report) -> Verdict:
    wanted = f">= {_figure(limit)}"
    latency = report.rows[-1].latency if report.rows else None
    if latency is None or report.latency_session is None:
        return _not_measured("latency_ratio", wanted, "no latency")
    noise = report.latency_session.noise
    found = f"latency_ratio must be {wanted}, got {_interval(latency, limit)}"

    def verdict(status: Literal["met", "unmet", "undecidable"], message: str) -> Verdict:
        return Verdict(metric="latency_ratio", limit=wanted, status=status, message=message)

    if _bias(noise) > math.log1p(_BIAS_TOLERANCE):
        return verdict(
            "undecidable", f"{found}, but {_self_comparison(noise)}: the timing is not to be trusted; {_CALMER}"
        )
    if latency.ratio_low < limit <= latency.ratio_high:
        return verdict("undecidable", f"{found}: the interval straddles the limit; {_CALMER}")
    met = latency.ratio_low >= limit
    distance = abs(math.log((latency.ratio_low if met else latency.ratio_high) / limit))
    if _amplitude(noise) > distance:
        return verdict(
            "undecidable", f"{found}, but {_self_comparison(noise)}: the limit is within the noise; {_CALMER}"
        )
    if met:
        return verdict("met", f"latency_ratio is {_interval(latency)}")
    return verdict("unmet", f"{found}: {_percent(1 - latency.ratio / limit)} short")


def _amplitude(noise: Latency) -> float:
    """How far from 1 the machine's noise may move a ratio, as a natural logarithm."""
    return max(abs(math.log(noise.ratio_low)), abs(math.log(noise.ratio_high)))


def _bias(noise: Latency) -> float:
    """How far from 1 noise surely moved a ratio, as a natural logarithm; 0 if the interval holds 1."""
    return max(0.0, math.log(noise.ratio_low), -math.log(noise.ratio_high))


def _self_comparison(noise: Latency) -> str:
    return f"the baseline against itself gave {_interval(noise)}"


def _interval(latency: Latency, limit: float | None = None) -> str:
    low, high = _figure(latency.ratio_low, limit), _figure(latency.ratio_high, limit)
    return f"{_figure(latency.ratio, limit)} [{low}, {high}]"


def _not_measured(metric: str, wanted: str, missing: str) -> Verdict:
    message = f"{metric} must be {wanted}, but {missing} was measured"
    return Verdict(metric=metric, limit=wanted, status="undecidable", message=message)


def _figure(value: float, apart_from: float | None = None) -> str:
    """Three significant digits, or as many more as it takes to differ from another figure."""
    for digits in range(3, 18):
        rounded = float(f"{value:.{digits}g}")
        if apart_from is None or value == apart_from or rounded != apart_from:
            break
    return f"{rounded:.15g}"


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %" if share >= 0.1 else f"{100 * share:.2g} %"
