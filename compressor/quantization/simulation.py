"""Int8 as training sees it: a float graph that rounds what the int8 graph will round, with gradients.

No folding is simulated. The weight of an output channel has a scale of its own, and BatchNorm's folding multiplies
both by one factor, so rounding before folding and after it gives the same codes (Jacob et al. 2018 fold first, and so
have to estimate BatchNorm's statistics beforehand).
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from compressor.onnx_files.qdq import along_axis
from compressor.quantization.codes import CODES, Range, weight_scale
from compressor.quantization.conversion import affine_of, weight_limit, wrap
from compressor.quantization.float_graph import BATCH_NORM, add_tensor, arguments, aten, parameter
from compressor.quantization.int8_plan import Int8Plan, Unit

AVERAGING = 0.01
"""How far a range moves, at each step, towards that of the batch."""
_MOMENTUM = 0.1
"""The same for BatchNorm's statistics, where the model gives no number: `momentum=None` weighs all batches equally."""


def simulate(graph: GraphModule, plan: Int8Plan, ranges: Mapping[str, Range], limit: int, *, live: bool) -> GraphModule:
    """Return `graph` with every tensor of `plan` rounded to its codes; gradients pass rounding, but not clipping.

    If `live`, each range starts as in `ranges` and follows the batches. BatchNorm then normalizes each batch by itself,
    and its statistics follow too, also in evaluation mode: such a graph is for training alone. If not `live`, the
    outputs are those of `convert`, up to the order of sums. `limit` is the largest code of a weight. Parameters keep
    their names. Tensors are those of `graph`, so train a copy, as `fit` does.
    """
    affines = affine_of(plan, ranges)

    def activation(result: GraphModule, node: Node) -> Node:
        if plan.activations[node.name].like != node.name and (live or not _pads(node)):
            return node  # it moves or scales codes, so it is rounded already
        if live:
            ends = [
                add_tensor(result, f"{node.name}_{end}", torch.tensor(getattr(ranges[node.name], end)))
                for end in Range._fields
            ]
            return result.graph.call_function(follow_and_round, (node, *ends))
        tensors = [
            add_tensor(result, f"{node.name}_{name}", torch.tensor(value))
            for name, value in affines[node.name]._asdict().items()
        ]
        return result.graph.call_function(round_to_codes, (node, *tensors))

    def weight(result: GraphModule, node: Node, unit: Unit) -> Node:
        assert unit.weight is not None
        arguments = (node, unit.weight.channel_axis, weight_limit(plan, unit, limit), unit.weight.one_scale)
        return result.graph.call_function(round_weight, arguments)

    result = wrap(graph, plan, activation, weight)
    for node in result.graph.nodes:
        if live and node.target is BATCH_NORM:
            momentum, epsilon = arguments(node)[6:8]
            node.args = (*arguments(node)[:5], True, momentum or _MOMENTUM, epsilon, True)
    result.recompile()
    return result


def read_ranges(simulation: GraphModule) -> dict[str, Range]:
    """Where the ranges of a live simulation are now, by name of the tensor."""
    followers = [node for node in simulation.graph.nodes if node.target is follow_and_round]
    return {
        node.args[0].name: Range(*(float(parameter(simulation, end)) for end in node.args[1:])) for node in followers
    }


def follow_and_round(x: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Round `x` to the codes of the range from `low` to `high`, scalars, which first moves towards that of `x`."""
    with torch.no_grad():
        for end, found in zip((low, high), x.aminmax(), strict=True):
            end.lerp_(found.float(), AVERAGING)
        first, last = low.clamp(max=0), high.clamp(min=0)
        scale = ((last - first) / CODES).clamp(min=torch.finfo(torch.float32).tiny)
        zero_point = (-first / scale).round()
    return round_to_codes(x, scale, zero_point)


def round_to_codes(x: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    """Round `x` to the numbers that uint8 codes stand for, float32 whatever the type of `x`."""
    return _round(x.float(), scale, zero_point, (0, CODES))


def round_weight(weight: Tensor, channel_axis: int, limit: int, one_scale: bool = False) -> Tensor:
    """Round a weight to the numbers that its codes stand for, with the scales of this very weight."""
    scale = weight_scale(weight, channel_axis, limit, one_scale=one_scale)
    scale = scale.reshape(along_axis(channel_axis, weight.ndim))
    return _round(weight, scale, torch.zeros_like(scale), (-limit, limit))


class _Rounding(torch.autograd.Function):
    """Numbers to the nearest code and back; the gradient passes where codes are not clipped (Bengio et al. 2013).

    On CPUs this takes a tenth of the time of `torch.fake_quantize_per_tensor_affine`, and it divides by the scale as
    ONNX Runtime does. For the gradient it keeps its input, which the layer before mostly keeps as well, and no mask.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, zero_point: Tensor, limits: tuple[int, int]) -> Tensor:
        ctx.save_for_backward(x, scale, zero_point)
        ctx.limits = limits
        codes = (x / scale).round_().add_(zero_point).clamp_(*limits)
        return codes.sub_(zero_point).mul_(scale)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        x, scale, zero_point = ctx.saved_tensors
        first, last = ctx.limits
        codes = (x / scale).add_(zero_point)
        return aten.hardtanh_backward(gradient, codes, first - 0.5, last + 0.5), None, None, None


_round: Callable[[Tensor, Tensor, Tensor, tuple[int, int]], Tensor] = _Rounding.apply


def _pads(node: Node) -> bool:
    """Whether `node` adds numbers of its own to those it moves, which need not have a code."""
    return node.target is aten.pad.default and bool((*arguments(node), "constant", None)[3])
