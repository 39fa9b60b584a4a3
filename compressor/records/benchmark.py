"""ONNX files side by side: the record of a benchmark."""

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field, model_validator

from compressor.records.measurements import Latency, LatencySession, Record


class BenchmarkFile(Record):
    """One ONNX file."""

    name: str
    """Of the file, after as many of its directories as tell it from the others."""
    size_bytes: int
    """The file with its external data."""
    transfer_bytes: int
    """The same bytes after gzip at level 9."""
    parameters: int | None
    """Stored weights and biases, without scales and zero points; None if they cannot be counted."""
    macs: int | None
    """Multiply-accumulates of one inference of the first batch that was timed; None if they cannot be counted."""
    uncounted: str | None
    """Why parameters or MACs are None."""


class Timing(Record):
    """All files timed side by side with one batch and one number of threads."""

    inputs: Mapping[str, str]
    """Type and shape of each input, by its name in the baseline."""
    latencies: tuple[Latency, ...]
    """Of each candidate, in order."""
    session: LatencySession


class Benchmark(Record):
    """Everything a benchmark found. `candidates[0]` is the baseline."""

    schema_version: Literal[1] = 1
    candidates: tuple[BenchmarkFile, ...] = Field(min_length=1)
    timings: tuple[Timing, ...] = Field(min_length=1)
    environment: Mapping[str, Any]
    """Machine and versions."""

    @model_validator(mode="after")
    def _check(self) -> "Benchmark":
        if any(len(timing.latencies) != len(self.candidates) for timing in self.timings):
            msg = "each timing must have a latency for each candidate"
            raise ValueError(msg)
        return self
