"""What a module gives: a run on example inputs, the tensor in what comes out, and how far two such tensors differ."""

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from compressor.errors import InputError
from compressor.task import Inputs

FORWARD_ERRORS = (RuntimeError, ValueError, TypeError, LookupError, AssertionError, AttributeError, ArithmeticError)
"""What a `forward` raises for inputs, sizes or layers that do not fit it."""


def run_on_examples(forward: Callable[..., object], example_inputs: Inputs, name: str, *, advice: str = "") -> object:
    """What `forward` gives for `example_inputs`, without gradient.

    Raises InputError if it fails. The message begins with `name`, which says what ran, and ends with `advice`.
    """
    with torch.no_grad():
        try:
            return forward(*example_inputs)
        except FORWARD_ERRORS as error:
            todo = f"; {advice}" if advice else ""
            msg = f"{name} must run on example_inputs, but: {type(error).__name__}: {error}{todo}"
            raise InputError(msg) from error


def first_tensor(output: object) -> Tensor | None:
    """The first tensor in an output, however deep in tuples, lists and mappings, such as those of Hugging Face."""
    if isinstance(output, Tensor):
        return output
    if isinstance(output, Mapping):
        output = tuple(output.values())
    if isinstance(output, tuple | list):
        return next((tensor for part in output if (tensor := first_tensor(part)) is not None), None)
    return None


def relative_error(outputs: Tensor, reference: Tensor) -> float:
    """Root mean square of `outputs` - `reference`, divided by that of `reference`; infinite if shapes differ."""
    if outputs.shape != reference.shape:
        return math.inf
    difference = float((outputs.double() - reference.double()).norm())
    return (
        0.0 if difference == 0 else difference / max(float(reference.double().norm()), torch.finfo(torch.float64).tiny)
    )
