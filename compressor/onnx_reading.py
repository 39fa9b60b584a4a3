"""Read an ONNX file that is not trusted, and walk its graphs; knows no torch."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import onnx
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]  # comes without type information
from onnx import GraphProto, ModelProto, NodeProto, TensorProto
from onnx.helper import get_attribute_value
from onnx.inliner import inline_local_functions


def load_graph(path: Path) -> ModelProto:
    """Load a model without its external data, functions inlined. Raises ValueError for what is not one."""
    try:
        model = onnx.load(path, format="protobuf", load_external_data=False)
    except DecodeError as error:
        msg = "it is not a protobuf message"
        raise ValueError(msg) from error
    if not model.graph.node:
        msg = "its graph has no nodes"
        raise ValueError(msg)
    return inline_local_functions(model) if model.functions else model


def external_files(model: ModelProto, directory: Path) -> tuple[Path, ...]:
    """Files that hold tensors of `model`: its external data.

    Raises ValueError if one is not named plainly, as a file in `directory` is.
    """
    tensors = (tensor for tensor in _tensors(model) if tensor.data_location == TensorProto.EXTERNAL)
    names = dict.fromkeys(
        {entry.key: entry.value for entry in tensor.external_data}.get("location", "") for tensor in tensors
    )
    for name in names:
        if name in {"", ".."} or name != Path(name).name:
            msg = f"external data must lie beside the model, got location {name!r}"
            raise ValueError(msg)
    return tuple(directory / name for name in names)


def graphs(model: ModelProto) -> Iterator[GraphProto]:
    """The graph of the model, then every graph nested in its control flow."""
    waiting = [model.graph]
    while waiting:
        graph = waiting.pop(0)
        yield graph
        for node in graph.node:
            for given in node.attribute:
                waiting += [*([given.g] if given.HasField("g") else []), *given.graphs]


def stored_tensors(model: ModelProto) -> dict[str, TensorProto]:
    """Initializers and values of Constant nodes, by the name under which nodes take them.

    Raises ValueError for a sparse tensor.
    """
    stored: dict[str, TensorProto] = {}
    for graph in graphs(model):
        stored |= {tensor.name: tensor for tensor in graph.initializer}
        for node in graph.node:
            value = attribute(node, "value", None)
            if node.op_type == "Constant" and isinstance(value, TensorProto):
                stored[node.output[0]] = value
        if graph.sparse_initializer or any(attribute(node, "sparse_value", None) for node in graph.node):
            msg = "it holds sparse tensors, which are not counted"
            raise ValueError(msg)
    return stored


def attribute(node: NodeProto, name: str, default: Any) -> Any:
    """Value of an attribute of the node, or `default` where it is not given."""
    return next((get_attribute_value(given) for given in node.attribute if given.name == name), default)


def _tensors(model: ModelProto) -> Iterator[TensorProto]:
    for graph in graphs(model):
        yield from graph.initializer
        for node in graph.node:
            for given in node.attribute:
                yield from (given.t, *given.tensors)
