"""Read an ONNX file that is not trusted, and walk its graphs; knows no torch."""

import re
import stat
from collections.abc import Iterable, Iterator, Mapping, Sequence
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from google.protobuf.message import DecodeError, Message  # type: ignore[import-untyped]  # comes without type information
from onnx import FunctionProto, GraphProto, ModelProto, NodeProto, TensorProto, defs, numpy_helper
from onnx.checker import ValidationError
from onnx.helper import get_attribute_value
from onnx.inliner import inline_local_functions

MOST_FILE_BYTES = 2 << 30
"""A protobuf message holds no more. A longer file would be read into memory before that shows."""
MOST_BYTES = 16 << 30
"""With external data: such a model is beyond edge devices, and is read, counted and compressed for many minutes."""
MOST_INLINED_NODES = 10**6
"""Nodes after functions are written out. Functions that each call the next one twice, thirty deep, fill any memory and
take a file of 2 kB."""

_DOMAINS = {"", "ai.onnx", "ai.onnx.ml", "com.microsoft"}
_SETTINGS = {TensorProto.INT64, TensorProto.BOOL}
"""Types of shapes, axes and conditions, and of no weights."""


def load_graph(path: Path) -> ModelProto:
    """Load a model without its external data, functions inlined.

    The file is not trusted. Raises ValueError or OSError unless all of this holds:

    - it is a regular file, and the model in it has nodes;
    - it has at most `MOST_FILE_BYTES`, and with its external data at most `MOST_BYTES`;
    - `external_files` accepts the external data;
    - every operator is one of ONNX or of ONNX Runtime, and one that onnx knows has all operands that it needs.
    """
    if re.search("[\ud800-\udfff]", str(path)):  # bytes that are no text
        msg = "its path must be text in UTF-8, for ONNX Runtime; rename it"
        raise ValueError(msg)
    if not path.is_file():
        msg = "it is not there, or no regular file"
        raise ValueError(msg)
    _check_size(path.stat().st_size, MOST_FILE_BYTES, "a file without its external data")
    try:
        model = onnx.load(path, format="protobuf", load_external_data=False)
        _check_text(model)
        if model.functions:
            model = _inline(model)
    except DecodeError as error:
        msg = "it is not a protobuf message"
        raise ValueError(msg) from error
    if not model.graph.node:
        msg = "its graph has no nodes"
        raise ValueError(msg)
    _check_domains(model)
    _check_operands(model)
    external = external_files(model, path.parent)
    if any(map(path.samefile, external)):
        msg = "external data must be in a file of its own, got the model itself"
        raise ValueError(msg)
    files = (path, *external)
    _check_size(sum(file.stat().st_size for file in files), MOST_BYTES, "a file with its external data")
    return model


def external_files(model: ModelProto, directory: Path) -> tuple[Path, ...]:
    """Files that hold tensors of `model`: its external data.

    Raises ValueError or OSError unless each has the plain name of a file in `directory`, is a regular file to which no
    other name leads, and has the bytes that the tensors take from it. ONNX Runtime does not check for other names: it
    would follow a hard link and take any file of the same disk for weights.
    """
    sizes: dict[str, int] = {}
    for tensor in _tensors(model):
        if tensor.data_location != TensorProto.EXTERNAL:
            continue
        fields = {entry.key: entry.value for entry in tensor.external_data}
        if len(fields) != len(tensor.external_data):
            keys = [entry.key for entry in tensor.external_data]
            msg = f"external data must be described by each key once, got {keys!r} for {tensor.name!r}"
            raise ValueError(msg)
        name = fields.get("location", "")
        if name not in sizes:
            sizes[name] = _size_of_own_file(directory, name)
        end = _end(fields)
        if end > sizes[name]:
            msg = f"external data must lie within {name!r}, which has {sizes[name]:,} bytes, got an end at {end:,}"
            raise ValueError(msg)
    return tuple(directory / name for name in sizes)


def graphs(model: ModelProto) -> Iterator[GraphProto]:
    """The graph of the model, then every graph nested in its control flow."""
    yield model.graph
    yield from _graphs_below(model.graph.node)


def bodies(node: NodeProto) -> Iterator[GraphProto]:
    """The graphs that a node of control flow runs: of a condition its branches, of a loop what it repeats."""
    for given in node.attribute:
        if given.HasField("g"):
            yield given.g
        yield from given.graphs


