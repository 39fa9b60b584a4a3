"""Weights of a module: read from a file that must hold exactly these, and counted where they are zero."""

import logging
import pickle
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from compressor.errors import InputError

logger = logging.getLogger("compressor")

_WRAPPERS = ("_orig_mod.", "module.", "model.")
"""What torch.compile, data parallelism and Lightning put before each name."""
_HOLDERS = ("state_dict", "model_state_dict", "model")
"""Where checkpoints keep the weights among other things."""


def load_weights(module: nn.Module, file: Path) -> None:
    """Load a state dict into `module`, in place, from `.safetensors`, or from `.pt`/`.pth` with `weights_only=True`.

    What a wrapper put before all names is left out, and a checkpoint may hold the state dict beside other things; the
    log says so. Raises InputError if the file cannot be read safely, or its names and shapes are not exactly the
    module's.
    """
    content = _read(file)
    if not isinstance(content, Mapping):
        msg = f"{file} must hold a state dict, a mapping of names to tensors, got {type(content).__name__}"
        raise InputError(msg)
    for state, found in _readings(content):
        if _odd_entry(state) or explain_difference(module, state):
            continue
        if found:
            _tell(f"{file}: the weights were found {found}")
        _copy(module, state, file)
        return
    state = next((content[name] for name in _HOLDERS if isinstance(content.get(name), Mapping)), content)
    if odd := _odd_entry(state):
        msg = f"{file} must hold tensors by name, but it has {odd}; save model.state_dict() alone"
        raise InputError(msg)
    difference = explain_difference(module, state)
    msg = f"{file} must hold exactly the tensors of {type(module).__name__}, but it has {difference}"
    raise InputError(msg)


def _read(file: Path) -> object:
    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        _check_kind(file)
        return torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        msg = f"{file} must hold tensors only, but it holds other Python objects; save its state_dict as .safetensors"
        raise InputError(msg) from error
    except (SafetensorError, OSError, EOFError, RuntimeError, ValueError, LookupError, AttributeError) as error:
        msg = f"{file} must be a readable weights file (.safetensors or .pt): {error}"
        raise InputError(msg) from error


def _check_kind(file: Path) -> None:
    """Raise InputError for a file that torch cannot have saved: its first bytes are those of neither zip nor pickle."""
    with file.open("rb") as stream:
        start = stream.read(9)
    if start.startswith((b"PK", b"\x80")):
        return
    hint = "it looks like safetensors: name it so" if start[8:] == b"{" else "it is no pickle and no zip archive"
    msg = f"{file} must be a weights file that torch.save or safetensors wrote, but {hint}"
    raise InputError(msg)


def _readings(content: Mapping[Any, Any]) -> Iterator[tuple[Mapping[Any, Any], str]]:
    """The state dicts that a file may hold, each with the words for where it was found; none for the file itself."""
    holders = [("", content), *((name, content[name]) for name in _HOLDERS if isinstance(content.get(name), Mapping))]
    for holder, state in holders:
        places = [f"in its {holder!r}"] if holder else []
        yield state, ", ".join(places)
        names = {name: name for name in state if isinstance(name, str) and name != "n_averaged"}  # of averaged models
        without: list[str] = []
        while names:
            compiled = {full: name.replace("._orig_mod.", ".") for full, name in names.items()}
            wrapper = next((one for one in _WRAPPERS if all(name.startswith(one) for name in names.values())), None)
            if wrapper is None and compiled == names:
                break
            without.append(wrapper or "_orig_mod.")
            names = {full: name.removeprefix(wrapper) for full, name in names.items()} if wrapper else compiled
            before = f"behind the prefix {', '.join(map(repr, without))}"
            yield {name: state[full] for full, name in names.items()}, ", ".join([*places, before])


def _odd_entry(state: Mapping[Any, Any]) -> str:
    """The first entry that is no tensor with a name, in words; empty if all are."""
    for name, value in state.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            return f"a {type(value).__name__} as {name!r}"
    return ""


def _copy(module: nn.Module, state: Mapping[str, Tensor], file: Path) -> None:
    try:
        module.load_state_dict(state, strict=False)
    except RuntimeError as error:
        msg = f"{file} must hold weights that {type(module).__name__} can take, but: {error}"
        raise InputError(msg) from error


def check_finite(module: nn.Module, where: str) -> None:
    """Raise InputError for a parameter that holds NaN or infinity, or a buffer with NaN, of what `where` gives.

    A buffer may hold infinities on purpose, such as the mask of an attention.
    """
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        if not tensor.is_floating_point():
            continue
        wrong = ~tensor.isfinite() if isinstance(tensor, nn.Parameter) else tensor.isnan()
        if wrong.any():
            msg = (
                f"weights must be finite, but {name!r} of {where} has NaN or infinity in {int(wrong.sum())} of "
                f"{tensor.numel()} numbers; train it again, or take an earlier checkpoint"
            )
            raise InputError(msg)


@cache
def _tell(line: str) -> None:
    logger.info(line)  # once: a run builds a model more than once


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
