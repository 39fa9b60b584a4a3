"""Cross-layer equalization: channels between two layers scaled so that the weights on both sides use their range."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from compressor.onnx_files.qdq import along_axis
from compressor.quantization.float_graph import (
    CONVOLUTIONS,
    arguments,
    aten,
    is_parameter,
    parameter,
    shape,
    with_parameters,
)

_SWEEPS = 50
_TOLERANCE = 0.01
"""Sweeps end when no factor is farther than this from one."""

_POINTWISE = {
    aten.alias.default,
    aten.clone.default,
    aten.contiguous.default,
    aten.dropout.default,
    aten.leaky_relu.default,
    aten.relu.default,
}
_OVER_IMAGES = {
    aten.adaptive_avg_pool2d.default,
    aten.avg_pool1d.default,
    aten.avg_pool2d.default,
    aten.max_pool1d.default,
    aten.max_pool2d.default,
    aten.upsample_nearest2d.vec,
}
_FLATTENINGS = {aten.flatten.using_ints, aten.reshape.default, aten.view.default}


@dataclass(frozen=True)
class _Pair:
    """Names of the nodes that read the tensors of a layer and of the layer that alone reads it."""

    weight: str
    bias: str | None
    next_weight: str
    groups: int
    """Of the channels that the second layer reads."""


def equalize(graph: GraphModule) -> GraphModule:
    """Return a graph with equal outputs in which the channels between two layers are divided by s and multiplied back.

    s_i = sqrt(r1_i / r2_i), where r1_i is the largest weight that makes channel i and r2_i the largest that reads it:
    Nagel et al. 2019 (arXiv 1906.04721), eq. 11, over all pairs until nothing changes. Between the layers stand at most
    operators f with f(s x) = s f(x) for s > 0, each read once. Zeros stay zeros, and a channel without weights stays.
    """
    nodes = {node.name: node for node in graph.graph.nodes}
    pairs = list(_pairs(graph))
    names = {name for pair in pairs for name in (pair.weight, pair.bias, pair.next_weight) if name is not None}
    tensors = {name: parameter(graph, nodes[name]).detach() for name in names}
    for _ in range(_SWEEPS):
        change = 0.0
        for pair in pairs:
            scale = _scale(tensors[pair.weight], tensors[pair.next_weight], pair.groups)
            tensors[pair.weight] = tensors[pair.weight] / scale.reshape(along_axis(0, tensors[pair.weight].ndim))
            if pair.bias is not None:
                tensors[pair.bias] = tensors[pair.bias] / scale
            tensors[pair.next_weight] = _scale_inputs(tensors[pair.next_weight], scale, pair.groups)
            change = max(change, float(scale.log().abs().max()))
        if change < _TOLERANCE:
            break
    return with_parameters(graph, tensors)


def _scale(weight: Tensor, next_weight: Tensor, groups: int) -> Tensor:
    """Return s, (C,), for the C channels between two layers; one where either has no weight."""
    made = weight.abs().flatten(1).amax(1)
    read = _by_input(next_weight, groups).abs().amax(0)
    read = read.reshape(len(made), -1).amax(1)
    scale = (made / read).sqrt()
    return torch.where(scale.isfinite() & (scale > 0), scale, 1.0)


def _by_input(weight: Tensor, groups: int) -> Tensor:
    """Shape the weight of a reader as (rows, input channels): what of it multiplies each channel."""
    parts = weight.reshape(groups, len(weight) // groups, weight.shape[1], -1)
    return parts.permute(1, 3, 0, 2).flatten(0, 1).flatten(1)


def _scale_inputs(weight: Tensor, scale: Tensor, groups: int) -> Tensor:
    """Multiply what reads each channel; a flattened channel has several columns in a row."""
    factors = scale.repeat_interleave(groups * weight.shape[1] // len(scale)).reshape(groups, 1, weight.shape[1], 1)
    parts = weight.reshape(groups, len(weight) // groups, weight.shape[1], -1)
    return (parts * factors).reshape(weight.shape)


def _pairs(graph: GraphModule) -> Iterator[_Pair]:
    for node in graph.graph.nodes:
        if not _has_own_tensors(node):
            continue
        source, reader = _follow(node)
        if reader is None or not _has_own_tensors(reader) or arguments(reader)[0] is not source:
            continue
        if (node.target in CONVOLUTIONS) == (reader.target in CONVOLUTIONS) or len(shape(source)) == 2:
            weight, bias = (*arguments(node), None)[1:3]
            read = arguments(reader)[1]
            groups = shape(source)[1] // shape(read)[1] if reader.target in CONVOLUTIONS else 1
            yield _Pair(weight.name, None if bias is None else bias.name, read.name, groups)


def _has_own_tensors(node: Node) -> bool:
    """Whether `node` is a layer whose weight and bias no other reads."""
    if node.target not in CONVOLUTIONS | {aten.linear.default}:
        return False
    tensors = [tensor for tensor in arguments(node)[1:3] if tensor is not None]
    return all(is_parameter(tensor) and len(tensor.users) == 1 for tensor in tensors)


def _follow(layer: Node) -> tuple[Node, Node | None]:
    """Follow the channels of a layer through what keeps them: the last node that has them, and what alone reads it."""
    node = layer
    while True:
        user = next(iter(node.users)) if len(node.users) == 1 else None
        if user is None or not _keeps_channels(user, of_images=layer.target in CONVOLUTIONS):
            return node, user
        node = user


def _keeps_channels(node: Node, *, of_images: bool) -> bool:
    """Whether channel i of what `node` reads, times s > 0, gives s times channel i of what it gives."""
    if node.target in _POINTWISE:
        return True
    before = shape(node.all_input_nodes[0]) if node.op == "call_function" else ()
    if not of_images or len(before) < 3:
        return False
    if node.target is aten.mean.dim:
        return min(axis % len(before) for axis in arguments(node)[1] or (0,)) > 1
    if node.target in _FLATTENINGS:  # a channel becomes several columns in a row
        sizes = before[1:]
        return all(isinstance(size, int) for size in sizes) and shape(node)[1:] == (math.prod(sizes),)
    return node.target in _OVER_IMAGES
