"""Limits on what a run delivers, and whether a report keeps them."""

from collections.abc import Sequence
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from compressor.records.report import Report, Verdict
from compressor.text.figures import value
from compressor.verdicts.limit import Limit

_STRICT = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False, use_attribute_docstrings=True)


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
    before, after = report.rows[0].measurement, report.rows[-1].measurement
    verdicts = []
    if gate.size_ratio:
        limit = Limit("size_ratio", ">=", gate.size_ratio.min, "percent")
        verdicts.append(limit.judge(before.size_bytes / after.size_bytes))
    if gate.latency_ratio:
        verdicts.append(_judge_latency_ratio(Limit("latency_ratio", ">=", gate.latency_ratio.min, "percent"), report))
    if gate.accuracy_drop:
        verdicts.append(_judge_accuracy_drop(gate.accuracy_drop.max, report))
    if gate.transfer_bytes:
        limit = Limit("transfer_bytes", "<=", gate.transfer_bytes.max, "bytes")
        verdicts.append(limit.judge(after.transfer_bytes))
    if gate.size_bytes:
        verdicts.append(Limit("size_bytes", "<=", gate.size_bytes.max, "bytes").judge(after.size_bytes))
    if gate.agreement:
        limit, fidelity = Limit("agreement", ">=", gate.agreement.min, "share"), report.rows[-1].fidelity
        verdicts.append(limit.judge(fidelity.agreement) if fidelity else limit.undecidable("no agreement was measured"))
    return tuple(verdicts)


def exit_code(verdicts: Sequence[Verdict]) -> Literal[0, 3, 4]:
    """0 if every limit is met, 3 if one is unmet, else 4 if one is undecidable; those of level `warn` do not count."""
    statuses = {verdict.status for verdict in verdicts if verdict.level == "error"}
    if "unmet" in statuses:
        return 3
    return 4 if "undecidable" in statuses else 0


def sentence(verdict: Verdict) -> str:
    """The verdict in words, such as `unmet: …` and, if nothing but a warning comes of it, `warning, unmet: …`."""
    warning = "warning, " if verdict.level == "warn" and verdict.status != "met" else ""
    return f"{warning}{verdict.status}: {verdict.message}"


def _judge_latency_ratio(limit: Limit, report: Report) -> Verdict:
    latency, session = report.rows[-1].latency, report.latency_session
    if latency is None or session is None:
        return limit.undecidable("no latency was measured")
    return limit.judge_timing(latency.interval, [session.noise])


def _judge_accuracy_drop(bound: float, report: Report) -> Verdict:
    if not report.metrics:
        return Limit("accuracy_drop", "<=", bound, "unit").undecidable("no metric was measured")
    first = report.metrics[0]
    limit = Limit("accuracy_drop", "<=", bound, "points" if first.unit == "%" else "unit")
    before, after = (row.measurement.metrics[first.name] for row in (report.rows[0], report.rows[-1]))
    drop = before - after if first.higher_is_better else after - before
    return limit.judge(drop, f"{first.name} {value(first, before)} to {value(first, after)}")
