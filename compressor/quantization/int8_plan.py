"""Which tensors of a float graph become int8, chosen so that ONNX Runtime fuses all of them into int8 kernels."""

import operator
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

from torch.fx import GraphModule, Node

from compressor.quantization.float_graph import (
    BATCH_NORM,
    CONVOLUTIONS,
    SPELLED_OUT,
    aten,
    is_image_norm,
    is_parameter,
    shape,
    spell_out,
    takes_batch_norm,
)


@dataclass(frozen=True)
class Weight:
    """Numbers to multiply with, which become int8 with one scale per index along `channel_axis`."""

    node: str
    """Name of the node that reads them."""
    channel_axis: int
    bias: str | None
    """Name of the node that reads the bias to add to the products, if there is one."""
    integer_bias: bool = False
    """Whether the bias is int32 in the file; ONNX Runtime makes it so by itself where outputs are uint8."""
    one_scale: bool = False
    """Whether one scale may do for all output channels: ONNX Runtime multiplies vectors a quarter faster with it."""


@dataclass(frozen=True)
class Unit:
    """An operator that becomes int8 with, where there are, the BatchNorm and the clip after it.

    One without inputs has a weight that is only stored as int8: it computes in float, as fast as before.
    """

    layer: str
    node: str
    """Name of the operator."""
    inputs: tuple[str, ...]
    """Names of the tensors, each that of the node that gives it, which it reads as uint8."""
    output: str | None
    """Name of the tensor that it gives as uint8; None if its output is float."""
    weight: Weight | None = None


@dataclass(frozen=True)
class Activation:
    """A tensor that becomes uint8, with one scale and zero point."""

    like: str
    """Name of the tensor whose scale and zero point it has: its own, unless it only moves or scales that one."""
    factor: float = 1.0
    """Its scale divided by that of `like`."""
    everywhere: bool = True
    """Whether all that read it read uint8, or the units alone."""


@dataclass(frozen=True)
class Int8Plan:
    """What becomes int8: the units in the order of the graph, and by name the tensors between them."""

    units: tuple[Unit, ...]
    activations: Mapping[str, Activation]

    @property
    def layers(self) -> tuple[str, ...]:
        """Names of the layers that have a unit, each once, in the order of the graph."""
        return tuple(dict.fromkeys(unit.layer for unit in self.units))

    @property
    def computes(self) -> bool:
        """Whether some layer multiplies int8 weights with uint8 activations."""
        return any(unit.weight is not None and unit.inputs for unit in self.units)

    @property
    def tensors_with_range(self) -> tuple[str, ...]:
        """Names of the tensors with a range of their own."""
        return tuple(name for name, activation in self.activations.items() if activation.like == name)


def list_float_layers(graph: GraphModule, plan: Int8Plan) -> tuple[str, ...]:
    """Names of the layers with a weight of two dimensions or more that has no place in `plan`."""
    known = {unit.node for unit in plan.units if unit.weight is not None}
    return tuple(
        str(node.meta["layer"])
        for node in graph.graph.nodes
        if node.op == "call_function" and node.name not in known
        if any(is_parameter(source) and len(shape(source)) > 1 for source in node.all_input_nodes)
    )


def plan_int8(
    graph: GraphModule, *, keep_float: Collection[str] = (), compute_float: Collection[str] = ()
) -> tuple[GraphModule, Int8Plan]:
    """Return `graph` with some activations spelled out, and what of it becomes int8.

    Convolutions, sums, products, pools, concatenations and data movement pass uint8 on to each other. A linear layer
    gives uint8 only to a layer that wants it: float logits cost no time and lose no accuracy. Sums and the like join if
    all their inputs are uint8 already: so the float stream of a transformer stays whole. They also join if their other
    inputs are stretched to the size of one that is uint8. Of transposed convolutions and embeddings only the weights
    become int8, and they are only stored so.

    The layers in `keep_float` are left as they are; of those in `compute_float` the weights alone are int8.
    """
    nodes = {node.name: node for node in graph.graph.nodes}
    whole = _plan(graph, keep_float, compute_float)
    spelled = spell_out(graph, {unit.node for unit in whole.units if nodes[unit.node].target in SPELLED_OUT})
    return spelled, _plan(spelled, keep_float, compute_float)


