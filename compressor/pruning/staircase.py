"""The steps in which the time of a convolution grows with its channels, measured under ONNX Runtime on this machine."""

import tempfile
from collections.abc import Mapping
from functools import cache
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from compressor.measure.latency import time_models

_STEPS = (32, 16, 8, 4, 2, 1)
_UNCLEAR_STEP = 8
"""If times follow no staircase: the channels in a block of AVX2; AVX-512 has 16, and a multiple of both is at hand."""
_UNEXPLAINED = 0.1
"""Relative error of the best staircase, root mean square, above which times follow none."""
_INDISTINGUISHABLE = 1.25
"""Errors of two staircases that differ by less than this factor do not tell them apart."""

_CHANNELS = (20, 24, 28, 32, 33, 34, 36, 40, 44, 48, 56, 64)
_INPUT_CHANNELS, _IMAGE_SIZE, _KERNELS = 16, 14, (3, 1, 3)


@cache
def measure_step() -> int:
    """Number of channels by which fp32 convolutions grow on this machine; 2 to 5 seconds, once per process.

    Times small chains of 3x3 and 1x1 convolutions in turns on one thread: see `step_of_staircase`.
    """
    with tempfile.TemporaryDirectory() as name:
        paths = [_convolutions(Path(name) / f"{channels}.onnx", channels) for channels in _CHANNELS]
        latencies, _ = time_models(paths, precision=0.05, max_seconds=0.2)
    times = (1 / latency.ratio for latency in latencies)
    return step_of_staircase(dict(zip(_CHANNELS, times, strict=True)))


def step_of_staircase(times_by_channels: Mapping[int, float]) -> int:
    """The step m, one of 1, 2, 4, 8, 16 and 32, with which c channels take as long as the next multiple of m.

    `times_by_channels` are in any unit, of convolutions with c channels in and out. For each m a time a + b·u², u the
    next multiple, is fitted; m is the one with the smallest relative error. Of steps that cannot be told apart it is
    the largest, since its multiples are multiples of the others; where none explains the times to 10 %, it is 8.
    """
    channels = np.array(list(times_by_channels), dtype=np.float64)
    times = np.array(list(times_by_channels.values()))
    errors = {step: _relative_error(np.ceil(channels / step) * step, times) for step in _STEPS}
    smallest = min(errors.values())
    if smallest > _UNEXPLAINED:
        return _UNCLEAR_STEP
    return next(step for step, error in errors.items() if error <= max(smallest * _INDISTINGUISHABLE, 1e-6))


def _relative_error(units: np.ndarray, times: np.ndarray) -> float:
    """Root mean square error of the best a + b·units², relative to each of `times`."""
    terms = np.stack([np.ones_like(units), units**2], axis=1) / times[:, None]
    coefficients, *_ = np.linalg.lstsq(terms, np.ones_like(times), rcond=None)
    return float(np.sqrt(np.mean((terms @ coefficients - 1) ** 2)))


def _convolutions(path: Path, channels: int) -> Path:
    """Write a chain of convolutions with `channels` channels to `path`."""
    nodes, weights, before = [], [], _INPUT_CHANNELS
    for index, kernel in enumerate(_KERNELS):
        shape = (channels, before, kernel, kernel)
        weights.append(numpy_helper.from_array(np.full(shape, 0.01, dtype=np.float32), f"w{index}"))
        nodes.append(helper.make_node("Conv", [f"x{index}", f"w{index}"], [f"x{index + 1}"], pads=[kernel // 2] * 4))
        before = channels
    image = [1, _INPUT_CHANNELS, _IMAGE_SIZE, _IMAGE_SIZE]
    graph = helper.make_graph(
        nodes,
        "convolutions",
        [helper.make_tensor_value_info("x0", TensorProto.FLOAT, image)],
        [helper.make_tensor_value_info(f"x{len(_KERNELS)}", TensorProto.FLOAT, None)],
        weights,
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), path)
    return path
