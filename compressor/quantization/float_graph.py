"""A module as a float graph to plan int8 on: no mutation, few kinds of operators, BatchNorm folded if asked."""

import operator
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from typing import Any, TypeAlias, cast

import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node

from compressor.export.operator_table import share_operator_table
from compressor.export.to_onnx import capture, quiet_torch
from compressor.onnx_files.qdq import along_axis
from compressor.quantization.refusal import check_float
from compressor.task import Task

aten = torch.ops.aten

CONVOLUTIONS = {aten.conv1d.default, aten.conv1d.padding, aten.conv2d.default, aten.conv2d.padding}
TRANSPOSED = {aten.conv_transpose1d.default, aten.conv_transpose2d.input}
BATCH_NORM = aten.batch_norm.default
_DROPOUTS = {aten.dropout.default, aten.feature_dropout.default}


def float_graph(module: nn.Module, task: Task) -> GraphModule:
    """Trace `module` in evaluation mode; node names depend on it alone.

    Operators in place are gone, and what depends on weights alone is computed. Parameters keep their names. Each call
    has the name of its layer in `meta["layer"]`. Raises StageError if torch cannot trace the module, or it is not of
    float32.
    """
    check_float(module)
    with quiet_torch(), share_operator_table():
        traced = capture(module, task).run_decompositions({}).module()
    graph = _without_guards(traced)
    for rewrite in (_merge_batch_norms, _rewrite_calls, _compute_constants, _name_layers):
        rewrite(graph)
        _tidy(graph)
    return graph


def fold_batch_norms(graph: GraphModule) -> GraphModule:
    """Return a graph without the BatchNorms of signals and images, and without those that alone read a linear layer.

    A layer takes the place and the name of the BatchNorm after it, so that tensors keep their names. A BatchNorm that
    follows no layer, as in networks that normalize first, becomes a convolution of each channel with one number: in
    int8 such a network is 5 % faster than with a float BatchNorm between DQ and Q. A PReLU with one slope becomes a
    LeakyReLU.
    """
    result = copy_graph(graph)
    for node in result.graph.nodes:
        if node.target is not BATCH_NORM:
            continue
        if takes_batch_norm(arguments(node)[0]):
            _fold(result, arguments(node)[0], node)
        elif is_image_norm(node):
            _write_as_convolution(result, node)
    _write_slopes(result)
    _tidy(result)
    return result


def copy_graph(graph: GraphModule, tensors: nn.Module | None = None) -> GraphModule:
    """Return a graph of its own, with equal node names, on the same tensors, or those of equal names in `tensors`."""
    nodes = Graph()
    output = nodes.graph_copy(graph.graph, val_map={})
    nodes.output(output)
    return GraphModule(graph if tensors is None else tensors, nodes)


def parameter(graph: GraphModule, node: Node) -> Tensor:
    """Return the tensor that a `get_attr` node reads."""
    return operator.attrgetter(str(node.target))(graph)  # type: ignore[no-any-return]  # fx checks it


def add_tensor(graph: GraphModule, name: str, tensor: Tensor, *, trains: bool = True) -> Node:
    """Register `tensor` and return a new node, where the graph is being written, that reads it.

    Numbers become a parameter, which moves in training unless `trains` is false.
    """
    free = name.replace(".", "_")
    while hasattr(graph, free):
        free += "_"
    if tensor.is_floating_point() and tensor.ndim > 0:
        graph.register_parameter(free, nn.Parameter(tensor.detach(), requires_grad=trains))
    else:
        graph.register_buffer(free, tensor)
    node = graph.graph.get_attr(free)
    node.meta["val"] = tensor
    return node


def with_parameters(graph: GraphModule, tensors: Mapping[str, Tensor]) -> GraphModule:
    """Return a graph in which the `get_attr` nodes with these names read other tensors; their targets stay."""
    result = copy_graph(graph)  # its modules are its own, the tensors in them are not
    for node in result.graph.nodes:
        if node.name in tensors:
            path, _, name = str(node.target).rpartition(".")
            setattr(result.get_submodule(path), name, nn.Parameter(tensors[node.name].detach()))
    return result


