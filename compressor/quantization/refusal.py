"""Modules that are not float32: quantized already, so that their numbers are rounded, or of another float type."""

import torch
from torch import nn

from compressor.errors import StageError

_CODES = {torch.int8, torch.qint8, torch.quint8, torch.qint32, torch.quint4x2}  # uint8 may be a mask
_QUANTIZED_MODULES = ("torch.ao.", "torchao.")


def check_float(module: nn.Module) -> None:
    """Raise StageError naming the first layer of `module` that is quantized, or the first tensor of another type."""
    for path, layer in module.named_modules():
        if type(layer).__module__.startswith(_QUANTIZED_MODULES):
            _refuse(f"layer {path!r} is a {type(layer).__module__}.{type(layer).__name__}")
    for name, tensor in module.state_dict().items():
        if isinstance(tensor, torch.Tensor) and tensor.dtype in _CODES:
            _refuse(f"{name!r} holds {tensor.dtype}")
    for name, weight in module.named_parameters():
        if weight.is_floating_point() and weight.dtype != torch.float32:
            _refuse(f"{name!r} holds {weight.dtype}", "convert it with .float(), and its inputs")


def _refuse(fault: str, advice: str = "give the model as it was before it was quantized") -> None:
    msg = f"int8 must start from a float32 model, but {fault}; {advice}"
    raise StageError(msg)
