"""What a model is, measured on its ONNX form under ONNX Runtime; speed is measured elsewhere."""

import math
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor

from compressor.artifact import OnnxModel
from compressor.errors import StageError
from compressor.onnx_facts import read_facts
from compressor.report.records import Measurement
from compressor.task import Inputs, Task, evaluate


def measure(path: Path, task: Task) -> Measurement:
    """Measure the ONNX file at `path` on the test split, on all cores.

    MACs are for the first example input. Raises InputError if the file is not a model that can be read and run,
    StageError if it gives an output or a metric that is not a finite number.
    """
    facts = read_facts(path, [tensor[:1].numpy() for tensor in task.example_inputs])
    metrics = evaluate(task.metrics, _finite(OnnxModel(path).predict, path), task.test)
    for name, value in metrics.items():
        if not math.isfinite(value):
            last = len(task.test) - 1
            msg = f"metric {name!r} must be a finite number, got {value} on test samples 0 to {last} ({path})"
            raise StageError(msg)
    return Measurement(**asdict(facts), metrics=metrics, samples=len(task.test))


def _finite(predict: Callable[[Inputs], Tensor], path: Path) -> Callable[[Inputs], Tensor]:
    """Wrap `predict`, called on batches in order, so that it raises StageError for outputs that are not finite."""
    first = 0

    def predict_finite(inputs: Inputs) -> Tensor:
        nonlocal first
        outputs = predict(inputs)
        end = first + len(inputs[0])
        if not torch.isfinite(outputs).all():
            msg = f"outputs must be finite numbers, found NaN or infinity on test samples {first} to {end - 1} ({path})"
            raise StageError(msg)
        first = end
        return outputs

    return predict_finite
