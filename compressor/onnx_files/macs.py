"""Multiply-accumulates of an ONNX model; knows no torch."""

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import onnxruntime
from onnx import ModelProto, NodeProto, ValueInfoProto

from compressor.onnx_files.reading import attribute, graphs, input_names, stored_tensors
from compressor.onnx_files.runtime import CPU, ERRORS

Shape: TypeAlias = tuple[int, ...]
ShapeOf: TypeAlias = Callable[[str], Shape]
Array: TypeAlias = np.ndarray[Any, np.dtype[Any]]


def count_macs(model: ModelProto, inputs: Sequence[Array], directory: Path) -> int:
    """Multiply-accumulates of convolutions, matrix products and recurrent layers for these inputs.

    As `torch.utils.flop_counter` counts them, halved; biases and elementwise arithmetic cost nothing. Shapes are those
    of one run under ONNX Runtime, with external data from `directory`. Raises ValueError for an operator whose products
    cannot be counted, or if the model does not run on `inputs`.
    """
    top, *nested = graphs(model)
    for graph in (top, *nested):
        for node in graph.node:
            name = f"the node that gives {', '.join(node.output)!r} ({node.domain or 'ai.onnx'}.{node.op_type})"
            known = node.domain in {"", "ai.onnx"} or (node.domain == "com.microsoft" and node.op_type in _MICROSOFT)
            if node.op_type in _NOT_COUNTED or not known:
                msg = f"the products of {name} are not known"
                raise ValueError(msg)
            if graph is not top and node.op_type in _MACS:
                msg = f"{name} runs only as often as the data decide"
                raise ValueError(msg)
    counted = [node for node in top.node if node.op_type in _MACS]
    if not counted:
        return 0
    tensors = {tensor for node in counted for tensor in (*node.input, node.output[0]) if tensor}
    shapes = _shapes(model, tensors, inputs, directory)
    return sum(_MACS[node.op_type](node, shapes.__getitem__) for node in counted)


def _shapes(model: ModelProto, tensors: set[str], inputs: Sequence[Array], directory: Path) -> dict[str, Shape]:
    """Shape of each of `tensors`, by name, when the model runs on `inputs`."""
    shapes: dict[str, Shape] = {name: tuple(tensor.dims) for name, tensor in stored_tensors(model).items()}
    names = input_names(model)
    if len(names) != len(inputs):
        msg = f"it takes {len(names)} inputs, got {len(inputs)}"
        raise ValueError(msg)
    shapes |= {name: array.shape for name, array in zip(names, inputs, strict=True)}
    watched = sorted(tensors - shapes.keys())
    probe = ModelProto()
    probe.CopyFrom(model)
    del probe.graph.output[:]
    probe.graph.output.extend(ValueInfoProto(name=name) for name in watched)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # what goes wrong is raised
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.add_session_config_entry("session.load_model_format", "ONNX")  # whatever the first bytes look like
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(directory))
    try:
        session = onnxruntime.InferenceSession(probe.SerializeToString(), options, **CPU)
        outputs = session.run(watched, dict(zip(names, inputs, strict=True)))
    except (*ERRORS, RuntimeError) as error:  # RuntimeError for a type that NumPy lacks, such as bfloat16
        msg = f"it does not run on inputs of {[array.shape for array in inputs]}: {error}"
        raise ValueError(msg) from error
    return shapes | {name: output.shape for name, output in zip(watched, outputs, strict=True)}


def _conv_macs(node: NodeProto, shape_of: ShapeOf) -> int:
    return math.prod(shape_of(node.output[0])) * math.prod(shape_of(_weight(node))[1:])


def _weight(node: NodeProto) -> str:
    """Name of the second factor, which comes after scale and zero point of the first where there are such."""
    return str(node.input[3 if node.op_type in {"QGemm", "QLinearConv", "QLinearMatMul"} else 1])


def _conv_transpose_macs(node: NodeProto, shape_of: ShapeOf) -> int:
    return math.prod(shape_of(node.input[0])) * math.prod(shape_of(node.input[1])[1:])


def _gemm_macs(node: NodeProto, shape_of: ShapeOf) -> int:
    inner = shape_of(_weight(node))[1 if attribute(node, "transB", 0) else 0]
    return math.prod(shape_of(node.output[0])) * inner


def _matmul_macs(node: NodeProto, shape_of: ShapeOf) -> int:
    inner = shape_of(_weight(node))[-2:][0]  # of a vector, its length
    return math.prod(shape_of(node.output[0])) * inner


def _matmul_blocks_macs(node: NodeProto, shape_of: ShapeOf) -> int:
    return math.prod(shape_of(node.output[0])) * int(attribute(node, "K", 0))


def _einsum_macs(node: NodeProto, shape_of: ShapeOf) -> int:
    terms = attribute(node, "equation", b"").decode().replace(" ", "").partition("->")[0].split(",")
    if len(terms) == 1:
        return 0
    if len(terms) > 2 or any("." in term for term in terms):
        msg = f"an Einsum must have at most two operands and no ellipsis, got {','.join(terms)!r}"
        raise ValueError(msg)
    sizes: dict[str, int] = {}
    for term, name in zip(terms, node.input, strict=True):
        for letter, size in zip(term, shape_of(name), strict=True):
            sizes[letter] = max(sizes.get(letter, 1), size)  # of an axis that is broadcast, the size it becomes
    return math.prod(sizes.values())


def _recurrent_macs(node: NodeProto, shape_of: ShapeOf) -> int:
    sequence, batch, _ = shape_of(node.input[0])
    return sequence * batch * sum(math.prod(shape_of(name)) for name in node.input[1:3])


_MACS: Mapping[str, Callable[[NodeProto, ShapeOf], int]] = {
    "Conv": _conv_macs,
    "ConvInteger": _conv_macs,
    "ConvTranspose": _conv_transpose_macs,
    "Einsum": _einsum_macs,
    "GRU": _recurrent_macs,
    "Gemm": _gemm_macs,
    "LSTM": _recurrent_macs,
    "MatMul": _matmul_macs,
    "MatMulInteger": _matmul_macs,
    "MatMulNBits": _matmul_blocks_macs,
    "QGemm": _gemm_macs,
    "QLinearConv": _conv_macs,
    "QLinearMatMul": _matmul_macs,
    "RNN": _recurrent_macs,
}
_MICROSOFT = {"MatMulNBits", "QGemm"}
"""Operators of ONNX Runtime's own that are counted."""
_NOT_COUNTED = {"Attention", "DeformConv"}
"""Operators that multiply, and that no formula above covers."""
