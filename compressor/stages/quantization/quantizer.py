"""Which tensors of an exported graph become int8, chosen so that ONNX Runtime fuses all of them into int8 kernels."""

from collections.abc import Callable, Mapping
from typing import Any, TypeAlias, final

import torch
from torch.fx import GraphModule, Node
from torchao.quantization.pt2e import MinMaxObserver, PerChannelMinMaxObserver
from torchao.quantization.pt2e.quantizer import (
    DerivedQuantizationSpec,
    QuantizationAnnotation,
    QuantizationSpec,
    Quantizer,
    SharedQuantizationSpec,
)

from compressor.errors import StageError

WEIGHT_LIMITS: Mapping[str, int] = {"portable": 63, "x86-vnni": 127}
"""Largest weight, as an integer, by target.

AVX2 without VNNI adds two uint8 x int8 products in 16 bits: 2 * 255 * 63 fits, 2 * 255 * 127 saturates.
"""

_KEY = "quantization_annotation"

# A scale below this belongs to a channel or activation that is zero throughout; much smaller ones would push
# bias / (input scale * weight scale) out of int32.
_SMALLEST_SCALE = 2.0**-16

_aten = torch.ops.aten

# Positions of input, weight and bias among the arguments, and the weight's axis of output channels.
_LINEARS: Mapping[Any, tuple[int, int, int | None, int]] = {
    _aten.linear.default: (0, 1, 2, 0),
    _aten.addmm.default: (1, 2, 0, 1),
    _aten.mm.default: (0, 1, None, 1),
    _aten.matmul.default: (0, 1, None, 1),
}
_CLIPS = {
    _aten.relu.default,
    _aten.relu_.default,
    _aten.relu6.default,
    _aten.relu6_.default,
    _aten.hardtanh.default,
    _aten.hardtanh_.default,
    _aten.clamp.default,
    _aten.clamp_.default,
}


@final
class OnnxRuntimeQuantizer(Quantizer):  # type: ignore[misc]  # torchao has no type information
    """Annotates uint8 activations, per tensor, and int8 weights, symmetric and per output channel.

    Convolutions, sums, products, pools, concatenations and data movement pass int8 on to each other. A linear layer
    gives int8 only to a layer that wants it: float logits cost no time and lose no accuracy. Sums and the like join
    only if all their inputs are int8 already, so that the float stream of a transformer stays whole.
    """

    def __init__(self, weight_limit: int) -> None:
        super().__init__()
        self.activation = QuantizationSpec(
            dtype=torch.uint8,
            quant_min=0,
            quant_max=255,
            qscheme=torch.per_tensor_affine,
            is_dynamic=False,
            observer_or_fake_quant_ctr=MinMaxObserver.with_args(eps=_SMALLEST_SCALE),
        )
        self._weight_limit = weight_limit

    def weight(self, channel_axis: int) -> QuantizationSpec:
        """Specification of weights whose output channels lie along `channel_axis`."""
        return QuantizationSpec(
            dtype=torch.int8,
            quant_min=-self._weight_limit,
            quant_max=self._weight_limit,
            qscheme=torch.per_channel_symmetric,
            ch_axis=channel_axis,
            is_dynamic=False,
            observer_or_fake_quant_ctr=PerChannelMinMaxObserver.with_args(eps=_SMALLEST_SCALE),
        )

    def annotate(self, model: GraphModule) -> GraphModule:
        """Mark the edges to quantize, in place."""
        calls = [node for node in model.graph.nodes if node.op == "call_function"]
        for node in calls:
            annotate = _FAMILIES.get(node.target)
            if annotate is not None and _KEY not in node.meta:
                annotate(node, self)
        for node in calls:
            if node.target in _LINEARS and _KEY in node.meta and not _feeds_int8(_clip_after(node)):
                _quantize_bias(node)
        return model

    def validate(self, model: GraphModule) -> None:
        """Refuse a graph of which nothing would be int8. Raises StageError."""
        if not any(_KEY in node.meta for node in model.graph.nodes):
            msg = "int8 needs a convolution or a linear layer with a weight of its own, but the model has none"
            raise StageError(msg)


def _convolution(node: Node, quantizer: OnnxRuntimeQuantizer) -> None:
    source, weight = node.args[:2]
    if _is_parameter(weight):
        _annotate(node, {source: quantizer.activation, weight: quantizer.weight(0)})
        _annotate(_clip_after(node), output=quantizer.activation)


def _linear(node: Node, quantizer: OnnxRuntimeQuantizer) -> None:
    source, weight, _, channel_axis = _LINEARS[node.target]
    if _is_parameter(node.args[weight]) and len(_shape(node.args[weight])) == 2:
        inputs = {node.args[source]: quantizer.activation, node.args[weight]: quantizer.weight(channel_axis)}
        _annotate(node, inputs)
        _annotate(_clip_after(node))


