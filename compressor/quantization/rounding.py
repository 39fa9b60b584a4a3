"""Learned rounding: whether each weight goes to the integer below or above, chosen by what the layer gives."""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.fx import Node

from compressor.onnx_files.qdq import along_axis
from compressor.quantization.float_graph import CONVOLUTIONS, arguments
from compressor.quantization.int8_plan import CLIPS
from compressor.quantization.layerwise import Layer

ITERATIONS = 500
"""Steps of learning per layer."""
_ROWS = 16384
_BATCH = 256
_LEARNING_RATE = 0.1
_WEIGHT_OF_REGULARIZER = 1.0
"""Beside a loss that begins at one."""
_REACH = (-0.1, 1.1)
"""What the sigmoid spans before it is cut to [0, 1], so that it gets to both."""
_WARM_UP = 0.2
"""Share of the steps without regularizer."""


@dataclass(frozen=True)
class _Products:
    """A layer as matrix products in groups of channels, at some positions of some samples."""

    rows: Tensor
    """What is multiplied, (groups, N, inputs of an output channel)."""
    wanted: Tensor
    """What the float layer gives, clipped, (groups, N, output channels)."""
    scale: Tensor
    """Of the codes, (groups, 1, output channels)."""
    bias: Tensor
    """(groups, 1, output channels)."""
    node: Node

    def errors(self, codes: Tensor, picked: Tensor | slice = slice(None)) -> Tensor:
        """Mean square error of each output channel on the `picked` rows, (groups, 1, output channels).

        `codes`: (groups, output channels, inputs of an output channel).
        """
        outputs = torch.bmm(self.rows[:, picked], codes.mT) * self.scale + self.bias
        return (_clip(self.node, outputs) - self.wanted[:, picked]).square().mean(1, keepdim=True)


def learn_rounding(layer: Layer, limit: int, generator: torch.Generator, *, iterations: int = ITERATIONS) -> Layer:
    """Return the layer with each weight rounded up or down so that its clipped outputs are nearest to the float ones.

    AdaRound, Nagel et al. 2020 (arXiv 2004.10568), eq. 21-25: inputs are those of the int8 model so far, targets those
    of the float model. The loss is relative to that of rounding to the nearest, and an output channel that does not
    gain keeps it. Codes stay in [-`limit`, `limit`], and those of weights that are integers already, such as pruned
    ones, do not change. A layer whose products are added with a factor stays as it is.
    """
    if layer.node.kwargs:
        return layer
    products = _products(layer, generator)
    scale = layer.codes.scale.reshape(along_axis(layer.codes.channel_axis, layer.weight.ndim))
    ratio = _matrix(layer, (layer.weight / scale).clamp(-limit, limit))
    nearest = _matrix(layer, layer.codes.codes.float())
    with torch.enable_grad():
        upward = _upward(products, ratio, generator, iterations)
    learned = torch.where(upward, ratio.ceil(), ratio.floor())
    gains = products.errors(learned) < products.errors(nearest)
    chosen = torch.where(gains.mT, learned, nearest).to(torch.int8)
    return replace(layer, codes=layer.codes._replace(codes=_unmatrix(layer, chosen)))


def _upward(products: _Products, ratio: Tensor, generator: torch.Generator, iterations: int) -> Tensor:
    """Learn which weights, divided by their scale, go to the integer above."""
    low, room = ratio.floor(), ratio.ceil() - ratio.floor()
    unit = products.errors(ratio.round()).mean().clamp(min=torch.finfo(torch.float32).tiny)
    share = (ratio - low - _REACH[0]) / (_REACH[1] - _REACH[0])
    logits = share.logit().requires_grad_()
    optimizer = torch.optim.Adam([logits], lr=_LEARNING_RATE)
    for iteration in range(iterations):
        share = _rectified_sigmoid(logits)
        picked = torch.randint(products.rows.shape[1], (_BATCH,), generator=generator)
        loss = products.errors(low + room * share, picked).mean() / unit
        progress = (iteration / iterations - _WARM_UP) / (1 - _WARM_UP)
        if progress > 0:
            beta = 2 + 9 * (1 + math.cos(progress * math.pi))  # from 20 to 2
            loss = loss + _WEIGHT_OF_REGULARIZER * (1 - (2 * share - 1).abs() ** beta).mean()
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]  # torch has not annotated it
        optimizer.step()
    return _rectified_sigmoid(logits.detach()) > 0.5


