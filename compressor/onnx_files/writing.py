"""An ONNX graph without what no runtime needs, and its file: fewer bytes, private, equal at every export."""

import hashlib
import itertools
import string
from collections.abc import Iterator, Mapping
from pathlib import Path

import onnx
from onnx import AttributeProto, GraphProto, ModelProto, NodeProto, TensorProto, external_data_helper

from compressor.onnx_files.reading import bodies, graphs

INLINE_BYTES = 2_000_000_000
"""Models with more tensor bytes keep their tensors beside the ONNX file: protobuf messages end at 2 GiB."""

# The operators' documentation gives these defaults; the schemas cannot, because they depend on the rank.
_IMPLIED = {"strides": 1, "dilations": 1, "pads": 0}


def compact(model: ModelProto) -> ModelProto:
    """Return a graph that computes the same and holds only what that takes.

    Gone are source paths, stack traces, node names, inferred shapes, attributes that equal their default, unused
    operator sets and every tensor equal to another; what is left, inputs and outputs aside, has names of one or two
    letters.
    """
    smaller = ModelProto()
    smaller.CopyFrom(model)
    graph = smaller.graph
    graph.name = "model"
    opset = next(imported.version for imported in model.opset_import if imported.domain == "")
    del graph.metadata_props[:]
    del graph.value_info[:]
    for value in (*graph.input, *graph.output):
        del value.metadata_props[:]
    names = _merge_equal_initializers(graph)
    nodes = [node for scope in graphs(smaller) for node in scope.node]
    for node in nodes:
        node.ClearField("name")  # an empty text would still take two bytes
        node.ClearField("doc_string")
        del node.metadata_props[:]
        _drop_defaults(node, opset)
    _rename(graph, names)
    used = {node.domain for node in nodes} | {""}
    kept = [imported for imported in model.opset_import if imported.domain in used]
    del smaller.opset_import[:]
    smaller.opset_import.extend(kept)
    return smaller


def with_metadata(model: ModelProto, metadata: Mapping[str, str]) -> ModelProto:
    """Return `model` with these entries among its metadata."""
    described = ModelProto()
    described.CopyFrom(model)
    merged = {entry.key: entry.value for entry in model.metadata_props} | dict(metadata)
    del described.metadata_props[:]
    onnx.helper.set_model_props(described, dict(sorted(merged.items())))
    return described


def write(model: ModelProto, path: Path, *, inline_bytes: int = INLINE_BYTES) -> None:
    """Write `model` to `path` and check the file; with more than `inline_bytes` of tensors, those go to `path`.data.

    Raises onnx.checker.ValidationError if the model breaks the ONNX specification.
    """
    stored = ModelProto()
    stored.CopyFrom(model)
    data = path.with_name(path.name + ".data")
    data.unlink(missing_ok=True)  # onnx appends to a file that is there
    if sum(len(tensor.raw_data) for tensor in model.graph.initializer) > inline_bytes:
        external_data_helper.convert_model_to_external_data(stored, location=data.name)
        stored = external_data_helper.write_external_data_tensors(stored, str(path.parent))
    path.write_bytes(stored.SerializeToString(deterministic=True))
    onnx.checker.check_model(str(path), full_check=True)


def _merge_equal_initializers(graph: GraphProto) -> dict[str, str]:
    """Keep the first of equal tensors, in place; returns the name to use by the name that is gone."""
    fixed = {value.name for value in (*graph.input, *graph.output)}
    first: dict[tuple[object, ...], str] = {}
    merged: dict[str, str] = {}
    kept: list[TensorProto] = []
    for tensor in graph.initializer:
        del tensor.metadata_props[:]
        tensor.ClearField("doc_string")
        content = TensorProto()
        content.CopyFrom(tensor)
        content.ClearField("name")
        digest = hashlib.sha256(content.SerializeToString(deterministic=True)).digest()
        equal_to = first.setdefault((tensor.data_type, tuple(tensor.dims), digest), tensor.name)
        if equal_to == tensor.name or tensor.name in fixed:
            kept.append(tensor)
        else:
            merged[tensor.name] = equal_to
    del graph.initializer[:]
    graph.initializer.extend(kept)
    return merged


def _drop_defaults(node: NodeProto, opset: int) -> None:
    """Remove attributes that say what the operator does anyway, in place."""
    if node.domain:
        return
    schema = onnx.defs.get_schema(node.op_type, opset)
    kept = [attribute for attribute in node.attribute if not _is_default(attribute, schema)]
    del node.attribute[:]
    node.attribute.extend(kept)


def _is_default(attribute: AttributeProto, schema: onnx.defs.OpSchema) -> bool:
    value = onnx.helper.get_attribute_value(attribute)
    if attribute.name in _IMPLIED and attribute.type == AttributeProto.INTS:
        return set(value) == {_IMPLIED[attribute.name]}
    default = schema.attributes[attribute.name].default_value
    return default.type == attribute.type and bool(onnx.helper.get_attribute_value(default) == value)


def _rename(graph: GraphProto, merged: Mapping[str, str]) -> None:
    """Give every tensor but inputs and outputs a short name, in place; `merged` tensors take another's."""
    fixed = {value.name for value in (*graph.input, *graph.output)}
    fresh = (name for name in _short_names() if name not in fixed)
    names: dict[str, str] = {name: name for name in (*fixed, "")}

    def short(name: str) -> str:
        original = merged.get(name, name)
        if original not in names:
            names[original] = next(fresh)
        return names[original]

    def visit(scope: GraphProto) -> None:
        for value in (*scope.initializer, *scope.input, *scope.output):
            value.name = short(value.name)
        for node in scope.node:
            node.input[:] = [short(name) for name in node.input]
            node.output[:] = [short(name) for name in node.output]
            for body in bodies(node):
                visit(body)

    visit(graph)


def _short_names() -> Iterator[str]:
    for length in itertools.count(1):
        for letters in itertools.product(string.ascii_letters, repeat=length):
            yield "".join(letters)
