"""From a reference to a module: seeded, in evaluation mode."""

import torch
from torch import nn

from compressor.errors import InputError
from compressor.references.reference import Reference


def build_module(factory: Reference, *, seed: int) -> nn.Module:
    """Call `factory` with torch's generator seeded, which is left as it was.

    Raises InputError if the factory gives no `nn.Module`, and what `Reference.call` raises.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        module = factory.call()
    if not isinstance(module, nn.Module):
        msg = f"{factory.factory} must return a torch.nn.Module, got {type(module).__name__}"
        raise InputError(msg)
    return module.eval()