def _own_scales(node: Node, quantizer: OnnxRuntimeQuantizer) -> None:
    # Concatenation is here as well: a scale shared with a signed tensor has a zero point that would keep the ReLU of
    # another input out of its kernel.
    if all(_is_int8(source) for source in node.all_input_nodes):
        _annotate(node, dict.fromkeys(node.all_input_nodes, quantizer.activation))
        _annotate(_clip_after(node), output=quantizer.activation)


def _arithmetic(node: Node, quantizer: OnnxRuntimeQuantizer) -> None:
    has_number = bool(node.kwargs) or not all(isinstance(argument, Node) for argument in node.args)
    if not has_number:
        _own_scales(node, quantizer)


def _movement(node: Node, quantizer: OnnxRuntimeQuantizer) -> None:
    """Values move and do not change, so scale and zero point stay what they are."""
    source = node.args[0]
    if _is_int8(source):
        _annotate(node, {source: quantizer.activation}, SharedQuantizationSpec((source, node)))


_Family: TypeAlias = Callable[[Node, OnnxRuntimeQuantizer], None]
_FAMILIES: Mapping[Any, _Family] = {
    **dict.fromkeys(
        (_aten.conv1d.default, _aten.conv1d.padding, _aten.conv2d.default, _aten.conv2d.padding), _convolution
    ),
    **dict.fromkeys(_LINEARS, _linear),
    **dict.fromkeys((_aten.add.Tensor, _aten.add_.Tensor, _aten.mul.Tensor, _aten.mul_.Tensor), _arithmetic),
    **dict.fromkeys(
        (
            *_CLIPS,
            _aten.adaptive_avg_pool2d.default,
            _aten.avg_pool1d.default,
            _aten.avg_pool2d.default,
            _aten.cat.default,
            _aten.leaky_relu.default,
            _aten.leaky_relu_.default,
            _aten.mean.dim,
            _aten.sigmoid.default,
        ),
        _own_scales,
    ),
    **dict.fromkeys(
        (
            _aten.contiguous.default,
            _aten.dropout.default,
            _aten.flatten.using_ints,
            _aten.max_pool1d.default,
            _aten.max_pool2d.default,
            _aten.pad.default,
            _aten.permute.default,
            _aten.reshape.default,
            _aten.select.int,
            _aten.slice.Tensor,
            _aten.squeeze.dim,
            _aten.squeeze.dims,
            _aten.transpose.int,
            _aten.unsqueeze.default,
            _aten.upsample_nearest2d.vec,
            _aten.view.default,
        ),
        _movement,
    ),
}


def _annotate(node: Node, inputs: Mapping[Any, Any] | None = None, output: Any = None) -> None:
    """Add to a node's annotation: a specification by input node, and one for its output."""
    present = node.meta.get(_KEY, QuantizationAnnotation(_annotated=True))
    node.meta[_KEY] = QuantizationAnnotation(
        input_qspec_map={**present.input_qspec_map, **(inputs or {})},
        output_qspec=output or present.output_qspec,
        _annotated=True,
    )


def _quantize_bias(node: Node) -> None:
    """Make the bias of a linear layer with float outputs int32: ONNX Runtime does it only where outputs are int8.

    Its scale is input scale * weight scale. Layers on sequences, (N, L, C), have a product and a sum instead of a bias.
    """
    source, weight, bias, _ = _LINEARS[node.target]
    if bias is None or len(node.args) <= bias or node.args[bias] is None or len(_shape(node.args[source])) != 2:
        return
    derived = DerivedQuantizationSpec(
        derived_from=[(node.args[source], node), (node.args[weight], node)],
        derive_qparams_fn=_bias_scale,
        dtype=torch.int32,
        quant_min=-(2**31),
        quant_max=2**31 - 1,
        qscheme=torch.per_channel_symmetric,
        ch_axis=0,
    )
    _annotate(node, {node.args[bias]: derived})


def _bias_scale(observers: list[Any]) -> tuple[torch.Tensor, torch.Tensor]:
    (input_scale, _), (weight_scale, _) = (observer.calculate_qparams() for observer in observers)
    scale = input_scale * weight_scale
    return scale, torch.zeros_like(scale, dtype=torch.int32)


def _clip_after(node: Node) -> Node:
    """Return the ReLU or clamp that alone takes the output of `node`, or `node` itself."""
    user = next(iter(node.users)) if len(node.users) == 1 else None
    return user if user is not None and user.target in _CLIPS else node


def _feeds_int8(node: Node) -> bool:
    return any(node in user.meta[_KEY].input_qspec_map for user in node.users if _KEY in user.meta)


def _is_int8(node: Any) -> bool:
    return isinstance(node, Node) and _KEY in node.meta and node.meta[_KEY].output_qspec is not None


def _is_parameter(node: Any) -> bool:
    return isinstance(node, Node) and node.op == "get_attr"


def _shape(node: Any) -> tuple[Any, ...]:
    return tuple(node.meta["val"].shape)