def is_parameter(node: Any) -> bool:
    """Whether `node` reads a tensor of the module."""
    return isinstance(node, Node) and node.op == "get_attr"


def arguments(node: Node) -> tuple[Any, ...]:
    """Return the positional arguments of a call, which torch.fx types more broadly than they are."""
    return cast("tuple[Any, ...]", node.args)


def takes_batch_norm(layer: Node) -> bool:
    """Whether `layer` can compute what a BatchNorm makes of its outputs, which nothing else reads."""
    known = layer.target in CONVOLUTIONS | TRANSPOSED | {aten.linear.default}
    tensors = [argument for argument in arguments(layer)[1:3] if argument is not None]
    return known and len(layer.users) == 1 and all(map(is_parameter, tensors))


def is_image_norm(norm: Node) -> bool:
    """Whether a BatchNorm is of (N, C, L) or (N, C, H, W)."""
    return len(shape(norm)) in {3, 4}


def shape(node: Any) -> tuple[Any, ...]:
    """Sizes of what `node` gives; a size that may change is a symbol."""
    return tuple(node.meta["val"].shape)


def _without_guards(traced: GraphModule) -> GraphModule:
    """Return the graph without checks of its inputs, which would fail on other batches than it was traced with."""
    for node in traced.graph.nodes:
        if node.op == "call_module":
            traced.graph.erase_node(node)
        elif node.op == "output":
            node.args = (arguments(node)[0][0],)  # a model gives one tensor, an exported program a tuple
    return copy_graph(traced)


def _tidy(graph: GraphModule) -> None:
    graph.graph.eliminate_dead_code()
    graph.delete_all_unused_submodules()
    graph.recompile()


def _merge_batch_norms(graph: GraphModule) -> None:
    """Write each normalization with fixed statistics as one operator with one output, in place."""
    fixed = {aten._native_batch_norm_legit_no_training.default: 5, aten.native_batch_norm.default: 6}
    for node in graph.graph.nodes:
        norm, index = arguments(node)[:2] if node.target is operator.getitem else (node, None)
        if index == 0 and norm.target in fixed:
            node.target = BATCH_NORM
            node.args = (*arguments(norm)[:5], False, *arguments(norm)[fixed[norm.target] :], False)


