"""A planned graph with its codes: what the ONNX file will hold, and what runs in PyTorch for comparison."""

from collections.abc import Callable, Collection, Mapping
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from compressor.export.operators import DEQUANTIZE, QUANTIZE, STORED
from compressor.quantization.codes import (
    CODES,
    STORED_LIMIT,
    Affine,
    Range,
    WeightCodes,
    affine,
    weight_codes,
    weight_scale,
)
from compressor.quantization.float_graph import add_tensor, aten, copy_graph, parameter
from compressor.quantization.int8_plan import Int8Plan, Unit

Wrap: TypeAlias = Callable[[GraphModule, Node], Node]
"""Given a tensor's node, writes and returns the node that is read in its place."""


def affine_of(plan: Int8Plan, ranges: Mapping[str, Range]) -> dict[str, Affine]:
    """Scale and zero point by name of each tensor of `plan`, from the ranges of those that have one of their own."""
    own = {name: affine(ranges[name]) for name in plan.tensors_with_range}
    return {
        name: Affine(own[activation.like].scale * activation.factor, own[activation.like].zero_point)
        for name, activation in plan.activations.items()
    }


def round_weights(
    graph: GraphModule, plan: Int8Plan, affines: Mapping[str, Affine], limit: int
) -> dict[str, WeightCodes]:
    """Codes of the weights by name of their unit's node, each weight rounded to the nearest.

    `limit` is the largest code of those that an int8 kernel multiplies with; the others take all eight bits.
    """
    nodes = {node.name: node for node in graph.graph.nodes}
    codes = {}
    for unit in plan.units:
        if unit.weight is not None:
            weight, axis = parameter(graph, nodes[unit.weight.node]), unit.weight.channel_axis
            bias = parameter(graph, nodes[unit.weight.bias]) if unit.weight.bias else None
            input_scale = affines[unit.inputs[0]].scale if unit.inputs else 1.0
            largest = weight_limit(plan, unit, limit)
            one_scale = unit.weight.one_scale
            scale = weight_scale(weight, axis, largest, bias=bias, input_scale=input_scale, one_scale=one_scale)
            codes[unit.node] = weight_codes(weight, scale, axis, largest)
    return codes


def weight_limit(plan: Int8Plan, unit: Unit, limit: int) -> int:
    """Largest code of a unit's weight: `limit` if some int8 kernel multiplies with it, else that of int8."""
    readers = (other for other in plan.units if other.weight and unit.weight and other.weight.node == unit.weight.node)
    return limit if any(other.inputs for other in readers) else STORED_LIMIT


def convert(
    graph: GraphModule, plan: Int8Plan, affines: Mapping[str, Affine], weights: Mapping[str, WeightCodes]
) -> GraphModule:
    """Return the graph with codes: each tensor of `plan` is quantized and dequantized, each weight stored as int8.

    `weights` are by name of a unit's node. ONNX Runtime runs each unit between its dequantized inputs and its quantized
    output as one kernel.
    """

    def activation(result: GraphModule, node: Node) -> Node:
        scale, zero_point = affines[node.name]
        tensors = _parameters(result, node.name, scale, zero_point)
        codes = result.graph.call_function(QUANTIZE, (node, *tensors, 0))
        return result.graph.call_function(DEQUANTIZE, (codes, *tensors, 0))

    def weight(result: GraphModule, node: Node, unit: Unit) -> Node:
        codes, scale, axis = weights[unit.node]
        if unit.inputs:
            return _dequantize(result, node.name, codes, _shortest(scale, unit), axis)
        nodes = [add_tensor(result, f"{node.name}_codes", codes), add_tensor(result, f"{node.name}_scale", scale)]
        return result.graph.call_function(STORED, (*nodes, axis))

    result = wrap(graph, plan, activation, weight)
    nodes = {node.name: node for node in result.graph.nodes}
    for unit in plan.units:
        node = nodes[unit.node]
        with result.graph.inserting_before(node):
            if unit.weight is not None and unit.inputs and unit.weight.bias is not None:
                scale = affines[unit.inputs[0]].scale * _shortest(weights[unit.node].scale, unit)
                write = _integer_bias if unit.weight.integer_bias else _round_bias
                bias = write(result, nodes[unit.weight.bias], scale)
                node.replace_input_with(nodes[unit.weight.bias], bias)
            elif unit.weight is None and len(node.args) > 1 and isinstance(node.args[1], int | float):
                _write_number(result, node, unit, affines)
    _shield_floats(result, {nodes[unit.node] for unit in plan.units if unit.inputs})
    result.graph.eliminate_dead_code()
    result.delete_all_unused_submodules()
    result.recompile()
    return result


