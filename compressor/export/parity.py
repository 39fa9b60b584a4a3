"""How far a model's outputs are from what they should be, on samples of the task."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from compressor.errors import StageError
from compressor.models.artifact import OnnxModel
from compressor.models.outputs import relative_error
from compressor.task import Inputs, Split, evenly_spaced, gather

SAMPLES = 64

FLOAT_TOLERANCE = 1e-4
"""Largest `relative_error` of a float model: sums in another order make about 1e-6, a wrong operator 1e-2 and more."""
SAME_GRAPH_TOLERANCE = 1e-6
"""Largest `relative_error` between two files that hold one graph with other metadata."""


def check_parity(model: OnnxModel, reference: Callable[[Inputs], Tensor], split: Split, *, tolerance: float) -> None:
    """Compare the outputs of `model` and `reference`. Raises StageError if `output_error` is above `tolerance`.

    Outputs that are not finite are an error of their own: then neither the exporter nor ONNX Runtime is at fault.
    """
    error = output_error(model, reference, split)
    if math.isnan(error):
        msg = (
            f"outputs of {model.path.name} must be finite numbers on the validation split, found NaN or infinity; look "
            "at its samples and at the weights"
        )
        raise StageError(msg)
    if not error <= tolerance:
        msg = (
            f"outputs of {model.path.name} must have a relative error of at most {tolerance:g} on the validation "
            f"split, got {error:.3g}; look in forward for randomness and for Python numbers that depend on the inputs"
        )
        raise StageError(msg)


def output_error(model: OnnxModel, reference: Callable[[Inputs], Tensor], split: Split) -> float:
    """`relative_error` of a model's outputs on samples spread over `split`, in batches of one, of two and of the rest.

    Raises InputError if ONNX Runtime refuses a batch.
    """
    indices = evenly_spaced(split, SAMPLES)
    outputs, wanted = [], []
    for batch in filter(None, (indices[:1], indices[1:3], indices[3:])):
        inputs = gather(split, batch).inputs
        outputs.append(model.predict(inputs))
        wanted.append(reference(inputs))
    return relative_error(torch.cat(outputs), torch.cat(wanted))
