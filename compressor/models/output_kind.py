"""What the outputs of a model are: one of several classes, independent labels, or values. Decided here alone.

Losses that compare answers, soft labels, the quality of a classifier and agreement all ask here. The task says it, in
its `outputs` or else by how its loss and metrics treat outputs and targets. The sizes alone never do: four numbers may
be four classes, four labels or four values.
"""

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Final, final

import torch
from torch import Tensor

from compressor.models.artifact import TorchModel
from compressor.models.outputs import FORWARD_ERRORS
from compressor.task import IGNORED, OutputKind, Task, evenly_spaced, gather

_SAMPLES = 32
"""Training samples whose targets are shown to loss and metrics."""
_SURE = 3.0
"""A logit of 95 %: so sure that cross-entropy is small, but smoothed labels do not mind."""
_LEAST_PROBABILITY = 1e-12
"""Stands for a probability of 0, whose logarithm no loss can compare."""


@final
@dataclass(frozen=True)
class Outputs:
    """What outputs are. `dimension` is that of the classes; `are_probabilities` tells a softmax at the model's end."""

    kind: OutputKind
    dimension: int = 1
    are_probabilities: bool = False

    def as_logits(self, outputs: Tensor) -> Tensor:
        """Class logits, (N, C, …), of outputs; a label is two classes, yes and no: (N, 2, labels, …). Values stay."""
        if self.kind == "labels":
            return torch.stack([outputs, torch.zeros_like(outputs)], dim=1)
        if self.kind == "values":
            return outputs
        classes_first = outputs.movedim(self.dimension, 1)
        return classes_first.clamp_min(_LEAST_PROBABILITY).log() if self.are_probabilities else classes_first

    def __str__(self) -> str:
        if self.kind == "labels":
            return "independent labels"
        if self.kind == "values":
            return "values, no classes"
        place = "" if self.dimension == 1 else f" in dimension {self.dimension}"
        return f"{'probabilities' if self.are_probabilities else 'logits'} of classes{place}"


CLASSES: Final = Outputs("classes")
"""Logits of classes, (N, C, …)."""


def outputs_of_model(model: TorchModel, task: Task) -> Outputs:
    """Say what the outputs of `model` are, by some training samples."""
    batch = gather(task.train, evenly_spaced(task.train, _SAMPLES))
    # in training mode a run would move BatchNorm's statistics
    moves = any(part.training for part in model.module.modules())
    module = copy.deepcopy(model.module).eval() if moves else model.module
    with torch.no_grad():
        return outputs_of(task, module(*batch.inputs), batch.targets)


def outputs_of(task: Task, outputs: Tensor, targets: Tensor) -> Outputs:
    """Say what `outputs`, (N, …), are, which a model gives for samples with `targets`, (N, …).

    Classes: integer targets shaped like the outputs without one dimension, of at least two classes, where adding a
    number to all logits of a sample leaves the loss or a metric as it is, as softmax and argmax do. Soft targets that
    sum to 1 count as well. Labels: targets of two kinds, where the loss is lower for sure logits of the right sign than
    for outputs equal to the targets. All else is values.
    """
    dimension = _class_dimension(task, outputs, targets)
    if task.outputs == "classes" or (task.outputs is None and dimension is not None):
        found = next(_fitting_dimensions(outputs, targets), 1) if dimension is None else dimension
        return Outputs("classes", found, _are_probabilities(outputs, found))
    if task.outputs is None and outputs.is_floating_point() and _are_labels(task, outputs, targets):
        return Outputs("labels")
    return Outputs(task.outputs or "values")


def class_range(outputs: Tensor, targets: Tensor, dimension: int) -> Tensor:
    """Which of the integer `targets` are a class of `outputs`, or not to be counted; shaped as they are."""
    return ((targets >= 0) & (targets < outputs.shape[dimension])) | (targets == IGNORED)


