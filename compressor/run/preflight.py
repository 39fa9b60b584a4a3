"""Refuse a task or a model that cannot work, before any time is spent on it."""

import hashlib
from collections.abc import Sequence
from typing import get_args

from torch import Tensor, nn
from torch.utils.data import IterableDataset

from compressor.errors import InputError
from compressor.models.artifact import TorchModel
from compressor.models.ensemble import Ensemble
from compressor.models.output_kind import outputs_of_model
from compressor.models.outputs import FORWARD_ERRORS, run_on_examples
from compressor.references.reference import Reference
from compressor.run.target_check import check_targets
from compressor.task import SPLITS, Batch, Inputs, OutputKind, Split, Task, batches, gather, uniform_numbers


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
        first = _check_split(name, split)
        found = _signature(first.inputs, task)
        if found != wanted:
            msg = f"samples of the {name} split must look like example_inputs, {wanted}, got {found}"
            raise InputError(msg)
    _check_uniform(task)
    _check_augmentation(task)
    shared = _digests(task.calibration) & _digests(task.test)
    # Real data has a few duplicates; a split that was not split has many.
    if len(shared) > 0.01 * len(task.calibration):
        msg = f"calibration must share no sample with test, got {len(shared)} in both; take it from the train split"
        raise InputError(msg)
    return task


def _check_split(name: str, split: Split) -> Batch:
    """Return the first sample of a split. Raises InputError for a split that has none, or no samples by number."""
    if not (hasattr(split, "__len__") and hasattr(split, "__getitem__")) or isinstance(split, IterableDataset):
        msg = (
            f"the {name} split must have a length and samples by number (__len__ and __getitem__), got "
            f"{type(split).__name__}; read a stream into compressor.Samples or a list"
        )
        raise InputError(msg)
    if len(split) == 0:
        msg = f"the {name} split must have samples, got 0"
        raise InputError(msg)
    hint = "; -100 will do as the target of an unlabeled one" if name == "unlabeled" else ""
    try:
        first = next(batches(split, 1))
        inputs, targets = first
    except (ValueError, TypeError, LookupError, AttributeError) as error:
        msg = f"a sample of the {name} split must be (input, target){hint}, but: {error}"
        raise InputError(msg) from error
    if not all(isinstance(part, Tensor) for part in (*inputs, targets)):
        kinds = ", ".join(type(part).__name__ for part in (*inputs, targets))
        msg = f"a sample of the {name} split must be (input, target) of tensors or numbers{hint}, got {kinds}"
        raise InputError(msg)
    return first


def _check_uniform(task: Task) -> None:
    """Read every sample. Raises InputError for samples of one split that are not alike, naming the first that differs.

    Raises what the splits raise.
    """
    try:
        unlike = [name for name, facts in task.surveys.items() if not facts.is_uniform]
    except (RuntimeError, ValueError, TypeError, AttributeError):
        unlike = [name for name in SPLITS if getattr(task, name) is not None]
        if (difference := _first_difference(task, unlike)) is None:
            raise
        raise InputError(difference) from None
    if unlike and (difference := _first_difference(task, unlike)):
        raise InputError(difference)


def _first_difference(task: Task, names: Sequence[str]) -> str | None:
    """Say which sample of some splits is first to differ from the sample before it, in shape or type; None if none."""
    for name in names:
        split = getattr(task, name)
        wanted = ""
        for row in range(len(split)):
            inputs, target = gather(split, [row])
            found = ", ".join(f"{part.dtype} {tuple(part.shape[1:])}" for part in (*inputs, target))
            if row and found != wanted:
                return (
                    f"samples of the {name} split must all be alike, (input, target), but sample {row - 1} is {wanted} "
                    f"and sample {row} is {found}; pad or crop them to one shape"
                )
            wanted = found
    return None


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
    """Try the model, the loss and the metrics on two training samples, and compare all targets with the outputs.

    Raises InputError if the model does not run, or its outputs fit neither loss nor metrics nor targets.
    """
    outputs = _outputs(model, task)
    check_targets(model, task)
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