def _rectified_sigmoid(logits: Tensor) -> Tensor:
    return (logits.sigmoid() * (_REACH[1] - _REACH[0]) + _REACH[0]).clamp(0, 1)


def _clip(node: Node, outputs: Tensor) -> Tensor:
    """Apply the clip that alone reads `node`, if one does."""
    user = next(iter(node.users)) if len(node.users) == 1 else None
    if user is None or user.target not in CLIPS:
        return outputs
    assert callable(user.target)  # as all clips are
    clipped: Tensor = user.target(outputs, *user.args[1:], **user.kwargs)
    return clipped


def _products(layer: Layer, generator: torch.Generator) -> _Products:
    """Draw positions of the layer's outputs, and take what it multiplies and gives there."""
    groups, inputs = len(_matrix(layer, layer.weight)), layer.inputs
    if layer.node.target in CONVOLUTIONS:
        windows, outputs = _windows(layer.node, inputs, layer.weight.shape[2:]), layer.outputs.movedim(1, -1)
        drawn = _draw(outputs.shape[:-1], generator)
        rows, wanted = windows[drawn], outputs[drawn]
    else:
        drawn = _draw(inputs.shape[:-1], generator)
        rows, wanted = inputs[drawn], layer.outputs[drawn]
    bias = torch.zeros(wanted.shape[-1]) if layer.offset is None else layer.offset
    return _Products(
        rows=rows.reshape(len(rows), groups, -1).transpose(0, 1).contiguous(),
        wanted=_clip(layer.node, wanted).reshape(len(rows), groups, -1).transpose(0, 1).contiguous(),
        scale=layer.codes.scale.reshape(groups, 1, -1),
        bias=bias.reshape(groups, 1, -1),
        node=layer.node,
    )


def _draw(sizes: torch.Size, generator: torch.Generator) -> tuple[Tensor, ...]:
    """Indices of at most `_ROWS` positions, without repetition."""
    return torch.unravel_index(torch.randperm(math.prod(sizes), generator=generator)[:_ROWS], sizes)


def _windows(node: Node, inputs: Tensor, kernel: torch.Size) -> Tensor:
    """Return a view of what a convolution multiplies at each position: (N, positions…, C, kernel…)."""
    rank = len(kernel)
    stride, padding, dilation = (*arguments(node), *(None, 1, 0, 1)[len(arguments(node)) - 2 :])[3:6]
    strides, dilations = _each(stride, rank), _each(dilation, rank)
    reach = [step * (size - 1) for step, size in zip(dilations, kernel, strict=True)]
    if isinstance(padding, str):
        before = [length // 2 if padding == "same" else 0 for length in reach]
        after = [length - length // 2 if padding == "same" else 0 for length in reach]
    else:
        before = after = _each(padding, rank)
    ends = [end for pair in zip(reversed(before), reversed(after), strict=True) for end in pair]
    windows = torch.nn.functional.pad(inputs, ends)
    for axis in range(rank):
        windows = windows.unfold(2 + axis, reach[axis] + 1, strides[axis])[..., :: dilations[axis]]
    return windows.movedim(1, 1 + rank)


def _each(value: int | list[int], rank: int) -> list[int]:
    """One number per axis of a kernel."""
    return [value] * rank if isinstance(value, int) else list(value) * (rank // len(value))


def _matrix(layer: Layer, weight: Tensor) -> Tensor:
    """Shape a weight as (groups, output channels, inputs per output channel)."""
    if layer.node.target not in CONVOLUTIONS:
        return weight.movedim(layer.codes.channel_axis, 0)[None]
    groups = layer.inputs.shape[1] // weight.shape[1]
    return weight.reshape(groups, len(weight) // groups, -1)


def _unmatrix(layer: Layer, matrix: Tensor) -> Tensor:
    """Shape back what `_matrix` gave."""
    if layer.node.target not in CONVOLUTIONS:
        return matrix[0].movedim(0, layer.codes.channel_axis).contiguous()
    return matrix.reshape(layer.weight.shape)
