"""Q and DQ of an int8 graph: the axis of their scales, and the graph without those of them that change nothing."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, helper, numpy_helper

from compressor.onnx_files.reading import attribute, graphs

_MOVES = {
    "Concat",
    "DepthToSpace",
    "Expand",
    "Flatten",
    "Gather",
    "ReduceMax",
    "Reshape",
    "Slice",
    "Squeeze",
    "Tile",
    "Transpose",
    "Unsqueeze",
}
"""Operators that only move values, so that they take int8 as well; `_is_move` knows some with conditions."""


def along_axis(axis: int, dimensions: int) -> tuple[int, ...]:
    """Shape in which numbers (C,), one per index along `axis`, meet a tensor of so many dimensions."""
    return tuple(-1 if dimension == axis % dimensions else 1 for dimension in range(dimensions))


def simplify_qdq(model: ModelProto) -> ModelProto:
    """Return a graph with fewer nodes and the same outputs, bit for bit; a graph without int8 as it is.

    A Q that undoes the DQ before it is gone, and so is a ReLU or clip to bounds at which the Q after it saturates.
    DQ -> move -> Q with one scale becomes the move alone, on int8. A DQ of constants without a zero
    point becomes a product, which ONNX Runtime computes once; it would run the DQ at every call, or let it pull the
    reader into int8. A graph with control flow stays as it is too: its bodies read tensors that no node of the graph
    shows.
    """
    _, *nested = graphs(model)
    if nested or not any(node.op_type == "DequantizeLinear" for node in model.graph.node):
        return model
    simpler = ModelProto()
    simpler.CopyFrom(model)
    for simplify in (_read_shape_of_codes, _drop_round_trip, _drop_clip, _move_on_int8):
        edges = _edges(simpler.graph)
        for node in simpler.graph.node:
            simplify(node, edges)
        _remove_unused(simpler.graph)
    _multiply_stored_weights(simpler.graph)
    return simpler


class _QuantizationParameters(NamedTuple):
    """What turns numbers into codes: both Q and DQ must agree in all of it to undo each other."""

    scale: float
    zero_point: int
    codes: np.dtype[Any]


@dataclass(frozen=True)
class _Edges:
    """Who writes and who reads each tensor, the value of each scalar constant, and the names that must stay."""

    writers: dict[str, NodeProto]
    readers: dict[str, list[NodeProto]]
    scalars: dict[str, np.ndarray]
    fixed: frozenset[str]

    def quantizer_of(self, name: str) -> NodeProto | None:
        """Return the QuantizeLinear that alone reads `name`, if there is one."""
        readers = [] if name in self.fixed else self.readers[name]
        return readers[0] if len(readers) == 1 and readers[0].op_type == "QuantizeLinear" else None

    def scale_and_zero_point(self, node: NodeProto) -> _QuantizationParameters | None:
        """Return those of a Q or DQ that has one pair for the whole tensor."""
        scale, zero_point = (self.scalars.get(name) for name in (*node.input, "")[1:3])
        if scale is None or zero_point is None:
            return None
        return _QuantizationParameters(float(scale), int(zero_point), zero_point.dtype)

    def dequantizers(self, names: Sequence[str], parameters: _QuantizationParameters) -> list[NodeProto] | None:
        """Return the DequantizeLinear that wrote each tensor, if all have these scale and zero point."""
        writers = [self.writers[name] for name in names if name in self.writers]
        alike = [
            writer
            for writer in writers
            if writer.op_type == "DequantizeLinear" and self.scale_and_zero_point(writer) == parameters
        ]
        return alike if len(alike) == len(names) else None


def _edges(graph: GraphProto) -> _Edges:
    readers: dict[str, list[NodeProto]] = defaultdict(list)
    for node in graph.node:
        for name in node.input:
            readers[name].append(node)
    return _Edges(
        writers={name: node for node in graph.node for name in node.output},
        readers=readers,
        scalars={tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer if not tensor.dims},
        fixed=frozenset(value.name for value in graph.output),
    )


def _read_shape_of_codes(node: NodeProto, edges: _Edges) -> None:
    """Let a Shape read the codes of what it would read dequantized."""
    writer = edges.writers.get(node.input[0]) if node.op_type == "Shape" else None
    if writer is not None and writer.op_type == "DequantizeLinear":
        node.input[0] = writer.input[0]


def _drop_round_trip(node: NodeProto, edges: _Edges) -> None:
    """Let the readers of a Q read what the DQ before it reads, if both have one scale."""
    if node.op_type != "QuantizeLinear" or node.output[0] in edges.fixed:
        return
    parameters = edges.scale_and_zero_point(node)
    dequantizers = edges.dequantizers(node.input[:1], parameters) if parameters else None
    if dequantizers is None:
        return
    for reader in edges.readers[node.output[0]]:
        reader.input[:] = [dequantizers[0].input[0] if name == node.output[0] else name for name in reader.input]


def _drop_clip(node: NodeProto, edges: _Edges) -> None:
    """Let the Q after a ReLU or clip read what that reads, if the Q clips no less."""
    if node.op_type not in {"Relu", "Clip"}:
        return
    quantizer = edges.quantizer_of(node.output[0])
    parameters = edges.scale_and_zero_point(quantizer) if quantizer else None
    if quantizer is None or parameters is None:
        return
    scale, zero_point, dtype = parameters
    codes = np.iinfo(dtype)
    low, high = (np.rint(np.float32(bound) / np.float32(scale)) + zero_point for bound in _bounds(node, edges))
    if low <= codes.min and high >= codes.max:
        quantizer.input[0] = node.input[0]


def _bounds(node: NodeProto, edges: _Edges) -> tuple[float, float]:
    """Return where a ReLU or clip begins and ends; NaN for an end that is not a constant."""
    if node.op_type == "Relu":
        return 0.0, np.inf
    names = (*node.input[1:], "", "")[:2]
    low, high = (
        float(edges.scalars.get(name, np.nan)) if name else unbounded
        for name, unbounded in zip(names, (-np.inf, np.inf), strict=True)
    )
    return low, high


def _move_on_int8(node: NodeProto, edges: _Edges) -> None:
    """Make a move read what the DQs before it read and write what the Q after it writes, if all have one scale."""
    if not _is_move(node, edges):
        return
    quantizer = edges.quantizer_of(node.output[0])
    parameters = edges.scale_and_zero_point(quantizer) if quantizer else None
    moved = len(node.input) if node.op_type == "Concat" else 1
    dequantizers = edges.dequantizers(node.input[:moved], parameters) if parameters else None
    if quantizer is None or dequantizers is None:
        return
    node.input[:moved] = [dequantizer.input[0] for dequantizer in dequantizers]
    if node.op_type == "Pad" and attribute(node, "mode", b"constant") == b"constant":
        node.input[2:3] = [quantizer.input[2]]  # the code of 0.0
    node.output[0], quantizer.output[0] = quantizer.output[0], node.output[0]
    quantizer.ClearField("input")


def _multiply_stored_weights(graph: GraphProto) -> None:
    """Write each DQ of constants without a zero point as a cast and a product, in place.

    A Gather of rows, as of an embedding, takes codes and factors first and multiplies what it took: a product of the
    whole table would be computed when a session opens, and four times as large in memory as its codes.
    """
    tensors = {tensor.name: tensor for tensor in graph.initializer}
    stored: dict[str, _Stored] = {}
    nodes: list[NodeProto] = []
    for node in graph.node:
        if node.op_type == "DequantizeLinear" and len(node.input) == 2 and set(node.input) <= tensors.keys():
            codes, scale = node.input
            axis = attribute(node, "axis", 1) % max(1, len(tensors[codes].dims))
            factors = numpy_helper.to_array(tensors[scale]).reshape(along_axis(axis, len(tensors[codes].dims)))
            name = node.output[0]
            graph.initializer.append(numpy_helper.from_array(factors, f"{name}_factors"))
            stored[name] = _Stored(codes, f"{name}_factors", has_factor_per_row=axis == 0)
            nodes += _product(codes, f"{name}_factors", name)
        elif node.op_type == "Gather" and _takes_rows(node, stored):
            table, rows, name = stored[node.input[0]], node.input[1], node.output[0]
            taken, multipliers = f"{name}_taken_codes", f"{name}_taken_factors"
            nodes += [
                helper.make_node("Gather", [table.codes, rows], [taken], axis=0),
                helper.make_node("Gather", [table.factors, rows], [multipliers], axis=0),
                *_product(taken, multipliers, name),
            ]
        else:
            nodes.append(node)
    del graph.node[:]
    graph.node.extend(nodes)
    _remove_unused(graph)


class _Stored(NamedTuple):
    """Names of the codes and of the factors of a weight that computes in float."""

    codes: str
    factors: str
    has_factor_per_row: bool


def _takes_rows(gather: NodeProto, stored: Mapping[str, _Stored]) -> bool:
    table = stored.get(gather.input[0])
    return table is not None and table.has_factor_per_row and attribute(gather, "axis", 0) == 0


def _product(codes: str, factors: str, output: str) -> list[NodeProto]:
    return [
        helper.make_node("Cast", [codes], [f"{output}_codes"], to=TensorProto.FLOAT),
        helper.make_node("Mul", [f"{output}_codes", factors], [output]),
    ]


def _is_move(node: NodeProto, edges: _Edges) -> bool:
    """Whether every value that `node` writes is one that it reads or, around a padded image, zero."""
    match node.op_type:
        case "MaxPool":
            return len(node.output) == 1
        case "Pad":
            fill = (*node.input[2:3], "")[0]
            is_zero = not fill or (fill in edges.scalars and float(edges.scalars[fill]) == 0.0)
            return is_zero or bool(attribute(node, "mode", b"constant") != b"constant")
        case "Resize":
            return bool(attribute(node, "mode", b"nearest") == b"nearest")
    return node.op_type in _MOVES


def _remove_unused(graph: GraphProto) -> None:
    """Remove nodes and tensors that no output needs, in place."""
    needed = {value.name for value in graph.output}
    kept = []
    for node in reversed(graph.node):
        if needed.intersection(node.output):
            needed.update(node.input)
            kept.append(node)
    tensors = [tensor for tensor in graph.initializer if tensor.name in needed]
    del graph.node[:], graph.initializer[:]
    graph.node.extend(reversed(kept))
    graph.initializer.extend(tensors)
