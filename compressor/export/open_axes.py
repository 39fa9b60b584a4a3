"""Open axes at other sizes than the example's: inputs made for them, and the model compared with PyTorch on these."""

from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor

from compressor.errors import InputError, StageError
from compressor.models.artifact import OnnxModel
from compressor.models.outputs import FORWARD_ERRORS, relative_error
from compressor.task import Inputs, Task

_LEAST_TOLERANCE, _TIMES_FARTHER = 0.02, 4.0
"""What rounding makes of repeated entries varies; a size written into a model makes differences of a tenth and more."""

_ADVICE = (
    "a size of the example was written into the model: compute it in forward from x.shape, or leave the axis out of "
    "dynamic_axes"
)

SIZES_TRIED = 2
"""At so many further sizes each open axis is compared."""


def check_open_axes(model: OnnxModel, reference: Callable[[Inputs], Tensor], task: Task, *, tolerance: float) -> None:
    """Compare `model` and `reference` with each open axis but the batch at two further sizes, alone and all together.

    A size that `reference` itself does not take is no fault of the model; another one is tried. Raises StageError that
    names the axis and the size if the outputs differ by more than `tolerance` (`relative_error`), if ONNX Runtime
    fails there, or if `reference` takes no other size.
    """
    sizes = open_sizes(task)
    proven: set[str] = set()
    refusal = ""
    for names in (*((name,) for name in sizes), *([tuple(sizes)] if len(sizes) > 1 else [])):
        compared = 0
        for changed in _further_sizes({name: sizes[name] for name in names}):
            inputs = resize(task, changed)
            try:
                wanted = reference(inputs)
            except FORWARD_ERRORS as error:
                refusal = f"{_describe(changed)}: {type(error).__name__}: {' '.join(str(error).split())[:200]}"
                continue
            was = _describe({name: sizes[name] for name in names})
            _compare(model, inputs, wanted, f"{_describe(changed)}, not only with {was}", tolerance)
            proven |= set(names)
            compared += 1
            if compared == SIZES_TRIED:
                break
    for name in sizes.keys() - proven:
        msg = (
            f"axis {name!r} is open in dynamic_axes, so forward must take it at other sizes than {sizes[name]}, but it "
            f"took none that was tried; the last was {refusal}; leave the axis out of dynamic_axes, or mend forward"
        )
        raise StageError(msg)


def check_rounded_at_open_axes(model: OnnxModel, reference: Callable[[Inputs], Tensor], task: Task) -> None:
    """Compare as `check_open_axes` a model that is near to `reference`: not much farther away than on the example."""
    if not open_sizes(task):
        return
    error = relative_error(model.predict(task.example_inputs), reference(task.example_inputs))
    check_open_axes(model, reference, task, tolerance=max(_LEAST_TOLERANCE, _TIMES_FARTHER * error))


def resize(task: Task, sizes: Mapping[str, int]) -> Inputs:
    """Return the example inputs with the named axes at other sizes: entries repeat or are left out, none is new."""
    resized = []
    for tensor, axes in zip(task.example_inputs, _axes(task), strict=True):
        for axis, name in axes.items():
            if axis != 0 and name in sizes:
                tensor = tensor.index_select(axis, torch.arange(sizes[name]) % tensor.shape[axis])  # noqa: PLW2901
        resized.append(tensor)
    return tuple(resized)


def _compare(model: OnnxModel, inputs: Inputs, wanted: Tensor, where: str, tolerance: float) -> None:
    """Raise StageError, which says `where`, if the model fails or gives other outputs than `wanted`."""
    name = model.path.name
    try:
        found = model.predict(inputs)
    except InputError as error:
        msg = f"{name} must run with {where}, as forward does, but {error}; {_ADVICE}"
        raise StageError(msg) from error
    difference = relative_error(found, wanted)
    if not difference <= tolerance:
        shapes = f"shape {tuple(found.shape)} instead of {tuple(wanted.shape)}"
        how = shapes if found.shape != wanted.shape else f"a relative error of {difference:.3g}"
        msg = f"{name} must give PyTorch's outputs with {where}, got {how}; {_ADVICE}"
        raise StageError(msg)


def _axes(task: Task) -> tuple[Mapping[int, str], ...]:
    return task.dynamic_axes or ({0: "batch"},) * len(task.example_inputs)


def open_sizes(task: Task) -> dict[str, int]:
    """Size in the example of each open axis but the batch, by name. Raises InputError for a name of two sizes."""
    sizes: dict[str, int] = {}
    for position, (tensor, axes) in enumerate(zip(task.example_inputs, _axes(task), strict=True)):
        for axis, name in axes.items():
            if axis == 0:
                continue
            if sizes.setdefault(name, tensor.shape[axis]) != tensor.shape[axis]:
                msg = (
                    f"axes of one name in dynamic_axes must have one size, but {name!r} is {sizes[name]} and, in input "
                    f"{position}, {tensor.shape[axis]}; give them two names"
                )
                raise InputError(msg)
    return sizes


def _further_sizes(sizes: Mapping[str, int]) -> Iterator[dict[str, int]]:
    """Sizes to try, a longer and a shorter one first, those that are no multiples before those that are."""
    changes: list[Callable[[int], int]] = [
        lambda size: size * 3 // 2 + 1,
        lambda size: size * 2 // 3,
        lambda size: size + 1,
        lambda size: size - 1,
        lambda size: size * 2,
        lambda size: size // 2,
        lambda size: size * 3,
        lambda size: size + 2,
        lambda size: size - 2,
        lambda size: size + 8,
        lambda size: size + 16,
        lambda size: size + 32,
        lambda size: size - 8,
        lambda size: size - 16,
        lambda size: size - 32,
        lambda size: size // 4,
    ]
    seen = [dict(sizes)]
    for change in changes:
        changed = {name: change(size) for name, size in sizes.items()}
        if min(changed.values()) >= 2 and changed not in seen:  # torch.export takes 1 for a constant
            seen.append(changed)
            yield changed


def _describe(sizes: Mapping[str, int]) -> str:
    return ", ".join(f"{name} = {size}" for name, size in sizes.items())
