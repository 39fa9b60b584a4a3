"""A group of coupled units, and a module without some of them: pure bookkeeping of tensors and sizes."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Literal, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from compressor.errors import StageError
from compressor.models.layers import shared_parameters
from compressor.models.outputs import FORWARD_ERRORS, relative_error
from compressor.system.copying import copy_module
from compressor.task import Inputs

Units: TypeAlias = Sequence[int]
"""Positions of units in their group."""


@dataclass(frozen=True)
class Member:
    """A tensor that loses entries with every unit of a group."""

    path: str
    """Of the submodule that holds the tensor."""
    name: str
    """Of the parameter or buffer in it."""
    dim: int
    index: tuple[tuple[int, ...], ...]
    """Positions along `dim` that leave with each unit; equally many for all."""
    reads: bool = False
    """Whether these entries multiply what the units make: with zeros there, the units have no effect."""


@dataclass(frozen=True)
class Size:
    """An integer attribute, or a part of a tuple of them, that falls by `per_unit` with every unit."""

    path: str
    name: str
    per_unit: int
    position: int | None = None
    """Of the number in a tuple; None for an attribute that is an integer itself."""


@dataclass(frozen=True)
class Group:
    """Units that can be removed one by one, each with all that depends on it."""

    path: str
    """The layer that makes the units; names the group."""
    units: int
    members: tuple[Member, ...]
    sizes: tuple[Size, ...]
    kind: Literal["channels", "heads"] = "channels"
    channels_per_unit: int = 1
    """How many channels leave with a unit: more than one for heads and grouped convolutions."""
    averaging: tuple[str, ...] = ()
    """Normalizations that average over the units: with fewer units, what they give for the others changes too."""


Removal: TypeAlias = Mapping[str, tuple[int, ...]]
"""Units to remove, by the path of their group."""


def without(module: nn.Module, groups: Sequence[Group], removal: Removal) -> nn.Module:
    """Return a copy of `module` in evaluation mode without the units of `removal`; tensors are cut, sizes follow.

    Raises StageError if a group would keep no unit.
    """
    entries: dict[tuple[str, str, int], set[int]] = defaultdict(set)
    falls: dict[tuple[str, str, int | None], int] = defaultdict(int)
    for group in groups:
        removed = removal.get(group.path, ())
        if len(removed) >= group.units:
            msg = f"{group.path} must keep one of its {group.units} {group.kind}, but all are to be removed"
            raise StageError(msg)
        for member in group.members:
            entries[member.path, member.name, member.dim].update(_entries(member, removed))
        for size in group.sizes:
            falls[size.path, size.name, size.position] += size.per_unit * len(removed)
    smaller = copy_module(module).eval()
    for (path, name, dim), gone in entries.items():
        if gone:
            _cut_in_place(smaller.get_submodule(path), name, dim, gone)
    for (path, name, position), fall in falls.items():
        if fall:
            _shrink_in_place(smaller.get_submodule(path), name, position, fall)
    return smaller


def silence(module: nn.Module, groups: Sequence[Group], removal: Removal) -> nn.Module:
    """Return a copy of `module` in evaluation mode in which nothing reads the units of `removal`: of equal size."""
    silent = copy_module(module).eval()
    for group in groups:
        for member in group.members:
            if member.reads:
                tensor = getattr(silent.get_submodule(member.path), member.name)
                gone = torch.tensor(sorted(_entries(member, removal.get(group.path, ()))), dtype=torch.long)
                tensor.data.index_fill_(member.dim, gone.to(tensor.device), 0)
    return silent


def check_cut(module: nn.Module, groups: Sequence[Group], removal: Removal, example_inputs: Inputs) -> None:
    """Raise StageError unless `module` without the units of `removal` answers as if nothing read them.

    In this comparison, normalizations that average over units divide by one number instead: the size of their inputs.
    """
    averaging = sorted({path for group in groups if removal.get(group.path) for path in group.averaging})
    proven = _without_averages(module, averaging, example_inputs) if averaging else module
    check_equal(without(proven, groups, removal), silence(proven, groups, removal), example_inputs)


def check_equal(smaller: nn.Module, silent: nn.Module, example_inputs: Inputs, *, tolerance: float = 1e-4) -> None:
    """Raise StageError unless both modules give outputs of one shape, equal to a relative RMS error of `tolerance`.

    float32 sums in another order differ by about 1e-6; a wrong entry cut shows as a part of the output itself.
    """
    outputs, wanted = run(smaller, example_inputs), run(silent, example_inputs)
    if outputs.shape != wanted.shape:
        msg = f"outputs must keep the shape {tuple(wanted.shape)}, got {tuple(outputs.shape)} after pruning"
        raise StageError(msg)
    error = relative_error(outputs, wanted)
    if not error <= tolerance:
        msg = (
            f"without channels a model must answer as if nothing read them, but its outputs differ by {error:.2g} of "
            "their size: something uses these channels in a way that cannot be followed"
        )
        raise StageError(msg)


def check_free(module: nn.Module, group: Group) -> None:
    """Raise StageError if a tensor that `group` cuts is computed from others, frozen, or shared by several layers."""
    shared = shared_parameters(module)
    for member in group.members:
        layer, whole_name = module.get_submodule(member.path), f"{member.path}.{member.name}".lstrip(".")
        name = f"its {member.name}" if member.path == group.path else whole_name
        if member.name not in layer._parameters and member.name not in layer._buffers:
            msg = f"{name} is computed from other parameters; {_plain_advice(layer)}"
            raise StageError(msg)
        parameter = layer._parameters.get(member.name)
        if parameter is not None and not parameter.requires_grad:
            msg = f"{name} is frozen: it has requires_grad=False"
            raise StageError(msg)
        if whole_name in shared:
            msg = f"{' and '.join(shared[whole_name])} are one and the same"
            raise StageError(msg)


def _plain_advice(layer: nn.Module) -> str:
    if is_parametrized(layer):
        return "call torch.nn.utils.parametrize.remove_parametrizations on its layer in the factory to prune it"
    hooks = {type(hook).__name__ for hook in layer._forward_pre_hooks.values()}
    known = {"WeightNorm": "remove_weight_norm", "SpectralNorm": "remove_spectral_norm"}
    calls = [call for name, call in known.items() if name in hooks] or ["prune.remove"]
    return f"call torch.nn.utils.{calls[0]} on its layer in the factory to prune it"


def runs_in_training(module: nn.Module, example_inputs: Inputs) -> bool:
    """Whether a copy of `module` runs in training mode on `example_inputs`, whatever it gives."""
    trial = copy_module(module).train()
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        try:
            trial(*example_inputs)
        except FORWARD_ERRORS:
            return False
    return True


def run(module: nn.Module, example_inputs: Inputs) -> Tensor:
    """Outputs without gradient. Raises StageError if the module does not run or gives anything but one tensor."""
    with torch.no_grad():
        try:
            outputs: object = module(*example_inputs)
        except FORWARD_ERRORS as error:
            msg = (
                f"{type(module).__name__} must run after pruning, but: {error}; is a size written in its forward or "
                "held by a buffer?"
            )
            raise StageError(msg) from error
    if not isinstance(outputs, Tensor):
        msg = f"{type(module).__name__} must give one tensor to be pruned, got {type(outputs).__name__}"
        raise StageError(msg)
    return outputs


def _without_averages(module: nn.Module, paths: Sequence[str], example_inputs: Inputs) -> nn.Module:
    """Copy `module` with the layers at `paths` dividing their inputs by the size that these have in `module`."""
    plain = copy_module(module).eval()
    sizes: dict[str, Tensor] = {}

    def measure(path: str, _layer: nn.Module, inputs: Inputs, _outputs: Tensor) -> None:
        sizes[path] = inputs[0].square().mean().sqrt().clamp(min=1e-12)

    def divide(path: str, _layer: nn.Module, inputs: Inputs, _outputs: Tensor) -> Tensor:
        return inputs[0] / sizes[path]

    hooks = [plain.get_submodule(path).register_forward_hook(partial(measure, path)) for path in paths]
    run(plain, example_inputs)
    for path, hook in zip(paths, hooks, strict=True):
        hook.remove()
        plain.get_submodule(path).register_forward_hook(partial(divide, path))
    return plain


def _entries(member: Member, units: Units) -> set[int]:
    return set(chain.from_iterable(member.index[unit] for unit in units))


def _cut_in_place(submodule: nn.Module, name: str, dim: int, gone: set[int]) -> None:
    tensor = getattr(submodule, name)
    kept = torch.tensor([entry for entry in range(tensor.shape[dim]) if entry not in gone], dtype=torch.long)
    smaller = tensor.detach().index_select(dim, kept.to(tensor.device))
    is_parameter = isinstance(tensor, nn.Parameter)
    setattr(submodule, name, nn.Parameter(smaller, tensor.requires_grad) if is_parameter else smaller)


def _shrink_in_place(submodule: nn.Module, name: str, position: int | None, fall: int) -> None:
    size = getattr(submodule, name)
    if position is None:
        setattr(submodule, name, size - fall)
    else:
        setattr(submodule, name, tuple(part - fall * (place == position) for place, part in enumerate(size)))
