"""A float graph and its int8 form side by side on the same samples, to choose each layer's codes and bias in turn."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node, map_arg

from compressor.quantization.codes import CODES, Affine, WeightCodes
from compressor.quantization.float_graph import is_parameter, parameter, with_parameters
from compressor.quantization.int8_plan import Int8Plan, Unit, Weight
from compressor.task import Inputs, Split, evenly_spaced, gather

SAMPLES = 256
"""Most samples that a layer's codes and bias are chosen on."""
_NUMBERS = 2**25
"""Most numbers of one tensor on all these samples: 128 MiB of float32."""


@dataclass(frozen=True)
class Layer:
    """A layer with int8 weights in the int8 model so far, and what it gives in the float model."""

    node: Node
    weight: Tensor
    codes: WeightCodes
    """What `weight` is rounded to."""
    bias: Tensor | None
    """What is added to each output channel; None if nothing is, or another layer adds it too."""
    outputs: Tensor
    """Of the float model, before a clip: (N, C, …) of a convolution, (…, C) of a linear layer."""
    arguments: tuple[Any, ...]
    """Values, in the int8 model, of the arguments of `node`."""
    positions: tuple[int, int, int]
    """Places of input, weight and, if there is one, bias among the arguments."""

    @property
    def inputs(self) -> Tensor:
        """What the layer reads in the int8 model."""
        inputs: Tensor = self.arguments[self.positions[0]]
        return inputs

    @property
    def offset(self) -> Tensor | None:
        """What is added to each output channel, also where another layer adds it too."""
        return self.arguments[self.positions[2]] if self.bias is None and self.positions[2] >= 0 else self.bias

    def compute(self) -> Tensor:
        """Outputs of the int8 layer, before they are clipped and quantized."""
        values = list(self.arguments)
        values[self.positions[1]] = self.codes.numbers()
        if self.bias is not None:
            values[self.positions[2]] = self.bias
        outputs: Tensor = _call(self.node, values)
        return outputs


Refine: TypeAlias = Callable[[Layer], Layer]
"""Gives a layer other codes or another bias."""


def refine_layers(
    graph: GraphModule,
    plan: Int8Plan,
    affines: Mapping[str, Affine],
    weights: Mapping[str, WeightCodes],
    inputs: Inputs,
    *,
    refinements: Sequence[Refine],
) -> tuple[GraphModule, dict[str, WeightCodes]]:
    """Return the graph with other biases and the weights with other codes, each layer refined in the graph's order.

    `weights` are by name of a unit's node. A layer reads what the layers before it, refined already, give on `inputs`.
    """
    layers = {unit.node: (unit, unit.weight) for unit in plan.units if unit.weight is not None and unit.inputs}
    quantized = _Quantized(plan, affines)
    last = _last_readers(graph)
    exact: dict[Node, Any] = {}
    rough: dict[Node, Any] = {}
    codes = dict(weights)
    biases: dict[str, Tensor] = {}
    given = iter(inputs)
    with torch.no_grad():
        for node in graph.graph.nodes:
            if node.op == "output":
                break
            if node.op == "placeholder":
                exact[node] = rough[node] = next(given)
            elif is_parameter(node):
                exact[node] = rough[node] = parameter(graph, node).detach()
            else:
                exact[node] = _call(node, _values(node, exact))
                values = _values(node, {source: quantized.read(source, node, rough) for source in node.all_input_nodes})
                if node.name in layers:
                    unit, weight = layers[node.name]
                    layer = _layer(node, unit, weight, codes=codes[node.name], exact=exact, values=values)
                    for refine in refinements:
                        layer = refine(layer)
                    codes[node.name] = layer.codes
                    if weight.bias is not None and layer.bias is not None:
                        biases[weight.bias] = layer.bias
                    rough[node] = layer.compute()
                else:
                    rough[node] = _call(node, values)
            for source in last.get(node, ()):
                del exact[source], rough[source]
    return with_parameters(graph, biases), codes


def sample_inputs(graph: GraphModule, split: Split, samples: Sequence[int]) -> Inputs:
    """Inputs to refine layers on: of up to `SAMPLES` of `samples`, evenly spaced, fewer if their tensors are large.

    `samples` are indices into `split`, at least one.
    """
    sizes = _Sizes(graph)
    with torch.no_grad():
        sizes.run(*gather(split, samples[:1]).inputs)
    count = max(1, min(SAMPLES, len(samples), _NUMBERS // sizes.largest))
    return gather(split, [samples[index] for index in evenly_spaced(samples, count)]).inputs


class _Sizes(Interpreter):
    """Runs a graph and keeps the count of numbers in its largest tensor."""

    largest = 1

    def run_node(self, n: Node) -> object:
        """Run one node."""
        value: object = super().run_node(n)
        if isinstance(value, Tensor) and n.op == "call_function":
            self.largest = max(self.largest, value.numel())
        return value


class _Quantized:
    """What nodes of the int8 model read of each other."""

    def __init__(self, plan: Int8Plan, affines: Mapping[str, Affine]) -> None:
        self._plan, self._affines = plan, affines
        self._inputs = {unit.node: unit.inputs for unit in plan.units}

    def read(self, source: Node, reader: Node, values: Mapping[Node, Any]) -> Any:
        """Return what `reader` reads of `source`, of which `values` has the value before it is quantized."""
        activation = self._plan.activations.get(source.name)
        if activation is None or not (activation.everywhere or source.name in self._inputs.get(reader.name, ())):
            return values[source]
        scale, zero_point = self._affines[source.name]
        return torch.fake_quantize_per_tensor_affine(values[source], scale, zero_point, 0, CODES)


def _layer(
    node: Node, unit: Unit, weight: Weight, *, codes: WeightCodes, exact: Mapping[Node, Any], values: Sequence[Any]
) -> Layer:
    sources = {argument.name: place for place, argument in enumerate(node.args) if isinstance(argument, Node)}
    bias = next((source for source in node.all_input_nodes if source.name == weight.bias), None)
    return Layer(
        node=node,
        weight=values[sources[weight.node]],
        codes=codes,
        bias=exact[bias] if bias is not None and len(bias.users) == 1 else None,
        outputs=exact[node],
        arguments=tuple(values),
        positions=(sources[unit.inputs[0]], sources[weight.node], sources.get(weight.bias or "", -1)),
    )


def _values(node: Node, values: Mapping[Node, Any]) -> tuple[Any, ...]:
    read: tuple[Any, ...] = map_arg(node.args, values.__getitem__)
    return read


def _call(node: Node, values: Sequence[Any]) -> Any:
    assert callable(node.target)  # a float graph has no other calls
    return node.target(*values, **node.kwargs)


def _last_readers(graph: GraphModule) -> dict[Node, list[Node]]:
    """By node, the nodes that it is the last to read."""
    seen: set[Node] = set()
    last: dict[Node, list[Node]] = {}
    for node in reversed(graph.graph.nodes):
        unread = [source for source in node.all_input_nodes if source not in seen]
        seen.update(unread)
        last[node] = unread
    return last
