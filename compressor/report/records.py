"""The facts of a run, as frozen records that read and write JSON."""

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

_FROZEN = ConfigDict(frozen=True, extra="forbid")


class Measurement(BaseModel):
    """What one model is, measured on its ONNX form under ONNX Runtime on the `test` split."""

    model_config = _FROZEN

    size_bytes: int
    """The file with its external data."""
    transfer_bytes: int
    """The same bytes after gzip at level 9."""
    parameters: int
    """Stored weights and biases, without scales and zero points."""
    nonzero: int
    """Parameters that are not zero."""
    macs: int
    """Multiply-accumulates of convolutions and matrix products for one sample. Not a measure of speed."""
    metrics: Mapping[str, float]
    """Value by metric name, in the order of the task."""
    samples: int
    """Length of the test split."""


class Latency(BaseModel):
    """Time of one inference, and how it compares with the baseline timed beside it in the same session."""

    model_config = _FROZEN

    p50_ms: float
    """Median over all timed calls. Differs between machines and hours; compare `ratio` instead."""
    ratio: float
    """Baseline time / this model's time: 2.0 means twice as fast. Median of log-ratios, mean over rounds."""
    ratio_low: float
    """Lower end of the 95 % confidence interval of `ratio`, Student-t over rounds."""
    ratio_high: float


class LatencySession(BaseModel):
    """How the latencies of a report were taken, and how much of a difference the machine's noise makes."""

    model_config = _FROZEN

    batch_size: int
    threads: int
    rounds: int
    calls: int
    """Timed calls of each model, all rounds together."""
    seconds: float
    noise: Latency
    """The baseline timed against a second session of itself: its interval is the noise floor."""


class Row(BaseModel):
    """One model of the chain: what made it and what it is."""

    model_config = _FROZEN

    stage: str
    settings: Mapping[str, Any]
    key: str
    """Content key in the store."""
    model_file: str
    """The ONNX file that was measured, relative to the run directory."""
    measurement: Measurement
    latency: Latency | None
    seconds: float
    """What the stage took when it was computed."""
    reused: bool
    """Whether this run took the model from the store."""


class MetricInfo(BaseModel):
    """How to show and judge one metric."""

    model_config = _FROZEN

    name: str
    unit: str
    higher_is_better: bool


class Verdict(BaseModel):
    """One limit of a gate and what became of it."""

    model_config = _FROZEN

    metric: str
    limit: str
    """As written: `>= 10`."""
    status: Literal["met", "unmet", "undecidable"]
    message: str
    """What was found and, unless met, by how much it falls short or why it cannot be decided."""


class Report(BaseModel):
    """Everything a run found. `rows[0]` is the baseline; the last row is what the run delivers."""

    model_config = _FROZEN

    schema_version: Literal[1] = 1
    pipeline: str
    settings: Mapping[str, Any]
    """The pipeline as run, overrides included."""
    overrides: tuple[str, ...]
    """The `--set` arguments, as given."""
    metrics: tuple[MetricInfo, ...]
    rows: tuple[Row, ...]
    latency_session: LatencySession | None
    environment: Mapping[str, Any]
    """Machine, versions, threads, seed."""
    verdicts: tuple[Verdict, ...]
