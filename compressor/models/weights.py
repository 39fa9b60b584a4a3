"""Weights of a module: read from a file that must hold exactly these, and counted where they are zero."""

import pickle
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from compressor.errors import InputError


def load_weights(module: nn.Module, file: Path) -> None:
    """Load a state dict into `module`, in place, from `.safetensors`, or from `.pt`/`.pth` with `weights_only=True`.

    Raises InputError if the file cannot be read safely or its names and shapes are not exactly the module's.
    """
    try:
        if file.suffix == ".safetensors":
            state = load_file(file)
        else:
            state = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        msg = f"{file} must hold tensors only, but it holds other Python objects; save its state_dict as .safetensors"
        raise InputError(msg) from error
    except (SafetensorError, OSError, EOFError, RuntimeError) as error:
        msg = f"{file} must be a readable weights file (.safetensors or .pt): {error}"
        raise InputError(msg) from error
    if not isinstance(state, Mapping):
        msg = f"{file} must hold a state dict, a mapping of names to tensors, got {type(state).__name__}"
        raise InputError(msg)
    if difference := explain_difference(module, state):
        msg = f"{file} must hold exactly the tensors of {type(module).__name__}, but it has {difference}"
        raise InputError(msg)
    module.load_state_dict(state, strict=False)


def count_zeros(tensor: Tensor) -> int:
    """How many numbers of `tensor` are zero."""
    return tensor.numel() - int(tensor.count_nonzero())


def explain_difference(module: nn.Module, state: Mapping[str, Tensor]) -> str:
    """Say in what names and shapes the tensors of `state` are not those of `module`; empty if they are."""
    wanted = module.state_dict()
    # safetensors stores a tensor that two modules share once, under one of its names
    stored = {tensor.data_ptr() for name, tensor in wanted.items() if name in state}
    missing = [name for name, tensor in wanted.items() if name not in state and tensor.data_ptr() not in stored]
    unexpected = [name for name in state if name not in wanted]
    shapes = [
        f"{name} {tuple(state[name].shape)} instead of {tuple(tensor.shape)}"
        for name, tensor in wanted.items()
        if name in state and state[name].shape != tensor.shape
    ]
    faults = {"missing": missing, "unexpected": unexpected, "of another shape": shapes}
    return "; ".join(f"{len(names)} {kind}: {', '.join(names[:10])}" for kind, names in faults.items() if names)
