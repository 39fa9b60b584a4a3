"""Refuse a task or a model that cannot work, before any time is spent on it."""

import hashlib
from typing import get_args

from torch import Tensor, nn

from compressor.errors import InputError
from compressor.models.artifact import TorchModel
from compressor.models.ensemble import Ensemble
from compressor.models.output_kind import outputs_of_model
from compressor.models.outputs import FORWARD_ERRORS, run_on_examples
from compressor.references.reference import Reference
from compressor.task import SPLITS, Inputs, OutputKind, Split, Task, batches, uniform_numbers


def check_task(task: object) -> Task:
    """Return `task` if its splits have samples that fit its example inputs.

    Raises InputError naming the split and what differs.
    """
    task = as_task(task)
    if any(len(tensor) < 2 for tensor in task.example_inputs):
        msg = "example_inputs must have a batch of at least 2: the exporter takes a 1 for a constant"
        raise InputError(msg)
    if not task.metrics:
        msg = "metrics must name at least one metric; the first is what gates call accuracy"
        raise InputError(msg)
    if task.outputs not in (None, *get_args(OutputKind)):
        known = ", ".join(map(repr, get_args(OutputKind)))
        msg = f"outputs must be one of {known}, or left out, got {task.outputs!r}"
        raise InputError(msg)
    try:
        "".join(task.labels).encode()
    except UnicodeEncodeError as error:
        msg = f"labels must be text that UTF-8 can hold, for they are written into the model, but: {error}"
        raise InputError(msg) from error
    wanted = _signature(task.example_inputs, task)
    for name in SPLITS:
        split = getattr(task, name)
        if split is None:
            continue
        if len(split) == 0:
            msg = f"the {name} split must have samples, got 0"
            raise InputError(msg)
        try:
            first = next(batches(split, 1))
        except (ValueError, TypeError) as error:
            hint = "; -100 will do as the target of an unlabeled one" if name == "unlabeled" else ""
            msg = f"a sample of the {name} split must be (input, target){hint}, but: {error}"
            raise InputError(msg) from error
        found = _signature(first.inputs, task)
        if found != wanted:
            msg = f"samples of the {name} split must look like example_inputs, {wanted}, got {found}"
            raise InputError(msg)
    _check_augmentation(task)
    shared = _digests(task.calibration) & _digests(task.test)
    # Real data has a few duplicates; a split that was not split has many.
    if len(shared) > 0.01 * len(task.calibration):
        msg = f"calibration must share no sample with test, got {len(shared)} in both; take it from the train split"
        raise InputError(msg)
    return task


def as_task(task: object) -> Task:
    """Return what a task factory gave. Raises InputError unless it is a task."""
    if not isinstance(task, Task):
        msg = f"the task factory must return a compressor.Task, got {type(task).__name__}"
        raise InputError(msg)
    return task


def _check_augmentation(task: Task) -> None:
    if task.augmentation is None:
        return
    inputs = next(batches(task.train, 2)).inputs
    uniform = uniform_numbers(0, 0, range(len(inputs[0])), task.augmentation.numbers)
    seen: object = task.augmentation.apply(inputs, uniform)
    wanted = [str(len(inputs[0])), *_signature(inputs, task)]
    found = [type(seen).__name__]
    if isinstance(seen, tuple) and len(seen) == len(inputs) and all(isinstance(part, Tensor) for part in seen):
        found = [str(len(seen[0])), *_signature(seen, task)]
    if found != wanted:
        names = ", ".join(wanted)
        msg = f"augmentation must return a tuple of inputs like those it was given ({names}), got {', '.join(found)}"
        raise InputError(msg)


def _digests(split: Split) -> set[bytes]:
    """A digest of the inputs of each sample."""
    return {
        hashlib.blake2b(b"".join(part.contiguous().numpy().tobytes() for part in sample), digest_size=16).digest()
        for batch in batches(split, 256)
        for sample in zip(*batch.inputs, strict=True)
    }


def _signature(inputs: Inputs, task: Task) -> list[str]:
    """Type and sizes of each input, the dimensions that may change left open."""
    open_axes = task.dynamic_axes or ({0: "batch"},) * len(inputs)
    return [
        f"{tensor.dtype} {tuple('*' if axis in axes else size for axis, size in enumerate(tensor.shape))}"
        for tensor, axes in zip(inputs, open_axes, strict=True)
    ]


def check_model(model: TorchModel, task: Task) -> None:
    """Try the model, the loss and the metrics on two training samples.

    Raises InputError if the model does not run, or its outputs fit neither loss nor metrics.
    """
    outputs = _outputs(model, task)
    batch = next(batches(task.train, 2))
    try:
        outputs = model.predict(batch.inputs)
        losses = task.loss(outputs, batch.targets)
        for metric in task.metrics:
            metric.value(metric.statistics(outputs, batch.targets))
    except FORWARD_ERRORS as error:
        msg = (
            f"loss and metrics must accept outputs {tuple(outputs.shape)} and targets of the train split, but: {error}"
        )
        raise InputError(msg) from error
    kind = outputs_of_model(model, task).kind
    if isinstance(model.module, Ensemble) and model.module.combine == "mean_probability" and kind != "classes":
        msg = f"an ensemble must be combined by 'mean_logit' where outputs are {kind}: probabilities are of classes"
        raise InputError(msg)
    if losses.shape[:1] != outputs.shape[:1]:
        msg = f"loss must return one value per sample, ({len(outputs)}, …), got {tuple(losses.shape)}; reduce nothing"
        raise InputError(msg)


def check_reference(reference: Reference, like: TorchModel, task: Task, *, seed: int) -> None:
    """Call a factory that a stage will call later; if it gives a module, that must give outputs shaped as `like` does.

    Raises InputError.
    """
    if not isinstance(reference.without("weights_file").call(), nn.Module):
        return
    found, wanted = (tuple(_outputs(model, task).shape) for model in (TorchModel.build(reference, seed=seed), like))
    if found != wanted:
        msg = f"{reference.factory} must give outputs of the baseline's shape, {wanted}, got {found}"
        raise InputError(msg)


def _outputs(model: TorchModel, task: Task) -> Tensor:
    outputs = run_on_examples(model.module, task.example_inputs, model.factory.factory)
    if not isinstance(outputs, Tensor) or outputs.shape[:1] != task.example_inputs[0].shape[:1]:
        msg = f"{model.factory.factory} must return one tensor with a row per sample, got {type(outputs).__name__}"
        raise InputError(msg)
    if outputs.is_complex():
        msg = (
            f"{model.factory.factory} must return real numbers, got {outputs.dtype}; return torch.view_as_real of them"
        )
        raise InputError(msg)
    return outputs
