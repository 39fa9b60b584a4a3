"""What int8 did to a model, as frozen records that read and write JSON."""

import math
from collections.abc import Sequence
from typing import Literal

from compressor.records.findings import Finding
from compressor.records.measurements import MetricInfo, Record


class Deployment(Record):
    """A float model, its int8 graph in PyTorch (simulated) and the file under ONNX Runtime (deployed), side by side."""

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
    """The largest difference allowed: one quantum of the outputs, or twice `rounding_difference`."""
    rounding_difference: float | None = None
    """What the outputs in PyTorch move by, root mean square, when sums are rounded otherwise; None unless it is needed,
    as the difference is more than one quantum."""
    agreement: float | None
    """Share of samples, in [0, 1], for which both name the same class; None for outputs that are no logits."""
    departures: float | None
    """Share of samples for which the two name different classes, although the logits of these classes lie apart."""

    @property
    def drop(self) -> float:
        """How much worse than the float model's the deployed metric is; negative where it is better."""
        fall = self.float_value - self.deployed_value
        return fall if self.metric.higher_is_better else -fall


class Distribution(Record):
    """Values of an activation in the float model, beside the range that uint8 gives it."""

    low: float
    """Where the range begins."""
    high: float
    counts: tuple[int, ...]
    """Of values in bins of equal width from `low` to `high`."""
    below: float
    """Share of the values, in [0, 1], that are below `low` and clipped to it."""
    above: float


class LayerNoise(Record):
    """What int8 does to a layer, and the layer in int8 to the model, on validation samples."""

    layer: str
    sqnr_db: float | None
    """Of its outputs in the int8 model, with the noise of the layers before it; None if they are equal."""
    alone_sqnr_db: float | None
    """Of the model's outputs with this layer alone in int8."""
    alone_value: float
    """Of the metric with this layer alone in int8."""
    histogram: Distribution | None
    """Of its outputs; None if they are float."""


def worst_first(layers: Sequence[LayerNoise]) -> list[LayerNoise]:
    """Order layers by what each alone does to the model's outputs, the most noise first."""
    return sorted(layers, key=lambda layer: math.inf if layer.alone_sqnr_db is None else layer.alone_sqnr_db)


class PutBack(Record):
    """A layer that went back to float, because the metric had fallen too far."""

    layer: str
    weights: Literal["int8", "float"]
    """Whether its weights are still stored as int8."""
    drop: float
    """How much worse than the float model's the simulated metric then was."""


class Fallback(Record):
    """How layers went back to float until the fall of the metric was within a limit."""

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


class Quantization(Finding):
    """What int8 did to a model, measured on the `validation` split."""

    deployment: Deployment
    layers: tuple[LayerNoise, ...] = ()
    """In the order of the model; none unless it was analysed."""
    layer_samples: int = 0
    """Validation samples that `layers` were measured on."""
    fallback: Fallback | None = None