def _is_integer(targets: Tensor) -> bool:
    return not targets.is_floating_point() and not targets.is_complex() and targets.dtype != torch.bool


def _fitting_dimensions(outputs: Tensor, targets: Tensor) -> Iterator[int]:
    """Dimensions that may be those of classes, as far as sizes tell."""
    for dimension in range(1, outputs.ndim):
        others = (*outputs.shape[:dimension], *outputs.shape[dimension + 1 :])
        if outputs.shape[dimension] < 2 or not outputs.is_floating_point():
            continue
        if _is_integer(targets):
            if targets.shape == others:
                yield dimension
        elif targets.is_floating_point() and targets.shape == outputs.shape and _are_probabilities(targets, dimension):
            yield dimension


def _are_probabilities(numbers: Tensor, dimension: int) -> bool:
    if numbers.ndim <= dimension or not numbers.numel():
        return False
    sums = numbers.double().sum(dim=dimension)
    return bool((numbers >= 0).all() and torch.allclose(sums, torch.ones_like(sums), atol=1e-3))


def _class_dimension(task: Task, outputs: Tensor, targets: Tensor) -> int | None:
    for dimension in _fitting_dimensions(outputs, targets):
        # a class that is not there makes a loss fail; the check of all targets names it
        known = torch.where(class_range(outputs, targets, dimension), targets, 0) if _is_integer(targets) else targets
        if _ignores_shifts(task, outputs, known, dimension):
            return dimension
    return None


def _ignores_shifts(task: Task, outputs: Tensor, targets: Tensor, dimension: int) -> bool:
    """Whether the loss or a metric minds no number that is added to all classes.

    The negative log-likelihood of log-probabilities moves by as much as was added; so what must be 0 is the second
    difference of the loss.
    """
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(outputs.shape, generator=generator).to(outputs.dtype)
    size = [1 if axis == dimension else length for axis, length in enumerate(outputs.shape)]
    shift = 3 * torch.randn(size, generator=generator).to(outputs.dtype)
    moved = [logits + times * shift for times in range(3)]
    losses = [_tried(partial(task.loss, one, targets)) for one in moved]
    if all(loss is not None for loss in losses):
        first, second, third = (loss.double() for loss in losses if loss is not None)
        if torch.allclose(first + third, 2 * second, rtol=1e-3, atol=1e-3):
            return True
    for metric in task.metrics:
        sums = [_tried(partial(metric.statistics, one, targets)) for one in moved]
        if all(total is not None for total in sums):
            first, second, third = (total.double() for total in sums if total is not None)
            if first.shape == second.shape and torch.allclose(first, second) and torch.allclose(first, third):
                return True
    return False


def _are_labels(task: Task, outputs: Tensor, targets: Tensor) -> bool:
    """Whether targets are yes or no, and the loss wants logits of them."""
    if targets.numel() != outputs.numel() or targets.shape[:1] != outputs.shape[:1] or not targets.numel():
        return False
    wanted = targets.reshape(outputs.shape).to(outputs.dtype)
    binary = max(((wanted == no) | (wanted == 1) for no in (0, -1)), key=lambda found: int(found.sum()))
    if binary.float().mean() < 0.5:
        return False
    sure = torch.where(binary, torch.where(wanted > 0, _SURE, -_SURE), 0.0).to(outputs.dtype)
    losses = [_tried(partial(task.loss, one, targets)) for one in (sure, torch.where(binary, wanted, 0.0))]
    if any(loss is None for loss in losses):
        return False
    of_sure, of_equal = (float(loss.double().mean()) for loss in losses if loss is not None)
    return of_sure < of_equal


def _tried(compute: Callable[[], object]) -> Tensor | None:
    """What a loss or metric of the user's gives; None if that is an error or no finite tensor."""
    with torch.no_grad():
        try:
            found = compute()
        except FORWARD_ERRORS:
            return None
    return found if isinstance(found, Tensor) and bool(found.isfinite().all()) else None
