"""The facts of a run, as frozen records that read and write JSON."""

import math
from collections.abc import Mapping
from itertools import pairwise
from typing import Annotated, Any, Literal, NamedTuple, TypeAlias

from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, PositiveInt, model_validator

_FROZEN = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)  # JSON has no such numbers

Level: TypeAlias = Literal["off", "warn", "error"]
"""What comes of a limit that is not met or cannot be decided."""

_Ratio: TypeAlias = Annotated[float, Field(ge=1e-9, le=1e9)]
"""Of two times; no two that were measured lie further apart, and its inverse is a number too."""


class Measurement(BaseModel):
    """What one model is, measured on its ONNX form under ONNX Runtime on the `test` split."""

    model_config = _FROZEN

    size_bytes: PositiveInt
    """The file with its external data."""
    transfer_bytes: PositiveInt
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


class Quality(BaseModel):
    """How good a classifier is on the `test` split, its outputs read as logits (N, C). Shares are in [0, 1]."""

    model_config = _FROZEN

    samples: int
    """Samples of the test split that count: those with the target -100 do not."""
    top_k: Mapping[int, float]
    """Share of samples whose class is among the k most probable, by k: 1 and, with more than 5 classes, 5."""
    macro_f1: float
    """F1 score, mean over the classes that occur among targets or predictions."""
    per_class_accuracy: tuple[float | None, ...] | None
    """Share of each class's samples that are right; None for a class without samples. None with over 1000 classes."""
    expected_calibration_error: float
    """Mean distance between confidence and accuracy, 15 bins of equal width (Guo et al. 2017)."""


class ClassFall(BaseModel):
    """A class whose samples are right less often than with the baseline."""

    model_config = _FROZEN

    target: int
    """Index of the class."""
    samples: int
    """Samples of this class in the test split."""
    baseline_accuracy: float
    accuracy: float


class SampleFall(BaseModel):
    """A test sample whose class is less probable than with the baseline."""

    model_config = _FROZEN

    index: int
    """Position in the test split, from 0."""
    target: int
    """Index of its class."""
    baseline_predicted: int
    predicted: int
    baseline_probability: float
    """Probability that the baseline gave `target`."""
    probability: float


class Fidelity(BaseModel):
    """How true a classifier stays to the baseline on the `test` split."""

    model_config = _FROZEN

    agreement: float
    """Share of samples, in [0, 1], for which both models name the same class."""
    kl_divergence: float
    """KL(baseline ‖ model) of the class probabilities at temperature 1, mean over samples, in nats."""
    worst_classes: tuple[ClassFall, ...]
    """Up to ten classes whose accuracy fell, the largest fall first."""
    worst_samples: tuple[SampleFall, ...]
    """Up to ten samples whose class lost probability, the largest fall first."""


class Interval(NamedTuple):
    """A measured number > 0 and the ends of the interval that holds the true one."""

    value: float
    low: float
    high: float

    @property
    def half_width(self) -> float:
        """Half of the interval on the logarithmic scale: about the relative error, 0.01 = 1 %."""
        return math.log(self.high / self.low) / 2


class Latency(BaseModel):
    """Time of one inference, and how it compares with the baseline timed beside it in the same session."""

    model_config = _FROZEN

    p50_ms: PositiveFloat
    """Median over all timed calls. Differs between machines and hours; compare `ratio` instead."""
    ratio: _Ratio
    """Baseline time / this model's time: 2.0 means twice as fast. Median of log-ratios, mean over rounds."""
    ratio_low: _Ratio
    """Lower end of the 95 % confidence interval of `ratio`, Student-t over rounds."""
    ratio_high: _Ratio

    @property
    def interval(self) -> Interval:
        """`ratio` with its ends."""
        return Interval(self.ratio, self.ratio_low, self.ratio_high)


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


class Reached(BaseModel):
    """What a setting asked of a stage, in numbers, and what came of it."""

    model_config = _FROZEN

    setting: str
    asked: float
    achieved: float


class MetricInfo(BaseModel):
    """How to show and judge one metric."""

    model_config = _FROZEN

    name: str
    unit: str
    higher_is_better: bool


class Deployment(BaseModel):
    """A float model, its int8 graph in PyTorch (simulated) and the file under ONNX Runtime (deployed), side by side."""

    model_config = _FROZEN

    samples: int
    """Of the validation split, evenly spaced, that each was run on."""
    metric: MetricInfo
    float_value: float
    simulated_value: float
    deployed_value: float
    sqnr_db: float | None
    """Power of the float outputs over that of what int8 changed in them, deployed; None if nothing did."""
    difference: float
    """Between simulated and deployed outputs, root mean square."""
    tolerance: float
    """The largest difference allowed: one quantum of the outputs."""
    agreement: float | None
    """Share of samples, in [0, 1], for which both name the same class; None for outputs that are no logits."""
    departures: float | None
    """Share of samples for which they do not although the logits of the two classes lie apart."""

    @property
    def drop(self) -> float:
        """How much worse than the float model's the deployed metric is; negative where it is better."""
        fall = self.float_value - self.deployed_value
        return fall if self.metric.higher_is_better else -fall


