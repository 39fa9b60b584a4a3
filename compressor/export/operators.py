"""Operators that ONNX has and torch lacks: their names for a torch graph, their kernels, and their translation."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from compressor.export.resampling import resampling_translations
from compressor.onnx_files.qdq import along_axis


@torch.library.custom_op("compressor::quantize_linear", mutates_args=())
def quantize_linear(x: Tensor, scale: Tensor, zero_point: Tensor, axis: int) -> Tensor:
    """Codes of `x` in the type of `zero_point`: round half to even, saturate.

    `scale` and `zero_point` are scalars, or have a value per index along `axis`.
    """
    limits = torch.iinfo(zero_point.dtype)
    codes = torch.round(x / _stretch(scale, x.ndim, axis)) + _stretch(zero_point, x.ndim, axis)
    return codes.clamp(limits.min, limits.max).to(zero_point.dtype)


@torch.library.custom_op("compressor::dequantize_linear", mutates_args=())
def dequantize_linear(codes: Tensor, scale: Tensor, zero_point: Tensor, axis: int) -> Tensor:
    """Numbers that the codes stand for: (codes - zero_point) * scale, in the type of `scale`."""
    shifted = codes.to(scale.dtype) - _stretch(zero_point, codes.ndim, axis).to(scale.dtype)
    return shifted * _stretch(scale, codes.ndim, axis)


@torch.library.custom_op("compressor::stored", mutates_args=())
def dequantize_weight(codes: Tensor, scale: Tensor, axis: int) -> Tensor:
    """Numbers of a weight that is stored as int8 and computes in float: codes * scale, (C,) along `axis`."""
    return codes.to(scale.dtype) * _stretch(scale, codes.ndim, axis)


@torch.library.custom_op("compressor::matmul_blocks", mutates_args=())
def matmul_blocks(x: Tensor, codes: Tensor, scale: Tensor, zero_point: Tensor, bias: Tensor | None) -> Tensor:
    """Multiply `x` (…, K) with a weight (N, K) of 4 or 8 bits that has a scale per block of its rows, and add `bias`.

    `codes`: (N, blocks, bytes of a block), uint8, `pack`; `scale`: (N, blocks); `zero_point`: (N, bytes), uint8,
    `pack`. This is ONNX Runtime's MatMulNBits; it rounds blocks of `x` to int8 where a CPU multiplies integers faster.
    """
    bits = _bits(x.shape[-1], codes.shape)
    shifted = unpack(codes, bits).to(x.dtype) - unpack(zero_point, bits)[:, : scale.shape[1], None]
    return torch.nn.functional.linear(x, (shifted * scale[..., None]).flatten(1), bias)


@quantize_linear.register_fake
def _(x: Tensor, scale: Tensor, zero_point: Tensor, axis: int) -> Tensor:  # noqa: ARG001  # one signature for all
    return torch.empty_like(x, dtype=zero_point.dtype)


@dequantize_linear.register_fake
def _(codes: Tensor, scale: Tensor, zero_point: Tensor, axis: int) -> Tensor:  # noqa: ARG001
    return torch.empty_like(codes, dtype=scale.dtype)


@dequantize_weight.register_fake
def _(codes: Tensor, scale: Tensor, axis: int) -> Tensor:  # noqa: ARG001
    return torch.empty_like(codes, dtype=scale.dtype)


@matmul_blocks.register_fake
def _(x: Tensor, codes: Tensor, scale: Tensor, zero_point: Tensor, bias: Tensor | None) -> Tensor:  # noqa: ARG001
    return x.new_empty((*x.shape[:-1], len(codes)))


QUANTIZE = torch.ops.compressor.quantize_linear.default
DEQUANTIZE = torch.ops.compressor.dequantize_linear.default
STORED = torch.ops.compressor.stored.default
MATMUL_BLOCKS = torch.ops.compressor.matmul_blocks.default


_INT8_INPUTS = 4
"""The `accuracy_level` of MatMulNBits at which its inputs may be rounded to int8."""


def translations() -> Mapping[Any, Callable[..., Any]]:
    """From each operator here, and those of `resampling`, to a function that writes it in ONNX."""
    from onnxscript import opset20  # noqa: PLC0415  # only a translation needs it

    multiply = _matmul_n_bits()

    def quantize(x: Any, scale: Any, zero_point: Any, axis: int) -> Any:
        if not scale.shape:  # an axis would be 14 bytes that say nothing
            return opset20.QuantizeLinear(x, scale, zero_point)
        return opset20.QuantizeLinear(x, scale, zero_point, axis=axis)

    def dequantize(codes: Any, scale: Any, zero_point: Any, axis: int) -> Any:
        if not scale.shape:
            return opset20.DequantizeLinear(codes, scale, zero_point)
        return opset20.DequantizeLinear(codes, scale, zero_point, axis=axis)

    def dequantize_stored(codes: Any, scale: Any, axis: int) -> Any:
        return opset20.DequantizeLinear(codes, scale, axis=axis)  # `simplify_qdq` makes a product of it

    def multiply_blocks(x: Any, codes: Any, scale: Any, zero_point: Any, bias: Any) -> Any:
        inputs = x.shape[-1]
        sizes = {"K": inputs, "N": codes.shape[0], "bits": _bits(inputs, codes.shape)}
        block_size = inputs // codes.shape[1]
        return multiply(
            x, codes, scale, zero_point, None, bias, **sizes, block_size=block_size, accuracy_level=_INT8_INPUTS
        )

    own: dict[Any, Callable[..., Any]] = {
        QUANTIZE: quantize,
        DEQUANTIZE: dequantize,
        STORED: dequantize_stored,
        MATMUL_BLOCKS: multiply_blocks,
    }
    return own | dict(resampling_translations())


def pack(codes: Tensor, bits: int) -> Tensor:
    """Put codes of 4 bits two to a byte along the last axis, the first in the lower half; those of 8 stay."""
    if bits == 8:
        return codes
    return codes[..., ::2] | codes[..., 1::2] << 4


def unpack(codes: Tensor, bits: int) -> Tensor:
    """Undo `pack`."""
    return codes if bits == 8 else torch.stack([codes & 15, codes >> 4], dim=-1).flatten(-2)


def _stretch(values: Tensor, dimensions: int, axis: int) -> Tensor:
    """Numbers (C,) in the shape in which they meet a tensor of so many dimensions along `axis`; a scalar stays."""
    return values.reshape(along_axis(axis, dimensions)) if values.ndim else values


def _bits(inputs: int, sizes: Sequence[int]) -> int:
    """Bits of one code, where the `inputs` codes of a row fill `sizes`, (N, blocks, bytes of a block)."""
    return sizes[1] * sizes[2] * 8 // inputs


def _matmul_n_bits() -> Any:
    """Return ONNX Runtime's operator, of which onnx has no schema."""
    from onnx.defs import OpSchema  # noqa: PLC0415
    from onnxscript.values import Op, Opset  # noqa: PLC0415

    def tensor(name: str, kind: str, *, optional: bool = False) -> OpSchema.FormalParameter:
        option = OpSchema.FormalParameterOption
        return OpSchema.FormalParameter(name, kind, param_option=option.Optional if optional else option.Single)

    schema = OpSchema(
        "MatMulNBits",
        "com.microsoft",
        1,
        inputs=[
            tensor("A", "F"),
            tensor("B", "C"),
            tensor("scales", "F"),
            tensor("zero_points", "C", optional=True),
            tensor("g_idx", "I", optional=True),
            tensor("bias", "F", optional=True),
        ],
        outputs=[tensor("Y", "F")],
        type_constraints=[
            ("F", ["tensor(float)"], ""),
            ("C", ["tensor(uint8)"], ""),
            ("I", ["tensor(int32)"], ""),
        ],
        attributes=[
            OpSchema.Attribute(name, OpSchema.AttrType.INT, required=True)
            for name in ("K", "N", "bits", "block_size", "accuracy_level")
        ],
    )
    return Op(Opset("com.microsoft", 1), "MatMulNBits", schema)
