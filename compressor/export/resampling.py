"""Nearest neighbours and adaptive pools in ONNX, right for every ratio and every size of an open axis."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

_aten = torch.ops.aten


def resampling_translations() -> Mapping[Any, Callable[..., Any]]:
    """From each operator of torch that its own exporter writes wrongly, or not at all, to its form in ONNX."""
    nearest = {
        target: _nearest(is_exact=is_exact)
        for is_exact, targets in (
            (
                False,
                (_aten.upsample_nearest1d.vec, _aten.upsample_nearest2d.vec, _aten.upsample_nearest3d.vec),
            ),
            (
                True,
                (
                    _aten._upsample_nearest_exact1d.vec,
                    _aten._upsample_nearest_exact2d.vec,
                    _aten._upsample_nearest_exact3d.vec,
                ),
            ),
        )
        for target in targets
    }
    averages = (
        _aten.adaptive_avg_pool1d.default,
        _aten.adaptive_avg_pool2d.default,
        _aten.adaptive_avg_pool3d.default,
    )
    maxima = (
        _aten.adaptive_max_pool1d.default,
        _aten.adaptive_max_pool2d.default,
        _aten.adaptive_max_pool3d.default,
    )
    return nearest | dict.fromkeys(averages, _average) | dict.fromkeys(maxima, _largest)


def _nearest(*, is_exact: bool) -> Callable[..., Any]:
    def translate(x: Any, output_size: Any = None, scale_factors: Any = None) -> Any:
        op = _opset()

        lengths = list(x.shape)[2:]
        scales = scale_factors or [None] * len(lengths)
        whole = [_whole_factor(*one) for one in zip(lengths, output_size or [None] * len(lengths), scales, strict=True)]
        if all(whole) and not is_exact:
            factors = op.Constant(value_floats=[1.0, 1.0, *(float(factor or 1) for factor in whole)])
            return op.Resize(
                x, None, factors, mode="nearest", coordinate_transformation_mode="asymmetric", nearest_mode="floor"
            )
        for axis, length in enumerate(lengths, start=2):
            size = None if output_size is None else output_size[axis - 2]
            if isinstance(length, int) and (size is None or isinstance(size, int)):
                indices = _fixed_neighbours(length, size, scales[axis - 2], is_exact=is_exact)
                if indices != list(range(length)):
                    x = op.Gather(x, op.Constant(value_ints=indices), axis=axis)
            else:
                x = op.Gather(x, _open_neighbours(op, x, axis, size, scales[axis - 2], is_exact=is_exact), axis=axis)
        return op.Identity(x)

    return translate


def _whole_factor(length: Any, size: Any, scale: float | None) -> int | None:
    """How often each entry stands in the result, if that is a whole number."""
    if scale is not None:
        return int(scale) if scale == int(scale) else None
    known = isinstance(length, int) and isinstance(size, int) and size % length == 0
    return size // length if known else None


def _fixed_neighbours(length: int, size: int | None, scale: float | None, *, is_exact: bool) -> list[int]:
    """Which entry of an axis each entry of the result is: as PyTorch says, whose arithmetic is the rule."""
    positions = torch.arange(length, dtype=torch.float32).reshape(1, 1, -1)
    found = torch.nn.functional.interpolate(
        positions, size=size, scale_factor=scale, mode="nearest-exact" if is_exact else "nearest"
    )
    return [int(position) for position in found.flatten()]


def _open_neighbours(op: Any, x: Any, axis: int, size: Any, scale: float | None, *, is_exact: bool) -> Any:
    """As `_fixed_neighbours`, computed from the length of the axis: in float32, as PyTorch does."""
    length = op.Squeeze(op.Shape(x, start=axis, end=axis + 1))
    if size is None:
        assert scale is not None  # torch takes a size or a scale
        wide = op.Mul(op.Cast(length, to=11), op.Constant(value=_tensor(np.float64(scale))))
        size = op.Cast(wide, to=7)
        step = op.Constant(value_float=float(np.float32(1.0 / scale)))
    else:
        size = _integer(op, size)
        step = op.Div(op.Cast(length, to=1), op.Cast(size, to=1))
    positions = op.Cast(op.Range(_integer(op, 0), size, _integer(op, 1)), to=1)
    if is_exact:
        positions = op.Add(positions, op.Constant(value_float=0.5))
    found = op.Cast(op.Floor(op.Mul(positions, step)), to=7)
    return op.Min(found, op.Sub(length, _integer(op, 1)))


def _average(x: Any, output_size: Any) -> Any:
    """Average each window: (N, C, L, …) to (N, C, `output_size`…)."""
    op = _opset()

    lengths, sizes = list(x.shape)[2:], _sizes(x, output_size)
    if all(
        isinstance(old, int) and isinstance(new, int) and old % new == 0
        for old, new in zip(lengths, sizes, strict=True)
    ):
        kernel = [old // new for old, new in zip(lengths, sizes, strict=True)]
        return op.AveragePool(x, kernel_shape=kernel, strides=kernel)
    rank = len(lengths) + 2
    for axis, size in enumerate(sizes, start=2):
        if isinstance(size, int) and size == 1:
            x = op.ReduceMean(x, op.Constant(value_ints=[axis]), keepdims=1)
            continue
        length, start, end = _windows(op, x, axis, size)
        positions = op.Unsqueeze(op.Range(_integer(op, 0), length, _integer(op, 1)), op.Constant(value_ints=[1]))
        inside = op.And(op.GreaterOrEqual(positions, start), op.Less(positions, end))
        share = op.Div(op.CastLike(inside, x), op.CastLike(op.Sub(end, start), x))  # (length, size)
        order = [*(other for other in range(rank) if other != axis), axis]
        swapped = op.MatMul(op.Transpose(x, perm=order), share)
        x = op.Transpose(swapped, perm=[order.index(other) for other in range(rank)])
    return op.Identity(x)


def _largest(x: Any, output_size: Any) -> Any:
    """Take the largest of each window; `capture` lets nobody read the second output, in the place of indices."""
    op = _opset()

    one = op.Constant(value_ints=[1])
    for axis, size in enumerate(_sizes(x, output_size), start=2):
        if isinstance(size, int) and size == 1:
            x = op.ReduceMax(x, op.Constant(value_ints=[axis]), keepdims=1)
            continue
        _, start, end = _windows(op, x, axis, size)
        widest = op.ReduceMax(op.Sub(end, start), keepdims=0)
        offsets = op.Range(_integer(op, 0), widest, _integer(op, 1))
        # a window that is shorter than the widest reads its last entry again
        indices = op.Min(op.Add(op.Unsqueeze(start, one), offsets), op.Sub(op.Unsqueeze(end, one), _integer(op, 1)))
        x = op.ReduceMax(op.Gather(x, indices, axis=axis), op.Constant(value_ints=[axis + 1]), keepdims=0)
    return op.Identity(x), op.Cast(x, to=7)


def _windows(op: Any, x: Any, axis: int, size: Any) -> tuple[Any, Any, Any]:
    """Length of an axis, and where each of its windows starts and ends, (`size`,)."""
    length, count = op.Squeeze(op.Shape(x, start=axis, end=axis + 1)), _integer(op, size)
    steps = op.Range(_integer(op, 0), count, _integer(op, 1))
    start = op.Div(op.Mul(steps, length), count)
    ends = op.Mul(op.Add(steps, _integer(op, 1)), length)
    return length, start, op.Div(op.Add(ends, op.Sub(count, _integer(op, 1))), count)


def _sizes(x: Any, output_size: Any) -> Sequence[Any]:
    rank = len(list(x.shape)) - 2
    return list(output_size) * rank if len(output_size) < rank else list(output_size)


def _integer(op: Any, value: Any) -> Any:
    return op.Constant(value_int=value) if isinstance(value, int) else op.Cast(value, to=7)


def _tensor(value: np.float64) -> Any:
    import onnx  # noqa: PLC0415

    return onnx.numpy_helper.from_array(np.asarray(value))


def _opset() -> Any:
    from onnxscript import opset20  # noqa: PLC0415  # only a translation needs it

    return opset20