def _rewrite_calls(graph: GraphModule) -> None:
    """Write calls in the form that has an int8 kernel, in place.

    Minus a number becomes a sum. A pool to a size becomes a pool of a size, where the size divides that of the image.
    Dropout, which does nothing in evaluation, is gone: it would stand between a layer and its clip.
    """
    for node in graph.graph.nodes:
        source, *rest = arguments(node) or (None,)
        if node.target is aten.sub.Tensor and isinstance(rest[0], int | float) and not node.kwargs:
            node.target, node.args = aten.add.Tensor, (source, -rest[0])
        elif node.target in _DROPOUTS and not rest[1]:
            node.replace_all_uses_with(source)
            graph.graph.erase_node(node)
        elif node.target is operator.getitem and rest == [0] and source.target is aten.adaptive_max_pool2d.default:
            image, sizes = arguments(source)
            lengths = shape(image)[-2:]
            if all(isinstance(old, int) and old % new == 0 for old, new in zip(lengths, sizes, strict=True)):
                kernel = [old // new for old, new in zip(lengths, sizes, strict=True)]
                node.target, node.args = aten.max_pool2d.default, (image, kernel, kernel)


def _compute_constants(graph: GraphModule) -> None:
    """Compute what follows from weights alone, such as the parts of a fused projection, in place.

    What follows from buffers and frozen parameters does not train either.
    """
    values: dict[Node, Any] = {}
    for node in graph.graph.nodes:
        if is_parameter(node):
            values[node] = parameter(graph, node)
        elif node.op == "call_function" and node.all_input_nodes and all(n in values for n in node.all_input_nodes):
            arguments = torch.fx.map_arg((node.args, node.kwargs), values.__getitem__)
            values[node] = node.target(*arguments[0], **arguments[1])
    for node, value in values.items():
        if node.op == "call_function" and isinstance(value, Tensor) and any(user not in values for user in node.users):
            with graph.graph.inserting_before(node):
                node.replace_all_uses_with(
                    add_tensor(graph, f"{node.name}_constant", value.clone(), trains=value.requires_grad),
                    delete_user_cb=lambda user: user not in values,
                )


_Write: TypeAlias = Callable[[Callable[..., Node], Any], Node]


def _hardsigmoid(call: Callable[..., Node], x: Any) -> Node:
    return call(aten.clamp.default, call(aten.add.Tensor, call(aten.mul.Tensor, x, 1 / 6), 0.5), 0.0, 1.0)


def _tanh(call: Callable[..., Node], x: Any) -> Node:
    sigmoid = call(aten.sigmoid.default, call(aten.mul.Tensor, x, 2.0))
    return call(aten.add.Tensor, call(aten.mul.Tensor, sigmoid, 2.0), -1.0)


SPELLED_OUT: Mapping[Any, _Write] = {
    aten.hardsigmoid.default: _hardsigmoid,
    aten.hardswish.default: lambda call, x: call(aten.mul.Tensor, x, _hardsigmoid(call, x)),
    aten.silu.default: lambda call, x: call(aten.mul.Tensor, x, call(aten.sigmoid.default, x)),
    aten.tanh.default: _tanh,
}
"""Activations for which ONNX Runtime has no int8 kernel, as operators that have one.

In int8, times 1/6 is another scale of the same codes, and a clip to (0, 1) is the end of the range.
"""


def spell_out(graph: GraphModule, names: Collection[str]) -> GraphModule:
    """Return a graph in which the activations called `names` are written as `SPELLED_OUT` says.

    A Hardsigmoid that alone reads a layer leaves x / 6 + 1 / 2 to the layer's weight and bias: only its clip is left.
    """
    result = copy_graph(graph)
    for node in result.graph.nodes:
        if node.name not in names:
            continue
        source = arguments(node)[0]
        with result.graph.inserting_before(node):
            call = _caller(result, node)
            if node.target is aten.hardsigmoid.default and _is_affine(source):
                _scale_outputs(result, source, 1 / 6, 0.5)
                written = call(aten.clamp.default, source, 0.0, 1.0)
            else:
                written = SPELLED_OUT[node.target](call, source)
        node.replace_all_uses_with(written)
    _tidy(result)
    return result


def _is_affine(layer: Node) -> bool:
    """Whether weight and bias of `layer`, a BatchNorm or what takes one, can scale and shift its outputs."""
    if layer.target is BATCH_NORM:
        return len(layer.users) == 1 and all(map(is_parameter, arguments(layer)[1:3]))
    return takes_batch_norm(layer) and layer.target not in TRANSPOSED


def _scale_outputs(graph: GraphModule, layer: Node, factor: float, offset: float) -> None:
    """Let `layer` give `factor` times its outputs, plus `offset`, in place."""
    source, weight, bias, *rest = (*arguments(layer), None)[: max(3, len(arguments(layer)))]
    old_weight = parameter(graph, weight).detach()
    old_bias = old_weight.new_zeros(len(old_weight)) if bias is None else parameter(graph, bias).detach()
    trains = parameter(graph, weight).requires_grad
    with graph.graph.inserting_before(layer):
        tensors = (
            add_tensor(graph, f"{weight.target}_scaled", old_weight * factor, trains=trains),
            add_tensor(graph, f"{layer.name}_bias_scaled", old_bias * factor + offset, trains=trains),
        )
    layer.args = (source, *tensors, *rest)


def _caller(graph: GraphModule, like: Node) -> Callable[..., Node]:
    """Return a function that writes a call whose layer and shape are those of `like`."""

    def call(target: Any, *args: Any) -> Node:
        node = graph.graph.call_function(target, args)
        node.meta = dict(like.meta)
        return node

    return call


def _name_layers(graph: GraphModule) -> None:
    """Give each call the name of its layer, in place: a path; of a function in `forward`, the path and the function."""
    taken: Counter[str] = Counter()
    for node in graph.graph.nodes:
        if node.op != "call_function":
            continue
        path, kind = next(reversed(node.meta.get("nn_module_stack", {"": ("", "")}).values()))
        function = str(getattr(node.target, "_opname", getattr(node.target, "__name__", node.name)))
        layer = path if kind.startswith("torch.nn.modules.") else ".".join(filter(None, (path, function)))
        taken[layer] += 1
        node.meta["layer"] = layer if taken[layer] == 1 else f"{layer}:{taken[layer]}"


def _fold(graph: GraphModule, layer: Node, norm: Node) -> None:
    """Let `norm`'s node compute what `layer` and then `norm` compute, in place; `meta["folded"]` says so."""
    weight, bias = (*arguments(layer), None)[1:3]
    factor, offset = _factor_and_offset(graph, norm)
    old_weight = parameter(graph, weight)
    if layer.target in TRANSPOSED:  # (in channels, out channels of a group, …)
        groups = (*arguments(layer), *(1,) * 7)[6]
        grouped = old_weight.reshape(groups, -1, *old_weight.shape[1:])
        factors = factor.reshape(groups, 1, -1, *(1,) * (old_weight.ndim - 2))
        new_weight = (grouped * factors).flatten(0, 1)
    else:
        new_weight = old_weight * factor.reshape(along_axis(0, old_weight.ndim))
    new_bias = offset if bias is None else offset + parameter(graph, bias) * factor
    with graph.graph.inserting_before(layer):
        nodes = [
            add_tensor(graph, f"{weight.target}_folded", new_weight),
            add_tensor(graph, f"{norm.name}_bias", new_bias),
        ]
    norm.target, norm.args, norm.kwargs = layer.target, (layer.args[0], *nodes, *arguments(layer)[3:]), layer.kwargs
    norm.meta = {**layer.meta, "val": norm.meta["val"], "folded": True}


def _write_as_convolution(graph: GraphModule, norm: Node) -> None:
    """Let `norm`'s node multiply each channel with a number and add another, as a convolution, in place."""
    factor, offset = _factor_and_offset(graph, norm)
    rank = len(shape(norm))
    with graph.graph.inserting_before(norm):
        nodes = [
            add_tensor(graph, f"{norm.name}_weight", factor.reshape(along_axis(0, rank))),
            add_tensor(graph, f"{norm.name}_bias", offset),
        ]
    ones = [1] * (rank - 2)
    norm.target = aten.conv1d.default if rank == 3 else aten.conv2d.default
    norm.args = (arguments(norm)[0], *nodes, ones, [0] * (rank - 2), ones, len(factor))


def _write_slopes(graph: GraphModule) -> None:
    """Write a PReLU with one slope as the LeakyReLU that it is, in place."""
    for node in graph.graph.nodes:
        if node.target is aten.prelu.default and is_parameter(arguments(node)[1]):
            source, slope = arguments(node)
            if shape(slope) == (1,):
                node.target, node.args = aten.leaky_relu.default, (source, parameter(graph, slope).detach().item())


def _factor_and_offset(graph: GraphModule, norm: Node) -> tuple[Tensor, Tensor]:
    """Return what a BatchNorm multiplies each channel with and adds to it, (C,) each."""
    gamma, beta, mean, variance = (None if node is None else parameter(graph, node) for node in arguments(norm)[1:5])
    assert mean is not None  # fixed statistics are there, gain and offset may not be
    assert variance is not None
    factor = (variance + arguments(norm)[7]).rsqrt() * (1.0 if gamma is None else gamma)
    return factor, (0.0 if beta is None else beta) - mean * factor