def _graphs_below(nodes: Iterable[NodeProto]) -> Iterator[GraphProto]:
    """Every graph in the control flow of the nodes, with those nested in it."""
    for node in nodes:
        for body in bodies(node):
            yield body
            yield from _graphs_below(body.node)


def stored_tensors(model: ModelProto) -> dict[str, TensorProto]:
    """Initializers and values of Constant nodes, by the name under which nodes take them.

    Raises ValueError for a sparse tensor, and for a name that means another tensor in another graph, unless both are
    settings and no weights: of them the first is given.
    """
    stored: dict[str, TensorProto] = {}
    for graph in graphs(model):
        if graph.sparse_initializer or any(attribute(node, "sparse_value", None) for node in graph.node):
            msg = "it holds sparse tensors, which are not counted"
            raise ValueError(msg)
        for name, tensor in (*((tensor.name, tensor) for tensor in graph.initializer), *_constants(graph)):
            before = stored.setdefault(name, tensor)
            if before != tensor and not {before.data_type, tensor.data_type} <= _SETTINGS:
                msg = f"two of its graphs hold tensors of one name, {name!r}, which are not told apart"
                raise ValueError(msg)
    return stored


def _constants(graph: GraphProto) -> Iterator[tuple[str, TensorProto]]:
    """Values of Constant nodes, of numbers, by name."""
    for node in graph.node:
        if node.op_type == "Constant":
            for key in ("value", "value_float", "value_floats"):
                value = attribute(node, key, None)
                if value is not None:
                    tensor = value if key == "value" else numpy_helper.from_array(np.array(value, np.float32))
                    yield node.output[0], tensor


def input_names(model: ModelProto) -> tuple[str, ...]:
    """Names of what a model takes, in its order: its inputs that have no stored value."""
    stored = stored_tensors(model)
    return tuple(value.name for value in model.graph.input if value.name not in stored)


def attribute(node: NodeProto, name: str, default: Any) -> Any:
    """Value of an attribute of the node, or `default` where it is not given."""
    return next((get_attribute_value(given) for given in node.attribute if given.name == name), default)


def _inline(model: ModelProto) -> ModelProto:
    """The model with each call of a function replaced by the nodes of the function."""
    _check_inlined_size(model)
    try:
        inlined = inline_local_functions(model)
    except (ValidationError, RuntimeError) as error:  # RuntimeError where a call gives more inputs than there are
        msg = f"its functions cannot be inlined: {error}"
        raise ValueError(msg) from error
    called = {_identity(node) for node in _all_nodes(inlined.graph.node)}
    for function in inlined.functions:
        if _identity(function) in called:
            opsets = ", ".join(f"{opset.domain or 'ai.onnx'} {opset.version}" for opset in function.opset_import)
            name = f"{function.domain}.{function.name}"
            msg = f"a function must use the opsets of its model, got {opsets} for {name!r}"
            raise ValueError(msg)
    return inlined


def _check_inlined_size(model: ModelProto) -> None:
    """Refuse functions that call themselves, or that are called so often that too many nodes would come of them."""
    bodies = {_identity(function): list(_all_nodes(function.node)) for function in model.functions}
    callees = {name: {_identity(node) for node in body} & bodies.keys() for name, body in bodies.items()}
    sizes: dict[tuple[str, str, str], int] = {}
    try:
        for name in TopologicalSorter(callees).static_order():
            sizes[name] = sum(_weight(node) * (1 + sizes.get(_identity(node), 0)) for node in bodies[name])
            _check_inlined_nodes(sizes[name])
    except CycleError as error:
        msg = f"its functions must not call themselves, as {error.args[1][0][1]!r} does"
        raise ValueError(msg) from error
    calls = ((node, sizes.get(_identity(node), 0)) for node in _all_nodes(model.graph.node))
    _check_inlined_nodes(sum(_weight(node) * size for node, size in calls))


def _weight(node: NodeProto) -> int:
    """As how many nodes a node counts: as one more for each kB of constants in it, which fill memory as nodes do."""
    size_bytes: int = node.ByteSize()
    return 1 + size_bytes // 1000


