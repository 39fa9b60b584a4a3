"""What a model is, measured on its ONNX form under ONNX Runtime; speed is measured elsewhere."""

import math
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor

from compressor.errors import StageError
from compressor.measure.quality import Predictions, is_classification
from compressor.models.artifact import OnnxModel
from compressor.models.output_kind import outputs_of
from compressor.onnx_files.facts import read_facts
from compressor.records.measurements import Measurement
from compressor.task import EVALUATION_BATCH, Split, Task, batches, evaluate_outputs

_Pair: TypeAlias = tuple[Tensor, Tensor]
"""Outputs, (N, …), and targets, (N, …), of a batch."""

_INTEGERS = {torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8}


@dataclass(frozen=True)
class Measured:
    """A measurement and what the model said of each test sample, in float32; None if the task is no classification."""

    measurement: Measurement
    predictions: Predictions | None


def measure(path: Path, task: Task) -> Measured:
    """Measure the ONNX file at `path` in one pass over the test split, on all cores.

    MACs are for the first example input. Raises InputError if the file is not a model that can be read and run,
    StageError if it gives an output or a metric that is not a finite number.
    """
    facts = read_facts(path, [tensor[:1].numpy() for tensor in task.example_inputs])
    kept: list[_Pair] = []
    metrics = evaluate_outputs(task.metrics, _keeping(_outputs(path, task.test), kept))
    for name, value in metrics.items():
        if not math.isfinite(value):
            last = len(task.test) - 1
            msg = f"metric {name!r} must be a finite number, got {value} on test samples 0 to {last} ({path})"
            raise StageError(msg)
    measurement = Measurement(**asdict(facts), metrics=metrics, samples=len(task.test))
    return Measured(measurement, _predictions(kept, task))


def _outputs(path: Path, split: Split) -> Iterator[_Pair]:
    """Run the model on `split` in order. Raises StageError for outputs that are not finite."""
    model, first = OnnxModel(path), 0
    for batch in batches(split, EVALUATION_BATCH):
        outputs, end = model.predict(batch.inputs), first + len(batch.targets)
        if not torch.isfinite(outputs).all():
            msg = f"outputs must be finite numbers, found NaN or infinity on test samples {first} to {end - 1} ({path})"
            raise StageError(msg)
        first = end
        yield outputs, batch.targets


def _keeping(pairs: Iterable[_Pair], kept: list[_Pair]) -> Iterator[_Pair]:
    """Pass `pairs` on and append to `kept` those of a shape and type that a classifier and its labels have."""
    for outputs, targets in pairs:
        if outputs.is_floating_point() and outputs.ndim == 2 and targets.dtype in _INTEGERS and targets.ndim == 1:
            # a float64 beyond the range of float32 becomes its end, not infinity
            kept.append((torch.nan_to_num(outputs.float()), targets))
        yield outputs, targets


def _predictions(kept: list[_Pair], task: Task) -> Predictions | None:
    """Join batches; None unless they are all of the test split, and outputs are classes."""
    if sum(len(targets) for _, targets in kept) != len(task.test) or len({found.shape[1] for found, _ in kept}) != 1:
        return None
    outputs = outputs_of(task, *kept[0])
    if outputs.kind != "classes":
        return None
    logits = np.concatenate([outputs.as_logits(found).numpy() for found, _ in kept])
    predictions = Predictions(logits, np.concatenate([targets.numpy() for _, targets in kept]).astype(np.int64))
    return predictions if is_classification(predictions) else None
