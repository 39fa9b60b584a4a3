"""The report of a run, as frozen records that read and write JSON."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, TypeAlias

from pydantic import Field, PositiveInt, model_validator

from compressor.records.findings import Reached
from compressor.records.int8 import Quantization
from compressor.records.measurements import Fidelity, Latency, LatencySession, Measurement, MetricInfo, Quality, Record
from compressor.records.step_facts import StepFacts

Level: TypeAlias = Literal["off", "warn", "error"]
"""What comes of a limit that is not met or cannot be decided."""


class Row(Record):
    """One model of the chain: what made it and what it is."""

    stage: str
    settings: Mapping[str, Any]
    key: str
    """Content key in the store."""
    model_file: str
    """The ONNX file that was measured, relative to the run directory."""
    measurement: Measurement
    quality: Quality | None = None
    """None for a task that is no classification: outputs (N, C), C >= 2, and integer targets (N,)."""
    fidelity: Fidelity | None = None
    """None for the baseline and wherever one of the two models has no `quality`."""
    latency: Latency | None
    seconds: float
    """What the stage took when it was computed."""
    reused: bool
    """Whether this run took the model from the store."""
    losses: tuple[Mapping[str, float], ...] = ()
    """Mean of each loss by name, epoch by epoch, if the stage trained."""
    reached: tuple[Reached, ...] = ()
    """Of a stage that was asked for a number, such as a pruning ratio."""
    quantization: Quantization | None = None
    """Of a stage that made the model int8."""
    channels: Mapping[str, PositiveInt] = {}
    """Output channels of each layer with weights, by path; none for a model that is an ONNX file."""


class Preparation(Record):
    """A stage that kept the model and added something to it, such as soft labels."""

    stage: str
    settings: Mapping[str, Any]
    key: str
    seconds: float
    reused: bool


class Verdict(Record):
    """One limit of a gate and what became of it."""

    metric: str
    limit: str
    """As written: `>= 10`."""
    status: Literal["met", "unmet", "undecidable"]
    message: str
    """What was found and, unless met, by how much it falls short or why it cannot be decided."""
    level: Level = "error"
    """What comes of it unless it is met: a warning, or an exit code. Those that are `off` are not told."""


class Report(Record):
    """Everything a run found. `rows[0]` is the baseline; the last row is what the run delivers."""

    schema_version: Literal[1] = 1
    pipeline: str
    settings: Mapping[str, Any]
    """The pipeline as run, overrides included."""
    overrides: tuple[str, ...]
    """The `--set` arguments, as given."""
    metrics: tuple[MetricInfo, ...]
    labels: tuple[str, ...] = ()
    """Names of the classes in order of index; none if the task gives none, or more than 1000."""
    rows: tuple[Row, ...] = Field(min_length=1)
    preparations: tuple[Preparation, ...] = ()
    latency_session: LatencySession | None
    environment: Mapping[str, Any]
    """Machine, versions, threads, seed."""
    verdicts: tuple[Verdict, ...]

    @model_validator(mode="after")
    def _check(self) -> "Report":
        if any(metric.name not in row.measurement.metrics for row in self.rows for metric in self.metrics):
            msg = "every row must have a value of every metric"
            raise ValueError(msg)
        return self


def make_row(
    facts: StepFacts, *, settings: Mapping[str, Any], key: str, model_file: Path, latency: Latency, reused: bool
) -> Row:
    """Put what is known of a step that gave a model, and how fast that model is, into a row."""
    assert facts.model is not None, facts.stage
    return Row(
        stage=facts.stage,
        settings=settings,
        key=key,
        model_file=model_file.as_posix(),
        measurement=facts.model.measurement,
        quality=facts.model.quality,
        fidelity=facts.model.fidelity,
        latency=latency,
        seconds=facts.seconds,
        reused=reused,
        losses=facts.findings.losses,
        reached=facts.findings.reached,
        quantization=facts.findings.quantization,
        channels=facts.model.channels,
    )