@dataclass
class _Draft:
    """What is planned so far; only `_plan` sees it change."""

    units: list[Unit] = field(default_factory=list)
    activations: dict[str, Activation] = field(default_factory=dict)
    parts: set[str] = field(default_factory=set)
    """Nodes that belong to the unit of a node before them."""
    floats: frozenset[str] = frozenset()
    """Layers that compute in float."""

    def is_int8(self, node: Any) -> bool:
        return isinstance(node, Node) and node.name in self.activations and self.activations[node.name].everywhere

    def add(self, node: Node, inputs: Collection[Node], last: Node | None, weight: Weight | None = None) -> None:
        """Add the unit of `node`, which reads `inputs` and gives `last` as uint8, or float."""
        for source in inputs:
            self.activations.setdefault(source.name, Activation(source.name, everywhere=False))
        if last is not None:
            self.activations[last.name] = Activation(last.name)
        output = None if last is None else last.name
        names = tuple(source.name for source in inputs)
        self.units.append(Unit(node.meta["layer"], node.name, names, output, weight))

    def move(self, node: Node, source: Node, reader: Node, factor: float = 1.0) -> None:
        """Add the unit of `node`, which gives what `reader` reads from `source`, or `factor` times as much."""
        before = self.activations[source.name]
        self.activations[node.name] = Activation(before.like, before.factor * factor)
        self.units.append(Unit(node.meta["layer"], reader.name, (source.name,), node.name))


def _plan(graph: GraphModule, keep_float: Collection[str], compute_float: Collection[str]) -> Int8Plan:
    draft = _Draft(floats=frozenset((*keep_float, *compute_float)))
    for node in graph.graph.nodes:
        if node.op != "call_function" or node.meta["layer"] in keep_float:
            continue
        add = _FAMILIES.get(node.target)
        if node.target in _STORED or (add in {_convolution, _linear} and node.meta["layer"] in compute_float):
            _store(draft, node)
        elif add is not None and node.meta["layer"] not in compute_float and node.name not in draft.parts:
            draft.parts.update(part.name for part in _parts(node))
            add(draft, node)
    read = {name for unit in draft.units for name in unit.inputs}
    nodes = {node.name: node for node in graph.graph.nodes}
    units = tuple(_as_gemm(unit, nodes[unit.node], read) for unit in draft.units)
    return Int8Plan(units, draft.activations)


def _as_gemm(unit: Unit, node: Node, read: Collection[str]) -> Unit:
    """Fit a linear layer on vectors, (N, C), to ONNX Runtime's int8 Gemm; it needs an int32 bias where it gives floats.

    Layers on sequences, (N, L, C), have a product and a sum in ONNX instead. Codes are the same before a BatchNorm is
    folded and after it only if each channel has a scale of its own.
    """
    if unit.weight is None or not unit.inputs or node.target not in LINEARS:
        return unit
    if len(shape(node.args[LINEARS[node.target][0]])) != 2:
        return unit
    gives_floats = unit.output is None and _last(node).name not in read
    normalized = "folded" in node.meta or any(part.target is BATCH_NORM for part in _parts(node))
    return replace(unit, weight=replace(unit.weight, integer_bias=gives_floats, one_scale=not normalized))


def _parts(node: Node) -> list[Node]:
    """List the BatchNorm and the clip that follow `node` and belong to its kernel."""
    parts = []
    for kinds in ({BATCH_NORM} if node.target in _WITH_BATCH_NORM else set(), CLIPS):
        user = next(iter(node.users)) if len(node.users) == 1 else None
        if user is not None and user.target in kinds and user.args[0] is node:
            parts.append(user)
            node = user
    return parts


def _last(node: Node) -> Node:
    return (node, *_parts(node))[-1]


