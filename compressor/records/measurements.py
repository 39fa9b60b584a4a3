"""What was measured of a model and of the machine, as frozen records; `Record` is the base of every record."""

import math
from collections.abc import Mapping
from typing import Annotated, NamedTuple, TypeAlias

from pydantic import BaseModel, ConfigDict, Field

_MOST = 2**63 - 1
Count: TypeAlias = Annotated[int, Field(ge=0, le=_MOST)]
"""A number of things in a model or a session, or the index of one, bounded so that sums and ratios of it are finite."""
Bytes: TypeAlias = Annotated[int, Field(ge=1, le=_MOST)]
_Milliseconds: TypeAlias = Annotated[float, Field(ge=1e-9, le=1e12)]
_Ratio: TypeAlias = Annotated[float, Field(ge=1e-9, le=1e9)]
"""Of two times. No two that were measured lie further apart, and the inverse is in the same bounds."""


class Record(BaseModel):
    """Facts that are not changed, by known names alone, and that JSON holds: it has no infinity and no NaN."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class MetricInfo(Record):
    """How to show and judge one metric."""

    name: str
    unit: str
    higher_is_better: bool


class Measurement(Record):
    """What one model is, measured on its ONNX form under ONNX Runtime on the `test` split."""

    size_bytes: Bytes
    """The file with its external data."""
    transfer_bytes: Bytes
    """The same bytes after gzip at level 9."""
    parameters: Count
    """Stored weights and biases, without scales and zero points."""
    nonzero: Count
    """Parameters that are not zero."""
    macs: Count
    """Multiply-accumulates of convolutions and matrix products for one sample. Not a measure of speed."""
    metrics: Mapping[str, float]
    """Value by metric name, in the order of the task."""
    samples: Count
    """Length of the test split."""


class Quality(Record):
    """How good a classifier is on the `test` split, its outputs read as logits (N, C). Shares are in [0, 1]."""

    samples: Count
    """Samples of the test split that count: those with the target -100 do not."""
    top_k: Mapping[int, float]
    """Share of samples whose class is among the k most probable, by k: 1 and, with more than 5 classes, 5."""
    macro_f1: float
    """F1 score, mean over the classes that occur among targets or predictions."""
    per_class_accuracy: tuple[float | None, ...] | None
    """Share of each class's samples that are right; None for a class without samples. None with over 1000 classes."""
    expected_calibration_error: float
    """Mean distance between confidence and accuracy, 15 bins of equal width (Guo et al. 2017)."""


class ClassFall(Record):
    """A class whose samples are right less often than with the baseline."""

    target: Count
    """Index of the class."""
    samples: Count
    """Samples of this class in the test split."""
    baseline_accuracy: float
    accuracy: float


class SampleFall(Record):
    """A test sample whose class is less probable than with the baseline."""

    index: Count
    """Position in the test split, from 0."""
    target: Count
    """Index of its class."""
    baseline_predicted: Count
    predicted: Count
    baseline_probability: float
    """Probability that the baseline gave `target`."""
    probability: float


class Fidelity(Record):
    """How true a classifier stays to the baseline on the `test` split."""

    agreement: float
    """Share of samples, in [0, 1], for which both models name the same class."""
    kl_divergence: float
    """KL(baseline ‖ model) of the class probabilities at temperature 1, mean over samples, in nats."""
    worst_classes: tuple[ClassFall, ...]
    """Up to ten classes whose accuracy fell, the largest fall first."""
    worst_samples: tuple[SampleFall, ...]
    """Up to ten samples whose class lost probability, the largest fall first."""


class Interval(NamedTuple):
    """A measured number > 0 and the ends of an interval for the true one."""

    value: float
    low: float
    high: float

    @property
    def half_width(self) -> float:
        """Half of the interval on the logarithmic scale: about the relative error, 0.01 = 1 %."""
        return math.log(self.high / self.low) / 2

    @property
    def distance(self) -> float:
        """How far from 1 the farther end lies, on the logarithmic scale: of a noise floor, what noise alone can do."""
        return max(abs(math.log(self.low)), abs(math.log(self.high)))


class Latency(Record):
    """Time of one inference, and how it compares with the baseline timed beside it in the same session."""

    p50_ms: _Milliseconds
    """Median over all timed calls. Differs between machines and hours; compare `ratio` instead."""
    ratio: _Ratio
    """Baseline time / this model's time: 2.0 means twice as fast. Of the fastest calls of a round; geometric mean of
    all rounds. Not the ratio of medians."""
    ratio_low: _Ratio
    """Lower end of the 95 % confidence interval of `ratio`, Student-t over rounds."""
    ratio_high: _Ratio

    @property
    def interval(self) -> Interval:
        """`ratio` with its ends."""
        return Interval(self.ratio, self.ratio_low, self.ratio_high)


class LatencySession(Record):
    """How the latencies of a report were taken, and how much of a difference the machine's noise makes."""

    batch_size: Count
    threads: Count
    rounds: Count
    calls: Count
    """Timed calls of each model, all rounds together."""
    seconds: float
    noise: Latency
    """The baseline timed against a second session of itself: its interval is the noise floor."""