def _check_inlined_nodes(count: int) -> None:
    if count > MOST_INLINED_NODES:
        msg = (
            f"its functions, written out at each call, must have at most {MOST_INLINED_NODES:,} nodes, of which 1 kB "
            f"of constants counts as one, got {count:,}"
        )
        raise ValueError(msg)


def _identity(called: FunctionProto | NodeProto) -> tuple[str, str, str]:
    """What tells a function from others, of the function or of a node that calls it."""
    name = called.name if isinstance(called, FunctionProto) else called.op_type
    return _domain(called.domain), name, called.overload


def _all_nodes(nodes: Sequence[NodeProto]) -> Iterator[NodeProto]:
    """The nodes, then those of every graph in their control flow."""
    yield from nodes
    for graph in _graphs_below(nodes):
        yield from graph.node


def _check_size(size_bytes: int, most: int, what: str) -> None:
    if size_bytes > most:
        msg = f"{what} must have at most {most:,} bytes ({most >> 30} GiB), got {size_bytes:,}"
        raise ValueError(msg)


def _check_text(message: Message) -> None:
    """Refuse strings that are no UTF-8: protobuf gives them as bytes, and ONNX Runtime stops at them in its own way."""
    for field, value in message.ListFields():
        if field.type not in {field.TYPE_STRING, field.TYPE_MESSAGE}:
            continue
        for part in (value,) if isinstance(value, str | bytes | Message) else value:
            if isinstance(part, bytes):
                msg = f"its names must be text in UTF-8, got {part!r} as {field.full_name}"
                raise ValueError(msg)
            if isinstance(part, Message):
                _check_text(part)


def _check_domains(model: ModelProto) -> None:
    for graph in graphs(model):
        for node in graph.node:
            if node.domain not in _DOMAINS:
                known = ", ".join(sorted(filter(None, _DOMAINS)))
                msg = f"operators must be of the domains {known}, got {f'{node.domain}.{node.op_type}'!r}"
                raise ValueError(msg)


def _check_operands(model: ModelProto) -> None:
    """Refuse an operand left out that its operator needs: at some of them ONNX Runtime ends the process."""
    # what asks for a version takes 32 bits; ONNX Runtime itself refuses one that is not there
    versions = {_domain(opset.domain): min(max(opset.version, 0), 2**31 - 1) for opset in model.opset_import}
    for node in _all_nodes(model.graph.node):
        domain = _domain(node.domain)
        known = (node.op_type, versions.get(domain, 0), domain)
        if "" not in node.input or not defs.has(*known):
            continue
        parameters = list(defs.get_schema(*known).inputs)
        parameters += parameters[-1:] * len(node.input)  # the last may be variadic
        for name, parameter in zip(node.input, parameters, strict=False):
            if not name and parameter.option != defs.OpSchema.FormalParameterOption.Optional:
                msg = f"{node.op_type} must have all its operands, got an empty name as {parameter.name!r}"
                raise ValueError(msg)


def _domain(domain: str) -> str:
    """The one name of a domain: that of ONNX has two."""
    return "" if domain == "ai.onnx" else domain


def _size_of_own_file(directory: Path, name: str) -> int:
    if name in {"", ".."} or name != Path(name).name:
        msg = f"external data must lie beside the model, got location {name!r}"
        raise ValueError(msg)
    facts = (directory / name).lstat()
    if not stat.S_ISREG(facts.st_mode) or facts.st_nlink != 1:
        msg = f"external data must be a regular file without other links to it, which {name!r} is not; copy it"
        raise ValueError(msg)
    return facts.st_size


def _end(fields: Mapping[str, str]) -> int:
    """Where a tensor ends in its file; where it begins, if it does not say how long it is."""
    places = [fields.get(key, "0") for key in ("offset", "length")]
    if not all(re.fullmatch("[0-9]{1,19}", place) for place in places):
        msg = f"external data must have whole numbers as offset and length, got {places!r}"
        raise ValueError(msg)
    return sum(map(int, places))


def _tensors(model: ModelProto) -> Iterator[TensorProto]:
    for graph in graphs(model):
        yield from graph.initializer
        for sparse in graph.sparse_initializer:
            yield from (sparse.values, sparse.indices)
        for node in graph.node:
            for given in node.attribute:
                yield from (given.t, *given.tensors)
                for sparse in (given.sparse_tensor, *given.sparse_tensors):
                    yield from (sparse.values, sparse.indices)
