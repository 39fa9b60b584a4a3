"""From ranges of numbers to scales, zero points and codes; no graph, no model."""

from typing import NamedTuple

import torch
from torch import Tensor

from compressor.onnx_files.qdq import along_axis

CODES = 255
"""Largest uint8 code."""
STORED_LIMIT = 127
"""Largest int8 code of a weight that is only stored."""
_MOST_NOISE = 4.0
"""How much more power a rounding error may have with one scale for all output channels than with one each: one bit."""


class Range(NamedTuple):
    """Smallest and largest value that an activation must hold; others are clipped."""

    low: float
    high: float


class Affine(NamedTuple):
    """What turns codes into numbers: (code - zero_point) * scale."""

    scale: float
    zero_point: int


class WeightCodes(NamedTuple):
    """A weight as integers: int8 codes in its own shape, and a scale per index along `channel_axis`, (C,)."""

    codes: Tensor
    scale: Tensor
    channel_axis: int

    def numbers(self) -> Tensor:
        """Return the weight that the codes stand for, float32."""
        return self.codes.float() * self.scale.reshape(along_axis(self.channel_axis, self.codes.ndim))


def affine(ends: Range) -> Affine:
    """Return scale and zero point of a uint8 tensor with this range, widened so that zero has a code.

    The ends are moved inwards by a millionth. So they fall on the first and last code however a division is rounded:
    else -1 / (2 / 255) might round to another code than the first, and a clip to (-1, 1) would have to stay float.
    """
    low, high = min(ends.low, 0.0) * (1 - 1e-6), max(ends.high, 0.0) * (1 - 1e-6)
    scale = float(torch.tensor((high - low) / CODES, dtype=torch.float32))
    if not scale:
        return Affine(1.0, 0)
    return Affine(scale, min(CODES, max(0, round(-low / scale))))


def weight_scale(
    weight: Tensor,
    channel_axis: int,
    limit: int,
    *,
    bias: Tensor | None = None,
    input_scale: float = 1.0,
    one_scale: bool = False,
) -> Tensor:
    """Return the scales, (C,), with which the largest weight of each output channel is `limit`.

    `bias` / (`input_scale` * scale) must fit into int32, so a channel of tiny weights with a bias gets a larger scale.
    With `one_scale` all channels take the largest one where that costs at most one bit.
    """
    largest = weight.detach().abs().amax([axis for axis in range(weight.ndim) if axis != channel_axis])
    scale = largest / limit
    if bias is not None:
        scale = torch.maximum(scale, bias.detach().abs() / (input_scale * 2.0**30))
    if one_scale:
        highest = scale.max()
        scale = torch.where(highest.square() <= _MOST_NOISE * scale.square().mean(), highest, scale)
    return torch.where(scale > torch.finfo(scale.dtype).tiny, scale, torch.ones_like(scale))


def weight_codes(weight: Tensor, scale: Tensor, channel_axis: int, limit: int) -> WeightCodes:
    """Round a weight to the nearest codes in [-`limit`, `limit`]."""
    rounded = torch.round(weight.detach() / scale.reshape(along_axis(channel_axis, weight.ndim)))
    return WeightCodes(rounded.clamp(-limit, limit).to(torch.int8), scale, channel_axis)
