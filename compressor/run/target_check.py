"""Whether the targets of every split fit what the model gives, before any time is spent."""

import logging
import math
from collections.abc import Iterator

import torch
from torch import Tensor

from compressor.errors import InputError
from compressor.models.artifact import TorchModel
from compressor.models.output_kind import Outputs, outputs_of_model
from compressor.models.outputs import FORWARD_ERRORS
from compressor.task import IGNORED, SPLITS, Batch, Split, SplitFacts, Task, accuracy, evenly_spaced, gather

logger = logging.getLogger("compressor")

_LABELED = tuple(name for name in SPLITS if name != "unlabeled")


def check_targets(model: TorchModel, task: Task) -> None:
    """Compare the targets of every split with what `model` gives for its samples.

    Raises InputError for a target that is no class and that the loss does not pass over, for a number that is not
    finite, and for a split without any target that counts. A split whose targets are all equal gets a line in the log:
    nothing can be learned from it, and little be measured.
    """
    outputs = outputs_of_model(model, task)
    for name in _LABELED:
        facts: SplitFacts = task.surveys[name]
        counted = {value: sample for value, sample in facts.first.items() if value != IGNORED}
        if facts.is_complete and not counted:
            msg = f"every target of the {name} split is {IGNORED}, which does not count; give it samples with targets"
            raise InputError(msg)
        for value, sample in _strange(counted, task, model, outputs, name):
            _check_target(value, sample, name, model, task=task, outputs=outputs)
        if facts.is_complete and len(counted) == 1 and len(getattr(task, name)) > 1:
            (value,) = counted
            what = "class" if outputs.kind == "classes" else "target"
            logger.warning(
                "all samples of the %s split have one %s, %g: is it cut from sorted data?", name, what, value
            )


def _strange(
    counted: dict[float, int], task: Task, model: TorchModel, outputs: Outputs, name: str
) -> Iterator[tuple[float, int]]:
    """Targets that a model with such outputs cannot give, each with the first sample that has it."""
    if outputs.kind == "classes":
        sample = gather(getattr(task, name), [0])
        if sample.targets.is_floating_point():
            return
        classes = model.predict(sample.inputs).shape[outputs.dimension]
        yield from ((value, row) for value, row in counted.items() if not 0 <= value < classes)
        return
    if outputs.kind == "labels":
        some = gather(task.train, evenly_spaced(task.train, 256)).targets
        least = -1 if (some == -1).sum() > (some == 0).sum() else 0
        yield from ((value, row) for value, row in counted.items() if not least <= value <= 1)
        return
    yield from ((value, row) for value, row in counted.items() if not math.isfinite(value))


def _check_target(value: float, row: int, name: str, model: TorchModel, *, task: Task, outputs: Outputs) -> None:
    """Raise InputError unless the loss passes `value` over, and so do metrics that count classes."""
    split: Split = getattr(task, name)
    batch = gather(split, [row])
    counts_classes = outputs.kind == "classes" and any(one.statistics is accuracy.statistics for one in task.metrics)
    if not counts_classes and _passes_over(value, batch, model.predict(batch.inputs), task):
        return
    if outputs.kind == "classes":
        classes = model.predict(batch.inputs).shape[outputs.dimension]
        wanted = f"be a class from 0 to {classes - 1}, as the model gives {classes} classes, or {IGNORED} not to count"
    elif outputs.kind == "labels":
        wanted = "be a label, yes or no, as the others are"
    else:
        wanted = "be a finite number"
    msg = f"targets of the {name} split must {wanted}, got {value:g} in sample {row}"
    raise InputError(msg)


def _passes_over(value: float, batch: Batch, outputs: Tensor, task: Task) -> bool:
    """Whether the loss does not depend on the outputs where the target is `value`."""
    targets = batch.targets
    strange = targets.isnan() if math.isnan(value) else targets == value
    if strange.numel() == outputs.numel():
        where = strange.reshape(outputs.shape)
    elif strange.shape[1:] == outputs.shape[2:]:  # a class for each token
        where = strange.unsqueeze(1).expand_as(outputs)
    elif strange.shape == outputs.shape[:-1]:
        where = strange.unsqueeze(-1).expand_as(outputs)
    else:
        return False
    noise = torch.randn(2, *outputs.shape, generator=torch.Generator().manual_seed(0)).to(outputs.dtype)
    try:
        losses = [task.loss(torch.where(where, outputs + step, outputs), targets) for step in (0, *noise)]
    except FORWARD_ERRORS:
        return False
    return all(bool(loss.isfinite().all()) and torch.equal(loss, losses[0]) for loss in losses)
