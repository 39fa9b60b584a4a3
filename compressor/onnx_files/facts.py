"""Size, parameters and MACs of an ONNX file; knows no torch."""

import math
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from onnx import ModelProto, NodeProto, TensorProto
from onnx.checker import ValidationError, check_model
from onnx.numpy_helper import to_array

from compressor.errors import InputError
from compressor.onnx_files.macs import Array, Shape, count_macs
from compressor.onnx_files.qdq import along_axis
from compressor.onnx_files.reading import attribute, external_files, graphs, load_graph, stored_tensors

_FLOATS = {
    TensorProto.FLOAT,
    TensorProto.DOUBLE,
    TensorProto.FLOAT16,
    TensorProto.BFLOAT16,
    TensorProto.FLOAT8E4M3FN,
    TensorProto.FLOAT8E5M2,
}
_NARROW_INTEGERS = {TensorProto.INT8, TensorProto.UINT8, TensorProto.INT4, TensorProto.UINT4}
_SETTINGS = {
    "ConvInteger": {2, 3},
    "DequantizeLinear": {1, 2},
    "MatMulInteger": {2, 3},
    "MatMulNBits": {2, 3},
    "QGemm": {1, 2, 4, 5, 7, 8},
    "QLinearConv": {1, 2, 4, 5, 6, 7},
    "QLinearMatMul": {1, 2, 4, 5, 6, 7},
    "QuantizeLinear": {1, 2},
    "Resize": {1, 2, 3},
    "Upsample": {1},
}
"""Positions of inputs that say how a node works, such as scales and zero points."""
_LAYERS = {
    "BatchNormalization",
    "Conv",
    "ConvTranspose",
    "GRU",
    "Gemm",
    "GroupNormalization",
    "InstanceNormalization",
    "LSTM",
    "LayerNormalization",
    "MatMul",
    "MatMulNBits",
    "PRelu",
    "RNN",
}


@dataclass(frozen=True)
class OnnxFacts:
    """What can be read off an ONNX file without running it."""

    size_bytes: int
    """The file with its external data."""
    transfer_bytes: int
    """The same files after gzip at level 9."""
    parameters: int
    nonzero: int
    macs: int


def read_facts(path: Path, inputs: Sequence[Array]) -> OnnxFacts:
    """Read the facts of an ONNX file; MACs are for `inputs`, in the order of the graph: one sample, as a batch of one.

    The file is not trusted: external data is read from regular files beside it only. Raises InputError if it is not
    such a model or its MACs cannot be counted.
    """
    try:
        model = load_graph(path)
        files = (path, *external_files(model, path.parent))
        check_model(path)  # also refuses external data that is a link or no regular file
        parameters, nonzero = count_parameters(model, path.parent)
        return OnnxFacts(
            size_bytes=sum(file.stat().st_size for file in files),
            transfer_bytes=sum(map(gzip_bytes, files)),
            parameters=parameters,
            nonzero=nonzero,
            macs=count_macs(model, inputs, path.parent),
        )
    except (OSError, ValidationError, ValueError) as error:
        msg = f"{path} must be a complete ONNX model of countable operators: {error}"
        raise InputError(msg) from error


def gzip_bytes(file: Path) -> int:
    """Size of the file after gzip at level 9, without file name and time."""
    compressor = zlib.compressobj(level=9, wbits=16 + zlib.MAX_WBITS)
    with file.open("rb") as stream:
        size = sum(len(compressor.compress(chunk)) for chunk in iter(lambda: stream.read(1 << 20), b""))
    return size + len(compressor.flush())


def count_parameters(model: ModelProto, directory: Path) -> tuple[int, int]:
    """Number of stored weights, and of those that are not zero; external data is read from `directory`.

    Weights are tensors of floats, of 8-bit integers, or of any integers that are dequantized, kept as initializers or
    in Constant nodes. Each counts once, however often it is used; in a function, once for each call. Scales and zero
    points are no weights. Nor is a single number, unless a layer takes it as its weight or bias: exporters store the
    literals of a formula so. A quantized weight is zero where it equals its zero point. In the blocks of ONNX Runtime's
    MatMulNBits a byte holds one weight or more. Raises ValueError for what cannot be counted.
    """
    nodes = [node for graph in graphs(model) for node in graph.node]
    uses: dict[str, set[tuple[str, int]]] = {}
    for node in nodes:
        for position, name in enumerate(node.input):
            uses.setdefault(name, set()).add((node.op_type, position))
    dequantizers = {node.input[0]: node for node in nodes if node.op_type == "DequantizeLinear"}
    multipliers = {node.input[1]: node for node in nodes if node.op_type == "MatMulNBits" and len(node.input) > 1}
    stored = stored_tensors(model)
    factors = _factors(nodes, stored)
    parameters = nonzero = 0
    for name, tensor in stored.items():
        if name in factors or not _is_weight(tensor, uses.get(name, set())):
            continue
        weights = to_array(tensor, str(directory))
        if name in multipliers:
            weights, zero_point = _in_blocks(multipliers[name], weights, stored, directory)
            nonzero += int(np.count_nonzero(weights != zero_point))
        elif name in dequantizers:
            zero_point = _zero_point(dequantizers[name], weights.shape, stored, directory)
            nonzero += int(np.count_nonzero(weights.astype(np.float32) != zero_point))
        else:
            nonzero += int(np.count_nonzero(weights))
        parameters += weights.size
    return parameters, nonzero