class Histogram(BaseModel):
    """Values of an activation in the float model, beside the range that uint8 gives it."""

    model_config = _FROZEN

    low: float
    """Where the range begins."""
    high: float
    counts: tuple[int, ...]
    """Of values in bins of equal width from `low` to `high`."""
    below: float
    """Share of the values, in [0, 1], that are below `low` and clipped to it."""
    above: float


class LayerNoise(BaseModel):
    """What int8 does to a layer, and the layer in int8 to the model, on validation samples."""

    model_config = _FROZEN

    layer: str
    sqnr_db: float | None
    """Of its outputs in the int8 model, with the noise of the layers before it; None if they are equal."""
    alone_sqnr_db: float | None
    """Of the model's outputs with this layer alone in int8."""
    alone_value: float
    """Of the metric with this layer alone in int8."""
    histogram: Histogram | None
    """Of its outputs; None if they are float."""


class PutBack(BaseModel):
    """A layer that went back to float, because the metric had fallen too far."""

    model_config = _FROZEN

    layer: str
    weights: Literal["int8", "float"]
    """Whether its weights are still stored as int8."""
    drop: float
    """How much worse than the float model's the simulated metric then was."""


class Fallback(BaseModel):
    """How layers went back to float until the fall of the metric was within a limit."""

    model_config = _FROZEN

    max_drop: float
    stopped: Literal["reached", "time", "nothing left"]
    """What ended the search: the limit holds, `max_minutes` are over, or no layer is left."""
    steps: tuple[PutBack, ...]
    """In the order in which they were tried; the model has the first `kept` of them."""
    kept: int
    before: Deployment
    """All int8."""
    added_bytes: int
    """What the file grew by."""
    latency_ratio: float
    """Time of the model all in int8 / time of this one: 0.8 means that it is slower by a quarter."""


class Quantization(BaseModel):
    """What int8 did to a model, measured on the `validation` split."""

    model_config = _FROZEN

    deployment: Deployment
    layers: tuple[LayerNoise, ...] = ()
    """In the order of the model; none unless it was analysed."""
    layer_samples: int = 0
    """Validation samples that `layers` were measured on."""
    fallback: Fallback | None = None


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


class Preparation(BaseModel):
    """A stage that kept the model and added something to it, such as soft labels."""

    model_config = _FROZEN

    stage: str
    settings: Mapping[str, Any]
    key: str
    seconds: float
    reused: bool


class GroupCurve(BaseModel):
    """The value of a metric as one group of coupled layers loses channels, and no other does."""

    model_config = _FROZEN

    channels: PositiveInt
    """Of the uncut group."""
    values: tuple[float, ...]
    """One for each ratio."""


class Sensitivity(BaseModel):
    """How much each group of a model matters: a metric on the `validation` split while that group alone is cut.

    The channels with the smallest scores leave; nothing is trained again.
    """

    model_config = _FROZEN

    schema_version: Literal[1] = 1
    model: str
    """SHA-256 of the model: its weights and what it is built from."""
    criterion: str
    """What scores the channels."""
    metric: MetricInfo
    samples: PositiveInt
    """Of the validation split, evenly spaced, that were evaluated."""
    ratios: tuple[float, ...] = Field(min_length=1)
    """Shares of its channels that a group lost, in (0, 1), rising."""
    value: float
    """Of the uncut model."""
    groups: Mapping[str, GroupCurve] = Field(min_length=1)
    """By path of the layer that names the group, in the order of the model."""

    @model_validator(mode="after")
    def _check(self) -> "Sensitivity":
        rising = all(low < high for low, high in pairwise((0, *self.ratios, 1)))
        if not rising or any(len(curve.values) != len(self.ratios) for curve in self.groups.values()):
            msg = "ratios must rise within (0, 1), and each group must have a value for each"
            raise ValueError(msg)
        return self

    def falls(self, path: str) -> tuple[float, ...]:
        """How much worse than uncut the metric is at each ratio of the group `path`; negative where it is better."""
        sign = 1 if self.metric.higher_is_better else -1
        return tuple(sign * (self.value - found) for found in self.groups[path].values)


class Verdict(BaseModel):
    """One limit of a gate and what became of it."""

    model_config = _FROZEN

    metric: str
    limit: str
    """As written: `>= 10`."""
    status: Literal["met", "unmet", "undecidable"]
    message: str
    """What was found and, unless met, by how much it falls short or why it cannot be decided."""
    level: Level = "error"
    """What comes of it unless it is met: a warning, or an exit code. Those that are `off` are not told."""


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
