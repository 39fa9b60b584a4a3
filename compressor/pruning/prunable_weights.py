"""Weights of a module in which single numbers may become zero; refused where that would have no effect or not last."""

import copy
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from compressor.errors import StageError
from compressor.models.layers import is_within, paths_matching, shared_parameters
from compressor.task import Inputs
from compressor.text.figures import list_names

_CONVOLUTIONS = nn.modules.conv._ConvNd
_TRANSPOSED = nn.modules.conv._ConvTransposeNd


def prunable_weights(module: nn.Module, example_inputs: Inputs, *, protect: tuple[str, ...] = ()) -> dict[str, int]:
    """Names of the weights that can become zero, each with its dimension of input channels.

    Raises InputError if a path of `protect` matches no layer; StageError if a weight that is not protected is frozen,
    computed from others, shared between modules, not finite or takes no part in the outputs, or if none is left.
    """
    protected = {path for pattern in protect for path in paths_matching(module, pattern)}
    dimensions: dict[str, int] = {}
    for path, layer in module.named_modules():
        if not is_within(path, protected):
            prefix = f"{path}." if path else ""
            dimensions |= {f"{prefix}{name}": dimension for name, dimension in _matrices(layer).items()}
    if not dimensions:
        msg = f"{type(module).__name__} must have a convolution or linear layer that is not protected, got none"
        raise StageError(msg)
    parameters = dict(module.named_parameters(remove_duplicate=False))
    _refuse("be parameters", "computed from others", [name for name in dimensions if name not in parameters])
    weights = {name: parameters[name] for name in dimensions}
    shared = shared_parameters(module)
    _refuse("have requires_grad", "frozen", [name for name, weight in weights.items() if not weight.requires_grad])
    several = dict.fromkeys(" = ".join(shared[name]) for name in weights if name in shared)
    _refuse("belong to one module", "shared", list(several))
    _refuse("be finite", "not", [name for name, weight in weights.items() if not weight.isfinite().all()])
    _refuse("take part in the outputs", "unused", _list_idle(module, weights, example_inputs))
    return dimensions


def _matrices(layer: nn.Module) -> dict[str, int]:
    """Names of the weights of one layer, each with its dimension of input channels."""
    if isinstance(layer, _CONVOLUTIONS):
        return {"weight": 0 if isinstance(layer, _TRANSPOSED) else 1}
    if isinstance(layer, nn.Linear):
        return {"weight": 1}
    if isinstance(layer, nn.MultiheadAttention):
        names = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")
        return {name: 1 for name in names if getattr(layer, name) is not None}
    return {}


def _list_idle(module: nn.Module, names: Iterable[str], example_inputs: Inputs) -> list[str]:
    """Names of the weights that the outputs do not depend on."""
    # gradients, not hooks: attention reads the weight of its output layer without calling it
    trial = copy.deepcopy(module).eval()
    outputs: Tensor = trial(*example_inputs)
    if not outputs.requires_grad:
        return list(names)
    gradients = torch.autograd.grad(outputs.sum(), list(map(trial.get_parameter, names)), allow_unused=True)
    return [name for name, gradient in zip(names, gradients, strict=True) if gradient is None]


def _refuse(rule: str, fault: str, names: list[str]) -> None:
    if names:
        listed = list_names(names, most=5)
        msg = f"weights must {rule} to be pruned, but these are {fault}: {listed}; name their layers in protect"
        raise StageError(msg)