def _shield_floats(result: GraphModule, int8: Collection[Node]) -> None:
    """Let what computes in float read dequantized numbers clipped to what codes can be, in place: equal, bit for bit.

    ONNX Runtime takes any operator that reads a DequantizeLinear for one that wants int8, and rounds float weights to
    int8 by itself. A clip between the two keeps it away. A product with 1 would be taken away, and another scale on the
    same codes is read wrongly elsewhere. `int8` are the nodes that are meant to be fused.
    """
    for codes in [node for node in result.graph.nodes if node.target is QUANTIZE]:
        for dequantized in [user for user in codes.users if user.target is DEQUANTIZE]:
            readers = [user for user in dequantized.users if user not in int8 and _computes(user)]
            if not readers:
                continue
            scale, zero_point = (float(parameter(result, node)) for node in dequantized.all_input_nodes[1:])
            ends = [float(np.float32(scale) * np.float32(code - zero_point)) for code in (0, CODES)]
            with result.graph.inserting_before(dequantized.next):
                shielded = result.graph.call_function(aten.clamp.default, (dequantized, *ends))
            shielded.meta = dict(dequantized.meta)
            for reader in readers:
                reader.replace_input_with(dequantized, shielded)


def _computes(node: Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, Tensor)


def wrap(
    graph: GraphModule, plan: Int8Plan, activation: Wrap, weight: Callable[[GraphModule, Node, Unit], Node]
) -> GraphModule:
    """Return the graph in which units read, in place of a tensor, what `activation` or `weight` writes for it."""
    result = copy_graph(graph)
    nodes = {node.name: node for node in result.graph.nodes}
    readers: dict[str, set[Node]] = {}
    for unit in plan.units:
        for name in unit.inputs:
            readers.setdefault(name, set()).add(nodes[unit.node])
    for name, planned in plan.activations.items():
        node = nodes[name]
        users = list(node.users) if planned.everywhere else [user for user in node.users if user in readers[name]]
        with result.graph.inserting_after(_after(node)):
            # each call is written at the same place, so the last written would come first
            anchor = result.graph.call_function(aten.alias.default, (node,))
        with result.graph.inserting_before(anchor):
            instead = activation(result, node)
        result.graph.erase_node(anchor)
        instead.meta["val"] = node.meta["val"]
        for user in users:
            user.replace_input_with(node, instead)
    for unit in plan.units:
        if unit.weight is not None:
            reader, tensor = nodes[unit.node], nodes[unit.weight.node]
            with result.graph.inserting_before(reader):
                reader.replace_input_with(tensor, weight(result, tensor, unit))
    result.recompile()
    return result


def _after(node: Node) -> Node:
    """Return the last input of the graph if `node` is one, as inputs come before all else."""
    while node.op == "placeholder" and node.next.op == "placeholder":
        node = node.next
    return node


def _parameters(result: GraphModule, name: str, scale: float, zero_point: int) -> tuple[Node, Node]:
    return (
        add_tensor(result, f"{name}_scale", torch.tensor(scale)),
        add_tensor(result, f"{name}_zero_point", torch.tensor(zero_point, dtype=torch.uint8)),
    )


def _shortest(scale: Tensor, unit: Unit) -> Tensor:
    """Scales of a weight, (C,), or the only one, ()."""
    only = unit.weight is not None and unit.weight.one_scale and bool((scale == scale[0]).all())
    return scale[0].clone() if only else scale


def _dequantize(result: GraphModule, name: str, codes: Tensor, scale: Tensor, axis: int) -> Node:
    """Write codes without zero point and what makes them numbers."""
    tensors = {"codes": codes, "scale": scale, "zero_point": torch.zeros(scale.shape, dtype=codes.dtype)}
    nodes = [add_tensor(result, f"{name}_{part}", tensor) for part, tensor in tensors.items()]
    return result.graph.call_function(DEQUANTIZE, (*nodes, axis))


def _integer_bias(result: GraphModule, bias: Node, scale: Tensor) -> Node:
    codes = torch.round(parameter(result, bias).detach() / scale).to(torch.int32)
    return _dequantize(result, bias.name, codes, scale, 0)


def _round_bias(result: GraphModule, bias: Node, scale: Tensor) -> Node:
    """A float bias rounded as ONNX Runtime rounds it, so that PyTorch computes with the same one."""
    codes = torch.round(parameter(result, bias).detach() / scale)
    return add_tensor(result, f"{bias.name}_rounded", codes * scale)


def _write_number(result: GraphModule, node: Node, unit: Unit, affines: Mapping[str, Affine]) -> None:
    """Write a sum with a number, or a product, on codes, in place.

    A product has the codes of what it multiplies. Any number has a code that stands for it exactly.
    """
    number: Any = node.args[1]
    if node.target is aten.add.Tensor:
        zero_point = 0 if number > 0 else CODES
        tensors = _parameters(result, f"{node.name}_number", abs(number) / CODES, zero_point)
        codes = add_tensor(result, f"{node.name}_number_codes", torch.tensor(CODES - zero_point, dtype=torch.uint8))
        node.args = (node.args[0], result.graph.call_function(DEQUANTIZE, (codes, *tensors, 0)))
    elif unit.output == node.name and node.target in {aten.mul.Tensor, aten.div.Tensor}:
        dequantized: Any = node.args[0]
        tensors = _parameters(result, f"{node.name}_scaled", *affines[node.name])
        node.target, node.args = DEQUANTIZE, (dequantized.args[0], *tensors, 0)