def _convolution(draft: _Draft, node: Node) -> None:
    source, weight, bias = (*node.args, None)[:3]
    if isinstance(source, Node) and isinstance(weight, Node) and is_parameter(weight):
        known = Weight(weight.name, 0, bias.name if isinstance(bias, Node) else None)
        draft.add(node, [source], _last(node), known)


def _linear(draft: _Draft, node: Node) -> None:
    source, weight, bias = (
        None if position is None else (*node.args, None, None)[position] for position in LINEARS[node.target][:3]
    )
    if isinstance(source, Node) and isinstance(weight, Node) and is_parameter(weight) and len(shape(weight)) == 2:
        axis = LINEARS[node.target][3]
        draft.add(node, [source], None, Weight(weight.name, axis, bias.name if isinstance(bias, Node) else None))


def _store(draft: _Draft, node: Node) -> None:
    position, channel_axis = _STORED.get(node.target) or LINEARS.get(node.target, (0, 1, 2, 0))[1::2]
    weight = node.args[position]
    if isinstance(weight, Node) and is_parameter(weight) and len(shape(weight)) > 1:
        draft.add(node, [], None, Weight(weight.name, channel_axis, None))


def _own_scales(draft: _Draft, node: Node) -> None:
    # Concatenation is here as well: a scale shared with a signed tensor has a zero point that would keep the ReLU of
    # another input out of its kernel.
    if all(map(draft.is_int8, node.all_input_nodes)):
        draft.add(node, list(dict.fromkeys(node.all_input_nodes)), _last(node))


def _arithmetic(draft: _Draft, node: Node) -> None:
    first, second = node.args[:2]
    if isinstance(first, Node) and isinstance(second, Node):
        sources = node.all_input_nodes
        wide = next(filter(draft.is_int8, sources), None)
        narrow = [source for source in sources if not draft.is_int8(source)]
        # a sum may be weighted, and there is no int8 kernel for quotients
        if wide is None or node.kwargs or node.target is aten.div.Tensor:
            return
        if not all(_is_stretched(source, wide) for source in narrow):
            return
        for source in narrow:
            _want(draft, source)
        draft.add(node, sources, _last(node))
    elif isinstance(first, Node) and isinstance(second, int | float) and draft.is_int8(first) and not node.kwargs:
        scales = node.target is not aten.add.Tensor
        if scales and second > 0:
            draft.move(node, first, node, 1 / second if node.target is aten.div.Tensor else second)
        elif not scales and second != 0:
            draft.add(node, [first], _last(node))


def _is_stretched(narrow: Node, wide: Node) -> bool:
    """Whether some axis of `narrow` is repeated to the length that it has in `wide`."""
    lengths, wide_lengths = shape(narrow), shape(wide)
    lengths = (1,) * (len(wide_lengths) - len(lengths)) + lengths
    ones, wide_ones = ([isinstance(n, int) and n == 1 for n in axes] for axes in (lengths, wide_lengths))
    stretched = any(one and not wide for one, wide in zip(ones, wide_ones, strict=False))
    return stretched and bool(narrow.meta["val"].is_floating_point())


def _want(draft: _Draft, node: Node) -> None:
    """Let `node` be uint8, and what lies between it and the linear layer it comes from, if it does."""
    first = node
    while first.name in draft.parts:
        first = first.all_input_nodes[0]
    family = _FAMILIES.get(first.target)
    if first.op == "call_function" and first.meta["layer"] in draft.floats:
        family = None
    if family is _linear and len(shape(first)) == 2:
        for index, unit in enumerate(draft.units):
            if unit.node == first.name:
                draft.units[index] = replace(unit, output=node.name)
                draft.activations[node.name] = Activation(node.name)
    elif family in {_movement, _own_scales} and first is node and len(node.all_input_nodes) == 1 and not _parts(node):
        _want(draft, node.all_input_nodes[0])
        family(draft, node)


