"""From a reference to a module: seeded, in evaluation mode."""

import logging
from functools import cache

import torch
from torch import nn

from compressor.errors import InputError
from compressor.references.reference import Reference

logger = logging.getLogger("compressor")


def build_module(factory: Reference, *, seed: int) -> nn.Module:
    """Call `factory` with torch's generator seeded, which is left as it was; what it gives computes in float32.

    Raises InputError if the factory gives no `nn.Module`, and what `Reference.call` raises.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        module = factory.call()
    if not isinstance(module, nn.Module):
        msg = f"{factory.factory} must return a torch.nn.Module, got {type(module).__name__}"
        raise InputError(msg)
    return _as_float32(module, factory.factory).eval()


def _as_float32(module: nn.Module, name: str) -> nn.Module:
    """Return `module`, in place, with floating-point tensors of another precision in float32; the log names them."""
    tensors = [*module.named_parameters(), *module.named_buffers()]
    others = [(path, one.dtype) for path, one in tensors if one.is_floating_point() and one.dtype != torch.float32]
    if not others:
        return module
    kinds = ", ".join(sorted({str(dtype).removeprefix("torch.") for _, dtype in others}))
    paths = ", ".join(path for path, _ in others[:3]) + (" and more" if len(others) > 3 else "")
    _tell(f"{name}: tensors in {kinds} are computed in float32: {paths}")
    return module.float()


@cache
def _tell(line: str) -> None:
    logger.info(line)  # once: a run builds a model more than once