def _factors(nodes: Sequence[NodeProto], stored: Mapping[str, TensorProto]) -> set[str]:
    """Names of the scales of weights that are stored as 8-bit integers and turned into floats by Cast and Mul.

    A Gather may have taken rows of both before.
    """
    taken = {node.output[0]: node.input[0] for node in nodes if node.op_type == "Gather" and node.input[0] in stored}
    cast = {
        node.output[0]
        for node in nodes
        if node.op_type == "Cast" and (codes := stored.get(taken.get(node.input[0], node.input[0]))) is not None
        if codes.data_type in _NARROW_INTEGERS
    }
    products = (node.input for node in nodes if node.op_type == "Mul")
    factors = {name for names in products if not cast.isdisjoint(names) for name in names if name not in cast}
    return {taken.get(name, name) for name in factors}


def _is_weight(tensor: TensorProto, uses: Iterable[tuple[str, int]]) -> bool:
    if any(position in _SETTINGS.get(operator, ()) for operator, position in uses):
        return False
    if ("DequantizeLinear", 0) in uses:
        return True
    if tensor.data_type in _FLOATS:
        return math.prod(tensor.dims) > 1 or any(operator in _LAYERS for operator, _ in uses)
    return tensor.data_type in _NARROW_INTEGERS


def _zero_point(dequantizer: NodeProto, shape: Shape, stored: Mapping[str, TensorProto], directory: Path) -> Array:
    """Zero point of a weight, in a shape that broadcasts to the weight's."""
    given = _read_zero_point(dequantizer, 2, stored, directory)
    if given is None:
        return np.zeros((), np.float32)
    zero_point = given.astype(np.float32)
    axis = attribute(dequantizer, "axis", 1)
    if zero_point.ndim == len(shape) > 1:  # one per block of weights along the axis
        return _repeat_blocks(zero_point, attribute(dequantizer, "block_size", 1), axis, shape, dequantizer.input[0])
    if zero_point.ndim == 1 and zero_point.size > 1:
        return zero_point.reshape(along_axis(axis, len(shape)))
    return zero_point.reshape(())


def _in_blocks(
    multiplier: NodeProto, packed: Array, stored: Mapping[str, TensorProto], directory: Path
) -> tuple[Array, Array]:
    """Codes of a MatMulNBits, (N, K), and a zero point for each; a byte holds the first of its codes in the low bits.

    Rows of codes and of zero points begin on a byte. Without zero points, all are half the number of codes.
    """
    bits, block_size, rows, inputs = (int(attribute(multiplier, name, 0)) for name in ("bits", "block_size", "N", "K"))
    if bits not in {2, 4, 8} or block_size < 1:
        msg = f"weight {multiplier.input[1]!r} must have 2, 4 or 8 bits in blocks, got {bits} in blocks of {block_size}"
        raise ValueError(msg)
    codes = _codes(packed, rows, bits)[:, :inputs]
    given = _read_zero_point(multiplier, 3, stored, directory)
    if given is None:
        return codes, np.full((), 1 << (bits - 1))
    zero_points = _codes(given, rows, bits) if given.dtype == np.uint8 else given.reshape(rows, -1)
    return codes, _repeat_blocks(zero_points, block_size, 1, codes.shape, multiplier.input[1])


def _repeat_blocks(zero_points: Array, block_size: int, axis: int, shape: Shape, weight: str) -> Array:
    """The zero point of each number of a weight of this shape, from those of its blocks along `axis`."""
    try:
        spread: Array = zero_points.take(np.arange(shape[axis]) // max(block_size, 1), axis)
    except IndexError as error:
        found = f"{zero_points.shape} for blocks of {block_size} along axis {axis} of {shape}"
        msg = f"weight {weight!r} must have a zero point for each block, got {found}"
        raise ValueError(msg) from error
    return spread


def _codes(packed: Array, rows: int, bits: int) -> Array:
    """Unpack numbers of `bits` bits each: (rows, numbers in a row)."""
    places = packed.reshape(rows, -1, 1).astype(np.uint8) >> np.arange(0, 8, bits, dtype=np.uint8)
    return (places & ((1 << bits) - 1)).reshape(rows, -1)


def _read_zero_point(
    node: NodeProto, position: int, stored: Mapping[str, TensorProto], directory: Path
) -> Array | None:
    name = (*node.input, *("",) * position)[position]
    if not name:
        return None
    if name not in stored:
        msg = f"the zero point of weight {node.input[position - 2]!r} must be a constant"
        raise ValueError(msg)
    return to_array(stored[name], str(directory))
