"""Layers go back to float, the noisiest first, until an int8 model is good enough."""

import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias

from compressor.measure.latency import time_models
from compressor.models.artifact import OnnxModel, TorchModel
from compressor.quantization.analysis import sqnr_db
from compressor.quantization.deployment import deploy
from compressor.quantization.int8_model import Int8Model, predict
from compressor.records.int8 import Deployment, Fallback, LayerNoise, PutBack, worst_first
from compressor.task import EVALUATION_BATCH, Task, evaluate_outputs, evenly_spaced, gather
from compressor.verdicts.limit import at_most

Quantize: TypeAlias = Callable[[Collection[str], Collection[str]], Int8Model]
"""From the layers to keep in float, and those of which the weights alone become int8, to an int8 model."""

_QUIETER_DB = 6.0
"""A layer whose weights alone are int8 must have a quarter of the noise at most, or its weights become float too."""
_FEW_SAMPLES = 64
TIMING_SECONDS = 5.0
"""Most seconds that each of two models is timed."""


@dataclass(frozen=True)
class Candidate:
    """An int8 model, its file, and how the two compare with the float model."""

    int8: Int8Model
    onnx: OnnxModel
    deployment: Deployment


@dataclass(frozen=True)
class Limits:
    """What ends the search."""

    max_drop: float
    """Largest fall of the task's first metric, in its own unit, as in the gate `accuracy_drop`."""
    max_minutes: float | None


def put_back(
    first: Candidate,
    layers: Sequence[LayerNoise],
    limits: Limits,
    *,
    quantize: Quantize,
    model: TorchModel,
    task: Task,
    rows: Sequence[int],
    work_dir: Path,
    log: Callable[[str], None],
) -> tuple[Candidate, Fallback]:
    """Return the first model within the limits, or else the best one, and how the search went.

    One layer more is put back at a time, in the order of the noise that each alone makes in the outputs. It computes in
    float; its weights stay int8 in the file, unless their rounding alone makes more than a quarter of the noise.
    Each model is judged in PyTorch on the samples `rows` of the validation split, and one that holds there, under ONNX
    Runtime.
    """
    start = time.monotonic()
    steps: list[PutBack] = []
    best, best_drop, best_steps = first.int8, _fall(first.deployment, first.deployment.simulated_value), 0
    stopped: Literal["reached", "time", "nothing left"] = "nothing left"
    for int8, step in _attempts(first, layers, quantize, task, rows):
        steps.append(step)
        log(f"{step.layer} in float, its weights {step.weights}: {task.metrics[0].name} falls by {step.drop:.4g}")
        if step.drop < best_drop:
            best, best_drop, best_steps = int8, step.drop, len(steps)
        if at_most(step.drop, limits.max_drop):
            candidate = _deploy(int8, model, task, work_dir / str(len(steps)), rows)
            if at_most(candidate.deployment.drop, limits.max_drop):
                return candidate, _describe(
                    first, candidate, limits, task, stopped="reached", steps=steps, kept=len(steps)
                )
        if limits.max_minutes is not None and time.monotonic() - start > 60 * limits.max_minutes:
            stopped = "time"
            break
    candidate = first if best_steps == 0 else _deploy(best, model, task, work_dir / "best", rows)
    return candidate, _describe(first, candidate, limits, task, stopped=stopped, steps=steps, kept=best_steps)


def _attempts(
    first: Candidate, layers: Sequence[LayerNoise], quantize: Quantize, task: Task, rows: Sequence[int]
) -> Iterator[tuple[Int8Model, PutBack]]:
    """Yield the model with one layer more in float at a time, and what that was worth."""
    kept: list[str] = []
    stored: list[str] = []
    int8 = first.int8
    for layer in worst_first(layers):
        if layer.layer not in int8.plan.layers:  # another one that went back took it along
            continue
        keeps = _keeps_int8_weights(layer, layers, first.int8, quantize, task)
        (stored if keeps else kept).append(layer.layer)
        int8 = quantize(kept, stored)
        drop = _fall(first.deployment, _value(int8, task, rows))
        yield int8, PutBack(layer=layer.layer, weights="int8" if keeps else "float", drop=drop)


def _keeps_int8_weights(
    layer: LayerNoise,
    layers: Sequence[LayerNoise],
    int8: Int8Model,
    quantize: Quantize,
    task: Task,
) -> bool:
    """Whether rounding the layer's weights to eight bits makes little of the noise that the layer makes in int8."""
    if not any(unit.weight is not None and unit.inputs for unit in int8.plan.units if unit.layer == layer.layer):
        return False
    others = [other.layer for other in layers if other.layer != layer.layer]
    alone = quantize(others, [layer.layer])
    inputs = gather(task.validation, evenly_spaced(task.validation, _FEW_SAMPLES)).inputs
    noise = sqnr_db([predict(alone.int8_graph, inputs)], [predict(alone.graph, inputs)])
    return noise is None or layer.alone_sqnr_db is None or noise >= layer.alone_sqnr_db + _QUIETER_DB


def _value(int8: Int8Model, task: Task, rows: Sequence[int]) -> float:
    batches = (
        gather(task.validation, rows[start : start + EVALUATION_BATCH])
        for start in range(0, len(rows), EVALUATION_BATCH)
    )
    pairs = ((predict(int8.int8_graph, batch.inputs), batch.targets) for batch in batches)
    return evaluate_outputs(task.metrics[:1], pairs)[task.metrics[0].name]


def _fall(deployment: Deployment, value: float) -> float:
    """How much worse than the float model's a value of the metric is."""
    return deployment.model_copy(update={"deployed_value": value}).drop


def _deploy(int8: Int8Model, model: TorchModel, task: Task, directory: Path, rows: Sequence[int]) -> Candidate:
    directory.mkdir(exist_ok=True)
    return Candidate(int8, *deploy(int8, model.predict, task, directory / "model.onnx", rows))


def _describe(
    first: Candidate,
    last: Candidate,
    limits: Limits,
    task: Task,
    *,
    stopped: Literal["reached", "time", "nothing left"],
    steps: Sequence[PutBack],
    kept: int,
) -> Fallback:
    """Record how the search ended, and what its result costs beside the model that is int8 throughout."""
    before, after = (sum(file.stat().st_size for file in one.onnx.files) for one in (first, last))
    ratio = 1.0
    if last is not first:
        inputs = [tensor[:1].numpy() for tensor in task.example_inputs]
        (_, latency), _ = time_models((first.onnx.path, last.onnx.path), inputs=inputs, max_seconds=TIMING_SECONDS)
        ratio = latency.ratio
    return Fallback(
        max_drop=limits.max_drop,
        stopped=stopped,
        steps=tuple(steps),
        kept=kept,
        before=first.deployment,
        added_bytes=after - before,
        latency_ratio=ratio,
    )