def _batch_norm(draft: _Draft, node: Node) -> None:
    source = node.args[0]  # `folded` gives what has a layer before it to that layer, and makes a layer of the others
    if isinstance(source, Node) and not takes_batch_norm(source) and is_image_norm(node):
        draft.add(node, [source], _last(node))


def _parametric_relu(draft: _Draft, node: Node) -> None:
    source, slope = node.args
    if draft.is_int8(source) and is_parameter(slope) and shape(slope) == (1,):
        draft.add(node, [source], _last(node))  # type: ignore[list-item]  # int8 tensors have a node


def _padding(draft: _Draft, node: Node) -> None:
    settings = dict(zip(("mode", "fill"), node.args[2:], strict=False))
    if settings.get("mode", "constant") != "constant" or not settings.get("fill"):  # another number may have no code
        _movement(draft, node)


def _movement(draft: _Draft, node: Node) -> None:
    source = node.args[0]
    if isinstance(source, Node) and draft.is_int8(source):
        draft.move(node, source, node)


def _part(draft: _Draft, node: Node) -> None:
    """One of several tensors that a split gave."""
    split = node.args[0]
    source = split.args[0] if isinstance(split, Node) and split.target in _SPLITS else None
    if isinstance(split, Node) and isinstance(source, Node) and draft.is_int8(source):
        draft.move(node, source, split)


CLIPS = {aten.relu.default, aten.relu6.default, aten.hardtanh.default, aten.clamp.default}
_SPLITS = {aten.split.Tensor, aten.split_with_sizes.default, aten.chunk.default}

# Positions of input, weight and bias among the arguments, and the weight's axis of output channels.
LINEARS: Mapping[Any, tuple[int, int, int | None, int]] = {
    aten.linear.default: (0, 1, 2, 0),
    aten.addmm.default: (1, 2, 0, 1),
    aten.mm.default: (0, 1, None, 1),
    aten.matmul.default: (0, 1, None, 1),
}
# Position of a weight that no int8 kernel takes, and its axis of output channels.
_STORED: Mapping[Any, tuple[int, int]] = {
    aten.conv_transpose1d.default: (1, 1),
    aten.conv_transpose2d.input: (1, 1),
    aten.embedding.default: (0, 0),
}
_WITH_BATCH_NORM = {*CONVOLUTIONS, aten.linear.default}

_Family: TypeAlias = Callable[[_Draft, Node], None]
_FAMILIES: Mapping[Any, _Family] = {
    **dict.fromkeys(CONVOLUTIONS, _convolution),
    **dict.fromkeys(LINEARS, _linear),
    **dict.fromkeys((aten.add.Tensor, aten.mul.Tensor, aten.div.Tensor), _arithmetic),
    **dict.fromkeys(
        (
            *CLIPS,
            *SPELLED_OUT,
            aten.adaptive_avg_pool2d.default,
            aten.avg_pool1d.default,
            aten.avg_pool2d.default,
            aten.cat.default,
            aten.leaky_relu.default,
            aten.mean.dim,
            aten.sigmoid.default,
        ),
        _own_scales,
    ),
    BATCH_NORM: _batch_norm,
    aten.pad.default: _padding,
    aten.prelu.default: _parametric_relu,
    operator.getitem: _part,
    **dict.fromkeys(
        (
            aten._unsafe_view.default,
            aten.alias.default,
            aten.amax.default,
            aten.clone.default,
            aten.contiguous.default,
            aten.expand.default,
            aten.flatten.using_ints,
            aten.max_pool1d.default,
            aten.max_pool2d.default,
            aten.permute.default,
            aten.pixel_shuffle.default,
            aten.repeat.default,
            aten.reshape.default,
            aten.select.int,
            aten.slice.Tensor,
            aten.squeeze.default,
            aten.squeeze.dim,
            aten.squeeze.dims,
            aten.transpose.int,
            aten.unflatten.int,
            aten.unsqueeze.default,
            aten.upsample_nearest2d.vec,
            aten.view.default,
        ),
        _movement,
    ),
}
