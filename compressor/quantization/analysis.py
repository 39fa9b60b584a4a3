"""Which layers int8 hurts: each measured in the int8 model, and alone in int8 in a model that is float otherwise."""

from collections.abc import Sequence

import torch
from torch import Tensor

from compressor.quantization.calibration import observe
from compressor.quantization.codes import CODES, Affine
from compressor.quantization.int8_model import Int8Model, predict, ratio_db, round_outputs
from compressor.records.int8 import Distribution, LayerNoise
from compressor.task import Batch, Task, evaluate_outputs, evenly_spaced, gather

SAMPLES = 256
"""Of the validation split, evenly spaced, at most. Noise is a mean over all outputs, so few samples are enough for it.
They are too few for what one layer does to the metric: so layers are ordered by noise."""
BINS = 32
_BATCH_SIZE = 64


def analyse(model: Int8Model, task: Task) -> tuple[tuple[LayerNoise, ...], int]:
    """Measure each layer of the plan, in its order; the second value is the number of validation samples used.

    This costs a run of the model per layer, and two more that keep the outputs of all layers for 64 samples at a time.
    """
    rows = evenly_spaced(task.validation, SAMPLES)
    batches = [gather(task.validation, rows[start : start + _BATCH_SIZE]) for start in range(0, len(rows), _BATCH_SIZE)]
    floats = [predict(model.graph, batch.inputs) for batch in batches]
    noise, histograms = _observe_outputs(model, task, rows)

    def measure(layer: str, tensor: str) -> LayerNoise:
        alone = model.with_one(layer).int8_graph
        outputs = [predict(alone, batch.inputs) for batch in batches]
        return LayerNoise(
            layer=layer,
            sqnr_db=ratio_db(*noise[tensor]),
            alone_sqnr_db=sqnr_db(outputs, floats),
            alone_value=_value(outputs, batches, task),
            histogram=histograms.get(tensor),
        )

    return tuple(measure(layer, tensor) for layer, tensor in model.outputs().items()), len(rows)


def sqnr_db(outputs: Sequence[Tensor], reference: Sequence[Tensor]) -> float | None:
    """Signal-to-quantization-noise ratio: the power of `reference` over that of the noise; None without noise."""
    pairs = [(found.double(), wanted.double()) for found, wanted in zip(outputs, reference, strict=True)]
    signal = sum(float(wanted.square().sum()) for _, wanted in pairs)
    return ratio_db(signal, sum(float((found - wanted).square().sum()) for found, wanted in pairs))


def histogram(counts: Tensor, ends: tuple[float, float]) -> Distribution:
    """Tell of counts, (BINS + 2,), whose first is of values below the range and the last above it."""
    below, *within, above = (int(count) for count in counts)
    total = below + sum(within) + above
    return Distribution(low=ends[0], high=ends[1], counts=tuple(within), below=below / total, above=above / total)


def _observe_outputs(
    model: Int8Model, task: Task, rows: Sequence[int]
) -> tuple[dict[str, tuple[float, float]], dict[str, Distribution]]:
    """Power of each layer's output and of its noise, and histograms, by name of the tensor."""
    tensors = list(dict.fromkeys(model.outputs().values()))
    named = round_outputs(model.int8_graph)
    read = [named.get(tensor, tensor) for tensor in tensors]
    ends = {tensor: _ends(model.affines[tensor]) for tensor in tensors if tensor in model.plan.activations}
    powers = {tensor: torch.zeros(2, dtype=torch.float64) for tensor in tensors}
    counts = {tensor: torch.zeros(BINS + 2) for tensor in ends}
    before = observe(model.graph, tensors, task.validation, rows)
    after = observe(model.int8_graph, read, task.validation, rows)
    for floats, codes in zip(before, after, strict=True):
        for tensor, name in zip(tensors, read, strict=True):
            wanted = floats[tensor].double()
            powers[tensor] += torch.stack([wanted.square().sum(), (codes[name].double() - wanted).square().sum()])
        for tensor, own_ends in ends.items():
            counts[tensor] += _counts(floats[tensor], own_ends)
    pairs = {tensor: (float(signal), float(noise)) for tensor, (signal, noise) in powers.items()}
    return pairs, {tensor: histogram(counts[tensor], ends[tensor]) for tensor in ends}


def _ends(affine: Affine) -> tuple[float, float]:
    """Values of the first and the last code."""
    return -affine.zero_point * affine.scale, (CODES - affine.zero_point) * affine.scale


def _counts(values: Tensor, ends: tuple[float, float]) -> Tensor:
    edges = torch.linspace(*ends, BINS + 1)
    # values that round to the first or last code are not clipped
    slack = (ends[1] - ends[0]) / CODES / 2
    edges[0], edges[-1] = edges[0] - slack, edges[-1] + slack
    return torch.bincount(torch.bucketize(values.flatten(), edges), minlength=BINS + 2).float()


def _value(outputs: Sequence[Tensor], batches: Sequence[Batch], task: Task) -> float:
    pairs = zip(outputs, (batch.targets for batch in batches), strict=True)
    return float(evaluate_outputs(task.metrics[:1], pairs)[task.metrics[0].name])
